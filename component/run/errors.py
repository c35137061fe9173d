"""Errors that a user can cause. Each names place, value and remedy, and has the exit code of the run that it ends."""

import errno


class Fault(ValueError):
    """An error that a user can cause and mend. It ends a program with one message and `exit_code`, not a traceback."""

    exit_code = 2


class ArgumentError(Fault):
    """A fault in the settings, or in a folder that they name. The text names the file, the key and the value."""


class DataError(Fault):
    """A fault in the data. The text is `field: what is wrong; what to do`, after file and line where they are known."""


class CheckpointError(Fault):
    """An output_dir in which a run cannot go on: another run is or was there, or no checkpoint can be continued."""


class DoesNotFit(Fault):
    """No plan fits the card's memory, or not the one that was asked for."""


class NumericError(Fault):
    """A loss, a gradient or a weight is not finite."""

    exit_code = 3


class StorageError(Fault):
    """A folder cannot be written to or read from as a run needs it."""

    exit_code = 4


class RankLost(Fault):
    """Another process of the run, or its machine, is gone."""

    exit_code = 5


def unusable(message: str, error: Exception, otherwise: type[Fault] = DataError) -> Fault:
    """Make the Fault for an error in reading or writing: StorageError if the disk is full, else `otherwise`."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return (StorageError if is_full else otherwise)(message)
