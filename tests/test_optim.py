"""optim.py: the plain optimizers against torch's, Muon against torch's and the SVD, schedules, clipping, the scaler."""

import contextlib
import copy
import math

import pytest
import torch

import optim
from optim import (
    SGD,
    Adam,
    AdamW,
    Muon,
    clip_by_global_norm,
    lr_at,
    make_optimizers,
    optimizer_step,
    orthogonalise,
    walk,
)
from pretrain import next_token_loss
from support import devices, sharding
from support.errors import ConfigError
from transformer import Transformer, TransformerConfig

MODEL = dict(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16)


# ------------------------------------------------------------------------------------------------ the plain form


@pytest.mark.parametrize(
    ("ours", "theirs", "first", "second"),
    [
        (SGD, torch.optim.SGD, {}, {"lr": 0.02}),
        (SGD, torch.optim.SGD, {"momentum": 0.9}, {"momentum": 0.5}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {"lr": 0.005}),
        (Adam, torch.optim.Adam, {"betas": (0.9, 0.95), "weight_decay": 0.0}, {"betas": (0.8, 0.999), "eps": 1e-3}),
        (Adam, torch.optim.Adam, {"weight_decay": 0.3, "betas": (0.9, 0.95)}, {"weight_decay": 0.0}),
        (AdamW, torch.optim.AdamW, {"betas": (0.9, 0.999)}, {"weight_decay": 0.3, "lr": 0.05, "eps": 1e-4}),
    ],
)
def test_the_plain_optimizers_against_torch(ours, theirs, first, second):
    """100 steps in float64, two groups of other settings, a rate that changes, a tensor that at times has no gradient
    (it stands still, its moments and its count too)."""
    torch.manual_seed(0)
    if ours is AdamW:
        first = {"weight_decay": 0.1} | first  # torch's default is another
    shapes = ((4, 5), (7,), (2, 3, 4))
    plain = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    reference = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    pair = [
        make([{"params": ps[:2]}, {"params": ps[2:], **second}], lr=0.01, **first)
        for make, ps in ((ours, plain), (theirs, reference))
    ]
    for step in range(100):
        for i, (p, q) in enumerate(zip(plain, reference, strict=True)):
            p.grad = None if i != 2 and step % (i + 3) == 0 else p.detach() * torch.rand(()) + torch.randn_like(p)
            q.grad = p.grad
        for optimizer in pair:
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
        torch.testing.assert_close(plain, reference, atol=1e-12, rtol=1e-12)


def test_the_contracts_defaults():
    (group,) = AdamW([torch.nn.Parameter(torch.ones(1))], 0.1).param_groups
    assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    (group,) = Muon([torch.nn.Parameter(torch.ones(1, 1))], 0.1).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.95, 0.0)


def test_the_stages_optimizers_take_what_they_are_given():
    raw = Transformer(TransformerConfig(260, n_layer=1, width=16, n_head=2, n_kv_head=1))
    adamw, muon = make_optimizers(raw, "muon", 1e-3, 0.1, betas=(0.8, 0.7))
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.7)}
    assert [group["weight_decay"] for group in muon.param_groups] == [0.1]
    (adamw,) = make_optimizers(raw, "adamw", 1e-3, 0.1)
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.1}


def test_a_plain_optimizer_resumes_from_its_state():
    torch.manual_seed(0)
    gradients = torch.randn(6, 3)
    whole, parts = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([whole], 0.1)
    for whole.grad in gradients:
        optimizer.step()
    first = AdamW([parts], 0.1)
    for parts.grad in gradients[:3]:
        first.step()
    second = AdamW([parts], 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parts.grad in gradients[3:]:
        second.step()
    assert torch.equal(whole, parts)


# ------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_orthogonalise_against_svd(shape):
    torch.manual_seed(0)
    m = torch.randn(*shape)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    got = orthogonalise(m)
    inside = u.t() @ got @ vh.t()  # diagonal if the singular vectors are kept
    assert torch.linalg.svdvals(got).min() > 0.6
    assert torch.linalg.svdvals(got).max() < 1.3
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-4, rtol=0)


