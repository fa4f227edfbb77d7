"""Decoding: turn a model into text, one row or a thousand at a time.

    token_t ~ softmax(logits_t / temperature)

The prompt is read in one pass that fills the key/value cache (prefill); after it each step reads one token per row
(decode). Four ideas make it fast without making it complicated:

* the prompts of a batch are padded on the *left*, so that all rows write their next token into the same cache
  slot; a mask hides the pads and each row keeps its own positions;
* a prompt with n rollouts is prefilled once and its cache copied to the n rows;
* rows that have met a stop token leave the batch as soon as a quarter of it is done;
* every row samples by inverse transform from its own uniform number: token = CDF⁻¹(u). One draw of a
  (rows, max_new_tokens) table fixes all of the randomness beforehand, so what a row says does not depend on which
  rows stand beside it, on when they leave, or on how a batch is spread over GPUs.

Truncation (top-k, Fan et al. 2018; top-p, arXiv:1904.09751) is for reading pleasure. Rollouts for RL must sample
by temperature alone: the log-probabilities that come back, and the loss that scores them, are those of the full
softmax, and a truncated sampler would not be the policy that is trained.

Run it:
    python generate.py --checkpoint runs/sft --prompt "Tom has 5 apples. He buys 3 more. How many now?"
    python generate.py --checkpoint runs/sft          # chat; an empty line ends it
"""

import codecs
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import jsonargparse
import torch

from data import DataError
from tokenizer_bpe import TokenizerError, load_tokenizer
from transformer import CheckpointError, Transformer, TransformerConfig


class ConfigError(ValueError):
    """Settings that do not fit together or an input that cannot be used: one line says what to change."""


@dataclass
class Rollout:
    """Completions only. T is the length of the longest; a row that ended earlier is padded."""

    ids: torch.Tensor  # (N·n, T) int64, 0 where mask is False
    mask: torch.Tensor  # (N·n, T) bool, True on sampled tokens, the stop token included
    logprobs: torch.Tensor  # (N·n, T) fp32, log π of each sampled token at the sampling temperature

    def texts(self, tokenizer):
        """The completions as strings, without special tokens."""
        special = set(tokenizer.special_ids.values())
        rows = zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        return [
            tokenizer.decode([i for i, real in zip(ids, mask, strict=True) if real and i not in special])
            for ids, mask in rows
        ]


def truncate(probs, top_k=None, top_p=None):
    """Zero the tail of each row: all but the k largest; all but the smallest set that holds mass p. (B, V)"""
    if top_k is not None and top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None and top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass in front of each token: the first one always stays
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs


