"""What tests of whole runs share: rows, and what is read off an output folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ROWS = [
    {"conversations": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "word " * i}]}
    for i in range(1, 13)
]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def largest_difference(one: Path, other: Path) -> float:
    first, second = adapter(one / "final"), adapter(other / "final")
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
