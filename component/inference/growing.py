"""Reads an answer's text while it grows, at a cost in proportion to what is new.

Every way of reading is a generator, which yields when the text does not decide yet, and goes on when more has come.
`calls.py` decides about each whole call; here is told what is certain before.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from .calls import Call, Parts, Thought, Unreadable, overlap, require_json, skip_space

IN_STRING = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "'\""}
IN_PYTHON = re.compile(r"""['"()\[\]{},]""")
DOUBTS = (Unreadable, ValueError, RecursionError)  # what a text raises that is no call

Waiting = Generator[None, None, Any]  # reads on as text comes; the docstring says what it returns at last


class Piece(NamedTuple):
    """What an answer has grown by. The pieces of one answer, joined by kind and call, are the whole of it.

    Attributes:
        kind: `reasoning`, `text`, `name` (of a function, in one piece) or `arguments` (of its call, as JSON).
        call: which call of the answer a name or arguments belong to, from 0.
    """

    kind: str
    text: str
    call: int = 0


class Telling:
    """Collects the pieces of an answer.

    Attributes:
        calls: how many were begun.
        complete: how many of them are whole.
    """

    def __init__(self):
        self.pieces: list[Piece] = []
        self.parts = {"reasoning": Parts(), "text": Parts()}
        self.calls = self.complete = 0
        self.is_named = False  # whether the call that is being read has told its name
        self.is_raw = False  # whether its arguments are told as they are written
        self.keys: set[str] = set()  # those that were told one by one

    def take(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def add_text(self, kind: str, text: str) -> None:
        if shown := self.parts[kind].add(text):
            self.pieces.append(Piece(kind, shown))

    def begin_call(self, name: str) -> None:
        self.pieces.append(Piece("name", name, self.calls))
        self.calls, self.is_named, self.is_raw, self.keys = self.calls + 1, True, False, set()

    def add_json(self, written: str) -> None:
        if written:
            self.pieces.append(Piece("arguments", written, self.calls - 1))

    def add_arguments(self, arguments: dict[str, Any]) -> None:
        """Tell those arguments that were not told."""
        for key, value in arguments.items():
            if key not in self.keys:
                self.add_json((", " if self.keys else "{") + json.dumps({key: value}, ensure_ascii=False)[1:-1])
                self.keys.add(key)

    def end_call(self, call: Call) -> None:
        """Tell what is still to be told of a call that is whole."""
        if not self.is_named:
            self.begin_call(call.name)
        if not self.is_raw:
            self.add_arguments(call.arguments)
            self.add_json("}" if self.keys else "{}")
        self.complete, self.is_named = self.complete + 1, False


class Reading:
    """Text that grows, and what reads it: one answer, or one message of ChatGLM3's.

    Args:
        told: takes the pieces.
        follow: the generator of a Reader that reads the whole, given this.
    """

    def __init__(self, told: Telling, follow: Callable[["Reading"], Waiting]):
        self.told = told
        self.text = ""  # what is not read yet: of a call, from its beginning on
        self.untold = 0  # where in it begins what is not told of a call that has a name
        self.is_raw = False  # whether a call's arguments are being told as they are written
        self.ended = False
        self.waiting = self.run(follow)
        next(self.waiting)

    def add(self, text: str) -> None:
        self.text += text
        next(self.waiting)

    def end(self) -> None:
        self.ended = True
        next(self.waiting)

    def run(self, follow: Callable[["Reading"], Waiting]) -> Waiting:
        try:
            yield from follow(self)
        except DOUBTS:
            yield from self.give_up()
        for part in self.told.parts.values():
            part.end()
        while True:
            yield

    def give_up(self) -> Waiting:
        """Tell all that remains as it is: as the arguments of a call that has a name, and else as text."""
        self.drop(self.untold)
        while self.told.is_named:
            self.told.add_json(self.text)
            self.drop(len(self.text))
            if self.ended:
                self.told.is_named = False
                return
            yield
        yield from self.speak("text")

    # Reading on. Places are counted from the beginning of `text`.

    def drop(self, count: int) -> None:
        self.text, self.untold = self.text[count:], 0

    def more(self) -> Waiting:
        if self.is_raw:
            self.tell(len(self.text))
        if self.ended:
            raise Unreadable("it has no end")
        yield

    def letter(self, at: int) -> Waiting:
        """The place of the next character that is no white space. Raises Unreadable if there is none."""
        while (at := skip_space(self.text, at)) == len(self.text):
            yield from self.more()
        return at

    def stands(self, at: int, piece: str) -> Waiting:
        """Whether a piece stands at a place. Raises Unreadable if the text ends within it."""
        while piece.startswith(found := self.text[at : at + len(piece)]) and found != piece:
            yield from self.more()
        return found == piece

    def skip(self, at: int, expected: Sequence[str]) -> Waiting:
        """Where the text goes on behind the pieces that stand at a place; None if others stand there."""
        try:
            for piece in expected:
                at = yield from self.letter(at)
                if not (yield from self.stands(at, piece)):
                    return None
                at += len(piece)
            return at
        except Unreadable:
            return None

    def require(self, at: int, expected: Sequence[str]) -> Waiting:
        """The same, but raises Unreadable if others stand there."""
        at = yield from self.skip(at, expected)
        if at is None:
            raise Unreadable(f"{' '.join(expected)!r} is missing")
        return at

    def search(self, pattern: re.Pattern, at: int, longest: int) -> Waiting:
        """The first match of a pattern, whose matches have `longest` characters at most."""
        while not (found := pattern.search(self.text, at)):
            at = max(at, len(self.text) - longest + 1)
            yield from self.more()
        return found

    def find(self, *markers: str, at: int = 0) -> Waiting:
        """The place of the first of some markers."""
        found = yield from self.search(re.compile("|".join(map(re.escape, markers))), at, max(map(len, markers)))
        return found.start()

    def speak(self, kind: str, marker: str = "") -> Waiting:
        """Tell text or reasoning up to a marker, or the end. Returns whether there is the marker, which stays."""
        while True:
            found = self.text.find(marker) if marker else -1
            kept = 0 if self.ended else overlap(self.text, marker)
            stop = found if found >= 0 else len(self.text) - kept
            self.told.add_text(kind, self.text[:stop])
            self.drop(stop)
            if found >= 0 or self.ended:
                return found >= 0
            yield

    def think(self, thought: Thought) -> Waiting:
        """Tell the thoughts with which an answer begins, as `Thought.split` finds them."""
        while True:
            if thought.open:
                at = yield from self.skip(0, (thought.open,))
                if at is None:
                    return
                self.drop(at)
            elif not thought.asked:
                try:
                    yield from self.find(thought.close)
                except Unreadable:
                    return
            if (yield from self.speak("reasoning", thought.close)):
                self.drop(len(thought.close))
            self.told.parts["reasoning"].end()
            if not thought.open:
                return

    # Calls

    def begin_call(self, name: str, at: int) -> None:
        """Tell the name of a call, whose arguments begin at a place."""
        require_json([Call(name, {})])
        self.told.begin_call(name)
        self.untold = at

    def tell(self, stop: int) -> None:
        """Tell arguments as they are written, up to a place."""
        self.told.is_raw = True
        self.told.add_json(self.text[self.untold : stop])
        self.untold = max(stop, self.untold)

    def string_end(self, at: int, quote: str) -> Waiting:
        """Where the string ends whose first quote stands before a place."""
        if quote not in IN_STRING:  # and so has no backslashes of its own
            return (yield from self.find(quote, at=at)) + len(quote)
        while (found := (yield from self.search(IN_STRING[quote], at, 2)))[0] != quote:
            at = found.end()
        return found.end()

    def bracket(self, at: int, quote: str = '"') -> Waiting:
        """The next bracket outside of strings, and where it ends."""
        pattern = re.compile(rf"{re.escape(quote)}|[{{}}\[\]]")
        while (found := (yield from self.search(pattern, at, len(quote))))[0] == quote:
            at = yield from self.string_end(found.end(), quote)
        return found[0], found.end()

    def nest_end(self, at: int, quote: str = '"') -> Waiting:
        """Where the object or list ends that begins at a place."""
        bracket, at = yield from self.bracket(at, quote)
        depth = 1
        while depth:
            bracket, at = yield from self.bracket(at, quote)
            depth += 1 if bracket in "{[" else -1
        return at

    def json_arguments(self, at: int) -> Waiting:
        """Tell the JSON object that begins at a place, as it is written."""
        self.is_raw = True
        self.tell((yield from self.nest_end(at)))
        self.is_raw = False

    def keywords(self, at: int, read: Callable[[str], Call]) -> Waiting:
        """Tell the keyword arguments of a Python call that begin at a place, one by one, while each can be read alone.
        `read` reads a call."""
        start, depth = at, 0
        with suppress(*DOUBTS):
            while True:
                found = yield from self.search(IN_PYTHON, at, 1)
                mark, at = found[0], found.end()
                if mark in IN_STRING:  # of three quotes, the first two are a string of their own
                    at = yield from self.string_end(at, mark)
                elif mark in "([{":
                    depth += 1
                elif depth:
                    depth -= mark != ","
                else:
                    call = read(f"call({self.text[start : found.start()]})")
                    require_json([call])
                    if len(call.arguments) != 1:
                        return
                    self.told.add_arguments(call.arguments)
                    start, self.untold = at, found.start()
                    if mark != ",":
                        return
