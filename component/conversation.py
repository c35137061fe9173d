"""One row of a JSONL file to a Conversation, or an error that names file, line, field and remedy."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A fault in a user's data. Its text is `file:line: field: what is wrong; what to do`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a row. `learned` says that the model is to learn to write it (of a tool turn: the call)."""

    role: str  # system, user, assistant or tool
    content: str = ""
    learned: bool = False
    name: str = ""  # the function that a tool turn calls, …
    parameters: dict[str, Any] = field(default_factory=dict)  # … its keyword arguments, …
    observation: Any = None  # … and its result


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]
    tools: Any = None  # descriptions of the functions on offer; None: no functions


def read_conversations(path: str | Path, parse: Callable[[dict], Conversation]) -> Iterator[tuple[int, Conversation]]:
    """Read a JSONL file: (line number from 1, Conversation) for every line that is not blank.

    Args:
        parse: `parse_chatglm3` or `parse_firefly`.

    Raises:
        DataError: for the first bad row.
        OSError: the file cannot be read.
    """
    for number, row in read_rows(path):
        try:
            yield number, parse(row)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, JSON object) of every line that is not blank. Raises DataError where it is anything else."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text, parse_constant=refuse_constant)
                if "\\ud" in text.lower():  # an escaped surrogate, which must be half of a pair
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                character = error.object[error.start]
                raise DataError(f"{place}: holds {character!r}, half of a surrogate pair; remove it") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{place}:{error.colno}: not JSON ({error.msg}); write one object a line") from None
            except RecursionError:
                raise DataError(f"{place}: nested too deeply; flatten the row") from None
            except ValueError as error:  # a number that is none, or one of thousands of digits
                raise DataError(f"{place}: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: a row must be a JSON object, got {describe(row)}")
            yield number, row


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number; write null or text")


def parse_firefly(row: dict) -> Conversation:
    """Firefly's and ChatGLM2's rows: `conversation`, a list of `{"human": text, "assistant": text}`."""
    if "conversations" in row and "conversation" not in row:
        raise DataError(
            "conversation: missing, and this row has ChatGLM3's conversations; use a model whose name contains "
            "'chatglm3' or set data_format to chatglm3"
        )
    turns = []
    for i, exchange in enumerate(take(row, "conversation", list)):
        place = f"conversation[{i}]"
        if not isinstance(exchange, dict):
            raise DataError(f"{place}: must be an object with human and assistant, got {describe(exchange)}")
        turns.append(Turn("user", take(exchange, "human", str, place)))
        turns.append(Turn("assistant", take(exchange, "assistant", str, place), learned=True))
    if not turns:
        raise DataError("conversation: empty; give at least one human and assistant pair or remove the row")
    return Conversation(tuple(turns))


def parse_chatglm3(row: dict) -> Conversation:
    """ChatGLM3's rows: `conversations`, a list of turns with roles, and `tools` where functions may be called."""
    if "conversation" in row and "conversations" not in row:
        raise DataError(
            "conversations: missing, and this row has Firefly's conversation; convert the file with "
            "python script/convert_data_format.py --input FILE --output FILE"
        )
    turns = tuple(parse_turn(turn, f"conversations[{i}]") for i, turn in enumerate(take(row, "conversations", list)))
    if not any(turn.learned for turn in turns):
        raise DataError("conversations: nothing to learn; give an assistant or tool turn without loss=false")
    return Conversation(turns, row.get("tools"))


def parse_turn(turn: Any, place: str) -> Turn:
    """One element of `conversations`. `place` names it in a DataError."""
    if not isinstance(turn, dict):
        raise DataError(f"{place}: must be an object with role, got {describe(turn)}")
    role = take(turn, "role", str, place)
    if role in ("system", "user"):
        return Turn(role, take(turn, "content", str, place))
    if role not in ("assistant", "tool"):
        raise DataError(f"{place}.role is {role!r}; expected system, user, assistant or tool")
    learned = take(turn, "loss", bool, place) if "loss" in turn else True
    if role == "assistant":
        return Turn(role, take(turn, "content", str, place), learned)
    name = take(turn, "name", str, place)
    if not name.strip() or "\n" in name:
        raise DataError(f"{place}.name is {name!r}; expected the function's name on one line")
    parameters = take(turn, "parameters", dict, place)
    for key in parameters:
        if not key.isidentifier():
            raise DataError(f"{place}.parameters: {key!r} cannot be a keyword argument; rename it")
    return Turn(role, "", learned, name, parameters, turn.get("observation"))


def take(holder: dict, key: str, kind: type, place: str = "") -> Any:
    """`holder[key]` if it is of that kind, else a DataError that says what stands there."""
    path = f"{place}.{key}" if place else key
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false"}
    if key not in holder:
        raise DataError(f"{path}: missing; expected {names[kind]}")
    if not isinstance(holder[key], kind):
        raise DataError(f"{path} must be {names[kind]}, got {describe(holder[key])}")
    return holder[key]


def describe(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if len(text) <= 40 else text[:40] + '…'} ({type(value).__name__})"
