"""grpo.py ("ours") against TRL's GRPOTrainer: seconds per step, split into generation, scoring and training.

Both use the same random Qwen3-layout model (about 2 M parameters), the same 16 prompts x 8 rollouts x 32 new tokens
(neither may stop earlier), the same reward, AdamW and the same --dtype; without a KL penalty and with one. Both really
train, taking turns in one process: a round is a few steps of each, TRL first every other time, the first step of a
round is not counted, and the figures are medians over all others.

    generation   sampling: `generate` in grpo.py, `_generate_single_turn` in TRL
    scoring      decoding to text, rewards, and with a KL the reference's log-probabilities
    training     the rest of the step: log-probabilities, loss, backward, optimizer

The floor is the time of the floating-point operations that a step needs at least: each prompt read once per group, 2
operations per weight and token forward, 4 backward (the output matrix for the new tokens alone), plus attention;
divided by the rate of a large matrix product, measured between the rounds. `floor, by rows` reads a prompt again for
each of its rollouts, as TRL does, so a step that shares prompts can be faster than it.

On a GPU decoding is limited by memory instead; the last line shows the share of the measured copy bandwidth that its
traffic (all weights and the cache, once per token) reaches.

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
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import grpo
from benchmarks.rates import matrix_rate, now
from data import DEFAULT_TASK, encode_prompt, load_problems
from support import grpo_report, questions, rewards, rollouts, runs
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

N, R, NEW, VOCABULARY = 16, 8, 32, 1024
PHASES = ("generation", "scoring", "training")


def reward(text):
    """An arbitrary reward that differs within each group, so that no group is skipped."""
    return (text.count("e") + 0.01 * len(text)) / 10


def timed(function, times, device):
    """Wrap a function so that each call appends (begin, end) to the list `times`."""

    def wrapped(*args, **kwargs):
        began = now(device)
        result = function(*args, **kwargs)
        times.append((began, now(device)))
        return result

    return wrapped


def phases(began, ended, generating, scoring):
    """Begin and end of a step, and the (begin, end) of all generation and scoring calls -> {phase: seconds}."""
    generation, not_training = (
        sum(b - a for a, b in times if began <= a and b <= ended) for times in (generating, generating + scoring)
    )
    total = ended - began
    seconds = {"step": total, "generation": generation, "scoring": not_training - generation}
    return seconds | {"training": total - not_training}


def time_ours(steps, beta, problems, device, dtype):
    """Run grpo.main unchanged, with timers around its phases -> {phase: seconds} of each counted step."""
    calls = {name: [] for name in ("generate", "score", "reference_logprobs", "rows_at")}
    # The module in which each function is looked up when it is called:
    modules = {"generate": rollouts, "rows_at": rollouts, "score": rewards, "reference_logprobs": grpo, "Log": runs}
    modules |= {"load_problems": questions, "draw_curves": grpo_report}
    ends, originals = [], {name: getattr(module, name) for name, module in modules.items()}

    class Log(runs.Log):
        def __call__(self, step, **record):
            ends.append(now(device))
            super().__call__(step, **record)

    for name, times in calls.items():
        setattr(modules[name], name, timed(originals[name], times, device))
    runs.Log, grpo_report.draw_curves = Log, lambda *_: None
    questions.load_problems = lambda name, split, n, *_: problems[:n]
    grpo.REWARDS["correct"] = lambda texts, problems, ended: [reward(text) for text in texts]
    try:
        few = dict(eval_problems=1, test_problems=1, pass_problems=1, pass_samples=1, eval_every=10**6)
        few |= dict(record_groups=0, watch=0)  # a recorded step also answers the watched questions
        sizes = dict(prompts=N, rollouts=R, max_new_tokens=NEW, micro_batch=N * R, format_weight=0.0)
        sizes |= dict(optimizer="adamw", lr=5e-5, minibatches=1, skip_zero_variance=False)  # as in TRL here
        # Not counted: the first step, which warms up, and the last, which measures the KL and evaluates.
        grpo.main(grpo.Config(init="start", steps=steps + 2, beta=beta, device=device, dtype=dtype, **few, **sizes))
    finally:
        for name, function in originals.items():
            setattr(modules[name], name, function)
    begins = [began for began, _ in calls["rows_at"] if began > ends[0]]  # the first call of a step
    scoring = calls["score"] + calls["reference_logprobs"]
    steps = zip(begins, ends[1:], strict=True)  # the first record is the evaluation before training
    return [phases(began, ended, calls["generate"], scoring) for began, ended in steps][1:-1]


def time_trl(steps, beta, prompts, device, dtype):
    """Run GRPOTrainer.train with timers around its phases -> {phase: seconds} of each counted step."""
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
    ends, generating, preparing = [], [], []  # preparing: generation and scoring

    class End(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(device))

    trainer = GRPOTrainer(
        "start",  # with a KL it also reads the reference from this directory
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
    trainer._generate_and_score_completions = timed(trainer._generate_and_score_completions, preparing, device)
    trainer.train()
    assert set(lengths) == {NEW}, f"TRL made completions of {sorted(set(lengths))} tokens"
    results = []
    for (began, prepared), (start, end), ended in zip(preparing, generating, ends, strict=True):
        generation = end - start
        results.append({"step": ended - began, "generation": generation, "scoring": prepared - began - generation})
        results[-1]["training"] = ended - prepared
    return results[1:]


def bandwidth():
    """Bytes per second of a copy on the GPU, reads and writes together."""
    x = torch.empty(2**28, device="cuda")
    y, times = torch.empty_like(x), []
    for _ in range(10):
        began = now("cuda")
        y.copy_(x)
        times.append(now("cuda") - began)
    return 2 * x.numel() * 4 / min(times)


def work(model, prompts, kl, by_rows=False):
    """Floating-point operations of a step: {phase: number}; each prompt is read once per group, or by_rows once per
    rollout."""
    c, output = model.config, model.embed.weight.numel()  # the embedding is the output matrix too
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - output
    attention = 4 * c.n_layer * c.n_head * c.head_dim  # per query and key: q · k and a · v
    lengths = [len(p) for p in prompts]
    reads = R if by_rows else 1
    tokens = sum(reads * n + R * NEW for n in lengths)
    pairs = sum(reads * n * n / 2 + R * NEW * (n + NEW / 2) for n in lengths)
    forward = 2 * weights * tokens + 2 * output * len(prompts) * R * NEW + attention * pairs
    return {"generation": forward, "scoring": forward if kl else 0.0, "training": 3 * forward}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps per round, of each")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL penalty in the runs with KL")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="dtype of both; default bf16 on a GPU, else fp32")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.chdir(tempfile.mkdtemp())

    problems = load_problems(DEFAULT_TASK, "train", N)
    tokenizer_problems = load_problems(DEFAULT_TASK, "train", 500)
    tokenizer = BPETokenizer.train([p.question + "\n" + p.solution for p in tokenizer_problems], VOCABULARY)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size))
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    type(tokenizer).stop_ids = ()  # in grpo.py no token ends a completion
    prompts = [encode_prompt(tokenizer, p) for p in problems]
    from transformers import AutoTokenizer

    texts = [tokenizer.decode(ids) for ids in prompts]
    hf_tokenizer = AutoTokenizer.from_pretrained("start")
    assert [hf_tokenizer(text)["input_ids"] for text in texts] == prompts, "TRL would read other tokens"
    lengths = sorted(map(len, prompts))
    print(
        f"{model.num_params():,} parameters, {N} prompts of {lengths[0]} to {lengths[-1]} tokens x {R} rollouts x {NEW}"
    )
    print(
        f"new tokens; {options.device}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    timings, rates = {}, []  # {(name, with KL): [{phase: seconds}, …]}
    sides = [("ours", time_ours, problems), ("TRL", time_trl, texts)]
    for _ in range(options.rounds):
        for beta in (0.0, options.beta):
            for name, time_steps, data in sides:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    step_times = time_steps(options.steps, beta, data, options.device, options.dtype)
                timings.setdefault((name, beta > 0), []).extend(step_times)
            rates.append(matrix_rate(options.device, 1024 if options.device == "cpu" else 8192, options.dtype))
        sides.reverse()  # so that a machine that slows down favours neither
    rate = statistics.median(rates)

    columns = ("step", *PHASES)
    print(f"{'seconds':<24}" + "".join(f"{name:>12}" for name in columns))
    for kl in (False, True):
        rows = {}
        for name in ("ours", "TRL"):
            rows[name] = {c: statistics.median(step[c] for step in timings[name, kl]) for c in columns}
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
        ours, trl = (sorted(step["step"] for step in timings[name, kl]) for name in ("ours", "TRL"))
        print(f"  steps: ours {ours[0]:.3f} to {ours[-1]:.3f}, TRL {trl[0]:.3f} to {trl[-1]:.3f}")
    print(f"floor: {sum(work(model, prompts, False).values()) / 1e9:.1f} G operations a step (with KL "
          f"{sum(work(model, prompts, True).values()) / 1e9:.1f}) at {rate / 1e9:.0f} G/s, the matrix rate measured "
          f"between the rounds ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})")  # fmt: skip
    if options.device == "cuda":
        c, seconds = model.config, statistics.median(step["generation"] for step in timings["ours", False])
        cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * 2 * sum(R * (len(p) + NEW / 2) for p in prompts)
        traffic = NEW * (2 * sum(p.numel() for p in model.parameters()) + cache)
        share = traffic / bandwidth() / seconds
        print(f"decoding reaches {share:.1%} of the copy bandwidth ({bandwidth() / 1e12:.2f} TB/s)")


if __name__ == "__main__":
    main()
