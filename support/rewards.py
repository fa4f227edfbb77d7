"""Reward functions that a user brings, and what is asked of every reward function: a finite number for each text."""

import importlib
import os
import sys

import torch

from support.errors import ConfigError


def load_reward(path, taken=()):
    """ "module:function" -> (its name, the function); modules are looked for beside the script and where one stands.
    taken: names that it cannot have. Raises ConfigError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for good: the function may import others when it is called
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module trips over while it is imported
        raise ConfigError(f"--reward {path}: {type(error).__name__}: {error}") from None
    if not callable(function) or name in taken:
        raise ConfigError(f"--reward {path}: " + (f"{name} is taken" if callable(function) else "not a function"))
    return name, function


def score(functions, texts, problems, ended):
    """{name: function} -> {name: rewards (len(texts),)}. Raises ConfigError on what is no list of finite numbers."""

    def refused(what):
        if int(os.environ.get("LOCAL_RANK", 0)):  # run_script speaks for rank 0 alone, the texts are this rank's
            print(f"error: {what}", file=sys.stderr, flush=True)
        return ConfigError(what)

    rewards = {}
    for name, function in functions.items():
        try:
            values = torch.as_tensor(function(texts, problems, ended), dtype=torch.float32).detach().cpu()
        except Exception as error:
            raise refused(f"reward {name!r} raised {type(error).__name__}: {error}") from None
        if values.shape != (len(texts),):
            raise refused(f"reward {name!r} returned shape {tuple(values.shape)} for {len(texts)} completions")
        if not values.isfinite().all():
            bad = int(values.isfinite().logical_not().nonzero()[0])
            raise refused(f"reward {name!r} is {values[bad].item()} for the completion {texts[bad]!r}")
        rewards[name] = values
    return rewards
