"""lora.py: the two formulas and their gradients, PEFT's own, merging, and what leaves the model on disk."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from generate import generate
from lora import LoraConfig, LoRALinear, add_lora, lora_layers, lora_off, merge_lora, merged, unmerge_lora
from support.errors import CheckpointError
from support.lora_files import drop_lora, load_lora, load_lora_state, lora_state, save_lora
from transformer import Transformer, TransformerConfig, gpt2_config, token_logprobs

pytestmark = [  # PEFT's and transformers' words to each other
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]
ALL = ["attn.*", "ffn.*"]
KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def tiny(**changes):
    torch.manual_seed(0)
    small = dict(vocab_size=50, context=32, n_layer=2, n_head=4, n_kv_head=2, width=24, ffn_width=32)
    model = Transformer(TransformerConfig(**small | changes)).eval()
    return shaken(model)


def shaken(model, only=lambda p: True, seed=1):
    """Random values where training would have left some: gains of 1 and B = 0 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if only(p):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def trained(model):
    """As if its adapters had been trained."""
    return shaken(model, lambda p: p.requires_grad, seed=2)


def tokens(rows=3, length=9):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(3))


def layer(dora, bias=True, rank=3, alpha=5.0):
    torch.manual_seed(0)
    linear = LoRALinear(nn.Linear(7, 6, bias=bias).double(), rank, alpha, dora)
    return trained(linear)


# ------------------------------------------------------------------------------------------------ the formulas


@KINDS
def test_output_and_gradients_are_the_formulas(dora):
    """Written out row by row: W' from W, A, B and m; its gradient taken apart by hand as the docstring does."""
    ours = layer(dora)
    W, A, B, b = (t.detach() for t in (ours.base_weight, ours.lora_A, ours.lora_B, ours.bias))
    s, x, up = 5.0 / 3, torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    x.requires_grad_()
    V = torch.stack([W[i] + s * sum(B[i, j] * A[j] for j in range(3)) for i in range(6)])
    length = V.pow(2).sum(1).sqrt()
    m = ours.magnitude.detach() if dora else length
    merged_weight = torch.stack([m[i] * V[i] / length[i] for i in range(6)])
    expected = torch.stack([torch.stack([merged_weight @ token + b for token in row]) for row in x])
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.weight, merged_weight)

    ours(x).backward(up)
    G = torch.einsum("bto,bti->oi", up, x.detach())  # dL/dW'
    dV = (m / length)[:, None] * G
    torch.testing.assert_close(ours.lora_B.grad, s * dV @ A.T)
    torch.testing.assert_close(ours.lora_A.grad, s * B.T @ dV)
    torch.testing.assert_close(x.grad, up @ merged_weight)
    if dora:
        torch.testing.assert_close(ours.magnitude.grad, (G * V).sum(1) / length)
    assert ours.base_weight.grad is None
    assert ours.bias.grad is None


@KINDS
def test_reading_the_weight_has_the_gradients_of_calling_the_layer(dora):
    called, read = layer(dora), layer(dora)
    x, up = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    called(x).backward(up)
    F.linear(x, read.weight, read.bias).backward(up)
    for (name, a), b in zip(called.named_parameters(), read.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_lora_passes_gradcheck():
    ours = layer(False, bias=False)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def f(x, A, B):
        return torch.func.functional_call(ours, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, ours.lora_A, ours.lora_B))


@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_pefts(dora, bias):
    peft = pytest.importorskip("peft", reason="peft is not installed: the formulas above are the check then")
    ours = layer(dora, bias)
    with torch.no_grad():
        plain = nn.Linear(7, 6, bias=bias).double()
        plain.weight.copy_(ours.base_weight)
        if bias:
            plain.bias.copy_(ours.bias)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=dora, lora_dropout=0.0)
    wrapped = peft.get_peft_model(nn.Sequential(plain), settings, autocast_adapter_dtype=False)
    theirs = wrapped.base_model.model[0]
    pairs = [(ours.lora_A, theirs.lora_A["default"].weight), (ours.lora_B, theirs.lora_B["default"].weight)]
    if dora:
        pairs.append((ours.magnitude, theirs.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, other in pairs:
            assert mine.shape == other.shape
            other.copy_(mine)
    x, up = torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1), wrapped(x2)
    torch.testing.assert_close(y1, y2)
    y1.backward(up)
    y2.backward(up)
    torch.testing.assert_close(x1.grad, x2.grad)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad)
        assert mine.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.weight, wrapped.merge_and_unload()[0].weight)


