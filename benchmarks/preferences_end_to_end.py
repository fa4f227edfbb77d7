"""dpo.py ("ours") against TRL's DPOTrainer from end to end: one start, the same pairs, and one judge of the results.

Both train all weights of one start, which is exported to Hugging Face's format, on the same pairs in the same order,
with the same objective (plain DPO), AdamW, learning rates, clipping, micro-batches and dtype. TRL tokenizes the texts
itself, and the ids must be ours. Then one scorer, transformers' model in fp32 and a log-softmax in fp64, reads the
held-out pairs (validation and test) under the start and under both results.

    ordered rightly   h = β (log π(y_w) − log π_start(y_w) − log π(y_l) + log π_start(y_l)) is above 0
    likelier          log π(y_w) is above log π(y_l); this says something about the start too
    margin, loss      means of h and of −log σ(h) over the held-out pairs
    seconds           of one step, the median; TRL's without those of the reference, which both compute beforehand

In fp32 the losses of the first CHECKED steps must agree to TOLERANCE of ours, or the script ends with status 1. They
can only if gradients and updates are equal too: β or the learning rate off by 1 % breaks it. Later, and in bf16,
rounding drives the two apart, and the table is the comparison.

All flags but --quick and --out are dpo.py's. Needs the project's `.[dev]`. Run it, from the project's directory:
    python benchmarks/preferences_end_to_end.py --config configs/dpo_style_smollm2.yaml --init SmolLM2….gguf
    python benchmarks/preferences_end_to_end.py --quick      # a random model of 0.1 million parameters: seconds
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

import dpo
from data import DEFAULT_TASK, load_pairs, rows_at
from evaluate import wilson
from optim import lr_at
from support.checkpoints import open_checkpoint
from support.cli import parse_config, run_script
from support.devices import auto_dtype, setup
from support.downloads import data_folder
from support.errors import ConfigError
from support.files import must_write
from support.pair_rows import encode_pair
from support.tables import markdown_table
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

START, CHECKED, TOLERANCE = "start", 5, 1e-5
QUICK = dict(steps=6, batch=8, micro_batch=4, prompts=40, eval_problems=20, test_problems=20, lr=1e-3, warmup=2)
QUICK |= dict(data="pairs.jsonl", nll=0.0, beta=0.1, optimizer="adamw", dtype="fp32", device="cpu", max_new_tokens=4)
SIDES = ("chosen", "rejected")


def quick_start():
    """A random model with its tokenizer, and pairs.jsonl: problems with right and corrupted solutions."""
    pairs = [p for split, n in (("train", 40), ("valid", 20), ("test", 20)) for p in load_pairs(DEFAULT_TASK, split, n)]
    records = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    tokenizer = BPETokenizer.train([p.prompt + "\n" + p.chosen for p in pairs], 400)
    torch.manual_seed(0)
    shape = dict(context=192, n_layer=2, n_head=4, n_kv_head=2, width=48)
    return Transformer(TransformerConfig(tokenizer.vocab_size, **shape)), tokenizer


def check_comparable(config):
    """ConfigError if TRL would not compute the same."""
    same = {"variant": "sigmoid", "nll": 0.0, "optimizer": "adamw", "label_smoothing": 0.0, "dropout": 0.0}
    same |= {"weight_decay": 0.0, "resume": False}
    for name, value in same.items():
        if getattr(config, name) != value:
            raise ConfigError(f"--{name} {getattr(config, name)}: this comparison needs {value}")
    if config.init is None:
        raise ConfigError("this comparison needs a start: --init with a checkpoint")
    if config.lora.rank or config.pairs != "offline" or config.batch % config.micro_batch:
        raise ConfigError("this comparison needs all weights, offline pairs, and a --batch of whole --micro_batch")


def read_pairs(config, tokenizer, context):
    """{split: rows of ids}, those that dpo.py reads."""
    rows, longest = {}, min(context, config.max_tokens or context)
    for split, n in config.sizes.items():
        texts = load_pairs(config.data, split, n, seed=config.seed, skip_bad=config.skip_bad)
        encoded = [encode_pair(tokenizer, pair) for pair in texts]
        rows[split] = [r for r in encoded if len(r["prompt"]) + max(len(r[s]) for s in SIDES) <= longest]
    return rows


def train_ours(config):
    """-> the checkpoint, losses of the steps, seconds of each."""
    path = Path(dpo.main(config)["path"]).parent
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return path / "last", [r["loss"] for r in records], [1 / r["steps_per_second"] for r in records]


def train_trl(config, rows, tokenizer):
    """The same with TRL's trainer. rows: the training pairs, as ids; TRL gets their text."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    order = [i for step in range(config.steps) for i in rows_at(len(rows), step, config.batch, config.seed)]
    texts = [{side: tokenizer.decode(row[side]) for side in ("prompt", *SIDES)} for row in rows]
    losses, began, seconds = [], [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - began[-1])

        def on_log(self, *_, logs=None, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_at(s, config.steps, 1.0, config.warmup))
    arguments = DPOConfig(
        output_dir="trl",
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // config.micro_batch,
        max_grad_norm=config.clip,
        beta=config.beta,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bf16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([texts[i] for i in order]),
        processing_class=AutoTokenizer.from_pretrained(START),
        optimizers=(optimizer, schedule),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    for i, ids in zip(order, trainer.train_dataset, strict=True):
        if any(ids[f"{side}_ids"] != rows[i][side] for side in ("prompt", *SIDES)):
            raise ConfigError(f"TRL reads other ids than dpo.py in the pair of the prompt {texts[i]['prompt']!r}")
    trainer.train()
    trainer.save_model("trl/last")
    return Path("trl/last"), losses, seconds


@torch.no_grad()
def log_probs(path, rows):
    """log π of the chosen and of the rejected answer of each row, (n, 2) in float64, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sums = []
    for row in rows:
        for side in SIDES:
            ids, start = torch.tensor([row["prompt"] + row[side]]), len(row["prompt"])
            logits = model(ids).logits[0, start - 1 : -1]  # (tokens of the answer, V)
            logs = F.log_softmax(logits.double(), dim=-1).gather(1, ids[0, start:, None])
            sums.append(logs.sum().item())
    return torch.tensor(sums, dtype=torch.float64).view(-1, 2)


def share(right):
    """(n,) bool -> the share and its interval, as text."""
    hits, n = int(right.sum()), len(right)
    low, high = wilson(hits, n)
    return f"{hits / n:.1%} [{low:.1%}, {high:.1%}]"


def table(config, rows, results):
    """The report: Markdown. results: {name: (checkpoint, losses, seconds)} of ours and TRL's."""
    start = log_probs(START, rows)
    shown = sorted({0, 1, config.steps // 4, config.steps // 2, config.steps - 1} & set(range(config.steps)))
    names = ("held-out pairs", "ordered rightly", "likelier", "margin", "loss", "seconds a step", "in all")
    lines = [[*names, *(f"loss, step {s + 1}" for s in shown)]]
    of_start = ["–", share(start[:, 0] > start[:, 1]), "0", f"{math.log(2):.4f}"]
    lines.append(["start", *of_start, *["–"] * (2 + len(shown))])
    right = []
    for name, (path, losses, seconds) in results.items():
        logs = log_probs(path, rows)
        u, v = (logs - start).unbind(1)
        h = config.beta * (u - v)
        right.append(h > 0)
        cells = [share(h > 0), share(logs[:, 0] > logs[:, 1]), f"{h.mean():.3f}", f"{-F.logsigmoid(h).mean():.4f}"]
        cells += [f"{statistics.median(seconds):.2f}", f"{sum(seconds):.0f}"]
        lines.append([name, *cells, *(f"{losses[s]:.6f}" for s in shown)])
    same = int((right[0] == right[1]).sum())
    return f"{markdown_table(lines)}\n\nThe two order {same} of {len(rows)} held-out pairs alike."


def read_flags():
    """-> dpo.py's config, or None with --quick; the directory of the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a random model and a few steps")
    parser.add_argument("--out", default="runs/preferences_end_to_end", help="directory of both runs and table.md")
    options, flags = parser.parse_known_args()
    if options.quick and flags:
        parser.error(f"--quick has its own settings: leave out {' '.join(flags)}")
    return None if options.quick else parse_config(dpo.Config, flags), Path(options.out).resolve()


def open_start(config, out):
    """Enter the directory `out` -> the start model, its tokenizer, the settings of both runs there."""
    if config is not None:
        check_comparable(config)
        model, tokenizer, _ = open_checkpoint(config.init)
        data = str(Path(config.data).resolve()) if Path(config.data).is_file() else config.data
        device = setup(config.device).device
        dtype = auto_dtype(device) if config.dtype == "auto" else config.dtype
        if dtype == "fp16":
            raise ConfigError("--dtype fp16: this comparison needs fp32 or bf16")
        os.environ["ALIGN_DATA"] = str(data_folder().resolve())  # found from the directory that is left below
        config = replace(config, init=START, name="ours", data=data, device=device.type, dtype=dtype)
    with must_write(out):
        out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    if config is None:
        model, tokenizer = quick_start()
        config = dpo.Config(init=START, name="ours", **QUICK)
    return model, tokenizer, config


def main(given):
    if importlib.util.find_spec("trl") is None:
        raise ConfigError('TRL is not here: pip install -e ".[dev]"')
    model, tokenizer, config = open_start(*given)
    model.save_pretrained(START)
    tokenizer.save_pretrained(START)
    rows, n_params = read_pairs(config, tokenizer, model.config.context), model.num_params()
    del model
    results = {"ours": train_ours(config), "TRL": train_trl(config, rows["train"], tokenizer)}

    held_out = rows["valid"] + rows["test"]
    report = table(config, held_out, results)
    apart = [abs(a - b) / a for a, b in zip(results["ours"][1], results["TRL"][1], strict=True)]
    settings = f"{config.steps} steps of {config.batch} pairs, lr {config.lr:g}, beta {config.beta:g}, {config.dtype}"
    report = f"{n_params:,} parameters; {len(rows['train'])} training pairs of {config.data}; {settings}.\n\n{report}\n"
    first = max(apart[:CHECKED])
    report += f"Losses apart by at most {first:.1e} of ours in the first {CHECKED} steps, {max(apart):.1e} in all."
    Path("table.md").write_text(report + "\n", encoding="utf-8")
    losses = {name: losses for name, (_, losses, _) in results.items()}
    Path("losses.json").write_text(json.dumps({"config": asdict(config), "losses": losses}), encoding="utf-8")
    print(f"\n{report}")
    if config.dtype == "fp32" and not first <= TOLERANCE:
        raise SystemExit(f"the losses differ by more than {TOLERANCE:g} of ours")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    run_script(main, None, parse=read_flags)