def test_muon_step_by_hand():
    torch.manual_seed(0)
    p, grad = torch.nn.Parameter(torch.randn(4, 6)), torch.randn(4, 6)
    before = p.detach().clone()
    p.grad = grad.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    update = orthogonalise(0.1 * grad + 0.9 * (0.1 * grad))  # Nesterov, from momentum 0
    torch.testing.assert_close(p.detach(), before * (1 - 0.05) - 0.1 * 0.2 * math.sqrt(6) * update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_against_torch(dtype, monkeypatch):
    """torch.optim.Muon iterates in bf16, one matrix at a time; ours in autocast's dtype, those of one shape at once."""
    torch.manual_seed(0)
    monkeypatch.setattr(sharding, "STACK", 2000)  # two of 24 x 40
    mine = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 40), (24, 40), (40, 24), (16, 16), (24, 40), (1, 7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.5)
    ours = Muon(mine, **settings)
    reference = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [p.detach().clone() for p in mine]
        for p, q in zip(mine, theirs, strict=True):
            p.grad, q.data = torch.randn_like(p), p.data.clone()  # each step by itself
            q.grad = p.grad.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours.step()
        reference.step()
        for p, q, start in zip(mine, theirs, before, strict=True):
            assert p.dtype == torch.float32
            assert (p - q).norm() < 0.015 * (q - start).norm()


def test_how_far_the_rounds_bring_a_singular_value():
    """The bounds that the docstring gives, and that small ones are lifted a = 3.4445 times a round."""
    s = torch.logspace(math.log10(0.002), math.log10(0.99), 200, dtype=torch.float64)
    matrices = torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], dim=-1))  # (200, 2, 2) of norm 1
    ends = orthogonalise(matrices)[:, 0, 0]
    assert ends.min() > 0.68
    assert ends.max() < 1.21
    tiny = orthogonalise(torch.diag(torch.tensor([1e-6, 1.0], dtype=torch.float64)))[0, 0]
    assert tiny.item() == pytest.approx(1e-6 * 3.4445**5, rel=1e-4)


@pytest.mark.parametrize(("kind", "noisy", "agreed"), [(AdamW, 0.23, 1.0), (Muon, 0.2, 0.2)])
def test_how_far_a_step_moves_a_weight(kind, noisy, agreed):
    """Root mean square over a 32 x 64 matrix at η = 1, for gradients that are noise and that are all the same."""
    torch.manual_seed(0)
    noise = torch.randn(100, 32, 64)
    for gradients, expected in ((noise, noisy), (noise[:1].expand(100, -1, -1), agreed)):
        path = walk(lambda w: kind(w, lr=1.0, weight_decay=0.0), 0 * noise[0], lambda t, w, g=gradients: g[t], 100)
        far = path.diff(dim=0)[50:].square().mean().sqrt().item()
        assert far == pytest.approx(expected, rel=0.2)  # the rounds leave singular values of 0.68 to 1.21


# ------------------------------------------------------------------------------------------------ schedules


