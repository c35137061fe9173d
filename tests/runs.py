"""What tests of whole runs share: rows, and what is read off an output folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import benchmark.runs
from benchmark.runs import logged, make_rows, write_rows  # noqa: F401

ROWS = make_rows(12)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference of the final adapters of two runs."""
    return benchmark.runs.largest_difference(adapter(one / "final"), adapter(other / "final"))
