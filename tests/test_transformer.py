"""transformer.py: the properties that every decoder must have, and its log-probabilities."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import SMALL, tiny

from attention import KVCache, document_mask
from norms import place, rms_norm
from support import devices
from support.attention_maps import attention_weights
from support.errors import CheckpointError
from support.logprobs import target_logprobs
from support.pretrain_report import flops_per_token
from transformer import Transformer, TransformerConfig, gpt2_config, masked_mean, token_logprobs


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_dropout_acts_in_training_only(placement, tokens):
    model = tiny(dropout=0.5, norm_placement=placement)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.dropout.p = 0.0
    assert not torch.equal(model(tokens), model(tokens))  # of the branches
    for block in model.blocks:
        block.dropout.p = 1.0
    x = model.embed(tokens)
    for block in model.blocks if placement == "post" else ():  # its norms stand in the stream
        x = block.norm2(block.norm1(x))
    torch.testing.assert_close(model.hidden(tokens), model.norm(x))
    model.dropout.p = 0.5
    assert not torch.equal(model(tokens), model(tokens))  # of the embeddings


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_a_block_is_place_twice(placement):
    """norms.place is the plain form of where the norms of a block stand."""
    block = tiny(norm_placement=placement, n_layer=1).double().blocks[0]
    for name, weight in block.named_parameters():
        if name.startswith("norm"):
            weight.data.fill_(1)
    x, ones = torch.randn(2, 5, SMALL["width"]).double(), torch.ones(SMALL["width"]).double()
    y = place(x, lambda z: block.attn(z), placement, lambda z: rms_norm(z, ones))
    expected = place(y, block.ffn, placement, lambda z: rms_norm(z, ones))
    torch.testing.assert_close(block(x, None, None), expected)


def test_sinusoidal_positions_are_added_to_scaled_embeddings(tokens):
    """√C x + PE by a loop, §3.4 and 3.5 of Vaswani et al.; the branches add nothing."""
    model = tiny(positions="sinusoidal", n_layer=1)
    for matrix in (model.blocks[0].attn.wo, model.blocks[0].ffn.down):
        matrix.weight.data.zero_()
    pe = [[wave(p / 10000 ** (2 * i / 16)) for i in range(8) for wave in (math.sin, math.cos)] for p in range(11)]
    expected = rms_norm(4 * model.embed(tokens) + torch.tensor(pe), model.norm.weight)
    torch.testing.assert_close(model.hidden(tokens), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(tokens, temperature):
    model = tiny().double()
    logits = model(tokens) / temperature
    expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(model, tokens, temperature).double(), expected, atol=1e-5, rtol=0)


def test_logprobs_where_they_count_and_nowhere_else(tokens, monkeypatch):
    model, sizes = tiny().double(), []
    x, y = tokens[:, :-1], tokens[:, 1:]
    counted, up = torch.rand(y.shape) < 0.4, torch.randn(y.shape)
    assert 0 < counted.sum() < counted.numel()
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        if weight is model.output:
            sizes.append(tuple(x.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    weights = list(model.parameters())
    every = model(x, targets=y, temperature=0.7)
    some = model(x, targets=y, temperature=0.7, counted=counted)
    torch.testing.assert_close(some, every * counted)
    expected = torch.autograd.grad((every * counted * up).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((some * up).sum(), weights), expected)
    assert sizes == [(y.numel(), model.config.width), (int(counted.sum()), model.config.width)]
    torch.testing.assert_close(token_logprobs(model, tokens, 0.7, counted=counted), every * counted)
    none = model(x, targets=y, counted=torch.zeros_like(counted))
    assert none.eq(0).all()
    none.sum().backward()
    assert all(w.grad.eq(0).all() for w in weights)


def test_token_logprobs_of_padded_and_packed_rows(tokens):
    model, a, b = tiny().double(), tokens[:1, :4], tokens[:1, 4:]
    alone = [token_logprobs(model, x, 0.7) for x in (a, b)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    out = token_logprobs(model, padded, 0.7, (real.long().cumsum(1) - 1).clamp(min=0), real)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3:], alone[0], atol=1e-5, rtol=0)
    positions, documents = torch.tensor([[*range(4), *range(7)]]), torch.tensor([[0] * 4 + [1] * 7])
    for mask in (document_mask(documents), document_mask(documents)[:, 0]):
        packed = token_logprobs(model, tokens[:1], 0.7, positions, mask)
        torch.testing.assert_close(packed[:, :3], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 4:], alone[1], atol=1e-5, rtol=0)  # entry 3 crosses the border
    shared = token_logprobs(model, tokens[:1], 0.7, positions[0], document_mask(documents))  # positions (T,)
    torch.testing.assert_close(shared, packed)


def test_chunked_logprobs_equal_plain_ones_and_their_gradients():
    torch.manual_seed(0)
    x, output = torch.randn(2, 7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets, up = torch.randint(0, 11, (2, 7)), torch.randn(2, 7)
    for numbers in (1, 33, 55, 11 * 13):  # 1, 3, 5 and 13 tokens a chunk of the 14
        plain, chunked = (target_logprobs(x, output, targets, 0.8, n) for n in (2**24, numbers))
        torch.testing.assert_close(chunked, plain)
        for a, b in zip(*(torch.autograd.grad(y, (x, output), up) for y in (chunked, plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    assert masked_mean(x, mask).item() == pytest.approx(8 / 3)
    assert masked_mean(x, mask.float()).item() == pytest.approx(8 / 3)
    assert masked_mean(x, torch.zeros(2, 2)).item() == 0
    assert masked_mean(x, torch.zeros(2, 2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(
    ("norm", "placement", "activation", "positions"),
    list(
        product(
            ["rms", "layer"], ["pre", "post", "sandwich"], ["swiglu", "gelu"], ["rope", "learned", "sinusoidal", "none"]
        )
    ),
)
def test_every_parameter_learns(norm, placement, activation, positions, tokens):
    model = tiny(norm=norm, norm_placement=placement, activation=activation, positions=positions, bias=True)
    token_logprobs(model, tokens).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all()
        if not name.endswith("wk.bias"):  # without RoPE or QK-norm, a shift of all keys changes no weight
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_no_token_sees_the_future(positions, placement, tokens):
    model = tiny(positions=positions, norm_placement=placement)
    before = model(tokens)
    for t in (1, 5, 10):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and every later one sees the change


def test_a_pad_alone_sees_itself(tokens):
    model, real = tiny(), torch.tensor([[False], [True]])
    for weights in attention_weights(model, tokens[:1, :1].repeat(2, 1), torch.zeros(2, 1, dtype=torch.long), real):
        assert torch.equal(weights.sum(-1), torch.ones(2, 4, 1))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_placement": "post"},
        {"norm_placement": "sandwich"},
        {"window": 3},
        {"window": 3, "sinks": 1},
        {"positions": "learned"},
        {"n_expert": 4, "balancing": "none"},
    ],
    ids=str,
)
def test_last_only_is_the_last_of_all(tokens, changes, padded, cached):
    """The last block computes one query then; the cache holds the keys of all."""
    model = tiny(**changes).eval()
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, :2] = not padded
    positions = (real.cumsum(1) - 1).clamp(min=0)
    found = []
    for last_only in (True, False):
        cache = model.make_cache(len(tokens), 24) if cached else None
        found.append([model(tokens, positions, real if padded else None, cache, last_only=last_only)[:, -1:]])
        if cached:
            whole = torch.cat([real, torch.ones_like(real[:, :1])], 1) if padded else None
            found[-1].append(model(tokens[:, :1], positions[:, -1:] + 1, whole, cache))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bf16_attention", [False, True])
def test_the_cache_has_the_dtype_in_which_attention_computes(bf16_attention, tokens, monkeypatch):
    """Another one would convert the keys and values of every step, without an error."""
    monkeypatch.setitem(devices.TRAITS, "cpu", replace(devices.TRAITS["cpu"], bf16_attention=bf16_attention))
    written, update = set(), KVCache.update
    monkeypatch.setattr(KVCache, "update", lambda *a: written.update(x.dtype for x in a[2:]) or update(*a))
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.make_cache(len(tokens), 24)
        model(tokens, cache=cache)
    assert written == {cache.store.dtype} == {torch.bfloat16 if bf16_attention else torch.float32}


def test_the_end_of_the_context():
    model = tiny()
    with pytest.raises(ValueError, match="25 tokens do not fit the model's context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_position_outside_the_table_is_an_error(positions, tokens):
    """Read as an index, −1 would be the last row."""
    model = tiny(positions=positions)
    for bad in (-1, model.config.context):
        with pytest.raises(ValueError, match=f"position {bad} asked for, the table has {model.config.context}"):
            model(tokens[:, :3], torch.tensor([0, 1, bad]))


def test_padding_and_documents(tokens):
    model, a, b = tiny().double(), tokens[:1, :4], tokens[:1, 4:]
    alone = [model(a), model(b)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    out = model(padded, (real.long().cumsum(1) - 1).clamp(min=0), real)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3:], alone[0], atol=1e-10, rtol=0)
    positions = torch.tensor([[*range(4), *range(7)]])
    documents = document_mask(torch.tensor([[0] * 4 + [1] * 7]))
    for mask in (documents, documents[:, 0]):  # (B, 1, T, T) and (B, T, T)
        packed = model(tokens[:1], positions, mask)
        torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-10, rtol=0)


SIGHT = {
    "full": {},
    "window": dict(window=4),
    "window of 1": dict(window=1),
    "sinks": dict(window=3, sinks=2),
    "mixture": dict(n_expert=5, moe_every=2),
    "sandwich, mixture, sinks": dict(norm_placement="sandwich", n_expert=3, n_shared_expert=1, window=5, sinks=1),
}


@pytest.mark.parametrize("changes", SIGHT.values(), ids=SIGHT)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_any_split_into_cached_calls_equals_one_pass(changes, chunks, pads):
    """With a cache from make_cache, rolling where there is a window; rows with pads on the left and rows without."""
    model, n = tiny(**changes).double(), sum(chunks)
    if n > 24:
        return
    tokens = torch.randint(0, 37, (2, n))
    for padded in (False, True):
        real = torch.arange(n) >= torch.tensor(pads)[:, None] if padded else torch.ones(2, n, dtype=torch.bool)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        cache, parts, done = model.make_cache(2, n), [], 0
        for piece in tokens.split(chunks, dim=1):
            here = slice(done, done + piece.shape[1])
            done = here.stop
            rest = (positions[:, here], real[:, :done]) if padded else (None, None)
            parts.append(model(piece, *rest, cache))
        once = model(tokens, positions, real) if padded else model(tokens)
        torch.testing.assert_close(torch.cat(parts, 1)[real], once[real], atol=1e-10, rtol=0)
        if "window" in changes:
            assert cache.keys[0].shape[2] == min(changes["window"] + changes.get("sinks", 0), n)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (3, 2)])
def test_a_window_hides_what_left_it(window, sinks, tokens):
    """In one layer a token sees the window and the sinks, nothing else; the cached steps agree far past the context."""
    model = tiny(n_layer=1, window=window, sinks=sinks).double()
    before = model(tokens)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        seen = ((model(changed) - before).abs().amax((0, 2)) > 1e-9).tolist()
        assert seen == [t <= m and (m - t < window or t < sinks) for m in range(11)]
    stream = torch.randint(0, 37, (1, 70))  # the context is 24
    cache, steps = model.make_cache(1, 70), []
    for t in range(70):
        steps.append(model(stream[:, t : t + 1], cache=cache))
    assert cache.keys[0].shape[2] == window + sinks
    torch.testing.assert_close(torch.cat(steps, 1), model(stream), atol=1e-10, rtol=0)


def test_mixtures_learn_and_count(tokens):
    torch.manual_seed(0)
    model = tiny(n_expert=5, n_shared_expert=1, moe_every=2, norm_placement="sandwich").train()
    assert [type(block.ffn).__name__ for block in model.blocks] == ["FeedForward", "MoE"]
    token_logprobs(model, torch.randint(0, 37, (8, 24))).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    dense, expert = Transformer(TransformerConfig(**SMALL)), 3 * 16 * model.config.expert_width
    assert model.config.expert_width == model.config.ffn_width // 3 // 8 * 8
    router, norms, norm = 16 * 5, 4 * 16, 3 * 16 * model.config.ffn_width
    assert model.num_params() == dense.num_params() - norm + 6 * expert + router + norms
    assert flops_per_token(model, 8) == flops_per_token(dense, 8) + 6 * (3 * expert + router - norm)
    full, narrow = (Transformer(TransformerConfig(**SMALL, window=w)) for w in (None, 3))
    exact = (1 + 2 + 3 * 14) / 16  # keys that a query sees on average, its own counted whole
    assert (
        abs((flops_per_token(narrow, 16) - 6 * (narrow.num_params() - 16 * 5 - 4 * 4)) / (12 * 2 * 4 * 4) - exact) < 0.1
    )
    assert flops_per_token(full, 16) - flops_per_token(narrow, 16) == 12 * 2 * 4 * 4 * (8 - (3 - 9 / 32))


def test_birth():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig())
    tokens = torch.randint(0, 512, (4, 50))
    assert abs(-token_logprobs(model, tokens).mean().item() - math.log(512)) < 0.15
    assert model.blocks[0].attn.wo.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[0].attn.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    attn, ffn, norms = 192 * (192 * 2 + 64 * 2), 192 * 512 * 3, 192 * 2 + 32 * 2
    assert model.num_params() == 512 * 192 + 4 * (attn + ffn + norms) + 192
    assert flops_per_token(model, 100) == 6 * (512 * 192 + 4 * (attn + ffn)) + 6 * 4 * 192 * 100
    untied = Transformer(TransformerConfig(tie_embeddings=False))
    assert untied.num_params() == model.num_params() + 512 * 192
    assert flops_per_token(untied, 100) == flops_per_token(model, 100)
    per_block = 4 * 192 * 192 + 4 * 192 + 8 * 192 * 192 + 5 * 192 + 4 * 192
    old = Transformer(gpt2_config())
    assert old.num_params() == (512 + 256) * 192 + 4 * per_block + 2 * 192
    products = 512 * 192 + 4 * 12 * 192 * 192  # of weights; looking a position up is none
    assert flops_per_token(old, 100) == 6 * products + 6 * 4 * 192 * 100
    assert old.blocks[3].ffn.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert not old.blocks[0].attn.wq.bias.any()
    assert (old.norm.weight == 1).all()


def test_it_can_overfit(tokens):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = -token_logprobs(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_bad_configs(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        Transformer.from_pretrained(tmp_path / "missing")
    for changes, message in [
        ({"norm": "batch"}, "norm 'batch' is not known; use rms or layer"),
        ({"n_kv_head": 3}, "multiple"),
        ({"width": 18}, "not a multiple of n_head"),
        ({"head_dim": 5}, "must be even"),
        ({"n_layer": 0}, "at least 1"),
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"sinks": 2}, "without a window every token is visible anyway"),
        ({"sinks": -1, "window": 3}, "sinks is -1"),
        ({"n_expert": 2, "n_expert_active": 3}, "n_expert_active is 3, but n_expert is only 2"),
        ({"n_expert": -1}, "n_expert is -1"),
        ({"n_expert": 4, "moe_every": 3}, "moe_every is 3: no block of 2 would be a mixture"),
        ({"n_expert": 4, "expert_width": 0}, "expert_width is 0"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor is inf"),
        ({"norm_eps": None}, "norm_eps is None"),
        ({"balancing": "luck"}, "balancing 'luck' is not known; use aux, bias or none"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not known"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor of 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "positions": "learned"}, "positions of rope"),
        ({"rope_scaling": "yarn"}, "it takes a dict"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}}, "rope_scaling is"),
        ({"positions": "sinusoidal", "width": 15, "n_head": 3, "n_kv_head": 1}, "must be even"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            TransformerConfig(**SMALL | changes)