def test_learning_rate_by_hand():
    got = [lr_at(s, 8, 1.0, 2) for s in range(8)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert got == pytest.approx([0.5, 1.0, *cosine])
    assert cosine[3] == pytest.approx(0.55)
    assert lr_at(100, 8, 1.0, 2) == pytest.approx(0.1)


def test_schedules_by_hand():
    line = [lr_at(s, 6, 1.0, 2, floor=0.2, schedule="linear") for s in range(7)]
    assert line == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    wsd = [lr_at(s, 10, 2.0, 1, floor=0.0, schedule="wsd", decay=0.4) for s in range(11)]
    assert wsd == pytest.approx([2, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0])


def test_the_fall_of_wsd_begins_after_the_warm_up():
    got = [lr_at(s, 10, 1.0, 6, floor=0.0, schedule="wsd", decay=0.8) for s in range(11)]
    assert got == pytest.approx([*(k / 6 for k in range(1, 7)), 1.0, 0.75, 0.5, 0.25, 0.0])
    assert [lr_at(s, 10, 1.0, 3, schedule="wsd", decay=0) for s in (2, 3, 9)] == [1.0] * 3  # PPO's value network


@pytest.mark.parametrize("step", [0, 5])
def test_an_unknown_schedule_is_refused(step):
    with pytest.raises(ConfigError, match="'constant' is not known; use cosine, linear or wsd"):
        lr_at(step, 8, 1.0, 2, schedule="constant")


# ------------------------------------------------------------------------------------------------ clipping, one step


@pytest.mark.parametrize("clip", [0.5, 6.5, 100.0])
def test_clipping_by_hand_and_against_torch(clip):
    ours = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in ours]
    for p, g in zip(parameters, ours, strict=True):
        p.grad = g.clone()
    norm = clip_by_global_norm(ours, clip)
    assert norm == 13
    assert torch.nn.utils.clip_grad_norm_(parameters, clip) == norm
    torch.testing.assert_close(ours, [p.grad for p in parameters])
    share = min(1, clip / 13)
    assert torch.cat([g.flatten() for g in ours]).tolist() == pytest.approx([3 * share, 4 * share, 12 * share])


def test_what_training_runs_is_the_plain_form():
    """optimizer_step with torch's fused AdamW and its clipping = clip_by_global_norm and our AdamW, as rates change."""
    torch.manual_seed(0)
    fast, plain = (torch.nn.Linear(6, 4).double() for _ in range(2))
    plain.load_state_dict(fast.state_dict())
    settings = dict(lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    optimizers = [torch.optim.AdamW([p], **settings, fused=True) for p in fast.parameters()]
    own = AdamW(plain.parameters(), **settings)
    scaler, norms = torch.amp.GradScaler("cpu", enabled=False), []
    for step in range(20):
        for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p) * (0.01 if step % 2 else 1.0)
            q.grad = p.grad.clone()
        norms.append(clip_by_global_norm([p.grad for p in plain.parameters()], 1.0))
        own.param_groups[0]["lr"] = lr_at(step, 20, 0.1, 3)
        own.step()
        got = optimizer_step(fast, optimizers, scaler, contextlib.nullcontext, lr_at(step, 20, 0.1, 3), clip=1.0)
        assert got == pytest.approx(norms[-1])
        torch.testing.assert_close(list(fast.parameters()), list(plain.parameters()), atol=1e-6, rtol=1e-6)
    assert min(norms) < 1 < max(norms)


def test_a_clip_of_zero_is_none():
    p = torch.nn.Linear(1, 1, bias=False)
    p.weight.grad = torch.full((1, 1), 300.0)
    before = p.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert optimizer_step(p, [SGD(p.parameters(), 9.0)], scaler, contextlib.nullcontext, 0.01, clip=0) == 300
    torch.testing.assert_close(p.weight.detach(), before - 3)


