"""Talks whose answers are written beforehand, with the real prompts and the real reading of answers."""

from pathlib import Path

import pytest

from component.chat.conversation import Talk
from component.inference.sampling import Generation
from component.inference.session import Session
from tests.component.data.test_chat_template import FAMILIES

WEATHER = {
    "name": "weather",
    "description": "how it is outside",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]


def call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


class Script:
    """An engine that writes given answers, one token at each step. An answer is its text, or (text, how it ends)."""

    room = 100_000

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.asked: list[tuple[str, bool]] = []  # prompt, and whether the adapter was used

    def submit(self, prompt, sampling, adapted):
        self.asked.append((self.tokenizer.decode(prompt), adapted))
        answer = self.answers.pop(0)
        text, self.reason = (answer, "stop") if isinstance(answer, str) else answer
        self.left = self.tokenizer.encode(text, add_special_tokens=False)
        self.running = Generation(prompt, sampling, adapted)
        return self.running

    def step(self):
        self.running.tokens += self.left[:1]
        del self.left[:1]
        if not self.left:
            self.running.finish_reason = self.reason

    def cancel(self, generation):
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"


@pytest.fixture
def make_talk():
    """Makes a talk with the answers that it will get, offered the weather unless told otherwise."""

    def make(*answers, family: str = "qwen2.5", tools=TOOLS, **fields) -> Talk:
        session = Session(FAMILIES[family], "chat_template", adapter=Path("adapter"))
        session.engine = Script(session.tokenizer, *answers)
        return Talk(session, tools=tools, **fields)

    return make
