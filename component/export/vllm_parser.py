"""Reads ChatGLM3's answers from their text, and within vLLM 0.8.5 to 0.33. `tool_parser.py` puts `inference/calls.py`
before it."""

import json
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

try:
    import vllm  # noqa: F401
except ModuleNotFoundError:
    ToolParser = object  # then `read_answer` is all that is used of this
else:
    try:
        from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
    except ImportError:  # before 0.13
        from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
    try:
        from vllm.entrypoints.generate.base import protocol
    except ImportError:
        try:  # before 0.29
            from vllm.entrypoints.openai.engine import protocol
        except ImportError:  # before 0.17
            from vllm.entrypoints.openai import protocol

from ..inference.calls import (
    Answer,
    Call,
    Parts,
    Unreadable,
    finished,
    is_name,
    overlap,
    read_fenced_call,
    read_messages,
)

PARTING = "<|assistant|>"  # between two messages of an answer
FENCE = "```"  # before and after the arguments of a call
STOPS = ("</s>", "<|user|>", "<|observation|>")  # that end an answer, and are no part of its text
SAYS_END = hasattr(ToolParser, "engine_based_streaming")  # whether vLLM says when a stream ends: from 0.25 on
TRIES = 20  # how often a message is read as a call before its end; else the time grew with the square of its length


def read_answer(text: str) -> Answer:
    """ChatGLM3's answer: `text`, `calls` (pairs of a name and arguments) and `finish_reason`. Nothing is evaluated.

    Args:
        text: what the model wrote, with `<|assistant|>` between its messages; a token that ends it may stand behind it.
    """
    stop = next(filter(text.endswith, STOPS), "")
    return finished(read_messages(split_messages(text.removesuffix(stop))), False, text)


def split_messages(text: str) -> list[str]:
    """The messages of an answer. A PARTING that stands within a call which can be read is part of it."""
    messages, parts = [], text.split(PARTING)
    start = 0
    while start < len(parts):
        stop = start + 1
        if begins_call(parts[start]):
            stop = next((i + 1 for i in range(start, len(parts)) if ends_call(parts[i])), len(parts))
        whole = PARTING.join(parts[start:stop])
        messages += [whole] if stop > start + 1 and find_call(whole) else parts[start:stop]
        start = stop
    return messages


def begins_call(message: str) -> bool | None:
    """Whether a message begins as a call; None where it has not come so far."""
    line, newline, content = message.partition("\n")
    name, content = line.strip(), content.lstrip()
    if (newline and not name) or not is_name(name or "f") or not FENCE.startswith(content[: len(FENCE)]):
        return False
    return content.startswith(FENCE) or None


def ends_call(message: str) -> bool:
    return message.rstrip().endswith("\n" + FENCE)


def find_call(message: str) -> Call | None:
    line, _, content = message.partition("\n")
    with suppress(Unreadable):
        return read_fenced_call(line.strip(), content.strip())


