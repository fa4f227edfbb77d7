"""support/hf.py against transformers' own models, in and out; and what must not go out as one of them."""

import json
import math
import sys
from dataclasses import fields, replace

import pytest
import torch
from planted import SIZES, GatedAttention, GatedTransformer, ScaledTransformer, gated, randomised, scaled
from safetensors.torch import load_file, save_file
from tiny_decoder import BASE, HF_CONFIGS, LLAMA3, MIXTURE, SMALL, YARN, hf_model, randomise, tiny
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from generate import generate
from reward_model import RewardModel
from support.errors import CheckpointError
from support.hf import LAYOUTS, layout_of, read_hf_config
from support.lora_files import _file_names
from transformer import Transformer, TransformerConfig, gpt2_config

TOKENS = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(2))


def numbers_in(path):
    """How many numbers a directory's weights hold: those of the parameters, and no table made from the config."""
    return sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_their_checkpoint_here_and_back(name, tmp_path, tokens):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "back")
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))["model_type"]
        == theirs.config.model_type
    )
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "back"))
    tied = {"lm_head.weight"} if ours.config.tie_embeddings else set()  # a tied copy may or may not be written
    assert a.keys() - tied == b.keys() - tied
    assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() and a[k].dtype == b[k].dtype for k in b)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_their_checkpoint_in_shards(name, tmp_path, tokens):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    ours = Transformer.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    damaged = load_file(shards[1])
    named, weight = next(iter(damaged.items()))
    weight.view(-1)[0] = math.inf
    save_file(damaged, shards[1])
    with pytest.raises(CheckpointError, match=f"{named} has 1 of .* NaN or infinite"):
        Transformer.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"has no {shards[1].name}; model.safetensors.index.json names it"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json is corrupt"):
        Transformer.from_pretrained(tmp_path)


def test_a_base_model_without_the_prefix(tmp_path, tokens):
    theirs = hf_model("llama tied, wide heads")
    theirs.model.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_an_older_config_json(tmp_path, tokens):
    """As published before transformers 5, with what Llama 1 and 2 leave out."""
    config = LlamaConfig(
        **BASE | dict(num_key_value_heads=4), rope_parameters=dict(rope_type="default", rope_theta=1e4)
    )
    theirs = randomise(AutoModelForCausalLM.from_config(config))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}), encoding="utf-8")
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama 3", "llama yarn", "llama linear"])
def test_the_trained_length_beside_the_rope_settings(name, tmp_path, tokens):
    hf_model(name).save_pretrained(tmp_path)
    inside = Transformer.from_pretrained(tmp_path)(tokens)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"original_max_position_embeddings": 7}), encoding="utf-8"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)
    assert torch.allclose(ours, inside, atol=1e-3) == (name == "llama linear")  # which asks for no trained length


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen3Config, BASE),
        (LlamaConfig, BASE),
        (Qwen2Config, BASE),
        (Qwen2Config, BASE | dict(num_hidden_layers=30, use_sliding_window=True, max_window_layers=0)),
        (MistralConfig, BASE),
        (MixtralConfig, BASE | dict(num_local_experts=4, num_experts_per_tok=3)),
        (Qwen3MoeConfig, BASE | MIXTURE | dict(use_sliding_window=True)),
        (GPT2Config, dict(vocab_size=37, n_positions=24, n_embd=18, n_layer=2, n_head=3)),
    ],
)
def test_what_config_json_leaves_out(kind, config, tmp_path):
    """It has the value that the class in transformers gives it, and writes down when it saves."""
    full = kind(**config)
    (tmp_path / "config.json").write_text(json.dumps(full.to_dict()), encoding="utf-8")
    kind, spelled_out = read_hf_config(tmp_path, TransformerConfig)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": full.model_type}), encoding="utf-8")
    assert kind == full.model_type
    assert read_hf_config(tmp_path, TransformerConfig)[1].resolved() == spelled_out.resolved()


