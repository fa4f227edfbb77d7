"""Optimizers: gradient descent, momentum, Adam, AdamW, Muon; the learning rate's schedule; clipping; the scaler.

Given g = dL/dw, how far does each weight move? w is a tensor; g, m, v have its shape, and all but Muon is elementwise.
η is the rate, λ the decay, t = 1, 2, … the step; the defaults of β₁, β₂, ε are 0.9, 0.95, 1e-8, Muon's μ is 0.95:

    gradient descent   w ← w − η g
    momentum           m ← μ m + g,  w ← w − η m                     Polyak 1964; Nesterov: w ← w − η (g + μ m)
    Adam               m ← β₁ m + (1 − β₁) g                         arXiv:1412.6980, Algorithm 1
                       v ← β₂ v + (1 − β₂) g²
                       w ← w − η m̂ / (√v̂ + ε)                        m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
    AdamW              w ← (1 − η λ) w, then Adam's step             arXiv:1711.05101, Algorithm 2, where the decay is
                                                                     λ times the schedule; here, as in torch, η λ
    Muon               m ← μ m + (1 − μ) g,  X = (1 − μ) g + μ m     K. Jordan et al. 2024; m, X and w are matrices
                       X ← X / ‖X‖_F                                 (rows, columns), ‖X‖_F = √Σ X_ij²
                       X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X            five times; a, b, c = 3.4445, −4.7750, 2.0315
                       w ← (1 − η λ) w − 0.2 √max(rows, columns) η X     decay and factor: arXiv:2502.16982

One step of training:

    (loss · scale).backward()          the caller's, as the next line. Only fp16 has a scale: a gradient below
                                       3e-8, half of its least number, would round to 0
    η = lr_at(step, …)                 a line up to the peak, then down: cosine, linear or wsd (warm-up, stable, decay)
    optimizer_step(…):
        g ← g / scale                  before anything looks at the gradients
        g ← g min(1, clip / ‖g‖)       ‖g‖ over all weights at once (arXiv:1211.5063): shorter, in the same direction
        w ← by Muon or AdamW           nothing moves if ‖g‖ is inf or nan: in fp16 the scale is then halved (and doubled
                                       after 2,000 good steps in a row), else the run stops (pretrain.py may go on)

The defaults run Muon on the matrices inside the blocks (attention and feed-forward, their LoRA A and B, experts) and
AdamW on the rest (embeddings, output, routers, gains, biases), both at the same η, and clip at 1; PPO runs AdamW alone.
η falls along a cosine to a tenth of the peak, in GRPO, GDPO, PPO and agent.py along a line to 0 (PPO's value head: not
at all). Matrices and embeddings decay, gains, biases and learned positions do not: λ is 0.1 in pretraining, SFT and the
encoder, 0.01 for reward models, elsewhere 0. β₂ is 0.999 in DPO, PPO, GRPO, GDPO and agent.py.

Why:

Gradient descent. Near a minimum the loss is a bowl, along an axis of curvature h it is ½ h w², so g = h w and

    w ← (1 − η h) w            shrinks while η < 2/h: the steepest axis limits η, and the flattest one waits for it

With κ = h_max / h_min, the best η is 2 / (h_max + h_min): a step leaves (κ − 1)/(κ + 1) of the error, κ steps about
e⁻² of it.

Momentum. What the gradients agree on adds up, to g/(1 − μ); what changes sign at every step stays at g/(1 + μ), at
μ = 0.9 a 19th of that. The last step was −η m = w(t) − w(t−1), so on the bowl w(t+1) = (1 + μ − η h) w(t) − μ w(t−1),
and w(t) is a sum of powers zᵗ of the roots of z² − (1 + μ − η h) z + μ (where they coincide, of zᵗ and t zᵗ). Both have
size √μ as long as (1 − √μ)² ≤ η h ≤ (1 + √μ)²: such an axis shrinks by √μ a step. All axes do with

    √μ = (√κ − 1)/(√κ + 1),  η = 4 / (√h_max + √h_min)²      and √κ steps do what took κ

Nesterov's variant steps along g + μ m: the momentum as it will be if the next gradient is like this one.

Adam gives every weight a rate of its own, from the size of its own gradients. m and v begin at 0, so the shares of past
gradients in them sum to 1 − βᵗ only, and m̂ and v̂ correct for that. The scale of g cancels: ten times the loss makes
the same step. If the gradients agree, |m̂| = √v̂ and w moves by η; if they are noise, m keeps (1 − β₁)/(1 + β₁) of their
variance, and w moves by 0.23 η (β₁ = 0.9), to and fro. At t = 1 the step is η sign(g), noise and all: one reason for
the warm-up. The price: Adam depends on the axes that the weights happen to lie on. A bowl along them is round to Adam,
the same bowl turned by 45° is not (demo).

AdamW shrinks all weights by the same share. L2, g ← g + λ w, does not under Adam: its λ w is divided by √v̂ too, so
weights with large gradients hardly decay.

Muon sees a matrix W of gradient G, where Adam sees numbers. Of all D of size 1, which step W ← W − η D lowers the
loss most, that is, has the largest ⟨G, D⟩ = Σ G_ij D_ij? That depends on what size means (arXiv:2409.20325):

    √Σ D_ij²                       D = G / ‖G‖_F                      gradient descent
    max |D_ij|                     D = sign(G)                        Adam with β₁ = β₂ = 0
    the largest singular value     D = U Vᵀ where G = U S Vᵀ          Muon

The last bounds by how much the output of a layer y = W x changes: ‖D x‖ ≤ ‖x‖ for every x. With u_k, v_k the columns of
U and V, s_k the singular values, ⟨G, D⟩ = Σ s_k u_kᵀ D v_k ≤ Σ s_k, and U Vᵀ reaches this bound, as each u_kᵀ U Vᵀ v_k
is 1. In a momentum a few s_k are far above the rest; U Vᵀ moves along all these directions alike. No SVD is needed: an
odd polynomial of a matrix acts on its singular values alone, (X Xᵀ) X = U S³ Vᵀ, and the five rounds bring all that
begin above 0.002 to between 0.68 and 1.21. They do not go to 1: a large `a`, which lifts the small ones quickly, was
worth more than that. The entries of U Vᵀ have a root mean square of 1/√max(rows, columns), so 0.2 √max(rows, columns)
U Vᵀ moves a weight by 0.2 η, about what AdamW does when the gradients are noise.

Which one, at which rate. Muon is the default by choice, not by a finding: no page here separates the two. AdamW, whose
step may be five times Muon's, wants a lower rate. Under AdamW clipping at 1 acted on 3 to 7 % of the steps, most of
them in the warm-up, and five seeds do not show that it changes the loss (results/grad-clip.md).

SGD, Adam and AdamW below are the plain form, to read and to test against; training runs torch's fused AdamW, which
computes the same in one pass over the memory. Muon is ours. Run it: `python optim.py`.
"""

