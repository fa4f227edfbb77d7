"""Decoding: turn a model into text, one row or a thousand at a time.

    token_t ~ softmax(logits_t / temperature)

The prompt is read in one pass that fills the key/value cache (prefill); after it each step reads one token per row
(decode). Five ideas make it fast without making it complicated:

* the prompts of a batch are padded on the *left*, so that all rows write their next token into the same cache
  slot; a mask hides the pads and each row keeps its own positions;
* a prompt with n rollouts is prefilled once and its cache copied to the n rows;
* rows that have met a stop token leave the batch as soon as a quarter of it is done (half, on a GPU);
* every row samples by inverse transform from its own uniform number: token = CDF⁻¹(u). One draw of a
  (rows, max_new_tokens) table fixes all of the randomness beforehand, so what a row says does not depend on which
  rows stand beside it, on when they leave, or on how a batch is spread over GPUs. That holds up to rounding: in fp32
  the rows agree; in bf16 a batch of another size rounds differently, and a token on the border of two may fall to the
  other;
* with one token per row the products are small and a step is mostly the cost of starting operations: `DecodeStep`
  computes Transformer.forward's numbers with fewer and larger ones (the usual case; other layouts call the model), and
  on a GPU `StaticStep` starts them all at once, as a CUDA graph.

Truncation (top-k, Fan et al. 2018; top-p, arXiv:1904.09751; min-p, arXiv:2407.01082) and the repetition penalty
(CTRL, arXiv:1909.05858) are for reading pleasure. Rollouts for RL must sample by temperature alone: the
log-probabilities that come back, and the loss that scores them, are those of the full softmax, and a truncated
sampler would not be the policy that is trained.

Letters: N prompts, n rollouts each, B rows still in the batch, S slots of the cache in use, V vocabulary, C width,
H heads, G key/value heads, D head width.

Run it:
    python generate.py --checkpoint runs/sft --prompt "Tom has 5 apples. He buys 3 more. How many now?"
    python generate.py --checkpoint runs/sft          # chat; an empty line ends it
"""

import codecs
import json
import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import jsonargparse
import torch
import torch.nn.functional as F
from torch import distributed

from data import DataError
from tokenizer_bpe import TokenizerError, load_tokenizer
from transformer import CheckpointError, Transformer, TransformerConfig, gguf_tokenizer, local_directory


class ConfigError(ValueError):
    """Settings that do not fit together or an input that cannot be used: one line says what to change."""


class DivergedError(ConfigError):
    """A loss or a gradient that is no longer a finite number."""


@dataclass
class Rollout:
    """Completions only. T is the length of the longest; a row that ended earlier is padded."""

    ids: torch.Tensor  # (N·n, T) int64, 0 where mask is False
    mask: torch.Tensor  # (N·n, T) bool, True on sampled tokens, the stop token included
    logprobs: torch.Tensor  # (N·n, T) fp32, log π of each sampled token at the sampling temperature

    def texts(self, tokenizer):
        """The completions as strings: plain tokens only, neither special ones nor a padded vocabulary's spare ids."""
        rows = zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        return [
            tokenizer.decode([i for i, real in zip(ids, mask, strict=True) if real and i in tokenizer.text_ids])
            for ids, mask in rows
        ]

    def ended(self, stop_ids):
        """(N·n,) bool: which rows met one of these ids, and so stopped by themselves instead of being cut off."""
        return (torch.isin(self.ids, torch.tensor(stop_ids, device=self.ids.device)) & self.mask).any(1)


def truncate(probs, top_k=None, top_p=None, min_p=None):
    """Zero the tail of each row: all below the k-th largest; all but the smallest set that holds mass p; all that are
    less than min_p times as likely as the likeliest. (B, V)"""
    if top_k is not None and top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None and top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass in front of each token: the first one always stays
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.max(-1, keepdim=True).values, 0.0)
    return probs


