"""Measure speed and memory of the training step, beside other programs: one table, one process for each variant.

python benchmark/step.py [--variants a,b,c] [--shape SHAPE] [--rows 8192,32768] [--lengths 32768] [--json FILE]

Useful tokens are those that are not padding. The speed is the median of the updates after warm-up. The share is of the
card's measured matrix-product ceiling, by the fewest FLOPs that a step of the variant can cost. The card is busy while
any kernel runs, in one further update.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CEILING, CHECKPOINT = "ceiling", "checkpoint"  # tasks beside the variants
COLUMNS = ("variant", "shape", "rows", "useful tok/s", "min-max", "of ceiling", "wall ms", "busy ms", "wall/busy")
COLUMNS += ("kernels", "attention", "peak GiB", "estimate GiB", "load GiB", "warm-up s", "losses")


class Task(NamedTuple):
    """What a process does: one of VARIANTS with what common.Run takes of the command line, or CEILING or CHECKPOINT."""

    name: str
    shape: str = ""
    rows: int | str | None = None
    length: int | None = None


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=listed(str), help="names, comma-separated [all]")
    parser.add_argument("--shape", help="in place of each variant's own, such as demo or tiny-llama")
    rows = "tokens of this project's rows, comma-separated; auto is what a run itself chooses [each variant's own]"
    parser.add_argument("--rows", type=listed(lambda text: text if text == "auto" else int(text)), help=rows)
    lengths = "of all samples in tokens, comma-separated [mixed, at most 1024]"
    parser.add_argument("--lengths", type=listed(int), help=lengths)
    parser.add_argument("--samples", type=int, default=1, help="of an update, with --lengths [1]")
    parser.add_argument("--updates", type=int, default=8, help="that are timed [8]")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before them, at least 1 [2]")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of each variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, rewritten after each variant")
    limit = "seconds that a variant may take; samples of 131,072 tokens need more than the default [600]"
    parser.add_argument("--limit", type=int, default=600, help=limit)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    cli = parser.parse_args()
    if cli.warm_up < 1:
        parser.error("--warm-up: the first update compiles kernels, so it cannot be timed; give 1 or more")
    return cli


def listed(kind: Callable) -> Callable[[str], list]:
    """A type of argument: a comma-separated list, each of `kind`."""
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    cli = parse_command_line()
    (run_one if cli.task else run_all)(cli)


def run_all(cli: argparse.Namespace) -> None:
    from benchmark.common import SHAPES, machine, table
    from benchmark.variants import VARIANTS

    for given, known in ((cli.variants or [], VARIANTS), ([cli.shape] if cli.shape else [], SHAPES)):
        if unknown := [name for name in given if name not in known]:
            sys.exit(f"{unknown[0]!r} is unknown; there are {', '.join(known)}")

    folder = Path(tempfile.mkdtemp(prefix="step-"))
    try:
        report = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M")} | machine()
        report |= start(Task(CEILING), cli, folder) | {"results": []}
        for task in list_tasks(cli, {name: shape for name, (shape, _) in VARIANTS.items()}):
            prepared = {}
            if task.name.startswith("unsloth") and not (folder / CHECKPOINT / task.shape).exists():
                prepared = start(Task(CHECKPOINT, task.shape), cli, folder)
            result = prepared if "error" in prepared else start(task, cli, folder)
            samples = f", {cli.samples} of {task.length:,} tokens" if task.length else ""
            result = {"variant": task.name, "shape": task.shape + samples, "rows": task.rows} | result
            report["results"].append(result)
            print(" ".join(describe(result, report)), file=sys.stderr)
            if cli.json:
                cli.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    finally:
        shutil.rmtree(folder)
    rows = [describe(result, report) for result in report["results"]]
    print(heading(report), table(COLUMNS, rows), sep="\n\n")
    for row, result in zip(rows, report["results"], strict=True):
        if cli.profile and result.get("recorded"):
            print(f"\n{', '.join(row[:3])}:", *map(describe_kernel, result["recorded"]["longest"]), sep="\n")


def list_tasks(cli: argparse.Namespace, shapes: dict[str, str]) -> list[Task]:
    """Every variant with every length and, where it is this project's, with every --rows.

    Args:
        shapes: of all variants, by their names.
    """
    tasks = []
    for name in cli.variants or shapes:
        rows = cli.rows if cli.rows and name.startswith("luciole") else [None]
        pairs = product(cli.lengths or [None], rows)
        tasks += [Task(name, cli.shape or shapes[name], rows=tokens, length=length) for length, tokens in pairs]
    return tasks


def start(task: Task, cli: argparse.Namespace, folder: Path) -> dict:
    """Do one task in a process of its own. Returns its figures, or its `error` and the end of its `log`."""
    command = [sys.executable, __file__, "--task", json.dumps(task), "--folder", str(folder)]
    command += ["--updates", str(cli.updates), "--samples", str(cli.samples), "--warm-up", str(cli.warm_up)]
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = {"HF_DATASETS_CACHE": str(folder / "datasets"), "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth_compiled")}
    answer = folder / f"{task.name}.json"
    answer.unlink(missing_ok=True)  # of another task with the same variant
    with open(folder / f"{task.name}.log", "w+b") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | offline | own, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = f"exit status {process.wait(cli.limit)}"
        except subprocess.TimeoutExpired:
            status = f"took more than {cli.limit} s"
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        output.seek(0)
        log = output.read().decode(errors="replace")
    result = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"error": status}
    if "error" in result:
        result["log"] = log[-8000:]
        print(f"--- {task.name}\n{result['log']}\n---", file=sys.stderr)
    return result


def run_one(cli: argparse.Namespace) -> None:
    """Do a task, in the process that `start` made for it, and leave its figures as JSON in the folder."""
    task = Task(*cli.task)
    try:
        if task.name.startswith("unsloth"):
            import unsloth  # noqa: F401  it must come before transformers and whatever imports that

        from benchmark.common import Run, matmul_ceiling, save_checkpoint
        from benchmark.variants import VARIANTS, checkpoint_folder

        given = {"rows": task.rows, "length": task.length, "count": cli.samples, "warm_up": cli.warm_up}
        run = Run(task.name, task.shape, cli.updates, cli.folder, **given)
        if task.name == CEILING:
            result = {"ceiling_flops": matmul_ceiling(run.device)}
        elif task.name == CHECKPOINT:
            save_checkpoint(run, checkpoint_folder(run))
            result = {}
        else:
            result = VARIANTS[task.name][1](run)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[-1]}"}
    (cli.folder / f"{task.name}.json").write_text(json.dumps(result), encoding="utf-8")


def heading(report: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    ceiling = f"matrix products at {report['ceiling_flops'] / 1e12:,.1f} TFLOP/s; " if "ceiling_flops" in report else ""
    return f"{report['device']}; {ceiling}{versions}"


def describe(result: dict, report: dict) -> list[str]:
    """The cells of a variant, in the order of COLUMNS; the last one takes an error."""
    rows = f"{result['rows']:,}" if isinstance(result["rows"], int) else result["rows"] or "-"
    row = [result["variant"], result["shape"], f"{rows} {result.get('kept', '')}".strip()]
    if "error" in result:
        return row + [""] * (len(COLUMNS) - 4) + [result["error"]]
    speeds = [result["useful_tokens"] / seconds for seconds in result["update_seconds"]]
    speed = statistics.median(speeds)
    share = speed * result["floor_flops"] / report["ceiling_flops"] if "ceiling_flops" in report else None
    first, last = result["losses"][0], result["losses"][-1]
    sizes = (result.get(key) for key in ("peak_gib", "estimate_gib", "load_peak_gib"))
    return [
        *row,
        f"{speed:,.0f}",
        f"{min(speeds):,.0f}-{max(speeds):,.0f}",
        "-" if share is None else f"{share:.1%}",
        *describe_card(1000 * statistics.median(result["update_seconds"]), result["recorded"]),
        *("-" if size is None else f"{size:.1f}" for size in sizes),
        f"{result['warmup_seconds']:.1f}",
        f"{first:.4f} to {last:.4f}",
    ]


def describe_card(wall_ms: float, recorded: dict | None) -> list[str]:
    """The cells from "wall ms" to "attention", of what was recorded of an update; without a card there is nothing."""
    if not recorded:
        return [f"{wall_ms:,.0f}", "-", "-", "-", "-"]
    busy_ms = recorded["busy_ms"]
    shares = f"{wall_ms / busy_ms:.2f}", f"{recorded['kernels']:,}", f"{recorded['attention_ms'] / busy_ms:.1%}"
    return [f"{wall_ms:,.0f}", f"{busy_ms:,.0f}", *shares]


def describe_kernel(kernel: dict) -> str:
    """Line of a kernel: its milliseconds in all, how often it ran, and the beginning of its name."""
    return f"{kernel['ms']:9.2f} ms {kernel['count']:7,} {kernel['name'][:100]}"


if __name__ == "__main__":
    main()
