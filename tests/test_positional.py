"""positional.py against transformers, complex numbers and plain loops."""

import math

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from positional import (
    LearnedPositions,
    apply_rope,
    apply_rope_interleaved,
    interleaved_to_half,
    rope_cos_sin,
    rope_frequencies,
    sinusoidal_positions,
)

B, H, T, D = 2, 3, 5, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_rope_equals_transformers():
    config = Qwen3Config(hidden_size=H * D, num_attention_heads=H, head_dim=D, rope_theta=5000.0)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    q, k = torch.randn(B, H, T, D), torch.randn(B, 1, T, D)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])
    theirs = Qwen3RotaryEmbedding(config)(q, positions)
    cos, sin = rope_cos_sin(positions, rope_frequencies(D, 5000.0))
    torch.testing.assert_close((cos, sin), theirs, atol=1e-6, rtol=0)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, *theirs)
    torch.testing.assert_close(apply_rope(q, cos, sin), expected_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(apply_rope(k, cos, sin), expected_k, atol=1e-5, rtol=0)


def test_frequencies_by_hand():
    assert rope_frequencies(6, 1000.0).tolist() == pytest.approx([1.0, 0.1, 0.01])


def test_rope_is_a_complex_rotation():
    x = torch.randn(B, H, T, D)
    cos, sin = rope_cos_sin(torch.arange(3, 3 + T), rope_frequencies(D))
    out = apply_rope(x, cos, sin)
    for i in range(D // 2):
        for t in range(T):
            angle = (t + 3) * 10000 ** (-2 * i / D)
            a, b = x[0, 1, t, i].item(), x[0, 1, t, i + D // 2].item()
            turned = complex(a, b) * complex(math.cos(angle), math.sin(angle))
            assert out[0, 1, t, i].item() == pytest.approx(turned.real, abs=1e-5)
            assert out[0, 1, t, i + D // 2].item() == pytest.approx(turned.imag, abs=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def score(m, n):
        cos, sin = rope_cos_sin(torch.tensor([m]), rope_frequencies(D))
        kcos, ksin = rope_cos_sin(torch.tensor([n]), rope_frequencies(D))
        return (apply_rope(q, cos, sin) * apply_rope(k, kcos, ksin)).sum().item()

    assert score(0, 9) == pytest.approx(score(40, 49), abs=1e-4)
    assert abs(score(0, 9) - score(0, 10)) > 1e-3
    assert abs(score(0, 9) - score(9, 0)) > 1e-3


def test_rope_keeps_lengths_dtype_and_gradients():
    x = torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_cos_sin(torch.arange(T), rope_frequencies(D))
    torch.testing.assert_close(apply_rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos.double(), sin.double()), (x,))
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    rows = torch.arange(T).expand(B, T)
    torch.testing.assert_close(apply_rope(x, *rope_cos_sin(rows, rope_frequencies(D))), apply_rope(x, cos, sin))


def test_the_two_conventions_agree_on_permuted_weights_only():
    W, K, x = torch.randn(H * D, 7), torch.randn(H * D, 7), torch.randn(T, 7)
    positions = torch.arange(T)
    cos, sin = rope_cos_sin(positions, rope_frequencies(D))

    def heads(weight):
        return (x @ weight.t()).view(1, T, H, D).transpose(1, 2)

    theirs = apply_rope_interleaved(heads(W), positions) @ apply_rope_interleaved(heads(K), positions).mT
    turned = [apply_rope(heads(interleaved_to_half(w, H)), cos, sin) for w in (W, K)]
    torch.testing.assert_close(turned[0] @ turned[1].mT, theirs, atol=1e-4, rtol=0)
    wrong = apply_rope(heads(W), cos, sin) @ apply_rope(heads(K), cos, sin).mT
    assert (wrong - theirs).abs().max() > 0.1


def test_sinusoidal_by_loop():
    got = sinusoidal_positions(torch.tensor([0, 3, 70]), 6)
    for row, p in enumerate((0, 3, 70)):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert got[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert got[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_learned():
    table = LearnedPositions(9, 4)
    assert torch.equal(table(torch.tensor([[8, 0]])), table.weight[[8, 0]][None])
    with pytest.raises(ValueError, match="position 9 asked for, the table has 9"):
        table(torch.tensor([9]))
