"""What tests of whole runs share: rows, and what is read off an output folder."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import benchmark.runs
from benchmark.runs import logged, make_rows, write_rows  # noqa: F401
from component.run.resume import find_checkpoints
from component.train.trainer import LoRATrainer

ROWS = make_rows(12)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference of the final adapters of two runs."""
    return benchmark.runs.largest_difference(adapter(one / "final"), adapter(other / "final"))


def figures(folder: Path) -> list[dict]:
    """What was logged, but for times, and for the loss of what one start trained."""
    return [{key: value for key, value in entry.items() if "train_" not in key} for entry in history(folder)]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def optimizer_state(folder: Path) -> dict:
    """Of the last checkpoint."""
    return torch.load(find_checkpoints(folder)[-1] / "optimizer.pt", weights_only=True)["state"]


def assert_same_run(one: Path, other: Path) -> None:
    assert largest_difference(one, other) == 0
    assert figures(one) == figures(other)
    torch.testing.assert_close(optimizer_state(one), optimizer_state(other), rtol=0, atol=0)


@contextmanager
def at_call(n: int, owner: object, name: str, action: Callable) -> Iterator[None]:
    """Within the block, the n-th call of a function begins with `action(its first argument)`."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == n:
            action(args[0])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


def send(signum: int) -> Callable:
    return lambda _: os.kill(os.getpid(), signum)


def overflow(trainer: LoRATrainer) -> None:
    """An infinity in one gradient of the adapter."""
    next(trainer.trained_weights()).grad.fill_(torch.inf)
