"""Which checkpoints a folder holds, and where a run goes on from."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

FINAL = "final"
SHAPES = tuple(
    f"settings.{key}: " for key in ("lora_rank", "target_modules", "optim", "lr_scheduler_type")
)  # of what is kept: never other
LAYOUT = tuple(f"settings.{key}: " for key in ("pack_to", "max_seq_length", "activation_checkpointing"))
DIGEST = re.compile("[0-9a-f]{32}")
NEEDED = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")  # to continue at all


@dataclass
class Start:
    """Where a run begins: at `checkpoint` with the layout of rows (`plan`) that it had, or at the base model."""

    checkpoint: str | None = None
    plan: dict | None = None
    is_done: bool = False


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    return sorted((path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d{1,15})", checkpoint.name)
    return int(match[1]) if match else -1


def differences(was: dict, now: dict, prefix: str = "") -> list[str]:
    """A line for each key that both nested objects of JSON values have, with other values. A key that one version of a
    library knows and another does not is no difference."""
    lines = []
    for key in sorted(was.keys() & now.keys()):
        old, new = was[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict) and not prefix:
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = " then, ".join(map(json.dumps, (old, new))) + " now"
            lines.append(f"{prefix}{key}: {'contents have changed' if DIGEST.fullmatch(str(old)) else shown}")
    return lines
