"""One decoding step with fewer, larger operations, and the CUDA graph; and who may use it."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from attention import Attention, KVCache
from norms import RMSNorm
from support.checks import only_declared
from support.hf import EXTENSIONS_OFF, MIXTURE_ONLY, TRAINING_ONLY
from transformer import Block, FeedForward, Transformer

# DecodeStep repeats the arithmetic of other classes, so it opts in: all that it computes is declared here, and a model
# with anything else, a field of the config, a module, a tensor, a hook, is left to its own forward. These fields may
# have any value:
READ = {"vocab_size", "context", "n_layer", "n_head", "n_kv_head", "head_dim", "width", "ffn_width", "norm_eps"}
READ |= {"rope_theta", "rope_scaling", "qk_norm", "qkv_bias", "tie_embeddings", *TRAINING_ONLY, *MIXTURE_ONLY}
# These must be so:
REQUIRED = {"norm": "rms", "norm_placement": "pre", "activation": "swiglu", "positions": "rope", "bias": False}
REQUIRED |= EXTENSIONS_OFF
# And no module may be of another class, nor do anything but that class's forward as it is when this file is read:
MODULES = {"": Transformer, "embed": nn.Embedding, "dropout": nn.Dropout, "norm": RMSNorm, "head": nn.Linear}
MODULES |= {"blocks": nn.ModuleList, "blocks.{}": Block, "blocks.{}.norm1": RMSNorm, "blocks.{}.norm2": RMSNorm}
MODULES |= {"blocks.{}.attn": Attention, "blocks.{}.ffn": FeedForward, "blocks.{}.dropout": nn.Dropout}
MODULES |= {f"blocks.{{}}.attn.{name}": nn.Linear for name in ("wq", "wk", "wv", "wo")}
MODULES |= {f"blocks.{{}}.attn.{name}": RMSNorm for name in ("q_norm", "k_norm")}
MODULES |= {f"blocks.{{}}.ffn.{name}": nn.Linear for name in ("gate", "up", "down")}
METHODS = ("forward", "hidden")
ARITHMETIC = {kind: [getattr(kind, name, None) for name in METHODS] for kind in MODULES.values()}
TENSORS = {"weight", "bias", "rope_cos", "rope_sin"}


def computed_here(name, module, config):
    """Whether a model's module of this name is one whose arithmetic DecodeStep repeats."""
    kind = MODULES.get(re.sub(r"^blocks\.\d+", "blocks.{}", name))
    if kind is None or module._forward_hooks or module._forward_pre_hooks or vars(module).keys() & {*METHODS}:
        return False
    if vars(type(module)).get("acts_as") is kind:  # LoRALinear
        return True
    same = [getattr(type(module), name, None) for name in METHODS] == ARITHMETIC[kind]
    usual = getattr(module, "window", None) is None and getattr(module, "eps", config.norm_eps) == config.norm_eps
    return same and usual and module._parameters.keys() | module._buffers.keys() <= TENSORS


def add_product(x, h, weight):
    """x += h @ weight, in one operation where the dtypes allow it."""
    if x.dtype == h.dtype:
        x.addmm_(h, weight)
    else:
        x.add_(h @ weight)


class Decoder:
    """Rows that go on after their prompts: a token of each, (B,) -> the logits of the next, (B, V). By StaticStep or
    DecodeStep if the model is one that they compute, else by the model itself."""

    def __init__(self, model, cache, position, visible=None, static=False):
        """cache: filled from the prompts, with room for what is to come. position: of the last token read, (B,), or
        (1,) if all rows share it. visible (B, slots) bool: which slots of the cache hold, or will hold, real tokens;
        None = all, if no row is padded. static: by StaticStep."""
        self.model, self.cache, self.position, self.visible = model, cache, position, visible
        self.step = DecodeStep(model, cache) if DecodeStep.fits(model, cache) else None
        self.static = None
        if static and self.step is not None:
            self.make_static()
        # The share of rows that may be left when the others leave the batch: copying the survivors costs about a step,
        # recording a graph for them about four.
        self.patience = 0.75 if self.static is None else 0.5

    def make_static(self):
        rows, slots = self.cache.store.shape[2], self.cache.store.shape[4]
        visible = self.position.new_ones(rows, slots, dtype=torch.bool) if self.visible is None else self.visible
        self.static = StaticStep(self.step, visible)

    def keep(self, rows):
        """Drop all but the rows of this index."""
        self.cache.keep(rows)
        if self.visible is not None:
            self.position, self.visible = self.position[rows], self.visible[rows]
        if self.static is not None:
            self.make_static()

    def __call__(self, token):
        self.position = self.position + 1
        if self.static is not None:
            return self.static(token, self.position)
        shown = None if self.visible is None else self.visible[:, : self.cache.length + 1]
        if self.step is not None:
            return self.step(token, self.position, shown)
        return self.model(token[:, None], self.position[:, None], shown, self.cache)[:, -1]