def test_hub_names(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    asked = []
    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: asked.append(name) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert Transformer.from_pretrained("Qwen/Qwen3-0.6B").config.width == 16
    assert asked == ["Qwen/Qwen3-0.6B"]
    for path in (tmp_path / "not" / "there", "tests/nothing", "./nothing", "nothing"):  # paths, and no hub names
        with pytest.raises(CheckpointError, match="is not there; a checkpoint is a directory"):
            Transformer.from_pretrained(path)
    assert asked == ["Qwen/Qwen3-0.6B"]

    def offline(name, allow_patterns):
        raise OSError("no network\nand many more lines")

    hub.snapshot_download = offline
    with pytest.raises(CheckpointError, match=r"Qwen3-0\.6B .* the Hugging Face hub does not give it: no network$"):
        Transformer.from_pretrained("Qwen/Qwen3-0.6B")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        Transformer.from_pretrained("Qwen/Qwen3-0.6B")


def test_a_checkpoint_is_refused_before_memory_is_spent(tmp_path):
    """A model of this config would need 4 TB."""
    tiny(n_layer=1).save_pretrained(tmp_path)
    for key, size in [("hidden_size", 10**6), ("intermediate_size", 10**6), ("vocab_size", 10**6)]:
        damage_config(key, size)(tmp_path)
    with pytest.raises(CheckpointError, match=r"its config asks for .*1000000"):
        Transformer.from_pretrained(tmp_path)


def test_gpt2_without_the_prefix_and_with_its_mask_buffers(tmp_path, tokens):
    """OpenAI's own upload names its tensors so."""
    theirs = hf_model("gpt2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = {k.removeprefix("transformer."): v for k, v in tensors.items() if k != "lm_head.weight"}
    plain |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(plain, tmp_path / "model.safetensors")
    ours = Transformer.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_the_dtype_of_an_opened_checkpoint(tmp_path):
    tiny().bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert Transformer.from_pretrained(tmp_path).embed.weight.dtype == torch.float32
    assert Transformer.from_pretrained(tmp_path, dtype=None).embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(**SMALL),
        TransformerConfig(**SMALL, tie_embeddings=False),
        TransformerConfig(**SMALL, rope_theta=55.0, norm_eps=0.1, head_dim=6, ffn_width=24),
        gpt2_config(**SMALL | {"n_kv_head": 4}),
        gpt2_config(**SMALL | {"n_kv_head": 4}, norm_eps=0.1, ffn_width=24),
        TransformerConfig(**SMALL, qk_norm=False, rope_theta=55.0),
        TransformerConfig(**SMALL, qk_norm=False, tie_embeddings=False, head_dim=6),
        TransformerConfig(**SMALL, qk_norm=False, qkv_bias=True),
        TransformerConfig(**SMALL, qk_norm=False, qkv_bias=True, tie_embeddings=False, head_dim=6),
        TransformerConfig(**SMALL, qk_norm=False, rope_theta=20.0, rope_scaling=LLAMA3),
        TransformerConfig(**SMALL, rope_theta=20.0, head_dim=16, rope_scaling=YARN),
        TransformerConfig(**SMALL, window=5),
        TransformerConfig(**SMALL, window=5, qk_norm=False),
        TransformerConfig(**SMALL, window=5, qk_norm=False, qkv_bias=True),
        TransformerConfig(**SMALL, n_expert=5, balancing="none"),  # scaled by 2
        TransformerConfig(**SMALL, n_expert=5, n_expert_active=4, routed_scale=0.25),
        TransformerConfig(**SMALL, n_expert=5, moe_every=2, norm_topk_prob=False, window=5, expert_width=12),
        TransformerConfig(**SMALL, n_expert=5, qk_norm=False, tie_embeddings=False, expert_width=12),
    ],
    ids=lambda c: layout_of(c) + (", tied" if c.tie_embeddings else "") + f", {c.norm_eps} {c.rope_theta} {c.head_dim}",
)
def test_our_checkpoint_there(config, tmp_path, tokens):
    ours = randomise(Transformer(config))
    ours.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(tokens), ours(tokens))
    assert numbers_in(tmp_path) == ours.num_params()
    assert replace(again.config, ffn_width=ours.config.ffn_width) == ours.config  # Mixtral has no place for that width
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    greedy = theirs.generate(tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, tokens[:1].tolist(), 8, temperature=0).ids.tolist() == greedy[:, 11:].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "post"},
        {"positions": "none"},
        {"positions": "sinusoidal"},
        {"activation": "gelu"},
        {"norm": "layer"},
        {"qkv_bias": True},
        {"qk_norm": False, "bias": True},
        {"bias": True, "dropout": 0.3},
        {"bias": True, "qkv_bias": False},
        {"norm_placement": "sandwich"},
        {"window": 5, "sinks": 2},
        {"n_expert": 5, "balancing": "bias"},
        {"n_expert": 5, "n_expert_active": 3},  # scaled by 3, which cannot be multiplied in without rounding
        {"n_expert": 5, "n_shared_expert": 2},
        {"n_expert": 5, "qk_norm": False, "moe_every": 2},
        {"n_expert": 5, "activation": "gelu", "expert_width": 12},
        {"positions": "none", "window": 5},
        {"positions": "learned", "tie_embeddings": False, "norm_eps": 0.1, "head_dim": 6},
        {"norm_placement": "post", "rope_theta": 55.0, "ffn_width": 24},
    ],
    ids=str,
)
def test_our_own_layout(changes, tmp_path, tokens):
    ours = tiny(**changes)
    ours.save_pretrained(tmp_path)
    biases = [block.ffn.selection_bias for block in ours.blocks if changes.get("balancing") == "bias"]
    assert numbers_in(tmp_path) == ours.num_params() + sum(map(len, biases))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "attention_to_alignment"
    again = Transformer.from_pretrained(tmp_path, dropout=ours.config.dropout)
    assert again.config == ours.config
    assert torch.equal(again.eval()(tokens), ours(tokens))
    assert Transformer.from_pretrained(tmp_path).config.dropout == 0  # the file's does not pass to the next stage


