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
from pathlib import Path

import torch
from torch import nn

from data import DATASETS, TASKS
from support.checkpoints import resolve_checkpoint
from support.downloads import data_folder


def content_of(thing):
    """32 hex digits that differ if the content does: names, shapes and values of tensors, the fields of records."""
    digest = hashlib.sha256()
    _add(digest, thing)
    return digest.hexdigest()[:32]


def _add(digest, thing):
    if isinstance(thing, nn.Module):
        thing = thing.state_dict()
    elif is_dataclass(thing):  # a field that a later version adds, at its default, changes nothing
        values = {f: getattr(thing, f.name) for f in fields(thing) if f.compare}
        thing = {f.name: v for f, v in values.items() if f.default is MISSING or (v or None) != (f.default or None)}
    if isinstance(thing, dict):
        thing = [item for pair in thing.items() for item in pair]
    if isinstance(thing, torch.Tensor):
        digest.update(f"{thing.dtype} {tuple(thing.shape)} ".encode())
        digest.update(thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(thing, list | tuple):
        digest.update(f"{len(thing)} ".encode())
        for item in thing:
            _add(digest, item)
    else:
        data = thing if isinstance(thing, bytes) else repr(thing).encode()
        digest.update(b"%d " % len(data) + data)


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
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in WEIGHTS)
    return content_of([(file.name, sha256(file)) for file in files])


WEIGHTS = (".safetensors", ".json")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
