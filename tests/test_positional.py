"""positional.py against transformers, complex numbers and plain loops."""

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from positional import (
    LearnedPositions,
    apply_rope,
    apply_rope_interleaved,
    interleaved_to_half,
    rope_attention_factor,
    rope_cos_sin,
    rope_frequencies,
    rotate,
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS = [  # (max_position_embeddings, rope_scaling)
    (2048, {"rope_type": "linear", "factor": 4.0}),
    (2048, {"rope_type": "dynamic", "factor": 1.0}),
    (2048, {"rope_type": "dynamic", "factor": 2.5}),
    (8192, YARN),
    (8192, YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    (8192, YARN | {"attention_factor": 1.3}),
    (8192, YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}),
    (8192, YARN | {"factor": 40.0, "original_max_position_embeddings": 64}),  # the ramp cut off at its left end
    (8192, {"rope_type": "yarn", "factor": 4.0}),  # then max_position_embeddings is the trained length
    (131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    (
        131072,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ),
]


@pytest.mark.parametrize(("context", "scaling"), SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(6, 10000.0), (64, 500000.0), (128, 1000000.0)])
def test_scaled_frequencies_equal_transformers(context, scaling, head_dim, theta):
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    for length in (None, 100, 5000, 200000):
        theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
        ours = rope_frequencies(head_dim, theta, scaling, context, length)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=4e-7)
        assert rope_attention_factor(scaling, context) == pytest.approx(factor, rel=1e-12)
        inside = rope_frequencies(head_dim, 1.0, {**scaling, "rope_theta": theta}, context, length)
        assert torch.equal(inside, ours)  # transformers 5 keeps the base in the dict
    old_name = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert torch.equal(
        rope_frequencies(head_dim, theta, old_name, context), rope_frequencies(head_dim, theta, scaling, context)
    )


def test_scaled_tables_equal_transformers():
    scaling = YARN | {"original_max_position_embeddings": 16}
    config = LlamaConfig(
        hidden_size=H * D, num_attention_heads=H, head_dim=D, max_position_embeddings=64, rope_parameters=dict(scaling)
    )
    positions = torch.tensor([[0, 1, 17, 50, 63]])
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rope_cos_sin(positions, rope_frequencies(D, 10000.0, scaling, 64), rope_attention_factor(scaling, 64))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_unscaled_frequencies_equal_transformers_to_the_last_bit():
    for theta in (10000.0, 1000000.0):
        config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters={"rope_theta": theta})
        theirs, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        assert torch.equal(rope_frequencies(128, theta), theirs)
        assert torch.equal(rope_frequencies(128, theta, {"rope_type": "default"}), theirs)
    assert rope_attention_factor(None) == 1.0


def test_scaling_that_cannot_be_used():
    for scaling, words in [
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not known; choose one of default, linear"),
        ({"rope_type": "linear"}, "'linear' lacks factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor of 0.5; it must be a number of at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor of '4'"),
        ({"rope_type": "linear", "factor": math.inf}, "factor of inf"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": math.nan}, "beta_fast of nan; it must be a finite number"),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": -5.0}, "rope_theta is -5.0; it must be a number above 0"),
        ({"rope_type": "dynamic", "factor": 2.0}, "needs the length that the model was trained with"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("yarn", "is 'yarn'; it must be a dict"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8},
            "low_freq_factor below high_freq_factor",
        ),
    ]:
        for function in (lambda s: rope_frequencies(8, 10000.0, s), rope_attention_factor):
            with pytest.raises(ValueError, match=words):
                function(scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rope_without_gradients_gives_the_same(dtype):
    x = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)  # as in a model: not contiguous
    for positions in (torch.arange(T), torch.arange(B * T).view(B, T)):
        tables = rope_cos_sin(positions, rope_frequencies(D))
        with torch.no_grad():
            without = apply_rope(x, *tables)
        assert without.dtype == dtype
        torch.testing.assert_close(
            without, apply_rope(x, *tables), atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0
        )


def test_what_a_model_runs_is_the_plain_rotation():
    """apply_rope (support/rotation.py) = rotate in value and gradient, with tables for all rows and for each."""
    x, upstream = (torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    for positions in (torch.arange(T), torch.arange(B * T).view(B, T)):
        cos, sin = (table.double() for table in rope_cos_sin(positions, rope_frequencies(D)))
        plain = rotate(x, *(table.view(-1, 1, T, D) for table in (cos, sin)))
        fast = apply_rope(x, cos, sin)
        torch.testing.assert_close(fast, plain, atol=1e-13, rtol=0)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (fast, plain)]
        torch.testing.assert_close(*gradients, atol=1e-13, rtol=0)


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
    half = x.detach().bfloat16().requires_grad_()
    assert apply_rope(half, cos, sin).dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(apply_rope(half, cos, sin), half, torch.ones(B, H, T, D, dtype=torch.bfloat16))
    (expected,) = torch.autograd.grad(apply_rope(x, cos.double(), sin.double()).sum(), x)
    torch.testing.assert_close(gradient.double(), expected, atol=0.01, rtol=2**-8)
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
    with pytest.raises(ValueError, match="position -1 asked for, the table has 9"):
        table(torch.tensor([[0, 3, -1]]))
    upstream, positions = torch.randn(2, 3, 4), torch.tensor([[1, 1, 8], [0, 1, 8]])
    (gradient,) = torch.autograd.grad(table(positions), table.weight, upstream)
    rows = [upstream[positions == p].sum(0) for p in range(9)]  # of one position, gradients add up
    torch.testing.assert_close(gradient, torch.stack(rows))