@pytest.mark.parametrize(("shared", "kind"), [(0, "qwen3_moe"), (1, "attention_to_alignment")])
def test_later_stages_drop_no_tokens(tmp_path, tokens, shared, kind):
    """Dropless it computes what Qwen3-MoE does; our own file, which could say otherwise, opens dropless too."""
    ours = tiny(n_expert=5, n_shared_expert=shared, norm_topk_prob=False, capacity_factor=1.0)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == kind
    again = Transformer.from_pretrained(tmp_path).train()
    assert torch.equal(again(tokens), ours.eval()(tokens))
    assert not torch.allclose(ours.train()(tokens), again(tokens), atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_opening_a_checkpoint_leaves_the_random_numbers_alone(positions, tmp_path):
    tiny(positions=positions).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def damage_config(key, value, **more):
    def do(path):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config |= {key: value} | more
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return do


def damage_tensors(change):
    def do(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return do


def deep_index(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("[" * 10**5, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{", encoding="utf-8"), "not a model's config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:500]), "corrupt"),
        (damage_config("model_type", "mamba"), "'mamba' is not known here; known: qwen3, gpt2"),
        (damage_config("hidden_act", "relu"), "hidden_act = 'relu' is not supported"),
        (damage_config("num_key_value_heads", 3), "n_kv_head 3"),
        (damage_config("vocab_size", 50), r"embed_tokens.weight has shape \(37, 16\), .* \(50, 16\)"),
        (lambda p: (p / "config.json").write_bytes(b"\xff{}"), "not a model's config.json"),
        (lambda p: (p / "config.json").write_text("[1]", encoding="utf-8"), "not a model's config.json"),
        (lambda p: (p / "config.json").write_text("[" * 10**5, encoding="utf-8"), "not a model's config.json"),
        (deep_index, "index.json is corrupt"),
        (lambda p: (p / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8"), "lacks 'vocab_size'"),
        (lambda p: (p / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8"), "lacks 'vocab_size'"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "corrupt"),
        (damage_config("model_type", ["qwen3"]), "is not known here"),
        (damage_config("quantization_config", {"bits": 4}), "quantization_config = .* is not supported"),
        (damage_config("partial_rotary_factor", 0.5), "partial_rotary_factor = 0.5 is not supported"),
        (damage_config("attention_bias", True), "attention_bias = True is not supported"),
        (damage_config("rope_scaling", {"rope_type": "longrope", "factor": 2.0}), "'longrope' is not known"),
        (damage_config("rope_parameters", {"rope_type": "linear"}), "'linear' lacks factor"),
        (damage_config("rope_parameters", {"rope_type": "yarn", "factor": "wide"}), "rope_scaling is .*wide"),
        (damage_config("use_sliding_window", 1, max_window_layers=1), "use_sliding_window is not supported in some"),
        (
            damage_config("layer_types", ["full_attention", "sliding_attention"], model_type="mistral"),
            "sliding_window is not supported in some blocks",
        ),
        (damage_config("use_sliding_window", True, max_window_layers=0, sliding_window=0), "window is 0"),
        (damage_config("rope_parameters", [1]), "config.json: "),
        (damage_config("rope_scaling", YARN, rope_parameters={"rope_type": "default"}), "say different things"),
        (damage_config("rope_theta", "high"), "config.json: .*high"),
        (damage_config("rope_theta", 0), "rope_theta is 0"),
        (damage_config("rms_norm_eps", -1), "norm_eps is -1"),
        (damage_config("rms_norm_eps", math.nan), "norm_eps is nan"),
        (damage_config("rope_theta", math.inf), "rope_theta is inf"),
        (damage_config("rope_scaling", YARN | {"attention_factor": math.nan}), "attention_factor of nan; it must be a"),
        (damage_config("sliding_window", math.nan, use_sliding_window=True, max_window_layers=0), "window is nan"),
        (damage_config("num_hidden_layers", "2"), "n_layer is '2'"),
        (damage_config("num_hidden_layers", 3), "lack 'model.layers.2."),
        (damage_config("num_hidden_layers", 1), "hold 'model.layers.1."),
        (damage_config("hidden_size", 16.5), "width is 16.5"),
        (damage_config("head_dim", 3), "must be even"),
        (damage_config("head_dim", -2), "head_dim is -2"),
        (damage_config("intermediate_size", "wide"), "ffn_width is 'wide'"),
        (damage_config("vocab_size", 10**20), f"config.json: vocab_size is {10**20}, more than any model has; at most"),
        (damage_config("max_position_embeddings", 10**13), f"context is {10**13}, more than any model has"),
        (damage_config("num_hidden_layers", 10**6), "n_layer is 1000000, more than any model has; at most 1024"),
        (damage_config("rope_theta", 10**400), "config.json: int too large to convert to float"),
        (damage_config("rms_norm_eps", 10**400), "norm_eps is 1000"),
        (
            damage_config("hidden_size", 2**24, num_attention_heads=2**24, head_dim=2**16),
            "no memory holds a model of its config",
        ),
        (damage_tensors(lambda t: t.update({"model.norm.weight": torch.ones(())})), "shape"),
        (damage_tensors(lambda t: t.pop("model.norm.weight")), "lack 'model.norm.weight'"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
        (damage_tensors(lambda t: t.update({"lm_head.weight": torch.ones(37, 16)})), "is not the embedding, though"),
    ],
)
def test_bad_checkpoints(tmp_path, damage, message):
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.float32, math.nan), (torch.float64, 1e300), (torch.bfloat16, -math.inf), (torch.float16, math.inf)],
)
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny, "model.norm.weight"),
        (lambda: tiny(norm_placement="post"), "blocks.1.attn.wk.weight"),
        (lambda: Transformer(gpt2_config(**SMALL | {"n_kv_head": 4})), "transformer.h.1.attn.c_attn.weight"),
        (lambda: tiny(n_expert=4), "model.layers.0.mlp.experts.2.down_proj.weight"),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path, build, name, dtype, bad):
    """1e300 is finite in fp64 alone; a large number whose sum with others overflows is none of these."""
    build().save_pretrained(tmp_path)
    tensors = {key: weight.to(dtype) for key, weight in load_file(tmp_path / "model.safetensors").items()}
    tensors[name].view(-1)[:2] = torch.finfo(dtype if dtype != torch.float64 else torch.float32).max
    save_file(tensors, tmp_path / "model.safetensors")
    assert Transformer.from_pretrained(tmp_path).num_params()
    assert Transformer.from_pretrained(tmp_path, dtype=None).num_params()
    tensors[name].view(-1)[-1:] = torch.tensor([bad], dtype=torch.float64).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    n = tensors[name].numel()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: {name} has 1 of {n:,} numbers that are NaN or infinite"):
        Transformer.from_pretrained(tmp_path)


QKV, PROJ = (f"transformer.h.1.attn.{x}.weight" for x in ("c_attn", "c_proj"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config("activation_function", "relu"), "activation_function = 'relu' is not supported"),
        (damage_config("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx"),
        (damage_config("tie_word_embeddings", False), "tie_word_embeddings"),
        (damage_config("n_head", 3), "not a multiple of n_head 3"),
        (damage_config("n_positions", 30), r"wpe.weight has shape \(24, 16\)"),
        (damage_tensors(lambda t: t.pop(QKV)), "lack 'transformer.h.1.attn.c_attn.weight'"),
        (damage_tensors(lambda t: t.update({QKV: torch.ones(16, 2)})), r"c_attn.weight has shape \(16, 2\)"),
        (
            damage_tensors(lambda t: t.update({QKV: torch.ones(16, 24)})),
            r"c_attn.weight has shape \(16, 24\), .* \(16, 48\)",
        ),
        (damage_tensors(lambda t: t.update({PROJ: torch.ones(16, 4, 4)})), r"shape \(16, 4, 4\)"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
    ],
)
def test_bad_gpt2_checkpoints(tmp_path, damage, message):
    Transformer(gpt2_config(**SMALL | {"n_kv_head": 4})).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config("norm", "batch"), "norm 'batch' is not known; use rms or layer"),
        (damage_config("dropout", 2.0), "dropout is 2.0"),
        (damage_config("n_head", 3), "n_head 3 is not a multiple"),
        (damage_config("ffn_width", -4), "ffn_width is -4"),
        (damage_tensors(lambda t: t.pop("embed.weight")), "lack 'embed.weight'"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
    ],
)
def test_bad_checkpoints_of_our_own(tmp_path, damage, message):
    tiny(norm_placement="post").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- what no layout declares


def test_every_layout_declares_every_field_one_way():
    for kind, layout in LAYOUTS.items():
        if layout is not None:
            declared = [*layout.keys, *layout.implied, *layout.unused]
            assert sorted(declared) == sorted(f.name for f in fields(TransformerConfig)), kind


@pytest.mark.parametrize("build", [gated, scaled])
def test_a_field_that_no_layout_declares(build, tmp_path):
    """With a tensor or without one, off or on: it is saved as our own, and comes back only as what it is."""
    ours = build()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "attention_to_alignment"
    again = type(ours).from_pretrained(tmp_path).eval()
    assert again.config == ours.config
    assert torch.equal(again(TOKENS), ours(TOKENS))
    with pytest.raises(CheckpointError, match=r"config.json: \w+ = .* is no field of TransformerConfig$"):
        Transformer.from_pretrained(tmp_path)
    assert _file_names(ours) == {}  # PEFT's names are those of transformers' class, and there is none


@pytest.mark.parametrize(
    ("kind", "off"), [(GatedTransformer, {"planted_gate": False}), (ScaledTransformer, {"planted_scale": 1})]
)
def test_what_an_undeclared_field_may_mean_is_nobodys_guess(kind, off):
    assert layout_of(TransformerConfig(**SIZES)) == "qwen3"
    assert layout_of(kind.config_class(**SIZES, **off)) == "attention_to_alignment"


def test_a_tensor_that_no_layout_knows(tmp_path):
    ours = randomised(Transformer(TransformerConfig(**SIZES)))
    ours.blocks[1].attn.planted = nn.Linear(32, 32)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "attention_to_alignment"
    with pytest.raises(CheckpointError, match=r"hold 'blocks.1.attn.planted.bias'"):
        Transformer.from_pretrained(tmp_path)


def test_a_reward_model_with_a_field_of_its_own(tmp_path):
    class GatedReward(RewardModel, GatedTransformer):
        pass

    ours = GatedReward.from_policy(gated()).eval()
    assert type(ours.blocks[0].attn) is GatedAttention
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "attention_to_alignment"
    assert torch.equal(GatedReward.from_pretrained(tmp_path).eval()(TOKENS), ours(TOKENS))
    with pytest.raises(CheckpointError, match=r"planted_gate = True is no field of TransformerConfig$"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", [gated, scaled])
def test_a_reward_model_of_a_policy_that_it_cannot_be(build):
    with pytest.raises(CheckpointError, match=r"cannot be built on the policy's (Gated|Scaled)Config"):
        RewardModel.from_policy(build())
