"""grpo.py against TRL's GRPOTrainer: seconds a step, split into generation, scoring and training, and the floor.

The same random Qwen3-layout model (about 2 M parameters), the same 16 prompts x 8 rollouts x 32 new tokens (both are
kept from stopping earlier), the same reward, AdamW, both in the same --dtype; without KL and with it.
Both train for real, in turn in one process: a round is a few steps of each, the first step of a round is not counted,
and the figures are medians over all others.

    generation   the sampler: `generate` here, `_generate_single_turn` there
    scoring      text, rewards, and with a KL the reference's log-probabilities
    training     the rest of the step: log-probabilities, loss, backward, optimizer

The floor is the floating-point operations that the step cannot do without (each prompt read once per group, 2 per
weight and token forward, 4 backward, attention on top) over the rate of a large matrix product, measured between the
rounds; `floor, by rows` reads a prompt again for each of its rollouts, as TRL lays them out, so a step that shares
prompts may come below it. On a GPU decoding is bound by memory instead: shown is how much of the measured copy
bandwidth its traffic (all weights and the cache, once a token) reaches.

Needs the project's `.[dev]`. Run it, from the project's directory:
    python benchmarks/grpo_vs_trl.py                          # about 2 minutes on 2 cores
    python benchmarks/grpo_vs_trl.py --rounds 1 --steps 2     # does it work?
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import grpo
from data import encode_prompt, load_problems
from support import grpo_report, rollouts, runs
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

N, R, NEW, VOCABULARY = 16, 8, 32, 1024
PHASES = ("generation", "scoring", "training")


def reward(text):
    """Anything that differs inside a group: no group may be skipped."""
    return (text.count("e") + 0.01 * len(text)) / 10


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, times, device):
    """The function, which appends (begin, end) to the list at each call."""

    def wrapped(*args, **kwargs):
        began = now(device)
        result = function(*args, **kwargs)
        times.append((began, now(device)))
        return result

    return wrapped


def phases(began, ended, generating, scoring):
    """Begin, end, and the (begin, end) of what was called in between -> {phase: seconds}."""
    generation, both = (
        sum(b - a for a, b in times if began <= a and b <= ended) for times in (generating, generating + scoring)
    )
    total = ended - began
    return {"step": total, "generation": generation, "scoring": both - generation, "training": total - both}


def ours(steps, beta, problems, device, dtype):
    """grpo.main, as it is; only timed. -> {phase: seconds} of each step but the first."""
    marks = {name: [] for name in ("generate", "score", "reference_logprobs", "rows_at")}
    rooms = {"generate": rollouts, "rows_at": rollouts, "score": grpo, "reference_logprobs": grpo, "Log": runs}
    rooms |= {"load_problems": grpo, "draw_curves": grpo_report}  # where each is called by its name
    ends, before = [], {name: getattr(room, name) for name, room in rooms.items()}

    class Log(runs.Log):
        def __call__(self, step, **record):
            ends.append(now(device))
            super().__call__(step, **record)

    for name, times in marks.items():
        setattr(rooms[name], name, timed(before[name], times, device))
    runs.Log, grpo_report.draw_curves = Log, lambda *_: None
    grpo.load_problems = lambda name, split, n, levels: problems[:n]
    grpo.REWARDS["correct"] = lambda texts, problems, ended: [reward(text) for text in texts]
    try:
        few = dict(eval_problems=1, test_problems=1, pass_problems=1, pass_samples=1, eval_every=10**6)
        sizes = dict(prompts=N, rollouts=R, max_new_tokens=NEW, micro_batch=N * R, format_weight=0.0)
        sizes |= dict(optimizer="adamw", lr=5e-5, minibatches=1, skip_zero_variance=False)  # as TRL does it here
        # The last step measures the KL and evaluates, the first warms up: neither counts.
        grpo.main(grpo.Config(init="start", steps=steps + 2, beta=beta, device=device, dtype=dtype, **few, **sizes))
    finally:
        for name, function in before.items():
            setattr(rooms[name], name, function)
    begins = [began for began, _ in marks["rows_at"]]  # the first thing that a step does
    scoring = marks["score"] + marks["reference_logprobs"]
    steps = zip(begins, ends[1:], strict=True)  # the first record is the evaluation before
    return [phases(began, ended, marks["generate"], scoring) for began, ended in steps][1:-1]


def trls(steps, beta, prompts, device, dtype):
    """GRPOTrainer.train, as it is; only timed."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir="trl",
        max_steps=steps + 1,
        per_device_train_batch_size=N * R,
        num_generations=R,
        max_completion_length=NEW,
        temperature=1.0,
        beta=beta,
        loss_type="grpo",
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        use_cpu=device == "cpu",
        bf16=dtype == "bf16",
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": NEW},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    ends, generating, making = [], [], []

    class End(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(device))

    trainer = GRPOTrainer(
        "start",  # with a KL it reads the reference from there as well
        reward_funcs=[lambda completions, **_: [reward(text) for text in completions]],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[End()],
    )
    lengths, sample = [], trainer._generate_single_turn

    def sampling(*args, **kwargs):
        result = sample(*args, **kwargs)
        lengths.extend(len(ids) for ids in result[0])
        return result

    trainer._generate_single_turn = timed(sampling, generating, device)
    trainer._generate_and_score_completions = timed(trainer._generate_and_score_completions, making, device)
    trainer.train()
    assert set(lengths) == {NEW}, f"TRL made completions of {sorted(set(lengths))} tokens"
    results = []
    for (began, made), (a, b), ended in zip(making, generating, ends, strict=True):
        results.append({"step": ended - began, "generation": b - a, "scoring": made - began - (b - a)})
        results[-1]["training"] = ended - made
    return results[1:]


