"""Opening a checkpoint in any format: the model, its tokenizer, its path."""

from dataclasses import fields
from pathlib import Path

from support.errors import CheckpointError, ConfigError
from support.files import read_json, reason
from support.gguf import gguf_tokenizer, open_gguf
from support.hf import local_directory
from support.products import fast_linears
from tokenizer_bpe import load_tokenizer
from transformer import Transformer


def resolve_checkpoint(path):
    """A checkpoint directory, a .gguf file, a run directory (its `best`, else its `last`) or a name on the Hugging Face
    hub -> the local path of the checkpoint. Raises CheckpointError."""
    path = Path(path) if str(path).startswith("runs/") else local_directory(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    names = ("best", "best.old", "last", "last.old")  # .old: a process was killed between the two renames of a save
    for candidate in (path, *(path / name for name in names)):
        if (candidate / "config.json").is_file():
            return candidate
    problem = "holds no checkpoint" if path.is_dir() else "is no checkpoint" if path.exists() else "is not there"
    raise CheckpointError(f"{path} {problem}; give a run directory or one that save_pretrained wrote")


def open_checkpoint(path, device="cpu", dropout=0.0):
    """-> (model in fp32, tokenizer, path). Raises CheckpointError, also if the model's vocabulary is too small."""
    path = resolve_checkpoint(path)
    if path.suffix.lower() == ".gguf":
        model, metadata = open_gguf(path, dropout)
        tokenizer = gguf_tokenizer(metadata, path)
    else:
        tokenizer, model = load_tokenizer(path), Transformer.from_pretrained(path, dropout=dropout)
    if tokenizer.vocab_size > model.config.vocab_size:  # the model's may be larger: published ones are padded
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    return fast_linears(model.to(device)), tokenizer, path


def refuse_ignored(config, opened, tokenizer):
    """ConfigError if a run's config wants another tokenizer or architecture than its --init has, whose model has the
    config `opened`. A flag at its default counts as not given."""
    for flag, has in (("tokenizer", tokenizer.kind), ("vocab_size", tokenizer.vocab_size)):
        default, value = getattr(type(config), flag, None), getattr(config, flag, None)
        if value not in (default, has):
            raise ConfigError(
                f"--{flag} {value} has no effect with --init {config.init}, whose {flag} is {has}: leave the flag out"
            )
    asked, default = config.model, type(config.model)()
    for field in fields(asked):
        value, has = getattr(asked, field.name), getattr(opened, field.name)
        if value not in (getattr(default, field.name), has):
            raise ConfigError(
                f"--model.{field.name} {value} has no effect with --init {config.init}, whose {field.name} is "
                f"{has}: the architecture is the checkpoint's; leave the flag out"
            )


def is_chat_model(path, tokenizer):
    """Whether the checkpoint was trained to chat: its generation_config.json stops at <|im_end|> (where there is none,
    its config.json, as in transformers), or its GGUF file has a chat template. Raises CheckpointError."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return tokenizer.chat_template is not None
    file = path / "generation_config.json"
    file = file if file.exists() else path / "config.json"
    try:
        stop = read_json(file).get("eos_token_id")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from None
    return tokenizer.special_ids.get("<|im_end|>", -1) in (stop if isinstance(stop, list) else [stop])


def open_chat_model(name):
    """-> model, tokenizer. Raises CheckpointError on a base model, which cannot be asked."""
    policy, tokenizer, path = open_checkpoint(name)
    if not is_chat_model(path, tokenizer):
        raise CheckpointError(
            f"{path} is a base model, which was never taught to answer a question and stop: fine-tune it first (sft.py)"
        )
    return policy, tokenizer