def test_the_optimizer_steps_in_the_precision_of_autocast(monkeypatch):
    seen, whole = [], optim.orthogonalise
    monkeypatch.setattr(optim, "orthogonalise", lambda m: seen.append(whole(m)) or seen[-1])
    raw = Transformer(TransformerConfig(vocab_size=11, **MODEL))
    dist = devices.setup("cpu")
    for dtype in ("fp32", "bf16"):
        autocast, scaler = devices.precision(dtype, dist)
        optimizers = make_optimizers(raw, "muon", 1e-3, 0.1)
        next_token_loss(raw, torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)).backward()
        optimizer_step(raw, optimizers, scaler, autocast, 1e-2, clip=0.5)
        assert {update.dtype for update in seen} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
        seen.clear()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_scaled_step_is_a_plain_step_or_none(optimizer):
    """fp16: gradients of 1,024 times the loss are unscaled before clipping; one that overflowed, be it AdamW's or
    Muon's, leaves all weights and moments as they are and halves the scale."""
    both = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", enabled=False)):
        torch.manual_seed(0)
        raw = Transformer(TransformerConfig(vocab_size=11, **MODEL))
        x, y = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
        optimizers = make_optimizers(raw, optimizer, 1e-3, 0.1)
        scaler.scale(next_token_loss(raw, x, y)).backward()
        norm = optimizer_step(raw, optimizers, scaler, contextlib.nullcontext, 1e-2, clip=0.5)
        both.append([torch.tensor(norm), *raw.parameters()])
        if scaler.is_enabled():
            scaled = raw, optimizers, scaler
    assert both[1][0] > 0.5
    torch.testing.assert_close(both[0], both[1])

    raw, optimizers, scaler = scaled
    for name, scale in (("embed.weight", 512), ("blocks.0.attn.wq.weight", 256)):
        before = copy.deepcopy([raw.state_dict(), [o.state_dict()["state"] for o in optimizers]])
        scaler.scale(next_token_loss(raw, x, y)).backward()
        raw.get_parameter(name).grad[0, 0] = math.inf
        assert not math.isfinite(optimizer_step(raw, optimizers, scaler, contextlib.nullcontext, 1e-2, clip=0.5))
        after = [raw.state_dict(), [o.state_dict()["state"] for o in optimizers]]
        torch.testing.assert_close(after, before, atol=0, rtol=0)
        assert scaler.get_scale() == scale
        assert all(p.grad is None for p in raw.parameters())


def test_parts_are_clipped_apart_and_step_together_or_not_at_all():
    parts = [[torch.nn.Parameter(torch.zeros(2))] for _ in range(2)]
    steps = [(p, [SGD(p, 1.0)], 1.0) for p in parts]
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(*gradients):
        for (p,), gradient in zip(parts, gradients, strict=True):
            p.grad = torch.tensor(gradient)
        return optim.optimizer_steps(steps, scaler, contextlib.nullcontext, 1.0)

    assert step([3.0, 4.0], [0.3, 0.4]) == pytest.approx([5.0, 0.5])
    after = [pytest.approx([-0.6, -0.8]), pytest.approx([-0.3, -0.4])]
    assert [p.tolist() for (p,) in parts] == after
    for bad in (([math.inf, 0.0], [0.3, 0.4]), ([0.3, 0.4], [math.nan, 0.0])):
        step(*bad)
        assert [p.tolist() for (p,) in parts] == after


def test_decay_only_where_it_belongs():
    raw = Transformer(TransformerConfig(vocab_size=20, positions="learned", bias=True, norm="layer", **MODEL))
    (adamw,) = make_optimizers(raw, "adamw", 1e-3, 0.1)
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert len(decay) == len(list(raw.parameters()))
    for name, p in raw.named_parameters():
        assert decay[id(p)] == (0.1 if p.dim() == 2 and "learned" not in name else 0.0), name
    adamw, muon = make_optimizers(raw, "muon", 1e-3, 0.1)
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    assert in_muon == {id(p) for n, p in raw.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    assert len(in_muon) + sum(len(g["params"]) for g in adamw.param_groups) == len(decay)


def test_what_is_frozen_is_in_no_optimizer():
    """Under fp16 the scaler refuses to step an optimizer that saw no gradient."""
    raw = Transformer(TransformerConfig(vocab_size=20, **MODEL))
    for name, p in raw.named_parameters():
        p.requires_grad_(name.startswith("blocks.0") and p.dim() == 2)
    (muon,) = make_optimizers(raw, "muon", 1e-3, 0.1)
    learns = {id(p) for p in raw.parameters() if p.requires_grad}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == learns
    for p in raw.parameters():
        p.requires_grad_(p.dim() == 1)
    (adamw,) = make_optimizers(raw, "muon", 1e-3, 0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(raw(torch.arange(8)[None]).sum()).backward()
    assert math.isfinite(optimizer_step(raw, [adamw], scaler, contextlib.nullcontext, 1e-3, 1.0))
