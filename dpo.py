"""DPO: a policy from preference pairs, without a reward model (Rafailov et al. 2023, arXiv:2305.18290); its relatives.

A pair is a prompt x with two answers, the chosen y_w and the rejected y_l. RLHF (reinforcement learning from human
feedback) fits a reward r to the pairs, then a policy π to r, with a KL penalty to its start π_ref. The best π is known:

    J(π) = E_π[ r(x, y) ] − β KL(π ‖ π_ref)                              to be maximized
         = E_π[ r(x, y) − β log(π(y|x) / π_ref(y|x)) ]
         = −β E_π[ log(π(y|x) / (π_ref(y|x) exp(r(x, y) / β))) ]
         = −β KL(π ‖ π*) + β log Z(x),     π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x)

Z(x) = Σ_y π_ref(y|x) exp(r(x, y) / β) makes π* sum to 1; π is not in it. A KL is never negative, so the best policy
is π*. Solve for r, and put it into the Bradley-Terry model of the pairs (reward_model.py):

    r(x, y)          = β log(π*(y|x) / π_ref(y|x)) + β log Z(x)
    P(y_w beats y_l) = σ(r(x, y_w) − r(x, y_l))            β log Z(x) cancels: both answers share the prompt

The reward is gone. Maximum likelihood of the pairs, with the policy π_θ in place of π*, is a loss on π_θ itself:

    u  = log π_θ(y_w|x) − log π_ref(y_w|x)        log π(y|x): the sum over y's tokens, with its end token if it ended
    v  = log π_θ(y_l|x) − log π_ref(y_l|x)        βu and βv are the implicit rewards, h is their margin
    L  = −log σ(h),   h = β (u − v)               Eq. 7; ln 2 before the first step, where π_θ = π_ref
    ∇L = −β σ(−h) [∇log π_θ(y_w|x) − ∇log π_θ(y_l|x)]       a pair in the right order by a wide margin hardly counts

Before the first step (--pairs sampled) the policy is the model from SFT. It answers the prompts, and it is π_ref:

    pairs = pairs_of_run(policy, …)           R answers per prompt, judged by the verifier. A right one that has ended
                                              and a wrong one, perhaps cut off, are a pair, each in no other; a held-out
                                              prompt gives at most one. log π_ref of both is computed now, once.

One step, for the B pairs of all ranks; a rank takes its share, b pairs at a time:

    own_pairs = next_pairs(pairs["train"], step)    B / ranks of {prompt, chosen, rejected, ref_…}            1. pairs
    for each b of own_pairs:
        micro  = batch_of(the b pairs)              .packed: b prompts, each with two answers of up to T tokens
        ref_chosen, ref_rejected = micro.ref_logps                                             (b,), (b,)
        logp_chosen, logp_rejected = pair_logprobs(model, micro.packed)    Σ over T of (2b, T): (b,), (b,)    2. score
        u, v   = logp_chosen − ref_chosen, logp_rejected − ref_rejected                        (b,), (b,)     3. loss
        losses = −log σ(β (u − v)) − nll · logp_chosen / |y_w|      the first term: --variant's      (b,)
        (sum(losses) / B).backward()                the gradients add up                                      4. update
    clip the gradient's norm, optimizer step
    log; every so often held-out pairs and problems, and the KL to the start model; keep the checkpoint       5. look
    of the lowest validation loss, and test it at the end

`pair_logprobs` computes a prompt once; both answers read its keys and values (support/shared_prompt.py, a fast form).

The defaults run Eq. 7 on sampled pairs (β 0.3, 300 steps of 32 pairs, Muon at 2e-4) plus an SFT loss on the chosen
answer (--nll 1, as in arXiv:2404.19733). **Plain DPO is --nll 0**; with its paper's settings --nll 0 --beta 0.1 --batch
64 --optimizer adamw --lr 1e-6 --warmup 150 (there RMSprop, and up to 6B weights). Off: label smoothing, LoRA, dropout,
and the other variants; the table above VARIANTS has them, and below it stand their papers' flags.

Traps:
* `loss` and `valid_loss`, which chooses the checkpoint, have the nll term in them, so they start above ln 2. The pair
  accuracy of the first step is noise: h is 0 up to rounding, and h > 0 counts.
* Both answers can become less likely while the loss falls (`demo`): only the difference is fitted, and the mass goes
  to answers that nobody judged. Watch `valid_logp_chosen`. --nll slows the fall: without it the runs of results/dpo.md
  lose 3.1 nats instead of 1.0, and end 24 points of accuracy lower.
* Sum or mean? DPO sums, so a long answer has a larger implicit reward in absolute value for its length alone (`demo`).
  The per-token variants take means, and so does the nll term.
* --pairs sampled: the pairs are samples of the start model, and stay so while the policy moves: DPO is off-policy.

Run it:
    python dpo.py --demo                                                  # one pair by hand
    python dpo.py                                                         # pairs sampled from the start model
    python dpo.py --nll 0 --name plain                                    # plain DPO
    python dpo.py --pairs offline                                         # corrupted solutions
    python dpo.py --variant kto --nll 5 --beta 0.1 --lr 1e-4              # single answers
    python dpo.py --variant orpo --beta 0.1                               # no reference
    torchrun --nproc_per_node 2 dpo.py --init runs/sft
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from optim import lr_at, optimizer_step
from support.checks import Amount, Count, FractionBelow1, Positive
from support.cli import run_script
from support.dpo_run import begin_run, open_start
from support.pair_rows import PairFlags, next_pairs, pairs_of_run, reference_point
from support.pairs import Means, batch_of, pair_logprobs, to_floats
from support.recorder import RecordFlags
from support.sharding import averaging
from support.variants import VariantFlags, check_config, check_loss

# ---------------------------------------------------------------------------------------------------------------
# The objective. Pure functions of u and v, (b,) each -> the loss of each pair (b,). u and v are those of the docstring;
# a variant may take means per token, not sums, or leave π_ref out (`Variant`). h = β (u − v); σ'(x) = σ(x) σ(−x).


def sigmoid_loss(u, v, beta, label_smoothing=0.0):
    """Eq. 7. label_smoothing, ε: the share of pairs whose label is taken to be wrong. The best h: log((1 − ε) / ε)."""
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


def apo_zero_loss(u, v, beta):
    """Each answer against the reference, not against the other: y_w becomes more likely than under π_ref, y_l less."""
    return 1 - torch.sigmoid(beta * u) + torch.sigmoid(beta * v)


def apo_down_loss(u, v, beta):
    """Pushes y_l down first; y_w falls too once σ'(βu) > σ'(h)."""
    return 1 - torch.sigmoid(beta * (u - v)) + torch.sigmoid(beta * u)


def odds_ratio_loss(u, v, beta):
    """ORPO's second term, Eq. 7 of arXiv:2403.07691. p = exp(u), the geometric mean of the token probabilities."""

    def log_odds(log_p):
        log_p = log_p.clamp(max=-1e-7)  # p = 1 has infinite odds
        return log_p - torch.log(-torch.expm1(log_p))  # log p − log(1 − p)

    return -beta * F.logsigmoid(log_odds(u) - log_odds(v))


