"""Reads ChatGLM3's calls within vLLM 0.8.5 to 0.33. `tool_parser.py` puts `inference/calls.py` before it."""

import json
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

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

from ..inference.calls import Call, Parts, Unreadable, is_name, overlap, read_fenced_call, read_messages

PARTING = "<|assistant|>"  # between two messages of an answer
FENCE = "```"  # before and after the arguments of a call
TRIES = 20  # how often a message is read as a call before its end; else the time grew with the square of its length
STOPS = ("</s>", "<|user|>", "<|observation|>")  # that end it, and are no part of its text


class ChatGLM3ToolParser(ToolParser):
    """ChatGLM3's answers: messages that are text, or a function's name and, on the lines below, its arguments.

    Streamed, text is told as it comes, and a call once it is whole; what may become a call waits. The pieces, joined,
    are what `extract_tool_calls` returns, unless the model goes on behind a call with something that makes it none, or
    writes another call that cannot be read: what was told stays told.
    """

    supports_required_and_named = False  # as JSON, which ChatGLM3 has not learned
    engine_based_streaming = True  # so that vLLM calls `finish_streaming`, from 0.25 on

    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        self.parts = Parts()
        self.waiting = ""  # the end of the text, where it may be the beginning of PARTING
        self.generated = 0  # tokens
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
        messages = model_output.split(PARTING)
        calls: Sequence[Call] = ()
        if getattr(request, "tool_choice", None) == "none":
            text = "\n".join(filter(None, map(str.strip, messages)))
        else:
            answer = read_messages(messages)
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
            self.end_message()
        kept = len(text) - overlap(text, PARTING)
        self.waiting = text[kept:]
        self.read(text[:kept])
        self.generated += len(delta_token_ids)
        limit = getattr(request, "max_completion_tokens", None) or getattr(request, "max_tokens", None)
        if self.generated == limit or not self.stop_ids.isdisjoint(delta_token_ids):
            self.end_answer()
        return self.delta()

    def finish_streaming(self):
        """What was still waiting when the answer ended."""
        self.begin_delta()
        self.end_answer()
        return self.delta()

    # A message, as it grows

    def begin_message(self) -> None:
        self.message = ""
        self.is_text = self.is_call = False
        self.tries = 0

    def read(self, text: str) -> None:
        self.message += text
        if self.is_text:
            self.say(text)
            return
        line, newline, content = self.message.partition("\n")
        name, content = line.strip(), content.strip()
        is_open = not newline or name  # not the blank line before a text
        if not (self.may_call and is_open and is_name(name or "f") and content[:3] in FENCE):
            self.say(self.message)
        elif content.endswith("\n" + FENCE) and self.tries < TRIES:
            self.tries += 1
            self.call(name, content)

    def end_message(self) -> None:
        line, newline, content = self.message.partition("\n")
        if newline and not self.is_text:
            self.call(line.strip(), content.strip())
        if not self.is_text:
            self.say(self.message)
        self.is_broken |= bool(newline and line.strip()) and not self.is_call
        self.parts.end()
        self.begin_message()

    def end_answer(self) -> None:
        self.read(self.waiting)
        self.waiting = ""
        self.end_message()

    # What is told of it

    def begin_delta(self) -> None:
        self.content, self.tool_calls = "", []

    def say(self, text: str) -> None:
        self.is_text = True
        self.content += self.parts.add(text)

    def call(self, name: str, content: str) -> None:
        """Tell a call, if it is one; of an answer in which another cannot be read, none is told."""
        with suppress(Unreadable):
            arguments = read_fenced_call(name, content).arguments
            self.is_call = self.is_text = True  # whatever follows is text
            if not self.is_broken:
                self.tell(name, arguments)

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
        told = {"content": self.content, "tool_calls": self.tool_calls}
        return protocol.DeltaMessage(**{key: value for key, value in told.items() if value})


def as_json(arguments: dict) -> str:
    return json.dumps(arguments, ensure_ascii=False)


ToolParserManager.register_module("chatglm3", module=ChatGLM3ToolParser)
