"""Before generate.py reads the first prompt: whether the request can be met, and how many prompts fit into memory."""

from support.devices import free_memory
from support.errors import ConfigError


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
    c, slots = model.config, max(map(len, prompts)) + max_new_tokens
    row = 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim * slots  # keys and values of a rollout in fp32
    return max(1, int(memory // (row * n)))
