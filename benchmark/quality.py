"""Teach a small real model to call functions, many times over, and score it: the figures of docs/quality.md.

python benchmark/quality.py --model FOLDER --calls FOLDER --chat FOLDER --output FOLDER [--gpus 4] [--at_once 2]

Each experiment trains an adapter and scores it beside its base by script/score.py: ours and plain PEFT's Trainer
(benchmark/plain_peft.py) with the same rows and settings; a base in 4 bits and in 16; 250 rows to all; and, for the
seeds of the main experiment, every way to merge. The rows are calls of functions, with plain questions mixed in, beside
which the same functions are offered and none is wanted.

--model is a folder of a model with ChatML's control tokens, such as SmolLM2-135M-Instruct. --calls holds OpenAI rows,
train.jsonl.gz and validate.jsonl.gz. --chat holds files of chatterbot-corpus, *.yml. Rows of `dev` come from train;
those of `test`, which are validate's, are scored once, at the end. Experiments that are done are not run again. At the
end, or with --tables at once, the tables of all that is done are printed.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark.common import table
from component.score.statistics import Estimate, Ratio, bootstrap

SETTINGS = {
    "data_format": "chat_template",
    "chat_template": "chatml",
    "max_seq_length": 1536,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.03,
    "max_grad_norm": 0.3,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "optim": "paged_adamw_32bit",
    "activation_checkpointing": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "disable_tqdm": True,
}
DEV, DEV_CHAT, TEST_CHAT = 300, 60, 60
CHAT_SHARE = 0.1  # plain questions for each call, as far as there are any
MAIN = 4000  # calls of the main experiment


class Experiment(NamedTuple):
    program: str  # ours or peft
    calls: int  # rows of calls that are seen
    bits: int  # of the base
    seed: int
    is_merged: bool = False  # whether its merges are scored, too

    @property
    def name(self) -> str:
        return f"{self.program}-{self.calls}-{self.bits}bit-seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--chat", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 1000, MAIN, 13_484], help="rows of calls")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at_once", type=int, default=1, help="experiments on one GPU")
    parser.add_argument("--limit", type=int, help="score that many questions of each file")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    cli = parser.parse_args()
    if not cli.tables:
        run_all(cli)
    print_tables(cli.output, list_experiments(cli))


def run_all(cli: argparse.Namespace) -> None:
    cli.output.mkdir(parents=True, exist_ok=True)
    make_data(cli)
    slots: Queue = Queue()
    for i in range(cli.gpus + (cli.gpus - 1 or 1) * (cli.at_once - 1)):  # the first GPU is kept for the longest
        slots.put(i if i < cli.gpus else (i - cli.gpus) % (cli.gpus - 1 or 1) + (cli.gpus > 1))

    def work(experiment: Experiment) -> str:
        gpu = slots.get()
        try:
            return run(experiment, gpu, cli)
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(slots.qsize()) as pool:
        for line in pool.map(work, list_experiments(cli)):
            print(line, flush=True)


def list_experiments(cli: argparse.Namespace) -> list[Experiment]:
    """All experiments, those that take longest first. The largest size has one seed."""
    main = MAIN if MAIN in cli.sizes else max(cli.sizes)
    runs = [Experiment("ours", max(cli.sizes), 4, cli.seeds[0])] * (main < max(cli.sizes))
    runs += [Experiment("peft", main, 4, seed) for seed in cli.seeds]
    runs += [Experiment("ours", main, bits, seed, bits == 4) for bits in (4, 16) for seed in cli.seeds]
    others = sorted(set(cli.sizes) - {main, max(cli.sizes)}, reverse=True)
    return runs + [Experiment("ours", size, 4, seed) for size in others for seed in cli.seeds]


def make_data(cli: argparse.Namespace) -> None:
    """Write dev.jsonl, test.jsonl, and train-N.jsonl for each size; a smaller one is the beginning of a larger one."""
    calls, test = (read_lines(cli.calls / f"{name}.jsonl.gz") for name in ("train", "validate"))
    tools = calls[0]["tools"]
    chat = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "tools": tools}
        for question, answer in read_chat(cli.chat)
    ]
    shuffle = random.Random(17).shuffle
    shuffle(calls)
    shuffle(chat)
    dev, calls = calls[:DEV] + chat[:DEV_CHAT], calls[DEV:]
    test, chat = test + chat[DEV_CHAT : DEV_CHAT + TEST_CHAT], chat[DEV_CHAT + TEST_CHAT :]
    write_lines(cli.output / "dev.jsonl", dev)
    write_lines(cli.output / "test.jsonl", test)
    for size in cli.sizes:
        print(f"{size} calls and {min(int(size * CHAT_SHARE), len(chat))} plain questions")
        write_lines(cli.output / f"train-{size}.jsonl", calls[:size] + chat[: int(size * CHAT_SHARE)])


def read_lines(file: Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_chat(folder: Path) -> list[tuple[str, str]]:
    """Questions with their first answers; files with fewer than 1,000 lines, which are everyday talk."""
    pairs = {}
    for file in sorted(folder.glob("*.yml")):
        text = file.read_text(encoding="utf-8")
        if text.count("\n") < 1000:
            for question, answer, *_ in (talk for talk in yaml.safe_load(text)["conversations"] if len(talk) > 1):
                if str(question).strip() and str(answer).strip():
                    pairs.setdefault(str(question).strip(), str(answer).strip())
    return list(pairs.items())


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(experiment: Experiment, gpu: int, cli: argparse.Namespace) -> str:
    """Train and score on one GPU, and return a line that tells of it."""
    folder = cli.output / experiment.name
    folder.mkdir(exist_ok=True)
    settings = SETTINGS | {
        "model_name_or_path": str(cli.model.resolve()),
        "train_file": str((cli.output / f"train-{experiment.calls}.jsonl").resolve()),
        "output_dir": str(folder.resolve() / "run"),
        "seed": experiment.seed,
    }
    program = ROOT / ("train_qlora.py" if experiment.program == "ours" else "benchmark/plain_peft.py")
    settings |= {"base_bits": experiment.bits} if experiment.program == "ours" else {}
    (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    adapter = folder / "run/final"
    seconds = [0.0, 0.0]
    if not adapter.exists():
        seconds[0] = execute([str(program), "--train_args_file", str(folder / "settings.json")], folder, "train", gpu)
    for data in ("dev", "test"):
        figures = folder / f"{data}.json"
        if not figures.exists():
            words = ["--adapter", str(adapter), "--data", str(cli.output / f"{data}.jsonl"), "--json", str(figures)]
            words += ["--base_bits", str(experiment.bits)] if experiment.program == "peft" else []
            words += ["--limit", str(cli.limit)] if cli.limit else []
            if data == "dev" and experiment.is_merged:
                words += ["--variants", "trained,merged,full,requantised"]
            seconds[1] += execute([str(ROOT / "script/score.py"), *words], folder, f"score-{data}", gpu)
    return f"{experiment.name}: trained in {seconds[0]:.0f} s, scored in {seconds[1]:.0f} s"


def execute(words: list[str], folder: Path, name: str, gpu: int) -> float:
    """Run a program of ours, its output in NAME.log, and return the seconds that it took."""
    began = time.monotonic()
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"{name} of {folder.name} ended with {done.returncode}; see {log.name}")
    return time.monotonic() - began


class Scores:
    """What the seeds of one experiment were scored, on one file.

    Args:
        folders: of the experiments, which differ in their seed alone.
    """

    def __init__(self, folders: list[Path], data: str, model: str = "tuned"):
        self.reports = [json.loads((folder / f"{data}.json").read_text(encoding="utf-8")) for folder in folders]
        self.model = model

    def share(self, wants_call: bool, is_right) -> Ratio:
        """The share of questions of one kind that are answered right, by question and over the seeds."""
        by_seed = []
        for report in self.reports:
            asked = [answer for answer in report["answers"] if bool(answer["expected"]["calls"]) is wants_call]
            by_seed.append([float(is_right(answer["expected"], answer["given"][self.model])) for answer in asked])
        return Ratio(np.mean(by_seed, axis=0), np.ones(len(by_seed[0])))

    @property
    def exact(self) -> Ratio:
        return self.share(True, lambda expected, given: not given["fault"])

    @property
    def needless(self) -> Ratio:
        return self.share(False, lambda expected, given: bool(given["calls"]) or bool(given["unreadable"]))

    @property
    def named(self) -> Ratio:
        return self.share(True, lambda expected, given: names_of(expected) == names_of(given))

    def mean(self, name: str) -> str:
        """A loss as the seeds' mean and, of several seeds, the smallest and the largest."""
        lines = (line for report in self.reports for line in report["figures"] + report["unrelated_text"])
        values = [line["values"][self.model]["value"] for line in lines if line["name"] == name]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"

    def row(self, name: str) -> list[str]:
        shares = [percent(bootstrap(share)) for share in (self.exact, self.named, self.needless)]
        return [name, *shares, *map(self.mean, LOSSES)]


