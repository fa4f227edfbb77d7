"""What a user can mend: one line that says what is wrong, where, and what to do. `cli.run` prints it, exit status 2."""


class CheckpointError(ValueError):
    """A checkpoint or a model config that cannot be used: one line says what is wrong, where, and what to do."""


class TokenizerError(ValueError):
    """A tokenizer or a text that cannot be used: one line says what is wrong, where, and what to do."""


class DataError(ValueError):
    """One line: what is wrong with the data, where, and what to do about it."""


class ConfigError(ValueError):
    """Settings that do not fit together or an input that cannot be used: one line says what to change."""


class DivergedError(ConfigError):
    """A loss or a gradient that is no longer a finite number."""
