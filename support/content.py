"""What a stage reads at its start, identified by its content: --resume and the reuse of a start compare it.

content_of(policy)              of weights, records, texts, numbers, and dicts and lists of them: 32 hex digits
records_of("gsm8k", problems)   the records of each split, with a name for the message
weights_of("runs/sft", policy)  the same of a model; code_of: of a user's reward function
content_of_data("gsm8k")        of the files of a data set, or of what a task generates
content_of_checkpoint(path)     of a checkpoint's files
"""

import hashlib
import inspect
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from support.checkpoints import resolve_checkpoint
from support.downloads import DATASETS, data_folder
from support.tasks import TASKS


def content_of(thing):
    """32 hex digits that differ if the content does: names, shapes and values of tensors, the fields of records."""
    digest = hashlib.sha256()
    for part in _parts(thing):
        digest.update(part)
    return digest.hexdigest()[:32]


def _parts(thing):
    """The bytes of a thing, piece by piece."""
    if isinstance(thing, nn.Module):
        thing = thing.state_dict()
    elif is_dataclass(thing):
        values = [(name, default, getattr(thing, name)) for name, default in _compared(type(thing))]
        # a field that a later version adds, at its default, changes nothing
        thing = {name: v for name, default, v in values if default is MISSING or (v or None) != (default or None)}
    if isinstance(thing, dict):
        thing = [item for pair in thing.items() for item in pair]
    if isinstance(thing, list | tuple):
        yield b"%d " % len(thing)
        for item in thing:
            if type(item) is str:  # most of a data set
                yield _counted(item)
            else:
                yield from _parts(item)
    elif isinstance(thing, torch.Tensor):
        yield f"{thing.dtype} {tuple(thing.shape)} ".encode()
        yield thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    else:
        yield _counted(thing)


def _counted(thing):
    data = thing if isinstance(thing, bytes) else repr(thing).encode()
    return b"%d " % len(data) + data


@cache
def _compared(record):
    return [(field.name, field.default) for field in fields(record) if field.compare]


def records_of(data, splits):
    """{split: records} -> {the name of each in a message: records}."""
    return {f"the {split} split of --data {data}": records for split, records in splits.items()}


def weights_of(path, model):
    """{the name of a checkpoint's weights in a message: their content}. The model is as it was read."""
    return {f"the weights of {path}": content_of(model)}


def code_of(reward, functions):
    """{the name of --reward in a message: the text of the file that defines it}; {} without one, or without a file."""
    try:
        file = inspect.getsourcefile(functions[reward.partition(":")[2]]) if reward else None
        return {f"the file of --reward {reward}": Path(file).read_bytes()} if file else {}
    except (OSError, TypeError):
        return {}


def content_of_data(name):
    """Of a data set by name or path. A task's generator is identified by its first texts and problems; of files that
    are not there, nothing."""
    if name in TASKS:
        task = TASKS[name]
        return content_of([task.text and task.text("valid", 50), task.problems("valid", 50, (1, 2), 0)])
    sources = DATASETS.get(str(name), {}).values()
    paths = sorted({data_folder() / source.path for source in sources}) or [Path(name)]
    return content_of([sha256(path) for path in paths if path.is_file()])


def content_of_checkpoint(path):
    """Of the weights and the tokenizer of a run, of a checkpoint directory or of a .gguf file."""
    path = resolve_checkpoint(path)
    return content_of([(file.name, sha256(file)) for file in files_of_checkpoint(path)])


def files_of_checkpoint(path):
    """Those that `content_of_checkpoint` reads: of a directory weights, settings, merges and chat template."""
    suffixes = (".safetensors", ".json", ".bpe", ".jinja")
    return [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in suffixes)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
