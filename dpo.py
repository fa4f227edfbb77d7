"""DPO: a policy from preference pairs, without a reward model (Rafailov et al. 2023, arXiv:2305.18290); its relatives.

A pair is a prompt x with two answers: y_w, the chosen one, and y_l, the rejected one. RLHF fits a reward r to the
pairs, then a policy to r under a KL penalty. The best policy of that second problem is known in closed form:

    J(π) = E_π[ r(x, y) ] − β KL(π ‖ π_ref)                              to be maximized
         = E_π[ r(x, y) − β log(π(y|x) / π_ref(y|x)) ]
         = −β E_π[ log(π(y|x) / (π_ref(y|x) exp(r(x, y) / β))) ]
         = −β KL(π ‖ π*) + β log Z(x),     π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x)

Z(x) makes π* sum to 1 over all answers; it does not depend on π. A KL is never negative, so the best policy is π*.
Solve for r, and put it into the Bradley-Terry model of the pairs:

    r(x, y)          = β log(π*(y|x) / π_ref(y|x)) + β log Z(x)
    P(y_w beats y_l) = σ(r(x, y_w) − r(x, y_l))            β log Z(x) cancels: both answers share the prompt

The reward is gone. Maximum likelihood of the pairs, with the policy π_θ in place of π*, is a loss on π_θ itself:

    u = log π_θ(y_w|x) − log π_ref(y_w|x)         log π(y|x): the sum over y's tokens, its end token included
    v = log π_θ(y_l|x) − log π_ref(y_l|x)         βu and βv are the implicit rewards, h their margin
    L = −log σ(h),   h = β (u − v)                Eq. 7; ln 2 at the start, where π_θ = π_ref

Once, before the first step (--pairs sampled). The start, an SFT model, is both the sampler and π_ref:

    answers = generate(start, prompts, n=R)                  R per prompt, each judged right or wrong by the verifier
    pairs   = pair_up(answers)                               a right and a wrong answer to the same prompt
    ref_chosen, ref_rejected = pair_logprobs(start, pairs)   no gradient; kept, so that training needs no second model

One step, for B pairs with answers of up to T tokens (main has the same steps):

    batch            = next_pairs(step)                      B of {prompt, chosen, rejected}, lists of ids     1. pairs
    chosen, rejected = pair_logprobs(model, batch)           log π_θ (2B, T), summed over T to (B,), (B,)      2. score
    u, v             = chosen − ref_chosen, rejected − ref_rejected                         (B,), (B,)         3. loss
    losses           = −log σ(β (u − v))                     (B,); or another row of VARIANTS
    losses           = losses − nll · chosen / |y_w|         (B,); plain DPO has no such term
    mean(losses).backward(), clip the gradient's norm, optimizer step                                          4. update
    log; every so often held-out pairs, greedy answers to held-out problems, the KL to the start               5. look

The defaults run Eq. 7 on sampled pairs (β 0.3, 300 steps of 32 pairs, Muon) plus the chosen answers' own loss: --nll 1.
**Plain DPO is --nll 0.** In 150 steps it gains nothing significant here (+2.4 points [-6.5, +11.3]); with the term the
gain is +16.1 [+8.2, +24.0] (results/dpo.md). Off by default: the other variants, label smoothing, LoRA, dropout.

What each option does to the gradient. A prompt's tokens get none; all tokens of an answer get the same ∂L/∂ log π_θ,
here of one pair (a step's loss is the mean of B):

    --variant             loss of a pair                              a token of y_w           a token of y_l
    sigmoid               −log σ(h)                                   −β σ(−h)                 +β σ(−h)
      --label_smoothing ε −(1 − ε) log σ(h) − ε log σ(−h)             −β (σ(−h) − ε)           +β (σ(−h) − ε)
    hinge                 max(0, 1 − h)                               −β, or 0 if h > 1        +β, or 0 if h > 1
    ipo                   (u − v − 1/(2β))²                           2 (u − v − 1/(2β))       −2 (u − v − 1/(2β))
    ipo_mean              the same with u / |y_w|, v / |y_l|          the same / |y_w|         the same / |y_l|
    length_normalised     −log σ(h) with u / |y_w|, v / |y_l|         −β σ(−h) / |y_w|         +β σ(−h) / |y_l|
    simpo                 −log σ(h − γ), the same without π_ref       −β σ(γ − h) / |y_w|      +β σ(γ − h) / |y_l|
    --nll c               adds −c log π_θ(y_w) / |y_w|                adds −c / |y_w|          nothing

σ(−h) is the weight: pairs in the right order by a wide margin hardly count. cDPO is sigmoid with ε > 0. hinge: SLiC
(arXiv:2305.10425) with a reference (arXiv:2309.06657). ipo: Eq. 17 of arXiv:2310.12036, with sums as in the paper;
ipo_mean is TRL's. simpo: arXiv:2405.14734, as published with --beta 2 to 2.5 --gamma 0.5 to 1.5 --nll 0.

Traps:

* Both answers can become less likely while the loss falls (`demo`): only the difference is fitted, and the mass goes
  to answers that nobody judged. Watch `logp_chosen`. --nll holds it up (arXiv:2404.19733).
* Sum or mean? DPO sums, so a long answer has a larger margin for its length alone (`demo`). The per-token variants take
  means. The nll term is a mean per answer; TRL's `sft` term is a mean over the batch's tokens.
* The pairs are the start's samples. The policy leaves the start and the pairs do not follow: DPO is off-policy.
* --pairs offline takes them from `data.load_pairs` instead: corrupted solutions, UltraFeedback, styles, any JSONL.

The prompt of a pair is computed once, and both answers read its keys and values (support/shared_prompt.py, the fast
form of transformer.answer_logprobs). The KL to the start is measured on samples, at evaluations; for it alone a frozen
copy of the start waits in the CPU's memory. With --lora.rank the policy without its adapters is the start, and there
is no copy. Without --init the script makes its own start under runs/start, as grpo.py does.

Run it:
    python dpo.py --demo                                                  # one pair by hand
    python dpo.py                                                         # pairs sampled from the start
    python dpo.py --nll 0 --name plain                                    # plain DPO
    python dpo.py --pairs offline                                         # corrupted solutions
    python dpo.py --data style --init runs/sft --variant simpo --beta 2
    torchrun --nproc_per_node 2 dpo.py --init runs/sft
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import DEFAULT_TASK, TASKS, encode_group, encode_prompt, has_verifier, load_pairs, load_problems, rows_at
from evaluate import add_figures, evaluate, logged, sampled_kl
from lora import LoraConfig, add_lora, lora_off, merged
from optim import lr_at, make_optimizers, optimizer_step
from sft import sft_start
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, FractionBelow1, Positive, Range, listed
from support.cli import run_script
from support.devices import precision, setup
from support.dpo_report import draw, report
from support.errors import ConfigError
from support.lora_files import LoraState
from support.pairs import add_reference, batch_of, keep_pairs, kept_pairs, pair_logprobs, sample_pairs
from support.records import load_splits
from support.runs import Run, RunConfig

# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions. u, v (B,): what a variant compares (`Variant`) -> the loss of each pair (B,).


def sigmoid_loss(u, v, beta, label_smoothing=0.0):
    """Eq. 7. label_smoothing: the share of pairs whose label is taken to be wrong; then the best h is finite."""
    h = beta * (u - v)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def hinge_loss(u, v, beta):
    """No gradient once h is above 1."""
    return (1 - beta * (u - v)).clamp(min=0)


def ipo_loss(u, v, beta):
    """A margin to meet: the square pulls back one that has grown too large."""
    return (u - v - 1 / (2 * beta)) ** 2


def simpo_loss(u, v, beta, gamma=0.0):
    """gamma: the margin that β (u − v) should exceed."""
    return -F.logsigmoid(beta * (u - v) - gamma)


@dataclass(frozen=True)
class Variant:
    """A preference loss and what it compares. To add one, write its function and a row of VARIANTS; a setting of its
    own is an argument of the function, named in the row, and a field of Config."""

    loss: Callable  # (u, v, beta, the settings by name) -> (B,)
    reference: bool = True  # u, v are log π − log π_ref; else log π alone
    per_token: bool = False  # divided by the answers' lengths
    settings: tuple[str, ...] = ()  # what it takes besides beta; with other variants these flags are refused

    @property
    def reward(self):
        """The implicit reward, as the label of an axis."""
        return f"β {'log π/π_ref' if self.reference else 'log π'}{' per token' if self.per_token else ''}"


VARIANTS = {
    "sigmoid": Variant(sigmoid_loss, settings=("label_smoothing",)),
    "hinge": Variant(hinge_loss),
    "ipo": Variant(ipo_loss),
    "ipo_mean": Variant(ipo_loss, per_token=True),
    "length_normalised": Variant(sigmoid_loss, per_token=True, settings=("label_smoothing",)),
    "simpo": Variant(simpo_loss, reference=False, per_token=True, settings=("gamma",)),
}


def check_settings(variant, names):
    """Raise ConfigError on a setting that the variant does not take."""
    for name in names:
        if name not in VARIANTS[variant].settings:
            takers = [known for known, row in VARIANTS.items() if name in row.settings]
            raise ConfigError(f"--{name} has no meaning with --variant {variant}, only with {listed(takers)}")


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
    nll=0.0,
    n_pairs=None,
    **settings,
):
    """Log-probabilities (B,), summed over the answer's tokens -> (loss, metrics). variant: a row of VARIANTS.

    ref_chosen, ref_rejected: may be None if the variant has no reference. chosen_lengths, rejected_lengths (B,): token
    counts, which the per-token variants and nll need. nll: weight of the chosen answers' own loss, −log π(y_w) / |y_w|.
    n_pairs: of the whole optimizer step, over micro-batches and ranks; default B. settings: the variant's own, such as
    simpo's gamma. Metrics are means over this batch; `accuracy` is the share of pairs with h > 0.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"--variant {variant!r} is not known; use {listed(VARIANTS)}")
    row, settings = VARIANTS[variant], {"label_smoothing": label_smoothing} | settings
    check_settings(variant, [name for name, value in settings.items() if value])
    if row.per_token and (chosen_lengths is None or rejected_lengths is None):
        raise ConfigError(f"the variant {variant} needs the answers' lengths")
    if nll and chosen_lengths is None:
        raise ConfigError("nll is a mean per token: it needs the answers' lengths")
    u, v = policy_chosen, policy_rejected  # (B,)
    if row.reference:
        u, v = u - ref_chosen, v - ref_rejected
    if row.per_token:
        u, v = u / chosen_lengths, v / rejected_lengths
    losses = row.loss(u, v, beta, **{name: settings[name] for name in row.settings if name in settings})  # (B,)
    if nll:
        losses = losses - nll * policy_chosen / chosen_lengths  # (B,)
    loss = losses.sum() / (n_pairs or len(losses))
    h = beta * (u - v)
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


