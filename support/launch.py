"""Before a script's main: its processes agree on flags, files and versions, and a run that torchrun started again goes
on.

    config = join(config)       with one process: the config itself, with resume if torchrun has started it again
"""

import os
import sys
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path

import torch

from support.content import content_of, content_of_checkpoint, content_of_data, files_of_checkpoint, sha256
from support.devices import Dist, auto_dtype, setup
from support.downloads import DATASETS, data_folder
from support.errors import CheckpointError
from support.files import to_json
from support.nodes import first_on_node, launched, several_nodes
from support.runs import RUNS, restarted
from support.tasks import TASKS


def join(config):
    """Make the process group of several processes -> config, with resume if torchrun has started a run again.
    ConfigError on all processes if they differ in what they train with, or have no common runs/."""
    if not hasattr(config, "device"):
        return config
    if launched()[1] == 1:
        if hasattr(config, "resume") and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            config.resume = config.resume or restarted(config, Dist(0, 1, torch.device("cpu")))
        return config
    trains = hasattr(config, "resume")
    facts = partial(facts_of, config) if several_nodes() else None  # on one node all is the same
    dist = setup(config.device, facts, RUNS if trains and several_nodes() else None)
    if trains and restarted(config, dist):
        config.resume = True
    return config


def facts_of(config, device):
    """{name in a message: value} of all that must be the same on each node; of files, their content."""
    facts = {f"--{name}": value for name, value in flat(config).items()}
    facts |= {"the device": device.type, "torch": torch.__version__, "Python": sys.version.split()[0]}
    facts["this code"] = content_of_code()
    if getattr(config, "dtype", None) == "auto":
        facts["--dtype auto"] = auto_dtype(device)
    if first_on_node():  # the others see the same files
        facts |= contents_of(config)
    return facts


def flat(settings, prefix=""):
    """A dataclass of settings -> {"model.width": value as JSON}. A dict, as of model.rope_scaling, is one value: where
    another node has null instead, its keys would find nothing to be compared with."""
    flags = {}
    for field in fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        flags |= flat(value, f"{name}.") if is_dataclass(value) else {name: to_json(value, default=str, sort_keys=True)}
    return flags


def contents_of(config):
    """{name in a message: content} of the files and the data sets that flags name."""
    contents = {}
    for name, values in asdict(config).items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and name not in ("name", "out", "wandb", "instruction", "prompt"):
                contents[f"the files of --{name} {value}"] = content_of_value(value)
    return contents


def content_of_value(value):
    """Of the data set, the file or the checkpoint of this name; None of another word, and of a data set that is still
    to be downloaded, at least in part."""
    if value in TASKS or value in DATASETS:
        there = [(data_folder() / source.path).is_file() for source in DATASETS.get(value, {}).values()]
        return content_of_data(value) if all(there) else None
    if Path(value).exists():
        return content_of_path(value)
    return "nothing there" if "/" in value or "." in value else None


def content_of_path(path):
    """Of a file, or of the weights and the tokenizer in a folder or a run."""
    try:
        return content_of_checkpoint(path)
    except CheckpointError:
        return content_of([(file.name, sha256(file)) for file in files_of_checkpoint(Path(path))])


def content_of_code():
    """Of the chapters, of support/ and of the script."""
    root = Path(__file__).resolve().parent.parent
    files = [*sorted(root.glob("*.py")), *sorted(root.glob("support/*.py")), Path(sys.argv[0])]
    return content_of([(file.name, file.read_bytes()) for file in files if file.is_file()])