def matrix_rate(device, n, dtype):
    """Floating-point operations a second of an n x n product, the best of ten."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    times = []
    for _ in range(10):
        began = now(device)
        a @ b
        times.append(now(device) - began)
    return 2 * n**3 / min(times)


def bandwidth():
    """Bytes a second of a copy on the GPU, read and written."""
    x = torch.empty(2**28, device="cuda")
    y, times = torch.empty_like(x), []
    for _ in range(10):
        began = now("cuda")
        y.copy_(x)
        times.append(now("cuda") - began)
    return 2 * x.numel() * 4 / min(times)


def work(model, prompts, kl, by_rows=False):
    """Floating-point operations of a step: {phase: number}; each prompt read once per group, or once per rollout."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    attention = 4 * c.n_layer * c.n_head * c.head_dim  # per query and key: q · k and a · v
    lengths = [len(p) for p in prompts]
    times = R if by_rows else 1
    tokens = sum(times * n + R * NEW for n in lengths)
    pairs = sum(times * n * n / 2 + R * NEW * (n + NEW / 2) for n in lengths)
    forward = 2 * weights * tokens + attention * pairs
    return {"generation": forward, "scoring": forward if kl else 0.0, "training": 3 * forward}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL in the second half")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of both; default bf16 on a GPU, else fp32")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.chdir(tempfile.mkdtemp())

    problems = load_problems("word", "train", N)
    more = load_problems("word", "train", 500)
    tokenizer = BPETokenizer.train([p.question + "\n" + p.solution for p in more], VOCABULARY)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size))
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    type(tokenizer).stop_ids = ()  # ours: nothing stops a row
    prompts = [encode_prompt(tokenizer, p) for p in problems]
    from transformers import AutoTokenizer

    texts = [tokenizer.decode(ids) for ids in prompts]
    theirs = AutoTokenizer.from_pretrained("start")
    assert [theirs(text)["input_ids"] for text in texts] == prompts, "TRL would read other tokens"
    lengths = sorted(map(len, prompts))
    print(
        f"{model.num_params():,} parameters, {N} prompts of {lengths[0]} to {lengths[-1]} tokens x {R} rollouts x {NEW}"
    )
    print(
        f"new tokens; {options.device}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    runs, rates = {}, []
    for _ in range(options.rounds):
        for beta in (0.0, options.beta):
            for name, function, what in (("ours", ours, problems), ("TRL", trls, texts)):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    made = function(options.steps, beta, what, options.device, options.dtype)
                runs.setdefault((name, beta > 0), []).extend(made)
            rates.append(matrix_rate(options.device, 1024 if options.device == "cpu" else 8192, options.dtype))
    rate = statistics.median(rates)

    columns = ("step", *PHASES)
    print(f"{'seconds':<24}" + "".join(f"{name:>12}" for name in columns))
    for kl in (False, True):
        rows = {name: {c: statistics.median(r[c] for r in runs[name, kl]) for c in columns} for name in ("ours", "TRL")}
        for name in ("floor", "floor, by rows"):
            flops = work(model, prompts, kl, by_rows=name != "floor")
            rows[name] = {phase: flops[phase] / rate for phase in PHASES} | {"step": sum(flops.values()) / rate}
        print("with KL" if kl else "without KL")
        for name, row in rows.items():
            print(f"  {name:<22}" + "".join(f"{row[c]:>12.3f}" for c in columns))
        ratios = ("TRL / ours", "ours / floor", "ours / floor, by rows", "TRL / floor, by rows")
        for title, (a, b) in ((title, title.split(" / ")) for title in ratios):
            cells = [f"{rows[a][c] / rows[b][c]:>11.2f}x" if rows[b][c] > 1e-9 else f"{'':>12}" for c in columns]
            print(f"  {title:<22}" + "".join(cells))
        spread = [sorted(r["step"] for r in runs["ours", kl]), sorted(r["step"] for r in runs["TRL", kl])]
        print(f"  steps: ours {spread[0][0]:.3f} to {spread[0][-1]:.3f}, TRL {spread[1][0]:.3f} to {spread[1][-1]:.3f}")
    print(f"floor: {sum(work(model, prompts, False).values()) / 1e9:.1f} G operations a step (with KL "
          f"{sum(work(model, prompts, True).values()) / 1e9:.1f}) at {rate / 1e9:.0f} G/s, the matrix rate measured "
          f"between the rounds ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})")  # fmt: skip
    if options.device == "cuda":
        c, seconds = model.config, statistics.median(r["generation"] for r in runs["ours", False])
        cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * 2 * sum(R * (len(p) + NEW / 2) for p in prompts)
        traffic = NEW * (2 * sum(p.numel() for p in model.parameters()) + cache)
        share = traffic / bandwidth() / seconds
        print(f"decoding reaches {share:.1%} of the copy bandwidth ({bandwidth() / 1e12:.2f} TB/s)")


if __name__ == "__main__":
    main()
