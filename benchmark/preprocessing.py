"""Measure rows per second and memory of preparing data, beside plain preprocessing: one process, message by message.

python benchmark/preprocessing.py --data FILE --model FOLDER [--rows 1000000]

The rows of FILE are repeated to the number asked for, each with a number of its own. Memory is the sum over all
processes of their proportional set size, which counts a shared page once.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoTokenizer

import component.chatglm  # noqa: F401  registers ChatGLM with the Auto classes
from component.data.dataset import select_dataset
from component.data.formats import parse_row
from component.data.reader import read_rows

PLAIN_ROWS = 20_000


class MemoryWatch(threading.Thread):
    """Watches the sum of the proportional set sizes of this process and its children; `highest` is in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest = 0.0
        self.start()

    def run(self) -> None:
        own = os.getpid()
        while True:
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            self.highest = max(self.highest, sum(map(proportional_size, [own, *children])))
            time.sleep(0.5)


def proportional_size(process: int | str) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a folder whose name holds chatglm3, say")
    parser.add_argument("--rows", type=int, default=1_000_000)
    cli = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(cli.model)
    make = select_dataset(cli.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        samples = [row for _, row in read_rows(cli.data)]
        with open(file, "w", encoding="utf-8") as out:
            for number, row in zip(range(cli.rows), itertools.cycle(samples)):
                out.write(json.dumps(row | {"number": number}, ensure_ascii=False) + "\n")

        started = time.perf_counter()
        for _, row in itertools.islice(read_rows(file), PLAIN_ROWS):
            make.render(parse_row(row), tokenizer)
        plain = min(PLAIN_ROWS, cli.rows) / (time.perf_counter() - started)

        watch = MemoryWatch()
        started = time.perf_counter()
        dataset = make(file, tokenizer, 1 << 20, cache_dir=folder)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        make(file, tokenizer, 1 << 20, cache_dir=folder)
        again = time.perf_counter() - started

    size = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in samples) / len(samples)
    print(f"{len(dataset):,} rows of {size:,.0f} bytes, {dataset.store.report.tokens:,} tokens, {os.cpu_count()} cores")
    print(f"plain, one process     {plain:>10,.0f} rows/s")
    print(f"prepared               {len(dataset) / seconds:>10,.0f} rows/s, {len(dataset) / seconds / plain:.2f} times")
    print(f"peak memory            {watch.highest:>10,.0f} MiB")
    print(f"second start           {again:>10.2f} s, of which hashing {size * len(dataset) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
