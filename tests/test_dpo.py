"""dpo.py: every loss and its gradient against plain loops, what a pair's row computes, and the guarantees of a run."""

import copy
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_ranks_draw_apart,
    assert_rate_clip_decay,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    flags_of,
    metrics,
    resumed_at,
    script,
    stopped_after,
)

import dpo
from data import Judged, encode_prompt, load_pairs, load_problems, rows_at
from dpo import VARIANTS, Config, dpo_loss, kto_loss, orpo_loss
from evaluate import wilson
from lora import LoraConfig, add_lora
from support import devices, dpo_report, dpo_run, pair_rows
from support import pairs as pairs_room
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError, ConfigError, DataError, DivergedError
from support.judged import one_by_one, prepare_judged, shift_answers
from support.pair_rows import encode_pair, next_pairs, pair_up
from support.pairs import Means, add_reference, batch_of, pair_logprobs
from support.sampled_kl import sampled_kl
from support.splits import split_of
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", pairs="offline", prompts=40, steps=4, batch=6, micro_batch=6, warmup=1, eval_every=2)
SMALL |= dict(eval_problems=5, test_problems=5, max_new_tokens=8, device="cpu", lr=1e-3, optimizer="adamw", nll=0.0)

PAIRED = [name for name, row in VARIANTS.items() if not row.unpaired]


def config(**changes):
    return Config(**(SMALL | changes))


validate = partial(dpo_report.validate, loss_of=dpo.loss_of)


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))


@pytest.fixture
def here(scratch, tokenizer):
    tiny(tokenizer).save_pretrained("start")
    tokenizer.save_pretrained("start")
    return scratch


# ------------------------------------------------------------------------------------------------ the losses


def numbers(B=7):
    torch.manual_seed(0)
    logps = [(-20 * torch.rand(B, dtype=torch.float64)).requires_grad_(i < 2) for i in range(4)]
    return logps, (torch.randint(1, 9, (B,)), torch.randint(1, 9, (B,)))


def by_loop(logps, lengths, beta, variant, smoothing, gamma):
    total = 0.0
    for pc, pr, rc, rr, nc, nr in zip(*logps, *lengths, strict=True):
        if variant == "simpo":
            h = beta * pc / nc - beta * pr / nr - gamma
            loss = torch.log(1 + torch.exp(-h)) * (1 - smoothing) + torch.log(1 + torch.exp(h)) * smoothing
        elif variant == "ipo":
            loss = (pc - rc - pr + rr - 1 / (2 * beta)) ** 2
        elif variant == "ipo_mean":
            loss = ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2
        elif variant == "apo_zero":
            loss = 1 / (1 + torch.exp(beta * (pc - rc))) + 1 / (1 + torch.exp(-beta * (pr - rr)))
        elif variant == "apo_down":
            loss = 1 / (1 + torch.exp(-beta * (pc - rc))) + 1 / (1 + torch.exp(beta * (pc - rc - pr + rr)))
        elif variant == "orpo":
            odds = [torch.exp(logp / n) / (1 - torch.exp(logp / n)) for logp, n in ((pc, nc), (pr, nr))]
            loss = beta * torch.log(1 + odds[1] / odds[0])
        elif variant == "hinge":
            loss = max(torch.zeros(()), 1 - beta * ((pc - rc) - (pr - rr)))
        else:
            assert variant in ("sigmoid", "length_normalised"), f"no plain form for {variant}"
            if variant == "length_normalised":
                pc, rc, pr, rr = pc / nc, rc / nc, pr / nr, rr / nr
            h = beta * (torch.log(torch.exp(pc) / torch.exp(rc)) - torch.log(torch.exp(pr) / torch.exp(rr)))
            loss = -(1 - smoothing) * torch.log(1 / (1 + torch.exp(-h))) - smoothing * torch.log(1 / (1 + torch.exp(h)))
        total = total + loss
    return total / len(logps[0])


def figures_by_loop(logps, lengths, beta, variant):
    """What dpo_loss logs beside its loss, pair by pair in Python's floats."""
    row, sides = VARIANTS[variant], []
    for policy, ref, sizes in zip(logps[:2], logps[2:], lengths, strict=True):  # the chosen, then the rejected answers
        answers = zip(policy.tolist(), ref.tolist(), sizes.tolist(), strict=True)
        sides.append([beta * (p - r * row.uses_reference) / (n if row.per_token else 1) for p, r, n in answers])
    h = [a - b for a, b in zip(*sides, strict=True)]
    sums = {"pair_accuracy": sum(x > 0 for x in h), "margin": sum(h)}
    sums |= {"reward_chosen": sum(sides[0]), "reward_rejected": sum(sides[1])}
    sums |= {"logp_chosen": sum(logps[0].tolist()), "logp_rejected": sum(logps[1].tolist())}
    return {name: total / len(h) for name, total in sums.items()}


