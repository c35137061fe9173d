"""Parsers and writers of rows, from and to a Conversation: Firefly, ChatGLM3, OpenAI, ShareGPT, Alpaca, Glaive.

A parser raises DataError naming the field. A writer calls `lost(what)` for everything that its format has no place for,
and raises DataError where the written row would mean something else. Every format is described in docs/data_format.md.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run.errors import DataError
from .conversation import Conversation, Turn, describe, take
from .fields import (
    LEARNING,
    REASONING,
    begin_with_system,
    content_of,
    empty_but_for_tools,
    flag,
    from_json,
    function_name,
    given,
    is_learned,
    offered_tools,
    parse_tools,
    reasoning_of,
    refuse_learning,
    require_object,
    text_call,
)
from .keys import ROW_MEANINGS, TURN_MEANINGS, refuse_meaning, refuse_preference, says_something, turns_of, unread
from .messages import as_text, question_answer_pairs, to_openai, with_think_text
from .reader import load_json, read_rows
from .tools import names_of, wrap_tools

Lost = Callable[[str], None]


# Firefly: {"conversation": [{"human": text, "assistant": text}]}, for ChatGLM2 too


def parse_firefly(row: dict) -> Conversation:
    turns = []
    for i, exchange in enumerate(take(row, "conversation", list)):
        place = f"conversation[{i}]"
        require_object(exchange, place, "human and assistant")
        turns.append(Turn("user", take(exchange, "human", str, place)))
        turns.append(Turn("assistant", take(exchange, "assistant", str, place), is_learned(exchange, place)))
    return Conversation(begin_with_system(row, turns))


def write_firefly(conversation: Conversation, lost: Lost) -> dict:
    pairs, system = as_pairs(conversation, "firefly", lost)
    row = {"conversation": [{"human": human, "assistant": assistant} for human, assistant in pairs]}
    return ({"system": system} if system else {}) | row


def as_pairs(conversation: Conversation, name: str, lost: Lost) -> tuple[list[tuple[str, str]], str]:
    """Questions with their answers, and the system prompt before them. Raises DataError for any other order."""
    has_system = bool(conversation.turns) and conversation.turns[0].role == "system"
    system = conversation.turns[0].content if has_system else ""
    spoken = thinking_aloud(replace(conversation, turns=conversation.turns[has_system:]), lost)
    pairs = question_answer_pairs(spoken, name, remedy="convert it to another format")
    if not pairs:
        raise DataError("has no question with an answer; remove the row")
    if has_system and not system:
        lost("an empty system prompt")
    if not all(answer.learned for _, answer in pairs):
        lost("loss=false of an answer")
    return [(question.content, answer.content) for question, answer in pairs], system


def thinking_aloud(conversation: Conversation, lost: Lost) -> Conversation:
    """The conversation with reasoning as text, for a format without a field for it; calls `lost` if there is any."""
    written = with_think_text(conversation)
    if written is not conversation:
        lost("that reasoning is no part of the answer: written as <think> text")
    return written


# ChatGLM3: {"tools": any, "conversations": [{"role": …}]}


def parse_chatglm3(row: dict) -> Conversation:
    """Parse ChatGLM3's turns. A call is a `tool` turn, or what ChatGLM3's own code writes: an assistant's text with the
    function's name as `metadata`, then an `observation`. Raises DataError for the first fault."""
    listed = take(row, "conversations", list)
    tools = offered_tools(row, listed, "conversations")
    turns: list[Turn] = []
    for i, turn in enumerate(listed):
        place = f"conversations[{i}]"
        require_object(turn, place, "role")
        if take(turn, "role", str, place) == "observation":
            refuse_learning(turn, place)
            last = len(turns) - 1
            waits = bool(turns) and turns[last].role == "tool" and not turns[last].observed
            pending = {last: turns[last].id} if waits else {}
            answer_call(turns, pending, None, content_of(turn, place), place)
        elif not empty_but_for_tools(turn, tools):
            turns += parse_turn(turn, place, names_of(tools))
        if turns and turns[-1].joined and (len(turns) == 1 or turns[-2].role not in ("assistant", "tool")):
            raise DataError(f"{place}.joined: there is no answer or call before it; remove it")
    return Conversation(begin_with_system(row, turns), tools)


