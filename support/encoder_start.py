"""What a run of encoder.py begins with: its texts; an encoder, opened from a checkpoint, or new, with a tokenizer.

`Encoder` is passed in, because the chapter that defines it imports this file.
"""

from dataclasses import replace

import torch

from data import load_reviews
from support.checkpoints import open_checkpoint, refuse_ignored, resolve_checkpoint
from support.classification import validation_windows
from support.content import records_of
from support.errors import CheckpointError, ConfigError
from support.hf import MIXTURE_ONLY
from support.hf_bert import is_encoder
from support.runs import run_path, saved_run
from support.streams import make_streams
from support.text_batches import spaced
from tokenizer_bpe import BPETokenizer, load_tokenizer

UNUSED = (*MIXTURE_ONLY, "capacity_factor", "n_type", "pooler")  # the run would be the same without them


def refuse_unused(config):
    """ConfigError on a flag of encoder.Config that --mlm_steps 0 takes the use from."""
    if config.mlm_steps:
        return
    for name in ("mlm_batch", "mlm_lr", "mlm_rate"):
        if getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"--{name} is for masked-LM, which --mlm_steps 0 skips: leave it out")
    if config.text and config.init:
        raise ConfigError("--text is for masked-LM and a new tokenizer: with --mlm_steps 0 and --init leave it out")


def check_sizes(config, dist):
    """ConfigError on batches that the ranks cannot share, or a vocabulary with no room for the bytes."""
    for name in ("batch", "mlm_batch") if config.mlm_steps else ("batch",):
        dist.per_rank(name, getattr(config, name))
    if not config.init and config.vocab_size < 258:
        raise ConfigError(f"--vocab_size is {config.vocab_size}; it counts 256 bytes and 2 special tokens too")


def read_texts(config):
    """-> {split: the Reviews of --data}; {split: texts for masked-LM}, without labels, those of --text among the
    training ones; what was read, {name: records}, for `support.runs.Run`. DataError."""
    reviews = {split: load_reviews(config.data, split, config.skip_bad) for split in ("train", "valid", "test")}
    further = [review for name in config.text for review in load_reviews(name, "train", config.skip_bad)]
    texts = {"train": reviews["train"] + further, "valid": reviews["valid"]}
    texts = {split: [spaced(review.text) for review in part] for split, part in texts.items()}
    reads = records_of(config.data, reviews)
    if config.text:
        reads[f"the texts of --text {' '.join(config.text)}"] = further
    return reviews, texts, reads


def masked_lm_texts(config, dist, tokenizer, texts, masked_batch):
    """{split: texts} -> {split: all of them as one array of ids}; a TextBatch of validation windows, which are masked
    alike each time. With --mlm_steps 0 None, None. masked_batch: encoder.py's."""
    if not config.mlm_steps:
        return None, None
    streams = make_streams(config, dist, tokenizer, config.model.context, texts)
    windows = validation_windows(streams["valid"], config.model.context)
    generator = torch.Generator().manual_seed(config.seed)
    return streams, masked_batch(windows, tokenizer, generator, config.mlm_rate)


def open_encoder(Encoder, path, device="cpu", dropout=0.0):
    """-> (model in fp32, tokenizer, directory), from a checkpoint or a run directory. Raises CheckpointError."""
    path = resolve_checkpoint(path)
    model, tokenizer = Encoder.from_pretrained(path, dropout), load_tokenizer(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(f"{path}: {tokenizer.vocab_size} tokens, but {model.config.vocab_size} embeddings")
    return model.to(device), tokenizer, path


def open_start(Encoder, init, model, seed):
    """-> (Encoder, tokenizer) of an encoder's checkpoint, or of a decoder's, with new layers by `seed`. Of `model`, a
    config, only the dropout counts, and the context where a decoder's is longer and not a learned table's. Raises
    CheckpointError."""
    path = resolve_checkpoint(init)
    if is_encoder(path):
        return open_encoder(Encoder, path, dropout=model.dropout)[:2]
    decoder, tokenizer, _ = open_checkpoint(path)
    shorter = {} if decoder.config.positions == "learned" else {"context": min(model.context, decoder.config.context)}
    return Encoder.from_trunk(decoder, model.dropout, seed, **shorter), tokenizer


def check_new(model):
    """ConfigError on a --model that cannot be trained here, or has a flag that would be ignored."""
    default = type(model)()
    if model.vocab_size != default.vocab_size:
        raise ConfigError("--model.vocab_size is the tokenizer's; for another size of its vocabulary use --vocab_size")
    if model.n_class != 2:
        raise ConfigError(f"--model.n_class is {model.n_class}; it must be 2: the labels are 0 and 1")
    for name in UNUSED if model.positions == "rope" else (*UNUSED, "rope_theta"):
        if getattr(model, name) != getattr(default, name):
            raise ConfigError(f"--model.{name} has no effect on this training: leave it out")
    check_order(model, "--model.positions none")


def check_opened(init, model, tokenizer, mask, masks):
    """ConfigError on a start that cannot be trained here. masks: whether the run masks tokens."""
    if model.n_class < 2:
        raise ConfigError(f"{init} gives a text one number, as a reward model does; labels need two")
    if masks and mask not in tokenizer.special_ids:
        raise ConfigError(
            f"the tokenizer of {init} has no {mask}, so nothing can be masked: --mlm_steps 0 --token_dropout 0 trains "
            "on the labels alone"
        )
    check_order(model, init)


def check_order(model, source):
    if model.positions == "none":
        raise ConfigError(
            f"{source}: without positions only a causal mask shows the order of the words, and an encoder has none"
        )


def make_encoder(Encoder, config, dist, texts, mask):
    """-> (encoder in CPU memory, tokenizer, config with the encoder's architecture): those of --init, or random weights
    and a tokenizer trained on {split: texts}. mask: the special token that replaces others."""
    run_path(config)  # raises on a bad --name or --resume first
    if config.init:
        encoder, tokenizer = open_start(Encoder, config.init, config.model, config.seed)
        check_opened(config.init, encoder.config, tokenizer, mask, config.mlm_steps or config.token_dropout)
        refuse_ignored(config, encoder.config, tokenizer)
        return encoder, tokenizer, replace(config, model=encoder.config)
    check_new(config.model)
    if config.resume:
        tokenizer = load_tokenizer(saved_run(run_path(config)))
    else:  # trained on rank 0
        specials = ("<|endoftext|>", mask)
        tokenizer = dist.from_main(lambda: BPETokenizer.train(texts["train"], config.vocab_size, specials))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    torch.manual_seed(config.seed)  # the same weights on every rank
    return Encoder(config.model), tokenizer, config
