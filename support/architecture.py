"""Which architectures are possible: the checks of TransformerConfig (transformer.py), of what builds on it, and of a
layer of attention.py that is built by itself; and the defaults that follow from other fields."""

from positional import rope_attention_factor, rope_frequencies
from support.checks import check, declared
from support.errors import CheckpointError

# Beyond any model: a damaged config that asks for more would take all memory, or hours. MOST is for the fields that are
# not in MOST_OF; no memory depends on its last two.
MOST = 2**24
MOST_OF = dict(n_layer=2**10, n_expert=2**12, head_dim=2**16, window=2**62, rope_theta=2**62)


def check_architecture(config):
    """CheckpointError, one line, on the first field that its type does not allow, that is beyond any model, or that
    contradicts another."""
    c = config
    check(c, CheckpointError, dashes="")
    for name in declared(type(c)):
        value, most = getattr(c, name), MOST_OF.get(name, MOST)
        if isinstance(value, int) and value > most:
            raise CheckpointError(f"{name} is {value}, more than any model has; at most {most}")
    if c.n_head % c.n_kv_head:
        raise CheckpointError(f"n_head {c.n_head} is not a multiple of n_kv_head {c.n_kv_head}")
    if c.head_dim is None and c.width % c.n_head:
        raise CheckpointError(f"width {c.width} is not a multiple of n_head {c.n_head}")
    head_dim = c.head_dim or c.width // c.n_head
    if c.positions == "rope" and head_dim % 2:
        raise CheckpointError(f"RoPE rotates pairs, but head_dim is {head_dim}; it must be even")
    if c.positions == "sinusoidal" and c.width % 2:
        raise CheckpointError(f"sines and cosines come in pairs, but width is {c.width}; it must be even")
    if c.rope_scaling is not None and (c.positions != "rope" or not isinstance(c.rope_scaling, dict)):
        raise CheckpointError(f"rope_scaling is {c.rope_scaling!r}; it takes a dict, and positions of rope")
    try:
        rope_frequencies(4, c.rope_theta, c.rope_scaling, c.context)  # for its checks; 4: any width
        rope_attention_factor(c.rope_scaling, c.context)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"rope_scaling is {c.rope_scaling!r}: {error}") from None
    if c.sinks and c.window is None:
        raise CheckpointError(f"sinks is {c.sinks}, but without a window every token is visible anyway")
    if c.n_expert and c.n_expert_active > c.n_expert:
        raise CheckpointError(f"n_expert_active is {c.n_expert_active}, but n_expert is only {c.n_expert}")
    if c.n_expert and c.moe_every > c.n_layer:
        raise CheckpointError(f"moe_every is {c.moe_every}: no block of {c.n_layer} would be a mixture")


def derived_defaults(config):
    """The fields of a TransformerConfig whose defaults follow from others, filled in: a dict."""
    c, ffn_width, expert_width, scale = config, config.ffn_width, config.expert_width, config.routed_scale
    if ffn_width is None:
        wanted = c.width * 8 / 3 if c.activation == "swiglu" else c.width * 4
        ffn_width = 32 * max(1, round(wanted / 32))
    if expert_width is None and c.n_expert:
        expert_width = max(1, ffn_width // (c.n_expert_active + c.n_shared_expert))
        expert_width -= expert_width % 8 if expert_width > 8 else 0  # whole 16 bytes of bf16: see fast_experts
    if scale is None and c.n_expert:
        scale = float(c.n_expert_active if c.norm_topk_prob else 1)
    filled = dict(ffn_width=ffn_width, expert_width=expert_width, routed_scale=scale)
    filled["head_dim"] = c.head_dim or c.width // c.n_head
    filled["qkv_bias"] = c.bias if c.qkv_bias is None else c.qkv_bias
    return filled


def check_attention(width, n_head, n_kv_head, head_dim, window, sinks):
    """ValueError, one line, on what attention.Attention cannot be built from. None takes the default: n_kv_head that of
    n_head, head_dim width / n_head."""
    for name, n in dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim).items():
        if n is not None and n < 1:
            raise ValueError(f"{name} is {n}; it must be at least 1")
    if head_dim is None and width % n_head:
        raise ValueError(f"a width of {width} cannot be cut into {n_head} heads evenly; give head_dim")
    if n_kv_head is not None and n_head % n_kv_head:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens would hide a query from itself; it must be at least 1")
    if sinks < 0 or (sinks and window is None):
        raise ValueError(f"sinks is {sinks}; it must be 0 or more, and sinks have no effect without a window")
