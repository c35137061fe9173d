"""Keeps the folder of rendered data within a size, by removing the stores that were used longest ago."""

import fcntl
import os
import re
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from loguru import logger

from ..run.files import default_cache_dir, lock_of_maker
from ..run.folder import show_size
from .store import FILES, REJECTED, REPORT

KEY = re.compile(r"[0-9a-f]{32}")  # name of a store's folder (SFTDataset.folder)
ABANDONED = re.compile(r"\.(tmp|removed)-([0-9a-f]{32})")  # of what a killed process may have left
OURS = {REPORT, REJECTED, *(f"{name}.bin" for name in FILES)}


def cache_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or default_cache_dir()).expanduser()


def limit_cache(cache_dir: str | Path | None, limit: float | None) -> None:
    """Remove stores, those used longest ago first, until the rest has at most `limit` GiB. None means no limit.

    A store that a process has open stays (store.hold), and so does whatever is not a store's files alone. One process
    removes at a time; others leave it to that one.
    """
    folder = cache_folder(cache_dir)
    if limit is None or not os.access(folder, os.W_OK):  # it is not there, or nothing can be removed
        return
    try:
        with FileLock(folder / ".limit.lock", timeout=0):
            remove_abandoned(folder)
            keys = [path for path in folder.iterdir() if KEY.fullmatch(path.name)]
            stores = [path for path in keys if is_ours(path) and (path / REPORT).exists()]
            sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in stores}
            uses = {path: (path / REPORT).stat().st_mtime for path in stores}
            left, removed = sum(sizes.values()), []
            for path in sorted(stores, key=uses.get):
                if left > limit * 2**30 and remove(path):
                    left -= sizes[path]
                    removed.append(path)
    except Timeout:
        return
    except OSError as error:
        logger.warning(f"cache_dir {folder}: rendered data could not be removed ({error})")
        return
    if removed:
        logger.info(
            f"cache_dir {folder}: removed {len(removed)} of {len(stores)} sets of rendered data, not used since "
            f"{datetime.fromtimestamp(uses[removed[-1]]):%Y-%m-%d %H:%M}; {show_size(left)} are left, and "
            f"cache_size_limit is {limit:g} GiB"
        )


def is_ours(path: Path) -> bool:
    """Whether a path is a folder, and no link to one, that holds files of a store alone."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(file.name in OURS and file.is_file() and not file.is_symlink() for file in path.iterdir())


def remove(store: Path) -> bool:
    """Delete a store unless it is in use. Returns whether it is gone.

    It is renamed first, so that nobody finds a part of it. Whoever waits for its lock finds it gone (store.hold).
    """
    doomed = store.with_name(f".removed-{store.name}")
    try:
        with open(store / REPORT, "r+b") as report:  # on NFS, only a file that can be written to is locked
            fcntl.flock(report, fcntl.LOCK_EX | fcntl.LOCK_NB)
            store.rename(doomed)
    except OSError:  # a process has it open, or it belongs to another user
        return False
    delete(doomed)
    return True


def remove_abandoned(folder: Path) -> None:
    """Delete what processes that were killed had begun to make or to remove."""
    for path in folder.iterdir():
        if name := ABANDONED.fullmatch(path.name):
            lock = lock_of_maker(folder / name[2]) if name[1] == "tmp" else nullcontext()
            with suppress(Timeout), lock:
                if is_ours(path):
                    delete(path)


def delete(folder: Path) -> None:
    """Delete a folder that holds files of a store alone."""
    for name in OURS:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
