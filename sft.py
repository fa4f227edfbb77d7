"""Supervised fine-tuning: a chat template, and the loss on the answer alone.

    L = −(1/n) Σ m_t log π(y_t | x, y_<t)          m_t = 1 on the assistant's tokens and their end token, else 0
                                                    n = Σ m_t of the optimizer step, over micro-batches and ranks

A conversation becomes one row of ids (ChatML):

    <|im_start|>user⏎ Tom has 5 apples. …? <|im_end|>⏎ <|im_start|>assistant⏎ Tom has 5 + 3 = 8. … #### 8 <|im_end|>⏎
    mask 0 ...................................................................... 1 .......................... 1    0

The mask is made where the ids are made (`tokenizer.encode_chat`), so no one ever guesses it from padding: a mask
derived from `ids != pad` drops the end token where pad = eos, and the model then never learns to stop. The mask
selects *targets*, so it meets the shifted log-probabilities as mask[:, 1:].

n is counted before the batch is cut. Averaging each micro-batch by its own count instead (as many trainers did
until 2024) makes the gradient depend on the cut: short answers in a micro-batch of their own would weigh more.

Evaluation generates greedily and compares the number after `####` with the reference (exact match), with Wilson's
95 % interval. The best checkpoint is chosen on the validation split; the test split is looked at once, at the end.

Simplified: rows are padded on the right, not packed (causal attention never sees a pad behind a token).

Run it:
    python sft.py                                    # built-in word problems; pretrains its start first
    python sft.py --data gsm8k                       # real GSM8K, found as data.py finds it
    torchrun --nproc_per_node 2 sft.py --init runs/pretrain
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pretrain
from attention import causal_mask
from data import extract_answer, load_problems, same_answer
from generate import ConfigError, generate, open_checkpoint, run
from pretrain import (
    RUNS,
    Interrupt,
    Log,
    check_positive,
    draw_curves,
    load_state,
    lr_at,
    make_optimizers,
    open_run,
    optimizer_step,
    precision,
    save,
    setup,
)
from transformer import TransformerConfig, token_logprobs


def chat(problem):
    """A problem as a conversation."""
    return [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.solution},
    ]


def encode_prompt(tokenizer, problem):
    """The ids up to where the assistant begins to speak."""
    return tokenizer.encode_chat(chat(problem)[:1], add_generation_prompt=True)[0]


def collate(examples, pad):
    """[(ids, mask), …] -> tokens (B, T) int64, mask (B, T) bool: padded on the right, where causality hides it."""
    T = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), T), pad, dtype=torch.long)
    mask = torch.zeros(len(examples), T, dtype=torch.bool)
    for row, (ids, flags) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = torch.tensor(flags)
    return tokens, mask


def pack_answers(prompts, answers, pad):
    """Groups as rows: a prompt once, then its R answers side by side, each blind to the others.

        tokens     p₀ … p_{P−2} | p_{P−1} y¹₀ y¹₁ … | p_{P−1} y²₀ y²₁ … | …
        positions  0 … P−2      | P−1 P P+1 …       | P−1 P P+1 …       | …
        targets    –            | y¹₀ y¹₁ y¹₂ …     | y²₀ y²₁ y²₂ …     | …

    Each answer sees the prompt and itself, as if it stood alone. The prompt's last token is repeated in front of each,
    because it predicts R different first tokens. That saves R − 1 of R prompt passes, forward and backward.

    prompts: n lists of ids; answers: n lists of R lists of ids. -> tokens, positions, targets (n, L); mask (n, L, L);
    index (n·R, T): where in the flattened (n·L) row k's token t is predicted; real (n·R, T): whether it has a token t.
    """
    R = len(answers[0])
    n, L = len(prompts), max(len(p) - 1 + sum(map(len, group)) for p, group in zip(prompts, answers, strict=True))
    T = max(len(answer) for group in answers for answer in group)
    tokens, targets = np.full((n, L), pad), np.full((n, L), pad)
    positions, segment = np.zeros((n, L), dtype=np.int64), np.full((n, L), R + 1)
    index, real = np.zeros((n * R, T), dtype=np.int64), np.zeros((n * R, T), dtype=bool)
    for g, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        at = len(prompt) - 1
        tokens[g, :at] = prompt[:-1]
        positions[g, :at] = np.arange(at)
        segment[g, :at] = 0
        for r, answer in enumerate(group):
            length = len(answer)
            here = slice(at, at + length)
            tokens[g, here] = [prompt[-1], *answer[:-1]]
            targets[g, here] = answer
            positions[g, here] = np.arange(len(prompt) - 1, len(prompt) - 1 + length)
            segment[g, here] = r + 1
            index[g * R + r, :length] = np.arange(g * L + at, g * L + at + length)
            real[g * R + r, :length] = True
            at += length
    tokens, positions, targets, segment, index, real = map(
        torch.from_numpy, (tokens, positions, targets, segment, index, real)
    )
    shared = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])  # (n, L, L): key is prompt, or mine
    return tokens, positions, targets, shared & causal_mask(L, L), index, real


def answer_logprobs(model, packed, temperature=1.0):
    """log π of every token of the answers that `pack_answers` packed -> (n·R, T), 0 behind an answer's end."""
    tokens, positions, targets, mask, index, real = packed
    logprobs = model(tokens, positions, mask, targets=targets, temperature=temperature)  # (n, L)
    return logprobs.flatten()[index] * real


