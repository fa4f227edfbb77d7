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

Rows are padded on the right, where causal attention never sees a pad; or packed (`--packing true`): several
conversations in one row, each blind to the others, positions counted anew. Loss and gradient are the same.

**Ratings.** Responses rated 1 to 5 train with weight w = (rating − 1)/4, m_t becoming w m_t in sum and n alike; or,
`--rated threshold`, all alike that have at least `min_rating`.

**Curriculum.** `--order curriculum` ranks the examples by level or length and opens them little by little: at step s
the first g(s) of them, g(s) = min(1, g₀ + (1 − g₀) s / (pace · steps)), linear in s (as in arXiv:1903.09848;
arXiv:1904.03626 has exponential steps); a batch is drawn from the open ones. `anti` ranks the other way round, and
`shuffled` (epochs without replacement) is what both must beat.

Evaluation generates greedily and compares the number after `####` with the reference (exact match), with Wilson's
95 % interval; for free text it reports token F1. `--samples 8` adds pass@k and majority@k. The best checkpoint is
chosen on the validation split; the test split is looked at once, at the end.

Run it:
    python sft.py                                    # built-in word problems; pretrains its start first
    python sft.py --data gsm8k                       # real GSM8K, found as data.py finds it
    python sft.py --data chats.jsonl --packing true  # {"messages": [...]} a line, of any number of turns
    python sft.py --data rated.csv --rated threshold # prompt,response,rating
    python sft.py --config configs/sft_lr_sweep.yaml # one run per learning rate, and a table
    torchrun --nproc_per_node 2 sft.py --init runs/pretrain
