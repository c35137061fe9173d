"""Turns files of rows into a store of token ids, once. Several processes check and render the rows."""

import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from loguru import logger

from ..run.errors import DataError
from .chat_template import render_chat_template
from .conversation import (
    Conversation,
    choose_learned,
    count_rounds,
    first_rounds_to_leave_out,
    oddities,
    without_first_rounds,
)
from .formats import parse_row, unread_keys
from .pool import in_order
from .reader import Unreadable, parse_line, read_lines, rejected_line
from .render import TokenizedSample, render_chatglm2, render_chatglm3
from .rules import CUT, DROPPED, NOTES, SHORTENED, DataReport, DataRules, count_kind, judge, kind_of
from .store import FILES, PLACE_BITS, REJECTED, REPORT

CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 20  # limits of what a process gets at a time; the first that is reached counts
PARALLEL_FROM = 4 << 20  # bytes of input; for less, starting processes costs more than it saves
ESCAPE = "backslashreplace"  # for file names that are not UTF-8


class RowRenderer:
    """Turns one line of a file into a sample that fits `max_seq_length`.

    Args:
        render: a renderer of component.data.render or component.data.chat_template.
    """

    def __init__(self, render: Callable, tokenizer, rules: DataRules):
        self.render, self.tokenizer, self.rules = render, tokenizer, rules
        self.rows = rows_of(tokenizer)

    def parse(self, raw: bytes | DataError) -> tuple[Conversation, list[str]]:
        """Parse a row, and list what is unusual in it. Raises DataError, without file and line, if the row is bad."""
        if isinstance(raw, DataError):
            raise raw
        row = parse_line(raw)
        conversation = choose_learned(parse_row(row), self.rules.loss_on)
        first: dict[str, str] = {}  # the first of each kind, so that a row counts once
        for what in oddities(conversation):
            first.setdefault(kind_of(what), what)
        odd = list(first.values())
        if odd and self.rules.strict_roles:
            raise DataError(f"{odd[0]}; mend the row, or set strict_roles to false")
        return conversation, [*odd, *unread_keys(row)]

    def fit_to_length(self, conversation: Conversation) -> tuple[TokenizedSample | None, str | None]:
        """Render a conversation in at most `max_seq_length` tokens.

        Returns:
            (the sample, None or CUT or SHORTENED), or (None, DROPPED).

        Raises:
            DataError: the conversation cannot be rendered, or a token has no row in the model's embedding.
        """
        limit, note = self.rules.max_seq_length, None
        sample = self.render(conversation, self.tokenizer)
        if len(sample.input_ids) > limit:
            if self.rules.on_too_long == "drop":
                return None, DROPPED
            if self.rules.on_too_long == "truncate_left_turns" and count_rounds(conversation) > 1:
                sample, note = self.render(self.shorten(conversation), self.tokenizer), SHORTENED
            if len(sample.input_ids) > limit:
                note = CUT
                sample = TokenizedSample(sample.input_ids[:limit], sample.target_mask[:limit])
        require_rows(sample.input_ids, self.tokenizer)
        # Nothing predicts the first token, so learning starts at the second.
        return (sample, note) if any(sample.target_mask[1:]) else (None, DROPPED)

    def shorten(self, conversation: Conversation) -> Conversation:
        """Leave out as few early rounds as possible for the rest to fit. The last round always stays."""

        def fits(rest: Conversation) -> bool:
            return len(self.render(rest, self.tokenizer).input_ids) <= self.rules.max_seq_length

        return without_first_rounds(conversation, first_rounds_to_leave_out(conversation, fits))


def fill_store(files: list[Path], renderer: RowRenderer, workers: int, folder: Path) -> None:
    """Write the files of a TokenStore into `folder`.

    Raises:
        DataError: with `on_bad_row: stop`, rows are bad; the text has the first of each kind, and how many there are.
            Otherwise, a file cannot be read to its end.
    """
    report = DataReport()
    started = told = time.monotonic()
    stops = renderer.rules.on_bad_row == "stop"
    workers = workers if sum(file.stat().st_size for file in files) > PARALLEL_FROM else 1
    with ExitStack() as stack:
        rejected = stack.enter_context(open(folder / REJECTED, "w", encoding="utf-8", errors=ESCAPE))
        outputs = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in FILES}
        # Once a bad row means that the run will stop, the rest is only checked, not rendered.
        tasks = ((renderer, chunk, not (stops and report.bad)) for chunk in chunks(read_files(files, not stops)))
        for outcome in in_order(render_chunk, tasks, workers):
            for name in FILES:
                values = getattr(outcome, name)
                outputs[name].write(values + report.tokens if name == "ends" else values)
            for number, line, reason, text in outcome.rejected:
                rejected.write(rejected_line(files[number], line, reason, text))
            count_outcome(report, outcome, files)
            if (now := time.monotonic()) > told + 10:
                told = now
                logger.info(f"{report.rows:,} rows prepared, {report.rows / (now - started):,.0f} rows/s")
    if report.bad and stops:
        judge(report, files, renderer.rules)
    (folder / REPORT).write_text(json.dumps(asdict(report), ensure_ascii=False), "utf-8", errors=ESCAPE)


