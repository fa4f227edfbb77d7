"""One decoding step with fewer, larger operations, the CUDA graph of it, and the check of which models may use it."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from attention import Attention, KVCache
from norms import RMSNorm
from support.checks import only_declared
from support.devices import attention_dtype, product_dtype, traits
from support.hf import EXTENSIONS_OFF, MIXTURE_ONLY, TRAINING_ONLY
from support.products import own_attributes
from transformer import Block, FeedForward, Transformer

# DecodeStep repeats the arithmetic of other classes, so it is used only for models that it is known to compute. All
# that it supports is declared here; a model with any other config field, module, tensor or hook runs its own forward.
# These fields may have any value:
ANY_VALUE = {"vocab_size", "context", "n_layer", "n_head", "n_kv_head", "head_dim", "width", "ffn_width", "norm_eps"}
ANY_VALUE |= {"rope_theta", "rope_scaling", "qk_norm", "qkv_bias", "tie_embeddings", *TRAINING_ONLY, *MIXTURE_ONLY}
# These must have these values:
REQUIRED = {"norm": "rms", "norm_placement": "pre", "activation": "swiglu", "positions": "rope", "bias": False}
REQUIRED |= EXTENSIONS_OFF
# Every module must be of the class given here, with the methods that the class has when this file is imported:
MODULES = {"": Transformer, "embed": nn.Embedding, "dropout": nn.Dropout, "norm": RMSNorm, "head": nn.Linear}
MODULES |= {"blocks": nn.ModuleList, "blocks.{}": Block, "blocks.{}.norm1": RMSNorm, "blocks.{}.norm2": RMSNorm}
MODULES |= {"blocks.{}.attn": Attention, "blocks.{}.ffn": FeedForward, "blocks.{}.dropout": nn.Dropout}
MODULES |= {f"blocks.{{}}.attn.{name}": nn.Linear for name in ("wq", "wk", "wv", "wo")}
MODULES |= {f"blocks.{{}}.attn.{name}": RMSNorm for name in ("q_norm", "k_norm")}
MODULES |= {f"blocks.{{}}.ffn.{name}": nn.Linear for name in ("gate", "up", "down")}
METHODS = ("forward", "hidden", "output")
ORIGINAL_METHODS = {kind: [getattr(kind, name, None) for name in METHODS] for kind in MODULES.values()}
TENSORS = {"weight", "bias", "rope_cos", "rope_sin"}


def is_supported(name, module, config):
    """Whether DecodeStep repeats the arithmetic of a model's module of this name."""
    kind = MODULES.get(re.sub(r"^blocks\.\d+", "blocks.{}", name))
    if kind is None or module._forward_hooks or module._forward_pre_hooks or own_attributes(module) & {*METHODS}:
        return False
    if vars(type(module)).get("acts_as") is kind:  # LoRALinear
        return True
    same_methods = [getattr(type(module), name, None) for name in METHODS] == ORIGINAL_METHODS[kind]
    plain = getattr(module, "window", None) is None and getattr(module, "eps", config.norm_eps) == config.norm_eps
    return same_methods and plain and module._parameters.keys() | module._buffers.keys() <= TENSORS


def add_product(x, h, weight):
    """x += h @ weight, in one operation where the dtypes allow it."""
    if x.dtype == h.dtype:
        x.addmm_(h, weight)
    else:
        x.add_(h @ weight)


def decoding_dtype(model, cache):
    """The dtype in which a Decoder should hold its cache, None = as it is. The step reads all keys and values for one
    token per sequence, so their size is its time: it takes them in the dtype of the products, unless the device is
    slower at bf16. A model that runs its own forward needs them in that of attention."""
    if not DecodeStep.fits(model, cache):
        return None
    weight = model.embed.weight
    return product_dtype(weight) if traits(weight).bf16_cache else attention_dtype(weight)


