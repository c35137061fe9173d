"""Files of rows to token ids, once: read, checked and rendered by several processes, kept in flat files.

A store's folder holds `input_ids.bin` (int32) and `target_mask.bin` (uint8) of all samples end to end, `ends.bin`
(int64: where each sample ends), `lines.bin` (int64: file number and line of each, see PLACE_BITS), `notes.bin` (uint8:
see NOTES), `report.json` and `rejected.jsonl`.
"""

import gc
import itertools
import json
import os
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from loguru import logger

from .conversation import Conversation, DataError, choose_learned, count_rounds, oddities, without_first_rounds
from .formats import parse_row
from .reader import Unreadable, parse_line, read_lines
from .template import Sample

CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 20  # what a process gets at a time, whichever is reached first
PARALLEL_FROM = 4 << 20  # bytes of input; below, starting processes costs more than they save
SHOWN = 20  # faults in an error message
PLACE_BITS = 40  # of a place, the low ones that hold the line; those above hold the file's number
FILES = {"input_ids": np.int32, "target_mask": np.uint8, "ends": np.int64, "lines": np.int64, "notes": np.uint8}
ESCAPE = "backslashreplace"  # for files' names that are not UTF-8

CUT, SHORTENED, DROPPED = "cut", "early turns dropped", "too long, dropped"
NOTES = (None, CUT, SHORTENED)  # what `notes.bin` counts through


@dataclass(frozen=True)
class DataRules:
    """What is done with rows; docs/configuration.md explains each."""

    max_seq_length: int
    on_too_long: str = "truncate"
    loss_on: str = "flagged"
    on_bad_row: str = "stop"
    max_bad_share: float = 0.1
    strict_roles: bool = False


@dataclass
class DataReport:
    """What was found in a source. `notes` and `odd`: kind to [rows, place of the first]."""

    rows: int = 0
    turns: int = 0
    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0  # in tokens
    bad: int = 0
    faults: list[str] = field(default_factory=list)  # the first SHOWN
    notes: dict[str, list] = field(default_factory=dict)  # CUT, SHORTENED, DROPPED
    odd: dict[str, list] = field(default_factory=dict)  # what is unusual but legal

    def fault_lines(self) -> list[str]:
        """The first SHOWN, and how many there are beside."""
        more = self.bad - len(self.faults)
        return [*self.faults, *([f"… and {more} more"] if more else [])]

    def count(self, kind: str) -> int:
        return self.notes.get(kind, [0])[0]


class RowRenderer:
    """One line of a file to a sample that fits.

    Args:
        render: of component.template.
    """

    def __init__(self, render: Callable, tokenizer, rules: DataRules):
        self.render, self.tokenizer, self.rules = render, tokenizer, rules

    def parse(self, raw: bytes | DataError) -> tuple[Conversation, list[str]]:
        """The conversation, and what is unusual in it. Raises DataError, without a place, for a bad row."""
        if isinstance(raw, DataError):
            raise raw
        conversation = choose_learned(parse_row(parse_line(raw)), self.rules.loss_on)
        odd = list(oddities(conversation))
        if odd and self.rules.strict_roles:
            raise DataError(f"{odd[0]}; mend the row, or set strict_roles to false")
        return conversation, odd

    def fit(self, conversation: Conversation) -> tuple[Sample | None, str | None]:
        """A sample of at most `max_seq_length` tokens, or None; and CUT, SHORTENED or DROPPED."""
        limit, note = self.rules.max_seq_length, None
        sample = self.render(conversation, self.tokenizer)
        if len(sample.input_ids) > limit:
            if self.rules.on_too_long == "drop":
                return None, DROPPED
            if self.rules.on_too_long == "truncate_left_turns" and count_rounds(conversation) > 1:
                sample, note = self.render(self.shorten(conversation), self.tokenizer), SHORTENED
            if len(sample.input_ids) > limit:
                note = CUT
                sample = Sample(sample.input_ids[:limit], sample.target_mask[:limit])
        # Nothing predicts the first token, so learning starts at the second.
        return (sample, note) if any(sample.target_mask[1:]) else (None, DROPPED)

    def shorten(self, conversation: Conversation) -> Conversation:
        """Without as many early rounds as must go; the last one stays."""

        def fits(gone: int) -> bool:
            return len(self.render(without_first_rounds(conversation, gone), self.tokenizer).input_ids) <= limit

        limit = self.rules.max_seq_length
        gone = bisect_left(range(1, count_rounds(conversation) - 1), True, key=fits) + 1
        return without_first_rounds(conversation, gone)


