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

    u = log π_θ(y_w|x) − log π_ref(y_w|x)         log π(y|x): the sum over y's tokens, with its end token if it ended
    v = log π_θ(y_l|x) − log π_ref(y_l|x)         βu and βv are the implicit rewards, h is their margin
    L = −log σ(h),   h = β (u − v)                Eq. 7; ln 2 before the first step, where π_θ = π_ref

Before the first step (--pairs sampled). The start model, from SFT, answers the prompts, and it is π_ref:

    pairs     = sample_pairs(policy, problems, pair_up)   R answers per prompt, judged right or wrong by the verifier;
                                                          pair_up takes one prompt's answers: a right with a wrong one
    pairs     = add_reference(policy, pairs)              log π_ref as ref_chosen, ref_rejected: (B,), no gradient

One step, for B pairs with prompts of up to P and answers of up to T tokens (main cuts them into micro-batches of b):

    own_pairs = next_pairs(pairs, step)                   B of {prompt, chosen, rejected, ref_…}, ids         1. pairs
    micro     = batch_of(own_pairs)                       .packed: prompts (B, P), answers (2B, T)
                                                          .ref_logps, .lengths: (B,) of y_w, (B,) of y_l
    logp_chosen, logp_rejected = pair_logprobs(model, micro.packed)    (2B, T), summed over T: (B,), (B,)     2. score
    u, v      = logp_chosen − ref_chosen, logp_rejected − ref_rejected                         (B,), (B,)     3. loss
    losses    = −log σ(β (u − v))                         (B,); or another row of VARIANTS
    losses    = losses − nll · logp_chosen / |y_w|        (B,); plain DPO has no such term
    mean(losses).backward(), clip the gradient's norm, optimizer step                                         4. update
    log; every so often held-out pairs and problems, and the KL to the start model: the checkpoint with the   5. look
    lowest validation loss is kept, and that one is tested at the end

The defaults run Eq. 7 on sampled pairs (β 0.3, 300 steps of 32 pairs, the Muon optimizer of optim.py), plus the chosen
answers' own loss: --nll 1. **Plain DPO is --nll 0.** Greedy accuracy on 500 test word problems after 150 steps, three
seeds: without the term +2.4 points [-6.5, +11.3], not significant; with it +16.1 [+8.2, +24.0] (results/dpo.md).
Off by default: the other variants, label smoothing (ε below), LoRA, dropout.

What an option does to the gradient: ∂L/∂ log π_θ of one token, the same for all tokens of an answer; L is one pair's
loss, a step takes the mean of B. Prompt tokens are not scored; gradient still reaches their keys and values. u, v and
h = β (u − v) here are what the variant compares: sums, or means per token; without π_ref for simpo.

    --variant          u, v   loss of a pair                   a token of y_w                a token of y_l
    sigmoid            sums   −log σ(h)                        −β σ(−h)                      +β σ(−h)
      with ε           sums   −(1 − ε) log σ(h) − ε log σ(−h)  −β (σ(−h) − ε)                +β (σ(−h) − ε)
    length_normalised  means  −log σ(h)                        −β σ(−h) / |y_w|              +β σ(−h) / |y_l|
      with ε           means  −(1 − ε) log σ(h) − ε log σ(−h)  −β (σ(−h) − ε) / |y_w|        +β (σ(−h) − ε) / |y_l|
    hinge              sums   max(0, 1 − h)                    −β, or 0 if h > 1             +β, or 0 if h > 1
    ipo                sums   (u − v − 1/(2β))²                2 (u − v − 1/(2β))            −2 (u − v − 1/(2β))
    ipo_mean           means  (u − v − 1/(2β))²                2 (u − v − 1/(2β)) / |y_w|    −2 (u − v − 1/(2β)) / |y_l|
    simpo              means  −log σ(h − γ)                    −β σ(γ − h) / |y_w|           +β σ(γ − h) / |y_l|
    --nll c            any    adds −c log π_θ(y_w) / |y_w|     adds −c / |y_w|               nothing

