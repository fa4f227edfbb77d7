"""pretrain.py ("ours") against nanoGPT's train.py on the same CPU: Tiny Shakespeare by characters.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    ALIGN_DATA=DIR python benchmarks/pretrain_vs_nanogpt.py --nanogpt ../nanoGPT

1. Speed: nanoGPT's architecture and batch in both (4 layers, 4 heads, width 128, context 64, batch 12, AdamW;
   pretrain.py uses the tanh form of GELU), eager against eager and compiled against compiled. The figure is the median
   over the last three quarters of `--speed_steps` steps, each with its log, the best of `--repeats` runs; the two take
   turns. pretrain.py runs in fp32, and on a CPU that multiplies bf16 in bf16 too; nanoGPT's script has no mixed
   precision on a CPU.
2. Recipes: nanoGPT's CPU recipe from its README, then configs/shakespeare_cpu.yaml, then the latter with as many steps
   as fit into nanoGPT's wall time. Wall times are those of the whole process, from import to exit. Both models are
   evaluated over the whole validation split, cut into windows of the same context.

Every run is started as a user would start it. Needs no package beyond those of this repository.
"""

import argparse
import itertools
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    """Run a command -> its output, the seconds that the whole process took."""
    env = os.environ | {"ALIGN_DATA": str(data_folder())}
    started = time.perf_counter()
    process = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{process.stderr[-2000:]}")
    return process.stdout, time.perf_counter() - started


def data_folder():
    return Path(os.environ.get("ALIGN_DATA", "downloads")).resolve()


def prepare(nanogpt):
    """Write the files of nanoGPT's data/shakespeare_char/prepare.py, without its download -> the validation file."""
    text = (data_folder() / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
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
    lines = (Path(scratch) / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def our_speed(scratch, compiled, dtype, steps):
    flags = [*SAME.split(), "--steps", steps, "--name", "speed", "--dtype", dtype]
    our_run(scratch, [*flags, "--compile", str(compiled).lower()])
    board = EventAccumulator(str(Path(scratch) / "runs" / "speed" / "tensorboard")).Reload()
    times = [b.wall_time - a.wall_time for a, b in itertools.pairwise(board.Scalars("loss"))]
    return CONTEXT * BATCH / statistics.median(times[len(times) // 4 :])


def speed(nanogpt, scratch, compiled, args):
    dtypes = ["fp32", "bf16"] if auto_dtype(torch.device("cpu")) == "bf16" else ["fp32"]
    our_speeds, nanogpt_speeds = {dtype: [] for dtype in dtypes}, []
    for _ in range(args.repeats):
        nanogpt_speeds.append(nanogpt_speed(nanogpt, Path(scratch) / "out", compiled, args.speed_steps))
        for dtype in dtypes:
            our_speeds[dtype].append(our_speed(scratch, compiled, dtype, args.speed_steps))
    mode, nanogpt_best = "compiled" if compiled else "eager", max(nanogpt_speeds)
    for dtype in dtypes:
        best = max(our_speeds[dtype])
        comparison = f"nanoGPT {nanogpt_best:8,.0f}: {best / nanogpt_best:.2f} times"
        print(f"{mode:>9}: ours in {dtype} {best:8,.0f} tokens/s, {comparison}", flush=True)


def recipe(scratch, name, *flags):
    _, seconds = our_run(scratch, ["--config", ROOT / "configs" / "shakespeare_cpu.yaml", "--name", name, *flags])
    return metrics(scratch, name)[-1]["valid_loss"], seconds, len(metrics(scratch, name))


def recipes(nanogpt, scratch, val):
    _, nanogpt_seconds = nanogpt_run(nanogpt, Path(scratch) / "recipe")
    command = ["-c", EVALUATE, Path(scratch) / "recipe" / "ckpt.pt", val, CONTEXT]
    nanogpt_loss, step = map(float, start(command, nanogpt)[0].splitlines()[-1].split())  # after nanoGPT's own output
    print(f"  nanoGPT: validation loss {nanogpt_loss:.4f} (its checkpoint of step {step:.0f}), {nanogpt_seconds:.1f} s")
    loss, seconds, steps = recipe(scratch, "recipe")
    print(f"     ours: validation loss {loss:.4f}, {seconds:.1f} s for {steps} steps: ", end="")
    print(f"{seconds / nanogpt_seconds:.2f} of its time, {loss - nanogpt_loss:+.4f} nats per token")
    more_steps = int(steps * 0.95 * nanogpt_seconds / seconds)
    loss, seconds, steps = recipe(scratch, "longer", "--steps", more_steps)
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
        parser.error(f"{nanogpt} holds no train.py: git clone https://github.com/karpathy/nanoGPT, and pass its folder")
    text = data_folder() / "tinyshakespeare" / "input.txt"
    if not text.is_file():
        parser.error(f"{text} is not there: set ALIGN_DATA to the data folder")
    val = prepare(nanogpt)
    with tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            if part == "recipes":
                recipes(nanogpt, scratch, val)
            else:
                speed(nanogpt, scratch, part == "compiled", args)


if __name__ == "__main__":
    main()