def parse_turn(turn: dict, place: str, offered: Set[str] = frozenset()) -> list[Turn]:
    """Parse one turn of ChatGLM3's, to two where reasoning stands before a call. Raises DataError for the first fault.

    Args:
        offered: names of the functions that may be called by text.
    """
    role = take(turn, "role", str, place)
    if role in ("system", "user"):
        refuse_learning(turn, place)
        return [Turn(role, take(turn, "content", str, place))]
    if role not in ("assistant", "tool"):
        raise DataError(f"{place}.role is {role!r}; expected system, user, assistant, tool or observation")
    learned = is_learned(turn, place)
    if role == "assistant":
        written = Turn(role, take(turn, "content", str, place), learned, reasoning=reasoning_of(turn, place))
        return written_calls(turn, written, place, offered)
    parameters = take(turn, "parameters", dict, place)
    for key in parameters:
        if not key.isidentifier():
            raise DataError(f"{place}.parameters: {key!r} cannot be a keyword argument; rename it")
    call_id = take(turn, "id", str, place) if "id" in turn else ""
    call = Turn(
        role,
        learned=learned,
        name=function_name(take(turn, "name", str, place), f"{place}.name"),
        parameters=parameters,
        observation=turn.get("observation"),
        observed="observation" in turn,
        id=call_id,
        joined=flag(turn, "joined", place, default=False),
    )
    return [call]


def write_chatglm3(conversation: Conversation, lost: Lost) -> dict:
    """Write a row of ChatGLM3: a call and its result are one turn of the role `tool`."""
    turns = []
    for turn in conversation.turns:
        if turn.role == "tool":
            for key in turn.parameters:
                if not key.isidentifier():
                    raise DataError(f"the parameter {key!r} of {turn.name} cannot be a Python keyword argument")
            written = {"role": "tool", "name": turn.name, "parameters": turn.parameters}
            written |= {"observation": turn.observation} if turn.observed else {}
            written |= {"id": turn.id} if turn.id else {}
        else:
            written = {"role": turn.role, "content": turn.content}
            written |= {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        if turn.role in ("assistant", "tool") and not turn.learned:
            written["loss"] = False
        turns.append(written | ({"joined": True} if turn.joined else {}))
    tools = {} if conversation.tools is None else {"tools": conversation.tools}
    return tools | {"conversations": turns}


# OpenAI: {"tools": […], "messages": [{"role": …}]}

TAGGED_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Hermes', and Qwen's
OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "result",
    "function": "result",
    "observation": "result",
    "tool_call": "call",  # ms-swift's: the JSON of one call; consecutive ones are parallel
    "tool_response": "result",
}


def parse_openai(row: dict) -> Conversation:
    """Parse messages of OpenAI's chat API, with calls and their results. Raises DataError for the first fault."""
    listed = take(row, "messages", list)
    key = "tools" if says_something(row.get("tools")) else "functions"  # the older name
    tools = parse_tools(offered_tools(row, listed, "messages", key), key)
    turns: list[Turn] = []
    pending: dict[int, str] = {}  # calls without a result yet: index in turns to id
    for i, message in enumerate(listed):
        place = f"messages[{i}]"
        require_object(message, place, "role")
        role = OPENAI_ROLES.get(take(message, "role", str, place))
        if role is None:
            raise DataError(f"{place}.role is {message['role']!r}; expected one of {', '.join(OPENAI_ROLES)}")
        if role in ("system", "user", "result"):
            refuse_learning(message, place)
        if role == "result":
            text = content_of(message, place)
            answer_call(turns, pending, message.get("tool_call_id"), text, place, message.get("name"))
            continue
        joined = role == "call" and i > 0 and listed[i - 1]["role"] == "tool_call"
        pending = pending if joined else {}
        if role == "call":
            call = parse_call(from_json(content_of(message, place), f"{place}.content"), f"{place}.content")
            pending[len(turns)] = ""
            turns.append(replace(call, learned=is_learned(message, place), joined=joined))
        elif role == "assistant":
            for turn in parse_answer(message, place, names_of(tools)):
                pending |= {len(turns): turn.id} if turn.role == "tool" else {}
                turns.append(turn)
        elif not empty_but_for_tools(message, tools):
            turns.append(Turn(role, content_of(message, place)))
    return Conversation(begin_with_system(row, turns), tools)


