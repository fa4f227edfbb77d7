"""What reward_model.py does before its first step and does not teach: the flags of its pairs and what was left out of
the settings, the models, the run.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from data import DEFAULT_TASK, TASKS, encode_answer, encode_prompt, load_problems
from encoder import Encoder
from optim import make_optimizers
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Count, Range
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.encoder_start import check_order, open_encoder
from support.errors import ConfigError
from support.hf_bert import is_encoder
from support.pretrained_start import text_start
from support.reward_look import Look
from support.reward_samples import fitting_groups, make_pairs, save_pairs, saved_pairs
from support.runs import Run, RunConfig, run_path
from support.sft_start import sft_start
from support.tasks import refuse_levels


@dataclass
class RewardPairFlags(RunConfig):
    """Which pairs, and how many."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), ultrafeedback, hh, style, or the path of a .jsonl of prompt,
    chosen, rejected."""
    pairs: Literal["corrupted", "sampled", "both"] | None = None
    """Pairs of a task: corrupted solutions, answers sampled from --init and judged by the verifier, or both; default:
    both, or sampled for a task without corruptions."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    n_pairs: Count | None = None
    """Largest number of corrupted training pairs (sampled ones come on top, as many as there are), or of a file's;
    default: 12,000, or all of a file's."""
    max_tokens: Count | None = None
    """Longest pair, its prompt and its longer answer, in tokens; longer ones are left out. Default: the model's
    context."""
    kinds: list[str] | None = None
    """Kinds of errors in the corrupted training pairs; a kind named twice occurs twice as often. Default: all kinds,
    and the task's first (a wrong sum, the hardest to see) four times as often. Test pairs have all kinds equally
    often."""
    prompts: Count = 3000
    """Training problems to sample pairs from; not with --pairs corrupted or a file."""
    rollouts: Annotated[int, Range(int, 2)] = 8
    """Answers sampled per problem; not with --pairs corrupted or a file."""
    max_new_tokens: Count = 64
    """Longest sampled answer, in tokens."""


def fill_in(config):
    """Set, in place, what was not given. ConfigError on flags that do not go together."""
    refuse_levels(config)
    corruptions = list(TASKS.get(config.data, TASKS[DEFAULT_TASK]).corruptions)
    pairs, kinds = "both" if corruptions else "sampled", corruptions[:1] * 3 + corruptions  # where none are given
    if config.data not in TASKS and config.pairs not in (None, pairs):
        raise ConfigError(f"--pairs {config.pairs} has no use here: {config.data} has pairs of its own; leave it out")
    config.pairs = pairs if config.pairs is None else config.pairs
    if config.kinds not in (None, kinds) and (config.data not in TASKS or config.pairs == "sampled"):
        raise ConfigError("--kinds has no use here: no pair is corrupted; leave it out")
    if config.n_pairs is not None and config.data in TASKS and config.pairs == "sampled":
        raise ConfigError("--n_pairs has no use here: no pair is corrupted; leave it out")
    if config.kinds == []:
        raise ConfigError(f"--kinds is empty: name some of {', '.join(corruptions)}, or leave it out")
    config.kinds = kinds if config.kinds is None else config.kinds
    if unknown := set(config.kinds) - set(corruptions):
        raise ConfigError(f"--kinds holds {min(unknown)!r}; choose some of {', '.join(corruptions)}")
    if config.sampler is not None and config.data not in TASKS:
        raise ConfigError(f"--sampler has no use here: there is no verifier to judge answers to {config.data}")
    if config.sampler is not None and config.pairs == "corrupted" and not config.best_of_problems:
        raise ConfigError("--sampler has no use here: nothing is sampled; leave it out")
    refuse_sizes(config)
    if config.margin is None:
        config.margin = 1.0 if config.loss == "hinge" else 0.0
    if config.nll is None:
        config.nll = 1.0 if config.backbone == "decoder" else 0.0
    if config.nll and config.backbone == "encoder":
        raise ConfigError("--nll needs a decoder: an encoder sees the tokens that it would have to predict")
    if config.n_pairs is None and config.data in TASKS:
        config.n_pairs = 12_000


def refuse_sizes(config):
    """ConfigError on the size of a sample that is not taken: for pairs, or for the report."""
    task = config.data in TASKS
    pairs, report = task and config.pairs != "corrupted", task and config.best_of_problems > 0
    used = {"prompts": pairs, "rollouts": pairs, "max_new_tokens": pairs or report, "best_of": report}
    used["best_of_problems"] = task or config.best_of_problems == 0
    for name, is_used in used.items():
        if not is_used and getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"--{name} has no use here: no such answers are sampled; leave it out")


