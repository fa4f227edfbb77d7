"""What generate.py needs before it reads the first prompt: the flags of its script; whether a request can be met; how
many prompts fit into memory; and which tokens the prompts hold, for the repetition penalty.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch

from attention import KVCache
from support.checks import Amount, Count, Fraction, Range, Seed, check
from support.devices import free_memory
from support.errors import ConfigError
from support.fast_decode import decoding_dtype


@dataclass
class Config:
    """Continue a prompt with a trained checkpoint, or chat with it."""

    checkpoint: str
    """Checkpoint directory, a run directory such as runs/sft, a .gguf file, or a name on the Hugging Face hub."""
    prompt: str | None = None
    """What to answer (a chat model) or to continue (a base model). Without it: chat."""
    max_new_tokens: Count = 200
    """Longest answer in tokens; shorter if the context is full before."""
    temperature: Amount = 0.0
    """0 is greedy."""
    top_k: Count | None = None
    """Sample only among the k most likely tokens."""
    top_p: Annotated[float, Range(float, 0, 1, above=True, below=False)] | None = None
    """Sample only among the most likely tokens that together have this probability."""
    min_p: Fraction | None = None
    """Sample only among tokens with at least this share of the most likely token's probability."""
    repetition_penalty: Annotated[float, Range(float, 1e-5)] = 1.0
    """Above 1 makes tokens that the prompt or the answer already holds less likely."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer and are not shown: --stop+ "Q:" --stop+ "A:"."""
    seed: Seed = 0
    """Random seed of the sampling."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda or mps (Apple)."""

    @property
    def sampling(self):
        """{name: value} of `generate`'s arguments that say what is sampled from."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self):
        check(self)
        if 0 < self.temperature < 1e-5:  # logits over it overflow
            raise ConfigError(f"--temperature is {self.temperature}; it must be 0 (greedy) or at least 1e-5")
        if self.temperature == 0 and (self.top_k or self.top_p or self.min_p):
            raise ConfigError("top_k, top_p and min_p choose what is sampled from: give a --temperature above 0")
        if self.temperature == 0 and self.seed != type(self).seed:
            raise ConfigError("--seed has no effect on greedy answers: give a --temperature above 0, or leave it out")
        if "" in self.stop:
            raise ConfigError("--stop holds an empty text, which would end every answer at once")


def check_request(model, prompts, max_new_tokens, n, uniforms, *, temperature, top_k, top_p, min_p, penalty):
    """ConfigError, one line, on the first of `generate`'s arguments that cannot be used."""
    context, longest = model.config.context, max((len(p) for p in prompts), default=0)
    if not prompts or not all(prompts):
        raise ConfigError("nothing to continue: a prompt needs at least one token")
    if longest + max_new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of {context}"
        )
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ConfigError(f"temperature is {temperature} and top_k {top_k}; they must be at least 0 and 1")
    if not 0 < (1 if top_p is None else top_p) <= 1 or not 0 <= (min_p or 0) <= 1 or not penalty > 0:
        raise ConfigError(
            f"top_p is {top_p}, min_p {min_p} and repetition_penalty {penalty}; they must be above 0 and at most 1, "
            "from 0 to 1, and above 0"
        )
    if max_new_tokens < 1 or n < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and n is {n}; both must be at least 1")
    if uniforms is not None and uniforms.shape != (len(prompts) * n, max_new_tokens):
        raise ConfigError(f"uniforms are {tuple(uniforms.shape)}, not {(len(prompts) * n, max_new_tokens)}")


def prompts_that_fit(model, prompts, max_new_tokens, n, memory=None):
    """How many of the prompts, n rollouts each, one batch may hold, at least 1. memory: bytes for keys and values,
    default half of what is free."""
    if memory is None:
        free = free_memory(model.embed.weight.device)
        memory = (1 << 40 if free is None else free) // 2
    c, longest = model.config, max(map(len, prompts))
    numbers = 2 * c.n_layer * c.n_kv_head * c.head_dim  # of the keys and values of a token
    dtype = decoding_dtype(model, KVCache(1, 1, 1, 1, 1)) or torch.float32
    # a prompt's in the prefill, at most fp32; then those of its n rollouts, in the dtype that decoding holds them in
    prompt = numbers * (4 * longest + dtype.itemsize * n * (longest + max_new_tokens))
    return max(1, int(memory // prompt))


def room_after(ids, model):
    """How many tokens the context has left after a prompt. ConfigError if none."""
    context = model.config.context
    if len(ids) >= context:
        raise ConfigError(f"the prompt has {len(ids)} tokens, the model has a context of {context}; shorten the prompt")
    return context - len(ids)


def seen_in(prompts, vocab_size, device):
    """Lists of ids -> (N, V) bool: which tokens each prompt holds."""
    every_id = torch.arange(vocab_size)
    return torch.stack([torch.isin(every_id, torch.tensor(list(prompt))) for prompt in prompts]).to(device)
