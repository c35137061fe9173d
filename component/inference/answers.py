"""Turns the tokens of an answer into an Answer, with one class for each way in which formats write calls."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..data.conversation import Conversation, Turn
from ..run.errors import DataError
from .calls import (
    Answer,
    Call,
    Thought,
    Unreadable,
    finished,
    is_name,
    read_fenced_call,
    read_messages,
    skip,
)
from .growing import Reading, Waiting
from .growing_calls import follow_syntax
from .syntax import describe_calls, learn_lead, learn_syntax, learn_thought
from .token_bytes import TokenBytes


class TextReader:
    """Answers of text alone: ChatGLM2 and Firefly.

    Attributes:
        no_calls: why calls cannot be read; empty if they can.
        parting: the token between two messages of an answer, if it has several.
    """

    no_calls = "the format has no calls; train and open the model with data_format chat_template or chatglm3"
    parting: int | None = None

    def __init__(self, tokenizer):
        self.tokenizer, self.bytes = tokenizer, TokenBytes(tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def read(self, ids: Sequence[int], tools: Any, cut: bool) -> Answer:
        raw = self.decode(ids)
        reasoning, text = Thought().split(raw)
        return finished(Answer(text.strip(), reasoning=reasoning), cut, raw)

    def follow(self, reading: Reading, tools: Any) -> Waiting:
        """Tell a message while it grows, as `read` reads it."""
        yield from reading.think(Thought())
        yield from reading.speak("text")


class ChatGLM3Reader(TextReader):
    """Answers of ChatGLM3: messages between `<|assistant|>` tokens, each with its metadata, which names a function."""

    no_calls = ""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.parting = tokenizer.get_command("<|assistant|>")

    def read(self, ids: Sequence[int], tools: Any, cut: bool) -> Answer:
        messages: list[list[int]] = [[]]
        for token in ids:
            if token == self.parting:
                messages.append([])
            else:
                messages[-1].append(token)
        texts = [self.decode(message) for message in messages]
        answer = read_messages(texts, cut, Thought())
        return finished(answer, cut, "<|assistant|>".join(texts))

    def follow(self, reading: Reading, tools: Any) -> Waiting:
        while "\n" not in reading.text and not reading.ended and is_name(reading.text.strip() or "f"):
            yield
        line, newline, _ = reading.text.partition("\n")
        if not newline or line.strip():
            yield from follow_fenced_call(reading, line.strip(), len(line) + 1)
            return
        reading.drop(len(line) + 1)
        yield from super().follow(reading, tools)


def follow_fenced_call(reading: Reading, name: str, at: int) -> Waiting:
    """Tell a call of ChatGLM3 while it grows, as `read_fenced_call` reads it. Raises Unreadable where it is none."""
    if not is_name(name):
        raise Unreadable("its first line is no name")
    fence = yield from reading.require(at, ("```",))
    reading.begin_call(name, at)
    line = yield from reading.find("\n", at=fence)
    opened = yield from reading.find("(", at=line)
    if reading.text[line:opened].strip().isidentifier():
        yield from reading.keywords(opened + 1, lambda code: read_fenced_call(name, f"```\n{code}\n```"))
    while not reading.ended:
        yield
    reading.told.end_call(read_fenced_call(name, reading.text[at:].strip()))


class TemplateReader(TextReader):
    """Answers as a chat template writes them, whose way of writing calls is learned from the template itself."""

    def __init__(self, tokenizer, render: Callable):
        super().__init__(tokenizer)
        self.render = render
        self.thought, self.lead, self.syntax, self.no_calls = Thought(open=""), (), None, ""
        try:
            self.thought = learn_thought(self.write)
            self.lead = learn_lead(self.write, self.thought)
            self.syntax = learn_syntax(self.write, self.thought)
            if self.syntax.opens[: len(self.lead)] == self.lead:
                self.lead = ()  # which is no sign of a text
        except (DataError, Unreadable) as error:
            self.no_calls = f"calls cannot be read as the tokenizer's chat template writes them: {error}"

    def write(self, calls: tuple[Call, ...] = (), text: str = "", reasoning: str = "") -> str:
        """What the model learns to write for an answer, without the token that ends it. Raises DataError."""
        turns = [Turn("assistant", text, True, reasoning=reasoning)] if text or reasoning else []
        for name, arguments in calls:
            turns.append(Turn("tool", name=name, parameters=arguments, learned=True, joined=bool(turns)))
        try:
            return self.render_answer(turns, describe_calls(calls) or None)
        except DataError:
            if not calls:
                raise
            return self.render_answer(turns, None)  # DeepSeek V3's template shows calls, and no tools

    def render_answer(self, turns: list[Turn], tools: list[dict] | None) -> str:
        sample = self.render(Conversation((Turn("user", "Hello"), *turns), tools), self.tokenizer)
        learned = [token for token, flag in zip(sample.input_ids, sample.target_mask, strict=True) if flag]
        return self.decode(learned[:-1])

    def read(self, ids: Sequence[int], tools: Any, cut: bool) -> Answer:
        raw = self.decode(ids)
        reasoning, text = self.thought.split(raw)
        with suppress(Unreadable):
            text = text[skip(text, 0, self.lead) :]
        answer = self.syntax.read(text, tools, cut) if self.syntax else Answer(text.strip())
        return finished(replace(answer, reasoning=reasoning), cut, raw)

    def follow(self, reading: Reading, tools: Any) -> Waiting:
        yield from reading.think(self.thought)
        reading.drop((yield from reading.skip(0, self.lead)) or 0)
        if self.syntax:
            yield from follow_syntax(reading, self.syntax, tools)
        else:
            yield from reading.speak("text")
