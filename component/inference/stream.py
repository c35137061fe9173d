"""An answer while it grows: what each token adds to its text, its reasoning and its calls."""

import json
from typing import Any, NamedTuple

from ..chatglm.text import HALF
from .answers import TextReader
from .calls import Answer


class Piece(NamedTuple):
    """What an answer has grown by. The pieces of one answer, joined by kind and call, are the whole of it.

    Attributes:
        kind: `reasoning`, `text`, `name` (of a function, in one piece) or `arguments` (of its call, as JSON).
        call: which call of the answer a name or arguments belong to, from 0.
    """

    kind: str
    text: str
    call: int = 0


class AnswerStream:
    """Turns the tokens of an answer, one by one, into pieces.

    A call begins with a piece of its name. If it then turns out to be none that can be read, its arguments are what the
    model wrote.

    Args:
        tools: functions that were offered, as `Session.read` takes them.
    """

    def __init__(self, reader: TextReader, tools: Any = None):
        self.reader, self.tools = reader, tools
        self.tokens: list[int] = []
        self.told = {"reasoning": "", "text": ""}
        self.calls = 0

    def add(self, token: int) -> list[Piece]:
        """What the answer grows by with its next token; nothing while that is not decided."""
        self.tokens.append(token)
        answer = self.reader.read(self.tokens, self.tools, True)
        return [] if answer.fault or answer.raw.endswith(HALF) else self.pieces(answer)

    def end(self, finish_reason: str) -> list[Piece]:
        """What was still undecided when the answer ended with `stop` or `length`."""
        return self.pieces(self.reader.read(self.tokens, self.tools, finish_reason == "length"))

    def pieces(self, answer: Answer) -> list[Piece]:
        found = []
        for kind, text in (("reasoning", answer.reasoning), ("text", answer.text)):
            if text.startswith(self.told[kind]) and len(text) > len(self.told[kind]):
                found.append(Piece(kind, text[len(self.told[kind]) :]))
                self.told[kind] = text
        for call in range(self.calls, len(answer.calls)):
            name, arguments = answer.calls[call]
            found += [Piece("name", name, call), Piece("arguments", json.dumps(arguments, ensure_ascii=False), call)]
        self.calls = max(self.calls, len(answer.calls))
        return found
