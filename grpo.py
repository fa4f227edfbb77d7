"""GRPO: reinforcement learning with verifiable rewards, no value network (DeepSeekMath, arXiv:2402.03300).

PPO asks a learned value network "how good was this token, compared with what I expected?". GRPO asks the policy
itself: answer the same prompt R times, and let the group's mean reward be the expectation.

    A_i = (r_i − mean(r_1 … r_R)) / (std(r_1 … r_R) + 1e-4)              one number per completion, all its tokens
    ρ_t = exp(log π_θ(y_t) − log π_old(y_t))                              1 on the first inner epoch
    ℓ_t = −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A) + β k3_t        Eq. 3
    k3_t = exp(log π_ref − log π_θ) − (log π_ref − log π_θ) − 1           ≥ 0, its mean is KL(π_θ ‖ π_ref), Eq. 4

and the loss is a weighted sum of ℓ_t over completion tokens; the variants differ in the weight of a token alone:

    grpo      1 / (completions · |y_i|)       a mean per completion: long wrong answers are punished less per token
    dapo      1 / tokens of the step          every token counts the same (arXiv:2503.14476; ε_high = 0.28)
    dr_grpo   1 / (completions · longest)     a constant, and no std: unbiased (arXiv:2503.20783)

On the first inner epoch the gradient is REINFORCE with a group baseline: ∇ρ = ∇log π there. The *value* of the
loss hovers near zero and means little, because the advantages of a group sum to zero. Watch the reward, the
held-out accuracy, the KL and the length instead.

A group whose completions all earned the same has A = 0: no signal. Such groups are counted and skipped before the
forward pass, which saves their time; the normalisers still count them, so the policy gradient is the same to the
last bit (their KL term is what is left out). Early they are all wrong, late they are all right.

The old log-probabilities are the ones the sampler returned, so no second forward pass is needed; the sampler uses
temperature alone, and the loss scores at that same temperature. Dropout stays off throughout, or ρ would not be 1.

Rewards are named parts: `correct` (the number behind #### is right) and `format` (ends in exactly one
`#### number` line, and stops). Their weighted sum is r.

Without --init the script makes its own start on the built-in problems: a short pretraining and SFT, kept under
runs/start and reused. With --data gsm8k give it a checkpoint: --init runs/sft.

Run it:
    python grpo.py --steps 500
    python grpo.py --data gsm8k --init runs/sft --prompts 32 --rollouts 8 --max_new_tokens 200
    torchrun --nproc_per_node 8 grpo.py --init runs/sft --prompts 128
"""

import contextlib
import copy
import math
import re
import time
from dataclasses import asdict, dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sft
from attention import causal_mask
from data import extract_answer as extract_answer  # part of this file's interface
from data import load_problems
from generate import ConfigError, Rollout, generate, open_checkpoint, run
from pretrain import (
    RUNS,
    Interrupt,
    Log,
    check_positive,
    draw_curves,
    load_state,
    make_optimizers,
    open_run,
    optimizer_step,
    precision,
    save,
    setup,
)
from sft import encode_prompt, evaluate, fitting, is_correct, rows_at, start_name
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The reward.

ANSWER_LINE = re.compile(r"#### -?\$?[\d,]*\.?\d+")


def rewards(text, problem, ended):
    """{name: value in [0, 1]} of one completion. `ended`: it stopped by itself instead of being cut off."""
    lines = text.strip().splitlines() or [""]
    tidy = ended and text.count("####") == 1 and ANSWER_LINE.fullmatch(lines[-1].strip()) is not None
    return {"correct": float(is_correct(text, problem)), "format": float(tidy)}


# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions.


def group_advantages(rewards, scale="group"):
    """rewards (N, R) -> advantages (N, R): what each rollout earned above its group's mean.

    scale: "group" divides by the group's standard deviation (ddof 1, + 1e-4), "batch" by that of all rewards,
    "none" by nothing. A group of one value, or of one rollout, gives exactly 0, never NaN.
    """
    R = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # exactly, not up to the mean's rounding
    centred = centred.masked_fill(same, 0.0)
    if scale == "none" or R == 1:
        return centred
    if scale not in ("group", "batch"):
        raise ConfigError(f"--scale {scale!r} is not known; use group, batch or none")
    std = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (std + 1e-4)