@pytest.mark.parametrize("variant", PAIRED)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_against_a_loop(variant, smoothing):
    logps, lengths = numbers()
    more = dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    if variant == "simpo":
        more["gamma"] = 0.7
    if smoothing and "label_smoothing" not in VARIANTS[variant].settings:
        with pytest.raises(ConfigError, match="label_smoothing"):
            dpo_loss(*logps, 0.3, variant, smoothing, **more)
        return
    loss, figures = dpo_loss(*logps, 0.3, variant, smoothing, **more)
    expected = by_loop(logps, lengths, 0.3, variant, smoothing, 0.7)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    logged = figures_by_loop(logps, lengths, 0.3, variant) | {"loss": loss.item()}
    assert figures == pytest.approx(logged, rel=1e-5, abs=1e-6)
    ours = torch.autograd.grad(loss, logps[:2])
    for a, b in zip(ours, torch.autograd.grad(expected, logps[:2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        assert b.abs().max() > 0


def test_the_chosen_answers_own_loss_is_added_per_token():
    logps, lengths = numbers()
    loss, _ = dpo_loss(*logps, 0.3, chosen_lengths=lengths[0], nll=0.4)
    own = sum(-logp / n for logp, n in zip(logps[0], lengths[0], strict=True)) / 7
    torch.testing.assert_close(loss, dpo_loss(*logps, 0.3)[0] + 0.4 * own, check_dtype=False)


def on_tokens(variant, u, v, beta, smoothing, gamma, lengths):
    """The table above dpo.VARIANTS: the gradient of a pair's loss on a token of y_w; on y_l without its sign."""
    if VARIANTS[variant].per_token:
        u, v = u / lengths[0], v / lengths[1]
    h = beta * (u - v)
    on_both = {
        "sigmoid": -beta * (torch.sigmoid(-h) - smoothing),
        "hinge": -beta * (h <= 1).double(),
        "ipo": 2 * (u - v - 1 / (2 * beta)),
        "ipo_mean": 2 * (u - v - 1 / (2 * beta)),
        "length_normalised": -beta * (torch.sigmoid(-h) - smoothing),
        "simpo": -beta * torch.sigmoid(gamma - h),
        "apo_zero": [-beta * slope(beta * u), -beta * slope(beta * v)],
        "apo_down": [-beta * (slope(h) - slope(beta * u)), -beta * slope(h)],
        "orpo": [-beta * torch.sigmoid(-log_odds(u) + log_odds(v)) / (1 - torch.exp(x)) for x in (u, v)],
    }[variant]
    both = on_both if isinstance(on_both, list) else [on_both, on_both]
    return [x / n if VARIANTS[variant].per_token else x for x, n in zip(both, lengths, strict=True)]


def slope(x):
    return torch.sigmoid(x) * torch.sigmoid(-x)


def log_odds(log_p):
    return torch.log(torch.exp(log_p) / (1 - torch.exp(log_p)))


@pytest.mark.parametrize("variant", PAIRED)
@pytest.mark.parametrize("nll", [0.0, 0.4])
def test_every_token_has_the_gradient_of_the_table(variant, nll):
    settings = {"label_smoothing": 0.2, "gamma": 0.7}
    settings = {name: settings[name] for name in VARIANTS[variant].settings}
    torch.manual_seed(1)
    far = []
    for _ in range(5):
        lengths = [int(n) for n in torch.randint(1, 6, (2,))]
        answers = [(-3 * torch.rand(n, dtype=torch.float64)).requires_grad_() for n in lengths]
        ref = -6 * torch.rand(2, 1, dtype=torch.float64)
        sums = [tokens.sum()[None] for tokens in answers]
        more = dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1], nll=nll)
        loss, _ = dpo_loss(*sums, *ref, 0.5, variant, **more, **settings)
        u, v = (a - b for a, b in zip(sums, ref if VARIANTS[variant].uses_reference else (0, 0), strict=True))
        smoothing, gamma = settings.get("label_smoothing", 0.0), settings.get("gamma", 0.0)
        on_chosen, on_rejected = on_tokens(variant, u.detach(), v.detach(), 0.5, smoothing, gamma, lengths)
        by_hand = on_chosen - nll / lengths[0], -on_rejected
        for got, expected in zip(torch.autograd.grad(loss, answers), by_hand, strict=True):
            torch.testing.assert_close(got, expected.expand_as(got))
        far.append((0.5 * (u - v)).item())
    assert min(far) < 1 < max(far) or variant != "hinge"  # both sides of the hinge


def test_worked_numbers():
    # u = −10 − (−12) = 2, v = −9 − (−8) = −1, h = 0.1 · 3 = 0.3, −log σ(0.3) = log(1 + e^−0.3) = 0.554355
    loss, figures = dpo_loss(*torch.tensor([[-10.0], [-9.0], [-12.0], [-8.0]]))
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)
    expected = dict(
        pair_accuracy=1, margin=0.3, reward_chosen=0.2, reward_rejected=-0.1, logp_chosen=-10, logp_rejected=-9
    )
    assert figures == pytest.approx(expected | {"loss": 0.554355}, abs=1e-6)


def test_properties():
    logps, _ = numbers()
    at_start, figures = dpo_loss(logps[2], logps[3], logps[2], logps[3])
    assert at_start.item() == pytest.approx(math.log(2))
    assert figures["pair_accuracy"] == figures["margin"] == 0
    pc, pr, rc, rr = logps
    with_smoothing = dpo_loss(*logps, 0.3, label_smoothing=0.2)[0]
    swapped = dpo_loss(pr, pc, rr, rc, 0.3)[0]
    torch.testing.assert_close(with_smoothing, 0.8 * dpo_loss(*logps, 0.3)[0] + 0.2 * swapped)
    shifted = dpo_loss(pc + 3, pr + 3, rc + 3, rr + 3, 0.3)[0]  # what both sides share does not matter
    torch.testing.assert_close(shifted, dpo_loss(*logps, 0.3)[0])
    assert dpo_loss(*torch.tensor([[0.0], [-5000.0], [0.0], [0.0]]), 1.0)[0].item() == 0  # far out: no NaN
    assert dpo_loss(*torch.tensor([[-5000.0], [0.0], [0.0], [0.0]]), 1.0)[0].item() == 5000
    torch.testing.assert_close(dpo_loss(*logps, n_pairs=14)[0], dpo_loss(*logps)[0] / 2)


def of_a_run(variant, logps, lengths, **settings):
    """The loss that a run with these settings computes of the pairs."""
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
    batch = pairs_room.PairBatch(None, lengths, logps[2:], None)
    return dpo.loss_of(config(variant=variant, **settings), logps[:2], batch)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("setting", ["label_smoothing", "gamma"])
def test_a_setting_is_for_the_variants_that_take_it(variant, setting):
    logps, lengths = numbers()
    more = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], setting: 0.2}
    if setting in VARIANTS[variant].settings:
        assert dpo_loss(*logps, 0.3, variant, **more)[0] != dpo_loss(*logps, 0.3, variant, **more | {setting: 0.0})[0]
        assert getattr(config(variant=variant, **{setting: 0.2}), setting) == 0.2
        assert of_a_run(variant, logps, lengths, **{setting: 0.2}) != of_a_run(variant, logps, lengths)
        return
    takers = [name for name, row in VARIANTS.items() if setting in row.settings]
    for refused in (lambda: dpo_loss(*logps, 0.3, variant, **more), lambda: config(variant=variant, **{setting: 0.2})):
        with pytest.raises(ConfigError, match=f"--{setting} has no meaning with --variant {variant}, only with ") as e:
            refused()
        assert all(name in str(e.value).rpartition("only with")[2] for name in takers)


def test_a_setting_keeps_its_own_default_and_its_zero(monkeypatch):
    """Of a variant to come: what it takes by default need not be 0."""
    monkeypatch.setitem(VARIANTS, "new", dpo.Variant(lambda u, v, beta, far=3.0: far + 0 * u, settings=("far",)))
    logps, _ = numbers()
    assert dpo_loss(*logps, variant="new")[0] == 3
    assert dpo_loss(*logps, variant="new", far=0.0)[0] == 0


def test_apo_before_the_first_step():
    """u = v = 0: half of DPO's gradient for zero; down moves y_l alone. TRL's 1 makes the loss of both 1."""
    ref = torch.tensor([[-3.0], [-5.0]], dtype=torch.float64)
    policy = ref.clone().requires_grad_()
    gradient = {}
    for variant in ("sigmoid", "apo_zero", "apo_down"):
        loss, _ = dpo_loss(*policy, *ref, 0.4, variant)
        gradient[variant] = torch.autograd.grad(loss, policy)[0].flatten()
        assert loss.item() == pytest.approx(math.log(2) if variant == "sigmoid" else 1)
    torch.testing.assert_close(gradient["apo_zero"], gradient["sigmoid"] / 2)
    torch.testing.assert_close(gradient["apo_down"], torch.tensor([0, 0.1], dtype=torch.float64))


