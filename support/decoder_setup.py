"""What pretrain.py trains: the decoder and its tokenizer, those of --init or new ones."""

from dataclasses import replace

import torch

from support.checkpoints import open_checkpoint, refuse_ignored
from support.errors import ConfigError
from support.runs import run_path, saved_run
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from transformer import Transformer, TransformerConfig


def check_architecture(config):
    """ConfigError on a --model that cannot be trained or sampled from."""
    if config.model.context < 2:
        context = config.model.context
        raise ConfigError(f"--model.context is {context}; it must be at least 2 to sample a token after another")
    if config.model.n_expert and config.model.n_expert_active == 1 and config.model.norm_topk_prob and not config.init:
        raise ConfigError(
            "one active expert, whose weight p / p is 1, leaves the router without a gradient: "
            "add --model.norm_topk_prob false"
        )


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
