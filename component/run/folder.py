"""The folder of a run: who may write there, where the run continues from, and checkpoints that are whole or absent."""

import os
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

import torch.distributed as dist
from filelock import FileLock, Timeout
from loguru import logger

from .errors import ArgumentError, CheckpointError, Fault, StorageError
from .files import comes_into_sight, publish
from .manifest import Damaged, seal, verify, versions
from .ranks import on_every_rank, on_rank_zero
from .resume import FINAL, Candidates, Start, find_checkpoints, step_of

ASIDE = "aside"
LOCK = ".lock"
RESUME = {None: "auto", "true": True, "false": False}  # values of resume_from_checkpoint, and what they mean


class RunFolder:
    """An output folder, locked by one run until its `with` block ends. Methods run on rank 0 alone, which holds the
    lock, unless they say otherwise.

    Args:
        path: the folder, made if it does not exist.
        identity: what decides the run's numbers (component.train.identity). The same identity is the same run.
        renew: turns an identity that an earlier version wrote into the one that this version would have written.
    """

    def __init__(self, path: str | Path, identity: dict, renew: Callable[[dict], dict] = dict):
        self.path = resolve(path)
        self.identity, self.renew = identity, renew
        self.plan: dict | None = None
        self.run_id = uuid4().hex  # for manifests; a run that goes on keeps it, even with other settings
        self.origin: str | None = None  # name of the checkpoint that resume_from_checkpoint asked for, now or earlier
        self.lock = FileLock(self.path / LOCK)
        self.held: os.stat_result | None = None
        self.made: list[Path] = []  # the lock and the folders that this run has made, deepest first

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        if self.held and any(error):  # a run that was refused leaves no lock and no empty folder
            for path in self.made:
                with suppress(OSError):  # unless the folder is not empty
                    path.rmdir() if path.is_dir() else path.unlink()
        self.lock.release()

    def open(self, resume: str | bool | None = None, overwrite: bool = False, despite_changes: bool = False) -> Start:
        """Lock the folder, find out where to begin, move aside what is broken, and delete what a killed save left.

        Args:
            resume: where to begin. "auto" or None: at the newest checkpoint that verifies, if there is any. True: the
                same, but there must be one. False: at the base model, and the folder must hold no run. A checkpoint's
                path or name: there; if the same command is started again, the run goes on from its newest checkpoint.
            overwrite: move the folder aside and begin anew if it holds another run or one that is done, or any run if
                `resume` is False.
            despite_changes: continue a run of another identity, or from a given checkpoint that is damaged.

        Raises:
            CheckpointError: another process has locked the folder, it holds another run, or there is nothing to
                continue from.
            StorageError: the folder cannot be written to, or no checkpoint in it verifies.
        """
        if not self.held:
            self.acquire()
        start = self.take_start(RESUME.get(resume, resume), overwrite, despite_changes)
        for path in self.path.glob(".tmp-*"):
            published = path.with_name(path.name.removeprefix(".tmp-"))
            if published.name == FINAL or step_of(published) >= 0:
                remove(path)
        return start

    def take_start(self, resume: str | bool, overwrite: bool = False, despite_changes: bool = False) -> Start:
        """Decide where to begin, and only then move what is in the way."""
        decision = Candidates(self.path, self.identity, self.renew).decide(resume, overwrite, despite_changes)
        if decision.information:
            logger.info(decision.information)
        if decision.warning:
            logger.warning(decision.warning)
        if decision.leaves_folder:
            self.move_away()
        for path, reason in decision.aside.items():
            self.set_aside(path, reason)
        self.run_id, self.origin = decision.run_id or self.run_id, decision.origin
        return decision.start

    def acquire(self) -> None:
        """Make the folder, lock it for this process, and check that it can be written to."""
        self.made = [path for path in (self.path / LOCK, self.path, *self.path.parents) if not os.path.exists(path)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.held = os.stat(self.lock.lock_file)
            TemporaryFile(dir=self.path).close()
        except Timeout:
            raise CheckpointError(
                f"{self.path}: another run is writing here; wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise StorageError(f"output_dir {self.path} cannot be written to ({error}); choose another") from None

    def check_shared(self) -> None:
        """Check, on all ranks together, that each of them finds the folder that rank 0 has locked, and can write there.

        Raises:
            ArgumentError: a rank finds another folder of this name, or none.
            StorageError: a rank cannot write to it.
        """
        if not dist.is_initialized():
            return
        host, mark = on_rank_zero(self.leave_mark)
        try:
            on_every_rank(lambda: self.write_beside(mark, host))
        finally:
            on_rank_zero(lambda: mark.unlink(missing_ok=True))

    def leave_mark(self) -> tuple[str, Path]:
        """Make a file by which ranks recognise the folder. Returns the name of this machine, and the file's path."""
        mark = self.path / f".shared-{uuid4().hex}"
        mark.touch()
        return socket.gethostname(), mark

    def write_beside(self, mark: Path, host: str) -> None:
        if not comes_into_sight(self.path / mark.name):
            raise ArgumentError(
                f"output_dir {self.path} is not the folder that rank 0 on {host} writes to; give a folder that all "
                "machines share, such as one on NFS (docs/several_machines.md)"
            )
        try:
            TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise StorageError(f"output_dir {self.path} cannot be written to ({error}); choose another") from None

    def check_lock(self) -> None:
        """Raise StorageError if the lock file was removed or replaced: another run may then have taken the folder."""
        try:
            if self.held is None or os.path.samestat(self.held, os.stat(self.lock.lock_file)):
                return
        except OSError:
            pass
        raise StorageError(
            f"{self.path} or its .lock was removed while this run worked, and may be another's by now; nothing more is "
            "written there"
        )

    def move_away(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.{datetime.now():%Y%m%d-%H%M%S}")
        move(self.path, aside)
        self.lock.release(force=True)
        logger.info(f"moved the earlier run to {aside}")
        self.acquire()

    def set_aside(self, path: Path, reason: str) -> None:
        target = self.path / ASIDE / f"{path.name}.{datetime.now():%Y%m%d-%H%M%S-%f}"
        move(path, target)
        logger.warning(f"{path.name}: {reason}; moved to {target}")

    def begin(self, name: str) -> Path:
        """Make an empty temporary folder for what `finish` will publish under `name`."""
        self.check_lock()
        self.made = []
        folder = self.path / f".tmp-{name}"
        remove(folder)
        folder.mkdir()
        return folder

    def describe(self, name: str, step: int, world_size: int) -> dict:
        """What the manifest of the folder `name` says beside its files."""
        facts = {"name": name, "step": step, "run_id": self.run_id, "origin": self.origin, "world_size": world_size}
        return facts | {"plan": self.plan, "run": self.identity, "versions": versions()}

    def finish(self, name: str, facts: dict) -> Path:
        """Seal the temporary folder with a manifest and rename it to `name`, which is thus whole from the first.

        Args:
            facts: those of `describe`, and more.
        """
        folder, target = self.path / f".tmp-{name}", self.path / name
        self.check_lock()
        seal(folder, facts)
        publish(folder, target)
        return target

    def rotate(self, limit: int | None, keep: Iterable[Path] = ()) -> None:
        """Delete this run's checkpoints except for the newest `limit`, at least two, and those in `keep`."""
        if not limit:
            return
        own = [path for path in find_checkpoints(self.path) if self.is_own(path)]
        for path in own[: -max(limit, 2)]:
            if path not in keep:
                doomed = self.path / f".tmp-{path.name}"
                try:
                    path.rename(doomed)  # so that there is never half a checkpoint under its name
                    remove(doomed)
                except OSError as error:
                    logger.warning(f"{path} could not be deleted ({error})")

    def is_own(self, checkpoint: Path) -> bool:
        try:
            return verify(checkpoint, checkpoint.name, deep=False).get("run_id") == self.run_id
        except Damaged:
            return False

    def check_room(self, checkpoint_size: int) -> None:
        """Raise StorageError unless the disk has room for two more checkpoints of this many bytes: one is written
        while the other stays."""
        free = shutil.disk_usage(self.path).free
        if free < 2 * checkpoint_size:
            raise StorageError(
                f"output_dir {self.path}: two checkpoints need {show_size(2 * checkpoint_size)}, and "
                f"{show_size(free)} are free; make room, or choose another output_dir"
            )

    def failed(self, name: str, error: Exception) -> StorageError:
        """Remove what a failed save left. Returns an error that says why it failed, and how much there was room for."""
        folder = self.path / f".tmp-{name}"
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        shutil.rmtree(folder, ignore_errors=True)
        whole = [path.name for path in find_checkpoints(self.path)]
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        limited = "" if limit == resource.RLIM_INFINITY else f", a file may have {show_size(limit)} (ulimit -f)"
        kept = (
            f"{whole[-1]} is untouched: then the same command continues from it" if whole else "Nothing was kept before"
        )
        return StorageError(
            f"{self.path / name} could not be written beyond {show_size(written)} ({type(error).__name__}: {error}); "
            f"{show_size(shutil.disk_usage(self.path).free)} are free{limited}. Make room for it. {kept}"
        )


def foresee_start(
    path: str | Path,
    describe: Callable[[], dict],
    renew: Callable[[dict], dict],
    resume: str | bool | None,
    overwrite: bool,
    despite_changes: bool,
) -> str:
    """Say what a run in this folder would do first. Nothing is made, moved or locked.

    Args:
        describe: makes the run's identity; called only if the folder exists.
        renew, resume, overwrite, despite_changes: as for RunFolder and its `open`.
    """
    path = resolve(path)
    there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"would be refused: output_dir {path} cannot be written to; choose another"
    if is_locked(path / LOCK):
        return f"would be refused now: another run is writing to {path}"
    try:
        candidates = Candidates(path, describe() if path.exists() else {}, renew)
        decision = candidates.decide(RESUME.get(resume, resume), overwrite, despite_changes)
    except Fault as fault:
        return f"would be refused: {fault}"
    if decision.start.is_done:
        return f"would do nothing: it is done, {path / FINAL}; overwrite_output_dir=true begins it anew"
    if decision.leaves_folder:
        return f"would move {path} aside and begin there anew"
    if not decision.start.checkpoint:
        return f"would begin in {path}"
    aside = "".join(f"; {name.name} would be moved aside: {reason}" for name, reason in decision.aside.items())
    return f"would go on from {decision.start.checkpoint}{aside}" + f"\n{decision.warning}" * bool(decision.warning)


def resolve(path: str | Path) -> Path:
    """The absolute path of an output folder. Raises StorageError for a name that no folder can have."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null character
        raise StorageError(f"output_dir {str(path)!r} cannot be a folder ({error}); choose another") from None


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds a lock. The lock itself is not touched."""
    try:
        inode = lock.stat().st_ino
        return bool(re.search(rf":{inode} ", Path("/proc/locks").read_text()))
    except OSError:
        return False


def move(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    except OSError as error:
        raise StorageError(f"{path} cannot be moved to {target} ({error}); choose another output_dir") from None


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def show_size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