def orpo_loss(mean_chosen, mean_rejected, weight=0.1):
    """Both terms: the chosen answers' own loss, and `weight` times that of the odds. log π per token, means over an
    answer, (b,) -> (loss, metrics), "logp_chosen" and "logp_rejected" means per token too."""
    one = {"chosen_lengths": 1, "rejected_lengths": 1}  # they are means already
    return dpo_loss(mean_chosen, mean_rejected, None, None, weight, "orpo", nll=1.0, **one)


def kto_loss(
    log_ratio, desirable, z0, beta=0.1, weight_desirable=1.0, weight_undesirable=1.0, *,
    n_pairs=None, logps=None, nll_losses=0,
):  # fmt: skip
    """Single answers need no pairs (arXiv:2402.01306). log_ratio: u = log π − log π_ref, summed over tokens; desirable:
    whether the answer is good; (b,) each. z0: a number, without gradient. -> (loss, metrics)

        L  = λ_D (1 − σ(β (u − z0))) if y is good, λ_U (1 − σ(β (z0 − u))) if it is bad      λ: the two weights
        z0 = max(0, mean of log π(y'|x) − log π_ref(y'|x)), an estimate of KL(π ‖ π_ref): y' is another prompt's answer,
             that of the row before; one z0 for all of a step (`reference_point`)

    n_pairs: answers in the whole step; default b. logps (b,): log π, for the metrics. nll_losses (b,): added to
    the losses of the good answers. Metrics: "pair_accuracy" is the share on the right side of z0; "chosen" are the good
    answers, "rejected" the bad ones. How to choose λ, and what the first gradient is: support/judged.py.
    """
    good, z0 = desirable.bool(), torch.as_tensor(z0, dtype=log_ratio.dtype, device=log_ratio.device).detach()
    h = torch.where(good, log_ratio - z0, z0 - log_ratio) * beta  # (b,); above 0: on the right side
    losses = torch.sigmoid(-h)  # 1 − σ(h)
    losses = torch.where(good, weight_desirable * losses + nll_losses, weight_undesirable * losses)  # (b,)
    metrics = {"loss": losses.mean(), "pair_accuracy": (h > 0).float().mean(), "margin": h.mean(), "z0": z0}
    for side, on_side in (("chosen", good), ("rejected", ~good)):  # (b,); NaN if there is none on a side
        metrics[f"reward_{side}"] = beta * log_ratio[on_side].mean()
        if logps is not None:
            metrics[f"logp_{side}"] = logps[on_side].mean()
    return losses.sum() / (n_pairs or len(losses)), to_floats(metrics)