In sigmoid and length_normalised σ(−h) is a pair's weight: one in the right order by a wide margin hardly counts. cDPO:
sigmoid with ε > 0. hinge: SLiC (arXiv:2305.10425) with a reference (arXiv:2309.06657). ipo: Eq. 17 of arXiv:2310.12036,
with sums; ipo_mean: as in TRL, Hugging Face's library. simpo: arXiv:2405.14734, --beta 2 to 2.5 --gamma 0.5 to 1.5. As
published, all of them need --nll 0.

Traps:

* Both answers can become less likely while the loss falls (`demo`): only the difference is fitted, and the mass goes
  to answers that nobody judged. Watch `logp_chosen`. --nll holds it up (arXiv:2404.19733).
* Sum or mean? DPO sums, so a long answer has a larger implicit reward in absolute value for its length alone (`demo`).
  The per-token variants take means. The nll term is a mean per answer; TRL's `sft` term, over the batch's tokens.
* --pairs sampled: the pairs are samples of the start model, and stay so while the policy moves: DPO is off-policy.

--pairs offline takes the pairs from `data.load_pairs`: corrupted solutions, UltraFeedback, styles, any JSONL. A pair's
prompt is computed once, and both answers read its keys and values (support/shared_prompt.py, the fast form of
transformer.answer_logprobs). Without --init the script makes a start model, as grpo.py does.

Run it:
    python dpo.py --demo                                                  # one pair by hand
    python dpo.py                                                         # pairs sampled from the start model
    python dpo.py --nll 0 --name plain                                    # plain DPO
    python dpo.py --pairs offline                                         # corrupted solutions
    python dpo.py --data style --init runs/sft --variant simpo --beta 2 --gamma 1 --nll 0
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
from support.content import records_of, weights_of
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
    """1 / (2β) is the target of u − v: the square also pulls back a difference that has grown above it."""
    return (u - v - 1 / (2 * beta)) ** 2


def simpo_loss(u, v, beta, gamma=0.0):
    """gamma: the offset that h = β (u − v) should exceed."""
    return -F.logsigmoid(beta * (u - v) - gamma)


@dataclass(frozen=True)
class Variant:
    """A preference loss and what it compares. To add one, write its function and a row of VARIANTS; a setting of its
    own is an argument of the function, named in the row, and a field of Config."""

    loss: Callable  # (u, v, beta, the settings by name) -> (B,)
    uses_reference: bool = True  # u, v are log π − log π_ref; else log π alone
    per_token: bool = False  # divided by the answers' lengths
    settings: tuple[str, ...] = ()  # what it takes besides beta; with other variants these flags are refused


