"""support/hf.py: what goes out in Hugging Face's formats, and what must not."""

import json
from dataclasses import fields

import pytest
import torch
from planted import SIZES, GatedAttention, GatedTransformer, ScaledTransformer, gated, randomised, scaled
from torch import nn

from reward_model import RewardModel
from support.errors import CheckpointError
from support.hf import LAYOUTS, layout_of
from support.lora_files import _file_names
from transformer import Transformer, TransformerConfig

TOKENS = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(2))


def test_every_layout_declares_every_field_one_way():
    for kind, layout in LAYOUTS.items():
        if layout is not None:
            declared = [*layout.keys, *layout.means, *layout.no_matter]
            assert sorted(declared) == sorted(f.name for f in fields(TransformerConfig)), kind


@pytest.mark.parametrize("build", [gated, scaled])
def test_a_field_that_no_layout_declares(build, tmp_path):
    """With a tensor or without one, off or on: it is saved as our own, and comes back only as what it is."""
    ours = build()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "attention_to_alignment"
    again = type(ours).from_pretrained(tmp_path).eval()
    assert again.config == ours.config
    assert torch.equal(again(TOKENS), ours(TOKENS))
    with pytest.raises(CheckpointError, match=r"config.json: \w+ = .* is no field of TransformerConfig$"):
        Transformer.from_pretrained(tmp_path)
    assert _file_names(ours) == {}  # PEFT's names are those of transformers' class, and there is none


@pytest.mark.parametrize(
    ("kind", "off"), [(GatedTransformer, {"gate": False}), (ScaledTransformer, {"logit_scale": 1})]
)
def test_what_an_undeclared_field_may_mean_is_nobodys_guess(kind, off):
    assert layout_of(TransformerConfig(**SIZES)) == "qwen3"
    assert layout_of(kind.config_class(**SIZES, **off)) == "attention_to_alignment"


def test_a_tensor_that_no_layout_knows(tmp_path):
    ours = randomised(Transformer(TransformerConfig(**SIZES)))
    ours.blocks[1].attn.gate = nn.Linear(32, 32)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "attention_to_alignment"
    with pytest.raises(CheckpointError, match=r"hold 'blocks.1.attn.gate.bias'"):
        Transformer.from_pretrained(tmp_path)


def test_a_reward_model_with_a_field_of_its_own(tmp_path):
    class GatedReward(RewardModel, GatedTransformer):
        pass

    ours = GatedReward.from_policy(gated()).eval()
    assert type(ours.blocks[0].attn) is GatedAttention
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "attention_to_alignment"
    assert torch.equal(GatedReward.from_pretrained(tmp_path).eval()(TOKENS), ours(TOKENS))
    with pytest.raises(CheckpointError, match=r"gate = True is no field of TransformerConfig$"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", [gated, scaled])
def test_a_reward_model_of_a_policy_that_it_cannot_be(build):
    with pytest.raises(CheckpointError, match=r"cannot be built on the policy's (Gated|Scaled)Config"):
        RewardModel.from_policy(build())