"""

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pretrain
from attention import document_mask
from data import chat, encode_prompt, load_problems, rows_at
from evaluate import evaluate, evaluate_samples, token_f1
from lora import LoraConfig, add_lora, load_lora_state, lora_state, merged
from optim import lr_at, make_optimizers, optimizer_step
from support.checkpoints import open_checkpoint
from support.cli import check_positive, check_rates, run
from support.devices import precision, setup
from support.errors import ConfigError, DivergedError
from support.log import Log
from support.plots import draw_curves
from support.records import fitting
from support.runs import (
    RUNS,
    Interrupt,
    load_state,
    made_once,
    open_run,
    run_path,
    save,
    saved_run,
    start_name,
    stopped,
)
from transformer import TransformerConfig, token_logprobs


def encode_example(tokenizer, problem, weighted=False):
    """-> ids, flags: True on what is trained, which are all turns of the assistant; weighted: the weight, or 0.0."""
    ids, flags = tokenizer.encode_chat(chat(problem))
    if weighted:
        weight = 1.0 if problem.rating is None else (problem.rating - 1) / 4  # nobody doubted it
        flags = [weight * flag for flag in flags]
    return ids, flags


def collate(examples, pad):
    """[(ids, flags), …] -> tokens (B, T) int64, mask (B, T): padded on the right, where causality hides it.

    The mask is boolean, or fp32 where the flags are weights.
    """
    T = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), T), pad, dtype=torch.long)
    mask = torch.zeros(len(examples), T, dtype=torch.tensor(examples[0][1][:1]).dtype)
    for row, (ids, flags) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = torch.tensor(flags)
    return tokens, mask


def pack_examples(examples, pad, room):
    """Several examples in a row of at most `room` tokens: the longest first, each into the first row that has room.

    -> tokens (B, L); mask (B, L) as in `collate`; positions (B, L), from 0 in each example; visible (B, 1, L, L), for
    attention: causal, and inside one's own example. A first token is never trained (it opens a turn), so no target
    has its predecessor in another example.
    """
    rows = []
    for example in sorted(examples, key=lambda e: -len(e[0])):
        free = next((row for row in rows if sum(len(ids) for ids, _ in row) + len(example[0]) <= room), None)
        if free is None:
            rows.append([example])
        else:
            free.append(example)
    joined = [([i for ids, _ in row for i in ids], [f for _, flags in row for f in flags]) for row in rows]
    tokens, mask = collate(joined, pad)  # (B, L)
    positions, documents = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for r, row in enumerate(rows):
        at = 0
        for number, (ids, _) in enumerate(row):
            positions[r, at : at + len(ids)] = torch.arange(len(ids))
            documents[r, at : at + len(ids)] = number
            at += len(ids)
    return tokens, mask, positions, document_mask(documents)


def sft_loss(logprobs, mask, n_tokens=None):
    """logprobs and mask (B, T), boolean or weights: the masked sum over n_tokens (default: the mask's own sum)."""
    n = mask.sum() if n_tokens is None else n_tokens
    n = n if n > 0 else 1
    loss = -(logprobs * mask).sum() / n
    return loss, {"loss": loss.item()}


def pacing(step, steps, start, pace):
    """The share of the ranked examples that is open at a step: from `start` up a line to 1 at pace · steps."""
    return min(1.0, start + (1 - start) * step / max(1.0, pace * steps))


def rank_examples(difficulties, order, seed):
    """Indices in the order in which they are opened: easy first (curriculum) or last (anti); ties are shuffled."""
    shuffled = np.random.default_rng((seed, 1)).permutation(len(difficulties))
    sign = -1 if order == "anti" else 1
    return sorted(shuffled.tolist(), key=lambda i: sign * difficulties[i])


def paced_rows(ranked, step, batch, seed, share):
    """The batch of a step from the first `share` of the ranked examples: a pure function of step.

    Within a batch without replacement, unless fewer are open than it takes.
    """
    n = max(1, round(share * len(ranked)))
    rng = np.random.default_rng((seed, 2, step))
    return [ranked[i] for i in rng.choice(n, batch, replace=n < batch)]


def pretrained_start(config, dist):
    """A short pretraining for a run that was given no --init; made once, under runs/start, and reused."""
    run_path(config)  # what is wrong with --name or --resume is said before a start is made
    settings = {"data": config.data, "seed": config.seed, "device": config.device, "dtype": config.dtype}
    if config.data != "word":  # real text wants more words and longer windows
        settings |= {"vocab_size": 2048, "model": TransformerConfig(context=512)}
    if config.skip_bad:
        settings["skip_bad"] = True
    name = start_name(config.data, config.seed, "pretrain")
    return made_once(
        name, f"no --init given: pretraining a start on the text of {config.data} first", pretrain, settings, dist
    )


def sft_start(config, dist):
    """Pretraining and SFT for a later stage that was given no --init; made once, under runs/start, and reused.

    The SFT ends when half of the answers are right: a policy that fails half of the time has the most to learn. From
    there the accuracy climbs by two points a step, so a fixed number of steps would start each seed somewhere else.
    """
    run_path(config)  # as above
    settings = {"levels": config.levels, "seed": config.seed, "device": config.device, "dtype": config.dtype}
    name = start_name(config.data, config.seed, "sft")
    what = "no --init given: making an SFT checkpoint to start from"
    return made_once(name, what, sys.modules[__name__], START | settings, dist)


START = {"steps": 200, "eval_every": 5, "stop_at": 0.5, "max_new_tokens": 64, "test_problems": 500}


@dataclass
class Config:
    """Fine-tune a pretrained decoder on worked solutions."""

    data: str = "word"
    """word (built-in problems), gsm8k, instructions, ratings, or the path of a .jsonl, .json or .csv of questions and
    answers, conversations (messages), instructions or rated responses."""
    skip_bad: bool = False
    """Count and leave out records that cannot be used (a rating outside 1 to 5, an empty response), instead of stopping
    at the first."""
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
    packing: bool = False
    """Several examples in a row, each blind to the others, instead of padding."""
    order: str = "shuffled"
    """shuffled, curriculum (easy first) or anti (hard first)."""
    difficulty: str = "level"
    """What a curriculum ranks by: level (arithmetic steps) or length (tokens)."""
    pace_start: float = 0.2
    """Share of the ranked examples that a curriculum opens with."""
    pace: float = 0.5
    """Share of the steps after which all are open."""
    rated: str = "weights"
    """How rated responses count: weights ((rating - 1) / 4) or threshold. Others, in the same file, count in full."""
    min_rating: float = 4.0
    """Least rating to train on with a threshold, and of the references in an evaluation."""
    stop_at: float = 1.0
    """End at the first evaluation whose validation accuracy (F1 for free text) reaches this."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks."""
    lr: float = 2e-3
    """Peak learning rate."""
    sweep: list[float] = field(default_factory=list)
    """Learning rates: one run each, then a table by the validation split."""
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
    samples: int = 0
    """Sampled answers per test problem for pass@k and majority@k; 0 leaves them out."""
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
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self):
        check_positive(self, "steps", "batch", "micro_batch", "eval_every", "eval_problems", "test_problems")
        check_positive(self, "save_every", "max_new_tokens")
        check_rates(self)
        choices = {
            "order": ("shuffled", "curriculum", "anti"),
            "difficulty": ("level", "length"),
            "rated": ("weights", "threshold"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"--{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        if not 0 < self.pace_start <= 1 or not 0 <= self.pace <= 1:
            raise ConfigError(
                f"--pace_start {self.pace_start} and --pace {self.pace} must be shares, above 0 and up to 1"
            )
        if not 1 <= self.min_rating <= 5:
            raise ConfigError(f"--min_rating is {self.min_rating}; ratings go from 1 to 5")
        if self.demonstrations is not None:
            check_positive(self, "demonstrations")
        if self.samples < 0:
            raise ConfigError(f"--samples is {self.samples}; it must be at least 0")
        if any(lr <= 0 for lr in self.sweep):
            raise ConfigError(f"--sweep {self.sweep}: learning rates must be above 0")


def worth_training(problems, config, dist):
    """Of rated responses those that weigh anything, or reach the threshold; says how many did not."""
    least = config.min_rating if config.rated == "threshold" else 1.0 + 1e-9  # a rating of 1 has weight 0
    kept = [p for p in problems if p.rating is None or p.rating >= least]
    if not kept:
        wanted = f"{config.min_rating:g} or more" if config.rated == "threshold" else "above 1"
        raise ConfigError(f"no response of {config.data} is rated {wanted}")
    if len(kept) < len(problems) and dist.is_main:
        how = f"below {config.min_rating:g}" if config.rated == "threshold" else "1, which weighs nothing"
        print(f"{len(problems) - len(kept)} of {len(problems)} responses are rated {how}: left out")
    return kept


def main(config):
    """Fine-tune; returns {"accuracy", "low", "high", "f1", with --samples pass@k} on the test split, "test", the one of
    them that is the metric here, "valid", its best on the validation split, and "path"."""
    if config.sweep:
        return sweep(config)
    dist = setup(config.device)
    if config.batch % dist.world:
        raise ConfigError(f"--batch {config.batch} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    most = {"train": config.demonstrations, "valid": config.eval_problems, "test": config.test_problems}
    problems = {s: load_problems(config.data, s, n, tuple(config.levels), config.skip_bad) for s, n in most.items()}
    problems["train"] = worth_training(problems["train"], config, dist)
    for split in ("valid", "test"):  # only good responses are references
        good = [p for p in problems[split] if p.rating is None or p.rating >= config.min_rating]
        if not good:
            raise ConfigError(f"no {split} response of {config.data} is rated {config.min_rating:g} or more")
        problems[split] = good
    metric = "accuracy" if any(p.answer for p in problems["valid"]) else "f1"  # free text has no answer to check
    init = config.init or pretrained_start(config, dist)
    raw, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    add_lora(raw, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    context = raw.config.context
    for split in ("valid", "test"):
        lengths = [len(encode_prompt(tokenizer, p)) for p in problems[split]]
        room = context - config.max_new_tokens
        problems[split] = fitting(problems[split], lengths, room, f"{split} prompt", dist)
    weighted = config.rated == "weights" and any(p.rating is not None for p in problems["train"])
    examples = [(*encode_example(tokenizer, p, weighted), p.level) for p in problems["train"]]
    examples = fitting(examples, [len(ids) for ids, _, _ in examples], context, "training example", dist)
    difficulties = [level if config.difficulty == "level" else len(ids) for ids, _, level in examples]
    examples = [(ids, flags) for ids, flags, _ in examples]
    if config.order != "shuffled" and len(set(difficulties)) == 1:
        same = f"all examples have {config.difficulty} {difficulties[0]}"
        raise ConfigError(f"--order {config.order}, but {same}; try --difficulty length")
    ranked = rank_examples(difficulties, config.order, config.seed)

    run_dir = open_run(config, dist)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)
    first, best = 0, -1.0
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best = state["step"], state["best"]
        if config.lora.rank:
            load_lora_state(raw, state["lora"], open_checkpoint(init)[0])
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
            state |= {"optimizers": [o.state_dict() for o in optimizers], "lora": lora_state(raw)}
        return save(run_dir, name, dist, raw, tokenizer, chat=True, state=state)

    share, done = config.batch // dist.world, first  # share: examples of a step on this rank
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if best >= config.stop_at:  # here, so that a run that is resumed stops as well
            bar.close()
            break
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)

        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        opened = 1.0
        if config.order == "shuffled":
            chosen = rows_at(len(examples), step, config.batch, config.seed)
        else:
            opened = pacing(step, config.steps, config.pace_start, config.pace)
            chosen = paced_rows(ranked, step, config.batch, config.seed, opened)
        batch = [examples[i] for i in chosen]
        # Of the whole step, on all ranks, before the batch is cut; rated answers count with their weight.
        n_tokens = sum(sum(flags) for _, flags in batch)
        mine = batch[dist.rank * share : (dist.rank + 1) * share]
        mine = sorted(mine, key=lambda example: len(example[0]))  # micro-batches of like lengths waste no padding
        model.train()
        loss_sum = 0.0
        for i in range(0, share, config.micro_batch):
            part, pad = mine[i : i + config.micro_batch], tokenizer.endoftext_id
            made = pack_examples(part, pad, context) if config.packing else (*collate(part, pad), None, None)
            tokens, mask, positions, visible = (t if t is None else t.to(dist.device) for t in made)  # (b, T) each
            last = i + config.micro_batch >= share
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                with autocast():
                    counted = mask[:, 1:] > 0  # (b, T − 1)
                    logprobs = token_logprobs(model, tokens, positions=positions, mask=visible, counted=counted)
                loss, metrics = sft_loss(logprobs, mask[:, 1:], n_tokens)
                scaler.scale(loss * dist.world).backward()  # DDP divides by world
            loss_sum += metrics["loss"]
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
        (loss_sum,) = dist.sum(loss_sum)
        if not math.isfinite(loss_sum) or not (math.isfinite(norm) or scaler.is_enabled()):
            bar.close()  # a sweep goes on with the next run
            log.close()
            said = f"the loss is {loss_sum}, the gradient norm {norm} at step {step} (learning rate {lr:.1e})"
            raise DivergedError(f"{said}; try a smaller --lr")

        done = step + 1
        trained = sum(flag > 0 for _, flags in batch for flag in flags)
        record = {
            "loss": loss_sum,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": trained / (time.perf_counter() - started),
            "open": opened,
        }
        if done % config.eval_every == 0 or done == config.steps:
            with merged(raw):  # adapters, if any, folded in: as fast as without
                result = evaluate(raw, tokenizer, problems["valid"], config.max_new_tokens, dist)
            record |= {k: result[k] for k in ("accuracy", "f1", "length")}
            if dist.is_main:
                bar.write(f"step {done}  loss {loss_sum:.3f}  validation {metric} {result[metric]:.1%}")
                write_samples(log, done, result["samples"][:3])
            if result[metric] > best:
                best = result[metric]
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", **{metric: f"{max(best, 0):.1%}"})
    checkpoint("last", done)
    interrupt.release()
    log.close()

    # The test split, once, with the checkpoint that the validation split chose.
    raw, tokenizer, path = open_checkpoint(run_dir, dist.device)
    result = evaluate(raw, tokenizer, problems["test"], config.max_new_tokens, dist)
    sampled = {}
    if config.samples:
        sizes = (config.samples, config.max_new_tokens, dist)
        sampled = evaluate_samples(raw, tokenizer, problems["test"], *sizes, seed=config.seed)
    if dist.is_main:
        draw_curves(
            run_dir,
            f"SFT on {config.data}, seed {config.seed}, {raw.num_params() / 1e6:.1f} M parameters",
            [
                ("loss on the answers", {"loss": "train"}, "nats per token", {}),
                (
                    ("exact match, greedy", {"accuracy": "validation"}, "share correct", {})
                    if metric == "accuracy"
                    else ("token F1, greedy", {"f1": "validation"}, "F1", {})
                ),
                ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
            ],
        )
        levels = ", ".join(f"level {k} {v:.1%}" for k, v in result["by_level"].items())
        if metric == "accuracy":
            print(
                f"test accuracy {result['accuracy']:.1%} [{result['low']:.1%}, {result['high']:.1%}] on {result['n']} "
                f"held-out problems ({levels}); {path}, {run_dir}/curves.png"
            )
        else:
            print(f"test token F1 {result['f1']:.1%} on {result['n']} held-out prompts; {path}, {run_dir}/curves.png")
        if sampled:
            print("  ".join(f"{name} {value:.1%}" for name, value in sampled.items()) + " at temperature 1")
    figures = {k: result[k] for k in ("accuracy", "low", "high", "f1")} | sampled
    return figures | {"valid": best, "test": result[metric], "path": str(path)}


def sweep(config):
    """One run per learning rate, NAME/lr0.001 and so on, then the table. The validation split chooses."""
    results = {}
    names = {lr: f"{config.name}/lr{lr:g}" for lr in config.sweep}
    if config.resume and not any(saved_run(RUNS / name) for name in names.values()):
        raise ConfigError(f"--resume: {RUNS / config.name} holds no saved run of this sweep to continue")
    for lr, name in names.items():
        resume = config.resume and saved_run(RUNS / name) is not None  # those behind the one that stopped are new
        try:
            results[lr] = main(replace(config, lr=lr, sweep=[], name=name, resume=resume))
        except DivergedError as error:  # a rate that is too high is a result too
            results[lr], said = {"valid": -math.inf, "test": math.nan}, error
    if all(result["valid"] == -math.inf for result in results.values()):
        raise said
    best = max(results, key=lambda lr: results[lr]["valid"])
    if setup(config.device).is_main:
        print(f"\n{'learning rate':>14}{'validation':>12}{'test':>8}")
        for lr, result in results.items():
            chosen = "  <- best" if lr == best else ""
            figures = (
                f"{result['valid']:>12.1%}{result['test']:>8.1%}"
                if result["valid"] > -math.inf
                else f"{'diverged':>12}"
            )
            print(f"{lr:>14g}{figures}{chosen}")
    return results[best] | {"lr": best}


def write_samples(log, step, samples):
    shown = []
    for s in samples:
        verdict = "right" if s.correct else f"wrong, the answer is {s.problem.answer}"
        verdict = verdict if s.problem.answer else f"token F1 {token_f1(s.text, s.problem.solution):.2f}"
        shown.append(f"**step {step}, {verdict}**\n\n> {s.problem.question}\n\n```\n{s.text}\n```")
    log.samples(step, "\n\n".join(shown))


if __name__ == "__main__":
    run(main, Config, __doc__)