def demo():
    """A pair of two-token answers, by hand; then what summing does to two lengths."""
    beta, ln2 = 0.5, math.log(2)

    def check(policy, reference, loss, gradient, **settings):
        """log π of the tokens of [y_w, y_l]; the loss, and its gradient on a token of each, by hand. -> metrics"""
        policy = [tokens.clone().requires_grad_() for tokens in policy]
        sums = [tokens.sum()[None] for tokens in (*policy, *reference)]  # four of (1,)
        lengths = {"chosen_lengths": len(policy[0]), "rejected_lengths": len(policy[1])}
        computed, metrics = dpo_loss(*sums, beta, **lengths, **settings)
        torch.testing.assert_close(computed.item(), loss, atol=1e-6, rtol=0)
        for by_autograd, by_hand in zip(torch.autograd.grad(computed, policy), gradient, strict=True):
            torch.testing.assert_close(by_autograd, torch.full_like(by_autograd, by_hand))
        return metrics

    start = torch.tensor([[1 / 2, 1 / 4], [1 / 2, 1 / 2]]).log()  # a row per answer, a column per token
    later = torch.tensor([[1 / 4, 1 / 4], [1 / 8, 1 / 4]]).log()
    check(start, start, ln2, (-1 / 4, 1 / 4))  # h = 0, so σ(−h) = 1/2
    metrics = check(later, start, math.log(3 / 2), (-1 / 6, 1 / 6))  # h = ln 2, so σ(−h) = 1/3
    check(start, start, ln2 + 3 / 2 * ln2, (-1 / 4 - 1 / 2, 1 / 4), nll=1.0)  # −log(1/8) / 2 = 3/2 ln 2
    check(later, start, math.log(3 / 2) + 2 * ln2, (-1 / 6 - 1 / 2, 1 / 6), nll=1.0)
    by_hand = {"reward_chosen": -beta * ln2, "reward_rejected": -beta * 3 * ln2, "margin": ln2}  # βu, βv, h
    assert all(math.isclose(metrics[name], value, rel_tol=1e-6) for name, value in by_hand.items())
    print(
        f"""β = 1/2                     at the start    later
π(y_w), by tokens            1/2 · 1/4      1/4 · 1/4        1/8 -> 1/16
π(y_l), by tokens            1/2 · 1/2      1/8 · 1/4        1/4 -> 1/32
u, v                            0, 0        −ln 2, −3 ln 2   both answers became less likely,
h = β (u − v)                    0            ln 2
loss = −log σ(h)           ln 2 = {ln2:.3f}   ln 3/2 = {math.log(3 / 2):.3f}   and still the loss fell
gradient, a token of y_w        −1/4           −1/6          −β σ(−h), equal to autograd's
          a token of y_l        +1/4           +1/6
with --nll 1, of y_w         −1/4 − 1/2     −1/6 − 1/2       pulls y_w up; nothing new on y_l
"""
    )

    reference = [torch.full((n,), -1.0) for n in (2, 4)]  # y_w has 2 tokens, y_l 4
    policy = [tokens + 0.1 for tokens in reference]
    push = beta / (1 + math.exp(-0.1))  # β σ(−h) with h = β (2 · 0.1 − 4 · 0.1) = −0.1
    check(policy, reference, math.log(1 + math.exp(0.1)), (-push, push))
    check(policy, reference, ln2, (-beta / 2 / 2, beta / 2 / 4), variant="length_normalised")
    print(
        f"""2 and 4 tokens, log π of each up by 0.1   u     v    h = β (u − v)   a token of y_w   of y_l
sum, --variant sigmoid                   0.2   0.4      −0.1           −{push:.4f}      +{push:.4f}
mean, --variant length_normalised        0.1   0.1       0             −{1 / 8:.4f}      +{1 / 16:.4f}"""
    )