# ------------------------------------------------------------------------------------------- adding and merging


@KINDS
def test_training_starts_at_the_given_model_and_moves_the_adapters_alone(dora):
    model = tiny()
    before, plain = model(tokens()), copy.deepcopy(model.state_dict())
    add_lora(model, 4, 8, ALL, dora)
    torch.testing.assert_close(model(tokens()), before, atol=1e-6, rtol=0)
    with lora_off(model):
        assert torch.equal(model(tokens()), before)
    parts = ("lora_A", "lora_B", "magnitude")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == set(parts[: 2 + dora])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-token_logprobs(model, tokens()).mean()).backward()
        optimizer.step()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert (model(tokens()) - before).abs().max() > 1e-2
    with lora_off(model):  # decay has not touched what is frozen
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.values(), strict=True))


def test_targets_are_patterns_for_the_end_of_a_name():
    def chosen(*targets):
        return sorted(lora_layers(add_lora(tiny(), 2, 2, targets)))

    assert chosen("wq") == ["blocks.0.attn.wq", "blocks.1.attn.wq"]
    assert chosen("blocks.1.*.w[kv]") == ["blocks.1.attn.wk", "blocks.1.attn.wv"]
    assert chosen("ffn.up", "blocks.0.attn.wo") == ["blocks.0.attn.wo", "blocks.0.ffn.up", "blocks.1.ffn.up"]
    assert len(chosen("*")) == len(chosen(*ALL)) == 14
    with pytest.raises(CheckpointError, match="'q_proj' matches no Linear layer; there are down, gate, up, wk"):
        chosen("wq", "q_proj")
    with pytest.raises(CheckpointError, match="'q' matches no"):  # a whole name, not a piece of one
        chosen("q")


def test_the_start_follows_from_the_seed_alone():
    torch.manual_seed(5)
    drawn = torch.rand(1)
    models = []
    for seed in (0, 0, 1):
        model = tiny()
        torch.manual_seed(5)
        models.append(lora_state(add_lora(model, 2, 2, ["wq", "ffn.down"], seed=seed)))
        assert torch.rand(1) == drawn  # the caller's random numbers stay
    key = "blocks.0.attn.wq.lora_A"
    assert torch.equal(models[0][key], models[1][key])
    assert not torch.equal(models[0][key], models[2][key])
    for name in (key, "blocks.0.ffn.down.lora_A"):  # Kaiming-uniform, a = √5, as PEFT
        limit = models[0][name].shape[1] ** -0.5
        assert 0.9 * limit < models[0][name].abs().max() <= limit


@KINDS
def test_merge_is_the_same_function_and_unmerge_is_exact(dora):
    model = trained(add_lora(tiny(), 4, 8, ALL, dora))
    names, state = [n for n, _ in model.named_parameters()], lora_state(model)
    before, adapters = model(tokens()), [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        merge_lora(model)
        assert not lora_layers(model)
        assert not any(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(model(tokens()), before, atol=1e-5, rtol=1e-5)
        unmerge_lora(model)
        assert torch.equal(model(tokens()), before)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(a, state[n]) for n, a in lora_state(model).items())
    again = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(adapters, again, strict=True))  # an optimizer still holds them
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    assert torch.equal(model(tokens()), before)


@KINDS
def test_drop_gives_the_base_back(dora):
    model = tiny()
    before, state = model(tokens()), copy.deepcopy(model.state_dict())
    drop_lora(trained(add_lora(model, 4, 8, ALL, dora)))
    assert torch.equal(model(tokens()), before)
    assert [n for n, _ in model.named_parameters()] == list(state)
    add_lora(model, 2, 2, ["wq"])  # and it can be adapted anew


