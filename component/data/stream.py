"""A dataset whose rows are read and rendered while the run trains."""

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from loguru import logger
from torch.utils.data import IterableDataset, get_worker_info

from ..run.errors import DataError
from .dataset import Source
from .prepare import RowRenderer, as_item, check_tokenizer
from .reader import Mark, Unreadable, find_files, read_from
from .rules import DROPPED, DataReport, DataRules, count_kind, judge, judge_share, kind_of, log_report

SHUFFLE_BUFFER = 1000  # rows of a block; rows are shuffled within their block
BLOCK_BYTES = 64 << 20  # a block ends early when it exceeds these, so that long rows fit in memory
CHECKED_FIRST = 1000  # rows of a source that are checked before anything expensive starts


class Block(NamedTuple):
    """The place where a block of rows begins."""

    pass_number: int
    number: int  # of the block in its pass
    starts: tuple[tuple[int, Mark], ...]  # for each source: the number of a file, and the place in it


class SourceRow(NamedTuple):
    """A row as it was read, and the place in its file after it."""

    source: int
    file: int
    mark: Mark
    raw: bytes | DataError

    @property
    def key(self) -> tuple[int, int, int]:
        return self.source, self.file, self.mark.rows


@dataclass(frozen=True)
class RenderedRow:
    """The result of rendering a row: a sample, or the note DROPPED, or the reason why the row is bad.

    A sample has `input_ids` (length,) int32, `target_mask` (length,) uint8 (1: this token is learned) and `place`.
    """

    key: tuple[int, int, int]  # numbers of source, file and row
    place: str  # file:line
    sample: dict[str, np.ndarray | str] | None = None
    note: str | None = None  # CUT, SHORTENED or DROPPED
    odd: tuple[str, ...] = ()  # what is unusual but legal
    reason: str | None = None
    fatal: bool = False  # the file cannot be read from here on


@dataclass(frozen=True, kw_only=True)
class StreamedRow(RenderedRow):
    """A row with its place in the stream."""

    number: int  # counted over the whole stream, from 0
    block: Block
    position: int  # in the block, after shuffling