def parse_answer(message: dict, place: str, offered: Set[str]) -> list[Turn]:
    """Parse an assistant's message: its text, if any, and its calls."""
    calls = parse_calls(message, place)
    learned, reasoning = is_learned(message, place), reasoning_of(message, place)
    text = content_of(message, place, optional=bool(calls))
    if not calls:
        return written_calls(message, Turn("assistant", text, learned, reasoning=reasoning), place, offered)
    spoken = [Turn("assistant", text, learned, reasoning=reasoning)] if text or reasoning else []
    joined = [bool(spoken) or i > 0 for i in range(len(calls))]
    return spoken + [replace(call, learned=learned, joined=at) for call, at in zip(calls, joined, strict=True)]


def written_calls(message: dict, turn: Turn, place: str, offered: Set[str]) -> list[Turn]:
    """Parse calls out of an assistant's text, in Hermes' tags or as `text_call` reads them; else keep the turn."""
    written = TAGGED_CALL.findall(turn.content) if offered else []
    if not written:
        return text_call(message, turn, place, offered)
    calls = [parse_call(from_json(text, f"{place}: a <tool_call>"), f"{place}: a <tool_call>") for text in written]
    text = TAGGED_CALL.sub("", turn.content).strip()
    spoken = [replace(turn, content=text)] if text or turn.reasoning else []
    return spoken + [replace(call, learned=turn.learned, joined=bool(spoken) or i > 0) for i, call in enumerate(calls)]


def answer_call(
    turns: list[Turn], pending: dict[int, str], call_id: Any, text: str, place: str, name: Any = None
) -> None:
    """Give a result to the pending call of its id, or without an id to the first one of that name, else to the first.

    Raises:
        DataError: no pending call fits.
    """
    waiting = [at for at, known in pending.items() if call_id in (None, "") or known == call_id]
    if call_id in (None, ""):
        waiting.sort(key=lambda at: turns[at].name != name)
    if not waiting:
        named = f" with the id {describe(call_id)}" if call_id else ""
        raise DataError(f"{place}: answers no call{named} of the message before; give that call, or remove the result")
    del pending[waiting[0]]
    turns[waiting[0]] = replace(turns[waiting[0]], observation=text, observed=True)


def parse_calls(message: dict, place: str) -> list[Turn]:
    """Parse the calls of an assistant's message, in `tool_calls` or the older `function_call`."""
    if message.get("tool_calls") in (None, []):
        legacy = message.get("function_call")
        return [] if legacy is None else [parse_call(legacy, f"{place}.function_call")]
    found = []
    for i, call in enumerate(take(message, "tool_calls", list, place)):
        here = f"{place}.tool_calls[{i}]"
        require_object(call, here, "function")
        turn = parse_call(call.get("function", call), f"{here}.function")
        found.append(replace(turn, id=take(call, "id", str, here) if call.get("id") is not None else ""))
    if len({turn.id for turn in found if turn.id}) < sum(bool(turn.id) for turn in found):
        raise DataError(f"{place}.tool_calls: two calls have one id; give each its own")
    return found


def parse_call(call: Any, place: str) -> Turn:
    """Parse a call `{"name", "arguments"}`, whose arguments are an object or its JSON."""
    require_object(call, place, "name and arguments")
    name = function_name(take(call, "name", str, place), f"{place}.name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", f"{place}.arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{place}.arguments must be an object, got {describe(arguments)}")
    return Turn("tool", name=name, parameters=arguments, learned=True)


