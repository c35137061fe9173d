"""A run is the same on any number of processes: its losses, gradients, learning rates, adapters and evaluations."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from component.run.files import make_once

from ...runs import ROWS, largest_difference, losses, write_rows
from .ranks import EVAL_ROWS, LOGGED, Configuration, make_trainer, write_configurations

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-5  # between float32 sums of another order
# An update's samples, as (processes, per_device_train_batch_size, gradient_accumulation_steps).
FOUR = ((1, 4, 1), (2, 2, 1), (4, 1, 1))
FOUR_IN_PARTS = ((1, 1, 4), (2, 1, 2), (4, 1, 1))
SIX = ((1, 6, 1), (2, 1, 3), (3, 1, 2))
TWELVE = ((1, 12, 1), (2, 6, 1), (3, 4, 1), (4, 3, 1))
TWELVE_IN_PARTS = ((1, 6, 2), (2, 2, 3), (3, 2, 2), (4, 1, 3))
STEPS_OF_FOUR = ((1, 4, 3), (2, 2, 3), (4, 1, 3))
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
DROP_LAST = {"dataloader_drop_last": True}
FROZEN = {"learning_rate": 0.0}
COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 2}

DIVIDING = [
    Configuration(4, FOUR, "padded", epochs=2),
    Configuration(12, FOUR, "packed"),
    Configuration(8, FOUR_IN_PARTS, "packed", epochs=2.5, settings=BY_LENGTH),
    Configuration(12, SIX, "padded", settings=COSINE),
    Configuration(24, TWELVE, "packed"),
    Configuration(36, TWELVE_IN_PARTS, "padded"),
    Configuration(26, STEPS_OF_FOUR, "packed", epochs=2, settings=DROP_LAST),  # which leaves 24
    Configuration(27, STEPS_OF_FOUR, "padded", settings=DROP_LAST),
]
OTHERS = [
    Configuration(1, TWELVE, "packed"),
    Configuration(1, FOUR_IN_PARTS, "padded"),
    Configuration(2, TWELVE_IN_PARTS, "packed", epochs=2),
    Configuration(3, FOUR, "packed", epochs=2),
    Configuration(5, FOUR, "padded", epochs=2),  # of the second update, three of four ranks have nothing
    Configuration(5, FOUR, "packed", epochs=2.5),
    Configuration(7, SIX, "packed", settings=COSINE),
    Configuration(7, TWELVE, "padded", settings=FROZEN),
    Configuration(13, FOUR, "padded"),
    Configuration(13, FOUR_IN_PARTS, "packed", epochs=2.5),
    Configuration(13, TWELVE_IN_PARTS, "padded", epochs=2),
    Configuration(23, TWELVE_IN_PARTS, "packed", settings=BY_LENGTH),
    Configuration(38, TWELVE, "padded", settings=BY_LENGTH),
]
ONE_UPDATE_OF_ALL = OTHERS[7]
ALIKE = [
    Configuration(6, ((2, 1, 1),), layout, dropout=0.5, alike=True, settings=FROZEN) for layout in ("padded", "packed")
]
RUNS = DIVIDING + OTHERS + ALIKE


def train(runs: list[Configuration], folder: Path) -> None:
    """Leave in `folder` what every process of every run saw, and its log."""
    write_configurations(runs, folder)
    start(folder)


def start(folder: Path, *commands: str) -> list[int]:
    """The exit codes that ranks.py prints."""
    command = [sys.executable, "-m", "tests.component.train.ranks", str(folder), *commands]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=1800)
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of all RUNS, which are made once for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return make_once(base / "ranks", lambda folder: train(RUNS, folder))


def seen_by(folder: Path, number: int, processes: int, rank: int) -> dict:
    """What this process saw of the run of this number, or the group's logs if it did not come to its end."""
    path = folder / f"{number}-{processes}-{rank}.pt"
    if not path.exists():
        pytest.fail(f"process {rank} of {processes} did not end the run\n{logs(folder, processes)}")
    return torch.load(path)


def logs(folder: Path, processes: int) -> str:
    return "\n\n".join(path.read_text()[-2000:] for path in sorted(folder.glob(f"{processes}-*.log")))


def figures(seen: dict) -> dict[str, torch.Tensor]:
    """Every figure of a run, in the order in which it came."""
    logged = {key: torch.tensor([entry[key] for entry in seen["logged"] if key in entry]) for key in LOGGED}
    return logged | {"adapter": torch.stack(seen["adapters"])}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() if one.shape == other.shape else math.inf


def differences(folder: Path, number: int, run: Configuration) -> dict[str, float]:
    """Figures that are not the same in one process and in every process of several, with their largest difference."""
    alone = figures(seen_by(folder, number, 1, 0))
    others = [
        figures(seen_by(folder, number, processes, rank))
        for processes, _, _ in run.splits
        if processes > 1
        for rank in range(processes)
    ]
    largest = {key: max(difference(alone[key], other[key]) for other in others) for key in alone}
    return {key: value for key, value in largest.items() if value > TOLERANCE}


def name(run: Configuration) -> str:
    _, batch, accumulation = run.splits[0]
    parts = [f"{run.rows} rows by {batch} x {accumulation}", run.layout, f"{run.epochs} epochs"]
    return ", ".join([*parts, *(f"{key}={value}" for key, value in (run.settings or {}).items())])


@pytest.mark.parametrize("number", range(len(DIVIDING + OTHERS)), ids=lambda number: name(RUNS[number]))
def test_any_number_of_processes_trains_as_one_does(trained, number):
    assert differences(trained, number, RUNS[number]) == {}


