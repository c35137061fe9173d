"""Messages of ChatGLM3's own and of OpenAI's chat API, translated to those that ChatGLM3 reads and writes."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from .prompt import Message, call_message, tools_message

# Keys of a message beside its role and content, by its role.
KEYS = {
    "system": {"metadata", "tools"},
    "user": {"metadata"},
    "assistant": {"metadata", "tool_calls"},
    "observation": {"metadata"},
    "tool": {"tool_call_id", "name"},
}


def to_chatglm3(conversation: Sequence[dict], tools: Sequence[dict] = ()) -> list[Message]:
    """Translate a conversation to ChatGLM3's messages.

    A result stands directly after its call, as in training, also where several calls were made at once.

    Args:
        conversation: messages of ChatGLM3's own (`metadata`, role `observation`, `tools` in a system message), of
            OpenAI (`tool_calls`, role `tool`, content in parts of text), or of both.
        tools: descriptions of functions, for a system message before all others. Here and in a system message they may
            be bare, or as OpenAI wraps them. (A training row of ChatGLM3's shows its `tools` as they stand there.)

    Raises:
        ValueError: a message holds something for which ChatGLM3 has no place.
    """
    groups: list[list[Message]] = []  # of one message, or of a call and its result
    waiting: list[tuple[str | None, list[Message]]] = []  # id and group of calls without a result
    if tools:
        for tool in tools:
            if not isinstance(tool, dict):
                raise ValueError(f"tools holds {tool!r}; expected a function or its description")
        groups.append([tools_message(unwrap(list(tools)))])
    for i, given in enumerate(conversation):
        try:
            message, calls = read_message(given)
            if tools and given.get("tools"):
                raise ValueError("has tools, and others are given beside the conversation; keep one")
            if message.role == "tool" or (message.role == "observation" and waiting):
                find_call(given, waiting).append(message._replace(role="observation"))
                continue
        except ValueError as error:
            raise ValueError(f"messages[{i}]: {error}") from error
        if message.content or not calls:
            groups.append([message])
        waiting = [(None, groups[-1])] if message.role == "assistant" and message.metadata.strip() else []
        for call_id, call in calls:
            groups.append([call])
            waiting.append((call_id, groups[-1]))
    return list(chain(*groups))


def unwrap(tools: Any) -> Any:
    """Functions' bare descriptions, which ChatGLM3 shows, from OpenAI's `{"type": "function", "function": …}`.

    Any other JSON, which may be offered as tools too, stays as it is.
    """
    return [tool["function"] if is_wrapped(tool) else tool for tool in tools] if isinstance(tools, list) else tools


def is_wrapped(tool: Any) -> bool:
    wrapped = isinstance(tool, dict) and tool.keys() == {"type", "function"} and tool["type"] == "function"
    return wrapped and isinstance(tool["function"], dict)


def read_message(message: dict) -> tuple[Message, list[tuple[str | None, Message]]]:
    """A message without its calls, and of each call its id and message. Keys that are empty say nothing."""
    role = message.get("role") if isinstance(message, dict) else message
    if role not in KEYS:
        raise ValueError(f"role is {role!r}; expected one of {', '.join(KEYS)}")
    if strays := {key for key, value in message.items() if value} - KEYS[role] - {"role", "content"}:
        raise ValueError(f"has {min(strays)}, for which ChatGLM has no place in a message of {role}; remove it")
    calls = [read_call(call) for call in message.get("tool_calls") or ()]
    content = "" if calls and message.get("content") is None else text_of(message.get("content"))
    if message.get("tools") is not None:
        content = tools_message(unwrap(message["tools"]), content).content
    return Message(role, message.get("metadata") or "", content), calls


def read_call(call: Any) -> tuple[str | None, Message]:
    """Id and message of one of OpenAI's `tool_calls`, whose arguments are an object or its JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = arguments or {}
    if isinstance(arguments, str):
        with suppress(json.JSONDecodeError):  # what is no JSON is refused as it is
            arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(
            f"tool_calls holds {call!r}; expected a function with its name and arguments, an object or its JSON"
        )
    return call.get("id"), call_message(name, arguments)


def text_of(content: Any) -> str:
    """A message's content, which may be given in parts of text."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"content is {content!r}; expected text")
    return "".join(texts)


def find_call(result: dict, waiting: list[tuple[str | None, list[Message]]]) -> list[Message]:
    """Take from `waiting` the group of the call that a result answers: of its id, else of its name, else the first."""
    fits = [call for call in waiting if result.get("tool_call_id") in (None, "", call[0])]
    if not fits:
        raise ValueError("answers no call of the message before it; give that call, or remove the result")
    call = min(fits, key=lambda call: call[1][0].metadata.strip() != result.get("name"))
    waiting.remove(call)
    return call[1]
