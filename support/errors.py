"""Errors that the user can fix. `cli.run_script` prints their message, one line, and exits with status 2."""


class CheckpointError(ValueError):
    """A checkpoint or a model config that cannot be used; the message says what is wrong, where, and what to do."""


class TokenizerError(ValueError):
    """A tokenizer or a text that cannot be used; the message says what is wrong, where, and what to do."""


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong, where, and what to do."""


class ConfigError(ValueError):
    """Settings that contradict each other, or an input that cannot be used; the message says what to change."""


class DivergedError(ConfigError):
    """The loss, the gradient or the logits are no longer finite."""

    on_all_ranks = False  # whether every process has raised it, at the same place


FOR_THE_USER = (ConfigError, CheckpointError, TokenizerError, DataError)