def sample(logits, u, temperature=1.0, top_k=None, top_p=None):
    """One token per row: logits (B, V), u (B,) uniform in [0, 1) -> ids (B,), log-probabilities (B,) in fp32.

    Temperature 0 is greedy. The log-probabilities are those of the softmax at the temperature (at 1 if greedy),
    never of the truncated one.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cdf = truncate(logprobs.exp(), top_k, top_p).cumsum(-1)  # (B, V)
        # right=True: the first token whose cumulative mass exceeds u, so one of probability 0 is never drawn
        ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


@torch.no_grad()
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
    uniforms=None,
    on_tokens=None,
):
    """Continue N prompts (lists of ids), n rollouts each; rows i·n … i·n + n − 1 belong to prompt i.

    A row ends with a stop id, which it keeps, or after max_new_tokens. generator: a CPU torch.Generator, or give
    the (N·n, max_new_tokens) table of uniforms yourself; on_tokens(ids (N·n,), live (N·n,)) is called at each step,
    for streaming. Raises ConfigError on an empty prompt or one that leaves no room in the model's context.
    """
    context, lengths = model.config.context, [len(p) for p in prompts]
    if not prompts or not min(lengths):
        raise ConfigError("nothing to continue: a prompt needs at least one token")
    longest, rows = max(lengths), len(prompts) * n
    if longest + max_new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of {context}"
        )
    was_training = model.training
    model.eval()
    device = model.embed.weight.device
    if uniforms is None:
        uniforms = torch.rand(rows, max_new_tokens, generator=generator)
    uniforms = uniforms.to(device)
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
    logits = logits.repeat_interleave(n, dim=0)  # (N·n, V)
    position = positions[:, -1].repeat_interleave(n, dim=0)  # (N·n,) of the last token read
    visible = torch.ones(rows, longest + max_new_tokens, dtype=torch.bool, device=device)
    visible[:, :longest] = real.repeat_interleave(n, dim=0)

    ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    row = torch.arange(rows, device=device)  # which output row each row of the shrinking batch is
    live = torch.ones(rows, dtype=torch.bool, device=device)
    length = 0
    for t in range(max_new_tokens):
        token, logprob = sample(logits, uniforms[row, t], temperature, top_k, top_p)  # (B,), (B,)
        ids[row, t] = token * live
        mask[row, t] = live
        logprobs[row, t] = logprob * live
        length = t + 1
        if on_tokens is not None:
            on_tokens(ids[:, t], mask[:, t])
        live = live & ~torch.isin(token, stop)
        left = int(live.sum())
        if left == 0 or length == max_new_tokens:
            break
        if left <= 0.75 * len(live):  # copying the survivors costs about a step, so wait until it pays
            stay = live.nonzero().squeeze(-1)
            cache.keep(stay)
            row, live, token, position = row[stay], live[stay], token[stay], position[stay]
            visible = visible[stay]
        position = position + 1
        seen = visible[:, : cache.length + 1] if padded else None
        logits = model(token[:, None], position[:, None], seen, cache)[:, -1]  # (B, V)
    model.train(was_training)
    return Rollout(ids[:, :length], mask[:, :length], logprobs[:, :length])


# ---------------------------------------------------------------------------------------------------------------
# Opening a checkpoint and reading flags: used by every script from here on.


def resolve_checkpoint(path):
    """A checkpoint directory, or a run directory, of which `best`, else `last` is meant. Raises CheckpointError."""
    path = Path(path)
    for candidate in (path, path / "best", path / "last", path / "last.old"):
        if (candidate / "config.json").is_file():
            return candidate
    what = "holds no checkpoint" if path.is_dir() else "is not there"
    raise CheckpointError(f"{path} {what}; give a run directory or one that save_pretrained wrote")


def open_checkpoint(path, device="cpu", dropout=0.0):
    """-> (model in fp32, tokenizer, directory). Raises CheckpointError, also if the two vocabularies differ."""
    path = resolve_checkpoint(path)
    tokenizer = load_tokenizer(path)
    model = Transformer.from_pretrained(path, dropout=dropout)
    if tokenizer.vocab_size > model.config.vocab_size:  # published models pad theirs, so it may be larger
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model.to(device), tokenizer, path


def is_chat_model(path, tokenizer):
    """Whether the checkpoint was trained to end its turns: its generation_config.json then stops at <|im_end|>."""
    try:
        stop = json.loads((Path(path) / "generation_config.json").read_text())["eos_token_id"]
    except (OSError, ValueError, KeyError):
        return False
    return tokenizer.special_ids.get("<|im_end|>", -1) in (stop if isinstance(stop, list) else [stop])


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None):
        """One line, no usage dump: what is wrong, and where the flags are listed."""
        text = " ".join(str(message).split())
        if int(os.environ.get("RANK", 0)) == 0:
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
    except (ConfigError, CheckpointError, TokenizerError, DataError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------
# The script: continue a prompt, or chat.


@dataclass
class Config:
    """Continue a prompt with a trained checkpoint, or chat with it."""

    checkpoint: str
    """Checkpoint directory, or a run directory such as runs/sft."""
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
    seed: int = 0
    """Of the sampling."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def answer(model, tokenizer, ids, stop_ids, config, generator):
    """Stream the continuation of `ids` to stdout; returns its text."""
    room = model.config.context - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the model has a context of {model.config.context}; shorten the prompt"
        )
    decoder, pieces = codecs.getincrementaldecoder("utf-8")(errors="replace"), []

    def show(token, live):  # a character may span several tokens: the decoder holds back an unfinished one
        if live[0] and token[0].item() not in stop_ids:
            pieces.append(decoder.decode(tokenizer.decode_bytes([token[0].item()])))
            print(pieces[-1], end="", flush=True)

    c = config
    length = min(c.max_new_tokens, room)
    generate(model, [ids], length, 1, c.temperature, c.top_k, c.top_p, stop_ids, generator, on_tokens=show)
    print(flush=True)
    return "".join(pieces)


def main(config):
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"--device {device!r} cannot be used here; choose cpu, or cuda where torch sees a GPU")
    model, tokenizer, path = open_checkpoint(config.checkpoint, device)
    chat = is_chat_model(path, tokenizer)
    stop_ids = tokenizer.stop_ids if chat else (tokenizer.endoftext_id,)
    generator = torch.Generator().manual_seed(config.seed)
    if config.prompt is not None:
        if chat:
            ids, _ = tokenizer.encode_chat([{"role": "user", "content": config.prompt}], True)
        else:
            ids = tokenizer.encode(config.prompt) or [tokenizer.endoftext_id]
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
        ids, _ = tokenizer.encode_chat(history, True)
        while len(history) > 1 and len(ids) + 16 > model.config.context:
            del history[:2]  # the oldest exchange makes room
            print("(the context is full: the oldest exchange was forgotten)")
            ids, _ = tokenizer.encode_chat(history, True)
        history.append({"role": "assistant", "content": answer(model, tokenizer, ids, stop_ids, config, generator)})


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