@dataclass(frozen=True)
class Variant:
    """A preference loss and what it compares. To add one, write its function and a row of VARIANTS; a setting of its
    own is an argument of the function, named in the row, and a field of Config."""

    loss: Callable  # (u, v, beta, the settings by name) -> (b,); kto's has other arguments, and `loss_of` calls it
    uses_reference: bool = True  # u, v are log π − log π_ref; else log π alone
    per_token: bool = False  # divided by the answers' lengths
    unpaired: bool = False  # of single answers, each with a label: good or bad
    settings: tuple[str, ...] = ()  # what it takes besides beta; with other variants these flags are refused


# What an option does to the gradient. The last two columns are the derivative of one pair's loss with respect to the
# log-probability of one token; all tokens of an answer get the same.
#
# --variant          u, v   loss of a pair                   a token of y_w                a token of y_l
# sigmoid            sums   −log σ(h)                        −β σ(−h)                      +β σ(−h)
# length_normalised  means  −log σ(h)                        −β σ(−h) / |y_w|              +β σ(−h) / |y_l|
#   both with ε             −(1 − ε) log σ(h) − ε log σ(−h)  σ(−h) becomes σ(−h) − ε       σ(−h) becomes σ(−h) − ε
# hinge              sums   max(0, 1 − h)                    −β, or 0 if h > 1             +β, or 0 if h > 1
# ipo                sums   (u − v − 1/(2β))²                2 (u − v − 1/(2β))            −2 (u − v − 1/(2β))
# ipo_mean           means  (u − v − 1/(2β))²                2 (u − v − 1/(2β)) / |y_w|    −2 (u − v − 1/(2β)) / |y_l|
# simpo              means  −log σ(h − γ)                    −β σ(γ − h) / |y_w|           +β σ(γ − h) / |y_l|
# apo_zero           sums   1 − σ(βu) + σ(βv)                −β σ'(βu)                     +β σ'(βv)
# apo_down           sums   1 − σ(h) + σ(βu)                 −β (σ'(h) − σ'(βu))           +β σ'(h)
# orpo               means  −β log σ(d)                      −β σ(−d) / (1−p_w) / |y_w|    +β σ(−d) / (1−p_l) / |y_l|
# kto                sums   `kto_loss`, of one answer        good: −λ_D β σ'(β (u − z0))   bad: +λ_U β σ'(β (u − z0))
# --nll c            any    adds −c log π_θ(y_w) / |y_w|     adds −c / |y_w|               nothing
#
# u, v are without π_ref for simpo and orpo. d is the difference of the answers' log-odds log(p / (1 − p)), with p_w =
# exp(u), p_l = exp(v). ε: --label_smoothing, γ: --gamma, λ_D, λ_U: --weight_desirable, --weight_undesirable.
#
# As published, all but orpo want --nll 0. sigmoid with ε > 0: cDPO (E. Mitchell, "A note on DPO with noisy
# preferences", 2023). length_normalised: Tülu 3 (arXiv:2411.15124), --beta 5. hinge: SLiC (arXiv:2305.10425) with a
# reference (arXiv:2309.06657). ipo: Eq. 17 of arXiv:2310.12036, its τ is β; ipo_mean: as in TRL. simpo: --beta 2 to 2.5
# --gamma 0.5 to 1.5 (arXiv:2405.14734). apo (arXiv:2408.06266): zero if the chosen answers are better than the policy's
# own, down if they are worse. orpo: --beta 0.1 (its λ) --nll 1 (its first term, arXiv:2403.07691). kto: --beta 0.1.
VARIANTS = {
    "sigmoid": Variant(sigmoid_loss, settings=("label_smoothing",)),
    "hinge": Variant(hinge_loss),
    "ipo": Variant(ipo_loss),
    "ipo_mean": Variant(ipo_loss, per_token=True),
    "length_normalised": Variant(sigmoid_loss, per_token=True, settings=("label_smoothing",)),
    "simpo": Variant(simpo_loss, uses_reference=False, per_token=True, settings=("gamma",)),
    "apo_zero": Variant(apo_zero_loss),
    "apo_down": Variant(apo_down_loss),
    "orpo": Variant(odds_ratio_loss, uses_reference=False, per_token=True),
    "kto": Variant(kto_loss, unpaired=True, settings=("weight_desirable", "weight_undesirable")),
}


def dpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, variant="sigmoid", label_smoothing=0.0, *,
    chosen_lengths=None, rejected_lengths=None, nll=0.0, n_pairs=None, **settings,
):  # fmt: skip
    """Log-probabilities (b,), summed over the answer's tokens -> (loss, metrics). variant: a row of VARIANTS.

    ref_chosen, ref_rejected: None if the variant uses no reference. chosen_lengths, rejected_lengths (b,): tokens, for
    the per-token variants and nll. nll: weight of the chosen answers' own loss, −log π(y_w) / |y_w|. n_pairs: of the
    whole optimizer step, over micro-batches and ranks; default b. settings: the variant's own, such as simpo's gamma.
    The defaults here are plain DPO with the paper's β; a run passes Config's values instead (`loss_of`). With nll=0
    orpo is its second term alone; nll=1 adds the first. Metrics are means over these b pairs; "margin" is h and
    "pair_accuracy" the share with h > 0, for orpo too, whose loss has d. ConfigError on what does not belong together.
    """
    settings = {"label_smoothing": label_smoothing} | settings
    lengths, refs = (chosen_lengths, rejected_lengths), (ref_chosen, ref_rejected)
    check_loss(VARIANTS, variant, settings, refs, lengths, nll)
    kind = VARIANTS[variant]
    u, v = policy_chosen, policy_rejected  # (b,)
    if kind.uses_reference:
        u, v = u - ref_chosen, v - ref_rejected
    if kind.per_token:
        u, v = u / chosen_lengths, v / rejected_lengths
    losses = kind.loss(u, v, beta, **{name: settings[name] for name in kind.settings if name in settings})  # (b,)
    if nll:
        losses = losses - nll * policy_chosen / chosen_lengths  # (b,)
    h = beta * (u - v)  # (b,)
    metrics = {"loss": losses.mean(), "pair_accuracy": (h > 0).float().mean(), "margin": h.mean()}
    metrics |= {"reward_chosen": beta * u.mean(), "reward_rejected": beta * v.mean()}
    metrics |= {"logp_chosen": policy_chosen.mean(), "logp_rejected": policy_rejected.mean()}
    return losses.sum() / (n_pairs or len(losses)), to_floats(metrics)


def demo():
    """A pair of two-token answers by hand; what summing does to two lengths; two single answers (kto)."""
    beta, ln2 = 0.5, math.log(2)

    def check(policy_logps, ref_logps, loss, gradient, **settings):
        """log π of the tokens of y_w, y_l, (T_w,), (T_l,); loss and gradient on a token of each by hand. -> metrics"""
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
        f"""β = 1/2                     before step 1   later            the whole answer
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
mean, --variant length_normalised        0.1   0.1       0             −{1 / 8:.4f}      +{1 / 16:.4f}
"""
    )

    ratios, good = (torch.tensor([4.0, 0.0]) * ln2).requires_grad_(), torch.tensor([True, False])  # (2,), (2,)
    loss, metrics = kto_loss(ratios, good, z0=2 * ln2, beta=beta)
    torch.testing.assert_close(loss.item(), 1 / 3)
    torch.testing.assert_close(2 * torch.autograd.grad(loss, ratios)[0], torch.tensor([-1 / 9, 1 / 9]))  # loss: a mean
    print("kto, z0 = ln 4: a good answer with u = ln 16, a bad one with u = 0, so β (u − z0) = ln 2 and −ln 2:")
    print("loss 1 − σ(ln 2) = 1/3 each; gradient −β σ(ln 2) σ(−ln 2) = −1/9 and +1/9")


# ---------------------------------------------------------------------------------------------------------------
# The stage. More flags: support/pair_rows.py (which pairs), support/variants.py (the settings of single variants),
# support/verified.py (--lr), support/runs.py (every stage's).


