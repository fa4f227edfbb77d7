"""DPO: preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290), and its variants.

RLHF fits a reward to pairs, then a policy to the reward under a KL penalty. The best policy of that problem is known
in closed form, π* ∝ π_ref exp(r / β); turned round, r = β log(π*/π_ref) + const. Put this r into the Bradley-Terry
model of the pairs, and the reward model is gone: the policy is fitted to the pairs directly.

    u = log π_θ(y_w) − log π_ref(y_w)          log π(y): summed over the answer's tokens, its end token included
    v = log π_θ(y_l) − log π_ref(y_l)          y_w the chosen, y_l the rejected answer
    h = β (u − v)                               the margin between the implicit rewards βu and βv
    sigmoid             −log σ(h)               Eq. 7; with smoothing ε: −(1 − ε) log σ(h) − ε log σ(−h), cDPO
    hinge               max(0, 1 − h)           SLiC's (arXiv:2305.10425) with a reference (RSO, arXiv:2309.06657)
    ipo                 (u − v − 1/(2β))²       Eq. 17 of arXiv:2310.12036, sums as in the paper: a margin to *meet*
    ipo_mean            the same on means per token, as TRL computes it
    length_normalised   −log σ(h) on means per token: a long answer has no larger margin for its length
    simpo               −log σ(β (mean log π_θ(y_w) − mean log π_θ(y_l)) − γ), no reference (arXiv:2405.14734); as
                        published with --beta 2 to 2.5 --gamma 0.5 to 1.5 --nll 0

Eq. 7 starts at ln 2 and its gradient is −β σ(−h) (∇log π(y_w) − ∇log π(y_l)): pairs already ordered weigh little.

**The known failure.** Only the *difference* is fitted. The cheapest way to widen it is often to push both answers
down, the rejected one faster, and the mass goes to answers that nobody judged. So `logp_chosen` is logged and drawn:
watch it fall. `--nll` (1 by default; 0 is plain DPO) adds the chosen answers' own loss, a mean per answer
(arXiv:2404.19733; TRL's `sft` term is a mean over the batch's tokens), which holds them up.

**Pairs.** `--pairs sampled`: the start answers each training prompt R times and the verifier judges; a right and a
wrong answer make a pair. `--pairs offline`: pairs from `data.load_pairs` (corrupted solutions, UltraFeedback, short
style preferences, any JSONL). Either way the reference's log-probabilities are computed once and kept with the run.

The prompt of a pair is computed once, and both answers read its keys and values (`sft.pack`).

Without --init the script makes its own start on the built-in problems, as `grpo.py` does, under runs/start.

Run it:
    python dpo.py                                                         # pairs sampled from the start
    python dpo.py --pairs offline                                         # corrupted solutions
    python dpo.py --data style --init runs/sft --variant simpo --beta 2
    torchrun --nproc_per_node 2 dpo.py --init runs/sft
"""

import contextlib
import copy
import math
import os
import random
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DEFAULT_TASK, TASKS, encode_group, encode_prompt, has_verifier, load_pairs, load_problems, rows_at
from evaluate import before_and_after, evaluate, is_correct, logged, metric_panels, sampled_kl, wilson
from generate import generate
from lora import LoraConfig, add_lora, lora_off, merged
from optim import lr_at, make_optimizers, optimizer_step
from sft import sft_start
from support.checkpoints import open_checkpoint
from support.cli import check_positive, check_rates, run
from support.devices import precision, setup
from support.errors import ConfigError, DivergedError
from support.log import Log
from support.lora_files import load_lora_state, lora_state
from support.plots import draw_curves
from support.records import fitting
from support.runs import Interrupt, load_state, open_run, run_path, save, stopped
from support.shared_prompt import pack, shared_answer_logprobs

# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions of u and v.


def sigmoid_loss(h, smoothing=0.0):
    """Eq. 7. smoothing: the share of pairs whose label is taken to be wrong; then the best h is finite."""
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def hinge_loss(h):
    return (1 - h).clamp(min=0)


def ipo_loss(difference, beta):
    """difference: u − v, not yet times β. A square pulls back a margin that has grown too large."""
    return (difference - 1 / (2 * beta)) ** 2


