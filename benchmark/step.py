"""Measure speed and memory of the training step, beside other programs: one table, one process for each variant.

python benchmark/step.py [--variants a,b,c] [--shape SHAPE] [--updates 5] [--json FILE]

Useful tokens are those that are not padding. The first update is warm-up; the speed is the median of those after it.
The share is of the card's measured matrix-product ceiling, by the fewest FLOPs that a step of the variant can cost.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CEILING, CHECKPOINT = "ceiling", "checkpoint"  # tasks beside the variants
COLUMNS = ("variant", "shape", "useful tok/s", "min-max", "of ceiling", "peak GiB", "load GiB", "warm-up s", "losses")


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", help="names, comma-separated [all]")
    parser.add_argument("--shape", help="in place of each variant's own, such as demo or tiny-llama")
    parser.add_argument("--updates", type=int, default=5, help="timed updates, after one of warm-up [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, rewritten after each variant")
    parser.add_argument("--limit", type=int, default=600, help="seconds that a variant may take [600]")
    for hidden in ("--one", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    cli = parse_command_line()
    (run_one if cli.one else run_all)(cli)


def run_all(cli: argparse.Namespace) -> None:
    from benchmark.common import SHAPES, machine, table
    from benchmark.variants import VARIANTS

    names = cli.variants.split(",") if cli.variants else list(VARIANTS)
    for given, known in ((names, VARIANTS), ([cli.shape] if cli.shape else [], SHAPES)):
        if unknown := [name for name in given if name not in known]:
            sys.exit(f"{unknown[0]!r} is unknown; there are {', '.join(known)}")

    folder = Path(tempfile.mkdtemp(prefix="step-"))
    try:
        report = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M")} | machine()
        report |= start(CEILING, "", cli, folder) | {"results": []}
        for name in names:
            shape = cli.shape or VARIANTS[name][0]
            prepared = {}
            if name.startswith("unsloth") and not (folder / CHECKPOINT / shape).exists():
                prepared = start(CHECKPOINT, shape, cli, folder)
            result = prepared if "error" in prepared else start(name, shape, cli, folder)
            result = {"variant": name, "shape": shape} | result
            report["results"].append(result)
            print(" ".join(describe(result, report)), file=sys.stderr)
            if cli.json:
                cli.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    finally:
        shutil.rmtree(folder)
    print(heading(report), table(COLUMNS, [describe(result, report) for result in report["results"]]), sep="\n\n")


def start(task: str, shape: str, cli: argparse.Namespace, folder: Path) -> dict:
    """Do one task in a process of its own. Returns its figures, or its `error` and the end of its `log`."""
    command = [sys.executable, __file__, "--one", task, "--folder", str(folder), "--shape", shape]
    command += ["--updates", str(cli.updates)]
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = {"HF_DATASETS_CACHE": str(folder / "datasets"), "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth_compiled")}
    with open(folder / f"{task}.log", "w+b") as output:
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
    answer = folder / f"{task}.json"
    result = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"error": status}
    if "error" in result:
        result["log"] = log[-8000:]
        print(f"--- {task}\n{result['log']}\n---", file=sys.stderr)
    return result


def run_one(cli: argparse.Namespace) -> None:
    """Do a task, in the process that `start` made for it, and leave its figures as JSON in the folder."""
    folder = Path(cli.folder)
    try:
        if cli.one.startswith("unsloth"):
            import unsloth  # noqa: F401  it must come before transformers and whatever imports that

        from benchmark.common import Run, matmul_ceiling, save_checkpoint
        from benchmark.variants import VARIANTS, checkpoint_folder

        run = Run(cli.one, cli.shape, cli.updates, folder)
        if cli.one == CEILING:
            result = {"ceiling_flops": matmul_ceiling(run.device)}
        elif cli.one == CHECKPOINT:
            save_checkpoint(run, checkpoint_folder(run))
            result = {}
        else:
            result = VARIANTS[cli.one][1](run)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[-1]}"}
    (folder / f"{cli.one}.json").write_text(json.dumps(result), encoding="utf-8")


def heading(report: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    ceiling = f"matrix products at {report['ceiling_flops'] / 1e12:,.1f} TFLOP/s; " if "ceiling_flops" in report else ""
    return f"{report['device']}; {ceiling}{versions}"


def describe(result: dict, report: dict) -> list[str]:
    """The cells of a variant, in the order of COLUMNS; the last one takes an error."""
    row = [result["variant"], result["shape"]]
    if "error" in result:
        return row + [""] * (len(COLUMNS) - 3) + [result["error"]]
    speeds = [result["useful_tokens"] / seconds for seconds in result["update_seconds"]]
    speed = statistics.median(speeds)
    share = speed * result["floor_flops"] / report["ceiling_flops"] if "ceiling_flops" in report else None
    first, last = result["losses"][0], result["losses"][-1]
    return [
        *row,
        f"{speed:,.0f}",
        f"{min(speeds):,.0f}-{max(speeds):,.0f}",
        "-" if share is None else f"{share:.1%}",
        *("-" if size is None else f"{size:.1f}" for size in (result["peak_gib"], result["load_peak_gib"])),
        f"{result['warmup_seconds']:.1f}",
        f"{first:.4f} to {last:.4f}",
    ]


if __name__ == "__main__":
    main()
