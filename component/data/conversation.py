"""Conversation and its Turns, which the rows of every format become. Standard library only."""

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..run.errors import DataError
from .tools import misfits, names_of


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. `learned`: the model learns to write it (of a tool turn, the call alone)."""

    role: str  # system, user, assistant or tool
    content: str = ""
    learned: bool = False
    name: str = ""  # the function that a tool turn calls
    parameters: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the call
    observation: Any = None  # result of the call
    observed: bool = False  # whether there is a result (which may be null)
    id: str = ""  # of the call, if the source has one
    joined: bool = False  # written in one message with the turn before: text and its calls, or parallel calls
    reasoning: str = ""  # thoughts of an assistant's turn, before its content


CALL_AS_TEXT = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<functioncall>|^Action: .*\nAction Input:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]
    tools: Any = None  # descriptions of the functions on offer; None: no functions


def oddities(conversation: Conversation) -> Iterator[str]:
    """Legal but unusual things in a conversation, each kind once."""
    turns = [turn for turn in conversation.turns if turn.role != "system"]
    if turns[0].role != "user":
        yield "the assistant speaks first"
    if turns[-1].role == "user":
        yield "ends on a user turn"
    if turns[-1].role == "tool":
        yield "ends on a call"
    if any(turn.role == "assistant" and not (turn.content + turn.reasoning).strip() for turn in turns):
        yield "has an empty answer"
    if any(one.role == two.role == "user" for one, two in itertools.pairwise(turns)):
        yield "has two user turns in a row"
    if any(one.role == two.role == "assistant" and not two.joined for one, two in itertools.pairwise(turns)):
        yield "has two answers in a row"
    if any(turn.role == "assistant" and CALL_AS_TEXT.search(turn.content) for turn in turns):
        yield "has an answer that looks like a call written as text, which is learned as text"
    if "system" in [turn.role for turn in conversation.turns][1:]:
        yield "has a system turn after the first turn"
    offered = names_of(conversation.tools)
    if offered and any(turn.role == "tool" and turn.name not in offered for turn in turns):
        yield "calls a function that tools does not name"
    if any(one.role == "tool" and not one.observed and not two.joined for one, two in itertools.pairwise(turns)):
        yield "has a call without a result, and goes on"
    calls = [turn for turn in turns if turn.role == "tool"]
    found = (misfit for call in calls for misfit in misfits(call.name, call.parameters, conversation.tools))
    yield from dict.fromkeys(misfit.text for misfit in found)


def choose_learned(conversation: Conversation, loss_on: str) -> Conversation:
    """Mark the turns that are learned. `flagged`: as the row says. `all`: every answer and call. `last`: the last
    message that the model writes. Raises DataError where no turn is learned."""
    turns = conversation.turns
    written = [i for i, turn in enumerate(turns) if turn.role in ("assistant", "tool")]
    if loss_on == "last":
        written = [i for i in written if all(turn.joined for turn in turns[i + 1 : written[-1] + 1])]
    chosen = [i for i in written if loss_on != "flagged" or turns[i].learned]
    if not chosen:
        raise DataError("nothing to learn: no answer or call, or each has loss=false; remove the row")
    if loss_on == "flagged":
        return conversation
    return replace(conversation, turns=tuple(replace(turn, learned=i in chosen) for i, turn in enumerate(turns)))


def count_rounds(conversation: Conversation) -> int:
    """Number of rounds. One begins with the conversation, and one wherever the user speaks after somebody else."""
    return len(round_starts(conversation.turns))


def without_first_rounds(conversation: Conversation, rounds: int) -> Conversation:
    """The conversation without its first `rounds` rounds, but with all system turns and tools."""
    if not rounds:
        return conversation
    start = round_starts(conversation.turns)[rounds]
    kept = [turn for i, turn in enumerate(conversation.turns) if i >= start or turn.role == "system"]
    return replace(conversation, turns=tuple(kept))


def first_rounds_to_leave_out(conversation: Conversation, fits: Callable[[Conversation], bool]) -> int:
    """The smallest number of first rounds without which the conversation fits. The last round is never counted in."""

    def fits_without(rounds: int) -> bool:
        return fits(without_first_rounds(conversation, rounds))

    return bisect_left(range(count_rounds(conversation) - 1), True, key=fits_without)


def round_starts(turns: tuple[Turn, ...]) -> list[int]:
    spoken = [i for i, turn in enumerate(turns) if turn.role != "system"]
    follows = dict(zip(spoken[1:], spoken, strict=False))
    return [i for i in spoken if i not in follows or (turns[i].role == "user" and turns[follows[i]].role != "user")]


def take(holder: dict, key: str, kind: type, place: str = "") -> Any:
    """Return `holder[key]`, which must be of type `kind`. Raises DataError that says what is there instead."""
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
