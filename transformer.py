"""The decoder: token ids in, a distribution over the next token out.

    log π(token_t | tokens before it) = log softmax(logits_{t−1})[token_t]

π is the distribution that the model gives; RL and the training scripts call the model the *policy*. One forward pass,
`Transformer.forward`, in the layout of Qwen3 (arXiv:2505.09388):

    x = embed(tokens)                          (B, T) -> (B, T, C)    rows of the embedding matrix (V, C)
    rope = cos, sin at the positions           (T, D) each, the same for all layers
    for layer, block in enumerate(blocks):
        a = attn(norm1(x), rope, mask, cache, layer)    (B, T, C)     tokens read themselves and those before
        x = x + a
        h = norm2(x)                           (B, T, C)
        f = down(silu(gate(h)) ⊙ up(h))        (B, T, C) -> (B, T, inner) -> (B, T, C)    `ffn`: each token by itself
        x = x + f
    cache.length += T                          once, after all layers
    logits = norm(x) embedᵀ                    (B, T, V)              or, with targets, log π(targets) (B, T)

The losses of pretraining, SFT, DPO and RL reach the weights through log π(y) = z_y − log Σ_v exp(z_v) of a token y,
where z is logits / temperature (1 unless given). Then ∂ log π(y) / ∂ logits_v = ((1 if v = y else 0) − π(v)) /
temperature: to raise log π(y) pushes the logit of y up in proportion to 1 − π(y), each other one down in proportion to
its own π(v). With `targets` forward returns log π(targets) instead of logits, some tokens at a time where the logits
would take more than 64 MiB (support/logprobs.py). It is an argument of forward because DDP wraps forward alone.
`token_logprobs` shifts: its entry t scores token t + 1, so a mask over tokens must be cut to mask[:, 1:] to fit.

The defaults run what stands above: RMSNorm, RoPE, grouped-query attention with QK-norm, SwiGLU (`f` above), tied
embeddings (embed is the output matrix too), no biases, 1.7 M parameters. Off: windows (attention.py), RoPE scaling
(positional.py), mixtures of experts (moe.py), dropout. SwiGLU (arXiv:2002.05202) has three matrices where GELU has two,
so at equal parameters its inner width is 2/3 of the usual 4 C. norms.py compares the places where a norm may stand. All
that a recipe varies is a field of `TransformerConfig`; `gpt2_config(...)` is GPT-2's layout.

A checkpoint is a directory in Hugging Face's format (support/hf.py): GPT-2, Llama, Qwen2, Qwen3, Mistral, Mixtral and
Qwen3-MoE open as published, though not Llama 3's and Mistral's tokenizers (see tokenizer_bpe.py). A model is saved as
whichever computes the same, for `transformers` to open, else in our own layout. llama.cpp's open too (support/gguf.py).

Letters: B rows, T tokens, S keys, C width, H query heads, G key/value heads, D head width, V vocabulary. Run it:
`python transformer.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from attention import Attention, KVCache, RollingKVCache, padding_mask
from moe import MoE
from norms import LayerNorm, RMSNorm
from positional import LearnedPositions, rope_attention_factor, rope_cos_sin, rope_frequencies, sinusoidal_positions
from support.architecture import check_architecture, derived_defaults
from support.checks import Count, FractionBelow1, Positive, Whole
from support.devices import attention_dtype, cast_once
from support.hf import load_decoder, save_decoder
from support.logprobs import target_logprobs
from support.look_up import look_up
from support.output import run_demo


@dataclass
class TransformerConfig:
    """The architecture. The defaults are a 1.7 M-parameter model that trains on two CPU cores."""

    vocab_size: Count = 512  # V; the training scripts take it from the tokenizer
    context: Count = 256
    """Longest sequence in tokens."""
    n_layer: Count = 4
    """Number of blocks."""
    n_head: Count = 6
    """Query heads H."""
    n_kv_head: Count = 2
    """Key/value heads G; each serves n_head / n_kv_head query heads."""
    width: Count = 192
    """Width C of the residual stream."""
    head_dim: Count | None = None
    """Width D of one head; default width / n_head."""
    ffn_width: Count | None = None
    """Inner width of the feed-forward; default 4 C, or 8/3 C for SwiGLU's three matrices, in multiples of 32."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of the feed-forward."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation: RMSNorm or LayerNorm."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Where it stands; sandwich is before and after each branch."""
    norm_eps: Positive = 1e-6
    """Added to the variance, or RMSNorm's mean square, before the root."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How a token knows its place."""
    rope_theta: Positive = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: dict | None = None
    """RoPE beyond the trained length, as Hugging Face writes it: {rope_type: yarn, factor: 4.0, ...}. The type dynamic
    is read so that Hugging Face's checkpoints open, and changes nothing; to stretch a model take yarn or llama3."""
    window: Count | None = None
    """Sliding window: a query sees itself and the window - 1 tokens before it; none is all of them."""
    sinks: Whole = 0
    """With a window: the first so many tokens stay visible (attention sinks)."""
    qk_norm: bool = True
    """RMSNorm on each query and key head."""
    bias: bool = False
    """Biases in attention, the dense feed-forward and LayerNorm."""
    qkv_bias: bool | None = None
    """Biases on queries, keys and values (Qwen2); default as `bias`."""
    tie_embeddings: bool = True
    """The output matrix is the embedding matrix."""
    dropout: FractionBelow1 = 0.0
    """Dropout on the embeddings and on each branch."""
    n_expert: Whole = 0
    """Experts of a mixture-of-experts feed-forward (E in moe.py); 0 is dense."""
    n_expert_active: Count = 2
    """Experts that each token is sent to (K in moe.py)."""
    expert_width: Count | None = None
    """Inner width of one expert; default ffn_width / (K + n_shared_expert), down to a multiple of 8."""
    n_shared_expert: Whole = 0
    """Experts that every token passes through besides."""
    moe_every: Count = 1
    """Every moe_every-th block is a mixture, the others are dense: 1 all, 2 every second."""
    norm_topk_prob: bool = True
    """Whether the K weights of a token are scaled to sum to 1."""
    routed_scale: Positive | None = None
    """Factor on the sum of a token's experts; default K if their weights sum to 1, else 1 (see moe.py)."""
    balancing: Literal["aux", "bias", "none"] = "aux"
    """What keeps the experts' loads even: a loss, a bias on the router, or nothing."""
    capacity_factor: Positive | None = None
    """In pretraining, an expert takes at most this many times its even share of the assignments, the rest are dropped;
    default dropless."""

    def __post_init__(self):
        check_architecture(self)

    def resolved(self):
        """The same with the defaults that follow from other fields filled in. Not done in place: a default taken
        from one width must not survive a change of width."""
        return replace(self, **derived_defaults(self))


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
    """Each token by itself: (B, T, C) -> (B, T, inner) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C, inner = config.width, config.ffn_width
        self.gate = nn.Linear(C, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.up = nn.Linear(C, inner, bias=config.bias)
        self.down = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x):
        x = cast_once(x)  # to autocast's dtype, for gate and up together
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2 was trained with the tanh form


class Block(nn.Module):
    """Attention moves information between tokens, the feed-forward works on each; both add to the stream."""

    def __init__(self, config, mixture=False):
        super().__init__()
        c, self.placement = config, config.norm_placement
        options = dict(qk_norm=c.qk_norm, eps=c.norm_eps, window=c.window, sinks=c.sinks)
        self.attn = Attention(c.width, c.n_head, c.n_kv_head, c.head_dim, c.qkv_bias, **options)
        if c.bias != c.qkv_bias:  # Qwen2 has biases on wq, wk and wv alone
            self.attn.wo = nn.Linear(c.n_head * c.head_dim, c.width, bias=c.bias)
        self.ffn = MoE(c) if mixture else FeedForward(c)
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        if c.norm_placement == "sandwich":
            self.norm1_out, self.norm2_out = make_norm(c), make_norm(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, rope, mask, cache=None, layer=0, last_only=False):
        """(B, T, C) -> (B, T, C); with last_only (B, 1, C), the last token alone. The rest as in Attention.forward."""
        a = self.attn(x if self.placement == "post" else self.norm1(x), rope, mask, cache, layer, last_only)
        x = x[:, -1:] if last_only else x
        if self.placement == "post":
            x = self.norm1(x + self.dropout(a))
            return self.norm2(x + self.dropout(self.ffn(x)))
        x = x + self.dropout(self.norm1_out(a) if self.placement == "sandwich" else a)
        f = self.ffn(self.norm2(x))
        return x + self.dropout(self.norm2_out(f) if self.placement == "sandwich" else f)


def init_weights(model):
    """Matrices: N(0, 0.02²), the std divided by √(2 n_layer) where a branch writes into the residual stream (`wo`,
    `down`), so that the sum of all 2 n_layer branches has the variance of one (GPT-2). Biases: 0. Gains stay 1; a
    mixture's experts, (E, inner, C), keep what moe.py drew by the same rule."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            into_stream = name.endswith(("wo.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / (math.sqrt(2 * model.config.n_layer) if into_stream else 1.0))


