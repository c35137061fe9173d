"""Files and folders that are whole or absent: written under a temporary name, synced to the disk, then renamed."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from loguru import logger

POINTER = b"version https://git-lfs.github.com"  # first bytes of the pointer that git-lfs keeps for a large file

SIGHT = 3


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "luciole")


def fingerprint(parts: Iterable[str | Path]) -> str:
    """Digest of texts and of files' contents (not their names), as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            digest.update(contents(part, part.stat().st_size, part.stat().st_mtime_ns))
        else:
            digest.update(hashlib.blake2b(part.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()


@cache
def contents(path: Path, size: int, changed: int) -> bytes:
    """Digest of a file, cached by its path, size and time of change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def comes_into_sight(path: Path) -> bool:
    """Whether a path that another machine has made is here, or is so within SIGHT seconds: a network's file system may
    remember for a while what was there before."""
    deadline = time.monotonic() + SIGHT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(path.parent)  # has it look again
    return path.exists()


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`; if it is absent, `make` fills a temporary one, which is then renamed to it.

    One process makes, others wait for it. What a killed process left behind is removed by the next.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_of_maker(folder)
    try:
        lock.acquire()
    except Timeout:
        logger.info(f"another process is making {folder}; waiting for it")
        lock.acquire(timeout=-1)
    try:
        if not folder.is_dir():
            temporary = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                make(temporary)
                publish(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held: whoever waits for it then takes the lock of a new file
        lock.release()
    return folder


def lock_of_maker(folder: Path) -> FileLock:
    """The lock that a process holds while it makes `folder` (make_once). Acquiring it raises Timeout at once."""
    return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a folder once every file in it is on the disk, so that `folder` is whole from its first moment."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    os.rename(temporary, folder)
    sync(folder.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once the block has written it whole; after an error nothing has changed.

    If `path` is a link, the link is replaced, never followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # x: fail where something has been put there meanwhile
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file at once, when its new contents are on the disk."""
    with replacing(Path(path)) as file:
        file.write(data)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