def sample(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, penalty=1.0, seen=None):
    """One token per row: logits (B, V), u (B,) uniform in [0, 1) -> ids (B,), log-probabilities (B,) in fp32.

    Temperature 0 is greedy. penalty divides the positive logits, and multiplies the negative ones, of the tokens that
    `seen` (B, V) marks. The log-probabilities are those of the model's own softmax at the temperature (at 1 if
    greedy), never of the truncated or penalised one.
    """

    def scale(logits):  # dividing by 1 would be one more pass over (B, V)
        return logits.float() if temperature in (0, 1) else logits.float() / temperature

    chosen = scaled = scale(logits)  # (B, V)
    if penalty != 1.0:
        chosen = scale(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
    if temperature == 0:
        ids = chosen.argmax(-1, keepdim=True)  # (B, 1)
    else:
        probs = chosen.softmax(-1)
        cdf = truncate(probs, top_k, top_p, min_p).cumsum(-1)  # (B, V)
        # right=True: the first token whose cumulative mass exceeds u, so one of probability 0 is never drawn
        ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        if chosen is scaled:  # what was drawn from is the model's own softmax
            return ids.squeeze(-1), probs.gather(-1, ids).log().squeeze(-1)
    return ids.squeeze(-1), scaled.log_softmax(-1).gather(-1, ids).squeeze(-1)


def add_product(x, h, weight):
    """x += h @ weight, in one operation where the dtypes allow it."""
    if x.dtype == h.dtype:
        x.addmm_(h, weight)
    else:
        x.add_(h @ weight)


class DecodeStep:
    """Transformer.forward for one new token per row: token (B,), position (B,) or (1,) -> logits (B, V).

    For RMSNorm, SwiGLU and RoPE (Llama, Qwen). Fewer and larger operations: the three products of q, k and v become
    one, those of gate and up too; the gains of the norms, their √C and 1/√D are multiplied into the matrices behind
    them beforehand, those of q and k into the tables of RoPE; keys and values are written at once; keys of one head
    meet all queries that share them in one batched product. In fp32 the matrices for 4 rows and more lie transposed,
    (in, out), and the output matrix always: of 4 to 32 rows x @ W of such a W takes two thirds to four fifths of the
    time of x @ weight.T (MKL, 2 cores), while in bf16 (oneDNN) it takes up to a fifth longer. Built anew by each
    `generate`, in about the time of a few steps, because the weights may have changed since: a second copy of them, in
    the dtype of autocast, where that is on. Attention computes in the dtype of the cache.
    """

    @staticmethod
    def fits(model):
        """Whether this layout is one of those that are computed here."""
        c = model.config
        usual = (c.norm, c.norm_placement, c.activation, c.positions) == ("rms", "pre", "swiglu", "rope")
        return usual and not (c.bias or c.window or c.n_expert)

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


def free_memory(device):
    """Bytes that `device` can still give; None where the system does not say."""
    if device.type == "cuda":  # blocks that torch keeps for itself are free to us
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:  # MemAvailable counts the page cache, which gives way
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None


def generate(
    model,
    prompts,
    max_new_tokens,
    n=1,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_ids=(),
    generator=None,
    *,
    min_p=None,
    repetition_penalty=1.0,
    uniforms=None,
    on_tokens=None,
    memory=None,
    static=None,
):
    """Continue N prompts (lists of ids), n rollouts each; rows i·n … i·n + n − 1 belong to prompt i. -> Rollout

    A row ends with a stop id, which it keeps, or after max_new_tokens. generator: a CPU torch.Generator, or give
    the (N·n, max_new_tokens) table of uniforms yourself; on_tokens(ids (N·n,), live (N·n,)) is called at each step,
    for streaming; what it returns, if anything, is the (N·n,) rows to end there. memory: bytes for the key/value
    cache, default half of what is free; prompts that do not fit together are taken one batch after the other, which
    but for rounding changes no row. static: decode by StaticStep where the layout allows it, default on a GPU. Raises
    ConfigError on an empty prompt or one that leaves no room in the context.
    """
    c, longest = model.config, max((len(p) for p in prompts), default=0)
    if not prompts or not all(prompts):
        raise ConfigError("nothing to continue: a prompt needs at least one token")
    if longest + max_new_tokens > c.context:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of {c.context}"
        )
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ConfigError(f"temperature is {temperature} and top_k {top_k}; they must be at least 0 and 1")
    if max_new_tokens < 1 or n < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and n is {n}; both must be at least 1")
    if uniforms is None:
        uniforms = torch.rand(len(prompts) * n, max_new_tokens, generator=generator)
    if uniforms.shape != (len(prompts) * n, max_new_tokens):
        raise ConfigError(f"uniforms are {tuple(uniforms.shape)}, not {(len(prompts) * n, max_new_tokens)}")
    uniforms = uniforms.to(model.embed.weight.device)
    if memory is None:
        free = free_memory(uniforms.device)
        memory = (1 << 40 if free is None else free) // 2
    a_row = 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim * (longest + max_new_tokens)  # keys and values in fp32
    size = len(prompts) if on_tokens is not None else max(1, int(memory // (a_row * n)))  # prompts per batch
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "penalty": repetition_penalty}
    was_training = model.training
    model.eval()
    try:
        parts = []
        for i in range(0, len(prompts), size):
            mine = uniforms[i * n : (i + size) * n]
            fixed = mine.is_cuda if static is None else static
            parts.append(_generate(model, prompts[i : i + size], mine, n, stop_ids, on_tokens, how, fixed))
    finally:
        model.train(was_training)
    T = max(part[0].shape[1] for part in parts)
    whole = [torch.cat([F.pad(x, (0, T - x.shape[1])) for x in xs]) for xs in zip(*parts, strict=True)]
    return Rollout(*whole)  # copies made outside inference mode: a loss may use them


@torch.inference_mode()
def _generate(model, prompts, uniforms, n, stop_ids, on_tokens, how, static):
    """One batch -> ids, mask, logprobs, (N·n, T) each."""
    device, lengths, max_new_tokens = uniforms.device, [len(p) for p in prompts], uniforms.shape[1]
    longest, rows = max(lengths), len(prompts) * n
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)  # (N, S)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.tensor(prompt)
        real[i, longest - len(prompt) :] = True
    tokens, real = tokens.to(device), real.to(device)
    padded = min(lengths) < longest
    positions = (real.cumsum(1) - 1).clamp(min=0)  # each row counts its own tokens from 0

    # Prefill: once per prompt, then the cache and the first logits are handed to its n rollouts.
    cache = model.make_cache(len(prompts), longest)
    logits = model(tokens, positions, real if padded else None, cache, last_only=True)[:, -1]  # (N, V)
    cache = cache.repeat(n, longest + max_new_tokens)
    dynamic = step = DecodeStep(model, cache) if DecodeStep.fits(model) else None
    logits = logits.repeat_interleave(n, dim=0)  # (N·n, V)
    # of the last token read: (N·n,), or where no prompt is padded one for all rows, (1,)
    position = positions[:, -1].repeat_interleave(n, dim=0) if padded else positions[0, -1:]
    visible = torch.ones(rows, longest + max_new_tokens, dtype=torch.bool, device=device)
    visible[:, :longest] = real.repeat_interleave(n, dim=0)
    if dynamic is not None and static:
        step = StaticStep(dynamic, visible)
    if how["penalty"] != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, device=device).scatter_add_(1, tokens, real.float())
        how = {**how, "seen": (seen > 0).repeat_interleave(n, dim=0)}  # (N·n, V)

    ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    row = slice(None)  # which output row each row of the shrinking batch is: all, until some have left
    live = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token, logprob = sample(logits, uniforms[row, t], **how)  # (B,), (B,)
        ids[row, t], mask[row, t], logprobs[row, t] = token, live, logprob
        if stop_ids:
            live = live & ~torch.isin(token, stop)
        if on_tokens is not None:
            end = on_tokens(ids[:, t] * mask[:, t], mask[:, t])
            if end is not None:
                live = live & ~end.to(device)[row]
        left = int(live.sum()) if stop_ids or on_tokens is not None else rows
        if left == 0 or t + 1 == max_new_tokens:
            break
        if "seen" in how:
            how["seen"][torch.arange(len(token), device=device), token] = True
        # Copying the survivors costs about a step, recording a graph for them about four: wait until it pays. Finished
        # rows fill them up to a multiple of 4, for every new number of rows costs something too: see sft.whole_eights.
        few = -(-left // 4) * 4
        if few <= (0.75 if step is dynamic else 0.5) * len(live):
            stay = live.argsort(descending=True, stable=True)[:few]
            cache.keep(stay)
            row = stay if isinstance(row, slice) else row[stay]
            live, token, visible = live[stay], token[stay], visible[stay]
            position = position[stay] if padded else position
            if step is not dynamic:
                step = StaticStep(dynamic, visible)
            if "seen" in how:
                how["seen"] = how["seen"][stay]
        position = position + 1
        shown = visible[:, : cache.length + 1] if padded else None
        if step is not None:
            logits = step(token, position, shown)  # (B, V)
        else:
            logits = model(token[:, None], position[:, None], shown, cache)[:, -1]
    mask = mask[:, : t + 1]  # a row that has ended writes on until it leaves
    return ids[:, : t + 1] * mask, mask, logprobs[:, : t + 1] * mask


# ---------------------------------------------------------------------------------------------------------------
# Opening a checkpoint and reading flags: used by every script from here on.


def resolve_checkpoint(path):
    """A checkpoint directory, a .gguf file, a run directory, of which `best`, else `last` is meant, or the name of a
    model on the Hugging Face hub. Raises CheckpointError."""
    path = Path(path) if str(path).startswith("runs/") else local_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        return path
    for candidate in (path, path / "best", path / "last", path / "last.old"):
        if (candidate / "config.json").is_file():
            return candidate
    what = "holds no checkpoint" if path.is_dir() else "is no checkpoint" if path.exists() else "is not there"
    raise CheckpointError(f"{path} {what}; give a run directory or one that save_pretrained wrote")


def open_checkpoint(path, device="cpu", dropout=0.0):
    """-> (model in fp32, tokenizer, directory). Raises CheckpointError, also if the two vocabularies differ."""
    path = resolve_checkpoint(path)
    if path.suffix == ".gguf":
        model, metadata = Transformer.from_gguf(path, dropout)
        tokenizer = gguf_tokenizer(metadata, path)
    else:
        tokenizer, model = load_tokenizer(path), Transformer.from_pretrained(path, dropout=dropout)
    if tokenizer.vocab_size > model.config.vocab_size:  # published models pad theirs, so it may be larger
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model.to(device), tokenizer, path


def is_chat_model(path, tokenizer):
    """Whether the checkpoint was trained to end its turns: its generation_config.json then stops at <|im_end|>, or its
    GGUF file brings a chat template."""
    if Path(path).suffix == ".gguf":
        return tokenizer.chat_template is not None
    try:
        stop = json.loads((Path(path) / "generation_config.json").read_text())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return tokenizer.special_ids.get("<|im_end|>", -1) in (stop if isinstance(stop, list) else [stop])


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None):
        """One line, no usage dump: what is wrong, and where the flags are listed."""
        text = " ".join(str(message).split())
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{self.prog}: error: {text} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parse_config(cls, args=None, description=None):
    """A Config dataclass from flags and YAML: `--steps 500 --config FILE.yaml --model.n_layer 6`. The attribute
    docstrings of `cls` are the help; `--print_config` writes the YAML of what would run."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(description=(description or cls.__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags after it win")
    parser.add_class_arguments(cls)
    settings = parser.instantiate(parser.parse_args(args))
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


def run(main, cls, description=None):
    """Entry of every script: flags in, and what the user can mend comes out as one line and exit status 2."""
    try:
        main(parse_config(cls, description=description))
        status = 0
    except (ConfigError, CheckpointError, TokenizerError, DataError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # a line for each node
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if distributed.is_available() and distributed.is_initialized():
        if status == 0:
            distributed.destroy_process_group()
        # Where DDP was used its threads live on (torch 2.13), and now and then they abort the interpreter's end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------
# The script: continue a prompt, or chat.


@dataclass
class Config:
    """Continue a prompt with a trained checkpoint, or chat with it."""

    checkpoint: str
    """Checkpoint directory, a run directory such as runs/sft, a .gguf file, or a name on the Hugging Face hub."""
    prompt: str | None = None
    """What to answer (a chat model) or to continue (a base model). Without it: chat."""
    max_new_tokens: int = 200
    """Longest answer in tokens; less if the context is full before."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this much probability only."""
    min_p: float | None = None
    """Sample among tokens at least this share as likely as the likeliest only."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the prompt or the answer already holds less likely."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer and are not shown: --stop+ "Q:" --stop+ "A:"."""
    seed: int = 0
    """Of the sampling."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature != 0 and not 1e-5 <= self.temperature < math.inf:  # below, logits over it overflow
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least 1e-5")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0 and below 2^32")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")
        if self.temperature == 0 and (self.top_k or self.top_p or self.min_p):
            raise ConfigError("top_k, top_p and min_p choose what is sampled from: give a --temperature above 0")
        if "" in self.stop:
            raise ConfigError("--stop holds an empty text, which would end every answer at once")


def answer(model, tokenizer, ids, stop_ids, config, generator):
    """Stream the continuation of `ids` to stdout; returns its text."""
    room = model.config.context - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the model has a context of {model.config.context}; shorten the prompt"
        )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, shown = "", 0

    def show(token, live):  # a character may span several tokens: the decoder holds back an unfinished one
        nonlocal text, shown
        if not live[0] or token[0].item() in stop_ids or token[0].item() not in tokenizer.text_ids:
            return None
        text += decoder.decode(tokenizer.decode_bytes([token[0].item()]))
        found = [text.index(stop) for stop in config.stop if stop in text]
        if found:
            text, safe = text[: min(found)], min(found)
        else:  # an end that may become a stop text waits
            begun = (k for stop in config.stop for k in range(1, len(stop)) if text.endswith(stop[:k]))
            safe = len(text) - max(begun, default=0)
        print(text[shown:safe], end="", flush=True)
        shown = max(shown, safe)
        return torch.tensor([bool(found)])

    c = config
    how = {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p, "min_p": c.min_p}
    how |= {"repetition_penalty": c.repetition_penalty, "stop_ids": stop_ids, "generator": generator}
    generate(model, [ids], min(c.max_new_tokens, room), on_tokens=show, **how)
    print(text[shown:], flush=True)
    return text


def main(config):
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"--device {device!r} cannot be used here; choose cpu, or cuda where torch sees a GPU")
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    model, tokenizer, path = open_checkpoint(config.checkpoint, device)
    chat = is_chat_model(path, tokenizer)
    stop_ids = tokenizer.stop_ids if chat else (tokenizer.endoftext_id,)
    generator = torch.Generator().manual_seed(config.seed)
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.autocast("cuda", torch.bfloat16, enabled=on_gpu)
    if config.prompt is not None:
        if chat:
            ids, _ = tokenizer.encode_chat([{"role": "user", "content": config.prompt}], True)
        else:
            ids = tokenizer.encode(config.prompt) or [tokenizer.endoftext_id]
        with half:
            answer(model, tokenizer, ids, stop_ids, config, generator)
        return
    if not chat:
        raise ConfigError(f"{path} is a base model, not trained to chat; give it a --prompt to continue")
    print("Chat. An empty line ends it, /new starts over.")
    history = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        if text == "/new":
            history = []
            continue
        history.append({"role": "user", "content": text})
        try:
            ids, _ = tokenizer.encode_chat(history, True)
            while len(history) > 1 and len(ids) + 16 > model.config.context:
                del history[:2]  # the oldest exchange makes room
                print("(the context is full: the oldest exchange was forgotten)")
                ids, _ = tokenizer.encode_chat(history, True)
            with half:
                said = answer(model, tokenizer, ids, stop_ids, config, generator)
            history.append({"role": "assistant", "content": said})
        except (KeyboardInterrupt, ConfigError, TokenizerError) as error:  # such a message does not count
            print("(stopped)" if isinstance(error, KeyboardInterrupt) else f"({error})")
            history.pop()


def demo():
    """Without arguments: what a batch says does not depend on the batch."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=50, context=64)).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    uniforms = torch.rand(6, 20)
    batch = generate(model, prompts, 20, n=2, stop_ids=(7,), uniforms=uniforms)
    print("3 prompts of 3, 7 and 1 tokens, 2 rollouts each, stop token 7: every row alone says the same")
    for i, prompt in enumerate(prompts):
        for r in (2 * i, 2 * i + 1):
            alone = generate(model, [prompt], 20, stop_ids=(7,), uniforms=uniforms[r : r + 1])
            length = alone.mask.sum().item()
            assert batch.ids[r, :length].tolist() == alone.ids[0].tolist()
            assert batch.mask[r].sum() == length
            print(f"  prompt {i} rollout {r % 2}: {length:2d} tokens, log π {batch.logprobs[r].sum().item():7.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        demo()
        print("\nto use a checkpoint: python generate.py --checkpoint DIR --prompt TEXT (see --help)")
    else:
        run(main, Config, __doc__)
