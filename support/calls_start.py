"""What agent.py starts from where --init names nothing: a checkpoint that was shown how tools are called."""

from functools import partial
from types import SimpleNamespace

import sft
from data import load_problems, task_of
from support.errors import ConfigError
from support.runs import make_start_once, run_path, start_name
from support.sft_start import SFT_START, sft_start

# of grpo.py's options those that agent.py does not have, with the value that turns them off
NOT_HERE = {"refill": 0, "stale": 0, "sampler_dtype": "same", "old_logprobs": "sampler", "correction": "none"}
NOT_HERE |= {
    "refresh_reference": 0,
    "kl_in": "loss",
    "skip_zero_variance": True,
    "mask_truncated": False,
    "fsdp": False,
}
START = SFT_START | {"eval_every": 10}


def check_agent(config):
    """ConfigError on an option of grpo.py that agent.py does not have."""
    for name, value in NOT_HERE.items():
        if getattr(config, name) != value:
            raise ConfigError(f"--{name} {getattr(config, name)}: grpo.py has this option, agent.py does not")
    if config.teach and config.init:
        raise ConfigError("--init is a checkpoint that calls tools already, --teach one that is taught to: give one")


def calls_start(config, dist, tools, encode_demonstration, with_tools):
    """SFT on demonstrations of calls, of --teach or a pretrained start; made once, under runs/start, and reused ->
    its path. Without tools: the start of grpo.py. The last two: agent.encode_demonstration and agent.WithTools."""
    if not tools and not config.teach:
        return sft_start(config, dist)
    run_path(config)  # raises on a bad --name or --resume before a start is made
    shown = load_problems(config.data, "train", config.demonstrations, tuple(config.levels), config.skip_bad)
    if not any(problem.calls for problem in shown):
        raise ConfigError(f"--data {config.data} shows no calls, such as <<3*4=12>>, in its solutions: give an --init")
    settings = {"data": config.data, "levels": config.levels, "seed": config.seed, "skip_bad": config.skip_bad}
    settings |= {"device": config.device, "dtype": config.dtype, "max_new_tokens": config.max_new_tokens}
    settings |= {"demonstrations": config.demonstrations}
    if config.teach:  # a model with a past: as gently as the run itself
        settings |= {"init": config.teach, "optimizer": config.optimizer, "lr": config.lr}
        settings |= {"micro_batch": config.micro_batch}

    def main(settings):
        return sft.main(settings, partial(encode_demonstration, tools=tools), partial(with_tools, tools))

    what = "no --init given: fine-tuning on demonstrations of calls"
    name = start_name(config.data, config.seed, "-".join(["calls", *(tool.name for tool in tools)]))
    stage = SimpleNamespace(Config=sft.Config, main=main)
    return make_start_once(name, what, stage, START | task_of(config.data).sft | settings, dist)
