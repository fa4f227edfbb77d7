"""A sweep of learning rates: one run each, of any stage that has --sweep, and a table of what they reach."""

import math
from dataclasses import replace

from support.devices import setup
from support.errors import ConfigError, DivergedError
from support.runs import RUNS, restarted, saved_run


def sweep(run, config):
    """run(config) once per learning rate of config.sweep, as NAME/lr0.001 and so on, then a table -> what the best one
    returned, and its "lr". run returns {"valid", "test"} at least: the validation split chooses. DivergedError if all
    runs diverge."""
    results = {}
    names = {lr: f"{config.name}/lr{lr:g}" for lr in config.sweep}
    if config.resume and not any(saved_run(RUNS / name) for name in names.values()):
        raise ConfigError(f"--resume: {RUNS / config.name} holds no saved run of this sweep to continue")
    dist = setup(config.device)
    for lr, name in names.items():
        again = restarted(replace(config, sweep=[], name=name), dist)  # by torchrun
        goes_on = config.resume and saved_run(RUNS / name) is not None  # runs after the one that stopped are new
        resume = again or goes_on
        try:
            results[lr] = run(replace(config, lr=lr, sweep=[], name=name, resume=resume))
        except DivergedError as error:  # a rate that is too high is a result too
            if dist.world > 1 and not error.on_all_ranks:  # the others would wait for this one
                raise
            diverged = error.with_traceback(None)  # whose frames hold the model
            results[lr] = {"valid": -math.inf, "test": math.nan}
    if all(result["valid"] == -math.inf for result in results.values()):
        raise diverged
    best = max(results, key=lambda lr: results[lr]["valid"])
    if dist.is_main:
        print(f"\n{'learning rate':>14}{'validation':>12}{'test':>8}")
        for lr, result in results.items():
            figures = f"{result['valid']:>12.1%}{result['test']:>8.1%}"
            figures = figures if result["valid"] > -math.inf else f"{'diverged':>12}"
            print(f"{lr:>14g}{figures}{'  <- best' if lr == best else ''}")
    return results[best] | {"lr": best}
