"""Small decoders with random weights, this project's and transformers', for the tests of models and of formats."""

import torch
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

from transformer import Transformer, TransformerConfig

SMALL = dict(vocab_size=37, context=24, n_layer=2, n_head=4, n_kv_head=2, width=16)


def randomise(model):
    """Randomise every weight, gains and biases too: with their initial values 1 and 0 many bugs would not show."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tiny(**changes):
    return randomise(Transformer(TransformerConfig(**(SMALL | changes))))


BASE = dict(vocab_size=37, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=24)
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=12)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)
MIXTURE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
HF_CONFIGS = {  # {name: a config of transformers}; the name begins with the model_type
    "qwen3": Qwen3Config(**BASE, head_dim=6, rope_theta=777.0, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**BASE, head_dim=6),
    "gpt2": GPT2Config(vocab_size=37, n_positions=24, n_embd=18, n_layer=2, n_head=3),
    "llama": LlamaConfig(**BASE, rope_theta=55.0, rms_norm_eps=0.1),
    "llama tied, wide heads": LlamaConfig(**BASE, head_dim=6, tie_word_embeddings=True),
    "llama 3": LlamaConfig(**BASE, rope_parameters=LLAMA3 | dict(rope_theta=20.0)),
    "llama linear": LlamaConfig(**BASE, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=20.0)),
    "llama yarn": LlamaConfig(**BASE, head_dim=16, rope_parameters=YARN | dict(rope_theta=20.0)),
    "llama ntk": LlamaConfig(**BASE, rope_parameters=dict(rope_type="dynamic", factor=3.0, rope_theta=20.0)),
    "qwen3 sliding": Qwen3Config(**BASE, **SLIDING, head_dim=6),
    "qwen3 nothing slides": Qwen3Config(**BASE, **SLIDING | dict(max_window_layers=2), head_dim=6),
    "qwen2": Qwen2Config(**BASE),
    "qwen2 sliding, wide heads": Qwen2Config(**BASE, **SLIDING, head_dim=6),
    "mistral": MistralConfig(**BASE, sliding_window=5),
    "mistral wide window": MistralConfig(**BASE, sliding_window=24, head_dim=6),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4),
    "mixtral sliding, 3 of 5": MixtralConfig(**BASE, num_local_experts=5, num_experts_per_tok=3, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(**BASE, **MIXTURE, head_dim=6),
    "qwen3_moe every second, normed": Qwen3MoeConfig(
        **BASE, **MIXTURE, decoder_sparse_step=2, norm_topk_prob=True, tie_word_embeddings=True, **SLIDING
    ),
}


def hf_model(name):
    """The model of transformers that HF_CONFIGS[name] describes, with random weights."""
    return randomise(AutoModelForCausalLM.from_config(HF_CONFIGS[name], attn_implementation="eager"))
