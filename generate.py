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
import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from support.checkpoints import is_chat_model, open_checkpoint
from support.cli import run
from support.devices import free_memory
from support.errors import ConfigError, TokenizerError
from support.fast_decode import DecodeStep, StaticStep
from transformer import Transformer, TransformerConfig


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
    dynamic = step = DecodeStep(model, cache) if DecodeStep.fits(model, cache) else None
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
        # rows fill them up to a multiple of 4, for every new number of rows costs something too: see round_up_to_8.
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