def write_openai(conversation: Conversation, lost: Lost) -> dict:
    """Write a row of OpenAI's messages; a call and its result are two messages with one id."""
    messages, tools = to_openai(conversation)
    lose_empty_answers(conversation, lost)
    for message in messages:
        call_ids = [call["id"] for call in message.get("tool_calls", ())]
        if len(set(call_ids)) < len(call_ids):
            raise DataError("has calls in one message that share an id; give each its own")
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if "tool_calls" in message:
            message["content"] = message["content"] or None
        flags = set(message.pop("learned", (True,)))
        if len(flags) > 1:
            lost("loss=false of a part of a message")
        if flags == {False}:
            message["weight"] = 0
    if any(turn.observed and not isinstance(turn.observation, str) for turn in conversation.turns):
        lost("the type of a result: written as its JSON")
    if tools is None and conversation.tools is not None:
        lost("tools that are no function descriptions: written as the system message that ChatGLM3 shows")
    elif tools is not None and parse_tools(tools, "tools") != conversation.tools:
        lost("the form of tools")
    return {"messages": messages} if tools is None else {"tools": tools, "messages": messages}


# ShareGPT: {"system": text, "tools": list or its JSON, "conversations": [{"from": …, "value": text}]}

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "observation": "result",
    "tool": "result",
    "function_response": "result",
    "function": "result",
    "bing": "assistant",
    "prompter": "user",
}


