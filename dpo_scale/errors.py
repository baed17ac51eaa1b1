"""The one family of errors that is the user's to fix.

Whatever is wrong with a config, a data file, a model folder or a checkpoint is raised as a `UserError`.
`dpo_scale.run.cli.run` prints its message once, without a traceback, and exits with code 2. Any other exception is a
defect of ours and keeps its traceback.
"""

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something that the user gave cannot be used; the message names it and says what was expected."""


class ConfigError(UserError):
    """An unknown key, a wrong type or an impossible value in a config file or an override."""


class DataError(UserError):
    """A data file or a row of one that cannot be used; the message names file and row."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged or belongs to another run."""


class TrainingError(UserError):
    """Training that cannot go on: a loss or gradient that is not finite."""


class StoreError(UserError):
    """A reference store that is damaged, foreign, of a newer version, or cannot be read or written."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