def test_off_within_off_stays_off():
    model = trained(add_lora(tiny(), 4, 8, ["wq"]))
    with lora_off(model):
        base = model(tokens())
        with lora_off(model):
            pass
        assert torch.equal(model(tokens()), base)
    assert not torch.equal(model(tokens()), base)


def test_merged_within_merged_stays_merged():
    model = trained(add_lora(tiny(), 4, 8, ["wq"]))
    with merged(model):
        with merged(model):
            pass
        assert not lora_layers(model)
    assert lora_layers(model)
    with merged(merge_lora(model)):
        pass
    assert not lora_layers(model)


def test_adapters_of_a_bf16_model_are_fp32_and_its_outputs_bf16():
    model = nn.Linear(8, 5).to(torch.bfloat16)
    ours = LoRALinear(model, 2, 2, dora=True)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert ours.weight.dtype == torch.bfloat16
    assert ours.row_norms().dtype == torch.float32


def test_autocast_does_not_round_the_norms():
    ours = layer(True).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.row_norms(), torch.linalg.vector_norm(ours.direction(), dim=1))
        assert ours.direction().dtype == torch.float32
        inside = ours.weight
    assert torch.equal(inside, ours.weight)


def test_autocast_does_not_round_the_learned_length():
    """bf16 has no number between 1 and 1.0078: a factor of 1.003 on each row must act before the rounding."""
    ours = layer(True, bias=False).float()
    ours.reset()
    x = torch.randn(4000, ours.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = ours(x).float().abs().sum()
        ours.magnitude.mul_(1.003)
        assert (ours(x).float().abs().sum() / before).item() == pytest.approx(1.003, abs=3e-4)


def test_the_base_is_recognised_though_summed_in_another_order():
    model = add_lora(tiny(), 2, 2, ["wq"])
    state = lora_state(model)
    one = next(iter(lora_layers(model).values()))
    one.checksum *= 1 + 1e-13
    load_lora_state(model, state)
    one.base_weight.data[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match="not those of add_lora"):
        load_lora_state(model, state)


def test_merged_adapters_cannot_be_switched_off():
    model = add_lora(tiny(), 2, 2, ["wq"])
    with merged(model), pytest.raises(ValueError, match="unmerge_lora comes first"), lora_off(model):
        pass
    with lora_off(model):
        pass


# ---------------------------------------------------------------------------------------- inside a Transformer


@KINDS
def test_generation_and_scores_with_adapters_are_those_of_the_merged_model(dora):
    model = trained(add_lora(tiny(), 4, 8, ALL, dora))
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(token_logprobs(model, tokens()), token_logprobs(plain, tokens()), atol=1e-5, rtol=1e-5)
    prompts = [[1, 2, 3], [4, 5]]
    expected = generate(plain, prompts, 8, temperature=0).ids
    assert torch.equal(generate(model, prompts, 8, temperature=0).ids, expected)
    with merged(model):
        assert torch.equal(generate(model, prompts, 8, temperature=0).ids, expected)


def test_an_untied_head_can_be_adapted_and_a_tied_one_is_refused():
    model = add_lora(tiny(tie_embeddings=False), 4, 8, ["head"])
    token_logprobs(model, tokens()).sum().backward()
    assert model.head.lora_B.grad.abs().max() > 0
    trained(model)
    with merged(model):
        expected = token_logprobs(model, tokens())
    torch.testing.assert_close(token_logprobs(model, tokens()), expected)
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = two[0].weight
    with pytest.raises(CheckpointError, match="lora target 1 shares its weight"):
        add_lora(two, 2, 2, ["1"])


@KINDS
def test_in_a_mixture_of_experts_the_router_and_the_shared_expert_are_adapted(dora):
    """The router reads its weight instead of calling the layer, and has a gradient all the same."""
    model = tiny(n_expert=4, n_expert_active=2, n_shared_expert=1)
    add_lora(model, 2, 4, ["ffn.*"], dora)
    assert {name.partition("ffn.")[2] for name in lora_layers(model)} == {
        "router",
        "shared.gate",
        "shared.up",
        "shared.down",
    }
    trained(model)
    token_logprobs(model, tokens()).sum().backward()
    for name, layer in lora_layers(model).items():
        assert layer.lora_A.grad.abs().max() > 0, name
    with merged(model):
        expected = model(tokens())
    torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


@KINDS
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_saved_model_is_a_plain_checkpoint(kind, dora, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny()
    if kind == "gpt2":
        model = shaken(Transformer(gpt2_config(vocab_size=50, context=32, n_layer=2, n_head=4, width=24)).eval())
    trained(add_lora(model, 4, 8, ALL, dora)).save_pretrained(tmp_path)
    logits = model(tokens())
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path).eval()(tokens()), logits, atol=1e-5, rtol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens()).logits
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)