class TokenStore:
    """The samples of a folder that `prepare` filled, memory-mapped. `ends[i]` is where sample i ends."""

    def __init__(self, folder: Path):
        if not folder.is_dir():  # a process on another machine
            raise DataError(f"{folder}: not there; set cache_dir to a folder that all machines share")
        self.folder = folder
        try:
            self.report = DataReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
            for name, dtype in FILES.items():
                path = folder / f"{name}.bin"
                setattr(self, name, np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype))
            tokens, kept = self.report.tokens, self.report.kept
            sizes = [len(getattr(self, name)) for name in FILES]
            if [*sizes, *self.ends[-1:]] != [tokens] * 2 + [kept] * 3 + [tokens] * bool(kept):
                raise ValueError("its files do not fit one another")
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: damaged; delete it, and it will be made anew ({error})") from error

    def __reduce__(self):
        return TokenStore, (self.folder,)  # to another process goes the folder's name, not the data

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, target_mask) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return self.input_ids[part], self.target_mask[part]

    def place(self, index: int) -> tuple[int, int]:
        """(number of the file, line) of a sample."""
        return divmod(int(self.lines[index]), 1 << PLACE_BITS)


def prepare(files: list[Path], renderer: RowRenderer, workers: int, folder: Path) -> None:
    """Fill `folder` for a TokenStore.

    Raises:
        DataError: bad rows with `on_bad_row: stop`: the first SHOWN, and how many; or else an unreadable file.
    """
    report = DataReport()
    started = told = time.monotonic()
    stops = renderer.rules.on_bad_row == "stop"
    workers = workers if sum(file.stat().st_size for file in files) > PARALLEL_FROM else 1
    with ExitStack() as stack:
        rejected = stack.enter_context(open(folder / "rejected.jsonl", "w", encoding="utf-8", errors=ESCAPE))
        outputs = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in FILES}
        # Once a row is bad and the run will stop, the rest is checked and no more rendered.
        tasks = ((renderer, chunk, not (stops and report.bad)) for chunk in chunks(read_files(files, not stops)))
        for outcome in in_order(render_chunk, tasks, workers):
            for name in FILES:
                values = getattr(outcome, name)
                outputs[name].write(values + report.tokens if name == "ends" else values)
            for number, line, reason, text in outcome.rejected:
                entry = {"file": str(files[number]), "line": line, "reason": reason, "row": text}
                rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
            add(report, outcome, files)
            if (now := time.monotonic()) > told + 10:
                told = now
                logger.info(f"{report.rows:,} rows prepared, {report.rows / (now - started):,.0f} rows/s")
    if report.bad and stops:
        judge(report, files, renderer.rules)
    (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), "utf-8", errors=ESCAPE)


def judge(report: DataReport, files: list[Path], rules: DataRules) -> None:
    """Raise DataError where a run should not start: bad rows that are to stop it, bad or dropped ones above
    `max_bad_share`, or no sample."""
    name = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if report.bad and rules.on_bad_row == "stop":
        head = f"{name}: {report.bad} bad rows of {report.rows}; mend them, or set on_bad_row to skip"
        raise DataError("\n".join([head, *report.fault_lines()]))
    lost = report.bad + report.count(DROPPED)
    if not report.rows:
        raise DataError(f"{name}: nothing to learn: the file has no rows")
    if not report.kept:
        at = f"no learned token survives max_seq_length={rules.max_seq_length}" if report.notes else "every row is bad"
        raise DataError("\n".join([f"{name}: nothing to learn: {at}", *report.fault_lines()]))
    if lost > rules.max_bad_share * report.rows:
        raise DataError(
            f"{name}: {report.bad} rows are bad and {report.count(DROPPED)} too long, of {report.rows}: more than "
            f"max_bad_share={rules.max_bad_share:g}; mend them, raise max_seq_length={rules.max_seq_length}, or raise "
            "max_bad_share" + "".join(f"\n{fault}" for fault in report.fault_lines())
        )


