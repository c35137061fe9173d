"""Reads an answer's text while it grows, at a cost in proportion to what is new.

Every way of reading is a generator, which yields when the text does not decide yet, and goes on when more has come.
`calls.py` decides about each whole call; here is told what is certain before.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from .calls import Call, Thought, Unreadable, require_json, skip_space

IN_JSON = re.compile(r'["{}\[\]]')
IN_STRING = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in ('"', "'", '"' * 3, "'" * 3)}
IN_PYTHON = re.compile(r"""'''|\"""|['"()\[\]{},#]""")

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


class Parts:
    """Parts of text, each stripped, and joined by newlines: what can be told of them as they come."""

    def __init__(self):
        self.space = ""  # that is told once something follows it
        self.told = self.begun = False  # anything at all; anything of this part

    def add(self, text: str) -> str:
        if not self.begun:
            text = text.lstrip()
            if not text:
                return ""
        shown = text.rstrip()
        if not shown:
            self.space += text
            return ""
        before = self.space if self.begun else "\n" * self.told
        self.space, self.told, self.begun = text[len(shown) :], True, True
        return before + shown

    def end(self) -> None:
        self.space, self.begun = "", False


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
        self.raw = False  # whether its arguments are told as they are written
        self.keys: set[str] = set()  # those that were told one by one

    def take(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def say(self, kind: str, text: str) -> None:
        if shown := self.parts[kind].add(text):
            self.pieces.append(Piece(kind, shown))

    def name(self, name: str) -> None:
        self.pieces.append(Piece("name", name, self.calls))
        self.calls, self.is_named, self.raw, self.keys = self.calls + 1, True, False, set()

    def write(self, arguments: str) -> None:
        if arguments:
            self.pieces.append(Piece("arguments", arguments, self.calls - 1))

    def argue(self, arguments: dict[str, Any]) -> None:
        """Tell those arguments that were not told."""
        for key, value in arguments.items():
            if key not in self.keys:
                self.write((", " if self.keys else "{") + json.dumps({key: value}, ensure_ascii=False)[1:-1])
                self.keys.add(key)

    def end_call(self, call: Call) -> None:
        """Tell what is still to be told of a call that is whole."""
        if not self.is_named:
            self.name(call.name)
        if not self.raw:
            self.argue(call.arguments)
            self.write("}" if self.keys else "{}")
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
        except (Unreadable, ValueError, RecursionError):
            yield from self.give_up()
        for part in self.told.parts.values():
            part.end()
        while True:
            yield

    def give_up(self) -> Waiting:
        """Tell all that remains as it is: as the arguments of a call that has a name, and else as text."""
        self.drop(self.untold)
        while self.told.is_named:
            self.told.write(self.text)
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
        """Where the text goes on behind the pieces that stand at a place. Raises Unreadable if others stand there."""
        for piece in expected:
            at = yield from self.letter(at)
            if not (yield from self.stands(at, piece)):
                raise Unreadable(f"{piece!r} is missing")
            at += len(piece)
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
            self.told.say(kind, self.text[:stop])
            self.drop(stop)
            if found >= 0 or self.ended:
                return found >= 0
            yield

    def think(self, thought: Thought) -> Waiting:
        """Tell the thoughts with which an answer begins, as `Thought.split` finds them."""
        within, certain = not thought.open, thought.asked
        while True:
            try:
                if not within:
                    self.drop((yield from self.skip(0, (thought.open,))))
                elif not certain:
                    yield from self.find(thought.close)
            except Unreadable:
                return
            if (yield from self.speak("reasoning", thought.close)):
                self.drop(len(thought.close))
            self.told.parts["reasoning"].end()
            within = False
            if not thought.open:
                return

    # Calls

    def name(self, name: str, at: int) -> None:
        """Tell the name of a call, whose arguments begin at a place."""
        require_json([Call(name, {})])
        self.told.name(name)
        self.untold = at

    def string(self, quote: str, at: int) -> Waiting:
        """Where the string ends whose first quote stands before a place."""
        while True:
            found = IN_STRING[quote].search(self.text, at)
            if found and found[0] == quote:
                return found.end()
            if found:
                at = found.end()
                continue
            at = max(at, len(self.text) - len(quote) + 1 - self.text.endswith("\\"))
            yield from self.more()

    def json_value(self, at: int) -> Waiting:
        """Where the JSON value ends that begins at a place."""
        if self.text[at] == '"':
            return (yield from self.string('"', at + 1))
        if self.text[at] in "{[":
            return (yield from self.json_nest(at))
        return (yield from self.search(re.compile(r"[\s,}\]]"), at, 1)).start()

    def json_nest(self, at: int, told: bool = False) -> Waiting:
        """Where the JSON object or list ends that begins at a place; `told`: it is told as it is written."""
        depth, within = 0, False
        while True:
            found = (IN_STRING['"'] if within else IN_JSON).search(self.text, at)
            if not found:
                at = max(at, len(self.text) - (within and self.text.endswith("\\")))
                if told:
                    self.write(len(self.text))
                yield from self.more()
                continue
            at, letter = found.end(), found[0]
            if letter == '"':
                within = not within
            elif not within:
                depth += 1 if letter in "{[" else -1
                if depth == 0:
                    if told:
                        self.write(at)
                    return at

    def write(self, stop: int) -> None:
        """Tell arguments as they are written, up to a place."""
        self.told.raw = True
        self.told.write(self.text[self.untold : stop])
        self.untold = max(stop, self.untold)

    def keywords(self, at: int, read: Callable[[str], Call]) -> Waiting:
        """Tell the keyword arguments of a Python call, which begin at a place, one by one. `read` reads a call. Returns
        where the parenthesis is that ends them, or None where only the whole call shows that."""
        start, depth = at, 0
        while True:
            found = yield from self.search(IN_PYTHON, at, 1)
            mark, at = found[0], found.end()
            if mark[0] in "'\"":
                while len(mark) == 1 and len(self.text) - found.start() < 3 and not self.ended:
                    yield
                found = IN_PYTHON.search(self.text, found.start())
                at = yield from self.string(found[0], found.end())
            elif mark in "([{":
                depth += 1
            elif mark == "#":
                return None
            elif depth and mark in ")]}":
                depth -= 1
            elif not depth:
                written = self.text[start : found.start()]
                if written.strip():
                    try:
                        call = read(f"call({written})")
                        require_json([call])
                    except (Unreadable, ValueError, RecursionError):
                        return None
                    if len(call.arguments) != 1:
                        return None
                    self.told.argue(call.arguments)
                    self.untold = found.start()
                if mark != ",":
                    return found.start() if mark == ")" else None
                start = at


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
