"""What preferences and reinforcement learning start from where --init names nothing: pretraining, then SFT."""

import sft
from data import DEFAULT_TASK, task_of
from support.runs import make_start_once, run_path, start_name

SFT_START = {"steps": 200, "eval_every": 5, "stop_at": 0.5, "max_new_tokens": 64, "test_problems": 500}


def sft_start(config, dist):
    """SFT of a pretrained start; made once, under runs/start, and reused -> its path.

    The SFT stops when half of the answers are right: there a policy has the most to learn. The accuracy then rises by
    two points a step, so after a fixed number of steps each seed would start at another accuracy.
    """
    run_path(config)  # raises on a bad --name or --resume before a start is made
    settings = {"levels": config.levels, "seed": config.seed, "device": config.device, "dtype": config.dtype}
    if config.data != DEFAULT_TASK:
        settings["data"] = config.data
    name = start_name(config.data, config.seed, "sft", config.levels)
    what = "no --init given: making an SFT checkpoint to start from"
    return make_start_once(name, what, sft, SFT_START | task_of(config.data).sft | settings, dist)