VARIANTS = {
    "sigmoid": Variant(sigmoid_loss, settings=("label_smoothing",)),
    "hinge": Variant(hinge_loss),
    "ipo": Variant(ipo_loss),
    "ipo_mean": Variant(ipo_loss, per_token=True),
    "length_normalised": Variant(sigmoid_loss, per_token=True, settings=("label_smoothing",)),
    "simpo": Variant(simpo_loss, uses_reference=False, per_token=True, settings=("gamma",)),
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

    ref_chosen, ref_rejected: None if the variant uses no reference. chosen_lengths, rejected_lengths (B,): tokens, for
    the per-token variants and nll. nll: weight of the chosen answers' own loss, −log π(y_w) / |y_w|. n_pairs: of the
    whole optimizer step, over micro-batches and ranks; default B. settings: the variant's own, such as simpo's gamma.
    The defaults here are plain DPO with the paper's β; a run passes Config's values instead (`loss_with`). Metrics are
    means over these B pairs; "accuracy" is that of the pairs, the share with h > 0.
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
    if row.uses_reference:
        u, v = u - ref_chosen, v - ref_rejected
    if row.per_token:
        u, v = u / chosen_lengths, v / rejected_lengths
    losses = row.loss(u, v, beta, **{name: settings[name] for name in row.settings if name in settings})  # (B,)
    if nll:
        losses = losses - nll * policy_chosen / chosen_lengths  # (B,)
    loss = losses.sum() / (n_pairs or len(losses))
    h = beta * (u - v)
    pair_accuracy = (h > 0).float().mean()
    metrics = {
        "loss": losses.mean(),
        "accuracy": pair_accuracy,
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

    def check(policy_logps, ref_logps, loss, gradient, **settings):
        """log π of the tokens of [y_w, y_l]; the loss, and its gradient on a token of each, by hand. -> metrics"""
        policy_logps = [tokens.clone().requires_grad_() for tokens in policy_logps]
        sums = [tokens.sum()[None] for tokens in (*policy_logps, *ref_logps)]  # four of (1,)
        lengths = {"chosen_lengths": len(policy_logps[0]), "rejected_lengths": len(policy_logps[1])}
        computed, metrics = dpo_loss(*sums, beta, **lengths, **settings)
        torch.testing.assert_close(computed.item(), loss, atol=1e-6, rtol=0)
        for by_autograd, by_hand in zip(torch.autograd.grad(computed, policy_logps), gradient, strict=True):
            torch.testing.assert_close(by_autograd, torch.full_like(by_autograd, by_hand))
        return metrics

    before = torch.tensor([[1 / 2, 1 / 4], [1 / 2, 1 / 2]]).log()  # a row per answer, a column per token
    later = torch.tensor([[1 / 4, 1 / 4], [1 / 8, 1 / 4]]).log()
    check(before, before, ln2, (-1 / 4, 1 / 4))  # h = 0, so σ(−h) = 1/2
    metrics = check(later, before, math.log(3 / 2), (-1 / 6, 1 / 6))  # h = ln 2, so σ(−h) = 1/3
    check(before, before, ln2 + 3 / 2 * ln2, (-1 / 4 - 1 / 2, 1 / 4), nll=1.0)  # −log(1/8) / 2 = 3/2 ln 2
    check(later, before, math.log(3 / 2) + 2 * ln2, (-1 / 6 - 1 / 2, 1 / 6), nll=1.0)
    by_hand = {"reward_chosen": -beta * ln2, "reward_rejected": -beta * 3 * ln2, "margin": ln2}  # βu, βv, h
    assert all(math.isclose(metrics[name], value, rel_tol=1e-6) for name, value in by_hand.items())
    print(
        f"""β = 1/2                     before step 1   later
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

    ref_logps = [torch.full((n,), -1.0) for n in (2, 4)]  # y_w has 2 tokens, y_l 4
    policy_logps = [tokens + 0.1 for tokens in ref_logps]
    push = beta / (1 + math.exp(-0.1))  # β σ(−h) with h = β (2 · 0.1 − 4 · 0.1) = −0.1
    check(policy_logps, ref_logps, math.log(1 + math.exp(0.1)), (-push, push))
    check(policy_logps, ref_logps, ln2, (-beta / 2 / 2, beta / 2 / 4), variant="length_normalised")
    print(
        f"""2 and 4 tokens, log π of each up by 0.1   u     v    h = β (u − v)   a token of y_w   of y_l
sum, --variant sigmoid                   0.2   0.4      −0.1           −{push:.4f}      +{push:.4f}
mean, --variant length_normalised        0.1   0.1       0             −{1 / 8:.4f}      +{1 / 16:.4f}"""
    )


# ---------------------------------------------------------------------------------------------------------------
# Pairs as ids: {"prompt", "chosen", "rejected"}, an answer with its end token; a sampled one may have none.


def encode_pair(tokenizer, pair):
    """A `data.Pair`, text, as ids."""
    prompt, (chosen, rejected) = encode_group(tokenizer, pair)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_up(answers, rng, most=None):
    """Answers to one prompt, (ids, right, ended) each -> [(chosen, rejected), …]: right ones with wrong ones, drawn by
    rng, each in one pair, at most `most` pairs. A chosen answer must have ended by itself; repeats count once."""
    sides = {True: [], False: []}
    for ids, right, ended in answers:
        if ids not in sides[right] and (ended or not right):
            sides[right].append(ids)
    for side in sides.values():
        rng.shuffle(side)
    return list(zip(sides[True], sides[False], strict=False))[:most]


def next_pairs(pairs, step, config, dist):
    """This rank's share of the step's pairs, sorted by the prompt's length: micro-batches need less padding."""
    n = dist.per_rank("batch", config.batch)
    indices = rows_at(len(pairs), step, config.batch, config.seed)[dist.rank * n : (dist.rank + 1) * n]
    return sorted((pairs[i] for i in indices), key=lambda pair: len(pair["prompt"]))


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RunConfig):
    """Fit a policy to preference pairs (DPO)."""

    data: str = DEFAULT_TASK
    """A task (default: built-in problems), gsm8k (sampled pairs), ultrafeedback, hh, style, or a .jsonl of pairs."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    pairs: Literal["sampled", "offline"] | None = None
    """sampled (from the start model, judged by the verifier) or offline; default: sampled if --data has a verifier."""
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
    """The offset that h should exceed with --variant simpo."""
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


def make_pairs(policy, tokenizer, problems, texts, config, dist, autocast):
    """{"train", "valid", "test"}: pairs of ids, with their log π_ref if the variant uses it. The policy is still the
    start model: it answers the problems, and it is the reference. texts: the offline pairs, {} for sampled ones."""
    policy.eval()
    if texts:

        def load(split, n):
            return [encode_pair(tokenizer, pair) for pair in texts[split]]

        def length(pair):
            return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))

        pairs = load_splits(load, config.sizes, length, policy.config.context, "pair", dist)
    else:
        pairs = {}
        for number, (split, asked) in enumerate(problems.items()):
            rule = pair_up if split == "train" else partial(pair_up, most=1)  # held-out pairs should be independent
            seed = config.seed * 3 + number
            with autocast():
                pairs[split], right = sample_pairs(policy, tokenizer, asked, config, dist, seed, rule)
            if not pairs[split]:
                raise ConfigError(
                    f"no {split} prompt got both a right and a wrong answer ({right:.1%} of all are right): give "
                    "another --init, more --rollouts or more --prompts"
                )
            if dist.is_main:
                answers = f"{config.rollouts} answers to {len(asked):,} prompts, {right:.1%} right"
                print(f"{split}: {len(pairs[split]):,} pairs from {answers}")
    if VARIANTS[config.variant].uses_reference:
        pad = tokenizer.endoftext_id
        pairs = {split: add_reference(policy, of_split, pad, dist, autocast) for split, of_split in pairs.items()}
    return pairs


def loss_with(config):
    """dpo_loss with a run's settings."""
    settings = {name: getattr(config, name) for name in VARIANTS[config.variant].settings}
    return partial(dpo_loss, beta=config.beta, variant=config.variant, nll=config.nll, **settings)


@torch.no_grad()
def validate(policy, pairs, tokenizer, config, dist, autocast):
    """The means of the loss and its metrics over pairs, split between the ranks: {"loss", "accuracy" (of pairs), …}."""
    policy.eval()
    loss_of = loss_with(config)
    own_pairs = pairs[dist.rank :: dist.world]
    weight = 1 if own_pairs else 0  # a rank without a pair scores one with weight 0: all ranks must sum the same names
    own_pairs = sorted(own_pairs or pairs[:1], key=lambda p: len(p["prompt"]) + len(p["chosen"]))
    sums = {}
    for i in range(0, len(own_pairs), 64):
        micro = batch_of(own_pairs[i : i + 64], tokenizer.endoftext_id, dist.device)
        with autocast():
            logp_chosen, logp_rejected = pair_logprobs(policy, micro.packed)
        metrics = loss_of(logp_chosen, logp_rejected, *micro.ref_logps, **micro.lengths)[1]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(logp_chosen) * weight
    return {name: value / len(pairs) for name, value in zip(sums, dist.sum(*sums.values()), strict=True)}


def held_out(policy, split, pairs, problems, tokenizer, config, dist, autocast):
    """{"pairs": their metrics} and, with a verifier, those of greedy answers: there "accuracy" is exact match."""
    with merged(policy):  # adapters, if any, folded into the weights: as fast as without
        figures = {"pairs": validate(policy, pairs[split], tokenizer, config, dist, autocast)}
        if problems:
            result = evaluate(policy, tokenizer, problems[split], config.max_new_tokens, dist)
            figures |= {name: value for name, value in result.items() if name != "samples"}
    return figures


def kl_to_start(policy, start, pairs, tokenizer, config, dist):
    """KL(π ‖ start model) in nats per token, of sampled answers to the prompts of 64 validation pairs."""
    prompts = [pair["prompt"] for pair in pairs["valid"][:64]]
    room = policy.config.context - max(map(len, prompts))
    reference = policy if start is None else start.to(dist.device)  # the policy: sampled_kl turns the adapters off
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
    # The start model, for the KL alone; None: with LoRA it is the policy without its adapters
    start = None if config.lora.rank else copy.deepcopy(policy).requires_grad_(False).eval().cpu()
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    problems = None  # with a verifier, greedy accuracy is measured too
    if has_verifier(config.data):
        load = partial(load_problems, config.data, levels=tuple(config.levels), skip_bad=config.skip_bad)
        room = policy.config.context - config.max_new_tokens
        problems = load_splits(load, config.sizes, lambda p: len(encode_prompt(tokenizer, p)), room, "prompt", dist)

    texts = {}
    if config.pairs == "offline":
        load = partial(load_pairs, config.data, levels=tuple(config.levels), seed=config.seed, skip_bad=config.skip_bad)
        texts = {split: load(split, n) for split, n in config.sizes.items()}

    pairs = kept_pairs(config)  # a resumed run reads the pairs of its first part
    if pairs is None:  # sampled before the run opens its directory: an error here must not move an earlier run
        with lora_off(policy):
            pairs = make_pairs(policy, tokenizer, problems, texts, config, dist, autocast)
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    records = {split: [read[split] for read in (problems, texts) if read] for split in config.sizes}
    reads = records_of(config.data, records) | weights_of(init, policy)
    state = {"parts": {"lora": LoraState(policy, init)}, "reads": reads, "began": began, "before": None}
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
        own_pairs = next_pairs(pairs["train"], step, config, dist)  # B = config.batch / world of {prompt, chosen, …}
        model.train()
        sums = {}
        for i in range(0, len(own_pairs), config.micro_batch):  # b pairs at a time; their gradients add up
            micro = batch_of(own_pairs[i : i + config.micro_batch], tokenizer.endoftext_id, dist.device)
            last = i + config.micro_batch >= len(own_pairs)  # DDP averages over the ranks in this backward alone
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                # 2. score: log π_θ of both answers, with gradient
                with autocast():
                    logp_chosen, logp_rejected = pair_logprobs(model, micro.packed)  # (b,), (b,)

                # 3. loss: compared with log π_ref, (b,), (b,); a sum over b pairs, divided by the whole step's number
                logps = logp_chosen, logp_rejected, *micro.ref_logps
                loss, metrics = loss_of(*logps, **micro.lengths, n_pairs=config.batch)

                # 4. update: backward here, the step after the last micro-batch. * world: DDP averages, we sum
                scaler.scale(loss * dist.world).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(logp_chosen)

        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)  # clips the gradient's norm
        means = {name: v / config.batch for name, v in zip(sums, dist.sum(*sums.values()), strict=True)}
        run.check_finite(lr, norm, loss=means["loss"])

        # 5. look: every so often at held-out pairs and problems, and at the KL
        pair_accuracy = means.pop("accuracy")  # a record's "accuracy" is exact match, its "valid_accuracy" of pairs
        record = {"pair_accuracy": pair_accuracy} | means | {"grad_norm": norm, "lr": lr}
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
        run.bar.set_postfix(loss=f"{record['loss']:.3f}", logp=f"{record['logp_chosen']:.1f}", **shown, refresh=False)
    run.close()

    # The test split, once, with the checkpoint of the lowest validation loss.
    policy, tokenizer, path = open_checkpoint(run.path, dist.device)
    before, after = run.state.before, measure(policy, "test")
    if dist.is_main:
        report(config, before, after, len(pairs["test"]), run.seconds)
        draw(config, run.path, VARIANTS[config.variant], bool(problems))
        print(f"{path}, {run.path}/last, {run.path}/curves.png")
    return {"before": before, "after": after, "path": str(path), "seconds": run.seconds}


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
