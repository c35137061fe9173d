"""Measure what it costs that every update is checked before it is used, for signals and for figures that are not
finite: the real command with the checks and without, twice each, on either of two GPUs at once; with fewer, one after
the other.

python benchmark/overhead.py [--shape chatglm3-6b] [--updates 20]

The runs are those of benchmark/scaling.py on one GPU, and log every tenth update.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import scaling

CHECKED, UNCHECKED = "checked", scaling.UNCHECKED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="chatglm3-6b", help="a ChatGLM's, of benchmark/step.py [chatglm3-6b]")
    parser.add_argument("--updates", type=int, default=20, help="timed updates, after two of warm-up [20]")
    cli = parser.parse_args()

    from benchmark.common import Run, machine, save_checkpoint, table

    seconds: dict[str, list[float]] = {CHECKED: [], UNCHECKED: []}
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        save_checkpoint(Run("", cli.shape, 0, folder), folder / "base")
        side_by_side = scaling.count_gpus() > 1
        for kinds in ((CHECKED, UNCHECKED), (UNCHECKED, CHECKED)):
            jobs = []
            for gpu, kind in enumerate(kinds):
                run = scaling.prepare(cli, folder, f"{kinds[0]}-{kind}", 1, scaling.MORE, cli.updates + 2, 10)
                jobs.append((run, scaling.start(run, 1, gpu if side_by_side else None, kind)))
                if not side_by_side:
                    jobs[-1][1].wait()
            for (run, job), kind in zip(jobs, kinds, strict=True):
                scaling.wait(run, job)
                ends = json.loads((run / "rank0.json").read_text())["ends"]
                seconds[kind].append((ends[-1] - ends[1]) / cli.updates)
    facts = machine()
    print(f"{facts['device']}; torch {facts['versions']['torch']}; {cli.shape}; {cli.updates} updates\n")
    means = {kind: statistics.mean(each) for kind, each in seconds.items()}
    rows = [[kind, *(f"{value:.4f}" for value in (*each, means[kind]))] for kind, each in seconds.items()]
    print(table(("updates", "s, first", "s, second", "mean"), rows))
    print(f"\nchecks cost {means[CHECKED] / means[UNCHECKED] - 1:+.2%}")


if __name__ == "__main__":
    main()
