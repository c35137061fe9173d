"""Rows that are read and rendered while the run trains."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from loguru import logger
from torch.utils.data import IterableDataset, get_worker_info

from ..run.errors import DataError
from .dataset import Source
from .prepare import RowRenderer, as_item, check_tokenizer, chunks, count_outcome, read_files, render_chunk
from .reader import find_files
from .rules import DataReport, DataRules, count_kind, judge, log_report

SHUFFLE_BUFFER = 1000  # samples of a stream among which the next is drawn
CHECKED_FIRST = 1000  # rows of a stream that are checked before anything expensive starts


class StreamingSFTDataset(IterableDataset):
    """Rows read, checked and rendered as they are needed, shuffled within a buffer; nothing is kept on disk.

    The first CHECKED_FIRST rows are checked when it is made. A bad row that comes later is logged and left out,
    whatever `on_bad_row` says, so that it does not end a run; more than `max_bad_share` of them do, and so does a file
    that cannot be read on. Several sources are drawn from by weight, and a pass ends with the first of them that does.

    A process reads every row and renders its share: of `ranks`, and of a loader's workers. One whose share is empty
    renders all, if the stream is endless.

    Args:
        endless: pass after pass, each with another order, so that a place in the stream is a number of samples.
        sources, weights: one weight for each source.
        render: of component.data.render and component.data.chat_template.
    """

    def __init__(
        self, sources: list[Source], weights: list[float], render, tokenizer, rules: DataRules, seed: int, endless=False
    ):
        self.endless = endless
        self.files = [find_files(source) for source in sources]
        self.weights = weights
        self.renderer = RowRenderer(render, check_tokenizer(tokenizer, render), rules)
        self.seed, self.epoch = seed, 0
        self.rank, self.ranks = 0, 1
        for files in self.files:
            self.check_first(files)

    def check_first(self, files: list[Path]) -> None:
        rows = read_files(files, self.renderer.rules.on_bad_row == "skip")
        report = DataReport()
        for chunk in chunks(itertools.islice(rows, CHECKED_FIRST)):
            count_outcome(report, render_chunk((self.renderer, chunk, True)), files)
        judge(report, files, self.renderer.rules)
        log_report(report, files, self.renderer.rules)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for number in itertools.count(self.epoch):
            found = False
            for sample in self.one_pass(number):
                found = True
                yield sample
            if not (self.endless and found):
                return

    def one_pass(self, number: int) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        workers, number_of = (worker.num_workers, worker.id) if worker else (1, 0)
        count, own = self.ranks * workers, self.rank * workers + number_of
        draw = random.Random(f"{self.seed} {number}")
        streams = [self.samples(files, count, own) for files in self.files]
        buffer: list[dict[str, list[int]]] = []
        while (sample := next(draw.choices(streams, self.weights)[0], None)) is not None:
            buffer.append(sample)
            if len(buffer) > SHUFFLE_BUFFER:
                at = draw.randrange(len(buffer))
                buffer[at], buffer[-1] = buffer[-1], buffer[at]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer

    def samples(self, files: list[Path], count: int, own: int) -> Iterator[dict[str, list[int]]]:
        """Those of every `count`-th row, from row `own` on."""
        bad, found = 0, False
        kinds: dict[str, list] = {}
        rows = itertools.islice(read_files(files, skips=True), own, None, count)
        for seen, (number, line, raw) in enumerate(rows, 1):
            try:
                sample, _ = self.renderer.fit_to_length(self.renderer.parse(raw)[0])
            except DataError as error:
                bad += 1
                place = f"{files[number]}:{line}"
                if count_kind(kinds, place, str(error)) == 1:
                    logger.bind(any_rank=True).warning(f"{place}: left out, as all like it: {error}")
                share = self.renderer.rules.max_bad_share
                if seen > CHECKED_FIRST and bad > share * seen:
                    raise DataError(f"{place}: {bad} bad rows of {seen}, above max_bad_share={share:g}") from None
                continue
            if sample:
                found = True
                yield as_item(sample.input_ids, sample.target_mask)
        if self.endless and count > 1 and not found:
            yield from self.samples(files, 1, 0)