# ---------------------------------------------------------------------------------------------------------------
# Pairs as ids: {"prompt", "chosen", "rejected"}, an answer with its end token.


def encode_pair(tokenizer, pair):
    """A `data.Pair`, text, as ids."""
    prompt, (chosen, rejected) = encode_group(tokenizer, pair)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_up(answers, rng, most=None):
    """Answers to one prompt, (ids, right, ended) each -> [(chosen, rejected), …]: right ones against wrong ones, drawn
    by rng, each in one pair, at most `most` pairs. A chosen answer must also have ended by itself; repeats count once.
    """
    sides = {True: [], False: []}
    for ids, right, ended in answers:
        if ids not in sides[right] and (ended or not right):
            sides[right].append(ids)
    for side in sides.values():
        rng.shuffle(side)
    return list(zip(sides[True], sides[False], strict=False))[:most]


def next_pairs(pairs, step, config, dist):
    """This rank's part of the step's pairs, by length: neighbours of like length waste no padding."""
    share = dist.per_rank("batch", config.batch)
    indices = rows_at(len(pairs), step, config.batch, config.seed)[dist.rank * share : (dist.rank + 1) * share]
    return sorted((pairs[i] for i in indices), key=lambda pair: len(pair["prompt"]))


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RunConfig):
    """Fit a policy to preference pairs (DPO)."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), gsm8k (sampled pairs), ultrafeedback, hh, style, or the path of
    a .jsonl of pairs."""
    skip_bad: bool = False
    """Skip and count records that cannot be used, instead of stopping at the first one."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    pairs: Literal["sampled", "offline"] | None = None
    """sampled (from the start, judged by the verifier) or offline; default: sampled if --data has a verifier."""
    prompts: Count = 3000
    """Training prompts to sample answers for; with offline pairs, the largest number of pairs."""
    rollouts: Annotated[int, Range(int, 2)] = 8
    """Sampled answers per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference; default: one trained once into runs/start."""
    name: str = "dpo"
    steps: Count = 300
    batch: Count = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch: Count = 32
    """Pairs per forward pass of one rank."""
    variant: Literal[tuple(VARIANTS)] = "sigmoid"
    """The loss of a pair."""
    beta: Positive = 0.3
    """Weight of the KL in the problem that DPO solves: a larger one keeps the policy closer to the reference."""
    label_smoothing: Annotated[float, Range(float, 0, 0.5)] = 0.0
    """Assumed share of pairs with the wrong label (cDPO)."""
    gamma: Amount = 0.0
    """The margin of --variant simpo."""
    nll: Amount = 1.0
    """Weight of the chosen answers' own loss, a mean per token as in SFT; 0 is plain DPO."""
    lr: Amount = 2e-4
    max_new_tokens: Count = 64
    """Most tokens of a sampled answer."""
    eval_problems: Count = 200
    """Validation problems (and their pairs) per evaluation."""
    test_problems: Count = 1000
    """Test problems (or pairs) of the evaluations before and after training."""
    dropout: FractionBelow1 = 0.0
    """Dropout while training."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self):
        super().__post_init__()
        if self.pairs is None:
            self.pairs = "sampled" if has_verifier(self.data) else "offline"
        if self.pairs == "sampled" and not has_verifier(self.data):
            raise ConfigError(f"--pairs sampled needs a verifier, which {self.data} has not; use --pairs offline")
        of_variants = {name for row in VARIANTS.values() for name in row.settings}
        check_settings(self.variant, [n for n in sorted(of_variants) if getattr(self, n) != getattr(Config, n)])
        if self.init is None and self.data not in TASKS:
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")

    @property
    def sizes(self):
        """{split: the most problems or pairs of it}."""
        return {"train": self.prompts, "valid": self.eval_problems, "test": self.test_problems}


def make_pairs(policy, tokenizer, problems, config, dist, autocast):
    """{"train", "valid", "test"}: pairs of ids, with their log π_ref if the variant has a reference.

    The policy is still the start: it answers the problems, and it is the reference.
    """
    policy.eval()
    if config.pairs == "offline":

        def load(split, n):
            pairs = load_pairs(config.data, split, n, tuple(config.levels), config.seed, skip_bad=config.skip_bad)
            return [encode_pair(tokenizer, pair) for pair in pairs]

        def length(pair):
            return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))

        pairs = load_splits(load, config.sizes, length, policy.config.context, "pair", dist)
    else:
        pairs = {}
        for number, (split, asked) in enumerate(problems.items()):
            rule = pair_up if split == "train" else partial(pair_up, most=1)  # held-out pairs should be independent
            with autocast():
                sampled = sample_pairs(policy, tokenizer, asked, config, dist, config.seed * 3 + number, rule)
            pairs[split], right = sampled
            if not pairs[split]:
                raise ConfigError(
                    f"no {split} prompt got both a right and a wrong answer ({right:.1%} of all are right): give "
                    "another --init, more --rollouts or more --prompts"
                )
            if dist.is_main:
                answers = f"{config.rollouts} answers to {len(asked):,} prompts, {right:.1%} right"
                print(f"{split}: {len(pairs[split]):,} pairs from {answers}")
    if VARIANTS[config.variant].reference:
        pad = tokenizer.endoftext_id
        pairs = {split: add_reference(policy, of_split, pad, dist, autocast) for split, of_split in pairs.items()}
    return pairs


def loss_with(config):
    """dpo_loss with a run's settings."""
    settings = {name: getattr(config, name) for name in VARIANTS[config.variant].settings}
    return partial(dpo_loss, beta=config.beta, variant=config.variant, nll=config.nll, **settings)