import math
from functools import partial

import torch

from support.devices import in_float64
from support.errors import ConfigError
from support.output import run_demo
from support.per_tensor import PerTensor
from support.sharding import full_tensor, in_stacks

# ---------------------------------------------------------------------------------------------------------------
# One weight tensor w of any shape at a time: `update` changes it in place, given its gradient g, its memory `state` (a
# dict, empty at first) and the settings. PerTensor.step (support/per_tensor.py) calls it for each.


class SGD(PerTensor):
    """Gradient descent; with momentum, Polyak's or Nesterov's."""

    def __init__(self, params, lr, momentum=0.0, nesterov=False):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov)

    def update(self, w, g, state, lr, momentum, nesterov):
        m = state["m"] = momentum * state.get("m", 0) + g
        w -= lr * (g + momentum * m if nesterov else m)


class Adam(PerTensor):
    """arXiv:1412.6980, Algorithm 1. Its weight decay is the gradient of λ/2 ‖w‖² (L2), and so is divided by √v̂ too."""

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, w, g, state, lr, betas, eps, weight_decay):
        g = g + weight_decay * w
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
        v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w -= lr * m_hat / (v_hat.sqrt() + eps)


class AdamW(Adam):
    """arXiv:1711.05101, Algorithm 2: the decay is decoupled from the gradient. As in torch λ is multiplied by lr."""

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, w, g, state, lr, betas, eps, weight_decay):
        w *= 1 - lr * weight_decay
        super().update(w, g, state, lr, betas, eps, weight_decay=0.0)


