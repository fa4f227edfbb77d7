"""What preferences and reinforcement learning start from where --init names nothing: pretraining, then SFT."""

import sft
from data import DEFAULT_TASK, task_of
from support.runs import make_start_once, run_path, start_name

SFT_START = {"steps": 200, "eval_every": 5, "stop_at": 0.5, "max_new_tokens": 64, "test_problems": 500}


def own_length(data, longest):
    """{"max_new_tokens": longest} for a start on another task than the built-in one, if a run allows longer answers
    than its SFT would: cut off, none would be right, and best/ would be the first that was validated. Else {}."""
    usual = (SFT_START | task_of(data).sft)["max_new_tokens"]
    return {"max_new_tokens": longest} if data != DEFAULT_TASK and longest > usual else {}


def sft_start(config, dist):
    """SFT of a pretrained start; made once, under runs/start, and reused -> its path.

    The SFT stops when half of the answers are right: there few groups of answers earn all the same. The accuracy then
    rises by some points a step, so after a fixed number of steps each seed would start at another accuracy.
    """
    run_path(config)  # raises on a bad --name or --resume before a start is made
    settings = {"levels": config.levels, "seed": config.seed, "device": config.device, "dtype": config.dtype}
    if config.data != DEFAULT_TASK:
        settings["data"] = config.data
    longer = own_length(config.data, config.max_new_tokens)
    name = start_name(config.data, config.seed, "sft", config.levels, **longer)
    what = "no --init given: making an SFT checkpoint to start from"
    return make_start_once(name, what, sft, SFT_START | task_of(config.data).sft | settings | longer, dist)
