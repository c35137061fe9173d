"""The folder of a run: who may write there, where the run continues from, and checkpoints that are whole or absent."""

import os
import resource
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from filelock import FileLock, Timeout
from loguru import logger

from .files import sync
from .manifest import MANIFEST, Damaged, seal, verify, versions
from .resume import FINAL, LAYOUT, NEEDED, SHAPES, Start, differences, find_checkpoints, step_of

ASIDE = "aside"


class CheckpointError(ValueError):
    """What is to be resumed is not this run, or its folder is somebody else's."""


class StorageError(ValueError):
    """The output folder cannot be written to or read from as a run needs it."""


class RunFolder:
    """An output folder, held by one run until it is left. All is done on rank 0, where the folder was opened.

    Args:
        path: the folder, made if it is not there.
        identity: what decides the run's numbers (component.train.identity); the same identity is the same run.
    """

    def __init__(self, path: str | Path, identity: dict):
        self.path = Path(path).resolve()
        self.identity = identity
        self.plan: dict | None = None
        self.run_id = uuid4().hex  # of the manifests; a run that goes on keeps it, also as another one
        self.origin: str | None = None  # the checkpoint that the run was told to go on from
        self.lock = FileLock(self.path / ".lock")
        self.held: os.stat_result | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()

    def open(self, resume: str | bool | None = None, overwrite: bool = False, despite_changes: bool = False) -> Start:
        """Lock the folder, move aside what is broken, clear what a killed save left, and find where to begin.

        Args:
            resume: "auto" or None, the newest checkpoint that verifies, if any; True, the same, and there must be one;
                False, none, and the folder must hold no run; or a checkpoint's path or name. Given once more, it is
                the same run, which goes on from its newest.
            overwrite: move a folder aside that holds another run, or one that is done, and begin anew; with `resume`
                False any.
            despite_changes: continue a run of another identity, or from a given checkpoint that is damaged.

        Raises:
            CheckpointError: another process holds the folder, it is another run's, or has nothing to continue from.
            StorageError: it cannot be written to, or no checkpoint in it verifies.
        """
        resume = {None: "auto", "true": True, "false": False}.get(resume, resume)
        self.take()
        start = self.choose(resume, overwrite, despite_changes)
        for path in self.path.glob(".tmp-*"):
            published = path.with_name(path.name.removeprefix(".tmp-"))
            if published.name == FINAL or step_of(published) >= 0:
                remove(path)
        return start

    def choose(self, resume: str | bool, overwrite: bool, despite_changes: bool) -> Start:
        """Between what the folder holds, nothing, and an error."""
        held = [*find_checkpoints(self.path), *self.finals()]
        if held and overwrite and (resume is False or (resume == "auto" and self.is_to_be_left(despite_changes))):
            self.move_away()
        elif held and resume is False:
            raise CheckpointError(
                f"{self.path} holds a run already ({', '.join(path.name for path in held)}): continue it by leaving "
                "resume_from_checkpoint out, choose another output_dir, or set overwrite_output_dir=true, which moves "
                "it aside"
            )
        elif held:
            return self.find_start(resume, despite_changes)
        if resume not in ("auto", False):
            raise CheckpointError(
                f"resume_from_checkpoint is {str(resume).lower()}, but {self.path} holds no checkpoint; start without "
                "it"
            )
        return Start()

    def take(self) -> None:
        """Make the folder, see that it can be written to, and lock it for the life of this process."""
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

    def check_lock(self) -> None:
        """Raise StorageError if the lock is no more what was locked: who finds none may take the folder."""
        try:
            if self.held is None or os.path.samestat(self.held, os.stat(self.lock.lock_file)):
                return
        except OSError:
            pass
        raise StorageError(
            f"{self.path} or its .lock was removed while this run worked, and may be another's by now; nothing more is "
            "written there"
        )

    def is_to_be_left(self, despite_changes: bool) -> bool:
        try:
            return self.find_start("auto", despite_changes).is_done
        except (CheckpointError, StorageError):
            return True

    def move_away(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.{datetime.now():%Y%m%d-%H%M%S}")
        move(self.path, aside)
        self.lock.release(force=True)
        self.run_id, self.origin = uuid4().hex, None
        logger.info(f"moved the earlier run to {aside}")
        self.take()

    def find_start(self, resume: str | bool, despite_changes: bool) -> Start:
        """Of a folder that holds a run. Nothing is moved before it is clear that this run may continue."""
        given = None if resume in ("auto", True) else resume
        folders = [*self.finals(), *reversed(find_checkpoints(self.path))]
        if given and any(self.went_on_from(given, folder) for folder in folders):
            logger.info(f"this run went on from {given} before, and goes on from its newest checkpoint now")
        elif given:
            folders = [self.given_checkpoint(given)]
            self.origin = folders[0].name
        broken: dict[Path, str] = {}
        for folder in folders:
            try:
                manifest = verify(folder, folder.name)
            except Damaged as damage:
                broken[folder] = str(damage)
                continue
            changes = differences(manifest["run"], self.identity)
            if changes and (not despite_changes or any(line.startswith(SHAPES) for line in changes)):
                raise CheckpointError(self.describe_changes(folder, changes))
            if folder.name != FINAL:
                break
            if not changes:
                return Start(is_done=True)
        else:
            if not given or not despite_changes or len(folders) > 1:
                raise self.nothing_verifies(broken)
            folder, manifest, changes = folders[0], {}, [broken.pop(folders[0])]
            if missing := [name for name in NEEDED if not (folder / name).is_file()]:
                raise StorageError(f"{folder / missing[0]} is missing; nothing can go on from there")
        self.run_id = manifest.get("run_id", self.run_id)
        self.origin = self.origin or manifest.get("origin")
        self.warn_of_changes(folder, manifest, changes)
        for path in [*self.finals(), *find_checkpoints(self.path)]:
            if path in broken or path.name == FINAL or step_of(path) > step_of(folder):
                self.set_aside(path, broken.get(path, f"the run goes on from {folder.name}"))
        keeps_layout = not any(line.startswith(LAYOUT) for line in changes)
        return Start(str(folder), manifest.get("plan") if keeps_layout else None)

    def finals(self) -> list[Path]:
        """What stands under FINAL's name, were it a link that leads nowhere."""
        return [path for path in (self.path / FINAL,) if os.path.lexists(path)]

    def went_on_from(self, given: str, folder: Path) -> bool:
        """Whether it is of this very run, which was told before to go on from the checkpoint `given`."""
        try:
            manifest = verify(folder, folder.name, deep=False)
        except Damaged:
            return False
        same = not differences(manifest["run"], self.identity)
        return same and bool(manifest.get("origin")) and self.locate(given) == self.path / manifest["origin"]

    def locate(self, given: str) -> Path:
        """A checkpoint by its name here, or by a path."""
        return self.path / given if given == Path(given).name else Path(given).expanduser().resolve()

    def given_checkpoint(self, path: str) -> Path:
        checkpoint = self.locate(path)
        if checkpoint not in find_checkpoints(self.path):
            known = ", ".join(found.name for found in find_checkpoints(self.path)) or "none"
            raise CheckpointError(
                f"resume_from_checkpoint={path!r} is not a checkpoint of output_dir {self.path} (there: {known}); a "
                "run continues in its own folder, and no other folder's optimizer state is opened"
            )
        return checkpoint

    def describe_changes(self, folder: Path, changes: list[str]) -> str:
        remedy = "\nSet these as they were, choose another output_dir, or begin anew with overwrite_output_dir=true"
        if find_checkpoints(self.path):
            remedy += (
                "; resume_despite_changes=true goes on all the same, which another lora_rank, target_modules, optim or "
                "lr_scheduler_type cannot"
            )
        return "\n  ".join([f"{folder} is of a run that is not this one:", *changes]) + remedy

    def warn_of_changes(self, folder: Path, manifest: dict, changes: list[str]) -> None:
        then, now = manifest.get("versions", {}), versions()
        changes = changes + [f"{name} {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]]
        if changes:
            logger.warning("\n  ".join([f"going on from {folder.name} is not exact:", *changes]))

    def nothing_verifies(self, broken: dict[Path, str]) -> ValueError:
        if not broken:
            return CheckpointError(
                f"{self.path} holds {FINAL} alone, and no checkpoint to go on from; choose another output_dir"
            )
        found = "\n  ".join([f"{self.path}: nothing to continue from:", *(f"{p.name}: {d}" for p, d in broken.items())])
        remedy = "overwrite_output_dir=true moves the folder aside and begins anew"
        if any((path / MANIFEST).exists() for path in broken):
            return StorageError(
                f"{found}\n{remedy}; resume_despite_changes=true with resume_from_checkpoint=FOLDER goes on from what "
                "is left of one, which is not exact"
            )
        return CheckpointError(f"{found}\nNone is a checkpoint of this program. Choose another output_dir; {remedy}")

    def set_aside(self, path: Path, reason: str) -> None:
        target = self.path / ASIDE / f"{path.name}.{datetime.now():%Y%m%d-%H%M%S-%f}"
        move(path, target)
        logger.warning(f"{path.name}: {reason}; moved to {target}")

    def begin(self, name: str) -> Path:
        """An empty temporary folder, for what `finish` publishes under `name`."""
        self.check_lock()
        folder = self.path / f".tmp-{name}"
        remove(folder)
        folder.mkdir()
        return folder

    def finish(self, name: str, step: int, world_size: int) -> Path:
        """Seal the temporary folder of `name` and rename it: from here on it is there, and whole."""
        folder, target = self.path / f".tmp-{name}", self.path / name
        self.check_lock()
        facts = {"name": name, "step": step, "run_id": self.run_id, "origin": self.origin, "world_size": world_size}
        seal(folder, facts | {"plan": self.plan, "run": self.identity, "versions": versions()})
        os.rename(folder, target)
        sync(self.path)
        return target

    def rotate(self, limit: int | None, keep: Iterable[Path] = ()) -> None:
        """Delete this run's oldest checkpoints, but never its newest two, those in `keep`, or anything else."""
        if not limit:
            return
        own = [path for path in find_checkpoints(self.path) if self.is_own(path)]
        for path in own[: -max(limit, 2)]:
            if path not in keep:
                doomed = self.path / f".tmp-{path.name}"
                try:
                    path.rename(doomed)  # never half a checkpoint under its name
                    remove(doomed)
                except OSError as error:
                    logger.warning(f"{path} could not be deleted ({error})")

    def is_own(self, checkpoint: Path) -> bool:
        try:
            return verify(checkpoint, checkpoint.name, deep=False).get("run_id") == self.run_id
        except Damaged:
            return False

    def check_room(self, checkpoint_size: int) -> None:
        """Raise StorageError unless two more checkpoints of so many bytes fit on the disk, one to be written and one to
        stay."""
        free = shutil.disk_usage(self.path).free
        if free < 2 * checkpoint_size:
            raise StorageError(
                f"output_dir {self.path}: two checkpoints need {show_size(2 * checkpoint_size)}, and "
                f"{show_size(free)} are free; make room, or choose another output_dir"
            )

    def failed(self, name: str, error: Exception) -> StorageError:
        """After a save that could not be finished: its remains are gone, and the error says what was there to write
        on."""
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


def move(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    except OSError as error:
        raise StorageError(f"{path} cannot be moved to {target} ({error}); choose another output_dir") from None


def remove(path: Path) -> None:
    """A file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def show_size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
