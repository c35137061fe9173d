"""Helpers of the parsers of rows: fields and their faults, flags of learning, reasoning, tools, calls that are text."""

import contextlib
import json
import re
from collections.abc import Set
from dataclasses import replace
from typing import Any

from ..run.errors import DataError
from .conversation import Turn, describe, take
from .keys import says_something
from .reader import load_json
from .tools import unwrap_tools

LEARNING = ("loss", "loss_weight", "loss_scale", "weight", "train", "training")  # names of one flag in different tools
REASONING = ("reasoning_content", "reasoning", "thinking")
FENCED = re.compile(r"```(?:python|json)?\s*(.*?)\s*```", re.DOTALL)


def require_object(value: Any, place: str, keys: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be an object with {keys}, got {describe(value)}")


def given(holder: dict, key: str) -> bool:
    """Whether a key has a value to `take`: null and empty text count as none, 0 and false as values of a wrong type."""
    return holder.get(key) not in (None, "")


def flag(holder: dict, key: str, place: str, *, default: bool) -> bool:
    return take(holder, key, bool, place) if key in holder else default


def function_name(name: str, place: str) -> str:
    if not name.strip() or "\n" in name:
        raise DataError(f"{place} is {name!r}; expected the function's name on one line")
    return name


def from_json(text: str, place: str) -> Any:
    try:
        return load_json(text)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def learning_flag(message: dict, place: str) -> bool | None:
    """A turn's own word on being learned, by any key of LEARNING (true, false, 1 or 0); None if it has none."""
    found: dict[str, bool] = {}
    for key in LEARNING:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(f"{place}.{key} must be 0 or 1, got {describe(value)}; a turn is learned or it is not")
        found[key] = bool(value)
    return one_of(found, place)


def one_of(found: dict[str, Any], place: str) -> Any:
    """The one value of several keys, or None if there is no key. Raises DataError where values differ."""
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise DataError(f"{place}: {' and '.join(found)} say different things; keep one")
    return values[0] if values else None


def is_learned(message: dict, place: str) -> bool:
    return learning_flag(message, place) is not False


def refuse_learning(message: dict, place: str) -> None:
    """Raise DataError where a turn that the model does not write asks to be learned."""
    if learning_flag(message, place):
        key = next(key for key in LEARNING if message.get(key))
        raise DataError(f"{place}.{key}: only what the model writes can be learned; remove it, or make it false")


def reasoning_of(message: dict, place: str) -> str:
    """An assistant's thoughts before its answer, by any key of REASONING; empty if there are none."""
    return (
        one_of({key: take(message, key, str, place).strip() for key in REASONING if given(message, key)}, place) or ""
    )


def content_of(message: dict, place: str, optional: bool = False) -> str:
    """A message's text, which may be given in parts. Raises DataError for a part that is no text."""
    content = message.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"{place}.content: holds a part that is no text; only text can be learned")
            if flags := [key for key in LEARNING if part.get(key) is not None]:
                raise DataError(f"{place}.content: a part has {flags[0]}; give it to the whole message")
        return "".join(part["text"] for part in content)
    return take(message, "content", str, place)


def begin_with_system(row: dict, turns: list[Turn]) -> tuple[Turn, ...]:
    """Put the row's own system prompt, if any, before the turns. Raises DataError where the first turn has another."""
    if not given(row, "system"):
        return tuple(turns)
    system = Turn("system", take(row, "system", str))
    if not turns or turns[0].role != "system":
        return (system, *turns)
    if not turns[0].content:
        return (system, *turns[1:])
    if turns[0] != system:
        raise DataError("system: says something else than the first turn, which is a system turn too; keep one")
    return tuple(turns)


def parse_tools(tools: Any, place: str) -> list | None:
    """Parse a list of functions' descriptions, or its JSON, to the bare ones that ChatGLM3 shows."""
    if isinstance(tools, str):
        tools = from_json(tools, place) if tools.strip() else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{place} must be a list of functions, got {describe(tools)}")
    for i, tool in enumerate(tools):
        if isinstance(tool, str) and tool.lstrip().startswith("{"):  # one description as JSON
            tools = [*tools[:i], from_json(tool, f"{place}[{i}]"), *tools[i + 1 :]]
    return unwrap_tools(tools)


def offered_tools(row: dict, turns: list, place: str, key: str = "tools") -> Any:
    """The tools of a row, which may stand in a system turn. Raises DataError where both places say different things."""
    tools = row.get(key)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not says_something(turn.get("tools")):
            continue
        here = f"{place}[{i}].tools"
        if turn.get("role") not in ("system", "developer"):
            raise DataError(f"{here}: belongs to the row or to its system turn; move it there")
        inner = parse_tools(turn["tools"], here)
        if not says_something(tools):
            tools = inner
        elif parse_tools(tools, key) != inner:
            raise DataError(f"{here}: says something else than the tools that the row already has; keep one")
    return tools


def empty_but_for_tools(turn: dict, tools: Any) -> bool:
    """Whether a system turn holds nothing but the row's tools, or also the sentence that introduces tools anyway."""
    if turn["role"] not in ("system", "developer") or tools is None:
        return False
    if turn.get("content") in (None, ""):
        return says_something(turn.get("tools"))
    from ..chatglm.prompt import TOOLS_PROMPT  # see data/messages.py

    return turn["content"] == TOOLS_PROMPT


def text_call(message: dict, turn: Turn, place: str, offered: Set[str]) -> list[Turn]:
    """Parse an assistant's turn that may be a call by its text: to the call, else to the turn itself.

    ChatGLM3 and GLM-4 write the function's name, as `metadata` or in the first line, and then its arguments, as a
    Python call of literals or as JSON. Nothing is evaluated.

    Raises:
        DataError: the text should be a call, and is not.
    """
    name, text = message.get("metadata"), turn.content.strip()
    if not isinstance(name, str) or not name.strip():
        name, _, text = text.partition("\n")
        if name.strip() not in offered or not text.lstrip().startswith(("{", "```")):
            return [turn]
    name = function_name(name.strip(), f"{place}.metadata")
    call = Turn("tool", name=name, parameters=literal_arguments(text.strip(), name, place), learned=turn.learned)
    if not turn.reasoning:
        return [call]
    return [replace(turn, content=""), replace(call, joined=True)]


def literal_arguments(text: str, name: str, place: str) -> dict:
    """Parse the arguments of a call, written as a Python call of literals or as a JSON object."""
    if fenced := FENCED.fullmatch(text):
        text = fenced[1]
    if text.startswith("{"):
        return take({"content": from_json(text, f"{place}.content")}, "content", dict, place)
    from ..chatglm.prompt import parse_tool_call  # see data/messages.py

    arguments = parse_tool_call(text)
    with contextlib.suppress(TypeError, ValueError):  # sets, bytes and infinity are literals, and no JSON
        written = json.dumps(arguments, allow_nan=False)
        if arguments is not None:
            return from_json(written, f"{place}.content")
    raise DataError(
        f"{place}.content: no call of {name!r} with literal arguments; write tool_call(key='value', …) or a JSON "
        "object, or remove the metadata where it is no call"
    )