class Transformer(nn.Module):
    """A decoder: token ids (B, T) -> logits (B, T, V), or log-probabilities of given targets; see `forward`."""

    config_class = TransformerConfig  # what from_pretrained reads; a subclass with more fields overrides it

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolved()
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.learned = LearnedPositions(c.context, c.width) if c.positions == "learned" else None
        self.dropout = nn.Dropout(c.dropout)
        mixture = [c.n_expert > 0 and (layer + 1) % c.moe_every == 0 for layer in range(c.n_layer)]
        self.blocks = nn.ModuleList(Block(c, is_mixture) for is_mixture in mixture)
        self.norm = nn.Identity() if c.norm_placement == "post" else make_norm(c)
        self.head = None if c.tie_embeddings else nn.Linear(c.width, c.vocab_size, bias=False)
        if c.positions == "rope":  # tables, not weights: made from the config, never saved
            cos, sin = self.rope_at(torch.arange(c.context))  # (context, D) each
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        init_weights(self)

    def rope_at(self, positions):
        """cos and sin of any positions, in the table or beyond it: (..., T) -> (..., T, D) each."""
        c = self.config
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling, c.context)  # (D/2,)
        return rope_cos_sin(positions, frequencies, rope_attention_factor(c.rope_scaling, c.context))

    def hidden(self, tokens, positions=None, mask=None, cache=None, last_only=False):
        """tokens (B, T) -> the normalised states that the output matrix reads, (B, T, C); the rest as in `forward`."""
        c, T = self.config, tokens.shape[1]
        start = cache.length if cache is not None else 0
        beyond = positions is None and start + T > c.context  # past the RoPE table, which is as long as the context
        if beyond and (c.window is None or c.positions != "rope"):
            raise ValueError(f"{start + T} tokens do not fit the model's context of {c.context}")
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)
        if mask is not None and mask.dim() < 4:
            mask = padding_mask(mask, T) if mask.dim() == 2 else mask[:, None]  # (B, 1, T, S)

        x = self.embed(tokens)  # (B, T, C)
        rope = None
        if c.positions == "rope":
            tables = self.rope_cos, self.rope_sin  # (context, D) each -> (T, D) or (B, T, D) each
            rope = self.rope_at(positions) if beyond else [look_up(table, positions) for table in tables]
        elif c.positions == "learned":
            x = x + self.learned(positions)
        elif c.positions == "sinusoidal":  # §3.4 and 3.5 of Vaswani et al.: scale, then add
            x = x * math.sqrt(c.width) + sinusoidal_positions(positions, c.width).to(x)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, last_only and layer == len(self.blocks) - 1)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @property
    def output(self):
        """The matrix (V, C) that turns a state into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens,
        positions=None,
        mask=None,
        cache=None,
        *,
        targets=None,
        temperature=1.0,
        counted=None,
        last_only=False,
        with_states=False,
    ):
        """tokens (B, T) -> logits (B, T, V).

        positions: (T,) or (B, T), within the context; default 0 … T−1, or after what the cache holds. With RoPE and a
            window the default may pass the context: RoPE sees distances, and the window bounds all but those to sinks.
        mask: boolean, True = visible. None is causal; (B, S) marks real tokens among pads, causality is added;
            (B, T, S) or (B, 1, T, S) must hide the future itself (attention.document_mask): only a window is added.
        cache: from make_cache, which this call fills and moves on.
        targets: (B, T) ids; then not the logits but log π(targets) at `temperature` comes back, (B, T) in fp32.
        counted: with targets, boolean (B, T): log π where True, 0 elsewhere. A loss on the answers alone then skips
            the prompts' products with the output matrix, with a large vocabulary a good part of a step.
        last_only: logits of the last position alone, (B, 1, V): all that sampling needs of a prompt.
        with_states: returns (what comes back otherwise, `hidden`'s states (B, T, C)), for a value head.
        """
        x = self.hidden(tokens, positions, mask, cache, last_only)  # (B, T, C)
        if targets is None:
            out = F.linear(x, self.output)  # (B, T, V)
        else:  # (logits.float() / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0], in less memory
            out = target_logprobs(x, self.output, targets, temperature, counted=counted)  # (B, T)
        return (out, x) if with_states else out

    def make_cache(self, batch, max_len):
        """An empty cache for `batch` rows of up to `max_len` tokens, in the dtype of attention; if the window and the
        sinks are fewer, a RollingKVCache, which keeps no more than the model can see and takes any number of tokens."""
        c, dtype, device = self.config, attention_dtype(self.embed.weight), self.embed.weight.device
        if c.window is not None and c.window + c.sinks < max_len:
            return RollingKVCache(c.n_layer, batch, c.n_kv_head, c.window, c.head_dim, dtype, device, c.sinks)
        return KVCache(c.n_layer, batch, c.n_kv_head, max_len, c.head_dim, dtype, device)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def save_pretrained(self, path):
        """Write config.json and model.safetensors in Hugging Face's layout, each under a temporary name first."""
        save_decoder(self, path)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, dropout=0.0):
        """Open a checkpoint directory, or a hub name, in any layout of support/hf.py. Raises CheckpointError. dtype
        None keeps the file's; training wants fp32, the default: a bf16 weight rounds away steps of 1e-5 of its size."""
        return load_decoder(cls, path, dtype, dropout)