# ---------------------------------------------------------------------------------------------------------------
# Muon: matrices of one shape are stacked and go through the rounds together.


def orthogonalise(matrices, rounds=5):
    """U S Vᵀ -> U S′ Vᵀ, S′ between 0.68 and 1.21 where S is above 0.002 ‖S‖: a stack of matrices (..., rows, columns),
    each by itself. Its products are in autocast's dtype, which is exact enough."""
    x = matrices.reshape(-1, *matrices.shape[-2:])  # (n, rows, columns)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1, or the polynomial blows up
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = x if wide else x.mT.contiguous()  # so that X Xᵀ is the smaller product
    for _ in range(rounds):
        gram = x @ x.mT  # (n, r, r), r the smaller of rows and columns
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # b gram + c gram @ gram
        x = torch.baddbmm(x, factor, x, beta=3.4445)  # a x + factor @ x
    return (x if wide else x.mT).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, orthogonalised, scaled to AdamW's size. Parameters are matrices, or stacks of them (experts,
    rows, columns). `in_stacks` puts those of one shape through the rounds together: small ones, one by one, do not fill
    the machine."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, weight_decay, ahead = group["lr"], group["weight_decay"], partial(self.nesterov, mu=group["momentum"])
            # for w in group["params"]: update = orthogonalise(ahead(w)), (..., rows, columns); but several w at once
            for w, update in in_stacks(group["params"], ahead, orthogonalise):
                w.mul_(1 - lr * weight_decay)
                w.add_(update, alpha=-0.2 * math.sqrt(max(w.shape[-2:])) * lr)

    def nesterov(self, w, mu):
        """X = (1 − μ) g + μ m, after m has taken g in."""
        state = self.state[w]
        if not state:
            state["momentum"] = torch.zeros_like(w.grad)
        m = state["momentum"].lerp_(w.grad, 1 - mu)  # m ← μ m + (1 − μ) g
        return w.grad.lerp(m, mu)


# ---------------------------------------------------------------------------------------------------------------
# The rate, the clip, and one step of training.


def lr_at(step, steps, peak, warmup, floor=0.1, schedule="cosine", decay=0.2):
    """Learning rate of step 0 … steps−1: up a line to `peak` in `warmup` steps, then down towards floor · peak, which
    step `steps` would have. ConfigError on a schedule that is not known.

    cosine (arXiv:1608.03983, one half-wave) and linear fall at once; wsd (arXiv:2404.06395, whose fall is exponential)
    falls in a line over the last `decay` share of the steps, or from the end of the warm-up if that is later. Until
    then it stays at the peak: a run can be continued from any checkpoint before the fall.
    """
    if schedule not in ("cosine", "linear", "wsd"):
        raise ConfigError(f"--schedule {schedule!r} is not known; use cosine, linear or wsd")
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, steps - decay * steps) if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (floor + (1 - floor) * share)


def clip_by_global_norm(gradients, clip):
    """Tensors of any shapes, in place: if ‖g‖ over all of them is above clip (> 0), all times clip / ‖g‖. Returns ‖g‖
    before. The plain form: `optimizer_step` calls torch's, which takes all tensors at once and knows sharded ones."""
    norm = math.sqrt(sum(in_float64(g).square().sum().item() for g in gradients))
    if norm > clip:
        for g in gradients:
            g *= clip / norm
    return norm