@dataclass
class Outcome:
    """What became of a chunk. `ends` counts from the chunk's start."""

    input_ids: np.ndarray
    target_mask: np.ndarray
    ends: np.ndarray
    lines: np.ndarray
    notes: np.ndarray
    rows: int
    turns: int
    rejected: list[tuple[int, int, str, str]]  # file number, line, reason, text
    fitted: list[tuple[int, int, str]]  # file number, line, and CUT, SHORTENED or DROPPED
    odd: list[tuple[int, int, str]]

    @property
    def longest(self) -> int:
        return int(np.diff(self.ends, prepend=0).max(initial=0))


Chunk = list[tuple[int, int, bytes | DataError]]  # file number, line, row


def read_files(files: list[Path], skips: bool) -> Iterator[tuple[int, int, bytes | DataError]]:
    """Raises DataError for a file that cannot be read on, if bad rows are skipped: its rest is not known to be bad."""
    for number, file in enumerate(files):
        for line, raw in read_lines(file):
            if skips and isinstance(raw, Unreadable):
                raise DataError(f"{file}:{line}: {raw}")
            yield number, line, raw


def chunks(rows: Iterable[tuple[int, int, bytes | DataError]]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for number, line, raw in rows:
        chunk.append((number, line, raw))
        size += len(raw) if isinstance(raw, bytes) else 0
        if len(chunk) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def render_chunk(task: tuple[RowRenderer, Chunk, bool]) -> Outcome:
    """Parse, and if the task's last part says so render, the rows of a chunk."""
    renderer, chunk, renders = task
    ids, mask = array("i"), bytearray()  # which grow from lists faster than numpy makes an array of one
    ends, lines, notes, rejected, fitted, odd = [], [], bytearray(), [], [], []
    turns = 0
    for number, line, raw in chunk:
        try:
            conversation, unusual = renderer.parse(raw)
            sample, note = renderer.fit(conversation) if renders else (None, None)
        except DataError as error:
            text = "" if isinstance(raw, DataError) else raw.decode(errors="backslashreplace").strip()
            rejected.append((number, line, str(error), text))
            continue
        turns += len(conversation.turns)
        odd += [(number, line, what) for what in unusual]
        fitted += [(number, line, note)] if note else []
        if sample:
            ids.fromlist(sample.input_ids)
            mask += bytes(sample.target_mask)
            ends.append(len(ids))
            lines.append((number << PLACE_BITS) + line)
            notes.append(NOTES.index(note))
    arrays = [np.frombuffer(ids, np.int32), np.frombuffer(mask, np.uint8), np.array(ends, int), np.array(lines, int)]
    return Outcome(*arrays, np.frombuffer(notes, np.uint8), len(chunk), turns, rejected, fitted, odd)


def add(report: DataReport, outcome: Outcome, files: list[Path]) -> None:
    """Count a chunk's outcome in the report."""
    report.rows += outcome.rows
    report.turns += outcome.turns
    report.kept += len(outcome.ends)
    report.tokens += len(outcome.input_ids)
    report.longest = max(report.longest, outcome.longest)
    report.learned += int(outcome.target_mask.sum())
    report.bad += len(outcome.rejected)
    for number, line, reason, _ in outcome.rejected[: SHOWN - len(report.faults)]:
        report.faults.append(f"{files[number]}:{line}: {reason}")
    for totals, found in ((report.notes, outcome.fitted), (report.odd, outcome.odd)):
        for number, line, what in found:
            totals.setdefault(what, [0, f"{files[number]}:{line}"])[0] += 1


def in_order(work: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """`map(work, tasks)` by several processes, with few tasks in flight, so that memory stays small.

    The processes are forks, as a DataLoader's are: what the first of every task is, they have without copying.
    """
    if workers < 2:
        yield from map(work, tasks)
        return
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    shared = first[0]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(workers, get_context("fork"), share, (work, shared)) as pool:
        waiting: deque = deque()
        try:
            for _, *rest in itertools.chain([first], tasks):
                waiting.append(pool.submit(work_on, rest))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that prepares the data was killed, perhaps for want of memory; lower preprocessing_workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def share(work: Callable, shared: object) -> None:
    global work_on_shared
    Thread(target=end_with_parent, daemon=True).start()
    gc.freeze()  # what the fork has from its parent need never be looked through
    work_on_shared = lambda rest: work((shared, *rest))  # noqa: E731


def end_with_parent() -> None:
    """A parent that was killed cannot end its pool, whose processes would wait for work for ever."""
    parent_process().join()
    os._exit(1)


def work_on(rest: list):
    return work_on_shared(rest)
