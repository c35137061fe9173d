"""A stand-in for vLLM: what a tool parser sees of it, and the order in which its server calls one.

Two releases, read on 2026-11-26: 0.33.0 ("new": vllm/tool_parsers, vllm/parser/abstract_parser.py, entrypoints/openai/
chat_completion/stream_processor.py) and 0.9.2 ("old": entrypoints/openai/tool_parsers, serving_chat.py). Names,
fields and signatures are theirs. What becomes of the last piece of an old stream is, too: without a delta nothing is
told, and a delta that calls a function loses its name.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable
from functools import cached_property
from types import ModuleType, SimpleNamespace

from pydantic import BaseModel, Field

OLD, NEW = "0.9.2", "0.33.0"


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str = "made by vLLM"
    type: str = "function"
    function: FunctionCall


class DeltaFunctionCall(BaseModel):
    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(BaseModel):
    id: str | None = None
    type: str | None = None
    index: int
    function: DeltaFunctionCall | None = None


class ExtractedToolCallInformation(BaseModel):
    tools_called: bool
    tool_calls: list[ToolCall]
    content: str | None = None


class DeltaMessage(BaseModel):
    role: str | None = None
    content: str | None = None
    tool_calls: list[DeltaToolCall] = Field(default_factory=list)


class StructuredOutputsParams(BaseModel):
    regex: str | None = None


class OldToolParser:
    def __init__(self, tokenizer):
        self.prev_tool_call_arr, self.streamed_args_for_tool = [], []
        self.current_tool_id, self.current_tool_name_sent = -1, False
        self.model_tokenizer = tokenizer

    @cached_property
    def vocab(self):
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request):
        return request


class NewToolParser(OldToolParser):
    supports_required_and_named = True
    engine_based_streaming = False

    def __init__(self, tokenizer, tools=None):
        super().__init__(tokenizer)
        self.tools = tools or []


class ToolParserManager:
    def __init__(self):
        self.tool_parsers = {}

    def register_module(self, name=None, force=True, module=None):
        self.tool_parsers[name] = module
        return module

    def import_tool_parser(self, plugin_path: str) -> None:
        spec = importlib.util.spec_from_file_location("chatglm3_tool_parser", plugin_path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


PROTOCOL = (FunctionCall, ToolCall, DeltaFunctionCall, DeltaToolCall, ExtractedToolCallInformation, DeltaMessage)


def install(patch, release: str) -> ToolParserManager:
    """Put the modules of a release where `import` finds them."""
    manager = ToolParserManager()
    new = release == NEW
    parsers = {"ToolParser": NewToolParser if new else OldToolParser, "ToolParserManager": manager}
    classes = {kind.__name__: kind for kind in PROTOCOL}
    if new:
        modules = {
            "vllm.tool_parsers.abstract_tool_parser": parsers,
            "vllm.entrypoints.generate.base.protocol": classes,
            "vllm.sampling_params": {"StructuredOutputsParams": StructuredOutputsParams},
        }
    else:
        modules = {
            "vllm.entrypoints.openai.tool_parsers.abstract_tool_parser": parsers,
            "vllm.entrypoints.openai.protocol": classes,
        }
    for name, content in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                module = ModuleType(path)
                module.__path__ = []
                patch.setitem(sys.modules, path, module)
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        vars(sys.modules[name]).update(content)
    return manager


def request(**fields) -> SimpleNamespace:
    """A request that offers functions."""
    defaults = {"tools": ["…"], "tool_choice": "auto", "skip_special_tokens": True, "max_completion_tokens": None}
    return SimpleNamespace(
        **defaults | {"max_tokens": None, "response_format": None, "structured_outputs": None} | fields
    )


def stream(parser, pieces: Iterable[tuple[str, list[int]]], asked, reason: str = "stop") -> dict:
    """A streamed answer as a client joins it; of each piece its text and its tokens."""
    pieces = list(pieces)
    text, ids, message = "", [], {"content": "", "calls": [], "finish_reason": None}
    new = isinstance(parser, NewToolParser)
    for i, (piece, tokens) in enumerate(pieces):
        is_last = i == len(pieces) - 1
        before, ids_before = ("", []) if new and parser.engine_based_streaming else (text, ids)
        text, ids = text + piece, ids + tokens
        delta = parser.extract_tool_calls_streaming(
            before, before + piece, piece, ids_before, ids_before + tokens, tokens, asked
        )
        told = [delta]
        if new and is_last and parser.engine_based_streaming:
            if delta.tool_calls:
                delta.tool_calls[-1].function.arguments += unstreamed(parser)
            told.append(parser.finish_streaming())
        elif is_last and delta is None:
            return message
        elif is_last and delta.tool_calls and delta.tool_calls[0].function.arguments is not None:
            rest = json.dumps(parser.prev_tool_call_arr[-1]["arguments"], ensure_ascii=False)
            function = DeltaFunctionCall(arguments=rest)
            told = [
                DeltaMessage(tool_calls=[DeltaToolCall(index=len(parser.prev_tool_call_arr) - 1, function=function)])
            ]
        for delta in filter(None, told):
            join(message, delta)
        if is_last:
            message["finish_reason"] = "tool_calls" if message["calls"] and reason == "stop" else reason
    return message


def unstreamed(parser) -> str:
    """`ToolParser.get_remaining_unstreamed_args` of 0.33.0, of a parser that has told a call."""
    expected = json.dumps(parser.prev_tool_call_arr[-1]["arguments"], ensure_ascii=False)
    told = parser.streamed_args_for_tool[len(parser.prev_tool_call_arr) - 1 :]
    actual = told[0] if told else ""
    return expected[len(actual) :] if expected.startswith(actual) else ""


def join(message: dict, delta: DeltaMessage) -> None:
    shown = delta.model_dump(exclude_unset=True)
    message["content"] += shown.get("content") or ""
    for call in shown.get("tool_calls", ()):
        assert call["index"] in (len(message["calls"]), len(message["calls"]) - 1)
        if call["index"] == len(message["calls"]):
            assert call["id"] and call["type"] == "function", "a call begins with its id"
            message["calls"].append({"id": call["id"], "name": "", "arguments": ""})
        else:
            assert "id" not in call, "its id stands once"
        for key, value in call["function"].items():
            message["calls"][-1][key] += value
