"""Settings of a small encoder and of a small BERT, a function that randomises all weights, and three texts of different
lengths."""

import torch

from support.hf_bert import BERT

TINY = dict(vocab_size=61, context=20, n_layer=3, n_head=4, n_kv_head=2, width=24)
TINY_BERT = BERT.implied | TINY | dict(n_kv_head=4, ffn_width=40, n_type=2, norm_eps=1e-12)


def perturbed(model, seed=1):
    """Add noise to all weights, so that gains, biases and heads differ from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def example_texts(seed=2):
    """Three texts of 11, 7 and 1 tokens -> tokens, real, types, (3, 11) each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (3, 11), generator=generator)
    return (
        tokens,
        torch.arange(11) < torch.tensor([[11], [7], [1]]),
        torch.arange(11) // 4 % 2 * torch.ones(3, 1).long(),
    )
