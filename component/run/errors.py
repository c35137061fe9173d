"""Errors that a user can cause. Each names place, value and remedy, and has the exit code of the run that it ends."""

import errno


class Fault(ValueError):
    """What a user can cause and mend. It ends a program with one message and `exit_code`, never with a traceback."""

    exit_code = 2


class ArgumentError(Fault):
    """A fault in the settings, or in a folder that they name. The text names the file, the key and the value."""


class DataError(Fault):
    """A fault in the data. The text is `field: what is wrong; what to do`, and names file and line if raised."""


class CheckpointError(Fault):
    """What is to be resumed is not this run, or its folder is somebody else's."""


class DoesNotFit(Fault):
    """No plan, or not the one asked for, fits the card."""


class NumericError(Fault):
    """A loss, a gradient or a weight is not finite."""

    exit_code = 3


class StorageError(Fault):
    """A folder cannot be written to or read from as a run needs it."""

    exit_code = 4


def unusable(message: str, error: Exception, otherwise: type[Fault] = DataError) -> Fault:
    """The Fault for what cannot be read or kept: StorageError where the disk is full, else `otherwise`."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return (StorageError if is_full else otherwise)(message)