@torch.no_grad()
def validate(policy, pairs, tokenizer, config, dist, autocast):
    """The means of the loss and its metrics over pairs, shared by the ranks: {"loss", "accuracy", "margin", …}."""
    policy.eval()
    own, loss_of = pairs[dist.rank :: dist.world], loss_with(config)
    counts = bool(own)  # a rank without a pair scores one with weight 0: all ranks must sum the same names
    own, sums = sorted(own or pairs[:1], key=lambda p: len(p["prompt"]) + len(p["chosen"])), {}
    for i in range(0, len(own), 64):
        micro = batch_of(own[i : i + 64], tokenizer.endoftext_id, dist.device)
        with autocast():
            chosen, rejected = pair_logprobs(policy, micro.packed)
        metrics = loss_of(chosen, rejected, *micro.reference, **micro.lengths)[1]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(chosen) * counts
    return {name: value / len(pairs) for name, value in zip(sums, dist.sum(*sums.values()), strict=True)}


def held_out(policy, split, pairs, problems, tokenizer, config, dist, autocast):
    """The metrics of the split's pairs and, with a verifier, the exact match of greedy answers to its problems."""
    with merged(policy):  # adapters, if any, folded into the weights: as fast as without
        figures = {"pairs": validate(policy, pairs[split], tokenizer, config, dist, autocast)}
        if problems:
            result = evaluate(policy, tokenizer, problems[split], config.max_new_tokens, dist)
            figures |= {name: value for name, value in result.items() if name != "samples"}
    return figures


