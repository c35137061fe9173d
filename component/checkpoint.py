"""Where a run writes, and where it continues from."""

import re
from datetime import datetime
from pathlib import Path

from loguru import logger

FINAL = "final"


class CheckpointError(ValueError):
    """A fault in the output folder or in what is to be resumed."""


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    return [Path(output_dir, match[0]) for match in sorted(filter(None, found), key=lambda match: int(match[1]))]


def find_resume_point(output_dir: str | Path, resume_from_checkpoint: str | bool | None) -> str | None:
    """The checkpoint folder to continue from: the path given, the newest for True, None for a new run.

    Raises:
        CheckpointError: there is none, or it lacks what resuming needs.
    """
    if resume_from_checkpoint in (None, False, "false"):
        return None
    if resume_from_checkpoint in (True, "true"):
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            raise CheckpointError(
                f"resume_from_checkpoint is true, but {output_dir} holds no checkpoint; start without it"
            )
        path = checkpoints[-1]
    else:
        path = Path(resume_from_checkpoint)
    for name in ("adapter_model.safetensors", "trainer_state.json", "optimizer.pt"):
        if not (path / name).is_file():
            raise CheckpointError(f"resume_from_checkpoint: {path / name} is missing; choose another checkpoint")
    return str(path)


def prepare_output_dir(output_dir: str | Path, resuming: bool, overwrite: bool) -> None:
    """Make the folder of a run. A folder that holds another run is refused, or moved aside with `overwrite`.

    Raises:
        CheckpointError: it holds a run and `overwrite` is false, or it cannot be written to.
    """
    output_dir = Path(output_dir)
    held = [*find_checkpoints(output_dir), *output_dir.glob(FINAL)]
    if held and not resuming:
        if not overwrite:
            raise CheckpointError(
                f"{output_dir} holds a run already ({', '.join(path.name for path in held)}): continue it "
                "with resume_from_checkpoint=true, choose another output_dir, or set overwrite_output_dir=true, which "
                "moves it aside"
            )
        aside = output_dir.with_name(f"{output_dir.name}.{datetime.now():%Y%m%d-%H%M%S}")
        output_dir.rename(aside)
        logger.info(f"moved the earlier run to {aside}")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"output_dir {output_dir} cannot be written to ({error})") from None