LOSSES = ("loss per token", "loss per token, Chinese", "loss per token, English")
COLUMNS = ("model", "calls exact", "function right", "needless calls", "loss, these rows", "unrelated, Chinese")
COLUMNS += ("unrelated, English",)


def names_of(answer: dict) -> list[str]:
    return sorted(call["name"] for call in answer["calls"])


def percent(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (100 * part for part in estimate)
    interval = "" if np.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{value:{sign}.1f}%{interval}"


def print_tables(output: Path, experiments: list[Experiment]) -> None:
    """Print what was scored: all experiments on test, and the merges on dev."""
    groups: dict[tuple, list[Path]] = {}
    for program, calls, bits, seed, is_merged in experiments:
        folder = output / Experiment(program, calls, bits, seed).name
        if (folder / "test.json").exists():
            groups.setdefault((program, calls, bits, is_merged), []).append(folder)
    if not groups:
        return
    scores = {key: Scores(folders, "test") for key, folders in groups.items()}
    rows = [
        Scores(folders[:1], "test", "base").row("base, 4 bits") for (*_, merged), folders in groups.items() if merged
    ]
    rows += [
        scores[key].row(f"{key[0]}, {key[1]:,} calls, {key[2]} bits, {len(groups[key])} seeds")
        for key in sorted(groups)
    ]
    print(f"\nOn {len(next(iter(scores.values())).exact.parts)} questions of test that want a call:\n")
    print(table(COLUMNS, rows))
    for (program, calls, bits, is_merged), folders in groups.items():
        if not is_merged:
            continue
        mine = scores[program, calls, bits, is_merged]
        for other in (("peft", calls, 4, False), ("ours", calls, 16, False)):
            if other in scores:
                difference = percent(bootstrap(mine.exact, scores[other].exact), "+")
                print(f"\nours in 4 bits - {other[0]} in {other[2]} bits, calls exact: {difference}")
        dev = {name: Scores(folders, "dev", name) for name in Scores(folders, "dev").reports[0]["models"]}
        print("\nMerges, on dev:\n")
        against = {name: percent(bootstrap(score.exact, dev["tuned"].exact), "+") for name, score in dev.items()}
        columns = (*COLUMNS[:2], "- tuned", *COLUMNS[2:])
        lines = [score.row(name) for name, score in dev.items()]
        print(table(columns, [[*line[:2], against[line[0]], *line[2:]] for line in lines]))


if __name__ == "__main__":
    main()
