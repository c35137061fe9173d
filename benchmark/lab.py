"""Starts of the real command, with faults or without, and how the runs that come of them differ."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import benchmark.faults
from benchmark.runs import largest_difference, logged

ROOT = Path(__file__).resolve().parents[1]
PRODUCT, STOCK = "train_qlora", "benchmark.stock"  # programs: modules whose main() benchmark/faults.py calls


@dataclass
class Launch:
    """One start of a program, which may be under way still.

    Args:
        folder: its output_dir, which several starts may share.
        record_file: what benchmark/faults.py writes for each rank begins with this path.
        mark: in the environment of all its processes.
        last_step: its max_steps.
    """

    folder: Path
    log_file: Path
    record_file: Path
    process: multiprocessing.Process | subprocess.Popen
    mark: str
    last_step: int
    started: float = field(default_factory=time.time)
    ended: float = 0.0

    def wait(self, seconds: float = 300) -> "Launch":
        """Wait for its end. After `seconds` it is killed with its children, and its log says so."""
        self.wait_for(lambda: False, seconds)
        if self.code is None:
            for pid in [self.process.pid, *self.processes()]:
                kill(pid)
            with open(self.log_file, "a", encoding="utf-8") as log:
                log.write(f"\nkilled after {seconds} s\n")
            while self.code is None:
                time.sleep(0.01)
        self.ended = time.time()
        return self

    def wait_for(self, happened: Callable[[], object], seconds: float = 60) -> "Launch":
        """Wait until `happened()`, its end, or so many seconds have gone."""
        deadline = time.monotonic() + seconds
        while not happened() and self.code is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self

    @property
    def code(self) -> int | None:
        """The exit code, negative for a death by signal; None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def records(self, key: str, rank: int = 0) -> list[dict]:
        """What benchmark/faults.py wrote of a rank's faults (`fault`) or updates (`update`)."""
        path = Path(f"{self.record_file}.{rank}")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if key in entry]

    def last_update(self) -> int:
        """Number of the last update that began; 0 where none did."""
        return max((entry["update"] for entry in self.records("update")), default=0)

    def since_fault(self, rank: int = 0) -> float:
        """Seconds from a rank's last fault to the end."""
        return self.ended - max((entry["time"] for entry in self.records("fault", rank)), default=self.ended)

    def first_step(self) -> int:
        """Step of the checkpoint that it went on from, by its log: 0 for none, the last step where all was done."""
        found = re.search(r"continuing from \S+-(\d+)", self.log)
        return int(found[1]) if found else self.last_step * ("this run is done" in self.log)

    def processes(self) -> list[int]:
        """Ids of its processes that are alive: those that have its mark in their environment."""
        alive = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"SCORECARD_RUN={self.mark}".encode() in (path / "environ").read_bytes():
                    alive.append(int(path.name))
            except OSError:
                continue
        return alive


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


