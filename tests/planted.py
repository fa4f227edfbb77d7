"""Models with additions that fast paths and file formats do not know. They must notice, not silently ignore them."""

from dataclasses import dataclass

import torch
from torch import nn

from attention import Attention
from transformer import Transformer, TransformerConfig

SIZES = {"vocab_size": 40, "context": 48, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "width": 32}


@dataclass
class GatedConfig(TransformerConfig):
    planted_gate: bool = True


class GatedAttention(Attention):
    """Attention whose output is multiplied by σ(W x)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.planted = nn.Linear(args[0], args[0], bias=False)

    def forward(self, x, *args):
        out = super().forward(x, *args)
        return out * torch.sigmoid(self.planted(x[:, -out.shape[1] :]))


class GatedTransformer(Transformer):
    config_class = GatedConfig

    def __init__(self, config):
        super().__init__(config)
        c = self.config
        for block in self.blocks if c.planted_gate else ():
            block.attn = GatedAttention(c.width, c.n_head, c.n_kv_head, c.head_dim, c.qkv_bias, c.qk_norm, c.norm_eps)


@dataclass
class ScaledConfig(TransformerConfig):
    planted_scale: float = 0.5


class ScaledTransformer(Transformer):
    config_class = ScaledConfig

    def hidden(self, *args, **kwargs):
        return super().hidden(*args, **kwargs) * self.config.planted_scale


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def gated():
    return randomised(GatedTransformer(GatedConfig(**SIZES)))


def scaled():
    return randomised(ScaledTransformer(ScaledConfig(**SIZES)))
