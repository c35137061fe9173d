"""The licence files of a base, which bind what is made of it and so go along."""

import os
import re
import shutil
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..trust import is_at_home
from .facts import REPOSITORY

NAME = re.compile(  # LICENSE, MODEL_LICENSE.txt, LICENSE-APACHE-2.0.md, 模型许可协议.pdf; and the folder LICENSES
    r"((model_)?licen[sc]es?|notice|use_policy|.*(许可证?|许可证?协议|使用协议))(-\w+(\.\d+)*)*(\.(txt|md|rst|pdf))?",
    re.IGNORECASE,
)
CONFIG = "config.json"  # which the cache holds of every model that was loaded
LARGEST = 2**20  # bytes; a licence is text


def copy_licences(base: str, folder: Path) -> None:
    """Copy a base's licence files into a folder, but not over a file of it. Nothing is fetched: of a hub's model, those
    that are in the cache.

    Args:
        base: folder or hub name.
    """
    for file in find_licences(find_folder(base)):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def name_left(base: str, folder: Path) -> list[str]:
    """Names of a base's licence files, and of a folder of such, that are not in a folder."""
    return [path.name for path in find_named(find_folder(base)) if not (folder / path.name).exists()]


def find_folder(base: str) -> Path:
    """The folder of a base's files, in the hub's cache if the base is named by the hub. It may not exist."""
    cached = None if os.path.isdir(base) or not REPOSITORY.fullmatch(base) else try_to_load_from_cache(base, CONFIG)
    return Path(cached).parent if isinstance(cached, str) else Path(base)


def find_named(folder: Path) -> list[Path]:
    """What is called like a licence in a model's folder; nothing where there is no such folder."""
    return sorted(path for path in (folder.iterdir() if folder.is_dir() else ()) if NAME.fullmatch(path.name))


def find_licences(folder: Path) -> list[Path]:
    """The licence files of a model's folder that can go along: no large ones, and no links that lead out of it."""
    return [
        file
        for file in find_named(folder)
        if file.is_file() and os.access(file, os.R_OK) and file.stat().st_size <= LARGEST and is_at_home(file)
    ]