@dataclass
class Config(VariantFlags, RecordFlags, PairFlags):
    """Fit a policy to preference pairs (DPO)."""

    name: str = "dpo"
    steps: Count = 300
    batch: Count = 32
    """Pairs (kto: single answers) per optimizer step, over all ranks."""
    micro_batch: Count = 32
    """Pairs per forward pass of one rank."""
    variant: Literal[tuple(VARIANTS)] = "sigmoid"
    """The loss of a pair, or with kto of an answer that is good or bad."""
    beta: Positive = 0.3
    """Weight of the KL in the problem that DPO solves; larger: nearer π_ref. orpo: of the odds; simpo: scale of h."""
    nll: Amount = 1.0
    """Weight of the chosen answers' own loss, −log π(y_w) / |y_w|: each answer's mean per token. 0 is plain DPO."""
    dropout: FractionBelow1 = 0.0
    """Dropout while training."""

    def __post_init__(self):
        super().__post_init__()
        check_config(VARIANTS, self)


def loss_of(config, logps, micro, z0=None, n_pairs=None):
    """The loss of a micro-batch with a run's settings -> (loss (), metrics). logps: log π_θ of each side, (b,) each."""
    kind = VARIANTS[config.variant]
    settings = {name: getattr(config, name) for name in kind.settings} | {"beta": config.beta, "n_pairs": n_pairs}
    if kind.unpaired:
        (logp,), (ref,) = logps, micro.ref_logps  # (b,)
        nll_losses = -config.nll * logp / micro.lengths["answer_lengths"]  # (b,)
        return kto_loss(logp - ref, micro.desirable, z0, nll_losses=nll_losses, logps=logp, **settings)
    (logp_chosen, logp_rejected), (ref_chosen, ref_rejected) = logps, micro.ref_logps  # (b,) each; no π_ref: None
    settings |= {"variant": config.variant, "nll": config.nll} | micro.lengths
    return dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, **settings)


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    kind, start = VARIANTS[config.variant], open_start(config)
    dist, autocast, scaler, policy = start.dist, start.autocast, start.scaler, start.policy
    context, pad = policy.config.context, start.tokenizer.endoftext_id
    # The policy is still the start model, π_ref. problems: for greedy accuracy, None without a verifier. reads: the
    # content that a resumed run must find unchanged
    pairs, problems, reads = pairs_of_run(policy, start.tokenizer, config, kind, dist, autocast)
    run, look, recorder = begin_run(start, pairs, problems, reads, kind, loss_of)  # and measure the test split
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy

    for step in run.steps():
        # 1. pairs
        look.begin_step()
        own_pairs = next_pairs(pairs["train"], step, config, dist, context)  # B / ranks
        z0 = None
        if kind.unpaired:  # one for the whole step, over all ranks; two forward passes more: of the policy and of π_ref
            z0 = reference_point(policy, own_pairs, pad, dist, autocast, start.reference)
        recorder.pairs(own_pairs, z0)
        model.train()  # dropout; `reference_point` and the evaluations leave the policy in eval mode
        sums = Means()
        for i in range(0, len(own_pairs), config.micro_batch):  # b pairs at a time; their gradients add up
            micro = batch_of(own_pairs[i : i + config.micro_batch], pad, dist.device)
            last = i + config.micro_batch >= len(own_pairs)
            with averaging(model, last):  # DDP averages over the ranks in the last backward alone
                # 2. score: log π_θ of both answers, with gradient
                with autocast():
                    logps = pair_logprobs(model, micro.packed)  # a tuple: (b,), (b,); kto: (b,) alone

                # 3. loss: u, v, then dpo_loss or kto_loss; a sum over b pairs, divided by the whole step's number B
                loss, metrics = loss_of(config, logps, micro, z0, n_pairs=config.batch)

                # 4. update: backward here, the step after the last micro-batch. * world: DDP averages, we sum
                scaler.scale(loss * dist.world).backward()
            sums.add(metrics, micro)

        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, run.optimizers, scaler, autocast, lr, config.clip)  # clips the gradient's norm
        means = sums.over_ranks(dist)
        run.check_finite(lr, norm, loss=means["loss"])

        # 5. look: every so often at held-out pairs and problems, and at the KL
        look.at_step(step, means | {"grad_norm": norm, "lr": lr})
    run.close()
    return look.after()  # the test split again, with the checkpoint of the lowest validation loss


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
