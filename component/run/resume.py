"""Decides where a run begins, by what its folder holds. Nothing is moved or changed here."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .errors import CheckpointError, Fault, StorageError
from .manifest import MANIFEST, NOT_THERE, ON_CARDS, Damaged, verify, versions

FINAL = "final"
UNCHANGEABLE = ("lora_rank", "target_modules", "optim", "lr_scheduler_type")  # they shape what a checkpoint holds
# If one of these settings has changed, rows are laid out anew.
LAYOUT = ("packing", "packing_length", "fused_layers", "max_seq_length", "activation_checkpointing", "base_bits")
LAYOUT += ("per_device_train_batch_size", "gradient_accumulation_steps", "number of processes")  # which bound a row
# Files that even a damaged checkpoint must have, to be continued on request.
NEEDED = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")


@dataclass(frozen=True)
class Start:
    """Where a run begins: at `checkpoint`, with the layout of rows (`plan`) it was made with, or at the base model."""

    checkpoint: str | None = None
    plan: dict | None = None
    is_done: bool = False  # the final adapter is there, so nothing is left to do


@dataclass(frozen=True)
class Decision:
    """Where a run begins, and what has to be done in its folder before."""

    start: Start
    run_id: str | None = None  # of the run that goes on, if one does
    origin: str | None = None  # name of the checkpoint that resume_from_checkpoint asked for, now or earlier
    leaves_folder: bool = False  # the whole folder is moved away, with the run that it holds
    aside: dict[Path, str] = field(default_factory=dict)  # what is moved aside within the folder, and why
    warning: str = ""  # why the result may differ from that of a run without interruption
    information: str = ""


@dataclass(frozen=True)
class Candidates:
    """The checkpoints and the final adapter of a folder, from which a run of this identity may continue. Nothing here
    changes a file.

    Args:
        renew: turns an identity that an earlier version wrote into the one that this version would have written.
    """

    folder: Path
    identity: dict
    renew: Callable[[dict], dict]

    def decide(self, resume: str | bool, overwrite: bool, despite_changes: bool) -> Decision:
        """Choose between going on and beginning anew. Arguments and errors are those of RunFolder.open."""
        held = [*find_checkpoints(self.folder), *self.finals()]
        if held and overwrite and (resume is False or (resume == "auto" and self.is_to_be_left(despite_changes))):
            return Decision(Start(), leaves_folder=True)
        if held and resume is False:
            raise CheckpointError(
                f"{self.folder} holds a run already ({', '.join(path.name for path in held)}): continue it by leaving "
                "resume_from_checkpoint out, choose another output_dir, or set overwrite_output_dir=true, which moves "
                "it aside"
            )
        if held:
            return self.decide_among(resume, despite_changes)
        if resume not in ("auto", False):
            raise CheckpointError(
                f"resume_from_checkpoint is {json.dumps(resume, ensure_ascii=False)}, but {self.folder} holds no "
                "checkpoint; start without it"
            )
        return Decision(Start())

    def is_to_be_left(self, despite_changes: bool) -> bool:
        try:
            return self.decide_among("auto", despite_changes).start.is_done
        except Fault:
            return True

    def decide_among(self, resume: str | bool, despite_changes: bool) -> Decision:
        """Choose the checkpoint that this run goes on from, in a folder that holds a run."""
        given = None if resume in ("auto", True) else resume
        folders = [*self.finals(), *reversed(find_checkpoints(self.folder))]
        origin, information = None, ""
        if given and any(self.went_on_from(given, folder) for folder in folders):
            information = f"this run went on from {given} before, and goes on from its newest checkpoint now"
        elif given:
            folders = [self.checkpoint_named(given)]
            origin = folders[0].name
        chosen, manifest, changes, broken = self.first_whole(folders, despite_changes)
        if chosen is None:
            if not given or not despite_changes or len(folders) > 1:
                raise self.nothing_verifies(broken)
            chosen, changes = folders[0], [broken.pop(folders[0])]
            if missing := [name for name in NEEDED if not (chosen / name).is_file()]:
                raise StorageError(f"{chosen / missing[0]} is missing; nothing can go on from there")
        elif chosen.name == FINAL and not changes:
            return Decision(Start(is_done=True), information=information)
        aside = {
            path: broken.get(path, f"the run goes on from {chosen.name}")
            for path in [*self.finals(), *find_checkpoints(self.folder)]
            if path in broken or path.name == FINAL or step_of(path) > step_of(chosen)
        }
        return Decision(
            start=Start(str(chosen), None if concern(changes, LAYOUT) else manifest.get("plan")),
            run_id=manifest.get("run_id"),
            origin=origin or manifest.get("origin"),
            aside=aside,
            warning=describe_inexactness(chosen, manifest, changes),
            information=information,
        )

    def first_whole(
        self, folders: list[Path], despite_changes: bool
    ) -> tuple[Path | None, dict, list[str], dict[Path, str]]:
        """Find the first of `folders` that verifies: a checkpoint, or the final adapter of this very run.

        Returns:
            (the folder, its manifest, what has changed since, what is wrong with each folder before it). If none
            verifies, the first is None, the next two are empty.

        Raises:
            CheckpointError: the first that verifies belongs to a run that may not be continued.
        """
        broken: dict[Path, str] = {}
        for folder in folders:
            try:
                manifest = verify(folder, folder.name)
            except Damaged as damage:
                broken[folder] = str(damage)
                continue
            changes = self.changes_since(manifest)
            if changes and (not despite_changes or concern(changes, UNCHANGEABLE)):
                raise CheckpointError(self.describe_changes(folder, changes))
            if folder.name != FINAL or not changes:
                return folder, manifest, changes, broken
        return None, {}, [], broken

    def finals(self) -> list[Path]:
        """The path named FINAL, in a list, or an empty list if there is none. A link that leads nowhere counts."""
        return [path for path in (self.folder / FINAL,) if path.is_symlink() or path.exists()]

    def went_on_from(self, given: str, folder: Path) -> bool:
        """Whether `folder` belongs to this very run, and the run has gone on from the checkpoint `given` before."""
        try:
            manifest = verify(folder, folder.name, deep=False)
        except Damaged:
            return False
        if self.changes_since(manifest) or not manifest.get("origin"):
            return False
        return self.locate(given) == self.folder / manifest["origin"]

    def changes_since(self, manifest: dict) -> list[str]:
        return differences(self.renew(manifest["run"]), self.identity)

    def locate(self, given: str) -> Path:
        """The path of a checkpoint that is given by its name in this folder, or by a path."""
        return self.folder / given if given == Path(given).name else Path(given).expanduser().resolve()

    def checkpoint_named(self, given: str) -> Path:
        checkpoint, known = self.locate(given), find_checkpoints(self.folder)
        if checkpoint not in known:
            raise CheckpointError(
                f"resume_from_checkpoint={given!r} is not a checkpoint of output_dir {self.folder} (there: "
                f"{', '.join(found.name for found in known) or 'none'}); a run continues in its own folder, and no "
                "other folder's optimizer state is opened"
            )
        return checkpoint

    def describe_changes(self, folder: Path, changes: list[str]) -> str:
        ways = [
            "to continue that run: set these as they were",
            "to keep that run and begin another: choose another output_dir",
            "to begin anew here: overwrite_output_dir=true, which moves that run aside",
        ]
        if find_checkpoints(self.folder) and not concern(changes, UNCHANGEABLE):
            ways.append("to continue that run as it is set now: resume_despite_changes=true")
        elif find_checkpoints(self.folder):
            ways.append(f"(no run can be continued with another {', '.join(UNCHANGEABLE[:-1])} or {UNCHANGEABLE[-1]})")
        return "\n  ".join([f"{folder} belongs to another run; what differs:", *changes, *ways])

    def nothing_verifies(self, broken: dict[Path, str]) -> Fault:
        if not broken:
            return CheckpointError(
                f"{self.folder} holds {FINAL} alone, and no checkpoint to go on from; choose another output_dir"
            )
        lines = [f"{self.folder}: nothing to continue from:", *(f"{p.name}: {d}" for p, d in broken.items())]
        found = "\n  ".join(lines)
        remedy = "overwrite_output_dir=true moves the folder aside and begins anew"
        if any((path / MANIFEST).exists() for path in broken):
            return StorageError(
                f"{found}\n{remedy}; resume_despite_changes=true with resume_from_checkpoint=FOLDER goes on from what "
                "is left of one, which is not exact"
            )
        return CheckpointError(f"{found}\nNone is a checkpoint of this program. Choose another output_dir; {remedy}")


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    return sorted((path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d{1,15})", checkpoint.name)
    return int(match[1]) if match else -1


KNOWN_AS = {  # part of an identity: its name in messages
    "adapter": "adapter_name_or_path",
    "base_model": "model_name_or_path, weights or config.json",
    "data": "train_file",
    "format.name": "data_format",
    "format.tokenizer": "model_name_or_path, tokenizer",
    "world_size": "number of processes",
}


def differences(was: dict, now: dict, prefix: str = "") -> list[str]:
    """Compare two nested JSON objects: a line for each key whose values differ, with the name of its setting.

    A key that only one of them has is no difference, as another version of a library may not know it.
    """
    lines = []
    for key in sorted(was.keys() & now.keys()):
        old, new, path = was[key], now[key], f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict) and not prefix:
            lines += differences(old, new, f"{key}.")
        elif old != new:
            shown = " then, ".join(map(json.dumps, (old, new))) + " now"
            name = KNOWN_AS.get(path, path.removeprefix("settings."))
            lines.append(f"{name}: {'contents have changed' if is_digest(old) else shown}")
    return lines


def is_digest(value) -> bool:
    """Whether a value holds a digest of contents, which says nothing to a reader."""
    return bool(re.search(r"\b[0-9a-f]{32}\b", json.dumps(value)))


def concern(changes: list[str], settings: tuple[str, ...]) -> bool:
    """Whether one of these lines of `differences` is about one of these settings."""
    return any(line.startswith(f"{key}: ") for line in changes for key in settings)


def describe_inexactness(folder: Path, manifest: dict, changes: list[str]) -> str:
    """Say what has changed since the checkpoint was written, so that going on is not exact. Empty if nothing has."""
    was, now = manifest.get("versions", {}), versions()
    if now.get("triton", NOT_THERE) != NOT_THERE:  # attention and AdamW have changed since runs did not note them
        was = dict.fromkeys(ON_CARDS, "not noted") | was
    changes = changes + differences(was, now)
    return "\n  ".join([f"going on from {folder.name} is not exact:", *changes]) if changes else ""
