"""What a chat template writes for a conversation, as text, and where the words of each message stand in it."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..run.errors import DataError
from .conversation import Conversation
from .messages import to_openai, with_think_text

# First of the private-use characters that stand for the characters of control tokens written in text.
SHIELD = 0x100000
MARKER = "\U0010fffe"
# The date that every template writes as today's, so that a row is rendered alike on every day.
DATE = datetime.date(2024, 7, 26)
TODAY = re.compile(r"\bstrftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
ASKED_FOR = re.compile(r"\bstrftime_now\s+is\s+(?:not\s+)?defined\b")
# Keys under which templates look for the reasoning of a message.
REASONING = re.compile(r"(?<=[.'\"])(?:reasoning_content|reasoning|thinking)\b")
# A thought as text, and what follows it.
THOUGHT = re.compile(r"(?:\s*<think>(.*?)</think>)?(.*)", re.DOTALL)


class Chat:
    """A conversation as a chat template writes it, with the control tokens in its texts shielded.

    Attributes:
        messages: as the template gets them.
        learned: for each message, whether the model learns to write it.
        text: what the template writes.
        words: for each message, the slice of `text` from its first own word to its last.

    Raises:
        DataError: the template refuses the conversation, or leaves out a part of it.
    """

    def __init__(self, conversation: Conversation, tokenizer, control: re.Pattern):
        reasoning_keys = set(REASONING.findall(str(tokenizer.chat_template)))
        if not reasoning_keys:
            conversation = with_think_text(conversation)
        messages, tools = to_openai(conversation)
        self.learned = [all(message.pop("learned", (False,))) for message in messages]
        for message in messages:
            if "reasoning_content" in message:
                message |= dict.fromkeys(reasoning_keys, message["reasoning_content"])
        self.tokenizer, self.tools = tokenizer, shield(tools, control)
        self.messages, self.text = self.first_accepted(shield(messages, control))
        self.words = [self.words_of(self.messages, i, self.text) for i in range(len(messages))]
        if left_out := next(self.left_out(), None):
            ready = ", such as chatml" if control.fullmatch("<|im_start|>") else ""
            raise DataError(
                f"the tokenizer's chat template leaves out {left_out}; set chat_template to one that shows it{ready}, "
                "or change the row"
            )

    def write(self, messages: list[dict], *, asks: bool = False, offers: bool = True) -> str:
        """Apply the template; `asks` adds the generation prompt, `offers` the tools, if there are any.

        Raises:
            DataError: the template refuses the messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools if offers else None,
                chat_template=with_fixed_date(self.tokenizer.get_chat_template(tools=self.tools)),
                add_generation_prompt=asks,
                tokenize=False,
            )
        except Exception as error:  # raise_exception of the template, or any error over an unforeseen row
            raise DataError(f"the tokenizer's chat template refuses the row: {error}") from None

    def first_accepted(self, messages: list[dict]) -> tuple[list[dict], str]:
        """The messages in the first form that the template accepts, and its text of them.

        The forms are OpenAI's, with a call's arguments as an object; with short ids, for Mistral's template; and with
        the arguments as JSON text, for DeepSeek V3's.
        """
        forms = [messages]
        if any("tool_calls" in message for message in messages):
            forms += [short := with_short_ids(messages), with_json_arguments(messages), with_json_arguments(short)]
        refusals = []
        for form in forms:
            try:
                text = self.write(form)
            except DataError as error:
                refusals.append(error)
                continue
            if not shows_python(form, text):
                return form, text
            refusals.append(DataError("the tokenizer's chat template writes a call's arguments as Python; change it"))
        raise refusals[0]

    def words_of(self, messages: list[dict], i: int, text: str, *, asks: bool = False) -> slice:
        """The slice of `text`, which the template writes for `messages`, that holds the words of message i; empty and
        at its end if nothing in it depends on them."""
        other = self.write(with_marker(messages, i), asks=asks)
        start = common_prefix(text, other)
        if "tool_calls" in messages[i]:  # whose names a template may repeat for their results
            other = self.write(with_marker(messages, i, names=False), asks=asks)
        stop = max(start, len(text) - common_prefix(text[::-1], other[::-1]))
        content = messages[i]["content"].strip()
        # Mistral's template writes the tools before the last question, and before every other that equals it.
        if messages[i]["role"] == "user" and text[:stop].endswith(content):
            start = max(start, stop - len(content))
        return slice(start, stop)

    def ending(self, i: int) -> str:
        """What the template writes after the words of message i, whether the conversation ends there or goes on."""
        stop, others = self.words[i].stop, self.messages[: i + 1]
        if others == self.messages:
            others = [*others, *next_messages(others[-1])]
        try:
            other = self.write(others)
            same = other.startswith(self.text[:stop])
            there = other[stop if same else self.words_of(others, i, other).stop :]
        except DataError:  # a template may insist on another order of roles, for example
            return self.text[stop:] if i + 1 == len(self.messages) else ""
        return there[: common_prefix(self.text[stop:], there)]

    def beginning(self, i: int, starts: list[int]) -> int:
        """Where in `text` the model begins to write message i, which is where its generation prompt ends.

        Args:
            starts: of the tokens of `text`.

        Raises:
            DataError: the message before it stands behind it.
        """
        first, before = self.words[i].start, self.messages[:i]
        if not before:
            return first
        prompt = self.write(before, asks=True)
        if self.text.startswith(prompt):
            return len(prompt)
        # Templates write earlier messages otherwise once more follow: Mistral's moves the tools to the last question.
        previous = self.words[i - 1].stop
        if previous > first:
            raise DataError("the tokenizer's chat template writes the messages in another order; change the row or it")
        asked = prompt[self.words_of(before, i - 1, prompt, asks=True).stop :]
        shared = common_prefix(self.text[previous:], asked)
        if shared == len(asked):
            return previous + shared
        # Qwen3.5's prompt opens a thought, which earlier answers do not show.
        return max(start for start in starts if start <= min(previous + shared, first))

    def left_out(self) -> Iterator[str]:
        """Name parts of the conversation that the template does not write. The reasoning of earlier answers is none of
        them, since most templates rightly remove it."""
        for message, place, is_learned in zip(self.messages, self.words, self.learned, strict=True):
            thought, content = THOUGHT.fullmatch(message["content"]).groups("")
            thought = message.get("reasoning_content", thought)
            shown, calls = self.text[place], message.get("tool_calls", ())
            words = [word for call in calls for word in words_in([*call["function"].values()])]
            if not all(word in shown for word in words):
                yield "a call"
            elif message["role"] != "tool" and content.strip() not in shown:
                yield "the text beside a call" if calls else f"a message of role {message['role']}"
            elif place.start == len(self.text) and (is_learned or content):
                yield f"a message of role {message['role']}"
            elif calls and "reasoning_content" not in message and thought.strip() not in shown:
                yield "the reasoning before a call"
            elif message is self.messages[-1] and thought.strip() not in shown:
                yield "the reasoning of the last answer"
        if self.tools:
            bare = self.without_tools()
            names = (tool["function"]["name"] for tool in self.tools)
            if any(self.text.count(name) <= bare.count(name) for name in names):
                yield "tools"

    def without_tools(self) -> str:
        """What the template writes for the messages without tools; nothing if it refuses them."""
        try:
            return self.write(self.messages, offers=False)
        except DataError:
            return ""