class Decoder:
    """Decodes B sequences after their prompts: the last token of each, (B,) -> the logits of the next, (B, V). Uses
    StaticStep or DecodeStep if they support the model, else the model's own forward."""

    def __init__(self, model, cache, position, visible=None, static=False):
        """cache: filled from the prompts, with room for the new tokens. position: of the last token read, (B,), or (1,)
        if all sequences share it. visible (B, slots) bool: the slots of the cache that hold or will hold real tokens;
        None = all, if no sequence is padded. static: use StaticStep."""
        self.model, self.cache, self.position, self.visible = model, cache, position, visible
        self.step = DecodeStep(model, cache) if DecodeStep.fits(model, cache) else None
        self.static = None
        if static and self.step is not None:
            self.make_static()
        # Finished sequences leave the batch once at most this share of it is still running. Copying the running ones
        # costs time, recording a new graph for them more.
        self.shrink_below = 0.75 if self.static is None else 0.5

    def make_static(self):
        B, slots = self.cache.store.shape[2], self.cache.store.shape[4]
        visible = self.position.new_ones(B, slots, dtype=torch.bool) if self.visible is None else self.visible
        self.static = StaticStep(self.step, visible)

    def keep(self, rows):
        """Drop all sequences except those with these indices."""
        self.cache.keep(rows)
        if self.visible is not None:
            self.position, self.visible = self.position[rows], self.visible[rows]
        if self.static is not None:
            self.make_static()

    def __call__(self, token):
        self.position = self.position + 1
        if self.static is not None:
            return self.static(token, self.position)
        visible = None if self.visible is None else self.visible[:, : self.cache.length + 1]
        if self.step is not None:
            return self.step(token, self.position, visible)
        return self.model(token[:, None], self.position[:, None], visible, self.cache)[:, -1]


