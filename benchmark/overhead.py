"""What it costs that every update is checked (signals, figures that are not finite): the real command with the checks
and without, twice each, on either of two GPUs at once; with fewer, one after the other.

python benchmark/overhead.py [--shape chatglm3-6b] [--updates 20]

The runs are those of benchmark/scaling.py on one GPU, and log every tenth update.
"""

import argparse
import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import scaling

CHECKED, UNCHECKED = "checked", "unchecked"


def main() -> None:
    if os.environ.get("SCALING_FOLDER"):
        work(Path(os.environ["SCALING_FOLDER"]))
        return
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
                jobs.append(start(cli, folder, kinds[0], kind, gpu if side_by_side else None))
                if not side_by_side:
                    jobs[-1][1].wait()
            for (run, job), kind in zip(jobs, kinds, strict=True):
                scaling.wait(run, job)
                begin, end = json.loads((run / "ends.json").read_text())
                seconds[kind].append((end - begin) / cli.updates)
    facts = machine()
    print(f"{facts['device']}; torch {facts['versions']['torch']}; {cli.shape}; {cli.updates} updates\n")
    means = {kind: statistics.mean(each) for kind, each in seconds.items()}
    rows = [[kind, *(f"{value:.4f}" for value in (*each, means[kind]))] for kind, each in seconds.items()]
    print(table(("updates", "s, first", "s, second", "mean"), rows))
    print(f"\nchecks cost {means[CHECKED] / means[UNCHECKED] - 1:+.2%}")


def start(cli: argparse.Namespace, folder: Path, turn: str, kind: str, gpu: int | None):
    """A run's folder, and its process."""
    run = scaling.prepare(cli, folder, f"{turn}-{kind}", 1, scaling.MORE, cli.updates + 2)
    settings = json.loads((run / "settings.json").read_text()) | {"logging_steps": 10}
    (run / "settings.json").write_text(json.dumps(settings))
    return run, scaling.start(run, 1, gpu, Path(__file__), OVERHEAD_KIND=kind)


def work(folder: Path) -> None:
    """The real command, with or without its checks, watched by a clock that waits for the GPU at both ends alone."""
    import torch
    from transformers import Trainer, TrainerCallback

    import component.train.trainer

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, state.max_steps):
                if args.device.type == "cuda":
                    torch.cuda.synchronize()
                self.ends.append(time.time())

        def on_train_end(self, args, state, control, **kwargs):
            (folder / "ends.json").write_text(json.dumps(self.ends))

    class Watched(component.train.trainer.LoRATrainer):
        if os.environ["OVERHEAD_KIND"] == UNCHECKED:
            _get_grad_norm = Trainer._get_grad_norm

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Clock())

    component.train.trainer.LoRATrainer = Watched
    sys.argv = ["train_qlora.py", "--train_args_file", str(folder / "settings.json")]
    runpy.run_path(str(ROOT / "train_qlora.py"), run_name="__main__")


if __name__ == "__main__":
    main()
