"""A Conversation to token ids and the mask of what is learned, token for token as the official inference code has it.

`target_mask[i] == 1` means that the model learns to predict token i. The formats are described in docs/data_format.md.
"""

import ast
import functools
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .conversation import Conversation, DataError, Turn

TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


@dataclass(slots=True)
class Sample:
    """Token ids and their mask, which grow together."""

    input_ids: list[int] = field(default_factory=list)
    target_mask: list[int] = field(default_factory=list)

    def add(self, ids: list[int], *, learned: bool) -> None:
        self.input_ids += ids
        self.target_mask += [int(learned)] * len(ids)


@dataclass(frozen=True, slots=True)
class Message:
    """One ChatGLM3 message: `<|role|>metadata\\ncontent`."""

    role: str  # system, user, assistant or observation
    content: str
    metadata: str = ""
    learned: bool = False


def chatglm3_messages(conversation: Conversation) -> list[Message]:
    """The messages that official inference would have seen: tools first, a tool turn as its call and its result."""
    messages = []
    if conversation.tools is not None:
        messages.append(Message("system", tools_message(conversation.tools)))
    for turn in conversation.turns:
        if turn.role == "tool":
            messages.append(Message("assistant", format_tool_call(turn), turn.name, turn.learned))
            messages.append(Message("observation", as_text(turn.observation)))
        else:
            messages.append(Message(turn.role, turn.content, learned=turn.learned))
    return messages


def tools_message(tools: Any) -> str:
    return f"{TOOLS_PROMPT}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_tool_call(call: Turn) -> str:
    for name in call.parameters:
        if not name.isidentifier():
            raise DataError(f"the parameter {name!r} of {call.name} cannot be a keyword argument; rename it")
    keywords = [ast.keyword(name, ast.Constant(value)) for name, value in call.parameters.items()]
    text = ast.unparse(ast.Call(ast.Name("tool_call"), [], keywords))
    return f"```python\n{text}\n```"


def render_chatglm3(conversation: Conversation, tokenizer) -> Sample:
    """`[gMASK] sop`, the messages, `</s>`.

    A learned message teaches its tokens and the token after it, which is how the model learns to stop: with
    `<|user|>`, `<|observation|>` or `</s>`. Its own role token is written by the inference code and not learned.
    """
    sample = Sample()
    sample.add(tokenizer.get_prefix_tokens(), learned=False)
    ends_learned = False
    for message in chatglm3_messages(conversation):
        role, *body = tokenizer.build_single_message(message.role, message.metadata, message.content)
        sample.add([role], learned=ends_learned)
        sample.add(body, learned=message.learned)
        ends_learned = message.learned
    sample.add([tokenizer.eos_token_id], learned=ends_learned)
    return sample


def render_chatglm2(conversation: Conversation, tokenizer) -> Sample:
    """`[gMASK] sop`, then for each round its prompt, the answer and `</s>`; answers and their ends are learned."""
    sample = Sample()
    sample.add(tokenizer.get_prefix_tokens(), learned=False)
    for i, (question, answer) in enumerate(question_answer_pairs(conversation, "chatglm2"), 1):
        prompt = f"[Round {i}]\n\n问：{question.content}\n\n答："
        sample.add(tokenizer.encode(prompt, add_special_tokens=False), learned=False)
        sample.add(tokenizer.encode(answer.content, add_special_tokens=False), learned=answer.learned)
        sample.add([tokenizer.eos_token_id], learned=answer.learned)
    return sample


def render_firefly(conversation: Conversation, tokenizer) -> Sample:
    """`<s>`, then every utterance followed by `</s>`; answers and their ends are learned.

    `<s>` is the tokenizer's BOS, left out where it has none, and `</s>` its EOS. Control tokens written in an utterance
    are text.
    """
    sample = Sample()
    if tokenizer.bos_token_id is not None:
        sample.add([tokenizer.bos_token_id], learned=False)
    for pair in question_answer_pairs(conversation, "firefly"):
        for turn in pair:
            ids = tokenizer.encode(turn.content, add_special_tokens=False, split_special_tokens=True)
            sample.add([*ids, tokenizer.eos_token_id], learned=turn.learned)
    return sample