VARIANTS = ("sigmoid", "hinge", "ipo", "ipo_mean", "length_normalised", "simpo")


def dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    beta=0.1,
    variant="sigmoid",
    label_smoothing=0.0,
    *,
    chosen_lengths=None,
    rejected_lengths=None,
    gamma=0.0,
    nll=0.0,
    n_pairs=None,
):
    """Log-probabilities (B,), summed over the answer's tokens -> (loss, metrics).

    chosen_lengths, rejected_lengths (B,): token counts, for what works with means per token. gamma: the margin that
    simpo wants. nll: weight of −mean log π(y_w), added. n_pairs: of the whole optimizer step, over micro-batches and
    ranks; default B. Metrics are means over this batch; `accuracy` is the share of pairs with h > 0.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"--variant {variant!r} is not known; use one of {', '.join(VARIANTS)}")
    if label_smoothing and variant not in ("sigmoid", "length_normalised"):
        raise ConfigError(f"--label_smoothing has no meaning with --variant {variant}; it needs a probability")
    u, v = policy_chosen - ref_chosen, policy_rejected - ref_rejected  # (B,)
    if variant == "simpo":
        u, v = policy_chosen, policy_rejected
    if variant in ("ipo_mean", "length_normalised", "simpo"):
        if chosen_lengths is None or rejected_lengths is None:
            raise ConfigError(f"the variant {variant} needs the answers' lengths")
        u, v = u / chosen_lengths, v / rejected_lengths
    if nll and chosen_lengths is None:
        raise ConfigError("nll is a mean per token: it needs the answers' lengths")
    h = beta * (u - v)
    if variant in ("ipo", "ipo_mean"):
        losses = ipo_loss(u - v, beta)
    elif variant == "hinge":
        losses = hinge_loss(h)
    else:
        losses = sigmoid_loss(h - gamma if variant == "simpo" else h, label_smoothing)
    if nll:
        losses = losses - nll * policy_chosen / chosen_lengths
    loss = losses.sum() / (n_pairs or len(losses))
    metrics = {
        "loss": losses.mean(),
        "accuracy": (h > 0).float().mean(),
        "margin": h.mean(),
        "reward_chosen": beta * u.mean(),
        "reward_rejected": beta * v.mean(),
        "logp_chosen": policy_chosen.mean(),
        "logp_rejected": policy_rejected.mean(),
    }
    return loss, dict(zip(metrics, torch.stack([m.detach().float() for m in metrics.values()]).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Pairs as ids: {"prompt", "chosen", "rejected"} -> lists of ids, an answer with its end token.


def encode_pair(tokenizer, pair):
    prompt, (chosen, rejected) = encode_group(tokenizer, pair)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@torch.no_grad()
def sample_pairs(raw, tokenizer, problems, config, dist, seed, most):
    """Answer each problem R times, let the verifier judge, pair right answers with wrong ones.

    At most `most` of a prompt, each answer in one pair; a prompt whose answers are all right or all wrong
    gives none. Chunks of prompts are dealt out to the ranks and seeded one by one: any number of ranks finds the same
    pairs. -> pairs (the same list on every rank), the share of right answers.
    """
    R, size = config.rollouts, 64
    chunks = [problems[i : i + size] for i in range(0, len(problems), size)]
    found, right = {}, 0
    mine = range(dist.rank, len(chunks), dist.world)
    for c in tqdm(mine, desc="sampling pairs", unit="chunk", leave=False, disable=not dist.is_main):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + c)
        uniforms = torch.rand(len(chunks[c]) * R, config.max_new_tokens, generator=generator)
        prompts = [encode_prompt(tokenizer, p) for p in chunks[c]]
        rollout = generate(
            raw,
            prompts,
            config.max_new_tokens,
            n=R,
            temperature=config.temperature,
            stop_ids=tokenizer.stop_ids,
            uniforms=uniforms,
        )
        ids, lengths, texts = rollout.ids.tolist(), rollout.mask.sum(1).tolist(), rollout.texts(tokenizer)
        rng = random.Random(f"pairs/{seed}/{c}")
        found[c] = []
        for i, problem in enumerate(chunks[c]):
            answers = {True: [], False: []}
            for row in range(i * R, (i + 1) * R):
                answer = ids[row][: lengths[row]]
                correct = is_correct(texts[row], problem)
                right += correct
                ended = answer[-1] in tokenizer.stop_ids
                if answer not in answers[correct] and (ended or not correct):  # a right answer must also stop
                    answers[correct].append(answer)
            for side in answers.values():
                rng.shuffle(side)
            pairs = list(zip(answers[True], answers[False], strict=False))[:most]
            found[c] += [{"prompt": prompts[i], "chosen": good, "rejected": bad} for good, bad in pairs]
    (right,) = dist.sum(right)
    if dist.world > 1:
        everywhere = [None] * dist.world
        torch.distributed.all_gather_object(everywhere, found)
        found = {c: pairs for part in everywhere for c, pairs in part.items()}
    return [pair for c in range(len(chunks)) for pair in found[c]], right / (len(problems) * R)


def batch_of(pairs, pad, device):
    """Pairs -> what `pack` gives, on the device, and the answers' lengths (b, 2)."""
    packed = pack([p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs], pad).to(device)
    return packed, packed.lengths.view(-1, 2)


