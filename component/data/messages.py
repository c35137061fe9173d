"""A Conversation as pairs of question and answer, or as messages of OpenAI and chat templates."""

import json
from dataclasses import replace
from typing import Any

from ..run.errors import DataError
from .conversation import Conversation, Turn
from .tools import wrap_tools


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def with_think_text(conversation: Conversation) -> Conversation:
    """The conversation with reasoning as `<think>` text before the content, for formats without a field for it."""
    if not any(turn.reasoning for turn in conversation.turns):
        return conversation
    return replace(conversation, turns=tuple(map(think_aloud, conversation.turns)))


def think_aloud(turn: Turn) -> Turn:
    if not turn.reasoning:
        return turn
    return replace(turn, content=f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}", reasoning="")


def question_answer_pairs(
    conversation: Conversation, data_format: str, remedy: str = "set data_format to chat_template"
) -> list[tuple[Turn, Turn]]:
    """Pair the questions of a conversation with their answers. Raises DataError if it holds anything else."""
    turns = with_think_text(conversation).turns
    others = {turn.role for turn in turns} - {"user", "assistant"}
    others |= {"tools"} if conversation.tools is not None else set()
    if others:
        reason = f"{data_format} has no place for {' and '.join(sorted(others))}"
    elif [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        reason = f"{data_format} has pairs of user and assistant alone"
    else:
        return list(zip(turns[::2], turns[1::2], strict=True))
    raise DataError(f"{reason}; {remedy}, or remove the row")


def to_openai(conversation: Conversation) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) as OpenAI and chat templates have them, a call's arguments as an object.

    An assistant's message has `learned`, one flag for its text and one for each call, and `reasoning_content` if it
    has reasoning. Descriptions of tools without names become the system message that ChatGLM3 shows.
    """
    messages: list[dict] = []
    calls: list[Turn] = []  # of the last message

    def add_results() -> None:
        for call in calls:
            if call.observed:
                result = {"tool_call_id": call_ids[id(call)], "name": call.name, "content": as_text(call.observation)}
                messages.append({"role": "tool"} | result)
        calls.clear()

    # Nine letters and digits, which every template accepts.
    call_ids = {id(turn): turn.id or f"call{i:05}" for i, turn in enumerate(conversation.turns)}
    tools = wrap_tools(conversation.tools)
    if tools is None and conversation.tools is not None:
        from ..chatglm.prompt import tools_message  # imported here: its package takes seconds, such rows are rare

        messages.append({"role": "system", "content": tools_message(conversation.tools).content})
    for turn in conversation.turns:
        if not turn.joined:
            add_results()
        if turn.role == "tool":
            if not turn.joined:
                messages.append({"role": "assistant", "content": "", "learned": ()})
            function = {"name": turn.name, "arguments": turn.parameters}
            call = {"id": call_ids[id(turn)], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
            messages[-1]["learned"] += (turn.learned,)
            calls.append(turn)
        else:
            flags = {"learned": (turn.learned,)} if turn.role == "assistant" else {}
            flags |= {"reasoning_content": turn.reasoning} if turn.reasoning else {}
            messages.append({"role": turn.role, "content": turn.content} | flags)
    add_results()
    return messages, tools