class ChatGLM3ToolParser(ToolParser):
    """ChatGLM3's answers: messages that are text, or a function's name and, on the lines below, its arguments.

    Streamed, text is told as it comes; what may become a call waits. The pieces, joined, are what `extract_tool_calls`
    returns: calls are told when the answer ends. Before 0.25, whose last piece is no place for a call, they are told
    once they are whole, and stay told if the model goes on with something that makes one none, or with another call
    that cannot be read.
    """

    supports_required_and_named = False  # as JSON, which ChatGLM3 has not learned
    engine_based_streaming = True  # so that vLLM calls `finish_streaming`, from 0.25 on

    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        self.parts = Parts()
        self.waiting = ""  # the end of the text, where it may be the beginning of PARTING
        self.generated = 0  # tokens
        self.found: list[Call] = []  # that are not told yet
        self.is_broken = False  # whether something should have been a call, and was none
        self.may_call = True
        self.begin_message()

    @cached_property
    def stop_ids(self) -> set[int]:
        return {self.vocab[token] for token in STOPS if token in self.vocab}

    def adjust_request(self, request):
        """Show PARTING in the text, and make the model write a call as it has learned to, where one is required."""
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
            if request.tool_choice not in ("auto", None) and hasattr(ToolParser, "supports_required_and_named"):
                self.require_call(request)
        return request

    def require_call(self, request) -> None:
        from vllm.sampling_params import StructuredOutputsParams

        chosen = request.tools if request.tool_choice == "required" else [request.tool_choice]
        names = "|".join(re.escape(getattr(tool, "function", tool).name) for tool in chosen)
        form = rf" ?({names})\n ?```python\ntool_call\([^\n]*\)\n```"
        request.structured_outputs = StructuredOutputsParams(regex=form)
        request.response_format = None

    def extract_tool_calls(self, model_output: str, request):
        calls: Sequence[Call] = ()
        if getattr(request, "tool_choice", None) == "none":
            text = "\n".join(filter(None, map(str.strip, model_output.split(PARTING))))
        else:
            answer = read_messages(split_messages(model_output))
            text, calls = answer.text, answer.calls
        tool_calls = [
            protocol.ToolCall(function=protocol.FunctionCall(name=name, arguments=as_json(arguments)))
            for name, arguments in calls
        ]
        return protocol.ExtractedToolCallInformation(
            tools_called=bool(tool_calls), tool_calls=tool_calls, content=text or None
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request,
    ):
        """Never None: before 0.13, vLLM tells no finish_reason where the last delta is None."""
        self.may_call = getattr(request, "tool_choice", None) != "none"
        self.begin_delta()
        *ended, text = (self.waiting + delta_text).split(PARTING)
        for message in ended:
            self.read(message)
            if self.begins and not self.is_closed():
                self.read(PARTING)
            else:
                self.end_message()
        kept = len(text) - overlap(text, PARTING)
        self.waiting = text[kept:]
        self.read(text[:kept])
        self.generated += len(delta_token_ids)
        limit = getattr(request, "max_completion_tokens", None) or getattr(request, "max_tokens", None)
        if self.generated == limit or not self.stop_ids.isdisjoint(delta_token_ids):
            self.end_answer()
        elif not SAYS_END:
            self.tell_calls()
        return self.delta()

    def finish_streaming(self):
        """What was still waiting when the answer ended."""
        self.begin_delta()
        self.end_answer()
        return self.delta()

    # A message, as it grows

    def begin_message(self) -> None:
        self.pieces: list[str] = []  # of what is not told
        self.head = ""  # of the message, white space shortened
        self.begins: bool | None = None  # as `begins_call` says; if False, it is told as it comes
        self.is_named, self.newline = False, ""  # whether its first line is not blank; what ends that line
        self.is_call = False  # whether it began with one
        self.tries = 0

    def read(self, text: str) -> None:
        if not self.newline:
            line, self.newline, _ = text.partition("\n")
            self.is_named |= bool(line.strip())
        if self.begins is None:
            self.head = re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", self.head + text)
            self.begins = self.may_call and begins_call(self.head)
            if self.begins is False:
                text = "".join([*self.pieces, text])
        if self.begins is False:
            self.say(text)
        elif text:
            self.pieces.append(text)
            if not SAYS_END and self.begins and self.is_closed() and self.tries < TRIES:
                self.try_call()

    def is_closed(self) -> bool:
        return ends_call("".join(self.pieces[-len("\n" + FENCE) :]))

    def try_call(self) -> None:
        self.tries += 1
        if call := find_call("".join(self.pieces)):
            self.found.append(call)
            self.is_call, self.begins = True, False  # whatever follows is text

    def end_message(self) -> None:
        if self.begins is False:
            self.end_text(self.is_named and bool(self.newline) and not self.is_call)
        else:
            for message in split_messages("".join(self.pieces)):
                if call := find_call(message):
                    self.found.append(call)
                else:
                    line, newline, _ = message.partition("\n")
                    self.say(message)
                    self.end_text(bool(newline and line.strip()))
        self.begin_message()

    def end_answer(self) -> None:
        self.read(self.waiting)
        self.waiting = ""
        self.end_message()
        self.tell_calls()

    # What is told of it

    def begin_delta(self) -> None:
        self.spoken: list[str] = []
        self.tool_calls = []

    def say(self, text: str) -> None:
        self.spoken.append(self.parts.add(text))

    def end_text(self, is_broken: bool) -> None:
        self.parts.end()
        self.is_broken |= is_broken

    def tell_calls(self) -> None:
        """Tell the calls that were found; of an answer in which another cannot be read, none is told."""
        for call in () if self.is_broken else self.found:
            self.tell(*call)
        self.found.clear()

    def tell(self, name: str, arguments: dict) -> None:
        self.current_tool_id += 1
        self.prev_tool_call_arr.append({"name": name, "arguments": arguments})  # where vLLM looks for calls
        self.streamed_args_for_tool.append(as_json(arguments))
        function = protocol.DeltaFunctionCall(name=name, arguments=as_json(arguments))
        tool_call = protocol.DeltaToolCall(
            index=self.current_tool_id, id=f"chatcmpl-tool-{uuid.uuid4().hex}", type="function", function=function
        )
        self.tool_calls.append(tool_call)

    def delta(self):
        told = {"content": "".join(self.spoken), "tool_calls": self.tool_calls}
        return protocol.DeltaMessage(**{key: value for key, value in told.items() if value})


def as_json(arguments: dict) -> str:
    return json.dumps(arguments, ensure_ascii=False)


if ToolParser is not object:
    ToolParserManager.register_module("chatglm3", module=ChatGLM3ToolParser)