def next_messages(message: dict) -> list[dict]:
    """What may come after a message of the assistant: the results of its calls, or a question."""
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": "0"}
        for call in message.get("tool_calls", ())
    ]
    return results or [{"role": "user", "content": "0"}]


def with_marker(messages: list[dict], i: int, names: bool = True) -> list[dict]:
    """The messages with MARKER for the words of message i: its texts, its calls' arguments and, if `names`, names."""

    def mark(function: dict) -> dict:
        arguments = {MARKER: MARKER}
        if isinstance(function["arguments"], str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {"arguments": arguments} | ({"name": MARKER} if names else {})

    message = messages[i]
    texts = [key for key in ("content", "reasoning_content", "reasoning", "thinking") if message.get(key)]
    if not texts and "tool_calls" not in message:
        texts = ["content"]
    return [*messages[:i], with_functions(message, mark) | dict.fromkeys(texts, MARKER), *messages[i + 1 :]]


def with_functions(message: dict, change: Callable[[dict], dict]) -> dict:
    """The message with what `change` returns for it in each function that it calls."""
    if "tool_calls" not in message:
        return message
    calls = [call | {"function": call["function"] | change(call["function"])} for call in message["tool_calls"]]
    return message | {"tool_calls": calls}


def with_json_arguments(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of every call as JSON text."""

    def write(function: dict) -> dict:
        return {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}

    return [with_functions(message, write) for message in messages]


def with_short_ids(messages: list[dict]) -> list[dict]:
    """The messages with every call's id replaced by nine letters and digits."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    short = {call["id"]: f"call{i:05}" for i, call in enumerate(calls)}
    renamed = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [call | {"id": short[call["id"]]} for call in message["tool_calls"]]}
        if "tool_call_id" in message:
            message = message | {"tool_call_id": short[message["tool_call_id"]]}
        renamed.append(message)
    return renamed


def shows_python(messages: list[dict], text: str) -> bool:
    """Whether the arguments of a call stand in the text as Python would print them."""
    functions = (call["function"] for message in messages for call in message.get("tool_calls", ()))
    objects = (function["arguments"] for function in functions if isinstance(function["arguments"], dict))
    return any(str(arguments) in text for arguments in objects if arguments)


def words_in(value: Any) -> Iterator[str]:
    """Words and numbers of a JSON value, which no faithful way of writing it changes; true, false and null are none."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from words_in(item)
    elif value is not None and not isinstance(value, bool):
        yield from re.findall("[\\w\U00100000-\U0010ffff]+", str(value))


@functools.lru_cache(maxsize=8)
def with_fixed_date(template: str) -> str:
    """The template with DATE for today's date.

    Raises:
        DataError: the template takes the date's format from elsewhere.
    """
    template = TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)
    if "strftime_now" in ASKED_FOR.sub("", template):
        raise DataError("its strftime_now needs a format in quotes, so that the date can be fixed; change the template")
    return template


def common_prefix(one: Sequence, two: Sequence) -> int:
    """Length of the longest common beginning of two texts or lists."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == two[low:middle] else (low, middle - 1)
    return low


def shield(value: Any, pattern: re.Pattern) -> Any:
    """Replace every character of a control token in the texts of `value` by a private-use character.

    Raises:
        DataError: a text already holds a private-use character.
    """
    if isinstance(value, str):
        if value and ord(max(value)) >= SHIELD:
            raise DataError(f"holds U+{ord(max(value)):X}, a character of private use; remove it")
        return pattern.sub(lambda found: "".join(chr(SHIELD + ord(letter)) for letter in found[0]), value)
    if isinstance(value, dict):
        return {shield(key, pattern): shield(item, pattern) for key, item in value.items()}
    return [shield(item, pattern) for item in value] if isinstance(value, list) else value
