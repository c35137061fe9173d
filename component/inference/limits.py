"""How an answer is made to call a function, or not to: what its tokens may be, taken from the text of training."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from ..data.chat_text import common_prefix
from ..data.conversation import Turn
from ..data.tools import bare, has_name, names_of
from ..run.errors import DataError
from .answers import ChatGLM3Reader, TextReader
from .calls import Call, ObjectForm
from .sampling import GREEDY, Sampling, Unwritten
from .stream import AnswerStream
from .syntax import KEY, KEY2, NAME, OTHER, VALUE

ASKED = Turn("user", "Hello")
KEPT = 1024  # functions whose beginnings are kept
Learned = Callable[[Sequence[Turn], Any], list[int]]  # the tokens that a row teaches, by its turns and tools


class Limits:
    """What a model's answers may begin with, and may not hold. What was found once is kept."""

    def __init__(self, learned: Learned, reader: TextReader):
        self.learned, self.reader = learned, reader
        self.begins = lru_cache(KEPT)(self.find_begins)
        self.is_alone = lru_cache(KEPT)(self.find_alone)

    def calling(self, names: Sequence[str], tools: Any) -> tuple[tuple[int, ...], ...]:
        """Beginnings of all answers that call one of these functions.

        Raises:
            DataError: a function is not offered, or the format cannot call it.
        """
        if not names:
            raise DataError("there is no function to call; name one")
        offered = names_of(tools)
        if strays := [name for name in names if name not in offered]:
            shown = ", ".join(sorted(offered)) or "none"
            raise DataError(f"the function {strays[0]!r} is not offered; tools has {shown}")
        every = json.dumps(tools)
        own = [json.dumps([tool for tool in tools if name_of(tool) == name]) for name in names]
        shown = own if self.is_alone(every) else [every] * len(names)
        return tuple(sorted(set().union(*map(self.begins, names, shown))))

    def find_alone(self, tools: str) -> bool:
        """Whether a call is written alike beside its own function's description and beside all of them. The last
        function tells: before it are all others."""
        every = json.loads(tools)
        last = next(tool for tool in reversed(every) if name_of(tool))
        with suppress(DataError):
            return len({tuple(self.write(name_of(last), {KEY: VALUE}, shown)) for shown in ([last], every)}) == 1
        return False

    def write(self, name: str, arguments: dict, tools: list) -> list[int]:
        """The tokens of a call, its end too. Raises DataError where training refuses it."""
        turns = ASKED, Turn("tool", name=name, parameters=arguments, learned=True)
        with suppress(DataError):
            return self.learned(turns, tools)
        try:
            return self.learned(turns, None)  # a template may show calls, and no tools
        except DataError as error:
            raise DataError(f"an answer cannot be made to call {name!r}: {error}") from None

    def find_begins(self, name: str, tools: str) -> set[tuple[int, ...]]:
        """Tokens of a call up to behind the name, and as far as they are the same for any arguments. They differ by the
        arguments where a token holds the end of the name and the beginning of an argument's."""
        described = json.loads(tools)
        other = self.write(NAME if name[0] != NAME[0] else OTHER, {KEY: VALUE}, described)
        tried = [{}, {KEY: VALUE}, {KEY2: VALUE}]
        begins, calls = self.begins_beside(other, name, tried, described)
        if len(begins) == len(calls):  # no two of them begin alike
            tried = [{}, *({key: VALUE} for key in arguments_of(name, described))]
            begins, calls = self.begins_beside(other, name, tried, described)
        if len(calls) < len(tried):  # training refuses some of them, and so their tokens are not known
            return begins
        shared = tuple(calls[0][: min(common_prefix(calls[0], ids) for ids in calls)])
        return {max(begin, shared, key=len) for begin in begins}

    def begins_beside(
        self, other: list[int], name: str, tried: list[dict], tools: list
    ) -> tuple[set[tuple[int, ...]], list[list[int]]]:
        """(beginnings of calls with these arguments up to behind the name, the calls), but for those that training
        refuses."""
        begins, calls = set(), []
        for arguments in tried:
            try:
                ids = self.write(name, arguments, tools)
            except DataError:  # a template may refuse a call without arguments, or a key
                if arguments == tried[-1] and not calls:
                    raise
                continue
            begins.add(tuple(ids[: self.name_end(name, ids, other)]))
            calls.append(ids[:-1])
            self.require_call(Call(name, arguments), ids[:-1], tools)
        return begins, calls

    def name_end(self, name: str, ids: list[int], other: list[int]) -> int:
        """How many tokens of a call show its name, and that this ends. `other`: a call of another name."""
        text = self.reader.decode(ids)
        stop = common_prefix(text, self.reader.decode(other)) + len(name)
        end = next((k for k in range(1, len(ids)) if len(self.reader.decode(ids[:k])) > stop), None)
        if end is None or not text[:stop].endswith(name):
            raise DataError(f"an answer cannot be made to call {name!r}: {text!r} does not show where the name ends")
        return end

    def require_call(self, call: Call, ids: list[int], tools: list) -> None:
        """Raise DataError unless the tokens of a call are read as that call, whole and while they come."""
        stream = AnswerStream(self.reader, tools)
        pieces = [piece for token in ids for piece in stream.add(token)] + stream.end()
        names = [piece.text for piece in pieces if piece.kind == "name"]
        if self.reader.read(ids, tools, False).calls != (call,) or (names, stream.complete) != ([call.name], 1):
            raise DataError(
                f"an answer cannot be made to call {call.name!r}: this model's format cannot call a function of this "
                "name; give it another"
            )

    @cached_property
    def without_calls(self) -> Sampling:
        """The limits of an answer without a call. Raises DataError where nothing tells text and calls apart."""
        reader = self.reader
        if reader.no_calls:
            return GREEDY
        if isinstance(reader, ChatGLM3Reader):
            return Sampling(begins=(self.newline_begin(),), banned=frozenset({reader.parting}))
        syntax, limits = reader.syntax, GREEDY
        markers = (syntax.opens if syntax.is_marked else syntax.joint)[:1]
        if not syntax.is_marked:
            if not reader.thought.open:
                raise DataError("an answer cannot be kept from calling: its thought may end on a call without a marker")
            markers += (reader.thought.open,)
            if isinstance(syntax.form, ObjectForm):
                limits = Sampling(not_first=self.beginnings_of((*syntax.opens, "{")[0][0]))
            else:
                limits = Sampling(begins=(self.newline_begin(),))
        return replace(limits, unwritten=tuple(Unwritten(reader.bytes.every, marker) for marker in markers))

    def beginnings_of(self, letter: str) -> frozenset[int]:
        """Tokens that begin with a letter, white space aside, or are nothing else than white space."""
        texts = [token.decode(errors="replace").lstrip() for token in self.reader.bytes.every]
        return frozenset(token for token, text in enumerate(texts) if not text or text.startswith(letter))

    def newline_begin(self) -> tuple[int, ...]:
        """The tokens of the newline with which every answer of text begins, and no call."""
        decode = self.reader.decode
        ids = self.learned((ASKED, Turn("assistant", "Hello", learned=True)), None)
        end = next((k for k in range(1, len(ids)) if decode(ids[:k]).strip(" ")), 0)
        if decode(ids[:end]).strip(" ") != "\n":
            raise DataError("an answer cannot be kept from calling: text and calls begin alike in this format")
        return tuple(ids[:end])


def name_of(tool: Any) -> str:
    """The name of a described function; empty where it has none."""
    return bare(tool)["name"] if has_name(bare(tool)) else ""


def arguments_of(name: str, tools: list) -> list[str]:
    """Names of a function's arguments, as `tools` describes them; KEY where they do not."""
    for tool in map(bare, tools):
        if name_of(tool) == name:
            schema = tool.get("parameters")
            properties = schema.get("properties") if isinstance(schema, dict) else None
            return list(properties) if isinstance(properties, dict) and properties else [KEY]
    return [KEY]
