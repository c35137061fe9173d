"""How an answer is made to call a function, or not to: what its tokens may be, taken from the text of training."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..data.chat_text import common_prefix
from ..data.conversation import Turn
from ..data.tools import bare, has_name, names_of
from ..run.errors import DataError
from .answers import ChatGLM3Reader, TextReader
from .calls import ObjectForm, Syntax
from .sampling import Sampling, Unwritten
from .syntax import KEY, KEY2, NAME, OTHER, VALUE

ASKED = Turn("user", "Hello")
Learned = Callable[[Sequence[Turn], Any], list[int]]  # the tokens that a row teaches, by its turns and tools


def call_begins(learned: Learned, reader: TextReader, names: Sequence[str], tools: Any) -> tuple[tuple[int, ...], ...]:
    """Beginnings of all answers that call one of these functions.

    Raises:
        DataError: a function is not offered, or the format has no such beginning.
    """
    if not names:
        raise DataError("there is no function to call; name one")
    found: set[tuple[int, ...]] = set()
    for name in names:
        if name not in names_of(tools):
            offered = ", ".join(sorted(names_of(tools))) or "none"
            raise DataError(f"the function {name!r} is not offered; tools has {offered}")
        found |= begins_of(learned, reader, name, tools)
    return tuple(sorted(found))


def begins_of(learned: Learned, reader: TextReader, name: str, tools: Any) -> set[tuple[int, ...]]:
    """Tokens of a call up to behind the name, and as far as they are the same for any arguments."""

    def write(called: str, arguments: dict) -> list[int] | None:
        call = Turn("tool", name=called, parameters=arguments, learned=True)
        for shown in (tools, None):  # a template may show calls, and no tools
            with suppress(DataError):
                return learned((ASKED, call), shown)
        return None  # a template may refuse a call without arguments, or a key

    arguments = [{}, *({key: VALUE} for key in (*arguments_of(name, tools), KEY, KEY2))]
    other = next(filter(None, (write(NAME if name[0] != NAME[0] else OTHER, one) for one in arguments)), [])
    every = [write(name, one) for one in arguments]
    written = [ids for ids in every if ids]
    if not written:
        raise DataError(f"an answer cannot be made to call {name!r}: training refuses every call of it")
    shared = min(common_prefix(written[0], one) for one in written) if all(every) else 0
    found = set()
    for ids in written:
        text = reader.decode(ids)
        stop = common_prefix(text, reader.decode(other)) + len(name)
        ends = (k for k in range(1, len(ids)) if len(reader.decode(ids[:k])) > stop)
        end = next(ends, None)
        if end is None or not text[:stop].endswith(name):
            raise DataError(f"an answer cannot be made to call {name!r}: {text!r} does not show where the name ends")
        found.add(tuple(ids[: max(end, shared)]))
    return found


def arguments_of(name: str, tools: list) -> list[str]:
    """Names of a function's arguments, as `tools` describes them."""
    for tool in map(bare, tools):
        if has_name(tool) and tool["name"] == name:
            schema = tool.get("parameters")
            properties = schema.get("properties") if isinstance(schema, dict) else None
            return list(properties) if isinstance(properties, dict) else []
    return []


def without_calls(sampling: Sampling, learned: Learned, reader: TextReader) -> Sampling:
    """What answers without a call. Raises DataError where the format tells text and calls apart in no such way."""
    if reader.no_calls:
        return sampling
    if isinstance(reader, ChatGLM3Reader):
        begins = (newline_begin(learned, reader),)
        return replace(sampling, begins=begins, banned=sampling.banned | {reader.parting})
    syntax: Syntax = reader.syntax
    markers = (syntax.opens if syntax.is_marked else syntax.joint)[:1]
    if not syntax.is_marked:
        if not reader.thought.open:
            raise DataError("an answer cannot be kept from calling: its thought may end on a call without a marker")
        markers += (reader.thought.open,)
        if isinstance(syntax.form, ObjectForm):
            first = (*syntax.opens, "{")[0][0]
            texts = enumerate(texts_of(reader))
            banned = {i for i, text in texts if not text.strip() or text.lstrip().startswith(first)}
            sampling = replace(sampling, not_first=sampling.not_first | banned)
        else:
            sampling = replace(sampling, begins=(newline_begin(learned, reader),))
    unwritten = tuple(Unwritten(texts_of(reader), marker) for marker in markers)
    return replace(sampling, unwritten=(*sampling.unwritten, *unwritten))


def newline_begin(learned: Learned, reader: TextReader) -> tuple[int, ...]:
    """The tokens of the newline with which every answer of text begins, and no call."""
    ids = learned((ASKED, Turn("assistant", "Hello", learned=True)), None)
    end = next((k for k in range(1, len(ids)) if reader.decode(ids[:k]).strip(" ")), 0)
    if reader.decode(ids[:end]).strip(" ") != "\n":
        raise DataError("an answer cannot be kept from calling: text and calls begin alike in this format")
    return tuple(ids[:end])


def texts_of(reader: TextReader) -> list[str]:
    """The text of every token, by its id."""
    if not hasattr(reader, "texts"):
        reader.texts = [reader.decode([token]) for token in range(size_of(reader.tokenizer))]
    return reader.texts


def size_of(tokenizer) -> int:
    """One more than the largest id of a token that a tokenizer has."""
    return max(tokenizer.get_vocab().values()) + 1