@dataclass
class Lab:
    """Where a case of the scorecard starts its runs, with one seed.

    Args:
        root: holds the model, its data and the uninterrupted runs, which all cases share.
        folder: of this case and seed, made here.
        program: PRODUCT or STOCK.
        seeds: how many the case is tried with in all.
        device: cpu or cuda. On a CPU a run is a fork of this process, which has the libraries loaded, and starts in a
            second; on cuda, and under torchrun, it is a process of its own.
        share: of a case's points and repetitions that are tried, from 0 to 1.
    """

    root: Path
    folder: Path
    program: str = PRODUCT
    seed: int = 0
    seeds: int = 1
    device: str = "cpu"
    share: float = 1.0
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of its starts
    launches: dict[Path, list[Launch]] = field(default_factory=dict)  # by output folder

    def __post_init__(self):
        self.folder.mkdir(parents=True)

    def some(self, things: list) -> list:
        """Choose an evenly spread share of things, at least two of them."""
        count = min(len(things), max(2, round(len(things) * self.share)))
        return [things[i * len(things) // count] for i in range(count)]

    def settings(self, **changes) -> dict:
        return {
            "model_name_or_path": str(self.root / "chatglm3-nano"),
            "train_file": str(self.root / "train.jsonl"),
            "cache_dir": str(self.root / "cache"),
            "preprocessing_workers": 1,
            "per_device_train_batch_size": 4,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "lora_dropout": 0.1,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "seed": self.seed,
            "use_cpu": self.device == "cpu",
            "disable_tqdm": True,
        } | changes

    def run(self, name: str, faults: list[dict] = (), **options) -> Launch:
        """Start the program as `start` does, and wait for its end."""
        return self.start(name, faults, **options).wait()

    def start(
        self,
        name: str | Path,
        faults: list[dict] = (),
        ranks: int = 0,
        torchrun: list[str] = (),
        prefix: list[str] = (),
        **changes,
    ) -> Launch:
        """Start the program with output folder `name`.

        Args:
            ranks: processes under torchrun; 0 for one process without it.
            torchrun: further arguments of it.
            prefix: a command that the program is started by, in a process of its own.
            changes: of the settings.
        """
        folder = self.folder / name
        stem = self.folder / f"{folder.name}.{next(self.numbers)}"
        file, log_file = (stem.with_name(f"{stem.name}.{end}") for end in ("json", "log"))
        settings = self.settings(**changes) | {"output_dir": str(folder)}
        file.write_text(json.dumps(settings), encoding="utf-8")
        mark = f"{os.getpid()}-{stem.name}"
        environment = {"FAULTS": json.dumps(list(faults)), "RECORD": str(stem), "SCORECARD_RUN": mark}
        arguments = [self.program, "--train_args_file", str(file)]
        if self.device == "cpu" and not ranks and not prefix:
            context = multiprocessing.get_context("fork")
            process = context.Process(target=run_in_fork, args=(arguments, environment, log_file))
            process.start()
        else:
            command = [*prefix, sys.executable]
            if ranks:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun]
            with open(log_file, "wb") as log:
                process = subprocess.Popen(
                    [*command, benchmark.faults.__file__, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        launch = Launch(folder, log_file, stem, process, mark, settings["max_steps"])
        self.launches.setdefault(folder, []).append(launch)
        return launch

    def reference(self, **options) -> Path:
        """The folder of an uninterrupted run, which is made once for all cases, with `batches.json` beside it."""
        from component.run.files import fingerprint, make_once

        def make(temporary: Path) -> None:
            launch = self.run(temporary / "run", **options)
            if launch.code:
                raise RuntimeError(f"the uninterrupted run ended with {launch.code}\n{launch.log[-3000:]}")
            (temporary / "batches.json").write_text(json.dumps(self.batches(temporary / "run")), encoding="utf-8")

        key = fingerprint([json.dumps([self.settings(**options), self.program], sort_keys=True)])
        return make_once(self.root / "references" / key, make) / "run"

    def batches(self, folder: Path) -> dict[str, list[str]]:
        """The samples of each update, all ranks together. Where an update was made again, those of the last time."""
        last: dict[str, list[str]] = {}
        for launch in self.launches[folder]:
            one, other = (
                {str(entry["update"]): entry["samples"] for entry in launch.records("update", rank)} for rank in (0, 1)
            )
            last |= {update: samples + other.get(update, []) for update, samples in one.items()}
        return last

    def compare(self, folder: Path, reference: Path) -> dict[str, float]:
        """Compare two runs: largest differences of what they wrote, and how many updates had other samples."""
        import torch
        from safetensors.torch import load_file

        def adapter(run: Path) -> dict:
            return load_file(run / "final/adapter_model.safetensors")

        def optimizer(run: Path) -> dict:
            newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            return torch.load(newest / "optimizer.pt", weights_only=True, map_location="cpu")

        ours = self.batches(folder)
        theirs = json.loads((reference.parent / "batches.json").read_text(encoding="utf-8"))
        return {
            "adapter": largest_difference(adapter(folder), adapter(reference)),
            "optimizer": largest_difference(optimizer(folder), optimizer(reference)),
            "loss": largest_difference(logged(folder, "loss"), logged(reference, "loss")),
            "LR": largest_difference(logged(folder, "learning_rate"), logged(reference, "learning_rate")),
            "batches": sum(ours.get(step) != theirs.get(step) for step in ours.keys() | theirs.keys()),
        }

    def repeated_and_skipped(self, folder: Path) -> int:
        """Count the samples that an epoch had twice or not at all, over all epochs."""
        epochs, rows = self.batches(folder), len((self.root / "train.jsonl").read_text().splitlines())
        steps = sorted(epochs, key=int)
        wrong, size = 0, rows // 4
        for first in range(0, len(steps), size):
            seen = Counter(sample for step in steps[first : first + size] for sample in epochs[step])
            wrong += sum(count - 1 for count in seen.values()) + rows - len(seen)
        return wrong


def run_in_fork(arguments: list[str], environment: dict[str, str], log_file: Path) -> None:
    """Start a program in a forked process, with a session and a log of its own."""
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ |= environment
    os.chdir(ROOT)
    benchmark.faults.main(*arguments)


def load_libraries() -> None:
    """Import what forks then need not import. component.run.process is not among it, since it knows its process."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    import component.data.dataset
    import component.kernel.model
    import component.model  # noqa: F401

    torch.set_num_threads(1)  # no threads that a fork would lack
