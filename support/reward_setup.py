"""What a reward model's run needs before its first step: settings that were left out, the models."""

from data import DEFAULT_TASK, TASKS, load_problems
from encoder import Encoder
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.encoder_start import check_order, open_encoder
from support.errors import ConfigError
from support.hf_bert import is_encoder
from support.reward_samples import ids_of_answer, ids_of_prompt


def fill_in(config):
    """Set, in place, what was not given. ConfigError on flags that do not go together."""
    corruptions = list(TASKS.get(config.data, TASKS[DEFAULT_TASK]).corruptions)
    if config.pairs is None:
        config.pairs = "both" if corruptions else "sampled"
    if config.kinds is None:
        config.kinds = corruptions[:1] * 3 + corruptions
    if unknown := set(config.kinds) - set(corruptions):
        raise ConfigError(f"--kinds holds {min(unknown)!r}; choose some of {', '.join(corruptions)}")
    if config.sampler is not None and config.data not in TASKS:
        raise ConfigError(f"--sampler has no use here: there is no verifier to judge answers to {config.data}")
    if config.margin is None:
        config.margin = 1.0 if config.loss == "hinge" else 0.0
    if config.sft_weight is None:
        config.sft_weight = 1.0 if config.backbone == "decoder" else 0.0
    if config.sft_weight and config.backbone == "encoder":
        raise ConfigError("--sft_weight needs a decoder: an encoder sees the tokens that it would have to predict")
    if config.n_pairs is None and config.data in TASKS:
        config.n_pairs = 12_000


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
        if config.sft_weight and not trunk.config.tie_embeddings:
            raise ConfigError(f"{path} has an output matrix of its own, which a reward model drops: --sft_weight 0")
    if config.backbone == "encoder":
        check_order(trunk.config, path)
    if config.data in TASKS and (config.sampler is not None or not is_encoder(path)):
        policy, policy_tokenizer, _ = open_checkpoint(config.sampler or path, dist.device)
    judge = kind.from_policy(trunk, config.dropout, config.seed, config.extra_layers).to(dist.device)
    judge.pad_id = tokenizer.endoftext_id
    return judge, tokenizer, policy, policy_tokenizer


def check_room(config, judge, policy, tokenizer, policy_tokenizer):
    """ConfigError, before the training, if the report on samples, after it, would not fit the context."""
    problems = load_problems(config.data, "test", max(200, config.best_of_problems), tuple(config.levels))
    answers = [max(config.max_new_tokens, len(ids_of_answer(tokenizer, p.solution))) for p in problems]
    scored = max(len(ids_of_prompt(tokenizer, p.question)) + n for p, n in zip(problems, answers, strict=True))
    sampled = max(len(ids_of_prompt(policy_tokenizer, p.question)) for p in problems) + config.max_new_tokens
    for n, room in ((scored, judge.config.context), (sampled, policy.config.context)):
        if n > room:
            raise ConfigError(
                f"prompts with their solutions or --max_new_tokens, {n} tokens together, do not fit the model's "
                f"context of {room}: use lower --levels, or skip the report on samples with "
                "--best_of_problems 0"
            )