def test_a_misspelt_argument_is_refused_even_where_it_is_zero():
    logps, lengths = numbers()
    for wrong in ({"gama": 0.0}, {"gama": 1.0}, {"chosen_length": None}, {"rejected_length": lengths[1]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))!r} is no argument of dpo_loss .* gamma, label_smoo"):
            dpo_loss(*logps, **wrong)


def test_a_variant_with_a_reference_is_not_computed_without():
    logps, lengths = numbers()
    more = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
    for variant in PAIRED:
        for refs in ((None, None), (logps[2], None)):
            if not VARIANTS[variant].uses_reference:
                assert dpo_loss(*logps[:2], *refs, variant=variant, **more)[0].isfinite()
                continue
            with pytest.raises(ConfigError, match=f"variant {variant} needs the reference's log-prob"):
                dpo_loss(*logps[:2], *refs, variant=variant, **more)


def test_orpo_by_hand():
    """π per token 1/2 and 1/4: odds 1 and 1/3, d = ln 3. Without nll dpo_loss is the second term alone."""
    per_token, beta = torch.tensor([[1 / 2], [1 / 4]]).log().requires_grad_(), 0.5
    loss, _ = orpo_loss(*per_token, weight=beta)
    torch.testing.assert_close(loss.item(), math.log(2) + beta * math.log(4 / 3))
    torch.testing.assert_close(torch.autograd.grad(loss, per_token)[0], torch.tensor([[-1 - 1 / 4], [1 / 6]]))
    alone, _ = dpo_loss(*per_token, None, None, beta, "orpo", chosen_lengths=1, rejected_lengths=1)
    torch.testing.assert_close(alone.item(), beta * math.log(4 / 3))


def test_orpo_of_two_equal_answers_is_sft():
    means = torch.tensor([[-0.7, -2.0]] * 2, dtype=torch.float64, requires_grad=True)
    loss, figures = orpo_loss(*means, weight=0.3)
    assert loss.item() == pytest.approx(1.35 + 0.3 * math.log(2))
    assert figures["logp_chosen"] == pytest.approx(-1.35)
    torch.testing.assert_close(torch.autograd.grad(loss, means)[0].sum(0), torch.tensor([-0.5, -0.5]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_of_an_answer_that_is_certain_or_hopeless_is_finite(dtype):
    for chosen in (0.0, -1e-9, -1e-3, -80.0, -1e4):
        for rejected in (0.0, -1e-9, -80.0, -1e4):
            means = torch.tensor([[chosen], [rejected]], dtype=dtype, requires_grad=True)
            loss, _ = orpo_loss(*means)
            assert math.isfinite(loss.item())
            assert torch.autograd.grad(loss, means)[0].isfinite().all(), (chosen, rejected)


def judged_numbers(B=7):
    torch.manual_seed(0)
    ratios = (4 * torch.randn(B, dtype=torch.float64)).requires_grad_()
    return ratios, torch.tensor([True, False, False, True, True, False, True])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_kto_and_its_gradient_against_a_loop(weights):
    ratios, good = judged_numbers()
    loss, figures = kto_loss(ratios, good, 0.6, 0.3, *weights)
    total = 0.0
    for u, is_good in zip(ratios, good, strict=True):
        side = 0.3 * (u - 0.6) if is_good else 0.3 * (0.6 - u)
        total = total + weights[0 if is_good else 1] * (1 - 1 / (1 + torch.exp(-side))) / 7
    torch.testing.assert_close(loss, total, atol=1e-12, rtol=1e-12)
    by_loop, ours = (torch.autograd.grad(x, ratios)[0] for x in (total, loss))
    torch.testing.assert_close(ours, by_loop, atol=1e-12, rtol=1e-12)
    by_table = torch.where(good, -weights[0], weights[1]).double() * 0.3 * slope(0.3 * (ratios.detach() - 0.6)) / 7
    torch.testing.assert_close(ours, by_table, atol=1e-7, rtol=1e-6)
    expected = dict(loss=loss.item(), z0=0.6, reward_chosen=0.3 * ratios[good].mean().item())
    expected |= dict(reward_rejected=0.3 * ratios[~good].mean().item())
    expected |= dict(pair_accuracy=((ratios > 0.6) == good).double().mean().item())
    expected |= dict(margin=(0.3 * torch.where(good, ratios - 0.6, 0.6 - ratios)).mean().item())
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_kto_adds_the_own_loss_of_the_good_answers_alone_per_token():
    ratios, good = judged_numbers()
    lengths, ref = torch.arange(1, 8), torch.full((7,), -9.0, dtype=torch.float64)
    batch = pairs_room.PairBatch(None, {"answer_lengths": lengths}, (ref,), good)
    logp = (ratios.detach() + ref).requires_grad_()
    losses = [dpo.loss_of(config(variant="kto", nll=nll), (logp,), batch, 0.6)[0] for nll in (0.4, 0.0)]
    own = losses[0] - losses[1]
    torch.testing.assert_close(own, -0.4 * (logp / lengths)[good].sum() / 7)
    (slope,) = torch.autograd.grad(own, logp)
    torch.testing.assert_close(slope, torch.where(good, -0.4 / lengths / 7, 0.0).double(), atol=1e-7, rtol=1e-5)


def test_the_settings_of_a_run_reach_ktos_loss():
    ratios, good = judged_numbers()
    batch = pairs_room.PairBatch(None, {"answer_lengths": torch.arange(1, 8)}, (torch.full((7,), -9.0),), good)
    settings = config(variant="kto", beta=0.7, weight_desirable=1.3, weight_undesirable=0.6)
    loss, _ = dpo.loss_of(settings, (ratios - 9.0,), batch, 0.6, n_pairs=14)
    total = 0.0
    for u, is_good in zip(ratios.tolist(), good.tolist(), strict=True):
        side = u - 0.6 if is_good else 0.6 - u
        total += (1.3 if is_good else 0.6) / (1 + math.exp(0.7 * side))  # λ (1 − σ(β side))
    assert loss.item() == pytest.approx(total / 14)


def test_kto_at_the_start_and_with_z0_at_zero():
    ratios, _ = judged_numbers()
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss, _ = kto_loss(u, torch.tensor([True, False]), 0.0, 0.4, 1.3, 0.7)
    assert loss.item() == pytest.approx((1.3 / 2 + 0.7 / 2) / 2)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, u)[0], torch.tensor([-1.3, 0.7]).double() * 0.4 / 4)
    pairs = ratios.detach()[:6].view(2, 3)  # z0 = 0: apo_zero, whose answers need no partner
    single = [kto_loss(side, torch.full((3,), k == 0), 0.0, 0.4)[0] for k, side in enumerate(pairs)]
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(sum(single), dpo_loss(*pairs, zero, zero, 0.4, "apo_zero")[0])