@dataclass
class Outcome:
    """The result of rendering a chunk. `ends` counts tokens from the chunk's start."""

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
    calls: Counter[str]

    @property
    def longest(self) -> int:
        return int(np.diff(self.ends, prepend=0).max(initial=0))


Chunk = list[tuple[int, int, bytes | DataError]]  # file number, line, row


def read_files(files: list[Path], skips: bool) -> Iterator[tuple[int, int, bytes | DataError]]:
    """Yield (file number, line, row) for all rows.

    Raises:
        DataError: bad rows are skipped, and a file cannot be read to its end. The rows lost with it may be good.
    """
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
    """Parse the rows of a chunk, and render them if the last part of the task is true."""
    renderer, chunk, renders = task
    ids, mask = array("i"), bytearray()  # which take in lists faster than numpy converts them
    ends, lines, notes, rejected, fitted, odd = [], [], bytearray(), [], [], []
    turns, calls = 0, Counter()
    for number, line, raw in chunk:
        try:
            conversation, unusual = renderer.parse(raw)
            sample, note = renderer.fit_to_length(conversation) if renders else (None, None)
        except DataError as error:
            text = "" if isinstance(raw, DataError) else raw.decode(errors="backslashreplace").strip()
            rejected.append((number, line, str(error), text))
            continue
        turns += len(conversation.turns)
        calls.update(turn.name for turn in conversation.turns if turn.role == "tool")
        odd += [(number, line, what) for what in unusual]
        fitted += [(number, line, note)] if note else []
        if sample:
            ids.fromlist(sample.input_ids)
            mask += bytes(sample.target_mask)
            ends.append(len(ids))
            lines.append((number << PLACE_BITS) + line)
            notes.append(NOTES.index(note))
    arrays = [np.frombuffer(ids, np.int32), np.frombuffer(mask, np.uint8), np.array(ends, int), np.array(lines, int)]
    return Outcome(*arrays, np.frombuffer(notes, np.uint8), len(chunk), turns, rejected, fitted, odd, calls)


def count_outcome(report: DataReport, outcome: Outcome, files: list[Path]) -> None:
    """Count a chunk's outcome in the report."""
    report.rows += outcome.rows
    report.turns += outcome.turns
    report.kept += len(outcome.ends)
    report.tokens += len(outcome.input_ids)
    report.longest = max(report.longest, outcome.longest)
    report.learned += int(outcome.target_mask.sum())
    report.bad += len(outcome.rejected)
    report.calls = dict(Counter(report.calls) + outcome.calls)
    faults = ((number, line, reason) for number, line, reason, _ in outcome.rejected)
    for totals, found in ((report.faults, faults), (report.notes, outcome.fitted), (report.odd, outcome.odd)):
        for number, line, what in found:
            count_kind(totals, f"{files[number]}:{line}", what)


def as_item(input_ids: list[int], target_mask: list[int]) -> dict[str, list[int]]:
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "target_mask": target_mask}


def rows_of(tokenizer) -> float:
    """Number of rows of the model's embedding, if the tokenizer knows it."""
    return getattr(tokenizer, "embedding_rows", math.inf)


def require_rows(ids: list[int], tokenizer) -> None:
    """Raise DataError for a token that has no row in the model's embedding."""
    rows = rows_of(tokenizer)
    if (largest := max(ids, default=0)) >= rows:
        raise DataError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}: the tokenizer has ids up to "
            f"{max(largest, len(tokenizer) - 1)}, the embedding has rows up to {rows - 1}; resize the embedding and "
            "save the model, or write the row without this token"
        )


def check_tokenizer(tokenizer, render):
    """Return the tokenizer if a renderer can use it. Raises DataError, which says what it lacks."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so no answer can be taught to end; set one in its folder")
    is_chatglm = hasattr(tokenizer, "build_single_message")
    if render is render_chat_template:
        if is_chatglm:
            raise DataError("ChatGLM's tokenizer writes its prompts itself; leave out data_format and chat_template")
        if not tokenizer.is_fast:
            raise DataError(
                "data_format chat_template needs a fast tokenizer, and the model has a slow one; choose another"
            )
        if not tokenizer.chat_template:
            raise DataError(
                "data_format chat_template needs a chat template, and the tokenizer has none; set chat_template to "
                "chatml or to a file, or choose another format"
            )
    if render in (render_chatglm2, render_chatglm3) and not is_chatglm:
        name = render.__name__.removeprefix("render_")
        raise DataError(
            f"data_format {name} needs ChatGLM's tokenizer, and the model has another; choose another format"
        )
    return tokenizer
