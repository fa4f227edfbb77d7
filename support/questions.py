"""Questions whose answers are checked: loading a split of them, and how well a policy answers held-out ones."""

from dataclasses import replace

from data import encode_prompt, load_problems
from evaluate import evaluate, evaluate_samples
from lora import merged
from support.answers import checkable, verifiable
from support.errors import ConfigError
from support.held_out import logged
from support.records import load_splits
from support.rewards import judge


def instructed(problems, instruction):
    """The problems with an --instruction after each question."""
    return [replace(p, question=f"{p.question}\n{instruction}") for p in problems] if instruction else problems


def open_problems(config, tokenizer, context, dist, checked, advice=""):
    """{"train", "valid", "test"}: problems, with --instruction, whose prompts leave room for an answer. ConfigError if
    a split has none; or, if `checked`, where one has no answer to check. advice: what else can be done then."""

    def load(split, n):
        problems = load_problems(config.data, split, n, tuple(config.levels), config.skip_bad)
        if checked:
            refuse_unanswered(problems, split, config.data, advice)
        return instructed(problems, getattr(config, "instruction", ""))

    sizes = {"train": None, "valid": config.eval_problems, "test": config.test_problems}
    return splits_with_room(load, sizes, config, tokenizer, context, dist)


def splits_with_room(load, sizes, config, tokenizer, context, dist):
    """{split: n} -> {split: problems of load(split, n) whose prompts leave room for --max_new_tokens}. ConfigError if a
    split has none."""
    room = context - config.max_new_tokens
    return load_splits(load, sizes, lambda p: len(encode_prompt(tokenizer, p)), room, "prompt", dist)


def refuse_unanswered(problems, split, data, advice=""):
    """ConfigError if one of the problems has no answer that can be checked. advice: what else can be done."""
    if unanswered := sum(not p.answer for p in problems):
        raise ConfigError(
            f"{unanswered} of {len(problems)} {split} problems of {data} have no answer after ####, so no "
            f"rollout can be right: leave them out{advice}"
        )


def validate(policy, tokenizer, problems, functions, weights, config, dist, respond=None):
    """-> what is logged of greedy answers, and by what best/ is chosen: the accuracy; or if most problems have none to
    check, or being right is not paid, what the greedy answers earn, {"valid_reward"} then too."""
    with merged(policy):
        sizes = config.max_new_tokens, dist
        result = evaluate(policy, tokenizer, problems["valid"], *sizes, respond=respond, dtype=config.dtype)
    record = logged(result)
    if verifiable(problems["valid"]) and "correct" in weights:
        return record, result["accuracy"]
    rows = [(s.text, s.problem, s.ended, s.length + s.written) for s in result["answers"]]  # this rank's
    rewards = judge(functions, *(list(part) for part in zip(*rows, strict=True)), config) if rows else {}
    (total,) = dist.sum(sum(weights[name] * values.sum() for name, values in rewards.items() if name in weights))
    record["valid_reward"] = total / result["n"]
    return record, record["valid_reward"]


def measure_test(policy, tokenizer, problems, config, dist, respond=None):
    """The test split -> the figures of `evaluate`, greedy, and of `evaluate_samples`, --pass_samples answers to each of
    the first --pass_problems problems that have an answer to check."""
    some, n, T = checkable(problems["test"])[: config.pass_problems], config.pass_samples, config.max_new_tokens
    answering = {"respond": respond, "dtype": config.dtype}
    with merged(policy):
        result = evaluate(policy, tokenizer, problems["test"], T, dist, **answering)
        sampling = {"seed": config.seed, "batch": max(1, 256 // n)} | answering
        result |= evaluate_samples(policy, tokenizer, some, n, T, dist, **sampling)
    return {name: value for name, value in result.items() if name != "answers"}
