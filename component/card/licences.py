"""The licence files of a base, which bind what is made of it and so go along."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from ..trust import find_model_file

NAME = re.compile(r"((model_)?licen[sc]e|notice|use_policy|.*(协议|许可)).*(?<!\.py)", re.IGNORECASE | re.DOTALL)
LARGEST = 2**20  # bytes; a licence is text


def copy_licences(base: str, folder: Path) -> None:
    """Copy a base's licence files into a folder, but not over a file of it. Nothing is fetched: of a hub's model, those
    that are in the cache.

    Args:
        base: folder or hub name.
    """
    config = None
    with suppress(OSError, ValueError):  # a base that is gone, or a hub out of reach, takes nothing from what was made
        config = find_model_file(base, "config.json")
    found = find_licences(config.parent) if config else []
    for file in found:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def find_licences(folder: Path) -> list[Path]:
    """A model's licence files. A link counts only where it stays in the folder, or in the hub's cache of this model: a
    folder that somebody else made could lead to a private file."""
    cached = folder.parent.name == "snapshots"  # models--OWNER--NAME/snapshots/COMMIT, of links to ../../blobs
    home = (folder.parents[1] if cached else folder).resolve()
    return sorted(
        file
        for file in folder.iterdir()
        if NAME.fullmatch(file.name)
        and file.is_file()
        and os.access(file, os.R_OK)
        and file.stat().st_size <= LARGEST
        and file.resolve().is_relative_to(home)
    )