def pair_logprobs(model, packed):
    """log π of the chosen and of the rejected answers, summed over their tokens: (b,), (b,)."""
    return shared_answer_logprobs(model, packed).sum(1).view(-1, 2).unbind(1)


@torch.no_grad()
def add_reference(raw, pairs, pad, dist, autocast, size=64):
    """Put the reference's log π of both answers into each pair, once: "ref_chosen" and "ref_rejected".

    Each rank computes a share and all learn all: (n, 2) numbers, nothing beside the n answers.
    """
    raw.eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt"]))  # like lengths waste no padding
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=dist.device)
    for i in range(dist.rank * size, len(order), dist.world * size):
        rows = order[i : i + size]
        packed, _ = batch_of([pairs[row] for row in rows], pad, dist.device)
        with autocast():
            sums[rows] = torch.stack(pair_logprobs(raw, packed), dim=1).double()
    if dist.world > 1:
        torch.distributed.all_reduce(sums)
    return [p | {"ref_chosen": c, "ref_rejected": r} for p, (c, r) in zip(pairs, sums.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Fit a policy to preference pairs (DPO)."""

    data: str = DEFAULT_TASK
    """word (built-in problems), gsm8k (sampled pairs), ultrafeedback, hh, style, or the path of a .jsonl of pairs."""
    skip_bad: bool = False
    """Count and leave out records that cannot be used, instead of stopping at the first."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of the built-in problems: 1 to 3 steps."""
    pairs: str | None = None
    """sampled (from the start, judged by the verifier) or offline; default sampled for word and gsm8k."""
    prompts: int = 3000
    """Training prompts to sample answers for; or, offline, the most pairs to use."""
    rollouts: int = 8
    """Sampled answers per prompt."""
    pairs_per_prompt: int = 4
    """Most pairs made of one prompt's samples."""
    temperature: float = 1.0
    """Of the sampling."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference; default: made once under runs/start."""
    name: str = "dpo"
    """Run directory below runs/."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch: int = 32
    """Pairs per forward pass of one rank."""
    variant: str = "sigmoid"
    """sigmoid, hinge, ipo, ipo_mean, length_normalised or simpo."""
    beta: float = 0.3
    """How dear it is to leave the reference."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled wrongly (cDPO)."""
    gamma: float = 0.0
    """The margin of --variant simpo."""
    nll: float = 1.0
    """Weight of the chosen answers' own loss per token, as in SFT; 0 is plain DPO."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks; adamw wants about a sixth of the learning rate."""
    lr: float = 2e-4
    """Peak learning rate."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    max_new_tokens: int = 64
    """Longest sampled answer."""
    eval_every: int = 50
    """Steps between evaluations on the validation split."""
    eval_problems: int = 200
    """Validation problems (and their pairs) per evaluation."""
    test_problems: int = 1000
    """Held-out problems (or pairs) of the evaluation before and after."""
    save_every: int = 100
    """Steps between checkpoints of last/."""
    seed: int = 0
    """Of the pairs, their order and the dropout (and of the start, where one is made)."""
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
        check_positive(self, "prompts", "rollouts", "pairs_per_prompt", "steps", "batch", "micro_batch", "eval_every")
        check_positive(self, "max_new_tokens", "eval_problems", "test_problems", "save_every")
        check_rates(self)
        if self.pairs is None:
            self.pairs = "sampled" if has_verifier(self.data) else "offline"
        if self.pairs not in ("sampled", "offline"):
            raise ConfigError(f"--pairs {self.pairs!r} is not known; use sampled or offline")
        if self.pairs == "sampled" and not has_verifier(self.data):
            raise ConfigError(f"--pairs sampled needs a verifier, which {self.data} has not; use --pairs offline")
        if self.pairs == "sampled" and (self.rollouts < 2 or not 0 < self.temperature < math.inf):
            raise ConfigError("--pairs sampled needs --rollouts of at least 2 and a --temperature above 0")
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"--beta is {self.beta}; it must be above 0")
        if self.gamma and self.variant != "simpo":
            raise ConfigError(f"--gamma is the margin of --variant simpo; {self.variant} has none")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"--label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if self.init is None and self.data not in TASKS:
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        one = torch.ones(1)  # ask the function itself whether it knows the variant, now rather than after the set-up
        dpo_loss(*[one] * 4, self.beta, self.variant, self.label_smoothing, chosen_lengths=one, rejected_lengths=one)


def make_pairs(config, dist, raw, tokenizer, problems, autocast):
    """{"train", "valid", "test"}: pairs of ids with their reference log-probabilities."""
    made = {}
    most = {"train": config.prompts, "valid": config.eval_problems, "test": config.test_problems}
    for number, split in enumerate(most):
        if config.pairs == "sampled":
            seed = config.seed * 3 + number
            each = config.pairs_per_prompt if split == "train" else 1  # held-out pairs are to be independent
            with autocast():
                pairs, right = sample_pairs(raw, tokenizer, problems[split], config, dist, seed, each)
            if not pairs:
                raise ConfigError(
                    f"no {split} prompt got both a right and a wrong answer ({right:.1%} of all are right): give "
                    "another --init, more --rollouts or more --prompts"
                )
            if dist.is_main:
                n = len(problems[split])
                print(
                    f"{split}: {len(pairs):,} pairs from {config.rollouts} answers to {n:,} prompts, {right:.1%} right"
                )
        else:
            how = {"seed": config.seed, "skip_bad": config.skip_bad}
            found = load_pairs(config.data, split, most[split], tuple(config.levels), **how)
            pairs = [encode_pair(tokenizer, pair) for pair in found]
            lengths = [len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in pairs]
            pairs = fitting(pairs, lengths, raw.config.context, f"{split} pair", dist)
        made[split] = add_reference(raw, pairs, tokenizer.endoftext_id, dist, autocast)
    return made


@torch.no_grad()
def validate(raw, pairs, config, tokenizer, dist, autocast):
    """The loss and its metrics over pairs, dealt out to the ranks: {"loss", "accuracy", "margin", …}."""
    raw.eval()
    mine = pairs[dist.rank :: dist.world]
    counts = bool(mine)  # a rank without a pair scores one for nothing: all must add up the same numbers
    mine, sums = sorted(mine or pairs[:1], key=lambda p: len(p["prompt"]) + len(p["chosen"])), {}
    for i in range(0, len(mine), 64):
        chunk = mine[i : i + 64]
        packed, lengths = batch_of(chunk, tokenizer.endoftext_id, dist.device)
        with autocast():
            chosen, rejected = pair_logprobs(raw, packed)
        metrics = loss_of(config, chosen, rejected, chunk, lengths)[1]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(chunk) * counts
    values = dist.sum(*sums.values())
    return {name: value / len(pairs) for name, value in zip(sums, values, strict=True)}


def loss_of(config, chosen, rejected, pairs, lengths, n_pairs=None):
    """dpo_loss of these pairs: chosen, rejected (b,) the policy's log π, lengths (b, 2)."""
    reference = torch.tensor([[p["ref_chosen"], p["ref_rejected"]] for p in pairs], device=chosen.device)  # (b, 2)
    return dpo_loss(
        chosen,
        rejected,
        *reference.unbind(1),
        config.beta,
        config.variant,
        config.label_smoothing,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        gamma=config.gamma,
        nll=config.nll,
        n_pairs=n_pairs,
    )


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    if config.batch % dist.world:
        raise ConfigError(f"--batch {config.batch} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    raw, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    # With LoRA the reference is raw without its adapters: no second model in memory.
    reference = raw.eval() if config.lora.rank else copy.deepcopy(raw).requires_grad_(False).eval()
    add_lora(raw, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    problems = None  # with a verifier: greedy accuracy is measured too
    if has_verifier(config.data):
        most = {"train": config.prompts, "valid": config.eval_problems, "test": config.test_problems}
        problems = {split: load_problems(config.data, split, n, tuple(config.levels)) for split, n in most.items()}
        for split, found in problems.items():
            lengths = [len(encode_prompt(tokenizer, p)) for p in found]
            room = raw.config.context - config.max_new_tokens
            problems[split] = fitting(found, lengths, room, f"{split} prompt", dist)

    kept = run_path(config) / "pairs.pt"
    again = config.resume and kept.is_file()  # pairs and reference log-probabilities are computed once in a run's life
    if again:
        pairs = torch.load(kept, weights_only=True)
    else:  # before open_run: pairs that cannot be had must move nothing
        with lora_off(raw):
            pairs = make_pairs(config, dist, reference, tokenizer, problems, autocast)
    run_dir = open_run(config, dist)
    if dist.is_main and not again:
        torch.save(pairs, f"{kept}.tmp")
        os.replace(f"{kept}.tmp", kept)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    first, best, before = 0, math.inf, None
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best, before = state["step"], state["best"], state["before"]
        began -= state["seconds"]
        if config.lora.rank:  # what the adapters correct are the weights of --init
            load_lora_state(raw, state["lora"], open_checkpoint(init)[0])
    model = DistributedDataParallel(raw, broadcast_buffers=False) if dist.world > 1 else raw
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)

    def held_out(split):
        """Pairs of the split: loss, implicit accuracy and the rest; greedy answers: exact match."""
        figures = {"pairs": validate(raw, pairs[split], config, tokenizer, dist, autocast)}
        if problems:
            result = evaluate(raw, tokenizer, problems[split], config.max_new_tokens, dist)
            figures |= {k: v for k, v in result.items() if k != "samples"}
        return figures

    prompts = [p["prompt"] for p in pairs["valid"][:64]]
    room = raw.config.context - max(map(len, prompts))
    if before is None:
        before = held_out("test")
    if dist.is_main:
        known = f"; test accuracy before: {before['accuracy']:.1%}" if problems else ""
        print(f"{raw.num_params():,} parameters from {init}; {len(pairs['train']):,} training pairs{known}")

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state |= {"before": before, "optimizers": [o.state_dict() for o in optimizers], "lora": lora_state(raw)}
            state |= {"seconds": time.perf_counter() - began}
        return save(run_dir, name, dist, raw, tokenizer, chat=True, state=state)

    share = config.batch // dist.world  # pairs of a step on this rank
    shown = {}
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)

        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        chosen_rows = rows_at(len(pairs["train"]), step, config.batch, config.seed)
        mine = [pairs["train"][i] for i in chosen_rows[dist.rank * share : (dist.rank + 1) * share]]
        mine.sort(key=lambda p: len(p["prompt"]))  # wastes less padding
        model.train()
        sums = {}
        for i in range(0, share, config.micro_batch):
            part = mine[i : i + config.micro_batch]
            packed, lengths = batch_of(part, tokenizer.endoftext_id, dist.device)
            last = i + config.micro_batch >= share
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                with autocast():
                    chosen, rejected = pair_logprobs(model, packed)  # (b,) each
                loss, metrics = loss_of(config, chosen, rejected, part, lengths, n_pairs=config.batch)
                scaler.scale(loss * dist.world).backward()  # DDP divides by world
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(part)
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
        record = {name: v / config.batch for name, v in zip(sums, dist.sum(*sums.values()), strict=True)}
        if not math.isfinite(record["loss"]) or not (math.isfinite(norm) or scaler.is_enabled()):
            said = f"the loss is {record['loss']}, the gradient norm {norm} at step {step} (learning rate {lr:.1e})"
            raise DivergedError(f"{said}; try a smaller --lr")

        done = step + 1
        record = {f"pair_{k}" if k == "accuracy" else k: v for k, v in record.items()}
        record |= {"grad_norm": norm, "lr": lr, "steps_per_second": 1 / (time.perf_counter() - started)}
        if done % config.eval_every == 0 or done == config.steps:
            with merged(raw):  # adapters, if any, folded in: as fast as without
                result = held_out("valid")
            record |= {f"valid_{k}": v for k, v in result["pairs"].items()}
            length = min(config.max_new_tokens, room)
            record["kl"] = sampled_kl(raw, reference, tokenizer, prompts, length, dist, config.seed)
            shown = {"valid": f"{record['valid_loss']:.3f}", "kl": f"{record['kl']:.3f}"}
            if problems:
                record |= logged(result)
                shown["accuracy"] = f"{result['accuracy']:.1%}"
            if record["valid_loss"] < best:
                best = record["valid_loss"]
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{record['loss']:.3f}", logp=f"{record['logp_chosen']:.1f}", **shown, refresh=False)
    checkpoint("last", config.steps)
    interrupt.release()
    log.close()

    # The test split, once, with the checkpoint that the validation loss chose.
    raw, tokenizer, path = open_checkpoint(run_dir, dist.device)
    after = held_out("test")
    seconds = time.perf_counter() - began
    if dist.is_main:
        report(config, before, after, len(pairs["test"]), seconds)
        draw(config, run_dir, bool(problems))
        print(f"{path}, {run_dir}/last, {run_dir}/curves.png")
    return {"before": before, "after": after, "path": str(path), "seconds": seconds}


def report(config, before, after, n, seconds):
    """The table at the end."""
    low, high = wilson(after["pairs"]["accuracy"] * n, n)
    rows = [["pairs ordered rightly", "–", f"{after['pairs']['accuracy']:.1%} [{low:.1%}, {high:.1%}]"]]
    for name, label in (
        ("loss", "loss on pairs"),
        ("logp_chosen", "log π(chosen)"),
        ("logp_rejected", "log π(rejected)"),
    ):
        rows.append([label, *(f"{r['pairs'][name]:.3f}" for r in (before, after))])
    before_and_after(before, after, config.steps, seconds, rows)
    if after["pairs"]["logp_chosen"] < before["pairs"]["logp_chosen"]:
        spite = f", in spite of --nll {config.nll:g}" if config.nll else ""
        print(f"the chosen answers became less probable too{spite}: DPO fits the difference alone (see curves.png)")


def draw(config, run_dir, verified):
    panels = [
        ("loss on pairs", {"loss": "train", "valid_loss": "validation"}, "nats", {}),
        ("pairs ordered rightly", {"pair_accuracy": "train", "valid_accuracy": "validation"}, "share", {}),
        (
            "implicit rewards, validation",
            {"valid_reward_chosen": "chosen", "valid_reward_rejected": "rejected"},
            "β log π/π_ref",
            {},
        ),
        (
            "log π of the answers, validation",
            {"valid_logp_chosen": "chosen", "valid_logp_rejected": "rejected"},
            "nats",
            {},
        ),
        ("KL to the reference", {"kl": "sampled answers"}, "nats per token", {}),
        ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
    ]
    if verified:
        panels = [*metric_panels(), *panels]
    draw_curves(run_dir, f"DPO ({config.variant}, {config.pairs} pairs) on {config.data}, seed {config.seed}", panels)


if __name__ == "__main__":
    run(main, Config, __doc__)