def make_optimizers(unwrapped, kind, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW for all that learns, or Muon for the blocks' matrices and AdamW for the rest. Returns a list. unwrapped:
    the model itself, not DDP's wrapper, which changes the names.

    Decay pulls towards zero; gains, biases and learned positions have no business there. A router's rows are the
    experts' labels, as an embedding's are the words': AdamW, like the embedding (results/moe_word.md).
    """
    if kind not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {kind!r} is not known; use adamw or muon")
    inner, decayed, undecayed = [], [], []
    for name, p in unwrapped.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or "learned" in name:  # "learned": positions
            undecayed.append(p)
        elif kind == "muon" and name.startswith("blocks.") and ".router." not in name:
            inner.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)] if groups else []
    return optimizers + ([Muon(inner, lr, weight_decay=weight_decay)] if inner else [])


def optimizer_step(unwrapped, optimizers, scaler, autocast, lr, clip):
    """Unscale, clip by the global norm (0: do not), step (Muon's products in autocast's dtype), clear. Returns the norm
    before clipping; if that is not finite, the weights stay as they are."""
    (norm,) = optimizer_steps([(unwrapped.parameters(), optimizers, lr)], scaler, autocast, clip)
    return norm


def optimizer_steps(parts, scaler, autocast, clip):
    """The same for several parts, each clipped by itself, such as a policy and its value network: (parameters,
    optimizers, lr) of each -> a norm of each. If one is not finite, no part steps."""
    norms = []
    for parameters, optimizers, lr in parts:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.unscale_(optimizer)  # before clipping: the norm of scaled gradients means nothing
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
        norms.append(full_tensor(norm).item())  # under FSDP, over all ranks' parts
    finite = all(map(math.isfinite, norms))  # all step or none: scaler.step looks at one optimizer at a time
    for _, optimizers, _ in parts:
        for optimizer in optimizers:
            if finite:
                with autocast():
                    scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
    scaler.update()  # half the scale after an overflow, twice after 2,000 steps without
    return norms


# ---------------------------------------------------------------------------------------------------------------
# The worked example.


def walk(optimizer, start, gradient, steps):
    """Run `steps` steps from `start` with g = gradient(t, w) -> the path (steps + 1, *shape). optimizer: a function of
    a list of parameters."""
    w = torch.nn.Parameter(start.clone())
    optimizer, path = optimizer([w]), [start]
    for t in range(steps):
        w.grad = gradient(t, w.detach())
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def demo():
    """Two steps of each optimizer by hand; a bowl; decay; which step Muon takes; clipping; the schedules."""
    torch.manual_seed(0)
    print("by hand: w = 1, η = 0.1, gradients 2 and then 1; μ, β₁, β₂ and λ are 0.5 each")
    optimizers = {
        "gradient descent": (lambda w: SGD(w, 0.1), 0.8, 0.7),
        "momentum": (lambda w: SGD(w, 0.1, 0.5), 0.8, 0.6),  # m = 2, then 0.5 · 2 + 1 = 2
        "Nesterov": (lambda w: SGD(w, 0.1, 0.5, nesterov=True), 0.7, 0.5),  # g + m/2 = 3, then 2
        # m = 1, then 1; v = 2, then 1.5: m̂/√v̂ = 2/2, then (4/3)/√2
        "Adam": (lambda w: Adam(w, 0.1, (0.5, 0.5)), 0.9, 0.9 - 0.1 * 4 / 3 / 2**0.5),
        "AdamW": (lambda w: AdamW(w, 0.1, (0.5, 0.5), weight_decay=0.5), 0.85, 0.85 * 0.95 - 0.1 * 4 / 3 / 2**0.5),
    }
    for name, (kind, first, second) in optimizers.items():
        path = walk(kind, torch.ones(1, dtype=torch.float64), lambda t, w: torch.full_like(w, 2 - t), 2)
        torch.testing.assert_close(path[:, 0], torch.tensor([1, first, second], dtype=torch.float64))
        print(f"  {name:<18}w = 1.0000  {first:.4f}  {second:.4f}")

    one = torch.ones(2, dtype=torch.float64)

    print("\nthe bowl ½ (100 x² + y²) from (1, 1), κ = 100: distance from the minimum after n steps")
    A = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    B = turn @ A @ turn.T
    paths = {
        "gradient descent, η = 2/101": walk(lambda w: SGD(w, 2 / 101), one, lambda t, w: A @ w, 100),
        "momentum (9/11)², η = 4/121": walk(lambda w: SGD(w, 4 / 121, (9 / 11) ** 2), one, lambda t, w: A @ w, 100),
        "Adam, η = 0.1": walk(lambda w: Adam(w, 0.1), one, lambda t, w: A @ w, 100),
        "Adam, the bowl turned by 45°": walk(lambda w: Adam(w, 0.1), turn @ one, lambda t, w: B @ w, 100),
    }
    print(f"  {'':<28}" + "".join(f"{f'n = {n}':>10}" for n in (1, 2, 10, 50, 100)))
    for name, path in paths.items():
        print(f"  {name:<28}" + "".join(f"{path[n].norm():>10.4f}" for n in (1, 2, 10, 50, 100)))
    descent, momentum, adam, turned = paths.values()
    torch.testing.assert_close(descent.abs(), (99 / 101) ** torch.arange(101.0).double()[:, None] * one)  # |1 − η h|
    torch.testing.assert_close(adam[:, 0], adam[:, 1])  # g is (100 x, y), the factor cancels: down the diagonal
    torch.testing.assert_close(adam[1], 0.9 * one)
    assert momentum[100].norm() < 1e-4 < adam[100].norm() < descent[100].norm() < turned[100].norm()

    print("\ndecay: two weights, 1 at first, whose gradients change sign each step; η λ = 0.001, 1,000 steps")
    swing = torch.tensor([10.0, 0.1], dtype=torch.float64)
    by_hand = {Adam: 0.999 ** (1000 / swing), AdamW: 0.999 ** (1000 * one)}  # divided by √v̂ = |gradient|, or not
    for kind, expected in by_hand.items():
        w = walk(partial(kind, lr=0.01, weight_decay=0.1), one, lambda t, w: swing * (-1) ** t, 1000)[-1]
        print(f"  {kind.__name__:<6}gradients ± 10: {w[0]:.2f}, by hand {expected[0]:.2f}", end="")
        print(f"    gradients ± 0.1: {w[1]:.2f}, by hand {expected[1]:.2f}")
        assert (w - expected).abs().max() < 0.02

    print("\nG = [[3, 0], [4, 5]] = U S Vᵀ, S = 3√5 and √5: which D of largest singular value 1 lowers the loss most?")
    G = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)  # GᵀG = [[25, 20], [20, 25]]: S² = 45 and 5
    UV = torch.tensor([[2.0, -1.0], [1.0, 2.0]], dtype=torch.float64) / math.sqrt(5)  # a rotation
    gains = []
    for name, D in (("G", G), ("sign(G)", G.sign()), ("U Vᵀ", UV)):
        D = D / torch.linalg.matrix_norm(D, 2)
        gains.append((G * D).sum().item())
        print(f"  {name:<9}singular values 1 and {torch.linalg.svdvals(D)[1]:.2f}    ⟨G, D⟩ = {gains[-1]:.3f}")
    assert abs(max(gains) - 4 * math.sqrt(5)) < 1e-9  # the sum of S
    print("singular values on their way to U Vᵀ, round by round (the first two rows: those of G / ‖G‖_F)")
    for x in (3 / math.sqrt(10), 1 / math.sqrt(10), 0.01, 0.001):
        matrix = torch.diag(torch.tensor([x, math.sqrt(1 - x**2)], dtype=torch.float64))
        rounds = [orthogonalise(matrix, n)[0, 0].item() for n in range(6)]
        print("  " + "".join(f"{y:>9.4f}" for y in rounds))
        assert abs(rounds[1] - (3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5)) < 1e-5

    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert clip_by_global_norm(gradients, 1.0) == 5  # √(3² + 4²), over both tensors
    torch.testing.assert_close(torch.cat(gradients), torch.tensor([0.6, 0.8]))
    print("\nclipping: gradients 3 and 4 of two tensors have the norm 5; clipped at 1 they are 0.6 and 0.8")

    print("\nlearning rate of steps 0 … 9: peak 1, two steps of warm-up, floor 0.1, wsd's decay 0.4")
    for schedule in ("cosine", "linear", "wsd"):
        rates = [lr_at(step, 10, 1.0, 2, schedule=schedule, decay=0.4) for step in range(10)]
        print(f"  {schedule:<7}" + "".join(f"{rate:>6.2f}" for rate in rates))
        assert abs(rates[8 if schedule == "wsd" else 6] - 0.55) < 1e-12  # halfway from 1 (step 6 or 2) to 0.1


if __name__ == "__main__":
    run_demo(demo)