def open_models(kind, config, init, dist):
    """-> a model of `kind` to train and its tokenizer; the policy to sample from and its tokenizer, or None, None."""
    path, policy, policy_tokenizer = resolve_checkpoint(init), None, None
    if is_encoder(path):
        if config.backbone == "decoder":
            raise ConfigError(f"{path} is an encoder: --backbone encoder")
        trunk, tokenizer, _ = open_encoder(Encoder, path)
        if config.sampler is None and config.data in TASKS and config.pairs != "corrupted":
            raise ConfigError(f"{path} is an encoder and writes no answers: --sampler RUN, or --pairs corrupted")
    else:
        trunk, tokenizer, _ = open_checkpoint(path)
        if config.nll and not trunk.config.tie_embeddings:
            raise ConfigError(f"{path} has an output matrix of its own, which a reward model drops: --nll 0")
    if config.backbone == "encoder":
        check_order(trunk.config, path)
    if config.data in TASKS and (config.sampler is not None or not is_encoder(path)):
        policy, policy_tokenizer, _ = open_checkpoint(config.sampler or path, dist.device)
    judge = kind.from_policy(trunk, config.dropout, config.seed, config.extra_layers).to(dist.device)
    judge.pad_id = tokenizer.endoftext_id
    return judge, tokenizer, policy, policy_tokenizer


def begin_run(config, kind, loss_of, open_reward_model, best_of_n):
    """-> Run, Look, the ids of each split's pairs (`fitting_groups`), autocast. kind: RewardModel or RewardEncoder;
    loss_of: a row of LOSSES; the last two are functions of reward_model.py."""
    dist = setup(config.device)
    dist.per_rank("batch", config.batch)  # an error now, not after the pairs are sampled
    autocast, scaler = precision(config.dtype, dist)
    # Bad names and empty splits raise here, before anything is made or sampled.
    run_path(config)
    all_pairs = None if config.data in TASKS else make_pairs(config, None, None, dist, autocast)
    init = config.init or (sft_start if config.data in TASKS else text_start)(config, dist)
    judge, tokenizer, policy, policy_tokenizer = open_models(kind, config, init, dist)  # policy: the sampler, or None
    reports_samples = policy is not None and config.best_of_problems > 0
    if reports_samples:
        check_room(config, judge, policy, tokenizer, policy_tokenizer)
    if all_pairs is None:  # a resumed run reads the pairs of its first part: sampled again, they could be others
        all_pairs = saved_pairs(config) or make_pairs(config, policy, policy_tokenizer, dist, autocast)
    longest = min(judge.config.context, config.max_tokens or judge.config.context)
    pairs, groups = fitting_groups(all_pairs, tokenizer, longest, dist)  # those of at most so many tokens

    optimizers = make_optimizers(judge, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    reads = records_of(config.data, all_pairs) | weights_of(init, judge)
    if policy is not None:
        reads |= weights_of(config.sampler or init, policy)
    run = Run(config, dist, judge, tokenizer, optimizers, scaler, best=-1.0, reads=reads, before=None)
    if config.data in TASKS and config.pairs != "corrupted":
        save_pairs(run, all_pairs)
    sampler = (policy, policy_tokenizer) if reports_samples else None
    look = Look(run, pairs, groups, sampler, autocast, loss_of, open_reward_model, best_of_n)
    look.before(init)  # the test split under the new head
    return run, look, groups, autocast


def check_room(config, judge, policy, tokenizer, policy_tokenizer):
    """ConfigError, before the training, if the report on samples, after it, would not fit the context."""
    problems = load_problems(config.data, "test", max(200, config.best_of_problems), tuple(config.levels))
    answers = [max(config.max_new_tokens, len(encode_answer(tokenizer, p.solution))) for p in problems]
    scored = max(len(encode_prompt(tokenizer, p)) + n for p, n in zip(problems, answers, strict=True))
    sampled = max(len(encode_prompt(policy_tokenizer, p)) for p in problems) + config.max_new_tokens
    for n, room in ((scored, judge.config.context), (sampled, policy.config.context)):
        if n > room:
            raise ConfigError(
                f"prompts with their solutions or --max_new_tokens, {n} tokens together, do not fit the model's "
                f"context of {room}: use lower --levels, or skip the report on samples with "
                "--best_of_problems 0"
            )