def test_a_plain_state_goes_under_adapters_that_start_anew():
    model, other = trained(add_lora(tiny(), 4, 8, ALL, dora=True)), shaken(tiny(), seed=9)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(tokens()), other(tokens()), atol=1e-6, rtol=0)
    state = other.state_dict()
    del state["blocks.0.attn.wq.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\.wq\.weight"):
        model.load_state_dict(state)
    state["blocks.0.attn.wq.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.wq\.weight has shape"):
        model.load_state_dict(state)


@KINDS
def test_resume_is_the_uninterrupted_run_bit_for_bit(dora):
    def start():
        model = add_lora(tiny(), 4, 8, ALL, dora, seed=7)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            (-token_logprobs(model, tokens().roll(step, 1)).mean()).backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer, 0, 4)
    whole = lora_state(model)

    model, optimizer = start()
    train(model, optimizer, 0, 2)
    kept, saved = [lora_state(model), copy.deepcopy(optimizer.state_dict())], copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, 3)  # what was kept is a copy
    model, optimizer = start()
    model.load_state_dict(saved)  # what pretrain.load_state does: the merged weights, on which the adapters count twice
    with pytest.raises(CheckpointError, match="are not those of add_lora; give them as base"):
        load_lora_state(model, kept[0])
    model.load_state_dict(tiny().state_dict())
    load_lora_state(model, kept[0])
    model.load_state_dict(saved)
    load_lora_state(model, kept[0], tiny())
    optimizer.load_state_dict(kept[1])
    train(model, optimizer, 2, 4)
    assert all(torch.equal(whole[name], tensor) for name, tensor in lora_state(model).items())
    with pytest.raises(CheckpointError, match=r"the adapters differ: blocks\.0\.attn\.wo\.lora_A is not among"):
        load_lora_state(add_lora(tiny(), 4, 8, ["wk"], dora), kept[0])
    with pytest.raises(CheckpointError, match=r"has shape \(4, 24\), the model wants \(2, 24\)"):
        load_lora_state(add_lora(tiny(), 2, 8, ALL, dora), kept[0])
    again = add_lora(shaken(tiny(), seed=2), 4, 8, ALL, dora)  # --init was trained again in between
    again.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="the base has changed since"):
        load_lora_state(again, kept[0], shaken(tiny(), seed=2))


# --------------------------------------------------------------------------------------------------- PEFT's files


@KINDS
def test_adapters_come_back_from_their_files(dora, tmp_path):
    model = trained(add_lora(tiny(), 4, 8, ["wq", "ffn.down"], dora))
    save_lora(model, tmp_path, base="somewhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = load_lora(tiny(), tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert "model.layers.0.self_attn.q_proj" in settings["target_modules"]
    other = trained(add_lora(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), 2, 4, ["*"], dora))
    save_lora(other, tmp_path / "other")
    with lora_off(other):
        fresh = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        fresh.load_state_dict(other.state_dict())
    x = torch.randn(4, 3)
    torch.testing.assert_close(load_lora(fresh, tmp_path / "other")(x), other(x))


