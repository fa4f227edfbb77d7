"""What agent.py starts from where --init names nothing: a checkpoint that was shown how tools are called."""

import re
from functools import partial
from hashlib import sha256
from types import SimpleNamespace

import sft
from data import TASKS, conversation, load_problems, task_of
from support.errors import ConfigError
from support.runs import make_start_once, run_path, start_name
from support.sft_start import SFT_START, sft_start
from support.tasks import skipping
from support.tools import code_of_tools, turns

# of grpo.py's options those that agent.py does not have, with the value that turns them off
NOT_HERE = {"refill": 0, "stale": 0, "sampler_dtype": "same", "old_logprobs": "sampler", "correction": "none"}
NOT_HERE |= {"refresh_reference": 0, "kl_in": "loss", "skip_zero_variance": True}
NOT_HERE |= {"mask_truncated": False, "fsdp": False}
START = SFT_START | {"eval_every": 10}


def check_agent(config):
    """ConfigError on an option of grpo.py that agent.py does not have."""
    for name, value in NOT_HERE.items():
        if getattr(config, name) != value:
            raise ConfigError(f"--{name} {getattr(config, name)}: grpo.py has this option, agent.py does not")
    if config.teach and config.init:
        raise ConfigError("--init is a checkpoint that calls tools already, --teach one that is taught to: give one")
    if config.init and config.demonstrations != type(config).demonstrations:
        raise ConfigError("--demonstrations is for a start that is made: leave it out, or --init")
    plain = not (config.init or config.tools or config.teach)  # the start of grpo.py
    if plain and config.demonstrations != type(config).demonstrations:
        raise ConfigError("--demonstrations has no use with --tools '[]' and without --teach: leave it out")
    if config.train_on_tools and not config.tools:
        raise ConfigError("--train_on_tools has no use without --tools")


def encode_demonstration(tokenizer, problem, weighted=False, *, tools):
    """-> ids, flags, as sft.encode_example, whose place it takes: True on what the policy is to learn, False on what a
    tool writes. Each turn is encoded by itself, as it is written by itself. A reply is the one that the data records
    (GSM8K's may be rounded otherwise than the calculator's). weighted: sft.main passes it; calls have no ratings."""
    ids, flags = tokenizer.encode_chat(conversation(problem)[:-1], add_generation_prompt=True)  # without the solution
    parts = turns(problem.calls or problem.solution, tools)  # calls: the solution with <<…>>
    for text, by_policy in parts if len(parts) > 1 else [(problem.solution, True)]:  # no tool is called: no calls
        part = tokenizer.encode(text)
        ids, flags = ids + part, flags + [by_policy] * len(part)
    return [*ids, tokenizer.im_end_id], [*flags, True]


def calls_start(config, dist, tools, with_tools):
    """SFT on demonstrations of calls, of --teach or a pretrained start; made once, under runs/start, and reused -> its
    path. Without tools: that of grpo.py with the same --max_new_tokens. with_tools: agent.WithTools."""
    if not tools and not config.teach:
        return sft_start(config, dist)
    run_path(config)  # raises on a bad --name or --resume before a start is made
    shown = load_problems(config.data, "train", config.demonstrations, tuple(config.levels), config.skip_bad)
    texts = [problem.calls or problem.solution for problem in shown]
    unseen = [tool.name for tool in tools if all(len(turns(text, [tool])) == 1 for text in texts)]
    if unseen and dist.is_main:
        print(f"no demonstration of {config.data} calls {', '.join(unseen)}: the start will not know how")
    if tools and len(unseen) == len(tools) and not any(problem.calls for problem in shown):
        raise ConfigError(f"--data {config.data} shows no calls, such as <<3*4=12>>, in its solutions: give an --init")
    settings = {"data": config.data, "seed": config.seed}
    settings |= {"levels": config.levels} if config.data in TASKS else {}  # a file has none to choose from
    settings |= {"device": config.device, "dtype": config.dtype}
    sizes = {"max_new_tokens": config.max_new_tokens, "demonstrations": config.demonstrations}
    skip, others = skipping(config.data, config.skip_bad), {}
    if config.teach:  # a model with a past: as gently as the run itself
        others = {"init": config.teach, "optimizer": config.optimizer, "lr": config.lr}
        others |= {"micro_batch": config.micro_batch}
    settings |= sizes | {"skip_bad": bool(skip)} | others
    others |= skip | {size: value for size, value in sizes.items() if value != getattr(type(config), size)}

    def main(settings):
        return sft.main(settings, partial(encode_demonstration, tools=tools), partial(with_tools, tools))

    what = "no --init given: fine-tuning on demonstrations of calls"
    # Another pattern makes other demonstrations; another function, other answers in SFT's validation.
    files = {name: sha256(text).hexdigest() for name, text in code_of_tools(config.tools, tools).items()}
    patterns = [tool.pattern for name, tool in zip(config.tools, tools, strict=True) if ":" in name]
    others |= {"tools": [patterns, files]} if patterns else {}
    kind = "-".join(["calls", *(re.sub(r"[^A-Za-z0-9_-]+", "_", tool.name) for tool in tools)])
    name = start_name(config.data, config.seed, kind, config.levels, **others)
    stage = SimpleNamespace(Config=sft.Config, main=main)
    return make_start_once(name, what, stage, START | task_of(config.data).sft | settings, dist)