def test_the_first_gradient_of_kto_is_that_of_the_accuracy():
    """All answers that the start model may give, each as often as it gives it."""
    torch.manual_seed(0)
    theta, right = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.tensor([True, False] * 3)
    start = theta.detach().log_softmax(0)
    losses = [kto_loss(u[None], r[None], 0.0, 0.4)[0] for u, r in zip(theta.log_softmax(0) - start, right, strict=True)]
    ours = torch.autograd.grad(start.exp() @ torch.stack(losses), theta)[0]
    accuracy = torch.autograd.grad(theta.softmax(0) @ right.double(), theta)[0]
    torch.testing.assert_close(ours, -0.4 / 2 * accuracy)


def test_no_gradient_through_z0_and_a_step_of_many_answers():
    ratios, good = judged_numbers()
    z0 = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    loss, _ = kto_loss(ratios, good, z0, 0.3)
    assert torch.autograd.grad(loss, z0, allow_unused=True, retain_graph=True) == (None,)
    parts = sum(kto_loss(ratios[i : i + 3], good[i : i + 3], z0, 0.3, n_pairs=7)[0] for i in (0, 3, 6))
    torch.testing.assert_close(parts, loss)
    only_bad = kto_loss(ratios[1:3], good[1:3], z0)
    assert only_bad[0].isfinite()
    assert math.isnan(only_bad[1]["reward_chosen"])
    assert kto_loss(torch.tensor([1e4, -1e4]), torch.tensor([True, False]), 0.0)[0] == 0
    with pytest.raises(ConfigError, match="kto judges single answers, not pairs: use kto_loss"):
        dpo_loss(*numbers()[0], variant="kto")


# ------------------------------------------------------------------------------------------------ a pair's row


def test_a_packed_pair_is_two_rows_of_its_own(tokenizer):
    raw = tiny(tokenizer).double()
    pairs = [encode_pair(tokenizer, pair) for pair in load_pairs("word", "train", 5)]
    batch = batch_of(pairs, tokenizer.endoftext_id, "cpu")
    lengths = torch.stack([batch.lengths["chosen_lengths"], batch.lengths["rejected_lengths"]], dim=1)
    together = torch.stack(pair_logprobs(raw, batch.packed), dim=1)  # (5, 2)
    apart = torch.zeros(5, 2, dtype=torch.float64)
    for i, pair in enumerate(pairs):
        for side, answer in enumerate((pair["chosen"], pair["rejected"])):
            logprobs = token_logprobs(raw, torch.tensor([pair["prompt"] + answer]))[0]
            apart[i, side] = logprobs[len(pair["prompt"]) - 1 :].sum()  # the first answer token counts
            assert lengths[i, side] == len(answer)
    torch.testing.assert_close(together, apart, check_dtype=False)
    weights = torch.randn(5, 2, dtype=torch.float64)
    ours = torch.autograd.grad((together * weights).sum(), list(raw.parameters()))
    theirs = torch.autograd.grad((apart * weights).sum(), list(raw.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert max(b.abs().max() for b in theirs) > 1e-3


def test_pairs_end_where_the_template_ends(tokenizer):
    pair = load_pairs("word", "train", 1)[0]
    encoded = encode_pair(tokenizer, pair)
    chat = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.rejected}]
    ids, mask = tokenizer.encode_chat(chat)
    assert encoded["prompt"] + encoded["rejected"] == ids[: len(encoded["prompt"]) + len(encoded["rejected"])]
    assert encoded["rejected"] == [i for i, flag in zip(ids, mask, strict=True) if flag]


def test_reference_is_the_start(tokenizer, monkeypatch):
    raw, dist = tiny(tokenizer), devices.setup("cpu")
    autocast, _ = devices.precision("fp32", dist)
    pairs = [encode_pair(tokenizer, pair) for pair in load_pairs("word", "train", 9)]
    monkeypatch.setattr(pairs_room, "chunks", partial(pairs_room.chunks, most=4))
    known = add_reference(raw, pairs, tokenizer.endoftext_id, dist, autocast)
    for pair in known:
        row = torch.tensor([pair["prompt"] + pair["rejected"]])
        expected = token_logprobs(raw, row)[0, len(pair["prompt"]) - 1 :].sum().item()
        assert pair["ref_rejected"] == pytest.approx(expected, abs=1e-4)
    result = validate(raw, known, tokenizer, config(), dist, autocast)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_one_long_prompt_does_not_shorten_the_answers_of_the_kl(tokenizer, monkeypatch):
    asked, raw = [], tiny(tokenizer)
    monkeypatch.setattr(dpo_report, "sampled_kl", lambda *a: asked.append(a[3:5]))
    long, short = [7] * (raw.config.context - 2), [7] * 4
    valid = [{"prompt": prompt} for prompt in (short, long, short)]
    settings, dist = config(max_new_tokens=5), devices.setup("cpu")
    for rows in (valid, valid[1:2]):
        dpo_report.kl_to_start(raw, None, {"valid": rows}, tokenizer, settings, dist)
    assert asked == [([short, short], 5), ([long], 2)]


def test_the_reference_of_lora_is_the_model_without_its_adapters(here, tokenizer, monkeypatch):
    raw, dist = tiny(tokenizer), devices.setup("cpu")
    before = copy.deepcopy(raw)
    add_lora(raw, **asdict(LoraConfig(rank=2)))
    for name, p in raw.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.5)
    prompts = [encode_prompt(tokenizer, p) for p in load_problems("word", "valid", 3)]
    shared, apart = (sampled_kl(raw, reference, tokenizer, prompts, 8, dist) for reference in (raw, before))
    assert shared == pytest.approx(apart, rel=1e-5)
    assert shared > 1e-3
    rows, cpu = shift_answers(judged_rows(tokenizer), 160), (dist, devices.precision("fp32", dist)[0])
    point = dpo.reference_point(raw, rows, 0, *cpu)
    assert point == pytest.approx(dpo.reference_point(raw, rows, 0, *cpu, before), rel=1e-4)
    assert point > 1e-3
    monkeypatch.setattr(dpo_run, "copy", None)  # no second model
    dpo.main(config(lora=LoraConfig(rank=2), lr=1e-2))
    assert max(metrics("runs/dpo", "kl").values()) > 1e-6