def kl_to_start(policy, start, pairs, tokenizer, config, dist):
    """KL(π ‖ π_start) in nats per token, of sampled answers to the prompts of 64 validation pairs."""
    prompts = [pair["prompt"] for pair in pairs["valid"][:64]]
    room = policy.config.context - max(map(len, prompts))
    reference = policy if start is None else start.to(dist.device)  # None: the policy without its adapters
    kl = sampled_kl(policy, reference, tokenizer, prompts, min(config.max_new_tokens, room), dist, config.seed)
    if start is not None:
        start.cpu()
    return kl


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    dist.per_rank("batch", config.batch)  # an error now, not after the pairs are sampled
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    policy, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    start = None  # needed for the KL alone. With LoRA it is the policy without its adapters: no second model
    if not config.lora.rank:
        start = copy.deepcopy(policy).requires_grad_(False).eval().cpu()
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    problems = None  # with a verifier, greedy accuracy is measured too
    if has_verifier(config.data):
        load = partial(load_problems, config.data, levels=tuple(config.levels))
        room = policy.config.context - config.max_new_tokens
        problems = load_splits(load, config.sizes, lambda p: len(encode_prompt(tokenizer, p)), room, "prompt", dist)

    pairs = kept_pairs(config)  # a resumed run reads the pairs of its first part
    if pairs is None:  # sampled before the run opens its directory: an error here must not move an earlier run
        with lora_off(policy):
            pairs = make_pairs(policy, tokenizer, problems, config, dist, autocast)
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    state = {"parts": {"lora": LoraState(policy, init)}, "began": began, "before": None}
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=math.inf, lower_is_better=True, **state)
    keep_pairs(run, pairs)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy

    given = {"pairs": pairs, "problems": problems, "tokenizer": tokenizer, "config": config}
    measure = partial(held_out, dist=dist, autocast=autocast, **given)  # (policy, split) -> figures
    if run.state.before is None:
        run.state.before = measure(policy, "test")
    if dist.is_main:
        accuracy = f"; test accuracy before: {run.state.before['accuracy']:.1%}" if problems else ""
        print(f"{policy.num_params():,} parameters from {init}; {len(pairs['train']):,} training pairs{accuracy}")

    loss_of, shown = loss_with(config), {}
    for step in run.steps():
        # 1. pairs
        started = time.perf_counter()
        batch = next_pairs(pairs["train"], step, config, dist)  # B of {prompt, chosen, rejected}, over all ranks

        model.train()
        sums = {}
        for i in range(0, len(batch), config.micro_batch):  # b pairs at a time; their gradients add up
            micro = batch_of(batch[i : i + config.micro_batch], tokenizer.endoftext_id, dist.device)
            last = i + config.micro_batch >= len(batch)
            # DDP sums the gradients over the ranks in the last backward alone
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                # 2. score: log π_θ of both answers, with gradient
                with autocast():
                    chosen, rejected = pair_logprobs(model, micro.packed)  # (b,), (b,)

                # 3. loss: compared with log π_ref, (b,), (b,); a sum over b pairs, divided by the whole step's
                loss, metrics = loss_of(chosen, rejected, *micro.reference, **micro.lengths, n_pairs=config.batch)

                # 4. update: backward here, the step after the last micro-batch. DDP divides by world
                scaler.scale(loss * dist.world).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen)

        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)  # clips the gradient's norm
        means = {name: v / config.batch for name, v in zip(sums, dist.sum(*sums.values()), strict=True)}
        run.check_finite(lr, norm, loss=means["loss"])

        # 5. look: every so often at held-out pairs and problems, and at the KL
        record = {"pair_accuracy": means.pop("accuracy")} | means | {"grad_norm": norm, "lr": lr}
        record["steps_per_second"] = 1 / (time.perf_counter() - started)
        if run.due(config.eval_every):
            result = measure(policy, "valid")
            record |= {f"valid_{name}": value for name, value in result["pairs"].items()}
            record["kl"] = kl_to_start(policy, start, pairs, tokenizer, config, dist)
            shown = {"valid": f"{record['valid_loss']:.3f}", "kl": f"{record['kl']:.3f}"}
            if problems:
                add_figures(record, logged(result))
                shown["accuracy"] = f"{result['accuracy']:.1%}"
            run.keep_best(record["valid_loss"])
        run.log(step + 1, **record)
        brief = {"loss": f"{record['loss']:.3f}", "logp": f"{record['logp_chosen']:.1f}"}
        run.bar.set_postfix(**brief, **shown, refresh=False)
    run.close()

    # The test split, once, with the checkpoint of the lowest validation loss.
    policy, tokenizer, path = open_checkpoint(run.path, dist.device)
    before, after = run.state.before, measure(policy, "test")
    if dist.is_main:
        report(config, before, after, len(pairs["test"]), run.seconds)
        draw(config, run.path, VARIANTS[config.variant].reward, bool(problems))
        print(f"{path}, {run.path}/last, {run.path}/curves.png")
    return {"before": before, "after": after, "path": str(path), "seconds": run.seconds}


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
