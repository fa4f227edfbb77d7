"""The decoder: token ids in, a distribution over the next token out, and Hugging Face checkpoints both ways.

    x₀ = E[tokens]                                                          (B, T, C)
    x ← x + Attention(Norm(x)),   x ← x + FeedForward(Norm(x))              per block, pre-norm
    logits = Norm(x) Eᵀ                                                     (B, T, V), embeddings tied

Everything that a modern recipe varies is one field of `TransformerConfig`. The default is Qwen3's layout
(arXiv:2505.09388): RMSNorm, RoPE, grouped-query attention with QK-norm, SwiGLU, tied embeddings, no biases.
GPT-2's (LayerNorm, learned positions, GELU, biases) is `gpt2_config(...)`, one call away. What each choice does:

* pre-norm leaves the residual stream an open road from the loss to every layer, so depth trains without care;
  post-norm, `x ← Norm(x + f(x))` (Vaswani et al. 2017), rescales that road at every block and needs a warm-up.
* SwiGLU, `down(silu(gate x) ⊙ up x)` (arXiv:2002.05202), has three matrices where GELU's has two, so at equal
  parameters its inner width is 2/3 of the usual 4C.
* the matrices that write into the residual stream (`wo`, `down`) start smaller by √(2 n_layer), so that the sum
  of all 2 n_layer branches has the variance of one (GPT-2).

`token_logprobs` is the one place where log π(token) is computed, for pretraining, SFT and every RL stage:
shift, gather, temperature. It asks the model for the log-probabilities of given targets instead of logits, so
that a large vocabulary never holds a (B, T, V) tensor in fp32, and a DDP-wrapped model still sees a plain forward.

A checkpoint is a directory: `config.json` and `model.safetensors` in Hugging Face's names, so `transformers` opens
what we save and we open Qwen3 and GPT-2 as published. A config that neither can express is saved the same way
under our own `model_type`.

Letters: B batch, T time, S key time, C width, H heads, G key/value heads, D head width, V vocabulary.
Run it: `python transformer.py` checks the cache, the parameter count and the loss at birth.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Attention, KVCache, padding_mask
from norms import LayerNorm, RMSNorm
from positional import LearnedPositions, rope_cos_sin, rope_frequencies, sinusoidal_positions


class CheckpointError(ValueError):
    """A checkpoint or a model config that cannot be used: one line says what is wrong, where, and what to do."""


@dataclass
class TransformerConfig:
    """The architecture. The defaults are a 1.8 M-parameter model that trains on two CPU cores."""

    vocab_size: int = 512  # V; the training scripts take it from the tokenizer
    context: int = 256
    """Longest sequence in tokens."""
    n_layer: int = 4
    """Number of blocks."""
    n_head: int = 6
    """Query heads H."""
    n_kv_head: int = 2
    """Key/value heads G; each serves n_head / n_kv_head query heads."""
    width: int = 192
    """Width C of the residual stream."""
    head_dim: int | None = None
    """Width D of one head; default width / n_head."""
    ffn_width: int | None = None
    """Inner width of the feed-forward; default 4 C, or 8/3 C for SwiGLU's three matrices, in multiples of 32."""
    activation: str = "swiglu"
    """Feed-forward: swiglu or gelu."""
    norm: str = "rms"
    """Normalisation: rms or layer."""
    norm_placement: str = "pre"
    """Where it stands: pre, post, or sandwich (before and after each branch)."""
    norm_eps: float = 1e-6
    """Added to the variance before the root."""
    positions: str = "rope"
    """Positions: rope, learned, sinusoidal or none."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: dict | None = None
    """RoPE beyond the trained length, as Hugging Face writes it: {rope_type: yarn, factor: 4.0, ...}."""
    window: int | None = None
    """Sliding window: a query sees itself and the window - 1 tokens before it; none is all of them."""
    sinks: int = 0
    """With a window: the first so many tokens stay visible (attention sinks)."""
    qk_norm: bool = True
    """RMSNorm on each query and key head."""
    bias: bool = False
    """Biases in the linear layers and in LayerNorm."""
    qkv_bias: bool | None = None
    """Biases on queries, keys and values (Qwen2); default as `bias`."""
    tie_embeddings: bool = True
    """The output matrix is the embedding matrix."""
    dropout: float = 0.0
    """Dropout on the embeddings and on each branch."""
    n_expert: int = 0
    """Experts E of a mixture-of-experts feed-forward; 0 is dense."""
    n_expert_active: int = 2
    """Experts K that each token is sent to."""
    expert_width: int | None = None
    """Inner width of one expert; default such that the active ones together are as wide as ffn_width."""
    n_shared_expert: int = 0
    """Experts that every token passes through besides."""
    moe_every: int = 1
    """Every so many-th block is a mixture, the others are dense."""
    norm_topk_prob: bool = True
    """Whether the K weights of a token are scaled to sum to 1."""
    balancing: str = "aux"
    """What keeps the experts' loads even: aux (a loss), bias (on the router, no loss) or none."""
    capacity_factor: float | None = None
    """Most tokens of an expert in multiples of its even share, the rest are dropped; default dropless."""

    def __post_init__(self):
        choices = {
            "activation": ("swiglu", "gelu"),
            "norm": ("rms", "layer"),
            "norm_placement": ("pre", "post", "sandwich"),
            "positions": ("rope", "learned", "sinusoidal", "none"),
            "balancing": ("aux", "bias", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        least = dict.fromkeys(("vocab_size", "context", "n_layer", "n_head", "n_kv_head", "width", "head_dim"), 1)
        least |= dict.fromkeys(("ffn_width", "window", "expert_width", "n_expert_active", "moe_every"), 1)
        least |= dict.fromkeys(("sinks", "n_expert", "n_shared_expert"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name in ("head_dim", "ffn_width", "window", "expert_width"):
                continue
            if not isinstance(value, int) or value < bound:
                raise CheckpointError(f"{name} is {value!r}; it must be a whole number of at least {bound}")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise CheckpointError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.n_head % self.n_kv_head:
            raise CheckpointError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim is None and self.width % self.n_head:
            raise CheckpointError(f"width {self.width} is not a multiple of n_head {self.n_head}")
        if self.positions == "rope" and self.resolved().head_dim % 2:
            raise CheckpointError(f"RoPE rotates pairs, but head_dim is {self.resolved().head_dim}; it must be even")
        if self.rope_scaling is not None and (self.positions != "rope" or not isinstance(self.rope_scaling, dict)):
            raise CheckpointError(f"rope_scaling is {self.rope_scaling!r}; it takes a dict, and positions of rope")
        if self.sinks and self.window is None:
            raise CheckpointError(f"sinks is {self.sinks}, but without a window every token is visible anyway")
        if self.n_expert and self.n_expert_active > self.n_expert:
            raise CheckpointError(f"n_expert_active is {self.n_expert_active}, but n_expert is only {self.n_expert}")
        if self.n_expert and self.moe_every > self.n_layer:
            raise CheckpointError(f"moe_every is {self.moe_every}: no block of {self.n_layer} would be a mixture")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise CheckpointError(f"capacity_factor is {self.capacity_factor}; it must be above 0")

    def resolved(self):
        """The same with the defaults that follow from other fields filled in. Not done in place: a default taken
        from one width must not survive a change of width."""
        head_dim, ffn_width = self.head_dim or self.width // self.n_head, self.ffn_width
        expert_width, qkv_bias = self.expert_width, self.bias if self.qkv_bias is None else self.qkv_bias
        if ffn_width is None:
            wanted = self.width * 8 / 3 if self.activation == "swiglu" else self.width * 4
            ffn_width = 32 * max(1, round(wanted / 32))
        if expert_width is None and self.n_expert:
            expert_width = max(1, ffn_width // (self.n_expert_active + self.n_shared_expert))
        filled = dict(head_dim=head_dim, ffn_width=ffn_width, expert_width=expert_width, qkv_bias=qkv_bias)
        if all(getattr(self, name) == value for name, value in filled.items()):
            return self
        return replace(self, **filled)


def gpt2_config(**changes):
    """GPT-2's layout: LayerNorm, learned positions, GELU, biases, one key/value head per query head."""
    config = dict(norm="layer", norm_eps=1e-5, positions="learned", activation="gelu", qk_norm=False, bias=True)
    config |= {"n_kv_head": changes.get("n_head", TransformerConfig.n_head)} | changes
    return TransformerConfig(**config)


def make_norm(config):
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return LayerNorm(config.width, config.norm_eps, config.bias)


class FeedForward(nn.Module):
    """Each token by itself: widen, bend, narrow. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        C, inner = config.width, config.ffn_width
        self.gate = nn.Linear(C, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.up = nn.Linear(C, inner, bias=config.bias)
        self.down = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x):
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2 was trained with the tanh form


class Block(nn.Module):
    """Attention moves information between tokens, the feed-forward works on each; both add to the stream."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.attn = Attention(c.width, c.n_head, c.n_kv_head, c.head_dim, c.qkv_bias, c.qk_norm, c.norm_eps)
        if c.bias != c.qkv_bias:
            self.attn.wo = nn.Linear(c.n_head * c.head_dim, c.width, bias=c.bias)
        self.ffn = FeedForward(config)
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        if c.norm_placement == "sandwich":
            self.norm1_out, self.norm2_out = make_norm(config), make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.placement = c.norm_placement

    def forward(self, x, rope, mask, cache, layer):
        if self.placement == "post":
            x = self.norm1(x + self.dropout(self.attn(x, rope, mask, cache, layer)))
            return self.norm2(x + self.dropout(self.ffn(x)))
        a = self.attn(self.norm1(x), rope, mask, cache, layer)  # (B, T, C)
        x = x + self.dropout(self.norm1_out(a) if self.placement == "sandwich" else a)
        f = self.ffn(self.norm2(x))
        return x + self.dropout(self.norm2_out(f) if self.placement == "sandwich" else f)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config = config.resolved()
        for name in ("window", "rope_scaling", "n_expert"):
            if getattr(config, name):
                raise CheckpointError(f"{name} is not built in yet")
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.learned = LearnedPositions(config.context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.Identity() if config.norm_placement == "post" else make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        if config.positions == "rope":  # tables, not weights: made from the config, never saved
            frequencies = rope_frequencies(config.head_dim, config.rope_theta)
            cos, sin = rope_cos_sin(torch.arange(config.context), frequencies)  # (context, D) each
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02²) everywhere, divided by √(2 n_layer) where a branch writes into the residual stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                into_stream = name.endswith(("wo.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * self.config.n_layer) if into_stream else 1.0))

    def forward(self, tokens, positions=None, mask=None, cache=None, *, targets=None, temperature=1.0, last_only=False):
        """tokens (B, T) -> logits (B, T, V).

        positions: (T,) or (B, T), default 0 … T−1, or behind what the cache holds.
        mask: boolean, True = visible. None is causal; (B, S) marks real tokens among pads, causality is added;
            (B, T, S) or (B, 1, T, S) is final: it must be causal already (see attention.document_mask).
        cache: a KVCache, which this call fills and moves on.
        targets: (B, T) ids; then not the logits but log π(targets) at `temperature` comes back, (B, T) in fp32.
        last_only: logits of the last position alone, (B, 1, V): all that sampling needs of a prompt.
        """
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if positions is None:
            if start + T > self.config.context:
                raise ValueError(f"{start + T} tokens do not fit the model's context of {self.config.context}")
            positions = torch.arange(start, start + T, device=tokens.device)
        if mask is not None:
            if mask.dim() == 2:
                mask = mask[:, None, None, :] if T == 1 else padding_mask(mask, T)
            elif mask.dim() == 3:
                mask = mask[:, None]  # (B, 1, T, S)

        x = self.embed(tokens)  # (B, T, C)
        rope = None
        if self.config.positions == "rope":
            rope = (self.rope_cos[positions], self.rope_sin[positions])  # (T, D) or (B, T, D) each
        elif self.config.positions == "learned":
            x = x + self.learned(positions)
        elif self.config.positions == "sinusoidal":  # §3.4 and 3.5 of Vaswani et al.: scale, then add
            x = x * math.sqrt(self.config.width) + sinusoidal_positions(positions, self.config.width).to(x)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.length += T
        x = self.norm(x[:, -1:] if last_only else x)
        output = self.embed.weight if self.head is None else self.head.weight  # (V, C)
        if targets is None:
            return F.linear(x, output)  # (B, T, V)
        return _target_logprobs(x, output, targets, temperature)  # (B, T)

    def make_cache(self, batch, max_len):
        """An empty KVCache for `batch` rows of up to `max_len` tokens, in the dtype the model runs in."""
        c, like = self.config, self.embed.weight
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        return KVCache(c.n_layer, batch, c.n_kv_head, max_len, c.head_dim, dtype, like.device)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def flops_per_token(self, T):
        """Of one training step per token: 6 per matrix weight (2 forward, 4 backward), and attention's two T x D
        products per head, causal ones halved (PaLM, arXiv:2204.02311, Appendix B)."""
        c = self.config
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and "learned" not in n)
        matrices -= 0 if c.tie_embeddings else c.vocab_size * c.width  # looking an embedding up is no product
        return 6 * matrices + 6 * c.n_layer * c.n_head * c.head_dim * T

    def save_pretrained(self, path):
        """Write config.json and model.safetensors in Hugging Face's layout, each under a temporary name first."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        layout = layout_of(self.config)
        state = {k: v.detach().cpu() for k, v in self.state_dict().items()}
        tensors = {k: v.contiguous() for k, v in to_layout(state, self.config, layout).items()}
        config = to_hf_config(self.config, layout)
        config["dtype"] = str(self.embed.weight.dtype).removeprefix("torch.")
        save_file(tensors, path / "model.safetensors.tmp", metadata={"format": "pt"})
        (path / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(path / "model.safetensors.tmp", path / "model.safetensors")
        os.replace(path / "config.json.tmp", path / "config.json")

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, dropout=0.0):
        """Open a checkpoint directory in the Qwen3, GPT-2 or our own layout. Raises CheckpointError.

        dtype None keeps the file's; the default, fp32, is what training wants: bf16 weights cannot take a step of
        1e-5 of their size, the update rounds to nothing.
        """
        path = Path(path)
        layout, config = read_hf_config(path)
        try:
            tensors = load_file(path / "model.safetensors")
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no model.safetensors; is it a checkpoint directory?") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / 'model.safetensors'} is corrupt or unreadable: {error}") from None
        state = from_layout(tensors, config, layout, path)
        with torch.random.fork_rng(devices=[]):  # opening a file must not move the caller's random numbers
            model = cls(replace(config, dropout=dropout))
        own = model.state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in state:
                raise CheckpointError(f"{path}: the weights lack {name!r}, which its config.json asks for")
            if name not in own:
                raise CheckpointError(f"{path}: the weights hold {name!r}, which its config.json does not explain")
            if own[name].shape != state[name].shape:
                want, got = tuple(own[name].shape), tuple(state[name].shape)
                raise CheckpointError(f"{path}: {name} has shape {got}, its config.json asks for {want}")
        model.to(dtype or state["embed.weight"].dtype)
        model.load_state_dict(state)
        return model


def _target_logprobs(x, output, targets, temperature, chunk_numbers=2**24):
    """log softmax(x outputᵀ / temperature)[targets]: x (B, T, C), output (V, C), targets (B, T) -> (B, T), fp32.

    The logits of a chunk of tokens live only while the chunk is worked on (at most 64 MiB of them), and are
    computed again in the backward pass. With 50,000 words and 32 x 1,024 tokens that is 64 MiB instead of 6 GiB.
    """
    V, shape = output.shape[0], targets.shape
    x, targets = x.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)

    def logprobs(x, targets):
        logits = F.linear(x, output).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    size = max(1, chunk_numbers // V)
    if len(x) <= size:
        return logprobs(x, targets).view(shape)
    pieces = zip(x.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(logprobs, *piece, use_reentrant=False) for piece in pieces]).view(shape)


def token_logprobs(model, tokens, temperature=1.0, positions=None, mask=None):
    """log π(tokens[:, t+1] | tokens[:, :t+1]) for every t: tokens (B, T) -> (B, T−1), in fp32.

    Entry t belongs to token t+1, so a mask over tokens meets it as mask[:, 1:]. `model` may be wrapped in DDP.
    """
    if positions is not None:
        positions = positions[..., :-1]
    if mask is not None:
        mask = mask[:, :-1] if mask.dim() == 2 else mask[..., :-1, :-1]
    return model(tokens[:, :-1], positions, mask, targets=tokens[:, 1:], temperature=temperature)


def masked_mean(x, mask):
    """Mean of x over the places where mask is True; 0 where there are none. Same shapes in, a scalar out."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints. A layout is a table of names; only GPT-2 also turns matrices: its Conv1D stores (in, out), and its
# queries, keys and values in one matrix.

QWEN3 = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    **{f"blocks.{{}}.attn.w{x}.weight": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"blocks.{{}}.attn.{x}_norm.weight": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"},
    **{f"blocks.{{}}.ffn.{x}.weight": f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
GPT2 = {"embed.weight": "transformer.wte.weight", "learned.weight": "transformer.wpe.weight"}
for _kind in ("weight", "bias"):
    GPT2[f"norm.{_kind}"] = f"transformer.ln_f.{_kind}"
    GPT2[f"blocks.{{}}.norm1.{_kind}"] = f"transformer.h.{{}}.ln_1.{_kind}"
    GPT2[f"blocks.{{}}.norm2.{_kind}"] = f"transformer.h.{{}}.ln_2.{_kind}"
    GPT2[f"blocks.{{}}.attn.wqkv.{_kind}"] = f"transformer.h.{{}}.attn.c_attn.{_kind}"
    GPT2[f"blocks.{{}}.attn.wo.{_kind}"] = f"transformer.h.{{}}.attn.c_proj.{_kind}"
    GPT2[f"blocks.{{}}.ffn.up.{_kind}"] = f"transformer.h.{{}}.mlp.c_fc.{_kind}"
    GPT2[f"blocks.{{}}.ffn.down.{_kind}"] = f"transformer.h.{{}}.mlp.c_proj.{_kind}"
LAYOUTS = {"qwen3": QWEN3, "gpt2": GPT2, "attention_to_alignment": None}
GPT2_TURNED = ("wqkv.weight", "wo.weight", "up.weight", "down.weight")


def layout_of(config):
    """The Hugging Face class that computes exactly what this config does, or our own name if none does."""
    c = config
    if (c.norm, c.norm_placement, c.positions, c.activation) == ("rms", "pre", "rope", "swiglu"):
        if c.qk_norm and not (c.bias or c.qkv_bias):
            return "qwen3"
    elif (c.norm, c.norm_placement, c.positions, c.activation) == ("layer", "pre", "learned", "gelu"):
        whole_heads = c.n_kv_head == c.n_head and c.head_dim * c.n_head == c.width
        if c.bias and c.qkv_bias and c.tie_embeddings and whole_heads and not c.qk_norm:
            return "gpt2"
    return "attention_to_alignment"


def hf_names(config, layout):
    """Our tensor name -> its name in the layout, for every tensor that the config has."""
    table = LAYOUTS[layout]
    names = {}
    for ours, theirs in table.items():
        if ours == "head.weight" and config.tie_embeddings:
            continue
        for i in range(config.n_layer) if "{}" in ours else [""]:
            names[ours.format(i)] = theirs.format(i)
    return names


def to_layout(state, config, layout):
    """Our state dict -> the layout's."""
    if LAYOUTS[layout] is None:
        return state
    state = dict(state)
    if layout == "gpt2":
        for i in range(config.n_layer):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"blocks.{i}.attn.w{x}.{kind}") for x in "qkv"]
                state[f"blocks.{i}.attn.wqkv.{kind}"] = torch.cat(parts)  # (3C, C) or (3C,)
    names = hf_names(config, layout)
    turned = GPT2_TURNED if layout == "gpt2" else ()
    return {names[k]: v.t() if k.endswith(turned) else v for k, v in state.items()}


def from_layout(tensors, config, layout, path):
    """The layout's state dict -> ours. Raises CheckpointError on a tensor that is missing."""
    if LAYOUTS[layout] is None:
        return tensors
    if layout == "gpt2" and "wte.weight" in tensors:  # OpenAI's own upload leaves the prefix out
        tensors = {f"transformer.{k}": v for k, v in tensors.items()}
    turned = GPT2_TURNED if layout == "gpt2" else ()
    state = {}
    for ours, theirs in hf_names(config, layout).items():
        if theirs not in tensors:
            raise CheckpointError(f"{path}: the weights lack {theirs!r}, which its config.json asks for")
        shape = tuple(tensors[theirs].shape)
        if len(shape) not in (1, 2) or (".wqkv." in ours and shape[-1] % 3):
            raise CheckpointError(f"{path}: {theirs} has shape {shape}, which its config.json does not explain")
        state[ours] = tensors[theirs].t() if ours.endswith(turned) else tensors[theirs]
    known = set(hf_names(config, layout).values())
    ignored = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # a tied copy, and GPT-2's mask buffers
    for name in tensors.keys() - known:
        if not name.endswith(ignored):
            raise CheckpointError(f"{path}: the weights hold {name!r}, which the {layout} layout does not explain")
    if layout == "gpt2":
        for i in range(config.n_layer):
            for kind in ("weight", "bias"):
                parts = state.pop(f"blocks.{i}.attn.wqkv.{kind}").chunk(3)
                state |= {f"blocks.{i}.attn.w{x}.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    return state


def to_hf_config(config, layout):
    """config.json's content, without the special tokens, which the tokenizer knows."""
    c = config
    if layout == "qwen3":
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context,
            "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head,
            "head_dim": c.head_dim,
            "hidden_size": c.width,
            "intermediate_size": c.ffn_width,
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": c.tie_embeddings,
        }
    if layout == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": c.vocab_size,
            "n_positions": c.context,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_embd": c.width,
            "n_inner": c.ffn_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": True,
        }
    return {"model_type": layout, **asdict(c)}


def read_hf_config(path):
    """A checkpoint directory's config.json -> (layout, TransformerConfig). Raises CheckpointError."""
    file = Path(path) / "config.json"
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
        kind = hf["model_type"]
    except FileNotFoundError:
        what = "has no config.json" if Path(path).is_dir() else "is not there"
        raise CheckpointError(f"{path} {what}; a checkpoint is a directory that save_pretrained wrote") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{file} is not a model's config.json: no JSON with a model_type") from None
    if kind not in list(LAYOUTS):  # a list, as kind may be anything that JSON holds
        raise CheckpointError(f"{file}: model_type {kind!r} is not known here; known: {', '.join(LAYOUTS)}")
    try:
        if kind == "qwen3":
            return kind, _from_qwen3(hf)
        if kind == "gpt2":
            return kind, _from_gpt2(hf)
        known = {f.name for f in fields(TransformerConfig)}
        return kind, TransformerConfig(**{k: v for k, v in hf.items() if k in known})
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {missing}") from None
    except (TypeError, AttributeError, ValueError) as error:  # wrong types, and our own CheckpointError
        raise CheckpointError(f"{file}: {error}") from None


def _refuse(hf, **expected):
    """What would change the computation and is not written here must not pass in silence."""
    for name, value in expected.items():
        if hf.get(name, value) not in (value, None):
            raise CheckpointError(f"{name} = {hf[name]!r} is not supported, only {value!r}")


def _from_qwen3(hf):
    _refuse(hf, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 writes the first
    _refuse({"rope_type": rope.get("rope_type", rope.get("type"))}, rope_type="default")
    return TransformerConfig(
        vocab_size=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_kv_head=hf["num_key_value_heads"],
        width=hf["hidden_size"],
        head_dim=hf.get("head_dim", 128),  # Qwen3's own default
        ffn_width=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def _from_gpt2(hf):
    _refuse(hf, activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True)
    _refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return gpt2_config(
        vocab_size=hf["vocab_size"],
        context=hf["n_positions"],
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        width=hf["n_embd"],
        ffn_width=hf.get("n_inner") or 4 * hf["n_embd"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    )


def main():
    torch.manual_seed(0)
    for title, config in {"Qwen3": TransformerConfig(), "GPT-2": gpt2_config()}.items():
        model = Transformer(config).eval()
        c = model.config
        tokens = torch.randint(0, c.vocab_size, (2, 20))

        attn = c.width * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
        ffn = c.width * c.ffn_width * (3 if c.activation == "swiglu" else 2)
        matrices = c.n_layer * (attn + ffn) + c.vocab_size * c.width
        small = model.num_params() - matrices - (c.context * c.width if c.positions == "learned" else 0)
        assert 0 < small < 0.02 * matrices  # gains and biases

        loss = -token_logprobs(model, tokens).mean().item()
        assert abs(loss - math.log(c.vocab_size)) < 0.2

        cache = model.make_cache(2, 20)
        steps = [model(tokens[:, :8], cache=cache)]  # the prompt in one pass, then token by token
        steps += [model(tokens[:, t : t + 1], cache=cache) for t in range(8, 20)]
        worst = (torch.cat(steps, dim=1) - model(tokens)).abs().max().item()
        assert worst < 1e-4
        print(f"{title:>6} layout: {model.num_params():,} parameters, of which {small:,} gains and biases")
        print(f"        loss at birth {loss:.3f} (ln {c.vocab_size} = {math.log(c.vocab_size):.3f})")
        print(f"        prompt + 12 cached steps = one pass: largest difference in a logit {worst:.1e}")


if __name__ == "__main__":
    main()