def sft_loss(logprobs, mask, n_tokens=None):
    """logprobs and mask (B, T): the masked sum over n_tokens (default: the mask's own count)."""
    n = mask.sum().clamp(min=1) if n_tokens is None else n_tokens
    loss = -(logprobs * mask).sum() / n
    return loss, {"loss": loss.item()}


def rows_at(n, step, batch, seed):
    """Which of n examples are in the batch of this step: epochs without replacement, a pure function of step."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, e)).permutation(n) for e in np.unique(wanted // n)}
    return [int(orders[i // n][i % n]) for i in wanted]


def wilson(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): unlike p ± z·se it stays inside [0, 1] and is right near both."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_correct(text, problem):
    found = extract_answer(text)
    return found is not None and same_answer(found, problem.answer)


def evaluate(raw, tokenizer, problems, max_new_tokens, dist, batch=256):
    """Greedy exact match. Problems are dealt out to the ranks; every rank returns the same figures, and its own
    samples: {"accuracy", "low", "high", "n", "correct", "length", "truncated", "by_level", "samples"}."""
    mine = problems[dist.rank :: dist.world]
    mine = sorted(mine, key=lambda p: len(p.question))  # rows of one length waste no padding
    samples = []
    for i in range(0, len(mine), batch):
        chunk = mine[i : i + batch]
        prompts = [encode_prompt(tokenizer, p) for p in chunk]
        rollout = generate(raw, prompts, max_new_tokens, temperature=0, stop_ids=tokenizer.stop_ids)
        stop = torch.tensor(tokenizer.stop_ids, device=rollout.ids.device)
        ended = (torch.isin(rollout.ids, stop) & rollout.mask).any(1).tolist()
        lengths = rollout.mask.sum(1).tolist()
        texts = rollout.texts(tokenizer)
        samples += [(p, t, is_correct(t, p), n, e) for p, t, n, e in zip(chunk, texts, lengths, ended, strict=True)]
    levels = sorted({p.level for p in problems})
    counts = [
        len(samples),
        sum(s[2] for s in samples),
        sum(s[3] for s in samples),
        sum(not s[4] for s in samples),
    ]
    for level in levels:
        counts += [
            sum(s[0].level == level for s in samples),
            sum(s[2] for s in samples if s[0].level == level),
        ]
    n, correct, tokens, truncated, *rest = dist.sum(*counts)
    low, high = wilson(correct, n)
    by_level = {level: rest[2 * i + 1] / rest[2 * i] for i, level in enumerate(levels)}
    return {
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "n": int(n),
        "correct": int(correct),
        "length": tokens / n,
        "truncated": truncated / n,
        "by_level": by_level,
        "samples": samples,
    }


def fitting(problems, lengths, room, what, dist):
    """The problems that fit the context; says how many did not. Raises ConfigError if none does."""
    kept = [p for p, length in zip(problems, lengths, strict=True) if length <= room]
    if not kept:
        raise ConfigError(f"no {what} fits: the shortest has {min(lengths)} tokens, the room is {room}")
    if len(kept) < len(problems) and dist.is_main:
        print(f"{len(problems) - len(kept)} of {len(problems)} {what}s are longer than {room} tokens: left out")
    return kept


def start_name(data, seed, stage):
    """Where a stage that was given no --init keeps the start that it makes for itself."""
    known = data if data.isidentifier() else Path(data).stem
    return f"start/{known}-seed{seed}-{stage}"


def pretrained_start(config, dist):
    """A short pretraining for a run that was given no --init; made once, under runs/start, and reused."""
    name = start_name(config.data, config.seed, "pretrain")
    if (RUNS / name / "best" / "config.json").exists():
        if dist.is_main:
            print(f"starting from {RUNS / name} (made earlier; delete it to make it anew)")
    else:
        if dist.is_main:
            print(f"no --init given: pretraining a start on the text of {config.data} first -> {RUNS / name}")
        shared = {"data": config.data, "seed": config.seed, "device": config.device, "dtype": config.dtype}
        if config.data != "word":  # real text wants more words and longer windows
            shared |= {
                "vocab_size": 2048,
                "model": TransformerConfig(context=512),
                "batch": 16,
                "micro_batch": 16,
            }
        pretrain.main(pretrain.Config(name=name, **shared))
    return str(RUNS / name)


def sft_start(config, dist):
    """Pretraining and SFT for a later stage that was given no --init; made once, under runs/start, and reused.

    The SFT is kept short on purpose: a policy that fails half of the time has the most to learn.
    """
    name = start_name(config.data, config.seed, "sft")
    if (RUNS / name / "best" / "config.json").exists():
        if dist.is_main:
            print(f"starting from {RUNS / name} (made earlier; delete it to make it anew)")
    else:
        if dist.is_main:
            print(f"no --init given: making an SFT checkpoint to start from -> {RUNS / name}")
        shared = {"levels": config.levels, "seed": config.seed, "device": config.device, "dtype": config.dtype}
        main(Config(name=name, **START, **shared))
    return str(RUNS / name)


START = {"steps": 50, "eval_every": 25, "test_problems": 500}


@dataclass
class Config:
    """Fine-tune a pretrained decoder on worked solutions."""

    data: str = "word"
    """word (built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of the built-in problems: 1 to 3 steps."""
    demonstrations: int | None = None
    """Use only so many training examples; default all."""
    init: str | None = None
    """Checkpoint to start from; default: a short pretraining, made once under runs/start."""
    name: str = "sft"
    """Run directory below runs/."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 64
    """Examples per optimizer step, over all ranks."""
    micro_batch: int = 64
    """Examples per forward pass of one rank; smaller accumulates gradients and saves memory."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    max_new_tokens: int = 96
    """Longest answer when evaluating."""
    eval_every: int = 100
    """Steps between evaluations on the validation split."""
    eval_problems: int = 200
    """Validation problems per evaluation."""
    test_problems: int = 1000
    """Held-out problems of the last evaluation."""
    save_every: int = 200
    """Steps between checkpoints of last/."""
    seed: int = 0
    """Of the data order and the dropout."""
    dropout: float = 0.0
    """Dropout while training."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""

    def __post_init__(self):
        check_positive(self, "steps", "batch", "micro_batch", "eval_every", "eval_problems", "test_problems")
        check_positive(self, "save_every", "max_new_tokens")


def main(config):
    """Fine-tune; returns {"accuracy", "low", "high", "path"} on the test split."""
    dist = setup(config.device)
    if config.batch % dist.world:
        raise ConfigError(f"--batch {config.batch} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    problems = {
        "train": load_problems(config.data, "train", config.demonstrations, tuple(config.levels)),
        "valid": load_problems(config.data, "valid", config.eval_problems, tuple(config.levels)),
        "test": load_problems(config.data, "test", config.test_problems, tuple(config.levels)),
    }
    init = config.init or pretrained_start(config, dist)
    raw, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    context = raw.config.context
    for split in ("valid", "test"):
        lengths = [len(encode_prompt(tokenizer, p)) for p in problems[split]]
        room = context - config.max_new_tokens
        problems[split] = fitting(problems[split], lengths, room, f"{split} prompt", dist)
    examples = [tokenizer.encode_chat(chat(p)) for p in problems["train"]]
    examples = fitting(examples, [len(ids) for ids, _ in examples], context, "training example", dist)

    run_dir = open_run(config, dist)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)
    first, best = 0, -1.0
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best = state["step"], state["best"]
    model = DistributedDataParallel(raw, broadcast_buffers=False) if dist.world > 1 else raw
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)
    if dist.is_main:
        print(
            f"{raw.num_params():,} parameters from {init}; {len(examples):,} training examples, {config.steps} steps "
            f"of {config.batch} = {config.steps * config.batch / len(examples):.1f} epochs"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state["optimizers"] = [o.state_dict() for o in optimizers]
        save(run_dir, name, dist, raw, tokenizer, chat=True, state=state)

    rows = config.batch // dist.world
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            checkpoint("last", step)
            bar.close()
            if dist.is_main:
                print(f"stopped at step {step}, saved; add --resume true to the same command to continue")
            raise SystemExit(130)
        if step and step % config.save_every == 0 and step != first:
            checkpoint("last", step)

        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        batch = [examples[i] for i in rows_at(len(examples), step, config.batch, config.seed)]
        n_tokens = sum(sum(flags) for _, flags in batch)  # of the whole step, all ranks, before the batch is cut
        mine = batch[dist.rank * rows : (dist.rank + 1) * rows]
        mine = sorted(mine, key=lambda example: len(example[0]))  # micro-batches of like lengths waste no padding
        model.train()
        loss_sum = 0.0
        for i in range(0, rows, config.micro_batch):
            tokens, mask = collate(mine[i : i + config.micro_batch], tokenizer.endoftext_id)  # (b, T) each
            tokens, mask = tokens.to(dist.device), mask.to(dist.device)
            last = i + config.micro_batch >= rows
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                with autocast():
                    logprobs = token_logprobs(model, tokens)  # (b, T − 1)
                loss, metrics = sft_loss(logprobs, mask[:, 1:], n_tokens)
                scaler.scale(loss * dist.world).backward()  # DDP divides by world
            loss_sum += metrics["loss"]
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(raw, optimizers, scaler, lr, config.clip)
        (loss_sum,) = dist.sum(loss_sum)
        if not math.isfinite(loss_sum):
            raise ConfigError(f"the loss is {loss_sum} at step {step} (learning rate {lr:.1e}); try a smaller --lr")

        done = step + 1
        record = {
            "loss": loss_sum,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": n_tokens / (time.perf_counter() - started),
        }
        if done % config.eval_every == 0 or done == config.steps:
            result = evaluate(raw, tokenizer, problems["valid"], config.max_new_tokens, dist)
            record |= {"accuracy": result["accuracy"], "length": result["length"]}
            if dist.is_main:
                bar.write(f"step {done}  loss {loss_sum:.3f}  validation accuracy {result['accuracy']:.1%}")
                write_samples(run_dir, done, result["samples"][:3])
            if result["accuracy"] > best:
                best = result["accuracy"]
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", accuracy=f"{max(best, 0):.1%}")
    checkpoint("last", config.steps)
    log.close()

    # The test split, once, with the checkpoint that the validation split chose.
    raw, tokenizer, path = open_checkpoint(run_dir, dist.device)
    result = evaluate(raw, tokenizer, problems["test"], config.max_new_tokens, dist)
    if dist.is_main:
        draw_curves(
            run_dir,
            f"{config.name}: SFT on {config.data}, {raw.num_params() / 1e6:.1f} M parameters",
            [
                ("loss on the answers", {"loss": "train"}, "nats per token", {}),
                ("exact match, greedy", {"accuracy": "validation"}, "share correct", {}),
                ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
            ],
        )
        levels = ", ".join(f"level {k} {v:.1%}" for k, v in result["by_level"].items())
        print(
            f"test accuracy {result['accuracy']:.1%} [{result['low']:.1%}, {result['high']:.1%}] on {result['n']} "
            f"held-out problems ({levels}); {path}, {run_dir}/curves.png"
        )
    return {k: result[k] for k in ("accuracy", "low", "high")} | {"path": str(path)}


def write_samples(run_dir, step, samples):
    with (run_dir / "samples.md").open("a") as file:
        for problem, text, correct, _, _ in samples:
            verdict = "right" if correct else f"wrong, the answer is {problem.answer}"
            file.write(f"**step {step}, {verdict}**\n\n> {problem.question}\n\n```\n{text}\n```\n\n")


if __name__ == "__main__":
    run(main, Config, __doc__)