def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    ref_logprobs=None,
    beta=0.0,
    clip_low=0.2,
    clip_high=0.2,
    loss_type="grpo",
    *,
    n_completions=None,
    n_tokens=None,
    max_length=None,
):
    """Log-probabilities and mask (B, T), advantages (B,) -> (loss, metrics).

    n_completions, n_tokens: of the whole optimizer step, over micro-batches and ranks; default: of this batch, which
    is then the step. max_length: dr_grpo's constant, default T. Metrics are means over this batch's tokens.
    """
    mask = mask.to(logprobs.dtype)
    n_completions = n_completions or len(mask)
    n_tokens = n_tokens or mask.sum().clamp(min=1)
    if loss_type == "grpo":
        weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_completions  # (B, T)
    elif loss_type == "dapo":
        weight = mask / n_tokens
    elif loss_type == "dr_grpo":
        weight = mask / (n_completions * (max_length or mask.shape[1]))
    else:
        raise ConfigError(f"--loss_type {loss_type!r} is not known; use grpo, dapo or dr_grpo")

    # What stands outside the mask is anything at all, exp of it may be inf, and inf · 0 = NaN: zero it first.
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    A = advantages[:, None]  # (B, 1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * A, clipped * A)  # the pessimistic one of the two, for either sign of A
    metrics = {
        "clip_fraction": masked_mean((clipped * A < ratio * A).float(), mask).item(),
        "ratio_max": ratio.max().item(),
        "entropy": masked_mean(-old_logprobs.detach() * mask, mask).item(),  # E[−log π], estimated on the rollouts
    }
    if ref_logprobs is not None:
        log_r = (ref_logprobs - logprobs) * mask
        k3 = log_r.exp() - log_r - 1
        per_token = per_token + beta * k3
        metrics["kl"] = masked_mean(k3, mask).item()
    loss = (per_token * weight).sum()
    return loss, metrics | {"loss": loss.item()}


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Train a policy with verifiable rewards (GRPO)."""

    data: str = "word"
    """word (built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of the built-in problems: 1 to 3 steps."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference of the KL; default: made once under runs/start."""
    name: str = "grpo"
    """Run directory below runs/."""
    steps: int = 500
    """Rollout batches."""
    prompts: int = 16
    """Prompts N per step, over all ranks."""
    rollouts: int = 8
    """Completions R per prompt."""
    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities in the loss."""
    loss_type: str = "grpo"
    """grpo, dapo or dr_grpo: how a token is weighted."""
    scale: str | None = None
    """Advantages divided by the std of the group, of the batch, or none; default group, none for dr_grpo."""
    beta: float = 0.0
    """Weight of the KL to the reference; at 0 the KL is measured now and then only."""
    clip_low: float = 0.2
    """Lower clip range of the ratio."""
    clip_high: float | None = None
    """Upper clip range; default 0.2, 0.28 for dapo."""
    inner_epochs: int = 1
    """Optimizer steps on each batch of rollouts."""
    correct_weight: float = 1.0
    """Weight of the reward for a right answer."""
    format_weight: float = 0.1
    """Weight of the reward for the format."""
    micro_batch: int = 64
    """Completions per forward pass of one rank."""
    lr: float = 5e-5
    """Learning rate after the warm-up; constant from there."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int = 50
    """Steps between evaluations on the validation split."""
    eval_problems: int = 200
    """Validation problems per evaluation."""
    test_problems: int = 1000
    """Held-out problems of the evaluation before and after."""
    sample_every: int = 100
    """Steps between printed rollouts."""
    save_every: int = 100
    """Steps between checkpoints of last/."""
    seed: int = 0
    """Of the prompt order and the sampling (and of the start, where one is made)."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""

    def __post_init__(self):
        check_positive(self, "steps", "prompts", "rollouts", "max_new_tokens", "inner_epochs", "micro_batch")
        check_positive(self, "eval_every", "eval_problems", "test_problems", "sample_every", "save_every")
        if self.temperature <= 0:
            raise ConfigError(f"--temperature is {self.temperature}; a policy gradient needs sampling, above 0")
        if self.rollouts < 2:
            raise ConfigError("--rollouts is 1: a group of one has no baseline, every advantage is 0; use 2 or more")
        if self.init is None and self.data != "word":
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        if self.scale is None:
            self.scale = "none" if self.loss_type == "dr_grpo" else "group"
        if self.clip_high is None:
            self.clip_high = 0.28 if self.loss_type == "dapo" else 0.2
        # Ask the functions themselves whether they know the names, now rather than after the set-up.
        group_advantages(torch.zeros(1, 2), self.scale)
        grpo_loss(*torch.zeros(2, 1, 1), torch.zeros(1), torch.ones(1, 1), loss_type=self.loss_type)


def sft_start(config, dist):
    """Pretraining and SFT for a run that was given no --init; made once, under runs/start, and reused.

    The SFT is kept short on purpose: a policy that fails half of the time has the most to learn from rewards.
    """
    name = start_name(config.data, config.seed, "sft")
    if (RUNS / name / "best" / "config.json").exists():
        if dist.is_main:
            print(f"starting from {RUNS / name} (made earlier; delete it to make it anew)")
    else:
        if dist.is_main:
            print(f"no --init given: making an SFT checkpoint to start from -> {RUNS / name}")
        shared = {
            "levels": config.levels,
            "seed": config.seed,
            "device": config.device,
            "dtype": config.dtype,
        }
        sft.main(sft.Config(name=name, **START, **shared))
    return str(RUNS / name)


START = {"steps": 50, "eval_every": 25, "test_problems": 500}


def pack(prompts, rollout, R, pad):
    """Groups as rows: the prompt once, then the R completions side by side, each blind to the others.

        tokens     p₀ … p_{P−2} | p_{P−1} y¹₀ y¹₁ … | p_{P−1} y²₀ y²₁ … | …
        positions  0 … P−2      | P−1 P P+1 …       | P−1 P P+1 …       | …
        targets    –            | y¹₀ y¹₁ y¹₂ …     | y²₀ y²₁ y²₂ …     | …

    Each completion sees the prompt and itself, as if it stood alone. The prompt's last token is repeated in front
    of each, because it predicts R different first tokens. That saves R − 1 of R prompt passes, forward and backward.

    prompts: n lists of ids; rollout: their n·R completions. -> tokens, positions, targets (n, L), mask (n, L, L), and
    index (n·R, T): where in the flattened (n·L) row k's token t is predicted.
    """
    lengths = rollout.mask.sum(1).view(-1, R).tolist()
    ids = rollout.ids.tolist()
    n, L = len(prompts), max(len(p) - 1 + sum(ls) for p, ls in zip(prompts, lengths, strict=True))
    tokens, targets = torch.full((n, L), pad), torch.full((n, L), pad)
    positions, segment = torch.zeros(n, L, dtype=torch.long), torch.full((n, L), R + 1)
    index = torch.zeros(n * R, rollout.mask.shape[1], dtype=torch.long)
    for g, prompt in enumerate(prompts):
        at = len(prompt) - 1
        tokens[g, :at] = torch.tensor(prompt[:-1], dtype=torch.long)
        positions[g, :at] = torch.arange(at)
        segment[g, :at] = 0
        for r, length in enumerate(lengths[g]):
            answer = ids[g * R + r][:length]
            here = slice(at, at + length)
            tokens[g, here] = torch.tensor([prompt[-1], *answer[:-1]])
            targets[g, here] = torch.tensor(answer)
            positions[g, here] = torch.arange(len(prompt) - 1, len(prompt) - 1 + length)
            segment[g, here] = r + 1
            index[g * R + r, :length] = torch.arange(g * L + at, g * L + at + length)
            at += length
    shared = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])  # (n, L, L): key is prompt, or mine
    return tokens, positions, targets, shared & causal_mask(L, L), index


def completion_logprobs(model, packed, temperature):
    """log π of every completion token: what `pack` made -> (n·R, T). What stands behind a completion's end is junk."""
    tokens, positions, targets, mask, index = packed
    logprobs = model(tokens, positions, mask, targets=targets, temperature=temperature)  # (n, L)
    return logprobs.flatten()[index]


@torch.no_grad()
def rollouts_at(step, raw, tokenizer, problems, config, dist, autocast):
    """Sample this rank's share of step `step`'s completions and reward them.

    -> prompts (n lists of ids), Rollout of n·R rows, {name: rewards (n, R)}, texts, the problem of each row. All of the
    step's randomness is one table of uniforms seeded by (seed, step), of which each rank takes its rows: two ranks
    sample what one would, a resumed run what an uninterrupted one would.
    """
    chosen = [problems[i] for i in rows_at(len(problems), step, config.prompts, config.seed)]
    share = config.prompts // dist.world
    chosen = chosen[dist.rank * share : (dist.rank + 1) * share]
    R = config.rollouts
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    uniforms = torch.rand(config.prompts * R, config.max_new_tokens, generator=generator)
    uniforms = uniforms[dist.rank * share * R : (dist.rank + 1) * share * R]
    prompts = [encode_prompt(tokenizer, p) for p in chosen]
    with autocast():
        rollout = generate(
            raw,
            prompts,
            config.max_new_tokens,
            n=R,
            temperature=config.temperature,
            stop_ids=tokenizer.stop_ids,
            uniforms=uniforms,
        )
    stop = torch.tensor(tokenizer.stop_ids, device=rollout.ids.device)
    ended = (torch.isin(rollout.ids, stop) & rollout.mask).any(1).tolist()
    texts = rollout.texts(tokenizer)
    owners = [p for p in chosen for _ in range(R)]
    parts = [rewards(text, p, e) for text, p, e in zip(texts, owners, ended, strict=True)]
    named = {name: torch.tensor([p[name] for p in parts]).view(share, R) for name in parts[0]}
    named["truncated"] = 1.0 - torch.tensor(ended, dtype=torch.float32).view(share, R)
    return prompts, rollout, named, texts, owners


def main(config):
    """Train; returns {"before", "after"} (test accuracies), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    if config.prompts % dist.world:
        raise ConfigError(f"--prompts {config.prompts} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    problems = {
        "train": load_problems(config.data, "train", None, tuple(config.levels)),
        "valid": load_problems(config.data, "valid", config.eval_problems, tuple(config.levels)),
        "test": load_problems(config.data, "test", config.test_problems, tuple(config.levels)),
    }
    init = config.init or sft_start(config, dist)
    raw, tokenizer, _ = open_checkpoint(init, dist.device)
    reference = copy.deepcopy(raw).requires_grad_(False)
    for split, found in problems.items():
        lengths = [len(encode_prompt(tokenizer, p)) for p in found]
        room = raw.config.context - config.max_new_tokens
        problems[split] = fitting(found, lengths, room, f"{split} prompt", dist)

    run_dir = open_run(config, dist)
    optimizers = make_optimizers(raw, "adamw", config.lr, config.weight_decay, betas=(0.9, 0.999))
    first, best, before = 0, -1.0, None
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best, before = state["step"], state["best"], state["before"]
    model = DistributedDataParallel(raw, broadcast_buffers=False) if dist.world > 1 else raw
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)
    raw.eval()  # for good: with dropout the ratio on fresh rollouts would not be 1

    def held_out(split):
        result = evaluate(raw, tokenizer, problems[split], config.max_new_tokens, dist)
        return {k: v for k, v in result.items() if k != "samples"}

    if before is None:
        before = held_out("test")
        best = held_out("valid")["accuracy"]
        log(0, accuracy=best)
    start_accuracy = before["accuracy"]
    if dist.is_main:
        print(
            f"{raw.num_params():,} parameters from {init}; {len(problems['train']):,} training prompts; "
            f"test accuracy before: {start_accuracy:.1%}"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state |= {"before": before, "optimizers": [o.state_dict() for o in optimizers]}
        save(run_dir, name, dist, raw, tokenizer, chat=True, state=state)

    weights = {"correct": config.correct_weight, "format": config.format_weight}
    accuracy, kl, warned = best, 0.0, False
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

        # ------------------------------------------------------------------ roll out and reward
        started = time.perf_counter()
        prompts, rollout, named, texts, owners = rollouts_at(
            step, raw, tokenizer, problems["train"], config, dist, autocast
        )
        total = sum(weight * named[name] for name, weight in weights.items())  # (n, R), this rank's groups
        sampled = time.perf_counter()

        # ------------------------------------------------------------------ advantages
        if config.scale == "batch" and dist.world > 1:  # one std for all ranks needs all rewards
            everywhere = [torch.empty_like(total).to(dist.device) for _ in range(dist.world)]
            torch.distributed.all_gather(everywhere, total.to(dist.device))
            n = len(total)
            advantages = group_advantages(torch.cat(everywhere).cpu(), "batch")[dist.rank * n : (dist.rank + 1) * n]
        else:
            advantages = group_advantages(total, config.scale)
        kept = advantages.ne(0).any(1).nonzero().squeeze(1).tolist()  # groups with a signal
        # Of the whole step, all ranks, skipped groups too: the cut into micro-batches never changes the gradient.
        n_completions, n_tokens, n_kept, n_skipped = dist.sum(
            total.numel(), rollout.mask.sum().item(), len(kept), len(total) - len(kept)
        )

        # ------------------------------------------------------------------ inner epochs: one optimizer step each
        now_and_then = step == 0 or (step + 1) % config.eval_every == 0
        measure = bool(config.beta) or now_and_then  # the reference costs a forward pass
        R, size = config.rollouts, max(1, config.micro_batch // config.rollouts)
        kept.sort(key=lambda g: len(prompts[g]) + int(rollout.mask[g * R : g * R + R].sum()))  # wastes less padding
        # A rank with nothing to learn from still takes part in the all-reduce, with a group of weight 0.
        passes = [kept[i : i + size] for i in range(0, len(kept), size)] or [[0]]
        sums, norm, tokens_trained = {}, 0.0, 0.0
        lr = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
        packs, ref_logprobs = {}, {}
        for _ in range(config.inner_epochs if n_kept else 0):
            for k, groups in enumerate(passes):
                rows = [g * R + r for g in groups for r in range(R)]
                mine = Rollout(rollout.ids[rows], rollout.mask[rows], rollout.logprobs[rows])  # (b, T) each
                mask = mine.mask if kept else torch.zeros_like(mine.mask)
                A = advantages[groups].flatten().to(dist.device)  # (b,)
                last = k == len(passes) - 1
                with autocast():
                    if k not in packs:  # tokens and reference stay the same in all inner epochs
                        made = pack([prompts[g] for g in groups], mine, R, tokenizer.endoftext_id)
                        packs[k] = [t.to(dist.device) for t in made]
                        if measure:
                            with torch.no_grad():
                                ref_logprobs[k] = completion_logprobs(reference, packs[k], config.temperature)
                    with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                        logprobs = completion_logprobs(model, packs[k], config.temperature)  # (b, T)
                        loss, metrics = grpo_loss(
                            logprobs,
                            mine.logprobs,
                            A,
                            mask,
                            ref_logprobs.get(k),
                            config.beta,
                            config.clip_low,
                            config.clip_high,
                            config.loss_type,
                            n_completions=n_completions,
                            n_tokens=n_tokens,
                            max_length=config.max_new_tokens,
                        )
                        scaler.scale(loss * dist.world).backward()  # DDP divides by world
                count = mask.sum().item()
                tokens_trained += count
                for name, value in metrics.items():
                    if name == "ratio_max":
                        sums[name] = max(sums.get(name, 0.0), value)
                    else:
                        sums[name] = sums.get(name, 0.0) + value * (1 if name == "loss" else count)
            norm = optimizer_step(raw, optimizers, scaler, lr, config.clip)
        if not math.isfinite(norm):
            raise ConfigError(f"the gradient is {norm} at step {step} (learning rate {lr:.1e}); try a smaller --lr")

        # ------------------------------------------------------------------ metrics: what matters first
        done = step + 1
        names = ["correct", "format", "truncated"]
        keys = [k for k in ("kl", "entropy", "clip_fraction") if k in sums]
        values = dist.sum(
            total.sum(),
            *(named[k].sum() for k in names),
            *(sums[k] for k in keys),
            tokens_trained,
            sums.get("loss", 0),
        )
        record = {"reward": values[0] / n_completions}
        record |= {
            f"reward_{k}" if k != "truncated" else k: v / n_completions for k, v in zip(names, values[1:4], strict=True)
        }
        if values[-2]:
            record |= {k: v / values[-2] for k, v in zip(keys, values[4:-2], strict=True)}
            record |= {"ratio_max": sums["ratio_max"]}
        record |= {
            "length": n_tokens / n_completions,
            "zero_variance": n_skipped / config.prompts,
            "grad_norm": norm,
            "lr": lr,
            "loss": values[-1] / config.inner_epochs,
            "seconds_rollout": sampled - started,
            "steps_per_second": 1 / (time.perf_counter() - started),
        }
        if done % config.eval_every == 0 or done == config.steps:
            accuracy = record["accuracy"] = held_out("valid")["accuracy"]
            if accuracy > best:
                best = accuracy
                checkpoint("best", done)
            if accuracy < start_accuracy - 0.1 and not warned and dist.is_main:
                warned = True
                bar.write(
                    f"WARNING: held-out accuracy fell from {start_accuracy:.1%} to {accuracy:.1%}: the policy is "
                    f"collapsing. Try a smaller --lr than {config.lr:.0e}, or a larger --beta; best/ keeps the best."
                )
        log(done, **record)
        kl = record.get("kl", kl)
        if dist.is_main and (done == 1 or done % config.sample_every == 0):
            show_samples(bar, run_dir, done, texts, owners, named, total, config.rollouts)
        bar.set_postfix(
            reward=f"{record['reward']:.2f}",
            accuracy=f"{accuracy:.1%}",
            kl=f"{kl:.3f}",
            length=f"{record['length']:.0f}",
            refresh=False,
        )
    checkpoint("last", config.steps)
    log.close()
    return finish(config, dist, run_dir, raw, reference, tokenizer, problems, before, held_out, began)


def show_samples(bar, run_dir, step, texts, owners, named, total, R):
    """Print the best and the worst rollout of the first group that has both, with each part of its reward."""
    spread = (total.max(1).values - total.min(1).values).argmax().item()  # the group with the most to tell
    group = total[spread]
    lines = [f"step {step}: {owners[spread * R].question} (answer {owners[spread * R].answer})"]
    for which in sorted({group.argmax().item(), group.argmin().item()}):
        parts = "  ".join(f"{name} {values[spread, which]:.0f}" for name, values in named.items())
        lines.append(f"  [{parts}  reward {group[which]:.2f}]  {texts[spread * R + which]!r}")
    bar.write("\n".join(lines))
    with (run_dir / "samples.md").open("a") as file:
        file.write("\n".join(lines) + "\n\n")


@torch.no_grad()
def kl_to_reference(raw, reference, tokenizer, problems, config, dist):
    """KL(π ‖ π_ref) in nats per token: mean of k3 over one sampled completion per problem."""
    mine = problems[dist.rank :: dist.world]
    prompts = [encode_prompt(tokenizer, p) for p in mine]
    generator = torch.Generator().manual_seed(config.seed + dist.rank)
    rollout = generate(raw, prompts, config.max_new_tokens, stop_ids=tokenizer.stop_ids, generator=generator)
    packed = [t.to(dist.device) for t in pack(prompts, rollout, 1, tokenizer.endoftext_id)]
    log_r = (completion_logprobs(reference, packed, 1.0) - completion_logprobs(raw, packed, 1.0)) * rollout.mask
    total, n = dist.sum((log_r.exp() - log_r - 1).sum().item(), rollout.mask.sum().item())
    return total / n


def finish(config, dist, run_dir, raw, reference, tokenizer, problems, before, held_out, began):
    """The test split once more, the table, and the curves."""
    after = held_out("test")
    kl = kl_to_reference(raw, reference, tokenizer, problems["test"][:200], config, dist)
    seconds = time.perf_counter() - began
    if dist.is_main:
        print(f"\n{'held-out test, greedy':<24}{'accuracy':>9}  {'95 % interval':<18}{'length':>7}{'KL to start':>13}")
        for name, r, d in (("before", before, 0.0), ("after", after, kl)):
            interval = f"[{r['low']:.1%}, {r['high']:.1%}]"
            print(f"{name:<24}{r['accuracy']:>9.1%}  {interval:<18}{r['length']:>7.1f}{d:>13.4f}")
        for level, value in after["by_level"].items():
            print(f"  level {level}: {before['by_level'][level]:.1%} -> {value:.1%}")
        gain = after["accuracy"] - before["accuracy"]
        print(f"{after['n']} problems, {gain * 100:+.1f} points in {config.steps} steps, {seconds / 60:.1f} minutes")
        if gain < 0:
            print("WARNING: the policy ended worse than it began; best/ holds the best on the validation split")
        entropy = {"entropy": "entropy", "kl": "KL to the reference"}
        draw_curves(
            run_dir,
            f"{config.name}: GRPO on {config.data}, accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}",
            [
                ("held-out accuracy, greedy", {"accuracy": "validation"}, "share correct", {}),
                ("reward", {"reward_correct": "correct", "reward_format": "format"}, "share of rollouts", {}),
                ("entropy and KL", entropy, "nats per token", {}),
                ("completion length", {"length": "mean"}, "tokens", {}),
                ("groups without signal", {"zero_variance": "all rewards equal"}, "share of groups", {}),
                ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
            ],
        )
        print(f"{run_dir}/last, {run_dir}/best, {run_dir}/curves.png, {run_dir}/samples.md")
    figures = {"before": before, "after": after, "kl": kl, "seconds": seconds, "path": str(run_dir / "last")}
    return figures


if __name__ == "__main__":
    run(main, Config, __doc__)