@pytest.mark.parametrize("number", range(len(DIVIDING + OTHERS)), ids=lambda number: name(RUNS[number]))
def test_every_epoch_ends_with_an_update_of_what_is_left(trained, number):
    run = RUNS[number]
    _, batch, accumulation = run.splits[0]
    batches = run.rows // batch if run.settings == DROP_LAST else math.ceil(run.rows / batch)
    updates = math.ceil(run.epochs * math.ceil(batches / accumulation))
    for processes, _, _ in run.splits:
        assert len(seen_by(trained, number, processes, 0)["adapters"]) == updates, processes


def test_an_update_of_all_rows_has_the_loss_of_their_evaluation(trained):
    assert ONE_UPDATE_OF_ALL.rows == EVAL_ROWS
    for processes, _, _ in ONE_UPDATE_OF_ALL.splits:
        seen = figures(seen_by(trained, RUNS.index(ONE_UPDATE_OF_ALL), processes, 0))
        assert difference(seen["loss"], seen["eval_loss"]) <= TOLERANCE, processes


@pytest.mark.parametrize("run", ALIKE, ids=lambda run: run.layout)
def test_ranks_that_have_the_same_sample_draw_different_dropouts(trained, run):
    """Every sample is the same here, so that only dropout makes one forward pass another."""
    first, second = (seen_by(trained, RUNS.index(run), 2, rank)["outputs"] for rank in range(2))
    assert len(first) == len(second) == run.rows // 2
    assert len({*first, *second}) == run.rows


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_that_were_stopped_draw_the_dropouts_of_a_whole_run(job, tmp_path, packing):
    """Stopped in the second of three updates of an epoch, by a signal that came after the first."""
    job(dry_run=True, rows=ROWS[:11], packing=packing, lora_dropout=0.1, max_steps=7, preprocessing_workers=1)
    settings = json.loads((tmp_path / "run.json").read_text()) | {"per_device_train_batch_size": 2}
    for run in ("whole", "stopped"):
        (tmp_path / f"{run}.json").write_text(json.dumps(settings | {"output_dir": str(tmp_path / run)}))
    exit_codes = start(tmp_path, "whole.json", "stopped.json:1", "stopped.json")
    assert exit_codes == [0, 143, 0], logs(tmp_path, 2)
    assert (tmp_path / "stopped/checkpoint-2").is_dir()
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    assert largest_difference(tmp_path / "whole", tmp_path / "stopped") == 0


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_number_of_processes_does_what_was_due(job, tmp_path):
    """From the last step of an epoch, whose loss is not logged yet and whose evaluation is still to come."""
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch", "logging_steps": 2, "max_steps": 6}
    settings |= {"eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS[:5])), "preprocessing_workers": 1}
    one = job("one", **settings)
    ours = json.loads((tmp_path / "one.json").read_text()) | {"per_device_train_batch_size": 2}
    (tmp_path / "two.json").write_text(json.dumps(ours | {"output_dir": str(tmp_path / "two")}))
    changed = ours | {"output_dir": str(tmp_path / "more"), "resume_despite_changes": True}
    (tmp_path / "more.json").write_text(json.dumps(changed))
    back_to_step_3(one, tmp_path / "more")
    assert start(tmp_path, "two.json", "more.json") == [0, 0], logs(tmp_path, 2)
    back_to_step_3(tmp_path / "two", tmp_path / "fewer")
    job("fewer", **settings, resume_despite_changes=True)
    for run in ("two", "more", "fewer"):
        assert what_was_logged(tmp_path / run) == [
            pytest.approx(entry, abs=TOLERANCE) for entry in what_was_logged(one)
        ], run


def back_to_step_3(run: Path, folder: Path) -> None:
    shutil.copytree(run, folder)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(folder / name)


def what_was_logged(folder: Path) -> list[dict]:
    """The losses of a run, in order."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "eval_loss", "num_tokens")
    return [{key: entry[key] for key in kept if key in entry} for entry in history if "train_loss" not in entry]


def test_a_trainer_that_trains_again_begins_anew(tmp_path):
    trainer = make_trainer(Configuration(8, FOUR, "packed"), 4, 1, tmp_path, TrainerCallback())
    weights = [[weight.clone() for weight in trainer.trained_weights()] for _ in range(2) if trainer.train()]
    assert not all(map(torch.equal, *weights))
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry] == [0.1, 0.05]


def draw_run(draw: random.Random) -> Configuration:
    """A run of 1 to 40 rows, its update split in any way that gives each number of processes the same samples."""
    update = draw.choice([2, 3, 4, 6, 8, 12, 24])
    splits = []
    for processes in range(1, 5):
        if update % processes == 0:
            share = update // processes
            batch = draw.choice([size for size in range(1, share + 1) if share % size == 0])
            splits.append((processes, batch, share // batch))
    return Configuration(
        draw.randint(1, 40),
        tuple(splits),
        draw.choice(["padded", "packed"]),
        epochs=draw.choice([1, 2, 2.5]),
        settings=draw.choice([{}, BY_LENGTH, COSINE]),
    )


@pytest.mark.slow
def test_any_number_of_processes_trains_as_one_does_whatever_the_rows(tmp_path):
    draw = random.Random(0)
    runs = [draw_run(draw) for _ in range(150)]
    train(runs, tmp_path)
    found = {f"{name(run)}, {run.splits}": differences(tmp_path, number, run) for number, run in enumerate(runs)}
    differing = [f"{run}: {each}" for run, each in found.items() if each]
    assert len(differing) == 0, "\n".join(differing)