class StreamingSFTDataset(IterableDataset):
    """Dataset whose rows are read, checked and rendered as they are needed, pass after pass without end. Nothing is
    kept on disk.

    A pass consists of blocks of SHUFFLE_BUFFER rows, and reads each source in order. Seed, pass and block decide from
    which source each row of a block is drawn, by weight, and how the block is shuffled. A pass ends when the first
    source does. So the rows and their order follow from the seed and the place alone.

    Iterating begins at the dataset's place and yields every `ranks`-th row, those of `rank`. A DataLoader (with
    batch_size=None) merges its workers' rows in the same order. Every process reads all rows, and renders only its own.
    Iterating does not move the place; `take` does, once rows are used.

    The first CHECKED_FIRST rows of each source are checked when the dataset is made. A bad row that comes later is left
    out, whatever `on_bad_row` says, and does not end the run. `take` lists what does.

    Args:
        sources, weights: one weight for each source.
        render: a renderer of component.data.render or component.data.chat_template.
        check: False leaves out the check of the first rows, for a run that continues from a checkpoint.

    Raises:
        DataError: the first rows are bad or dropped, by the same rules as for files.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float],
        render,
        tokenizer,
        rules: DataRules,
        seed: int,
        *,
        check: bool = True,
    ):
        self.files = [find_files(source) for source in sources]
        self.weights, self.seed = weights, seed
        self.renderer = RowRenderer(render, check_tokenizer(tokenizer, render), rules)
        self.rank, self.ranks = 0, 1
        self.block, self.position = self.first_block(pass_number=0), 0
        self.report = DataReport()  # of the rows that were taken
        self.kept_before = 0  # samples before this pass
        self.checked: dict[tuple[int, int, int], RenderedRow] = {}  # the first rows, until they are used
        self.told: set[str] = set()  # kinds of faults, notes and oddities that the check has logged
        for source in range(len(self.files) if check else 0):
            self.check_first(source)

    def __getstate__(self) -> dict:
        """State without the checked rows, which are too large to send to other ranks. Those render them again."""
        return self.__dict__ | {"checked": {}}

    def check_first(self, source: int) -> None:
        report, rules = DataReport(), self.renderer.rules
        for row in islice(self.read_source(source, 0, Mark()), CHECKED_FIRST):
            rendered = self.checked[row.key] = self.render(row)
            if rendered.fatal and rules.on_bad_row == "skip":
                raise fatal(rendered)
            count_row(report, rendered)
        judge(report, self.files[source], rules)
        log_report(report, self.files[source], rules)
        self.told |= report.faults.keys() | report.notes.keys() | report.odd.keys()

    def first_block(self, pass_number: int) -> Block:
        return Block(pass_number, 0, tuple((0, Mark()) for _ in self.files))

    def first_sample(self) -> dict[str, list[int]]:
        """First sample from the dataset's place on, in the form of an item of SFTDataset, for a person to look at."""
        sample = next(row.sample for row in self if row.sample)
        return as_item(sample["input_ids"].tolist(), sample["target_mask"].tolist())

    def __iter__(self) -> Iterator[StreamedRow]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        rows = islice(self.read_shuffled(self.block), self.position, None)
        return self.render_share(rows, self.report.rows, self.ranks * workers, self.rank + self.ranks * own)

    def render_share(self, rows, first: int, count: int, own: int) -> Iterator[StreamedRow]:
        """Render every `count`-th of `rows`, from index `own` on. The row at index 0 is row `first` of the stream."""
        for index, (block, position, row) in enumerate(rows):
            known = self.checked.pop(row.key, None)
            if index % count == own:
                yield StreamedRow(
                    **vars(known or self.render(row)), number=first + index, block=block, position=position
                )

    def read_shuffled(self, block: Block) -> Iterator[tuple[Block, int, SourceRow]]:
        """Yield (block, position in it, row) from the beginning of a block on, without end."""
        while True:
            readers = [self.read_source(source, *start) for source, start in enumerate(block.starts)]
            ended = False
            while not ended:
                draw = random.Random(f"{self.seed} {block.pass_number} {block.number}")
                rows, ended = self.draw_rows(draw, readers)
                if not rows and block.number == 0:  # otherwise empty passes would follow one another for ever
                    rows = [SourceRow(0, 0, Mark(1, 1), Unreadable("nothing to learn: the file has no rows"))]
                starts = dict(enumerate(block.starts)) | {row.source: (row.file, row.mark) for row in rows}
                draw.shuffle(rows)
                for position in range(len(rows)):
                    yield block, position, rows.pop()
                block = Block(block.pass_number, block.number + 1, tuple(starts.values()))
            block = self.first_block(block.pass_number + 1)

    def draw_rows(self, draw: random.Random, readers: list[Iterator[SourceRow]]) -> tuple[list[SourceRow], bool]:
        """Draw the rows of a block, in the order of reading. Also returns whether the pass ends with them."""
        rows, size = [], 0
        for source in draw.choices(range(len(readers)), self.weights, k=SHUFFLE_BUFFER):
            row = next(readers[source], None)
            if row is None:
                return rows, True
            rows.append(row)
            size += len(row.raw) if isinstance(row.raw, bytes) else 0
            if size > BLOCK_BYTES:
                break
        return rows, False

    def read_source(self, source: int, file: int, mark: Mark) -> Iterator[SourceRow]:
        """Yield a source's rows from a mark in one of its files on."""
        for number, path in enumerate(self.files[source][file:], file):
            for after, raw in read_from(path, mark if number == file else Mark()):
                yield SourceRow(source, number, after, raw)

    def render(self, row: SourceRow) -> RenderedRow:
        place = f"{self.files[row.source][row.file]}:{row.mark.line}"
        try:
            conversation, odd = self.renderer.parse(row.raw)
            fitted, note = self.renderer.fit_to_length(conversation)
        except DataError as error:
            return RenderedRow(row.key, place, reason=str(error), fatal=isinstance(error, Unreadable))
        sample = None
        if fitted:
            ids, mask = np.array(fitted.input_ids, np.int32), np.array(fitted.target_mask, np.uint8)
            sample = {"input_ids": ids, "target_mask": mask, "place": place}
        return RenderedRow(row.key, place, sample, note, tuple(odd))

    def take(self, rows: list[StreamedRow]) -> None:
        """Count rows as used, and move the place behind them. Every rank passes the rows of all ranks, in order.

        Rows that are bad, cut, dropped or odd are logged: the first of each kind at once, and the number of each kind
        after the first pass.

        Raises:
            DataError: a file cannot be read any further; more than `max_bad_share` of the rows are bad or dropped, once
                there are more than CHECKED_FIRST; or a whole pass had no sample.
            ValueError: a row is not the next one of the stream.
        """
        for row in rows:
            if row.number != self.report.rows:
                raise ValueError(f"row {row.number} of the stream is taken where row {self.report.rows} should be")
            if row.fatal:
                raise fatal(row)
            if row.block.pass_number > self.block.pass_number:
                self.end_pass()
            self.checked.pop(row.key, None)
            for what in count_row(self.report, row):
                if kind_of(what) not in self.told:
                    self.tell_first(row, what)
            self.block, self.position = row.block, row.position + 1
            if self.report.rows > CHECKED_FIRST:
                judge_share(self.report, row.place, self.renderer.rules)

    def tell_first(self, row: StreamedRow, what: str) -> None:
        limit = f" (max_seq_length={self.renderer.rules.max_seq_length})" if what == row.note else ""
        text = f"left out, as all like it: {what}" if row.reason else f"{what}{limit}; rows like it are only counted"
        logger.warning(f"{row.place}: {text}")

    def end_pass(self) -> None:
        """Log what was found in the first pass. Raises DataError where the pass had no sample."""
        report, files = self.report, list(chain.from_iterable(self.files))
        if report.kept == self.kept_before:
            head = f"{files[0]}: nothing to learn: a whole pass had no sample; of {report.rows} rows {report.bad} are "
            head += f"bad and {report.count_notes(DROPPED)} too long; mend the data, or raise max_seq_length="
            raise DataError("\n".join([f"{head}{self.renderer.rules.max_seq_length}", *report.fault_lines()]))
        if self.block.pass_number == 0:
            log_report(report, files, self.renderer.rules)
        self.kept_before = report.kept

    def state_dict(self) -> dict:
        """The place, and the findings before it, as values for JSON."""
        return {
            "pass": self.block.pass_number,
            "block": self.block.number,
            "starts": [[file, *mark] for file, mark in self.block.starts],
            "position": self.position,
            "kept_before": self.kept_before,
            "report": asdict(self.report),  # whose `rows` is the number of rows taken
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state that was saved with the same sources, weights, rules and seed.

        Raises:
            DataError: the state has another number of sources.
        """
        starts = tuple((file, Mark(*mark)) for file, *mark in state["starts"])
        if len(starts) != len(self.files):
            raise DataError(
                f"the stream was begun with {len(starts)} sources and has {len(self.files)} now; give those that it "
                "was begun with, or begin anew"
            )
        self.block, self.position = Block(state["pass"], state["block"], starts), state["position"]
        self.kept_before, self.report = state["kept_before"], DataReport(**deepcopy(state["report"]))


def count_row(report: DataReport, row: RenderedRow) -> list[str]:
    """Add a row to the report, except for its turns and calls.

    Returns:
        The row's faults, notes and oddities whose kinds are new to the report.
    """
    report.rows += 1
    report.bad += row.reason is not None
    if row.sample:
        tokens = len(row.sample["input_ids"])
        report.kept += 1
        report.tokens += tokens
        report.longest = max(report.longest, tokens)
        report.learned += int(row.sample["target_mask"].sum())
    found = [(report.faults, row.reason), (report.notes, row.note), *((report.odd, what) for what in row.odd)]
    return [what for totals, what in found if what is not None and count_kind(totals, row.place, what) == 1]


def fatal(row: RenderedRow) -> DataError:
    return DataError(f"{row.place}: {row.reason}")
