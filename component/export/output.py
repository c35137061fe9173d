"""The folder that an export is written to: it must not exist, must have room, and appears whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from ..run.errors import ArgumentError, StorageError
from ..run.files import make_once
from ..run.folder import show_size

Result = TypeVar("Result")


def check_output(output: Path, max_shard_size: str | None) -> None:
    """Raise ArgumentError for an output folder that exists, and for a size of shards that is given and is none."""
    if output.exists() or output.is_symlink():
        raise ArgumentError(f"--output {output}: exists; choose another name, or remove it")
    if max_shard_size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", max_shard_size):
        raise ArgumentError(f"--max_shard_size {max_shard_size!r}: expected a size such as 500MB or 5GB")


def check_room(output: Path, size: int) -> None:
    """Raise StorageError unless a folder of `size` bytes can be made."""
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"--output {output}: nothing can be written in {above}; choose another folder")
    if (free := shutil.disk_usage(above).free) < size:
        raise StorageError(
            f"--output {output}: what is written needs {show_size(size)}, and {show_size(free)} are free in {above}; "
            "make room, or choose another folder"
        )


def make_output(output: Path, write: Callable[[Path], Result]) -> Result:
    """Have `write` fill the output folder, and return what it returns.

    Raises:
        StorageError: something cannot be read or written.
        ArgumentError: another process has made the folder meanwhile.
    """
    results = []
    try:
        make_once(output, lambda folder: results.append(write(folder)))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{output}: could not be written ({error}); nothing was left there") from error
    if not results:
        raise ArgumentError(
            f"--output {output}: another process has made it meanwhile; choose another name, or remove it"
        )
    return results[0]
