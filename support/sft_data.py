"""What sft.py trains on and measures with: problems by split, without the badly rated, and the training examples as
ids."""

from data import encode_prompt, load_problems
from support.answers import measure_of
from support.errors import ConfigError
from support.records import drop_too_long
from support.tasks import refuse_levels


def load_examples(config, dist):
    """{"train", "valid", "test"}: problems; without ratings, all there are. Of rated responses "train" keeps those with
    a weight above 0, or with --rated threshold those of at least --min_rating; "valid" and "test", whose responses are
    references, those of at least --min_rating either way. ConfigError if a split keeps none, on a flag for ratings if
    nothing is rated, and on --samples of free text."""
    most = {"train": config.demonstrations, "valid": config.eval_problems, "test": config.test_problems}
    problems = {s: load_problems(config.data, s, n, tuple(config.levels), config.skip_bad) for s, n in most.items()}
    if all(p.rating is None for of_split in problems.values() for p in of_split):
        for name in ("rated", "min_rating"):
            if getattr(config, name) != getattr(type(config), name):
                raise ConfigError(f"--{name} has no use here: no response of {config.data} is rated; leave it out")
    least = config.min_rating if config.rated == "threshold" else 1.0 + 1e-9  # a rating of 1 has weight 0
    kept = [p for p in problems["train"] if p.rating is None or p.rating >= least]
    if not kept:
        wanted = f"{config.min_rating:g} or more" if config.rated == "threshold" else "above 1"
        raise ConfigError(f"no response of {config.data} is rated {wanted}")
    if len(kept) < len(problems["train"]) and dist.is_main:
        low = f"below {config.min_rating:g}" if config.rated == "threshold" else "1, which has weight 0"
        skipped = len(problems["train"]) - len(kept)
        print(f"{skipped} of {len(problems['train'])} responses are rated {low}: left out")
    problems["train"] = kept
    for split in ("valid", "test"):
        problems[split] = [p for p in problems[split] if p.rating is None or p.rating >= config.min_rating]
        if not problems[split]:
            raise ConfigError(f"no {split} response of {config.data} is rated {config.min_rating:g} or more")
    if config.samples and measure_of(problems["test"]) == "f1":
        needs = "--samples needs answers to check"
        raise ConfigError(f"{needs}, and no test problem of {config.data} has a number after ####")
    return problems


def encode_training(config, problems, tokenizer, context, dist, encode):
    """-> the problems, of "valid" and "test" those whose prompts leave room for an answer; the training examples that
    fit the context, (ids, flags) each; those of the validation split that fit and have a weight, perhaps none; the
    difficulty of the training examples. encode: `sft.encode_example`, or another."""
    fitting, room = dict(problems), context - config.max_new_tokens
    for split in ("valid", "test"):
        lengths = [len(encode_prompt(tokenizer, p)) for p in problems[split]]
        fitting[split] = drop_too_long(problems[split], lengths, room, f"{split} prompt", dist)
    weighted = config.rated == "weights" and any(p.rating is not None for p in problems["train"])
    examples = [(*encode(tokenizer, p, weighted), p.level) for p in problems["train"]]
    examples = drop_too_long(examples, [len(ids) for ids, _, _ in examples], context, "training example", dist)
    difficulties = [level if config.difficulty == "level" else len(ids) for ids, _, level in examples]
    if config.order != "shuffled" and len(set(difficulties)) == 1:
        same = f"all examples have {config.difficulty} {difficulties[0]}"
        advice = "; try --difficulty length" if config.difficulty == "level" else ""
        raise ConfigError(f"--order {config.order}, but {same}{advice}")
    held_out = [encode(tokenizer, p, weighted) for p in fitting["valid"]]
    held_out = [(ids, flags) for ids, flags in held_out if len(ids) <= context and any(flags)]
    if (without := len(fitting["valid"]) - len(held_out)) and dist.is_main:
        which = f"{without} of {len(fitting['valid'])} validation solutions"
        print(f"{which} have no held-out loss: longer than {context} tokens, or of weight 0")
    return fitting, [(ids, flags) for ids, flags, _ in examples], held_out, difficulties


def refuse_unused(config):
    """ConfigError on a flag of sft.Config that another one takes the use from."""
    refuse_levels(config)
    default = type(config)
    if config.sweep and config.lr != default.lr:
        raise ConfigError("--lr has no effect beside --sweep, which names the rates: leave it out")
    if len({f"{lr:g}" for lr in config.sweep}) < len(config.sweep):  # as support/sweeps.py names the runs
        raise ConfigError(f"--sweep {config.sweep}: two rates are the same in six digits; leave one of them out")
    for name in ("difficulty", "pace_start", "pace"):
        if config.order == "shuffled" and getattr(config, name) != getattr(default, name):
            raise ConfigError(f"--{name} is for --order curriculum or anti: leave it out, or add one")
