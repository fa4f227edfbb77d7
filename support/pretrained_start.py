"""A short pretraining, on the text of its data, for a stage whose --init names nothing and that wants no SFT start.

pretrained_start     on the text of a task or a file          sft.py
text_start           on the text of the training pairs        reward_model.py, for real pairs
"""

from torch import distributed

import pretrain
from data import load_pairs, task_of
from support.files import must_write, write_whole
from support.runs import RUNS, make_start_once, run_path, start_name
from support.tasks import skipping
from transformer import TransformerConfig


def pretrained_start(config, dist):
    """Pretraining on the text of config.data; made once, under runs/start, and reused -> its path."""
    run_path(config)  # raises on a bad --name or --resume before a start is made
    settings = {"data": config.data, "seed": config.seed, "device": config.device, "dtype": config.dtype}
    settings |= task_of(config.data).pretrain
    if "model" in settings:
        settings["model"] = TransformerConfig(**settings["model"])
    skip = skipping(config.data, config.skip_bad)
    name = start_name(config.data, config.seed, "pretrain", **skip)
    what = f"no --init given: pretraining a start on the text of {config.data} first"
    return make_start_once(name, what, pretrain, settings | skip, dist)


def text_start(config, dist):
    """Pretraining on the texts of the training pairs of config.data; made once, and reused -> its path."""
    run_path(config)  # as above
    name = start_name(config.data, config.seed, "text", **skipping(config.data, config.skip_bad))
    text = RUNS / f"{name}.txt"
    if dist.is_main:
        pairs = load_pairs(config.data, "train", None, skip_bad=config.skip_bad)
        with must_write(text):
            text.parent.mkdir(parents=True, exist_ok=True)
            write_whole(text, "\n\n".join(f"{p.prompt}\n{p.chosen}\n\n{p.rejected}" for p in pairs))
    if dist.world > 1:
        distributed.barrier()
    settings = {"data": str(text), "vocab_size": 2048, "model": TransformerConfig(context=512), "steps": 200}
    settings |= {"seed": config.seed, "device": config.device, "dtype": config.dtype}
    what = f"no --init given: pretraining a start on the text of the pairs of {config.data}"
    return make_start_once(name, what, pretrain, settings, dist)