class DecodeStep:
    """Transformer.forward for one new token per row: token (B,), position (B,) or (1,) -> logits (B, V).

    For RMSNorm, SwiGLU and RoPE (Llama, Qwen). Fewer and larger operations: the three products of q, k and v become
    one, those of gate and up too; the gains of the norms, their √C and 1/√D are multiplied beforehand into the matrices
    that read them, those of q and k into the tables of RoPE; keys and values are written at once; keys of one head meet
    all queries that share them in one batched product. In fp32 the matrices for 4 rows and more lie transposed, (in,
    out), and the output matrix always: of 4 to 32 rows x @ W of such a W takes two thirds to four fifths of the time of
    x @ weight.T (MKL, 2 cores), while in bf16 (oneDNN) it takes up to a fifth longer. Built anew by each `generate`, in
    about the time of a few steps, because the weights may have changed since: a second copy of them, in the dtype of
    autocast, where that is on. Attention computes in the dtype of the cache.
    """

    @staticmethod
    def fits(model, cache):
        """Whether this model is one that is computed here, from what is declared above, and with a KVCache."""
        declared = type(cache) is KVCache and only_declared(model.config, READ, REQUIRED)
        return declared and all(computed_here(name, module, model.config) for name, module in model.named_modules())

    def __init__(self, model, cache):
        c = model.config
        self.config, self.cache, device = c, cache, model.embed.weight.device
        dtype, H, G, D = cache.store.dtype, c.n_head, c.n_kv_head, c.head_dim
        matrices = model.embed.weight.dtype
        if torch.is_autocast_enabled(device.type):
            matrices = torch.get_autocast_dtype(device.type)
        self.eps = {n: torch.tensor((n * c.norm_eps) ** 0.5, device=device) for n in (c.width, D)}
        self.embed, self.layers, gains, root = model.embed.weight, [], [], c.width**0.5

        def matrix(*weights, gain=None, few=cache.store.shape[2] < 4):
            """Weights (out, in) -> one matrix (in, sum of outs), with the gains and √C of the norm in front in it."""
            transposed = matrices == torch.float32 and not few
            if len(weights) == 1 and gain is None and not transposed:
                return weights[0].to(matrices).t()
            outs, size = [len(weight) for weight in weights], weights[0].shape[1]
            whole = weights[0].new_empty((size, sum(outs)) if transposed else (sum(outs), size), dtype=matrices)
            whole = whole if transposed else whole.t()
            for weight, part in zip(weights, whole.split(outs, dim=1), strict=True):
                if gain is None:
                    part.copy_(weight.t())
                else:
                    torch.mul(weight.t(), (root * gain)[:, None], out=part)
            return whole

        for block in model.blocks:
            a, f, scale = block.attn, block.ffn, D**-0.5
            qkv = matrix(a.wq.weight, a.wk.weight, a.wv.weight, gain=block.norm1.weight)  # (C, (H + 2G)·D)
            gate_up = matrix(f.gate.weight, f.up.weight, gain=block.norm2.weight)  # (C, 2 · inner)
            bias = None if a.wq.bias is None else torch.cat([a.wq.bias, a.wk.bias, a.wv.bias]).to(matrices)
            if a.q_norm is not None:
                gain = torch.cat([a.q_norm.weight.expand(H, D) * scale, a.k_norm.weight.expand(G, D)]) * D**0.5
            else:
                gain = torch.cat([torch.full((H, D), scale), torch.ones(G, D)]).to(device)  # (H + G, D)
            wo, down = matrix(a.wo.weight), matrix(f.down.weight)
            self.layers.append((qkv, wo, gate_up, down, bias))
            gains.append(gain.to(dtype))
        output = self.embed if model.head is None else model.head.weight
        self.output = matrix(*output.split(1024), gain=model.norm.weight, few=False)  # (C, V)
        signs = torch.ones(D, device=device)
        signs[: D // 2] = -1.0  # (a, b) -> (a, b) cos + (b, a) (−sin, sin): see positional.rotate
        self.cos, self.sin = model.rope_cos.to(dtype), (model.rope_sin * signs).to(dtype)  # (context, D)
        gains = torch.stack(gains)[:, None]  # (layers, 1, H + G, D)
        self.gains = gains, gains.roll(D // 2, -1)  # of (a, b) and of (b, a)

    def unit(self, x):
        """norms.RMSNorm of n numbers without its gain and its √n: x / √(|x|² + n·ε), in fp32. (..., n) -> (..., n)"""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return x / torch.hypot(norm, self.eps[x.shape[-1]])

    def __call__(self, token, position, visible=None):
        """visible (B, S + 1) bool: which slots hold real tokens, None = all. Fills the next slot of the cache."""
        S = self.cache.length = self.cache.length + 1
        return self.compute(token, position, visible, S - 1, S)

    def compute(self, token, position, visible, slot, S):
        """The step with keys and values written into `slot` of the cache, a number or a tensor of one, and the first S
        slots read."""
        with torch.autocast(token.device.type, enabled=False):  # it would convert again in every call
            return self._compute(token, position, visible, slot, S)

    def _compute(self, token, position, visible, slot, S):
        c, store, fixed = self.config, self.cache.store, isinstance(slot, torch.Tensor)
        H, G, D, B = c.n_head, c.n_kv_head, c.head_dim, len(token)
        x = F.embedding(token, self.embed)  # (B, C), in fp32 under autocast, as in the model
        turns = zip((self.cos, self.sin), self.gains, strict=True)  # RoPE with the gains in it, for all layers
        cos, sin = ((F.embedding(position, table)[:, None] * gain).unbind() for table, gain in turns)  # (B, H + G, D)
        kv = store.view(c.n_layer, 2, B * G, -1, D)[:, :, :, :S]
        keys, values = kv[:, 0].mT.unbind(), kv[:, 1].unbind()  # of each layer (B·G, D, S), (B·G, S, D)
        new = (store if fixed else store[:, :, :, :, slot]).unbind()  # of each layer (2, B, G, D)
        if visible is not None:
            hidden = self.cos.new_zeros(B, S).masked_fill(~visible, -torch.inf)
            hidden = hidden[:, None, None].expand(B, G, 1, S).reshape(B * G, 1, S)
        for i, (qkv, wo, gate_up, down, bias) in enumerate(self.layers):
            h = self.unit(x).to(qkv.dtype) @ qkv  # (B, (H + 2G)·D)
            h = (h if bias is None else h + bias).to(store.dtype).view(B, H + 2 * G, D)
            qk, k_v = h[:, : H + G], h[:, H:].view(B, 2, G, D).transpose(0, 1)  # k and v: (2, B, G, D)
            n = self.unit(qk) if c.qk_norm else qk
            torch.addcmul(n * cos[i], n.roll(D // 2, -1), sin[i], out=qk)
            if fixed:
                new[i].index_copy_(3, slot, k_v.unsqueeze(3))
            else:
                new[i].copy_(k_v)
            scores = torch.bmm(h[:, :H].reshape(B * G, H // G, D), keys[i])  # (B·G, H/G, S)
            if visible is not None:
                scores += hidden
            heads = torch.bmm(torch.softmax(scores, -1, out=scores), values[i])  # (B·G, H/G, D)
            add_product(x, heads.view(B, H * D).to(wo.dtype), wo)
            gate, up = (self.unit(x).to(gate_up.dtype) @ gate_up).chunk(2, -1)  # (B, inner) each
            add_product(x, F.silu(gate).mul_(up), down)
        return self.unit(x).to(self.output.dtype) @ self.output  # (B, V)


class StaticStep:
    """A DecodeStep whose tensors keep their shapes and addresses from one token to the next, as a CUDA graph needs it:
    it reads all slots of the cache and hides those that are not written yet.

    Recorded once, a step of many kernels is then started by one call. Without a GPU the same is computed step by step.
    (The recording has not been run on a GPU yet.)
    """

    def __init__(self, step, visible):
        """visible (B, slots) bool: which slots of the cache hold, or will hold, real tokens."""
        self.step, self.visible, (B, slots) = step, visible, visible.shape
        self.token, self.position, self.slot = (visible.new_zeros(n, dtype=torch.long) for n in (B, B, 1))
        self.slots, self.graph = torch.arange(slots, device=visible.device), None
        step.cache.store[..., step.cache.length :, :] = 0.0  # memory that nobody wrote may hold NaN, and 0 · NaN is NaN
        if visible.is_cuda:
            with torch.cuda.device(visible.device):  # streams are those of the current GPU
                self.record()

    def record(self):
        self.slot.fill_(self.step.cache.length)  # what the trial runs write here the first step overwrites
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in their first calls, which no graph can hold
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has a thread of its own
            self.logits = self.compute()

    def compute(self):
        visible = self.visible & (self.slots <= self.slot)
        return self.step.compute(self.token, self.position, visible, self.slot, len(self.slots))

    def __call__(self, token, position, visible=None):
        """As DecodeStep, but `visible` was given beforehand. The next call overwrites the logits (B, V)."""
        self.token.copy_(token)
        self.position.copy_(position)
        self.slot.fill_(self.step.cache.length)
        self.step.cache.length += 1
        if self.graph is None:
            return self.compute()
        with torch.cuda.device(self.visible.device):
            self.graph.replay()
        return self.logits