def test_an_adapter_file_without_a_word_on_dora_is_plain(tmp_path):
    """So older versions of PEFT write it."""
    model = trained(add_lora(tiny(), 2, 8, ["wq"]))
    save_lora(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    assert settings.pop("use_dora") is False
    file.write_text(json.dumps(settings), encoding="utf-8")
    again = load_lora(tiny(), tmp_path)
    assert all(layer.magnitude is None for layer in lora_layers(again).values())
    assert torch.equal(again(tokens()), model(tokens()))


@KINDS
def test_peft_opens_what_save_lora_wrote_and_the_other_way_round(dora, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    trained(add_lora(model, 4, 8, ALL, dora))
    save_lora(model, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), atol=1e-4, rtol=1e-4)

    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj", "gate_proj"], use_dora=dora)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = trained(peft.get_peft_model(base, settings)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_lora(Transformer.from_pretrained(tmp_path / "base").eval(), tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
    with lora_off(ours):
        assert (ours(tokens()) - theirs(tokens()).logits).abs().max() > 1e-2


@KINDS
def test_gpt2s_one_matrix_for_three_keeps_our_names(dora, tmp_path):
    model = shaken(Transformer(gpt2_config(vocab_size=50, context=32, n_layer=2, n_head=4, width=24)).eval())
    model.save_pretrained(tmp_path / "base")
    fresh = copy.deepcopy(model)
    save_lora(trained(add_lora(model, 4, 8, ALL, dora)), tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert "blocks.0.attn.wq" in settings["target_modules"]
    assert torch.equal(load_lora(fresh, tmp_path / "ours")(tokens()), model(tokens()))

    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = Transformer.from_pretrained(tmp_path / "base").eval()
    save_lora(trained(add_lora(model, 4, 8, ["wo", "ffn.*"], dora)), tmp_path / "theirs")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "theirs").eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- bad input


def test_bad_settings_are_one_line():
    for bad, word in [
        ({"rank": -1}, "rank is -1"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targets": []}, "targets is empty"),
        ({"alpha": 32.0}, "rank is 0"),  # the adapters' settings without adapters
        ({"targets": ["wq"]}, "rank is 0"),
        ({"dora": True}, "rank is 0"),
    ]:
        with pytest.raises(CheckpointError, match=word):
            LoraConfig(**bad)
    model = tiny()
    assert add_lora(model, **asdict(LoraConfig())) is model  # off
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, 2, 2, ["wq"])
    with pytest.raises(CheckpointError, match="has adapters already"):
        add_lora(model, 2, 2, ["wk"])
    with pytest.raises(CheckpointError, match="has adapters already"):
        add_lora(merge_lora(model), 2, 2, ["wk"])
    with pytest.raises(CheckpointError, match="no adapters to save"):
        save_lora(tiny(), "nowhere")


def test_bad_files_are_one_line_and_leave_the_model_plain(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config.json is missing"):
        load_lora(tiny(), tmp_path)
    save_lora(trained(add_lora(tiny(), 2, 2, ["wq"])), tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    for change, word in [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"r": 3}, r"lora_A has shape \(2, 24\), the model wants \(3, 24\)"),
        ({"use_dora": True}, "magnitude is not among the saved ones"),
        ({"r": None}, "cannot be read"),
        ({"lora_alpha": "big"}, "cannot be read"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"r": math.inf}, "cannot be read"),
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"monteclora_config": {"n": 1}}, "monteclora_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base too"),
        ({"lora_alpha": math.nan}, r"lora\.alpha is nan"),
    ]:
        file.write_text(json.dumps(good | change), encoding="utf-8")
        model = tiny()
        with pytest.raises(CheckpointError, match=word):
            load_lora(model, tmp_path)
        assert not lora_layers(model)
        assert all(p.requires_grad for p in model.parameters())
    for broken in ("{", "[" * 100_000):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_lora(tiny(), tmp_path)
    file.write_text(json.dumps(good), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'model\.layers.*matches no Linear"):
        load_lora(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "layers.1" in key)
    for dtype, bad in ((torch.float32, math.nan), (torch.float64, 1e300)):
        damaged = {k: t.to(dtype) for k, t in tensors.items()}
        damaged[key][1, 0] = bad
        save_file(damaged, weights)
        with pytest.raises(CheckpointError, match=f"{key} has 1 of .* NaN or infinite"):
            load_lora(tiny(), tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_lora(tiny(), tmp_path)
