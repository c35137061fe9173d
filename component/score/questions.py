"""Questions of a file of rows: each answer or call that the rows teach, after the true turns before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.conversation import Conversation, Turn, choose_learned
from ..data.formats import grouped, parse_row
from ..data.reader import Unreadable, find_files, read_rows
from ..data.tools import names_of, wrap_tools
from ..run.errors import DataError

# Formats in which a message has no end of its own: the model goes on until a user or the result of a call comes next.
WITHOUT_ENDS = ("chatglm3",)


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the message that is right."""

    place: str  # file:line of its row
    row: int  # number of its row, counted from 0 over all files
    history: Conversation  # the true turns before the answer, and the tools on offer
    expected: tuple[Turn, ...]  # the turns of the right message: a text, calls, or a text and calls

    @property
    def calls(self) -> tuple[Turn, ...]:
        return tuple(turn for turn in self.expected if turn.role == "tool")

    @property
    def text(self) -> str:
        return "\n".join(turn.content for turn in self.expected if turn.content)


@dataclass(frozen=True)
class Row:
    """A conversation of a file, with the answers marked that are asked for."""

    place: str  # file:line
    number: int  # counted from 0 over all files
    conversation: Conversation

    def questions(self, data_format: str) -> Iterator[Question]:
        """The row's questions to a model that writes messages in this format, one of component.data.dataset's."""
        turns, start = self.conversation.turns, 0
        for message in until_calls(turns) if data_format in WITHOUT_ENDS else grouped(turns):
            history = Conversation(turns[:start], self.conversation.tools)
            start += len(message)
            if message[0].role in ("assistant", "tool") and any(turn.learned for turn in message):
                yield Question(self.place, self.number, history, tuple(message))


def read_scored_rows(
    source: str | Path | list, loss_on: str = "flagged", limit: int | None = None, skips: bool = False
) -> list[Row]:
    """Read the rows of a file, folder, glob or list of these, in any format of component.data.formats.

    Args:
        loss_on: which answers count, as in training.
        limit: at most so many rows are read.
        skips: whether bad rows are left out.

    Raises:
        DataError: the first bad row, by file and line; a row without an answer; tools without names; no row at all.
    """
    files = find_files(source)
    found: list[Row] = []
    for place, row in ((f"{file}:{line}", row) for file in files for line, row in read_rows(file)):
        if limit is not None and len(found) == limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            conversation = parse_row(row)
            if conversation.tools is not None and not wrap_tools(conversation.tools):
                raise DataError(
                    "tools: is no list of functions with names, so no call can be compared; describe the functions"
                )
            conversation = choose_learned(conversation, loss_on)
        except DataError as error:
            if skips and not isinstance(row, Unreadable):
                continue
            raise DataError(f"{place}: {error}") from None
        found.append(Row(place, len(found), conversation))
    if not found:
        raise DataError(f"{files[0]}: nothing to score: the file has no rows{' that are not skipped' * skips}")
    return found


def until_calls(turns: tuple[Turn, ...]) -> list[list[Turn]]:
    """Turns in groups, each of which a model writes without an end: answers in a row, and the call after them."""
    groups: list[list[Turn]] = []
    for turn in turns:
        if turn.role in ("assistant", "tool") and groups and groups[-1][-1].role == "assistant":
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return groups


def called_functions(rows: list[Row]) -> set[str]:
    """Names of the functions that rows call or offer."""
    called = {turn.name for row in rows for turn in row.conversation.turns if turn.role == "tool"}
    return called.union(*(names_of(row.conversation.tools) for row in rows))
