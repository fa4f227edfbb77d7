"""To look inside a model: the attention weights of its layers, and how wide they look."""

import torch


@torch.no_grad()
def attention_weights(model, *inputs, **named_inputs):
    """The attention weights of each attention.Attention in `model` when it is called with these inputs, in the order of
    the calls: a list of (B, H, T, S), fp32 at least, S as in attention.py's table. Rows sum to 1; weights[layer][b, h]
    is the heat map of one head. The formula computes them, since the fused kernel never holds them."""
    layers = [m for m in model.modules() if hasattr(m, "record")]
    weights = []
    for layer in layers:
        layer.record = weights
    try:
        model(*inputs, **named_inputs)
    finally:
        for layer in layers:
            layer.record = None
    return weights


def attention_entropy(weights):
    """−Σ w ln w in nats, weights (..., S) -> (...). Its exponential is the number of tokens a query looks at: 1 if it
    looks at one, 8 if it takes the mean of 8."""
    return torch.special.entr(weights).sum(-1)