class DecodeStep:
    """Transformer.forward for one new token per sequence: token (B,), position (B,) or (1,) -> logits (B, V).

    Supports RMSNorm, SwiGLU and RoPE (Llama, Qwen). Fewer and larger operations:

    - one matrix product for q, k and v, and one for gate and up;
    - the norms' gains, √C and 1/√D are multiplied into the matrices that follow; those of q and k into RoPE's tables;
    - keys and values are written together;
    - one batched product per key head for all queries that share it, or on a CPU in bf16 SDPA.

    In fp32 the output matrix, and from 4 sequences on every matrix, is stored transposed, (in, out): for 4 to 32
    sequences x @ W is then faster than x @ weight.T (MKL). In bf16 (oneDNN) it would be slower. Each `generate` builds
    this step again, because the weights may have changed; that takes as long as some steps and holds a second copy of
    the weights, in autocast's dtype where it is on.
    Attention multiplies in the dtype of the cache; queries and keys are rotated in that of the model's attention.
    """

    @staticmethod
    def fits(model, cache):
        """Whether the declarations above cover this model, the cache is a KVCache, and the device may use the step."""
        if not traits(model.embed.weight).decode_step:
            return False
        declared = type(cache) is KVCache and only_declared(model.config, ANY_VALUE, REQUIRED)
        return declared and all(is_supported(name, module, model.config) for name, module in model.named_modules())

    def __init__(self, model, cache):
        c = model.config
        self.config, self.cache, device = c, cache, model.embed.weight.device
        dtype, H, G, D = attention_dtype(model.embed.weight), c.n_head, c.n_kv_head, c.head_dim
        matrices = product_dtype(model.embed.weight)
        self.eps = {n: torch.tensor((n * c.norm_eps) ** 0.5, device=device) for n in (c.width, D)}
        self.embed, self.layers, gains, root = model.embed.weight, [], [], c.width**0.5

        def matrix(*weights, gain=None, few=cache.store.shape[2] < 4):
            """Weights (out, in) -> one matrix (in, sum of outs), multiplied by the gains and √C of the preceding
            norm."""
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
        """norms.RMSNorm of n numbers without its gain and its factor √n: x / √(|x|² + n·ε), in fp32. (..., n) -> (...,
        n)"""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return x / torch.hypot(norm, self.eps[x.shape[-1]])

    def __call__(self, token, position, visible=None):
        """visible (B, S + 1) bool: the slots that hold real tokens, None = all. Fills the next slot of the cache."""
        S = self.cache.length = self.cache.length + 1
        return self.compute(token, position, visible, S - 1, S)

    def compute(self, token, position, visible, slot, S):
        """One step that writes keys and values into `slot` of the cache (an int, or a tensor of one int) and reads the
        first S slots."""
        with torch.autocast(token.device.type, enabled=False):  # autocast would convert the matrices in every call
            return self._compute(token, position, visible, slot, S)

    def _compute(self, token, position, visible, slot, S):
        c, store, static = self.config, self.cache.store, isinstance(slot, torch.Tensor)
        H, G, D, B = c.n_head, c.n_kv_head, c.head_dim, len(token)
        x = F.embedding(token, self.embed)  # (B, C), in fp32 under autocast, as in the model
        turns = zip((self.cos, self.sin), self.gains, strict=True)  # RoPE with the gains in it, for all layers
        cos, sin = ((F.embedding(position, table)[:, None] * gain).unbind() for table, gain in turns)  # (B, H + G, D)
        kv = store.view(c.n_layer, 2, B * G, -1, D)[:, :, :, :S]
        keys, values = kv[:, 0].mT.unbind(), kv[:, 1].unbind()  # of each layer (B·G, D, S), (B·G, S, D)
        new = (store if static else store[:, :, :, :, slot]).unbind()  # of each layer (2, B, G, D)
        by_sdpa, hidden = store.dtype == torch.bfloat16 and traits(x).decodes_by_sdpa, None
        if visible is not None:
            hidden = store.new_zeros(B, 1, 1, S).masked_fill(~visible[:, None, None], -torch.inf)
            hidden = hidden if by_sdpa else hidden.expand(B, G, 1, S).reshape(B * G, 1, S)
        for i, (qkv, wo, gate_up, down, bias) in enumerate(self.layers):
            h = self.unit(x).to(qkv.dtype) @ qkv  # (B, (H + 2G)·D)
            h = (h if bias is None else h + bias).to(self.cos.dtype).view(B, H + 2 * G, D)
            qk, k_v = h[:, : H + G], h[:, H:].view(B, 2, G, D).transpose(0, 1)  # k and v: (2, B, G, D)
            n = self.unit(qk) if c.qk_norm else qk
            torch.addcmul(n * cos[i], n.roll(D // 2, -1), sin[i], out=qk)
            if static:
                new[i].index_copy_(3, slot, k_v.unsqueeze(3).to(store.dtype))
            else:
                new[i].copy_(k_v)
            q = h[:, :H].to(store.dtype)  # (B, H, D)
            if by_sdpa:
                k, v = store[i, :, :, :, :S]  # (B, G, S, D) each
                heads = F.scaled_dot_product_attention(q[:, :, None], k, v, hidden, scale=1.0, enable_gqa=H > G)
            else:
                scores = torch.bmm(q.reshape(B * G, H // G, D), keys[i])  # (B·G, H/G, S)
                if visible is not None:
                    scores += hidden
                heads = torch.bmm(torch.softmax(scores, -1, out=scores), values[i])  # (B·G, H/G, D)
            add_product(x, heads.reshape(B, H * D).to(wo.dtype), wo)
            gate, up = (self.unit(x).to(gate_up.dtype) @ gate_up).chunk(2, -1)  # (B, inner) each
            add_product(x, F.silu(gate).mul_(up), down)
        return self.unit(x).to(self.output.dtype) @ self.output  # (B, V)


class StaticStep:
    """A DecodeStep whose tensors keep their shapes and addresses from token to token, as a CUDA graph requires. It
    reads all slots of the cache and masks those that are not written yet.

    The graph is recorded once; after that, one call starts all kernels of a step. Without a GPU the same operations run
    one by one. (The recording has not been run on a GPU yet.)
    """

    def __init__(self, step, visible):
        """visible (B, slots) bool: the slots of the cache that hold or will hold real tokens."""
        self.step, self.visible, (B, slots) = step, visible, visible.shape
        self.token, self.position, self.slot = (visible.new_zeros(n, dtype=torch.long) for n in (B, B, 1))
        self.slots, self.graph = torch.arange(slots, device=visible.device), None
        step.cache.store[..., step.cache.length :, :] = 0.0  # unwritten memory may hold NaN, and 0 · NaN is NaN
        if traits(visible).cuda_graphs:
            with torch.cuda.device(visible.device):  # a stream belongs to the current GPU
                self.record()

    def record(self):
        self.slot.fill_(self.step.cache.length)  # the first real step overwrites what the warm-up writes here
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # libraries initialise in their first calls, which a graph cannot record
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL runs its own thread
            self.logits = self.compute()

    def compute(self):
        visible = self.visible & (self.slots <= self.slot)
        return self.step.compute(self.token, self.position, visible, self.slot, len(self.slots))

    def __call__(self, token, position):
        """As DecodeStep, with the `visible` of its construction. The next call overwrites the logits (B, V)."""
        self.token.copy_(token)
        self.position.copy_(position)
        self.slot.fill_(self.step.cache.length)
        self.step.cache.length += 1
        if self.graph is None:
            return self.compute()
        with torch.cuda.device(self.visible.device):
            self.graph.replay()
        return self.logits