def question_answer_pairs(
    conversation: Conversation, data_format: str, remedy: str = "set data_format to chat_template"
) -> list[tuple[Turn, Turn]]:
    """The turns of a conversation that is nothing but questions with answers. Raises DataError for any other."""
    turns = conversation.turns
    others = {turn.role for turn in turns} - {"user", "assistant"}
    others |= {"tools"} if conversation.tools is not None else set()
    if others:
        reason = f"{data_format} has no place for {' and '.join(sorted(others))}"
    elif [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        reason = f"{data_format} has pairs of user and assistant alone"
    else:
        return list(zip(turns[::2], turns[1::2], strict=True))
    raise DataError(f"{reason}; remove the row, or {remedy}")


# data_format chat_template: the tokenizer's own template, by the conventions of transformers' apply_chat_template

# Characters of the last plane, for private use, stand for those of control tokens written in text.
SHIELD = 0x100000
MARKER = "\U0010fffe"


def render_chat_template(conversation: Conversation, tokenizer) -> Sample:
    """The text of the tokenizer's chat template; of every learned message what the model writes, and the end token.

    A message begins where the generation prompt ends and ends with the control token that stops inference: the last
    one that the template writes for it, else the next message's first (GLM-4), else the tokenizer's EOS, which is
    added. Control tokens written in a text are text.

    Raises:
        DataError: the template refuses the conversation, or writes nothing that can end an answer.
    """
    pattern, control_ids = control_tokens(tokenizer)
    messages, tools = chat_messages(conversation)
    learned = [all(message.pop("learned", (False,))) for message in messages]
    messages, tools = shield(messages, pattern), shield(tools, pattern)

    def write(messages: list[dict], ask: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template's raise_exception, and whatever it does to a row that it did not expect
            raise DataError(f"the tokenizer's chat template refuses the row: {error}") from None

    def body_of(i: int) -> int:
        """Where message i's own words (of calls: the last one's name) begin in `text`."""
        return common_prefix(text, write([*messages[:i], marked(messages[i]), *messages[i + 1 :]]))

    try:
        text = write(messages)
    except DataError:  # Mistral's refuses other services' ids
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
    return Sample(ids, mask)


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
    if whole.startswith(prompt):  # Mistral's, which shows the tools before the last question alone
        answer = whole[len(prompt) :]
        at = text.find(answer, max(body - len(answer), 0), body + len(answer))
        if 0 <= at <= body:
            return at
    if text.startswith(write(before)):  # Qwen3.5's, whose prompt opens a thought that earlier answers do not show
        shared = common_prefix(text, prompt)
        return max(start for start in starts if start <= shared)
    return body


def chat_messages(conversation: Conversation) -> tuple[list[dict], list[dict] | None]:
    """Messages and tools as OpenAI and chat templates have them, a call's arguments as an object.

    An assistant's message has `learned`, a flag for its text and for each call. Tools that are no descriptions with
    names become the system message that ChatGLM3 shows.
    """
    messages: list[dict] = []
    calls: list[Turn] = []  # of the last message

    def add_results() -> None:
        for call in calls:
            if call.observed:
                result = {"tool_call_id": identities[id(call)], "name": call.name, "content": as_text(call.observation)}
                messages.append({"role": "tool"} | result)
        calls.clear()

    # Nine letters and digits, which every template accepts.
    identities = {id(turn): turn.id or f"call{i:05}" for i, turn in enumerate(conversation.turns)}
    tools = wrap_tools(conversation.tools)
    if tools is None and conversation.tools is not None:
        messages.append({"role": "system", "content": tools_message(conversation.tools)})
    for turn in conversation.turns:
        if not turn.joined:
            add_results()
        if turn.role == "tool":
            if not turn.joined:
                messages.append({"role": "assistant", "content": "", "learned": ()})
            function = {"name": turn.name, "arguments": turn.parameters}
            call = {"id": identities[id(turn)], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
            messages[-1]["learned"] += (turn.learned,)
            calls.append(turn)
        else:
            flags = {"learned": (turn.learned,)} if turn.role == "assistant" else {}
            messages.append({"role": turn.role, "content": turn.content} | flags)
    add_results()
    return messages, tools


def wrap_tools(tools: Any) -> list[dict] | None:
    """Descriptions of functions as `{"type": "function", "function": …}`; None where they are none with names."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None
    bare = [tool.get("function", tool) for tool in tools]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in bare):
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def missing_of(message: dict, text: str) -> Iterator[str]:
    """What of a message the template has not written. (Some remove an answer's reasoning, and quote results.)"""
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
    """The message with its last part written otherwise."""
    if "tool_calls" not in message:
        return message | {"content": MARKER}
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
    """`value` with every control token in a text replaced by one character of its own for each of its characters."""
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
