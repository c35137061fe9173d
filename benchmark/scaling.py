"""Measure how training scales over the GPUs of one machine: the real command under torchrun, one table.

python benchmark/scaling.py [--gpus 1,2,4,8] [--shape chatglm3-6b] [--updates 5] [--json FILE]

The base is of random weights in 4 bits, the rows have the lengths of benchmark/step.py's samples, dropout is 0. `more
data` gives each GPU 64 samples an update, however many there are; `same batch` shares 64 among all; `unconnected` runs
one GPU's training on each at once, the slowest of which says what the machine allows. Efficiency compares N GPUs with N
times one. At the end one rank of the largest run gets a SIGTERM.
"""

import argparse
import json
import os
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark.runs import logged, write_rows

MORE, SAME, ALONE = "more data", "same batch", "unconnected"
COLUMNS = (
    "GPUs",
    "batch",
    "useful tok/s",
    "efficiency",
    "peak GiB",
    "first step s",
    "losses",
    "off one GPU",
    "adapters",
)
PER_RANK = ("peak_gib", "first_step_seconds", "adapters")
UNCHECKED = "unchecked"  # what benchmark/overhead.py compares: a run without the checks of each update


def main() -> None:
    if os.environ.get("SCALING_FOLDER"):
        work(Path(os.environ["SCALING_FOLDER"]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2,4,8", help="numbers of processes, at most the machine's GPUs [1,2,4,8]")
    parser.add_argument("--shape", default="chatglm3-6b", help="a ChatGLM's, of benchmark/step.py [chatglm3-6b]")
    parser.add_argument("--updates", type=int, default=5, help="timed updates, after one of warm-up [5]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    cli = parser.parse_args()

    from benchmark.common import Run, machine, save_checkpoint, table

    report = machine()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        save_checkpoint(Run("", cli.shape, 0, folder), folder / "base")
        most = count_gpus() or sys.maxsize  # without a GPU, processes share the processor
        numbers = [number for number in map(int, cli.gpus.split(",")) if number <= most]
        report["results"] = []
        for number in numbers:
            for batch in (ALONE, MORE, SAME) if number > 1 else (MORE,):
                result = {"gpus": number, "batch": batch} | train(cli, folder, number, batch)
                report["results"].append(result)
                print(" ".join(describe(result, report["results"][0])), file=sys.stderr)
        report["sigterm"] = stop_one_rank(cli, folder, numbers[-1])
    if cli.json:
        cli.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(COLUMNS, [describe(result, report["results"][0]) for result in report["results"]]))
    print(f"\nSIGTERM to one rank of {numbers[-1]}: {report['sigterm']}")


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def as_row(sample: dict) -> dict:
    """Make a Firefly row of as many tokens, and as many learned ones, as the sample has, by a tokenizer of bytes."""
    learned = sum(sample["target_mask"])
    text = "".join(chr(97 + token % 26) for token in sample["input_ids"])
    human, assistant = text[: len(text) - learned - 2], text[len(text) - learned + 1 :]  # two ends, one start
    return {"conversation": [{"human": human, "assistant": assistant}]}


def prepare(
    cli: argparse.Namespace, folder: Path, name: str, processes: int, batch: str, updates: int, logging_steps: int = 1
) -> Path:
    """Make a folder with the rows and the settings of a run."""
    from benchmark.common import ACCUMULATION, BATCH, SHAPES, make_samples

    run = folder / name
    run.mkdir()
    config, longest = SHAPES[cli.shape]
    parts = processes if batch == MORE else 1
    samples = [sample for seed in range(parts) for sample in make_samples(config().vocab_size, seed, longest)]
    write_rows(run / "rows.jsonl", list(map(as_row, samples)))
    settings = {
        "model_name_or_path": str(folder / "base"),
        "data_format": "firefly",
        "train_file": str(run / "rows.jsonl"),
        "output_dir": str(run / "out"),
        "cache_dir": str(folder / "cache"),
        "max_seq_length": longest,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION * parts // processes,
        "max_steps": updates,
        "lora_dropout": 0.0,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": logging_steps,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return run


def start(run: Path, processes: int, gpu: int | None = None, kind: str = "") -> subprocess.Popen:
    """Start a run under torchrun.

    Args:
        run: its folder.
        gpu: the one that it has; None for those with the first numbers.
        kind: with any, time is taken once the device is done after the second update and after the last alone; and
            UNCHECKED is without checks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"SCALING_FOLDER": str(run), "SCALING_STARTED": str(time.time()), "SCALING_KIND": kind, "HF_HUB_OFFLINE": "1"}
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | own
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    with open(run / "log", "wb") as log:
        return subprocess.Popen([*command, __file__], env=environment, stdout=log, stderr=log)


def train(cli: argparse.Namespace, folder: Path, gpus: int, batch: str) -> dict:
    """Train on so many GPUs, and return what was measured on all of them."""
    name = f"{gpus}-{batch.split()[0]}"
    if batch == ALONE:
        runs = [prepare(cli, folder, f"{name}-{gpu}", 1, MORE, cli.updates + 1) for gpu in range(gpus)]
        jobs = [start(run, 1, gpu) for gpu, run in enumerate(runs)]
        for run, job in zip(runs, jobs, strict=True):
            wait(run, job)
        return in_lockstep([read_figures(run, 1) for run in runs])
    run = prepare(cli, folder, name, gpus, batch, cli.updates + 1)
    wait(run, start(run, gpus))
    return read_figures(run, gpus)


def wait(run: Path, job: subprocess.Popen) -> None:
    if status := job.wait(timeout=600):
        sys.exit(f"exit status {status}\n{(run / 'log').read_text(errors='replace')[-4000:]}")


def in_lockstep(results: list[dict]) -> dict:
    """Join the figures of runs side by side, as if each waited for the slowest at every update."""
    joined = {key: [value for result in results for value in result[key]] for key in PER_RANK}
    seconds = [max(each) for each in zip(*(result["update_seconds"] for result in results), strict=True)]
    tokens = sum(result["tokens"] for result in results)
    return results[0] | joined | {"update_seconds": seconds, "tokens": tokens}


def read_figures(run: Path, processes: int) -> dict:
    """Read what the ranks of a run measured."""
    ranks = [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return {
        "update_seconds": [end - begin for begin, end in pairwise(ranks[0]["ends"])],
        "tokens": logged(run / "out", "num_tokens")[0],
        "losses": logged(run / "out", "loss"),
        "peak_gib": [rank["peak_gib"] for rank in ranks],
        "first_step_seconds": [rank["ends"][0] - rank["started"] for rank in ranks],
        "adapters": [rank["adapter"] for rank in ranks],
    }


def stop_one_rank(cli: argparse.Namespace, folder: Path, processes: int) -> str:
    """Send a SIGTERM to the last rank of a run, and say how long it takes until all processes are gone."""
    run = prepare(cli, folder, "stopped", processes, MORE, updates=1000)
    job = start(run, processes)
    pid = run / f"pid{processes - 1}"
    while not pid.exists() and job.poll() is None:
        time.sleep(0.1)
    time.sleep(0.2)
    os.kill(int(pid.read_text()), signal.SIGTERM)
    sent = time.time()
    job.wait(timeout=600)
    seconds = time.time() - sent
    kept = sorted(path.name for path in (run / "out").glob("checkpoint-*"))
    return f"all gone after {seconds:.1f} s, exit status {job.returncode}, kept {kept}"


def work(folder: Path) -> None:
    """Run a rank: the real command, its trainer watched by a clock."""
    import hashlib

    from transformers import TrainerCallback

    import component.train.trainer
    from benchmark.common import now, peak_memory

    kind = os.environ["SCALING_KIND"]

    class Clock(TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.ends = trainer, []

        def on_step_end(self, args, state, control, **kwargs):
            if not kind or state.global_step in (2, state.max_steps):
                now(args.device)
            self.ends.append(time.time())
            if state.global_step == 2:
                (folder / f"pid{args.process_index}").write_text(str(os.getpid()))

        def on_train_end(self, args, state, control, **kwargs):
            digest = hashlib.sha256()
            for weight in self.trainer.trained_weights():
                digest.update(weight.detach().cpu().numpy().tobytes())
            figures = {"ends": self.ends, "peak_gib": peak_memory(args.device), "adapter": digest.hexdigest()}
            figures |= {"started": float(os.environ["SCALING_STARTED"])}
            (folder / f"rank{args.process_index}.json").write_text(json.dumps(figures))

    class Watched(component.train.trainer.LoRATrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Clock(self))

    class Unchecked(Watched):
        def agree(self, losses, update):
            """Sum and clip the gradients, and ask neither whether figures are finite nor whether a signal came."""
            self.sum_gradients()
            return self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm), True

    component.train.trainer.LoRATrainer = Unchecked if kind == UNCHECKED else Watched
    sys.argv = ["train_qlora.py", "--train_args_file", str(folder / "settings.json")]
    runpy.run_path(str(ROOT / "train_qlora.py"), run_name="__main__")


def describe(result: dict, one: dict) -> list[str]:
    """The cells of a run, in the order of COLUMNS; `one` is the run on one GPU."""
    speed, alone = (run["tokens"] / statistics.median(run["update_seconds"]) for run in (result, one))
    off = max(abs(a - b) for a, b in zip(result["losses"], one["losses"], strict=True))
    peaks = [peak for peak in result["peak_gib"] if peak is not None]
    return [
        str(result["gpus"]),
        result["batch"],
        f"{speed:,.0f}",
        f"{speed / (alone * result['gpus'] / one['gpus']):.1%}",
        f"{min(peaks):.1f}-{max(peaks):.1f}" if peaks else "-",
        f"{min(result['first_step_seconds']):.1f}-{max(result['first_step_seconds']):.1f}",
        f"{result['losses'][0]:.4f} to {result['losses'][-1]:.4f}",
        f"{off:.4f}" if result["batch"] in (SAME, ALONE) or result is one else "other data",
        "equal" if len(set(result["adapters"])) == 1 else "differ",
    ]


if __name__ == "__main__":
    main()