def test_which_variants_have_a_reference_and_which_are_per_token():
    assert [name for name, row in VARIANTS.items() if not row.uses_reference] == ["simpo", "orpo"]
    assert [name for name, row in VARIANTS.items() if row.unpaired] == ["kto"]
    assert all(VARIANTS[name].uses_reference for name in ("sigmoid", "hinge", "ipo", "ipo_mean", "length_normalised"))
    assert all(VARIANTS[name].per_token for name in ("ipo_mean", "length_normalised", "simpo", "orpo"))
    assert not any(VARIANTS[name].per_token for name in ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down", "kto"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reference_is_computed_where_it_is_used(here, monkeypatch, calls_of, variant):
    asked, drawn, row = calls_of(pair_rows, "add_reference"), [], VARIANTS[variant]
    monkeypatch.setattr(dpo_report, "draw_curves", lambda path, title, panels: drawn.extend(panels))
    dpo.main(config(variant=variant, steps=1))
    pairs = torch.load("runs/dpo/pairs.pt", weights_only=True)
    assert len(asked) == (3 if row.uses_reference else 0)
    ref = "ref_answer" if row.unpaired else "ref_chosen"
    assert all((ref in pair) is row.uses_reference for some in pairs.values() for pair in some)
    label = next(unit for heading, _, unit, _ in drawn if heading.startswith("implicit rewards"))
    assert label == ("β log π/π_ref" if row.uses_reference else "β log π") + " per token" * row.per_token
    assert max(metrics("runs/dpo", "kl").values()) > 0  # to the start, whatever the variant


# ------------------------------------------------------------------------------------------------ judged answers


def judged_rows(tokenizer, n=9):
    texts = [
        Judged(p.prompt, (p.chosen, p.rejected)[i % 2], i % 2 == 0)
        for i, p in enumerate(load_pairs("word", "train", n))
    ]
    return [encode_pair(tokenizer, judged) for judged in texts]


def test_a_step_takes_the_answers_of_the_rows_before_whatever_the_ranks(tokenizer):
    rows, settings = judged_rows(tokenizer), config(variant="kto", batch=6)
    whole = next_pairs(rows, 1, settings, devices.setup("cpu"), 160)
    order = [rows[i] for i in rows_at(9, 1, 6, 0)]
    shares = [next_pairs(rows, 1, settings, devices.Dist(rank, 2, "cpu"), 160) for rank in (0, 1)]
    by_prompt = {str(row["prompt"]): row["other"] for row in whole}
    assert {str(row["prompt"]): row["other"] for share in shares for row in share} == by_prompt
    assert by_prompt == {str(row["prompt"]): order[i - 1]["answer"] for i, row in enumerate(order)}
    cut = shift_answers([{"prompt": [1] * 7, "answer": [2, 3]}, {"prompt": [1], "answer": [4] * 9}], 10)
    assert [row["other"] for row in cut] == [[4] * 3, [2, 3]]  # 7 + 9 tokens would not fit
    pairs = [{"prompt": [1], "chosen": [2], "rejected": [3]}] * 6
    assert next_pairs(pairs, 0, config(batch=2), devices.setup("cpu"), 160) == pairs[:2]


def moved(model, by=0.05, seed=1):
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn_like(p))
    return other


def test_the_reference_point_is_the_mean_log_ratio_of_the_others(tokenizer):
    start = tiny(tokenizer).double()
    dist, rows = devices.setup("cpu"), shift_answers(judged_rows(tokenizer), 160)
    autocast, _ = devices.precision("fp32", dist)
    signs = []
    for seed in (1, 2, 3, 4):
        policy = moved(start, seed=seed).train()
        total = 0.0
        for row in rows:
            ids = torch.tensor([row["prompt"] + row["other"]])
            logps = [token_logprobs(m, ids)[0, len(row["prompt"]) - 1 :].sum() for m in (policy, start)]
            total += (logps[0] - logps[1]).item()
        signs.append(total > 0)
        z0 = dpo.reference_point(policy, rows, 0, dist, autocast, start)
        assert z0 == pytest.approx(max(0, total / len(rows)), rel=1e-5)
        known = add_reference(start, rows, 0, dist, autocast)
        assert dpo.reference_point(policy, known, 0, dist, autocast) == pytest.approx(z0, abs=1e-4)
        assert not policy.training  # without dropout
        sent = []
        share = SimpleNamespace(device="cpu", sum=lambda *both, sent=sent: sent.append(both) or both)
        for rank in (0, 1):  # what two ranks add up
            dpo.reference_point(policy, rows[rank::2], 0, share, autocast, start)
        assert sum(total for total, _ in sent) / sum(n for _, n in sent) == pytest.approx(total / len(rows), rel=1e-5)
    assert len(set(signs)) == 2  # max(0, …) had something to do


def test_the_means_of_good_and_bad_answers_do_not_depend_on_the_cut():
    ratios, good = judged_numbers()
    whole = kto_loss(ratios, good, 0.6, logps=ratios)[1]
    for cuts in ([0, 3, 7], [0, 1, 2, 3, 7], [0, 7]):
        means = Means()
        for a, b in pairwise(cuts):
            batch = pairs_room.PairBatch(SimpleNamespace(tokens=ratios[a:b]), {}, (), good[a:b])
            means.add(kto_loss(ratios[a:b], good[a:b], 0.6, logps=ratios[a:b])[1], batch)
        assert means.over_ranks(devices.setup("cpu")) == pytest.approx(whole, rel=1e-5)
    batch = pairs_room.PairBatch(SimpleNamespace(tokens=ratios[:2]), {}, (), good[:2] & False)
    means = Means()
    means.add(kto_loss(ratios[:2], good[:2] & False, 0.6)[1], batch)
    assert "reward_chosen" not in means.over_ranks(devices.setup("cpu"))


def test_every_judged_answer_counts_but_a_good_one_must_have_ended():
    answers = [([1], True, True), ([1], True, True), ([2], True, False), ([3], False, False), ([4], False, True)]
    rows = one_by_one(answers, random.Random(0))
    assert sorted(rows) == [([1], True), ([1], True), ([3], False), ([4], False)]
    assert one_by_one(answers, random.Random(0), most=1) == rows[:1]
    assert len({str(one_by_one(answers, random.Random(seed))) for seed in range(20)}) > 1


def test_the_balance_of_good_and_bad_answers_is_printed(capsys):
    rows = [{"prompt": [i], "answer": [i], "good": i < 2} for i in range(8)]
    splits = {"train": rows, "valid": rows, "test": rows}
    for weights, line in (({}, "0.33; --weight_desirable 3 makes it 1"), ({"weight_undesirable": 0.3}, "1.11")):
        prepared = prepare_judged(splits, 9, config(variant="kto", **weights), devices.setup("cpu"))
        assert capsys.readouterr().out == f"2 of 8 training answers are good: λ_D n_D / λ_U n_U is {line}\n"
    assert prepared["train"] == rows
    assert sorted(row["other"] for row in prepared["test"]) == [[i] for i in range(8)]
    assert sum(row["other"] == [(row["prompt"][0] - 1) % 8] for row in prepared["test"]) < 4  # not the file's order


