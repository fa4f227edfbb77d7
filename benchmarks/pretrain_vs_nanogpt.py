"""pretrain.py against nanoGPT's train.py, in turn on the same machine: Tiny Shakespeare by characters, on the CPU.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    ALIGN_DATA=DIR python benchmarks/pretrain_vs_nanogpt.py --nanogpt ../nanoGPT

1. Speed: nanoGPT's architecture and batch in both (4 layers, 4 heads, width 128, context 64, batch 12, AdamW; ours with
   the tanh form of GELU), eager against eager and compiled against compiled; the median step of `--speed_steps`, the
   best of `--repeats` runs in turn. Ours in fp32, and on a CPU with AMX in bf16 too: nanoGPT's script knows no mixed
   precision on a CPU.
2. Recipes: nanoGPT's CPU recipe as its README gives it, then configs/shakespeare_cpu.yaml, then that with as many steps
   as fit into nanoGPT's wall time. Wall times are those of the whole process, from import to exit. Both models are
   evaluated over the whole validation split, cut into windows of the same context.

Everything runs as a user would start it. Needs no package that this repository does not.
"""

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from support.devices import auto_dtype

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, BATCH = 64, 12
PARTS = ["eager", "compiled", "recipes"]
README = f"--device=cpu --eval_iters=20 --log_interval=1 --block_size={CONTEXT} --batch_size={BATCH} --n_layer=4"
README = f"{README} --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
SAME = f"--data tinyshakespeare --tokenizer char --batch {BATCH} --micro_batch {BATCH} --optimizer adamw --lr 1e-3"
SAME = f"{SAME} --warmup 100 --eval_every 100000 --save_every 100000 --eval_tokens 100 --model.context {CONTEXT}"
SAME = f"{SAME} --model.n_layer 4 --model.n_head 4 --model.n_kv_head 4 --model.width 128 --model.norm layer"
SAME = f"{SAME} --model.positions learned --model.activation gelu --model.qk_norm false --model.norm_eps 1e-5"
EVALUATE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
model.eval()
ids, T = torch.from_numpy(np.fromfile(sys.argv[2], dtype=np.uint16).astype(np.int64)), int(sys.argv[3])
n = (len(ids) - 1) // T
x, y = ids[: n * T].view(n, T), ids[1 : n * T + 1].view(n, T)
with torch.no_grad():
    total = sum(model(a, b)[1].item() * a.numel() for a, b in zip(x.split(64), y.split(64)))
print(total / (n * T), saved["iter_num"])
"""


def start(command, cwd):
    """-> what it printed, the seconds that the whole process took."""
    env = os.environ | {"ALIGN_DATA": str(data_folder())}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - started


def data_folder():
    return Path(os.environ.get("ALIGN_DATA", "downloads")).resolve()


def prepare(nanogpt):
    """What data/shakespeare_char/prepare.py writes, without its download."""
    text = (data_folder() / "tinyshakespeare" / "input.txt").read_text()
    chars, cut = sorted(set(text)), int(len(text) * 0.9)
    stoi = {c: i for i, c in enumerate(chars)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    folder = nanogpt / "data" / "shakespeare_char"
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "val.bin"


def nanogpt_run(nanogpt, out, compiled=False, **changes):
    flags = [*README.split(), f"--compile={compiled}", f"--out_dir={out}"]
    flags += [f"--{name}={value}" for name, value in changes.items()]
    return start(["train.py", "config/train_shakespeare_char.py", *flags], nanogpt)


def nanogpt_speed(nanogpt, out, compiled, steps):
    printed, _ = nanogpt_run(nanogpt, out, compiled, max_iters=steps, eval_interval=100000, eval_iters=1)
    times = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", printed, re.M)]
    return CONTEXT * BATCH / statistics.median(times[len(times) // 4 :])


def our_run(scratch, flags):
    return start([ROOT / "pretrain.py", "--device", "cpu", *flags], scratch)


def metrics(scratch, name):
    lines = (Path(scratch) / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def our_speed(scratch, compiled, dtype, steps):
    flags = [*SAME.split(), "--steps", steps, "--name", "speed", "--dtype", dtype]
    our_run(scratch, [*flags, "--compile", str(compiled).lower()])
    speeds = [record["tokens_per_second"] for record in metrics(scratch, "speed")]
    return statistics.median(speeds[len(speeds) // 4 :])


def speed(nanogpt, scratch, compiled, args):
    kinds = ["fp32", "bf16"] if auto_dtype(torch.device("cpu")) == "bf16" else ["fp32"]
    ours, theirs = {kind: [] for kind in kinds}, []
    for _ in range(args.repeats):
        theirs.append(nanogpt_speed(nanogpt, Path(scratch) / "out", compiled, args.speed_steps))
        for kind in kinds:
            ours[kind].append(our_speed(scratch, compiled, kind, args.speed_steps))
    for kind in kinds:
        a, b, what = max(ours[kind]), max(theirs), "compiled" if compiled else "eager"
        print(f"{what:>9}: ours in {kind} {a:8,.0f} tokens/s, nanoGPT {b:8,.0f}: {a / b:.2f} times", flush=True)


def recipe(scratch, name, *flags):
    _, seconds = our_run(scratch, ["--config", ROOT / "configs" / "shakespeare_cpu.yaml", "--name", name, *flags])
    return metrics(scratch, name)[-1]["valid_loss"], seconds, len(metrics(scratch, name))


def recipes(nanogpt, scratch, val):
    _, their_seconds = nanogpt_run(nanogpt, Path(scratch) / "recipe")
    command = ["-c", EVALUATE, Path(scratch) / "recipe" / "ckpt.pt", val, CONTEXT]
    their_loss, step = map(float, start(command, nanogpt)[0].splitlines()[-1].split())  # nanoGPT talks before
    print(f"  nanoGPT: validation loss {their_loss:.4f} (its checkpoint of step {step:.0f}), {their_seconds:.1f} s")
    loss, seconds, steps = recipe(scratch, "recipe")
    print(f"     ours: validation loss {loss:.4f}, {seconds:.1f} s for {steps} steps: ", end="")
    print(f"{seconds / their_seconds:.2f} of its time, {loss - their_loss:+.4f} nats per token")
    longer = int(steps * 0.95 * their_seconds / seconds)
    loss, seconds, steps = recipe(scratch, "longer", "--steps", longer)
    print(f"     ours in about its time: validation loss {loss:.4f}, {seconds:.1f} s for {steps} steps", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed_steps", type=int, default=200)
    args = parser.parse_args()
    nanogpt = args.nanogpt.resolve()
    if not (nanogpt / "train.py").is_file():
        parser.error(f"{nanogpt} holds no train.py: git clone https://github.com/karpathy/nanoGPT, and name the folder")
    val = prepare(nanogpt)
    with tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            if part == "recipes":
                recipes(nanogpt, scratch, val)
            else:
                speed(nanogpt, scratch, part == "compiled", args)


if __name__ == "__main__":
    main()
