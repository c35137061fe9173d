"""Runs of the real command with faults at exact points of it, and what two runs differ in: for benchmark/scorecard.py.

FAULTS='[{"at": "component.run.folder.seal", "do": "kill"}]' RECORD=FILE python benchmark/faults.py train_qlora ...

starts train_qlora.main() with faults. One strikes at the `nth` call [1] of the function `at` (before it, or `after` it)
of those that have `match` in an argument that is text or a path; on rank `rank` [all]; with `once`, only where that
file is not there yet. What was done is a line of RECORD.RANK, as is every update that begins, with digests of its
samples.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANK = int(os.environ.get("RANK", 0))
PRODUCT, STOCK = "train_qlora", "benchmark.stock"
TRAINERS = {PRODUCT: "component.train.trainer.LoRATrainer", STOCK: "transformers.Trainer"}


def main(module: str, *arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as under a shell, whatever started this
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if fault.get("rank", RANK) == RANK:
            install(fault)
    record_updates(pkgutil.resolve_name(TRAINERS[module]))
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


def install(fault: dict) -> None:
    owner_name, _, name = fault["at"].rpartition(".")
    owner, calls = pkgutil.resolve_name(owner_name), itertools.count(1)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        texts = [str(value) for value in (*args, *kwargs.values()) if isinstance(value, (str, Path))]
        strikes = fault.get("match", "") in " ".join(texts) and next(calls) == fault.get("nth", 1)
        if strikes and not fault.get("after"):
            strike(fault, args)
        result = original(*args, **kwargs)
        if strikes and fault.get("after"):
            strike(fault, args)
        return result

    setattr(owner, name, wrapper)


def strike(fault: dict, args: tuple) -> None:
    if marker := fault.get("once"):
        if Path(marker).exists():
            return
        Path(marker).touch()
    record({"fault": fault["at"], "time": time.time()})
    ACTIONS[fault["do"]](fault, args)


def record(entry: dict) -> None:
    with open(f"{os.environ['RECORD']}.{RANK}", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def record_updates(trainer: type) -> None:
    original = trainer.get_batch_samples

    @functools.wraps(original)
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches:
            samples = [hashlib.blake2b(str(ids).encode(), digest_size=8).hexdigest() for ids in token_ids(batches)]
            record({"update": self.state.global_step + 1, "samples": samples})
        return original(self, iter(batches), len(batches), device)

    trainer.get_batch_samples = get_batch_samples


def token_ids(batches: list) -> list[list[int]]:
    """Of each sample, without padding, whether batches are padded ones or component.train.batch.SampleBatch."""
    ids = []
    for batch in batches:
        if hasattr(batch, "samples"):
            ids += [sample["input_ids"].tolist() for sample in batch.samples]
        else:
            lengths = batch["attention_mask"].sum(1).tolist()
            ids += [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    return ids


def send(fault: dict, args: tuple) -> None:
    os.kill(os.getpid(), getattr(signal, fault["signal"]))
    time.sleep(fault.get("seconds", 0))


def limit_files(fault: dict, args: tuple) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))


def equal_times(fault: dict, args: tuple) -> None:
    """As copied folders, some file systems and fast runs have them."""
    for path in Path(fault["folder"]).glob("checkpoint-*"):
        os.utime(path, (0, 0))


def spoil_weight(fault: dict, args: tuple) -> None:
    trained(args[0]).data.view(-1)[0] = float("nan")


def spoil_gradient(fault: dict, args: tuple) -> None:
    trained(args[0]).grad.view(-1)[0] = float("inf")


def trained(trainer):
    return next(weight for weight in trainer.model.parameters() if weight.requires_grad)


ACTIONS = {
    "kill": lambda fault, args: os.kill(os.getpid(), signal.SIGKILL),
    "signal": send,
    "sleep": lambda fault, args: time.sleep(fault["seconds"]),
    "limit files": limit_files,
    "equal times": equal_times,
    "spoil weight": spoil_weight,
    "spoil gradient": spoil_gradient,
}


def make_model(folder: Path, rows: list[dict], seed: int = 0) -> Path:
    """A folder as a user has it: config, weights and tokenizer of a two-layer ChatGLM3 of about 100,000 parameters."""
    import torch
    from transformers.utils import logging

    from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
    from script.make_tiny_model import train_tokenizer

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([write_rows(folder / "text.jsonl", rows)], folder, vocab_size=320)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
    config = ChatGLMConfig(padded_vocab_size=384, initializer_range=0.1, **shape)
    ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(number: int) -> list[dict]:
    """Conversations of different lengths, none equal to another."""
    return [
        {"conversations": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "word " * i}]}
        for i in range(1, number + 1)
    ]


@dataclass
class Run:
    """One start of a command, which may be under way still."""

    folder: Path  # its output_dir
    log_file: Path
    record_file: Path
    process: multiprocessing.Process | subprocess.Popen
    mark: str  # in the environment of all its processes, where it has several
    last_step: int
    started: float = field(default_factory=time.time)
    ended: float = 0.0

    def wait(self, seconds: float = 120) -> "Run":
        """Until it ends; killed with its children after `seconds`, which its log then says."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.code is None:
            for pid in [self.process.pid, *self.processes()]:
                kill(pid)
            with open(self.log_file, "a", encoding="utf-8") as log:
                log.write(f"\nkilled after {seconds} s\n")
            while self.code is None:
                time.sleep(0.01)
        self.ended = time.time()
        return self

    def wait_for(self, happened, seconds: float = 60) -> "Run":
        """Until `happened()`, or the end."""
        deadline = time.monotonic() + seconds
        while not happened() and self.code is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self

    @property
    def code(self) -> int | None:
        """The exit code, that of a death by signal negative; None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def entries(self, rank: int = 0) -> list[dict]:
        path = Path(f"{self.record_file}.{rank}")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def fault(self) -> bool:
        return any("fault" in entry for entry in self.entries())

    def begun(self) -> int:
        """The last update that began."""
        return max((entry["update"] for entry in self.entries() if "update" in entry), default=0)

    def since_fault(self, rank: int = 0) -> float:
        """Seconds from the last fault to the end."""
        return self.ended - max((entry["time"] for entry in self.entries(rank) if "fault" in entry), default=self.ended)

    def begins_at(self) -> int:
        """The step of the checkpoint that it continued from, by its log; 0 for none, the last one for a run done."""
        found = re.search(r"continuing from \S+-(\d+)", self.log)
        return int(found[1]) if found else self.last_step * ("this run is done" in self.log)

    def processes(self) -> list[int]:
        """Those alive that have its mark in their environment."""
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


class Lab:
    """Where a case makes its runs, with one seed.

    Args:
        root: has the model, its data and the uninterrupted runs, which all cases share.
        folder: of this case and seed.
        program: PRODUCT or STOCK.
        seeds: how many the case is tried with in all.
        device: cpu or cuda. On a CPU a run is a fork of this process, which has torch loaded, so that it starts in a
            second; on cuda and under torchrun it is a process of its own.
        share: of the points and repetitions, from 0 to 1, that are tried.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        program: str = PRODUCT,
        seed: int = 0,
        seeds: int = 1,
        device: str = "cpu",
        share: float = 1.0,
    ):
        self.root, self.folder, self.program, self.seed, self.seeds = root, folder, program, seed, seeds
        self.device, self.share = device, share
        self.starts = itertools.count()
        self.lineage: dict[Path, list[Run]] = {}
        folder.mkdir(parents=True)

    def some(self, things: list) -> list:
        """An evenly spread share of them, at least two."""
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

    def run(self, name: str, faults: list[dict] = (), **changes) -> Run:
        return self.start(name, faults, **changes).wait()

    def start(
        self,
        name: str | Path,
        faults: list[dict] = (),
        ranks: int = 0,
        torchrun: list[str] = (),
        forks: bool = True,
        prefix: list[str] = (),
        **changes,
    ) -> Run:
        """Start the command with output folder `name`.

        Args:
            ranks: processes under torchrun; 0: one, without it.
            torchrun: further arguments of it.
            forks: False for a process of its own, behind `prefix`, where a fork would do.
            changes: of the settings.
        """
        folder = self.folder / name
        number = next(self.starts)
        stem = self.folder / f"{folder.name}.{number}"
        file = stem.with_name(f"{stem.name}.json")
        file.write_text(json.dumps(self.settings(**changes) | {"output_dir": str(folder)}), encoding="utf-8")
        mark = f"{os.getpid()}-{stem.name}"
        environment = {"FAULTS": json.dumps(list(faults)), "RECORD": str(stem), "SCORECARD_RUN": mark}
        arguments = [self.program, "--train_args_file", str(file)]
        log_file = stem.with_name(f"{stem.name}.log")
        if self.device == "cpu" and forks and not ranks:
            context = multiprocessing.get_context("fork")
            process = context.Process(target=run_in_fork, args=(arguments, environment, log_file))
            process.start()
        else:
            command = [sys.executable]
            if ranks:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun]
            with open(log_file, "wb") as log:
                process = subprocess.Popen(
                    [*prefix, *command, __file__, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        run = Run(folder, log_file, stem, process, mark, self.settings(**changes)["max_steps"])
        self.lineage.setdefault(folder, []).append(run)
        return run

    def reference(self, ranks: int = 0, **changes) -> Path:
        """The folder of an uninterrupted run, made once for all cases; its batches are in `batches.json` beside it."""
        from component.run.files import fingerprint, make_once

        def make(temporary: Path) -> None:
            run = self.start(temporary / "run", ranks=ranks, **changes).wait()
            if run.code:
                raise RuntimeError(f"the uninterrupted run ended with {run.code}\n{run.log[-3000:]}")
            (temporary / "batches.json").write_text(json.dumps(self.batches(temporary / "run")), encoding="utf-8")

        key = fingerprint([json.dumps([self.settings(**changes), ranks, self.program], sort_keys=True)])
        return make_once(self.root / "references" / key, make) / "run"

    def batches(self, folder: Path) -> dict[str, list[str]]:
        """For each update, the samples of its last try, over all starts and ranks."""
        last: dict[str, list[str]] = {}
        for run in self.lineage[folder]:
            ranks = [
                {str(entry["update"]): entry["samples"] for entry in run.entries(rank) if "update" in entry}
                for rank in range(2)
            ]
            last |= {step: samples + ranks[1].get(step, []) for step, samples in ranks[0].items()}
        return last

    def compare(self, folder: Path, reference: Path) -> dict[str, float]:
        """Largest differences of two runs, and how many updates had other batches."""
        import torch
        from safetensors.torch import load_file

        def newest(run: Path) -> Path:
            return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))

        def difference(load) -> float:
            return largest_difference(load(folder), load(reference))

        def logged(run: Path, key: str) -> dict:
            history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            return {entry["step"]: entry[key] for entry in history if key in entry}

        ours = self.batches(folder)
        theirs = json.loads((reference.parent / "batches.json").read_text(encoding="utf-8"))
        return {
            "adapter": difference(lambda run: load_file(run / "final/adapter_model.safetensors")),
            "optimizer": difference(
                lambda run: torch.load(newest(run) / "optimizer.pt", weights_only=True, map_location="cpu")
            ),
            "loss": difference(lambda run: logged(run, "loss")),
            "LR": difference(lambda run: logged(run, "learning_rate")),
            "batches": sum(ours.get(step) != theirs.get(step) for step in ours.keys() | theirs.keys()),
        }

    def repeated_and_skipped(self, folder: Path) -> int:
        """Samples that an epoch had twice or not at all."""
        epochs, rows = self.batches(folder), len((self.root / "train.jsonl").read_text().splitlines())
        steps = sorted(epochs, key=int)
        wrong, size = 0, rows // 4
        for first in range(0, len(steps), size):
            seen = Counter(sample for step in steps[first : first + size] for sample in epochs[step])
            wrong += sum(count - 1 for count in seen.values()) + rows - len(seen)
        return wrong


def run_in_fork(arguments: list[str], environment: dict[str, str], log_file: Path) -> None:
    """The life of a forked run: its own session and log, in place of the scorecard's."""
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), line_buffering=True) for number in (1, 2))
    os.environ |= environment
    os.chdir(ROOT)
    main(*arguments)


def load_libraries() -> None:
    """What forks have from this process; component.run.process, which knows its process, is not among it."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    import transformers.trainer  # noqa: F401

    import component.data.dataset
    import component.kernel.model
    import component.model  # noqa: F401

    torch.set_num_threads(1)  # no threads that a fork would lack


def largest_difference(one, other) -> float:
    """Of all numbers in two nested structures; infinite where their shapes differ."""
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return float("inf")
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return float("inf")
        return max(map(largest_difference, one, other), default=0.0)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return float("inf")
        return 0.0 if torch.equal(one, other) else (one.double() - other.double()).abs().max().item()
    if one == other:
        return 0.0
    both_numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) if both_numbers else float("inf")


if __name__ == "__main__":
    main(*sys.argv[1:])
