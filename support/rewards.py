"""Loading a user's reward function, and checking that a reward function returns one finite number per text."""

import importlib
import os
import sys

import torch

from support.errors import ConfigError


def load_reward(path, taken=()):
    """ "module:function" -> (the function's name, the function). The module is looked for beside the script and in the
    current directory. taken: names that are in use. Raises ConfigError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # permanently: the function may import modules when it is called
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # any error of the user's module
        raise ConfigError(f"--reward {path}: {type(error).__name__}: {error}") from None
    if not callable(function) or name in taken:
        raise ConfigError(f"--reward {path}: " + (f"{name} is taken" if callable(function) else "not a function"))
    return name, function


def score(functions, texts, problems, ended):
    """{name: function} -> {name: rewards (len(texts),)}. Raises ConfigError if a function does not return a finite
    number for each text."""

    def reward_error(message):
        if int(os.environ.get("LOCAL_RANK", 0)):  # run_script prints on rank 0 only, but this rank's texts failed
            print(f"error: {message}", file=sys.stderr, flush=True)
        return ConfigError(message)

    rewards = {}
    for name, function in functions.items():
        try:
            values = torch.as_tensor(function(texts, problems, ended), dtype=torch.float32).detach().cpu()
        except Exception as error:
            raise reward_error(f"reward {name!r} raised {type(error).__name__}: {error}") from None
        if values.shape != (len(texts),):
            raise reward_error(f"reward {name!r} returned shape {tuple(values.shape)} for {len(texts)} completions")
        if not values.isfinite().all():
            bad = int(values.isfinite().logical_not().nonzero()[0])
            raise reward_error(f"reward {name!r} is {values[bad].item()} for the completion {texts[bad]!r}")
        rewards[name] = values
    return rewards