def token_logprobs(model, tokens, temperature=1.0, positions=None, mask=None, counted=None):
    """log π(tokens[:, t+1] | tokens[:, :t+1]) for every t: tokens (B, T) -> (B, T−1), in fp32: entry t is token t+1's.
    counted (B, T−1): those to compute, the rest are 0. `model` may be wrapped in DDP."""
    if positions is not None:
        positions = positions[..., :-1]
    if mask is not None:
        mask = mask[:, :-1] if mask.dim() == 2 else mask[..., :-1, :-1]
    return model(tokens[:, :-1], positions, mask, targets=tokens[:, 1:], temperature=temperature, counted=counted)


def answer_logprobs(model, prompts, answers, temperature=1.0, pad=0):
    """log π of every token of an answer, given its prompt of at least one token. prompts and answers: B lists of ids
    each -> (B, T) in fp32, 0 after an answer's end, and `counted` (B, T), True on its tokens. T: the longest answer.

    The plain form: prompt and answer in one row, padded on the right, where causality hides the pads. Each answer reads
    the prompt again; support/shared_prompt.py, equal in value and gradient, reads it once for all its answers.
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    S, T = max(map(len, rows)), max(map(len, answers))  # lengths of the longest row, of the longest answer
    tokens = torch.tensor([row + [pad] * (S - len(row)) for row in rows], device=device)  # (B, S)
    start, length = (torch.tensor([*map(len, ids)], device=device)[:, None] for ids in (prompts, answers))  # (B, 1)

    place = torch.arange(1, S, device=device)  # (S−1,) entry e scores the token at place e + 1
    in_answer = (start <= place) & (place < start + length)  # (B, S−1)
    logprobs = token_logprobs(model, tokens, temperature, counted=in_answer)  # (B, S−1), 0 outside the answers
    t = torch.arange(T, device=device)
    counted = t < length  # (B, T)
    entry = (start - 1 + t).clamp(max=S - 2)  # (B, T) it scores place start + t; clamped after a row's end
    return logprobs.gather(1, entry) * counted, counted


def masked_mean(x, mask):
    """Mean of x over the places where mask is True; 0 where there are none. Same shapes in, a scalar out."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def demo():
    """A vocabulary of four, width 2, by hand; then two layouts: parameters, loss before training, cache = one pass."""
    tiny = Transformer(TransformerConfig(vocab_size=4, width=2, n_head=1, n_kv_head=1, n_layer=1, ffn_width=3))
    assert tiny.num_params() == 4 * 2 + 4 * 2 * 2 + 3 * 3 * 2 + 3 * 2 + 2 * 2 == 52
    print("V = 4, C = 2, one block: embed 8 + wq … wo 16 + gate, up, down 18 + norms 6 + QK-norm 4 = 52 parameters")
    with torch.no_grad():
        tiny.embed.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
        for branch in (tiny.blocks[0].attn.wo, tiny.blocks[0].ffn.down):
            branch.weight.zero_()  # nothing is added to the stream: x stays embed[token], which has length √C already
        tokens = torch.tensor([[0, 0, 1]])
        logits, logprobs = tiny(tokens), token_logprobs(tiny, tokens)  # (1, 3, 4), (1, 2)
    torch.testing.assert_close(logits[0, :2], torch.tensor([[2.0, 0.0, 0.0, -2.0]] * 2), atol=1e-5, rtol=0)  # x embedᵀ
    total = math.log(math.exp(2) + 2 + math.exp(-2))  # 2.2539
    torch.testing.assert_close(logprobs, torch.tensor([[2 - total, 0 - total]]), atol=1e-5, rtol=0)
    gradient = torch.func.grad(lambda z: z.log_softmax(-1)[0])(logits[0, 0])  # ∂ log π(0) / ∂ logits
    torch.testing.assert_close(gradient, torch.tensor([0.2242, -0.1050, -0.1050, -0.0142]), atol=1e-4, rtol=0)
    print("  both branches 0, tokens 0 0 1: logits after token 0 are 2, 0, 0, −2 and ln Σ exp = 2.2539,")
    print(f"  so log π(0 | 0) = {logprobs[0, 0]:.4f}, log π(1 | 0 0) = {logprobs[0, 1]:.4f}; ", end="")
    answer, mask = answer_logprobs(tiny, [[0], [0]], [[0, 1], [1]])
    assert mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(answer, torch.tensor([[2 - total, -total], [-total, 0.0]]), atol=1e-5, rtol=0)
    print("answers [0, 1] and [1] to the prompt [0] in one batch: the same")

    torch.manual_seed(0)
    for title, config in {"Qwen3": TransformerConfig(), "GPT-2": gpt2_config()}.items():
        model, V = Transformer(config).eval(), config.vocab_size
        tokens = torch.randint(0, V, (2, 20))
        loss = -token_logprobs(model, tokens).mean().item()
        assert abs(loss - math.log(V)) < 0.2
        cache = model.make_cache(2, 20)
        steps = [model(tokens[:, :8], cache=cache)]  # the prompt in one pass, then token by token
        steps += [model(tokens[:, t : t + 1], cache=cache) for t in range(8, 20)]
        worst = (torch.cat(steps, dim=1) - model(tokens)).abs().max().item()
        assert worst < 1e-4
        print(f"{title} layout: {model.num_params():,} parameters; untrained loss {loss:.3f}, ln V = {math.log(V):.3f}")
        print(f"  prompt + 12 cached steps = one pass: largest difference in a logit {worst:.1e}")


if __name__ == "__main__":
    run_demo(demo)
