"""What a user can mend: the package's errors, but for `BackendError` and what the ops raise about their arguments."""

from __future__ import annotations


class AlterRecError(Exception):
    """The message names the file, setting or place, what is there, and what was expected."""


class FileError(AlterRecError, RuntimeError):
    """A file of a data set, a run or a cache that is missing, damaged, foreign, or cannot be written."""


class DataError(AlterRecError, ValueError):
    """Raw data that cannot be read, or a data set that cannot be used as asked; names the file and the place in it."""


class ConfigError(AlterRecError, ValueError):
    """A setting that cannot be used; names it, its value and what was expected."""


class RunError(AlterRecError, RuntimeError):
    """A run directory that cannot be used as asked; says what to do."""


class DivergedError(AlterRecError, RuntimeError):
    """Training that came to scores which are not finite; says when."""


class MissingExtraError(AlterRecError, ImportError):
    """A package of an extra that is not installed; names the line that installs it."""