def write_judged(path, n=240):
    kinds = {True: "It is 7.", False: "Anna has 3 apples."}
    rows = [
        {"prompt": f"Is {i // 2} a number?", "completion": kinds[i % 2 == 0], "label": i % 2 == 0} for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_a_run_with_judged_answers_of_a_file(here, capsys):
    write_judged(here / "judged.jsonl")
    result = dpo.main(config(data="judged.jsonl", variant="kto", steps=12, lr=1e-2, prompts=500, beta=0.5))
    before, after = (result[when]["pairs"] for when in ("before", "after"))
    assert before["loss"] == pytest.approx(0.5)
    assert (before["z0"], before["pair_accuracy"]) == (0, 0)
    assert after["pair_accuracy"] > 0.9
    assert after["reward_chosen"] > after["reward_rejected"] + 0.5
    assert max(metrics("runs/dpo", "z0").values()) > 0
    assert metrics("runs/dpo", "z0")[1] == 0
    printed = capsys.readouterr().out
    assert "training answers are good: λ_D n_D / λ_U n_U is 1.00\n" in printed
    assert "answers on their side of z0" in printed
    kept = torch.load("runs/dpo/pairs.pt", weights_only=True)
    assert all(set(row) == {"prompt", "answer", "good", "ref_answer"} for row in kept["train"])
    assert all({"other", "ref_other"} < set(row) for row in kept["valid"] + kept["test"])


def test_a_step_without_a_good_answer(here):
    """Two answers a step, and one to validate with: what no answer has is not in the record."""
    write_judged(here / "judged.jsonl")
    dpo.main(config(data="judged.jsonl", variant="kto", batch=2, micro_batch=1, eval_problems=1, test_problems=1))
    kinds = [{"chosen", "rejected"} & {name.rpartition("_")[2] for name in row} for row in records_of_steps()]
    assert 0 < len([kind for kind in kinds if len(kind) == 1]) < len(kinds)
    assert len(metrics("runs/dpo", "loss")) == 4


def records_of_steps():
    lines = Path("runs/dpo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row and "valid_loss" not in row]


def test_a_run_with_sampled_judged_answers(here, monkeypatch, capsys):
    monkeypatch.setattr(pairs_room, "is_correct", lambda text, problem: len(text) % 2 == 0)
    changes = dict(rollouts=8, max_new_tokens=60, eval_problems=20, test_problems=20, steps=10, lr=2e-2)
    result = dpo.main(config(pairs="sampled", variant="kto", nll=1.0, **changes))
    assert result["before"]["pairs"]["z0"] == 0
    margins = list(metrics("runs/dpo", "margin").values())  # how far answers are on their side of z0
    assert margins[0] == 0
    assert sum(margins) / len(margins) > 0.05
    assert "judged ones from 8 answers to 40 prompts" in capsys.readouterr().out
    kept = torch.load("runs/dpo/pairs.pt", weights_only=True)
    assert len(kept["valid"]) == len({str(row["prompt"]) for row in kept["valid"]})  # one answer to each
    for verdict, kind, missing in ((False, "bad", "good"), (True, "good", "bad")):
        monkeypatch.setattr(pairs_room, "is_correct", lambda text, problem, verdict=verdict: verdict)
        with pytest.raises(ConfigError, match=f"training answers are {kind}: --variant kto needs {missing} ones too"):
            dpo.main(config(pairs="sampled", variant="kto", rollouts=2, max_new_tokens=60))


# ------------------------------------------------------------------------------------------------ sampled pairs


def test_sampled_pairs(tokenizer, monkeypatch):
    """A verifier that likes texts of even length; the chunks come out the same however many ranks share them."""
    monkeypatch.setattr(pairs_room, "is_correct", lambda text, problem: len(text) % 2 == 0)
    raw, problems = tiny(tokenizer), load_problems("word", "train", 130)
    settings = config(pairs="sampled", rollouts=6, max_new_tokens=60)
    rule = partial(pair_up, most=2)
    pairs, share = pairs_room.sample_pairs(raw, tokenizer, problems, settings, devices.setup("cpu"), 3, rule)
    assert 0.2 < share < 0.8
    assert len(pairs) > 20
    prompts = [encode_prompt(tokenizer, p) for p in problems]
    special = set(tokenizer.special_ids.values())
    for pair in pairs:
        assert pair["prompt"] in prompts
        texts = [tokenizer.decode([i for i in pair[side] if i not in special]) for side in ("chosen", "rejected")]
        assert len(texts[0]) % 2 == 0 == (len(texts[1]) + 1) % 2
        assert pair["chosen"][-1] in tokenizer.stop_ids  # an answer that never stops is nobody's example
    assert max(sum(pair["prompt"] == p for pair in pairs) for p in prompts) == 2
    assert len({str(pair) for pair in pairs}) == len(pairs)

    parts = []

    def gather(everywhere, own):
        parts.append(own)
        everywhere[: len(parts)] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    ranks = [devices.Dist(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    with pytest.raises(TypeError):  # the second rank has not come yet
        pairs_room.sample_pairs(raw, tokenizer, problems, settings, ranks[0], 3, rule)
    assert pairs_room.sample_pairs(raw, tokenizer, problems, settings, ranks[1], 3, rule) == (pairs, share)
    assert [len(part) for part in parts] == [2, 1]  # chunks 0 and 2, chunk 1


def test_a_run_with_sampled_pairs(here, monkeypatch):
    monkeypatch.setattr(pairs_room, "is_correct", lambda text, problem: len(text) % 2 == 0)
    changes = dict(rollouts=8, max_new_tokens=60, eval_problems=20, test_problems=20, steps=10, lr=2e-2)
    result = dpo.main(config(pairs="sampled", **changes))
    assert result["before"]["pairs"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    pairs = torch.load("runs/dpo/pairs.pt", weights_only=True)
    most = {split: max(Counter(str(pair["prompt"]) for pair in some).values()) for split, some in pairs.items()}
    assert most["train"] > 1
    assert most["valid"] == most["test"] == 1  # held-out pairs do not depend on each other
    losses = list(metrics("runs/dpo", "loss").values())
    assert losses[-1] < 0.9 * losses[0]  # these few pairs can be learnt by heart
    monkeypatch.setattr(pairs_room, "is_correct", lambda text, problem: False)
    with pytest.raises(ConfigError, match="no train prompt got both a right and a wrong answer"):
        dpo.main(config(pairs="sampled", rollouts=2))


# ------------------------------------------------------------------------------------------------ runs


def write_pairs(path, n=120):
    pairs = [{"prompt": f"Is {i} a number?", "chosen": "It is 7.", "rejected": "Anna has 3 apples."} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_separable_set_is_separated(here, variant):
    write_pairs(here / "toy.jsonl")
    settings = dict(data="toy.jsonl", variant=variant, steps=30, lr=1e-2, batch=16, micro_batch=16, eval_every=15)
    result = dpo.main(config(**settings, beta=1.0))
    assert result["after"]["pairs"]["pair_accuracy"] > 0.95
    assert result["after"]["pairs"]["loss"] < 0.8 * result["before"]["pairs"]["loss"]
    assert set(metrics("runs/dpo", "valid_loss")) == {15, 30}
    for name in ("kl", "logp_chosen", "reward_chosen", "valid_margin", "pair_accuracy"):
        assert metrics("runs/dpo", name), name
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "pairs.pt"):
        assert (here / "runs" / "dpo" / name).exists(), name


def test_best_is_chosen_by_the_validation_loss(here):
    write_pairs(here / "toy.jsonl")
    result = dpo.main(config(data="toy.jsonl", steps=6, lr=1e-2, eval_every=1, save_every=1))
    losses = metrics("runs/dpo", "valid_loss")
    raw, tokenizer, path = open_checkpoint("runs/dpo")
    assert str(path) == result["path"]
    pairs = torch.load("runs/dpo/pairs.pt", weights_only=True)["valid"]
    dist = devices.setup("cpu")
    figures = validate(raw, pairs, tokenizer, config(), dist, devices.precision("fp32", dist)[0])
    assert figures["loss"] == pytest.approx(min(losses.values()), rel=1e-5)


def test_dropout_acts_in_training_alone(here):
    """Not while the reference reads and not in validation: where nothing moves, the validation loss stays ln 2."""
    dpo.main(config(steps=1, lr=0.0, dropout=0.5))
    assert metrics("runs/dpo", "valid_loss")[1] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics("runs/dpo", "loss")[1] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"variant": "kto", "lr": 1e-2}, {"variant": "orpo", "nll": 1.0}])
def test_the_cut_into_micro_batches_changes_nothing(here, scaled, changes):
    """Nor does a gradient scaler."""
    dpo.main(config(name="whole", **changes))
    scaled("support.dpo_run")
    dpo.main(config(name="cut", micro_batch=2, **changes))
    names = ("loss", "grad_norm", "logp_chosen", "pair_accuracy", *(["z0"] if "kto" in changes.values() else []))
    assert_same_metrics("runs/whole", "runs/cut", names, rel=1e-4)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(dpo)
    dpo.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "cosine", 0.1, betas=(0.9, 0.999))


@pytest.mark.parametrize("variant", ["sigmoid", "kto"])
def test_two_processes_equal_one(here, variant):
    dpo.main(config(name="one", variant=variant))
    two = script("dpo.py", *flags_of(SMALL | {"variant": variant, "name": "two"}), cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    names = ("loss", "grad_norm", "valid_loss", "valid_logp_chosen", "accuracy")
    assert_same_metrics("runs/one", "runs/two", names, rel=1e-4)
    assert_same_metrics("runs/one", "runs/two", ["kl"], rel=1e-3)
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)
    assert_ranks_draw_apart("runs/two")


def test_a_gradient_that_is_not_finite_stops_the_run(here, monkeypatch):
    monkeypatch.setattr(dpo, "optimizer_step", lambda *args: math.inf)
    with pytest.raises(DivergedError, match="gradient norm is inf at step 0"):
        dpo.main(config())


@pytest.mark.parametrize(("variant", "sums"), [("sigmoid", 1), ("kto", 2)])  # kto's first is that of z0
def test_a_rank_without_a_pair_adds_nothing(here, variant, sums):
    dpo.main(config(variant=variant))
    raw, tokenizer, _ = open_checkpoint("runs/dpo")
    pairs = torch.load("runs/dpo/pairs.pt", weights_only=True)["valid"][:1]
    autocast, sent = devices.precision("fp32", devices.setup("cpu"))[0], []
    for rank in (0, 1):
        dist = SimpleNamespace(rank=rank, is_main=rank == 0, world=2, device="cpu")
        dist.sum = lambda *values: sent.append(values) or [1.0] * len(values)
        validate(raw, pairs, tokenizer, config(variant=variant), dist, autocast)
    first, second = sent[:sums], sent[sums:]
    assert list(map(len, first)) == list(map(len, second))
    assert all(map(any, first))
    assert not any(map(any, second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nothing.jsonl"}, "nothing"),
        ({"data": "some.jsonl"}, "has no pair in the split valid"),
        ({"lora": LoraConfig(2, targets=["zz"])}, "'zz' matches no Linear layer"),
        ({"pairs": "sampled"}, "no train prompt got both"),
    ],
)
def test_a_typo_moves_no_earlier_run(here, changes, message):
    pairs = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    kept = [pair for pair in pairs if split_of(pair["prompt"]) != "valid"]
    (here / "some.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept), encoding="utf-8")
    (here / "runs/dpo").mkdir(parents=True)
    with pytest.raises((ConfigError, CheckpointError, DataError), match=message):
        dpo.main(config(**changes))
    assert not (here / "runs/dpo.1").exists()


@pytest.mark.parametrize("variant", ["sigmoid", "kto", "orpo"])
def test_resumed_equals_uninterrupted_bit_for_bit(here, monkeypatch, variant):
    changes = dict(dropout=0.1, variant=variant)
    dpo.main(config(name="whole", **changes))
    with stopped_after(2):
        dpo.main(config(name="parts", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(pair_rows, "make_pairs", None)  # pairs and reference are read again, not made again
        file = here / "runs/parts/pairs.pt"
        saved = torch.load(file, weights_only=True)
        saved["valid"][1] |= {"ref_answer" if variant == "kto" else "ref_rejected": math.nan}
        shutil.move(file, f"{file}.good")
        for bad, why in ((saved, ".* of valid pair 2 is not finite"), ([], "it holds a list"), (None, "it ends")):
            torch.save(bad, file)
            if bad is None:
                file.write_bytes(b"")
            with pytest.raises(CheckpointError, match=rf"pairs\.pt is corrupt: {why}"):
                dpo.main(config(name="parts", resume=True, **changes))
        shutil.move(f"{file}.good", file)
        with resumed_at(2):
            dpo.main(config(name="parts", resume=True, **changes))
    assert_same_metrics("runs/whole", "runs/parts", ["loss"])
    assert_same_weights("runs/whole/last", "runs/parts/last")


@pytest.mark.parametrize("variant", ["sigmoid", "kto"])
def test_lora_trains_and_resumes(here, variant):
    changes = dict(lora=LoraConfig(rank=2), lr=1e-2, nll=0.1, variant=variant)
    result, _ = assert_resumed_equals_whole(dpo, config, 2, ["loss"], **changes)
    assert result["after"]["pairs"]["loss"] < result["before"]["pairs"]["loss"]
    assert open_checkpoint("runs/whole/last")[0].state_dict().keys() == open_checkpoint("start")[0].state_dict().keys()


@pytest.mark.parametrize("variant", ["sigmoid", "kto"])
def test_pairs_that_are_not_read_are_spoken_of(here, capsys, variant):
    write_pairs(here / "toy.jsonl")
    dpo.main(config(data="toy.jsonl", variant=variant, steps=1))
    assert "of toy.jsonl the first 40 training records are read, no more: --prompts" in capsys.readouterr().out


def test_long_pairs_are_left_out(here, capsys):
    write_pairs(here / "toy.jsonl", 100)
    long = {"prompt": "word " * 300, "chosen": "a", "rejected": "b"}
    with open("toy.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(long))
    dpo.main(config(data="toy.jsonl", prompts=1000, steps=1))
    assert "train pairs are longer than 160 tokens: left out" in capsys.readouterr().out


def test_bad_input_is_one_line(here):
    def fails(*flags):
        return script("dpo.py", "--init", "start", *flags, cwd=here)

    (here / "bad.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}\n', encoding="utf-8"
    )
    assert_one_line_error(fails("--data", "bad.jsonl"), "bad.jsonl", "2", "rejected")
    assert_one_line_error(fails("--data", "nothing.jsonl"), "nothing.jsonl")
    with pytest.raises(ConfigError, match="variant"):
        config(variant="dpo")
    for beta in (0.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="beta"):
            config(beta=beta)
    with pytest.raises(ConfigError, match="temperature"):
        config(pairs="sampled", temperature=math.nan)
    with pytest.raises(ConfigError, match="pairs"):
        config(pairs="both")
    with pytest.raises(ConfigError, match="label_smoothing"):
        config(variant="hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="needs an SFT checkpoint"):
        config(init=None, data="style")
    with pytest.raises(ConfigError, match="needs a verifier"):
        config(data="style", pairs="sampled")
    with pytest.raises(ConfigError, match="simpo"):
        config(gamma=0.5)
    with pytest.raises(ConfigError, match="--weight_desirable has no meaning with --variant apo_zero, only with kto"):
        config(variant="apo_zero", weight_desirable=2.0)
    with pytest.raises(ConfigError, match="--batch is 1; --variant kto needs 2"):
        config(variant="kto", batch=1)
    (here / "judged.jsonl").write_text('{"prompt": "p", "completion": "a", "label": "maybe"}\n', encoding="utf-8")
    said = fails("--data", "judged.jsonl", "--variant", "kto")
    assert_one_line_error(said, "judged.jsonl line 1: 'label' must be true or false, not 'maybe'")
    for name, value in (("lr", -1.0), ("seed", -1), ("dropout", 1.0), ("weight_decay", -0.1)):
        with pytest.raises(ConfigError, match=f"--{name} is {value}"):
            config(**{name: value})


def test_chunks_are_whole_and_fit():
    rng = random.Random(0)
    rows = [
        {"prompt": [0] * rng.randint(1, 90), "chosen": [0] * rng.randint(1, 50), "rejected": [0]} for _ in range(99)
    ]
    cut = pairs_room.chunks(rows, most=10, tokens=900)
    assert [row for chunk in cut for row in chunk] == rows

    def padded(chunk):
        return 2 * len(chunk) * (max(len(r["prompt"]) for r in chunk) + max(len(r["chosen"]) for r in chunk))

    assert all(len(chunk) <= 10 and padded(chunk) <= 900 for chunk in cut)
    for chunk, after in pairwise(cut):  # none could take one more
        assert len(chunk) == 10 or padded([*chunk, after[0]]) > 900
    assert len({len(chunk) for chunk in cut}) > 2
    short = [{"prompt": [0] * 100, "chosen": [0] * 64, "rejected": [0] * 64}] * 130
    assert [len(chunk) for chunk in pairs_room.chunks(short)] == [64, 64, 2]
    assert [len(chunk) for chunk in pairs_room.chunks(short[:2], tokens=9)] == [1, 1]  # each longer than that alone


def test_likelier_by_hand():
    logps = torch.tensor([-4.0, -2.0, -9.0]), torch.tensor([-3.0, -3.0, -8.0])  # per token -1, -2, -3; -1.5, -1, -4
    lengths = {"chosen_lengths": torch.tensor([4, 1, 3]), "rejected_lengths": torch.tensor([2, 3, 2])}
    shares = dpo_report.likelier(logps, lengths)
    assert shares == {"likelier": pytest.approx(1 / 3), "likelier_per_token": pytest.approx(2 / 3)}


def test_what_the_start_prefers_is_said_before_and_after(here, capsys):
    result = dpo.main(config(test_problems=30, lr=1e-2, steps=10))
    out, (before, after) = capsys.readouterr().out, (result[when]["pairs"] for when in ("before", "after"))
    start, tokenizer, _ = open_checkpoint("start")
    gaps = []
    for pair in load_pairs("word", "test", 30):
        row, logps = encode_pair(tokenizer, pair), []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt"] + row[side]])
            logps.append(token_logprobs(start, ids)[0, len(row["prompt"]) - 1 :].sum().item())
        gaps.append(logps[0] - logps[1])
    share = sum(gap > 0 for gap in gaps) / len(gaps)
    assert before["likelier"] == pytest.approx(share)
    assert f"the chosen answer is likelier in {share:.1%} of the test pairs" in out
    (line,) = (line for line in out.splitlines() if line.startswith("chosen answer likelier"))
    cells = [
        f"{x:.1%} [{low:.1%}, {high:.1%}]" for x in (share, after["likelier"]) for low, high in [wilson(30 * x, 30)]
    ]
    assert line.split("  ", 1)[1].split() == " ".join(cells).split()


def test_longer_pairs_are_left_out(here, capsys, tokenizer):
    longest = 90
    dpo.main(config(max_tokens=longest, steps=1))
    pairs = torch.load("runs/dpo/pairs.pt", weights_only=True)["train"]
    encoded = [encode_pair(tokenizer, pair) for pair in load_pairs("word", "train", 40)]
    lengths = [len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in encoded]
    assert 0 < len(pairs) == sum(n <= longest for n in lengths) < 40
    assert f"of 40 train pairs are longer than {longest} tokens: left out" in capsys.readouterr().out
    for sampled in (dict(rollouts=4), dict(temperature=0.7)):
        with pytest.raises(ConfigError, match="--rollouts and --temperature are for --pairs sampled: leave them out"):
            config(pairs="offline", **sampled)
    with pytest.raises(ConfigError, match="--max_tokens is for --pairs offline"):
        config(max_tokens=longest, pairs="sampled")


def test_the_report_says_when_chosen_answers_became_less_probable(capsys):
    def last_line(nll, chosen, variant="sigmoid"):
        pairs = {"loss": 0.6, "logp_chosen": -5.0, "logp_rejected": -8.0, "pair_accuracy": 0.75}
        dpo_report.report(
            Config(nll=nll, variant=variant), {"pairs": pairs}, {"pairs": pairs | {"logp_chosen": chosen}}, 100, 60.0
        )
        return capsys.readouterr().out.splitlines()[-1]

    assert last_line(1.0, -6.0).startswith("the chosen answers became less probable too, in spite of --nll 1:")
    assert last_line(0.0, -6.0).startswith("the chosen answers became less probable too: DPO fits the difference alone")
    assert last_line(0.0, -6.0, "kto") == "the good answers became less probable too (see curves.png)"
    assert last_line(0.0, -6.0, "apo_down") == "300 steps, 1.0 minutes"  # they should
    assert last_line(1.0, -4.0) == "300 steps, 1.0 minutes"