def parse_sharegpt(row: dict) -> Conversation:
    """Parse ShareGPT's `from` and `value`, calls and observations too. Raises DataError for the first fault."""
    turns: list[Turn] = []
    pending: dict[int, str] = {}
    tools = parse_tools(row.get("tools"), "tools")
    for i, message in enumerate(take(row, "conversations", list)):
        place = f"conversations[{i}]"
        require_object(message, place, "from and value")
        source = take(message, "from", str, place)
        role = SHAREGPT_ROLES.get(source)
        if role is None:
            raise DataError(f"{place}.from is {source!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        value = take(message, "value", str, place)
        if role not in ("assistant", "call"):
            refuse_learning(message, place)
        learned = is_learned(message, place)
        if role == "result":
            answer_calls(turns, pending, value, place)
            continue
        pending = {}
        if role == "call":
            calls = from_json(value, f"{place}.value")
            if calls == []:
                raise DataError(f"{place}.value: holds no call; remove the message")
            for j, call in enumerate(calls if isinstance(calls, list) else [calls]):
                pending[len(turns)] = ""
                turns.append(replace(parse_call(call, f"{place}.value"), learned=learned, joined=j > 0))
        elif role == "assistant":
            said = Turn(role, value, learned, reasoning=reasoning_of(message, place))
            for turn in written_calls({}, said, place, names_of(tools)):
                pending |= {len(turns): ""} if turn.role == "tool" else {}
                turns.append(turn)
        else:
            turns.append(Turn(role, value))
    return Conversation(begin_with_system(row, turns), tools)


def answer_calls(turns: list[Turn], pending: dict[int, str], value: str, place: str) -> None:
    """Give an observation to the pending calls: to one call as it is, to several as a JSON list of their results."""
    results: Any = None
    if len(pending) > 1:
        with contextlib.suppress(DataError):  # it is text, which may begin like a list
            results = load_json(value)
    if not isinstance(results, list) or len(results) != len(pending):
        results = [value]
    for result in results:
        answer_call(turns, pending, None, result, place)


def write_sharegpt(conversation: Conversation, lost: Lost) -> dict:
    """Write a row of ShareGPT."""
    messages: list[dict] = []
    for group in grouped(thinking_aloud(conversation, lost).turns):
        calls = [turn for turn in group if turn.role == "tool"]
        for turn in group:
            if turn.role != "tool":
                name = {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role)
                messages.append({"from": name, "value": turn.content} | unlearned([turn], lost))
        if calls:
            if len(group) > len(calls):
                lost("that an answer's text and its calls are one message")
            if any(call.id for call in calls):
                lost("the ids of calls")
            written = [{"name": call.name, "arguments": call.parameters} for call in calls]
            value = json.dumps(written if len(calls) > 1 else written[0], ensure_ascii=False)
            messages.append({"from": "function_call", "value": value} | unlearned(calls, lost))
            messages += [{"from": "observation", "value": value} for value in results_of(calls, lost)]
    row: dict[str, Any] = {"conversations": messages}
    if conversation.tools is not None:
        if not isinstance(conversation.tools, list):
            raise DataError("has tools that are no list, for which ShareGPT's rows have no place")
        if parse_tools(conversation.tools, "tools") != conversation.tools:
            lost("the form of tools")
        row["tools"] = json.dumps(conversation.tools, ensure_ascii=False)
    return row


def results_of(calls: list[Turn], lost: Lost) -> list[str]:
    """Observations to write: one call's result, or parallel calls' results as one JSON list, to keep them apart."""
    observed = [call for call in calls if call.observed]
    if not observed:
        return []
    if len(calls) == 1:
        if not isinstance(calls[0].observation, str):
            lost("the type of a result: written as its JSON")
        return [as_text(calls[0].observation)]
    if len(observed) < len(calls):
        raise DataError("has parallel calls of which only some have results, which ShareGPT's rows cannot say")
    return [json.dumps([call.observation for call in calls], ensure_ascii=False)]


def lose_empty_answers(conversation: Conversation, lost: Lost) -> None:
    for one, two in itertools.pairwise(conversation.turns):
        if one.role != "tool" and two.joined and not one.content + one.reasoning:
            lost("an empty answer before a call")
            return


def unlearned(turns: list[Turn], lost: Lost) -> dict:
    flags = {turn.learned for turn in turns if turn.role in ("assistant", "tool")}
    if len(flags) > 1:
        lost("loss=false of one call among others")
    return {"loss": False} if False in flags else {}


def grouped(turns: tuple[Turn, ...]) -> list[list[Turn]]:
    """Turns in groups, one for each message that they are written in."""
    groups: list[list[Turn]] = []
    for turn in turns:
        if turn.joined and groups:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return groups


# Alpaca: {"instruction": text, "input": text, "output": text, "system": text, "history": [[text, text]]}; with query
# and response instead of instruction and output it is ms-swift's


def parse_alpaca(row: dict) -> Conversation:
    """Parse Alpaca's `instruction`, `input` and `output`, or ms-swift's `query` and `response`."""
    asked, answered = ("instruction", "output") if "instruction" in row else ("query", "response")
    turns = []
    for i, pair in enumerate(take(row, "history", list) if given(row, "history") else []):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"history[{i}] must be [question, answer], got {describe(pair)}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1], learned=True)]
    question = take(row, asked, str)
    if given(row, "input"):
        question += "\n" + take(row, "input", str)
    turns += [Turn("user", question), Turn("assistant", take(row, answered, str), learned=True)]
    return Conversation(begin_with_system(row, turns))


def write_alpaca(conversation: Conversation, lost: Lost) -> dict:
    pairs, system = as_pairs(conversation, "alpaca", lost)
    row = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    row |= {"system": system} if system else {}
    return row | ({"history": [list(pair) for pair in pairs[:-1]]} if pairs[1:] else {})


# Glaive: {"system": "SYSTEM: …functions…", "chat": "USER: …\n\n\nASSISTANT: …<|endoftext|>…"}

GLAIVE_TOOLS = "You are a helpful assistant with access to the following functions. Use them if required -"
GLAIVE_SPEAKER = re.compile(r"(?:^|\n)[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):[ \t]?")
GLAIVE_CALL = re.compile(
    r"""\{\s*"name":\s*"(?P<name>[^"]+)"\s*(?:,\s*"arguments":\s*(?:'(?P<quoted>.*)'|(?P<bare>\{.*\}))\s*)?\}""",
    re.DOTALL,
)
GLAIVE_END = "<|endoftext|>"


def parse_glaive(row: dict) -> Conversation:
    """Parse Glaive's text of `USER:`, `ASSISTANT:` and `FUNCTION RESPONSE:`. Raises DataError for the first fault."""
    turns, tools = [], None
    if given(row, "system"):
        text = take(row, "system", str).removeprefix("SYSTEM:").strip()
        at = text.find("{")
        if "functions" in text and at >= 0:
            tools = concatenated_json(text[at:], "system")
        elif text:
            turns.append(Turn("system", text))
    lead, *parts = GLAIVE_SPEAKER.split(take(row, "chat", str))
    if lead.strip() or not parts:
        raise DataError("chat: must begin with 'USER: '")
    pending: dict[int, str] = {}
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        text = text.strip().removesuffix(GLAIVE_END).strip()
        if speaker == "FUNCTION RESPONSE":
            answer_call(turns, pending, None, text, "chat: a FUNCTION RESPONSE")
            continue
        pending = {}
        if speaker == "USER":
            turns.append(Turn("user", text))
            continue
        text, *calls = text.split("<functioncall>")
        if text.strip() or not calls:
            turns.append(Turn("assistant", text.strip(), learned=True))
        for call in calls:
            pending[len(turns)] = ""
            turns.append(replace(glaive_call(call), joined=bool(text.strip()) or call is not calls[0]))
    return Conversation(tuple(turns), tools)


def glaive_call(text: str) -> Turn:
    """Parse a call whose arguments are JSON between single quotes, in which a single quote may be escaped or not."""
    match = GLAIVE_CALL.fullmatch(text.strip().removesuffix(GLAIVE_END).strip())
    if not match:
        raise DataError(f"chat: <functioncall> is followed by no call: {describe(text.strip())}")
    arguments = match["bare"] or match["quoted"] or "{}"
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        arguments = arguments.replace("\\'", "'")
    call = {"name": match["name"], "arguments": from_json(arguments, "chat: the arguments of a <functioncall>")}
    return parse_call(call, "chat: a <functioncall>")


def concatenated_json(text: str, place: str) -> list:
    values, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: a function's description is not JSON ({error})") from None
        values.append(from_json(text[at:end], place))
        at = end
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
    return values


def write_glaive(conversation: Conversation, lost: Lost) -> dict:
    """Write a row of Glaive: `system` and `chat`."""
    turns = list(thinking_aloud(conversation, lost).turns)
    if conversation.tools is not None:
        tools = wrap_tools(conversation.tools)
        if not tools:
            raise DataError("has tools that are no function descriptions, for which Glaive's rows have no place")
        functions = [tool["function"] for tool in tools]
        if functions != conversation.tools:
            lost("the form of tools")
        described = [json.dumps(function, indent=4, ensure_ascii=False) for function in functions]
        system = "\n\n".join([GLAIVE_TOOLS, *described])
        if turns and turns[0].role == "system":
            lost("a system prompt beside tools")
            turns.pop(0)
    else:
        has_system = bool(turns) and turns[0].role == "system"
        system = turns.pop(0).content if has_system else ""
        if has_system and not system:
            lost("an empty system prompt")
        if system != system.strip() or ("functions" in system and "{" in system):
            raise DataError("has a system prompt that begins or ends with space, or that Glaive's rows take for tools")
    if not turns:
        raise DataError("has no question or answer; remove the row")
    lose_empty_answers(conversation, lost)
    chat = []
    for group in grouped(tuple(turns)):
        unlearned_flag = unlearned(group, lost)
        if unlearned_flag:
            lost("loss=false of an answer")
        calls = [turn for turn in group if turn.role == "tool"]
        if len(calls) > 1:
            raise DataError("has parallel calls, for which Glaive's rows have no place")
        if group[0].role == "system":
            raise DataError("has a system turn after the first turn, for which Glaive's rows have no place")
        text = plain_for_glaive(group[0].content) if group[0].role != "tool" else ""
        if group[0].role == "user":
            chat.append(f"USER: {text}")
            continue
        for call in calls:
            arguments = plain_for_glaive(json.dumps(call.parameters, ensure_ascii=False))
            if plain_for_glaive(call.name).count('"'):
                raise DataError(f"the function's name {call.name!r} holds a quote, which Glaive's rows cannot say")
            text += f' <functioncall> {{"name": "{call.name}", "arguments": \'{arguments}\'}}'
            if call.id:
                lost("the ids of calls")
        chat.append(f"ASSISTANT: {text.strip()} {GLAIVE_END}")
        for call in calls:
            if call.observed:
                if not isinstance(call.observation, str):
                    lost("the type of a result: written as its JSON")
                chat.append(f"FUNCTION RESPONSE: {plain_for_glaive(as_text(call.observation))}")
    return {"system": f"SYSTEM: {system}" if system else "", "chat": "\n\n\n".join(chat)}


def plain_for_glaive(text: str) -> str:
    if GLAIVE_SPEAKER.search(text) or GLAIVE_END in text or "<functioncall>" in text or text != text.strip():
        raise DataError("has text with a marker of Glaive's or with space at either end, which its rows cannot hold")
    return text


# The table of all formats


@dataclass(frozen=True)
class RowFormat:
    parse: Callable[[dict], Conversation]
    write: Callable[[Conversation, Lost], dict]
    keys: frozenset[str]  # of a row that are read; the converter keeps others as they are
    turn_keys: frozenset[str]  # of a turn that are read; the converter loses others


def row_format(parse: Callable, write: Callable, keys: str, turn_keys: str = "") -> RowFormat:
    return RowFormat(parse, write, frozenset(keys.split()), frozenset(turn_keys.split()))


FLAGS = " ".join(LEARNING)
ROW_FORMATS: dict[str, RowFormat] = {
    "firefly": row_format(parse_firefly, write_firefly, "conversation system", f"human assistant {FLAGS}"),
    "chatglm3": row_format(
        parse_chatglm3,
        write_chatglm3,
        "conversations tools system",
        f"role content name parameters observation id joined metadata tools {FLAGS} {' '.join(REASONING)}",
    ),
    "openai": row_format(
        parse_openai,
        write_openai,
        "messages tools functions system",
        f"role content name tool_calls function_call tool_call_id metadata tools {FLAGS} {' '.join(REASONING)}",
    ),
    "sharegpt": row_format(
        parse_sharegpt, write_sharegpt, "conversations tools system", f"from value {FLAGS} {' '.join(REASONING)}"
    ),
    "alpaca": row_format(parse_alpaca, write_alpaca, "instruction input output query response system history"),
    "glaive": row_format(parse_glaive, write_glaive, "system chat"),
}


def detect_format(row: dict) -> str:
    """Find which of ROW_FORMATS a row is in, by its keys. Raises DataError where it is in none."""
    if "conversations" in row:
        turns = row["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "chatglm3"
    for key, name in (("conversation", "firefly"), ("messages", "openai"), ("chat", "glaive")):
        if key in row:
            return name
    if "instruction" in row or "query" in row:
        return "alpaca"
    keys = ", ".join(map(repr, list(row)[:8])) or "no key"
    raise DataError(
        f"unknown kind of row, with {keys}; expected conversations (ChatGLM3, ShareGPT), conversation (Firefly), "
        "messages (OpenAI), instruction and output (Alpaca; rename prompt and answer to these) or chat (Glaive)"
    )


def parse_row(row: dict, name: str | None = None) -> Conversation:
    """Parse a row in the format `name` of ROW_FORMATS, or in the one that its keys show. Raises DataError for a fault,
    and for a key that is not read but would change what is learned."""
    refuse_preference(row)
    own = ROW_FORMATS[name or detect_format(row)]
    refuse_meaning(row, own.keys, ROW_MEANINGS)
    for place, turn in turns_of(row, own.keys):
        refuse_meaning(turn, own.turn_keys, TURN_MEANINGS, place)
    return own.parse(row)


def unread_keys(row: dict) -> list[str]:
    """Remarks on keys of a row and its turns that are neither read nor known as notes, each kind once."""
    own = ROW_FORMATS[detect_format(row)]
    found = [f"`{key}` of a row is not read" for key in unread(row, own.keys, ROW_MEANINGS)]
    turns = [key for _, turn in turns_of(row, own.keys) for key in unread(turn, own.turn_keys, TURN_MEANINGS)]
    return [*found, *(f"`{key}` of a turn is not read" for key in dict.fromkeys(turns))]


def read_conversations(file: Path) -> Iterator[tuple[int, Conversation]]:
    """Read (line, Conversation) of every row of a file. Raises DataError, with file and line, for the first bad one."""
    for line, row in read_rows(file):
        try:
            if isinstance(row, DataError):
                raise row
            yield line, parse_row(row)
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from None
