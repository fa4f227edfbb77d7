"""Optimizers and schedules."""

import math

import torch

from support.errors import ConfigError
from support.sharding import is_sharded, share_of


def lr_at(step, steps, peak, warmup, floor=0.1, schedule="cosine", decay=0.2):
    """Learning rate of step 0 … steps−1: up a line to `peak` in `warmup` steps, then down to floor · peak.

    cosine or linear from there on; wsd (arXiv:2404.06395) stays at the peak until the last `decay` share of the steps,
    then falls in a line: a run can be prolonged from any checkpoint before the fall.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = steps - decay * steps if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (floor + (1 - floor) * share)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al. 2024; scaled as in arXiv:2502.16982).

    A matrix's momentum M = U S Vᵀ is dominated by a few directions. Muon steps along U Vᵀ instead: every direction
    moves at the same pace. U Vᵀ comes without an SVD from five rounds of the odd polynomial
    X ← aX + b(XXᵀ)X + c(XXᵀ)²X, which drives all singular values of X towards 1; under autocast in its dtype, which
    is exact enough. Matrices of one shape go through it together: small ones, one by one, would not fill the machine.
    The factor 0.2 √max(rows, columns) gives the update the size of AdamW's, so both share a learning rate.

    Under FSDP a rank holds some rows of each matrix, but U Vᵀ needs them all: every rank gathers the matrix,
    orthogonalises it whole, the same on all ranks, and keeps its own rows. The momentum stays shared out.
    """

    STACK = 2**24  # numbers that go through the iteration together at most: bounds the memory

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # {shape: parameters}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                size = 1 if is_sharded(params[0]) else max(1, self.STACK // shape.numel())
                for i in range(0, len(params), size):
                    self._step_alike(params[i : i + size], group)

    def _step_alike(self, params, group):
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p.grad)
            m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(m, group["momentum"])  # Nesterov: look one step ahead
            updates.append(update.full_tensor() if is_sharded(update) else update)
        for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(share_of(update, p), alpha=-0.2 * math.sqrt(max(p.shape[-2:])) * group["lr"])


def orthogonalise(m, rounds=5):
    """A stack of matrices (..., rows, columns) -> the nearest ones with singular values 1, roughly (they end between
    0.7 and 1.2)."""
    x = m.reshape(-1, *m.shape[-2:])  # (n, rows, columns)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the iteration needs singular values of at most 1
    wide = m.shape[-2] <= m.shape[-1]
    x = x if wide else x.mT.contiguous()  # so that X Xᵀ is the smaller product
    for _ in range(rounds):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a @ a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b @ x
    return (x if wide else x.mT).reshape(m.shape)


def make_optimizers(raw, kind, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW for all that learns, or Muon for the blocks' matrices and AdamW for the rest. Returns a list.

    Decay pulls matrices towards zero; gains, biases and positions have no business there. A router's rows are the
    experts' labels, as an embedding's are the words': AdamW, like the embedding (results/moe_word.md).
    """
    if kind not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {kind!r} is not known; use adamw or muon")
    named = [(n, p) for n, p in raw.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if p.dim() >= 2 and "learned" not in n]
    inner = [p for n, p in matrices if kind == "muon" and n.startswith("blocks.") and not n.endswith("router.weight")]
    chosen = {id(p) for p in inner}
    decayed = [p for _, p in matrices if id(p) not in chosen]
    chosen |= {id(p) for p in decayed}
    plain = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)] if groups else []
    return optimizers + ([Muon(inner, lr, weight_decay=weight_decay)] if inner else [])


def optimizer_step(raw, optimizers, scaler, autocast, lr, clip):
    """Unscale, clip by the global norm, step (Muon's products in autocast's dtype), clear. Returns the norm before
    clipping; if that is not finite, the weights stay as they are."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)  # before clipping: the norm of scaled gradients means nothing
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), clip if clip > 0 else math.inf)
    norm = (norm.full_tensor() if is_sharded(norm) else norm).item()  # under FSDP, over all ranks' parts
    for optimizer in optimizers:
        if math.isfinite(norm):  # the scaler asks each optimizer by itself: one would step where the other overflowed
            with autocast():
                scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # half the scale after an overflow, twice after 2,000 steps without
    return norm
