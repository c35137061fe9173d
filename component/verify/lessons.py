"""Conversations of the sample data whose first answers show what a model was taught."""

import json
from itertools import islice
from pathlib import Path

from ..chatglm.prompt import TOOLS_PROMPT
from ..data.conversation import Conversation
from ..data.formats import read_conversations


def find_lessons(data: Path) -> list[Conversation]:
    """The first conversation of the sample data, and the first that calls the weather function, if there is one."""
    conversations = [conversation for _, conversation in read_conversations(data)]
    weather = (c for c in conversations if any(turn.name == "get_current_weather" for turn in c.turns))
    return [conversations[0], *islice(weather, 1)]


def ask(model, tokenizer, lesson: Conversation) -> str | dict:
    """The model's greedy answer to the lesson's question."""
    history = []
    if lesson.tools is not None:
        history = [{"role": "system", "content": TOOLS_PROMPT, "tools": lesson.tools}]
    response, _ = model.chat(tokenizer, lesson.turns[0].content, history=history, do_sample=False, max_new_tokens=100)
    return response


def taught_answer(lesson: Conversation) -> str | dict:
    """The answer that the lesson teaches, as `chat` returns it."""
    answer = lesson.turns[1]
    return answer.content or {"name": answer.name, "parameters": answer.parameters}


def shorten(response: str | dict) -> str:
    """A response in one line of at most 100 characters."""
    text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:100] + "…"
