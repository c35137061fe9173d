"""data_format chat_template: the tokenizer's own template, by the conventions of transformers' apply_chat_template."""

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from ..run.errors import DataError
from .conversation import Conversation
from .messages import chat_messages, with_think_text
from .render import TokenizedSample

# First of the private-use characters that stand for the characters of control tokens written in text.
SHIELD = 0x100000
MARKER = "\U0010fffe"


def render_chat_template(conversation: Conversation, tokenizer) -> TokenizedSample:
    """Render the text of the tokenizer's chat template.

    A learned message teaches what the model writes of it: from the end of the generation prompt to the control token
    that stops inference. That token is the last one that the template writes for the message, else the next message's
    first (GLM-4), else the tokenizer's EOS, which is added. Control tokens written in a text are text. Reasoning is
    given as `reasoning_content` to a template that reads it, to any other as `<think>` text.

    Raises:
        DataError: the template refuses the conversation, or writes nothing that can end an answer.
    """
    pattern, control_ids = control_tokens(tokenizer)
    if "reasoning_content" not in str(tokenizer.chat_template):
        conversation = with_think_text(conversation)
    messages, tools = chat_messages(conversation)
    learned = [all(message.pop("learned", (False,))) for message in messages]
    messages, tools = shield(messages, pattern), shield(tools, pattern)

    def write(messages: list[dict], ask: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # raise_exception of the template, or any error over an unforeseen row
            raise DataError(f"the tokenizer's chat template refuses the row: {error}") from None

    def body_of(i: int) -> int:
        """Where in `text` the own words of message i begin; for calls, the last call's name."""
        return common_prefix(text, write([*messages[:i], marked(messages[i]), *messages[i + 1 :]]))

    try:
        text = write(messages)
    except DataError:  # Mistral's template refuses other services' ids
        messages = with_short_ids(messages)
        text = write(messages)
    left_out = [what for message in messages for what in missing_of(message, text)]
    left_out += ["tools" for tool in tools or () if tool["function"]["name"] not in text]
    if left_out:
        raise DataError(f"the tokenizer's chat template leaves out {left_out[0]}; change the row or the template")
    ids, starts = encode_shielded(text, tokenizer)
    mask = [0] * len(ids)
    controls = [i for i, token in enumerate(ids) if token in control_ids]
    for i in [i for i, is_learned in enumerate(learned) if is_learned]:
        if (body := body_of(i)) == len(text):
            raise DataError("the tokenizer's chat template leaves out an answer or call; change the row or it")
        whole = write(messages[: i + 1]) if i + 1 < len(messages) else text
        begin = answer_begin(text, body, starts, whole, messages[:i], write)
        ends = [at for at in controls if body <= starts[at] < len(whole)] if text.startswith(whole) else []
        if not ends:
            following = next((at for j in range(i + 1, len(messages)) if (at := body_of(j)) > body), len(text))
            ends = [at for at in controls if body <= starts[at] < following][:1]
        if not ends:
            if i + 1 < len(messages) or tokenizer.eos_token_id is None:
                raise DataError("the tokenizer's chat template writes no control token that could end an answer")
            ends = [len(ids)]
            ids, starts, mask = [*ids, tokenizer.eos_token_id], [*starts, len(text)], [*mask, 0]
        first = bisect_left(starts, begin)
        mask[first : ends[-1] + 1] = [1] * (ends[-1] + 1 - first)
    return TokenizedSample(ids, mask)


def answer_begin(text: str, body: int, starts: list[int], whole: str, before: list[dict], write: Callable) -> int:
    """Where in `text` an answer begins, which is where its generation prompt ends.

    Args:
        body: where its own words begin.
        starts: of the tokens of `text`.
        whole: the text of a conversation that ends with the answer.
        before: the messages before it.
    """
    if not before:
        return body
    prompt = write(before, ask=True)
    if text.startswith(prompt):
        return len(prompt)
    if whole.startswith(prompt):  # Mistral's template shows tools only before the last question
        answer = whole[len(prompt) :]
        at = text.find(answer, max(body - len(answer), 0), body + len(answer))
        if 0 <= at <= body:
            return at
    if text.startswith(write(before)):  # Qwen3.5's prompt opens a thought, which earlier answers do not show
        shared = common_prefix(text, prompt)
        return max(start for start in starts if start <= shared)
    return body


def missing_of(message: dict, text: str) -> Iterator[str]:
    """Parts of a message that the template left out. (Some rightly remove an answer's reasoning, and quote results.)"""
    content, calls = message["content"].split("</think>")[-1].strip(), message.get("tool_calls", ())
    if any(call["function"]["name"] not in text for call in calls):
        yield "a call"
    if calls and content not in text:
        yield "the text beside a call"
    if message["role"] not in ("assistant", "tool") and content not in text:
        yield f"a message of role {message['role']}"


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


def marked(message: dict) -> dict:
    """The message with MARKER instead of its last part: its text, or the name of its last call."""
    if "tool_calls" not in message:
        return message | {key: MARKER for key in ("content", "reasoning_content") if key in message}
    *others, last = message["tool_calls"]
    return message | {"tool_calls": [*others, last | {"function": last["function"] | {"name": MARKER}}]}


def common_prefix(one: str, two: str) -> int:
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == two[:middle] else (low, middle - 1)
    return low


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer) -> tuple[re.Pattern, frozenset[int]]:
    """A pattern of all control tokens' texts, and their ids."""
    tokens = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)"), frozenset(tokens.values())


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


def encode_shielded(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and where each begins in `text`; shielded stretches are encoded as the text that they stand for."""
    ids, starts, at = [], [], 0
    for part in re.split("([\U00100000-\U0010ffff]+)", text):
        hidden = part and ord(part[0]) >= SHIELD
        if part:
            plain = "".join(chr(ord(letter) - SHIELD) for letter in part) if hidden else part
            encoded = tokenizer(
                plain, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=bool(hidden)
            )
            ids += encoded["input_ids"]
            starts += [at + start for start, _ in encoded["offset_mapping"]]
            at += len(part)
    return ids, starts
