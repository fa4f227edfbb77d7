"""What pretrain.py trains: the decoder and its tokenizer, those of --init or new ones."""

from dataclasses import replace

import torch

from support.checkpoints import open_checkpoint, refuse_ignored
from support.errors import ConfigError
from support.hf import MIXTURE_ONLY
from support.runs import run_path, saved_run
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from transformer import Transformer, TransformerConfig


def check_decoder(config):
    """ConfigError on a --model that cannot be trained or sampled from, or on a flag that would be ignored. With --init
    the checkpoint decides: see `make_decoder`."""
    if config.model.context < 2:
        context = config.model.context
        raise ConfigError(f"--model.context is {context}; it must be at least 2 to sample a token after another")
    if config.model.n_expert and config.model.n_expert_active == 1 and config.model.norm_topk_prob and not config.init:
        raise ConfigError(
            "one active expert, whose weight p / p is 1, leaves the router without a gradient: "
            "add --model.norm_topk_prob false"
        )
    if config.model.n_expert and config.compile and config.recompute:
        raise ConfigError("with experts --compile and --recompute together would compile almost nothing: leave out one")
    if config.init:
        return
    if config.tokenizer != "bpe" and config.vocab_size != type(config).vocab_size:
        raise ConfigError(f"--vocab_size has no effect with --tokenizer {config.tokenizer}: leave it out")
    model = config.model
    if model.positions != "rope" and model.rope_theta != TransformerConfig.rope_theta:
        raise ConfigError(f"--model.rope_theta has no effect with --model.positions {model.positions}: leave it out")
    scaling = model.rope_scaling or {}
    if scaling.get("rope_theta") and model.rope_theta not in (scaling["rope_theta"], TransformerConfig.rope_theta):
        raise ConfigError("--model.rope_theta has no effect beside that in --model.rope_scaling: leave one of them out")
    if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
        raise ConfigError("--model.rope_scaling has no effect with the type dynamic: take linear, yarn or llama3")
    if model.n_expert and model.moe_every == 1 and model.expert_width and model.ffn_width:
        raise ConfigError("--model.ffn_width has no effect beside --model.expert_width, as all blocks are mixtures")
    for name in () if config.model.n_expert else (*MIXTURE_ONLY, "capacity_factor"):
        if getattr(config.model, name) != getattr(TransformerConfig, name):
            raise ConfigError(f"--model.{name} has no effect without experts: add --model.n_expert, or leave it out")
    check_balancing(config, config.model, "without")


def check_balancing(config, model, source):
    """ConfigError if the run would be the same without a weight of the experts' losses or the rate of their biases.
    source: the beginning of what to say of the model."""
    for name, balancing in (("aux_weight", "aux"), ("z_weight", None), ("bias_rate", "bias")):
        needed = f"--model.balancing {balancing}" if model.n_expert else "--model.n_expert"
        unused = not model.n_expert or balancing not in (None, model.balancing)
        if unused and getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"--{name} has no effect {source} {needed}: leave it out")


def make_tokenizer(kind, texts, vocab_size):
    """--tokenizer bpe, char or byte, trained on {split: texts}; anything else is the directory of one."""
    if kind == "bpe":
        return BPETokenizer.train(texts["train"], vocab_size)
    if kind == "char":
        return CharTokenizer.train([*texts["train"], *texts["valid"]])
    if kind == "byte":
        return ByteTokenizer()
    return load_tokenizer(kind)


def make_decoder(config, dist, texts):
    """-> (decoder in CPU memory, tokenizer, config with the decoder's architecture): those of --init, or random weights
    and a tokenizer trained on these texts, {split: texts}."""
    if config.init:
        policy, tokenizer, _ = open_checkpoint(config.init, dropout=config.model.dropout)
        refuse_ignored(config, policy.config, tokenizer)
        check_balancing(config, policy.config, f"on {config.init}, which was made without")
        return policy, tokenizer, replace(config, model=policy.config)
    if config.model.vocab_size != TransformerConfig.vocab_size:
        raise ConfigError("--model.vocab_size is the tokenizer's; for another size of its vocabulary use --vocab_size")
    if config.resume:
        tokenizer = load_tokenizer(saved_run(run_path(config)))
    else:  # trained on rank 0
        tokenizer = dist.from_main(lambda: make_tokenizer(config.tokenizer, texts, config.vocab_size))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    torch.manual_seed(config.seed)  # the same weights on every rank
    return Transformer(config.model), tokenizer, config
