"""An answer while it grows: what each token adds to its text, its reasoning and its calls."""

from functools import partial
from typing import Any

from ..chatglm.text import GrowingText
from .answers import TextReader
from .growing import Piece, Reading, Telling

__all__ = ["AnswerStream", "Piece"]


class AnswerStream:
    """Turns the tokens of an answer, one by one, into pieces, at a cost that does not grow with the answer.

    Text and reasoning are told at once, but for half characters, white space at an end, and what may be the beginning
    of a call or of a thought. A call begins with a piece of its name, once that is certain. If it then turns out to be
    none that can be read, its arguments end with what the model wrote; what has no name yet is told as text.

    For a server: the finish_reason is `length` if the answer was cut, else `tool_calls` if `calls` is not 0, and else
    `stop`. To have one call alone, leave the answer once `complete` is 1, and drop what came after that call's pieces.

    Args:
        tools: functions that were offered, as `Session.read` takes them.

    Attributes:
        calls: how many calls were begun: each has told its name.
        complete: how many of them are whole: `Session.read` gives them of an answer that ends here. The last call is
            whole if it equals `calls`.
    """

    def __init__(self, reader: TextReader, tools: Any = None):
        self.reader, self.told = reader, Telling()
        self.follow = partial(reader.follow, tools=tools)
        self.begin_message()

    @property
    def calls(self) -> int:
        return self.told.calls

    @property
    def complete(self) -> int:
        return self.told.complete

    def add(self, token: int) -> list[Piece]:
        """What the answer grows by with its next token; nothing while that is not decided."""
        if token == self.reader.parting:
            self.end_message()
            self.begin_message()
        else:
            self.growing.add(token)
            self.read_on(self.growing.settled)
        return self.told.take()

    def end(self) -> list[Piece]:
        """What was still undecided when the answer ended."""
        self.end_message()
        return self.told.take()

    def begin_message(self) -> None:
        self.growing, self.length = GrowingText(self.reader.tokenizer), 0
        self.reading = Reading(self.told, self.follow)

    def end_message(self) -> None:
        self.read_on(self.growing.text)
        self.reading.end()

    def read_on(self, text: str) -> None:
        """Read what is new of a message's text."""
        if len(text) > self.length:
            self.reading.add(text[self.length :])
            self.length = len(text)
