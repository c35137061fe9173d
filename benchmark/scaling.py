"""How training scales over the GPUs of one machine: the real command under torchrun, one table.

python benchmark/scaling.py [--gpus 1,2,4,8] [--shape chatglm3-6b] [--updates 5] [--json FILE]

The base is of random weights in 4 bits, the rows have the lengths of benchmark/step.py's samples, dropout is 0. `more
data` gives each GPU 64 samples an update, however many there are; `same batch` shares 64 among all; `unconnected` runs
one GPU's training on each at once, the slowest of which says what the machine allows. Efficiency is that of N GPUs
against N times one. At the end one rank of the largest run gets a SIGTERM.
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


def main() -> None:
    if os.environ.get("SCALING_FOLDER"):
        work(Path(os.environ["SCALING_FOLDER"]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", default="1,2,4,8", help="numbers of processes [1,2,4,8]; above the machine's: left out"
    )
    parser.add_argument("--shape", default="chatglm3-6b", help="a ChatGLM's, of benchmark/step.py [chatglm3-6b]")
    parser.add_argument("--updates", type=int, default=5, help="timed updates, after one of warm-up [5]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    cli = parser.parse_args()

    from benchmark.common import Run, machine, save_checkpoint, table

    report = machine()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        settings = Run("", cli.shape, 0, folder)
        most = settings.device.type == "cuda" and count_gpus()
        numbers = [number for number in map(int, cli.gpus.split(",")) if not most or number <= most]
        save_checkpoint(settings, folder / "base")
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


def write_rows(path: Path, samples: list[dict]) -> None:
    """Firefly rows of as many tokens, and as many learned ones, as the samples have, by a tokenizer of bytes."""
    with open(path, "w", encoding="utf-8") as file:
        for sample in samples:
            learned = sum(sample["target_mask"])
            text = "".join(chr(97 + token % 26) for token in sample["input_ids"])
            human, assistant = text[: len(text) - learned - 2], text[len(text) - learned + 1 :]  # two ends, one start
            file.write(json.dumps({"conversation": [{"human": human, "assistant": assistant}]}) + "\n")


def prepare(cli: argparse.Namespace, folder: Path, name: str, processes: int, batch: str, updates: int) -> Path:
    """A folder with the rows and the settings of a run."""
    from benchmark.common import ACCUMULATION, BATCH, SHAPES, make_samples

    run = folder / name
    run.mkdir()
    config, longest = SHAPES[cli.shape]
    parts = processes if batch == MORE else 1
    samples = [sample for seed in range(parts) for sample in make_samples(config().vocab_size, seed, longest)]
    write_rows(run / "rows.jsonl", samples)
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
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return run


def start(
    run: Path, processes: int, gpu: int | None = None, program: Path = Path(__file__), **own: str
) -> subprocess.Popen:
    """`program` under torchrun, for the run's folder; of one process, on this `gpu` if there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own |= {"SCALING_FOLDER": str(run), "SCALING_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1"}
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | own
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    log = open(run / "log", "wb")  # noqa: SIM115  the child's
    return subprocess.Popen([*command, str(program)], env=environment, stdout=log, stderr=log)


def train(cli: argparse.Namespace, folder: Path, gpus: int, batch: str) -> dict:
    """What was measured on all GPUs."""
    name = f"{gpus}-{batch.split()[0]}"
    if batch == ALONE:
        runs = [prepare(cli, folder, f"{name}-{gpu}", 1, MORE, cli.updates + 1) for gpu in range(gpus)]
        return in_lockstep(watch([(run, start(run, 1, gpu), 1) for gpu, run in enumerate(runs)]))
    run = prepare(cli, folder, name, gpus, batch, cli.updates + 1)
    return watch([(run, start(run, gpus), gpus)])[0]


def watch(jobs: list[tuple[Path, subprocess.Popen, int]]) -> list[dict]:
    """The figures of each (folder, torchrun, processes), once it is done."""
    for run, job, _ in jobs:
        wait(run, job)
    return [read_figures(run, processes) for run, _, processes in jobs]


def wait(run: Path, job: subprocess.Popen) -> None:
    if status := job.wait(timeout=600):
        sys.exit(f"exit status {status}\n{(run / 'log').read_text(errors='replace')[-4000:]}")


def in_lockstep(results: list[dict]) -> dict:
    """Of runs side by side, as if each waited for the slowest at every update."""
    joined = {key: [value for result in results for value in result[key]] for key in PER_RANK}
    seconds = [max(each) for each in zip(*(result["update_seconds"] for result in results), strict=True)]
    tokens = sum(result["tokens"] for result in results)
    return results[0] | joined | {"update_seconds": seconds, "tokens": tokens}


def read_figures(run: Path, processes: int) -> dict:
    """What all ranks of a run measured."""
    ranks = [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(processes)]
    ends = ranks[0]["ends"]
    history = json.loads((run / "out" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    return {
        "update_seconds": [end - begin for begin, end in pairwise(ends)],
        "tokens": logged[0]["num_tokens"],
        "losses": [entry["loss"] for entry in logged],
        "peak_gib": [rank["peak_gib"] for rank in ranks],
        "first_step_seconds": [rank["ends"][0] - rank["started"] for rank in ranks],
        "adapters": [rank["adapter"] for rank in ranks],
    }


def stop_one_rank(cli: argparse.Namespace, folder: Path, processes: int) -> str:
    """Seconds from a SIGTERM on the last rank until all processes are gone, and how long an update took."""
    run = prepare(cli, folder, "stopped", processes, MORE, updates=1000)
    job = start(run, processes)
    ticks = run / f"tick{processes - 1}.json"
    while not ticks.exists() and job.poll() is None:
        time.sleep(0.1)
    time.sleep(0.2)
    pid = json.loads(ticks.read_text())["pid"]
    os.kill(pid, signal.SIGTERM)
    sent = time.time()
    job.wait(timeout=600)
    seconds = time.time() - sent
    kept = sorted(path.name for path in (run / "out").glob("checkpoint-*"))
    return f"all gone after {seconds:.1f} s, exit status {job.returncode}, kept {kept}"


def work(folder: Path) -> None:
    """A rank: the real command, its trainer watched by a clock."""
    import hashlib

    import torch
    from transformers import TrainerCallback

    import component.train.trainer
    from benchmark.common import peak_memory

    class Clock(TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.ends = trainer, []

        def on_step_end(self, args, state, control, **kwargs):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.time())
            path = folder / f"tick{args.process_index}.json"
            if state.global_step == 2:
                path.write_text(json.dumps({"pid": os.getpid()}))

        def on_train_end(self, args, state, control, **kwargs):
            digest = hashlib.sha256()
            for weight in self.trainer.model.parameters():
                if weight.requires_grad:
                    digest.update(weight.detach().cpu().numpy().tobytes())
            figures = {"ends": self.ends, "peak_gib": peak_memory(args.device), "adapter": digest.hexdigest()}
            figures |= {"started": float(os.environ["SCALING_STARTED"])}
            (folder / f"rank{args.process_index}.json").write_text(json.dumps(figures))

    class Watched(component.train.trainer.LoRATrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Clock(self))

    component.train.trainer.LoRATrainer = Watched
    sys.argv = ["train_qlora.py", "--train_args_file", str(folder / "settings.json")]
    runpy.run_path(str(ROOT / "train_qlora.py"), run_name="__main__")


def describe(result: dict, one: dict) -> list[str]:
    """A row of the table; `one` is the run on one GPU."""
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
