"""sft.py, reward_model.py and dpo.py ("ours") against TRL's SFTTrainer, RewardTrainer and DPOTrainer: seconds per step.

All use the same random Qwen3-layout model (about 1.8 M parameters), the same 32 examples or pairs per step, prompt and
answer together 54 to 64 tokens long, the same token ids, AdamW and the same --dtype. They really train, through their
own `main` and `Trainer.train`, taking turns in one process. A round is a few steps of each, in the reverse order every
other time. A step is timed from the end of the one before to its own end (data, loss, backward, optimizer, logging);
the first step of a round is not counted, and the figures are medians over all others. TRL computes the reference's
log-probabilities in each step unless it is told to precompute them, so dpo.py is compared with both.

The floor is the time of the floating-point operations that a step needs at least: 2 per weight and token forward, 4
backward (the output matrix for the answers' tokens alone, and not at all in a reward model, which has none), plus
attention, with each pair's prompt read once and no reference; divided by the rate of a large matrix product, measured
between the rounds. `floor, 2 rows` counts a pair as two rows, as TRL computes it.

With --check both train on one and the same batch, and their first two losses are compared: the same weights and ids
must give the same loss, and the same gradient and AdamW the same loss in the next step. (The reward model is left out,
because TRL initialises its head randomly.)

Needs the project's `.[dev]`. Run it, from the project's directory:
    python benchmarks/preference_vs_trl.py                          # about 3 minutes on 2 cores
    python benchmarks/preference_vs_trl.py --rounds 1 --steps 2     # does it work?
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import dpo
import sft
from benchmarks.rates import matrix_rate, now
from data import DEFAULT_TASK, load_pairs
from support import runs
from support.pair_rows import encode_pair
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

B, LONGEST, SHORTEST, VOCABULARY = 32, 64, 54, 1280


def time_ours(module, config, device):
    """Run module.main unchanged, with a timer in its log -> seconds of each counted step, the losses."""
    ends, losses = [], []
    original_log = runs.Log

    class Log(original_log):
        def __call__(self, step, **record):
            ends.append(now(device))
            losses.append(record["loss"])
            super().__call__(step, **record)

    runs.Log = Log
    try:
        module.main(config)
    finally:
        runs.Log = original_log
    # Not counted: the first step, which warms up, and the last, which an evaluation follows.
    return [b - a for a, b in itertools.pairwise(ends[:-1])], losses


def time_trl(make_trainer, steps, device, dtype):
    """Run Trainer.train with a timer as its callback -> seconds of each counted step, the losses."""
    from transformers import TrainerCallback

    ends, losses = [], []

    class End(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(device))

        def on_log(self, *_, logs=None, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    common = dict(
        output_dir="trl",
        max_steps=steps + 1,
        per_device_train_batch_size=B,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=LONGEST,
        use_cpu=device == "cpu",
        bf16=dtype == "bf16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = make_trainer(common, [End()])
    trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)], losses


def sft_trainer(rows):
    from trl import SFTConfig, SFTTrainer

    def make(common, callbacks):
        arguments = SFTConfig(**common, completion_only_loss=True, shuffle_dataset=False)
        return SFTTrainer("start", args=arguments, train_dataset=dataset(rows), callbacks=callbacks)

    return make


def reward_trainer(rows):
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    def make(common, callbacks):
        model = AutoModelForSequenceClassification.from_pretrained("start", num_labels=1)
        return RewardTrainer(model, args=RewardConfig(**common), train_dataset=dataset(rows), callbacks=callbacks)

    return make


def dpo_trainer(rows, precompute):
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def make(common, callbacks):
        model = AutoModelForCausalLM.from_pretrained("start")
        arguments = DPOConfig(**common, precompute_ref_log_probs=precompute)
        return DPOTrainer(model, args=arguments, train_dataset=dataset(rows), callbacks=callbacks)

    return make


def dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def work(model, rows, scored):
    """Floating-point operations of one training step. rows: each a list of segments (number of tokens, number of
    earlier tokens that they attend to); scored: for how many of all tokens logits are needed."""
    c, output = model.config, model.embed.weight.numel()  # the embedding is the output matrix too
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - output
    attention = 4 * c.n_layer * c.n_head * (c.head_dim or c.width // c.n_head)  # per query and key: q · k and a · v
    tokens = sum(n for row in rows for n, _ in row)
    query_key_pairs = sum(n * (earlier + n / 2) for row in rows for n, earlier in row)
    return 3 * (2 * weights * tokens + 2 * output * scored + attention * query_key_pairs)


def make_data(tokenizer, n):
    """n pairs whose prompts and answers together are SHORTEST to LONGEST tokens long -> pairs, their ids."""
    pairs, ids = [], []
    for pair in load_pairs(DEFAULT_TASK, "train", 6000, (1, 2, 3)):
        encoded = encode_pair(tokenizer, pair)
        lengths = [len(encoded["prompt"]) + len(encoded[side]) for side in ("chosen", "rejected")]
        if min(lengths) >= SHORTEST and max(lengths) <= LONGEST:
            pairs.append(pair)
            ids.append(encoded)
        if len(pairs) == n:
            return pairs, ids
    raise SystemExit(f"only {len(pairs)} pairs of {SHORTEST} to {LONGEST} tokens: choose another vocabulary")


def held_out(n=4):
    """A few pairs of the other splits, for the evaluations that the stages always run."""
    return [p for split in ("valid", "test") for p in load_pairs(DEFAULT_TASK, split, n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="counted steps per round, of each")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=("sft", "reward", "dpo"), help="run only one of the three")
    parser.add_argument("--check", action="store_true", help="compare the first losses and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="dtype of both; default bf16 on a GPU, else fp32")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.chdir(tempfile.mkdtemp())

    texts = [p.prompt + "\n" + p.chosen for p in load_pairs(DEFAULT_TASK, "train", 3000)]
    tokenizer = BPETokenizer.train(texts, VOCABULARY)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size))
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    pairs, ids = make_data(tokenizer, B if options.check else 8 * B)  # --check: the same batch in every step
    records = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs + held_out()]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
        for r in records
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")

    # The same ids for TRL, as text that its tokenizer encodes to these ids again. TRL too ends an answer with one
    # token.
    def text_of(row):
        return tokenizer.decode(row)

    end = text_of([tokenizer.im_end_id])
    trl_pairs = [
        {"prompt": text_of(m["prompt"]), "chosen": text_of(m["chosen"]), "rejected": text_of(m["rejected"])}
        for m in ids
    ]
    trl_rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in trl_pairs]
    assert all(r["chosen"].endswith(end) for r in trl_pairs)

    common = dict(init="start", batch=B, micro_batch=B, eval_every=10**6, eval_problems=2, test_problems=2)
    common |= dict(
        max_new_tokens=2, device=options.device, dtype=options.dtype, save_every=10**6, steps=options.steps + 2, lr=1e-4
    )
    common |= dict(warmup=0, weight_decay=0.0)
    plain = {"optimizer": "adamw", "nll": 0.0, "beta": 0.1}  # the defaults of TRL's trainer
    stages = {
        "sft": (
            lambda: time_ours(sft, sft.Config(data="chats.jsonl", optimizer="adamw", **common), options.device),
            {"TRL SFTTrainer": sft_trainer(trl_rows)},
            [[(len(m["prompt"]) + len(m["chosen"]) - 1, 0)] for m in ids],
        ),
        "reward": (
            lambda: time_our_reward_model(common, options.device),
            {"TRL RewardTrainer": reward_trainer(trl_pairs)},
            None,
        ),
        "dpo": (
            lambda: time_ours(
                dpo, dpo.Config(data="pairs.jsonl", prompts=len(pairs), **plain, **common), options.device
            ),
            {
                "TRL DPOTrainer": dpo_trainer(trl_pairs, False),
                "TRL, precomputed": dpo_trainer(trl_pairs, True),
            },
            None,
        ),
    }
    shared = [
        [(len(m["prompt"]) - 1, 0)] + [(len(m[s]), len(m["prompt"]) - 1) for s in ("chosen", "rejected")] for m in ids
    ]
    separate = [[(len(m["prompt"]) + len(m[s]) - 1, 0)] for m in ids for s in ("chosen", "rejected")]
    answers = {side: sum(len(m[side]) for m in ids) for side in ("chosen", "rejected")}  # tokens
    scored = {"sft": answers["chosen"], "reward": 0, "dpo": sum(answers.values())}
    print(f"{model.num_params():,} parameters, {B} examples or pairs a step, rows of {SHORTEST} to {LONGEST} tokens;")
    print(f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    times, first, rates = {}, {}, []
    for turn in range(1 if options.check else options.rounds):
        for stage, (run_ours, trl_trainers, _) in stages.items():
            if options.only not in (None, stage):
                continue
            silent = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
            with silent[0], silent[1]:
                runs = {"ours": run_ours} | {
                    name: functools.partial(time_trl, make, options.steps, options.device, options.dtype)
                    for name, make in trl_trainers.items()
                }
                order = list(runs) if turn % 2 == 0 else list(reversed(runs))  # a machine that slows down favours none
                results = {name: runs[name]() for name in order}
            for name, (seconds, losses) in results.items():
                times.setdefault((stage, name), []).extend(seconds)
                first.setdefault((stage, name), losses[:2])
            rates.append(matrix_rate(options.device, 1024 if options.device == "cpu" else 8192, options.dtype))
    rate = statistics.median(rates)

    for stage, (_, trl_trainers, rows) in stages.items():
        if options.only not in (None, stage):
            continue
        floors = {"floor": rows or shared} | ({} if rows else {"floor, 2 rows": separate})
        print(f"{stage:<18}{'seconds':>10}{'ours / it':>12}{'fastest':>10}{'slowest':>10}{'first loss':>12}")
        ours = statistics.median(times[stage, "ours"])
        for name in ("ours", *trl_trainers):
            seconds = times[stage, name]
            median = statistics.median(seconds)
            print(f"  {name:<16}{median:>10.3f}{ours / median:>12.2f}{min(seconds):>10.3f}{max(seconds):>10.3f}"
                  f"{first[stage, name][0]:>12.5f}")  # fmt: skip
        for name, layout in floors.items():
            floor = work(model, layout, scored[stage]) * B / len(ids) / rate
            print(f"  {name:<16}{floor:>10.3f}{ours / floor:>12.2f}")
    print(f"matrix rate {rate / 1e9:.0f} G/s, {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} between the rounds")
    if options.check:
        for (stage, name), losses in first.items():
            print(f"{stage:<8}{name:<18}{losses[0]:.6f} {losses[1]:.6f}")
            pairs = zip(losses, first[stage, "ours"], strict=True)
            assert stage == "reward" or max(abs(a - b) for a, b in pairs) < 2e-4, (stage, name)


def time_our_reward_model(common, device):
    import reward_model

    rename = {"eval_problems": "eval_pairs", "test_problems": "test_pairs"}
    fields = reward_model.Config.__dataclass_fields__
    settings = {rename.get(k, k): v for k, v in common.items() if k != "max_new_tokens"}  # nothing is sampled
    settings |= {"data": "pairs.jsonl", "optimizer": "adamw", "extra_layers": 0, "nll": 0.0}
    config = reward_model.Config(**{k: v for k, v in settings.items() if k in fields})
    return time_ours(reward_model, config, device)


if __name__ == "__main__":
    main()
