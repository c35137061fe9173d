"""Reading of answers: every way of writing calls, with texts and answers by hand; hostile texts."""

import json
import time

import pytest

from component.inference.calls import (
    Answer,
    BraceForm,
    Call,
    KeywordForm,
    NamedForm,
    ObjectForm,
    PythonForm,
    Syntax,
    TaggedForm,
    Thought,
    finished,
    plain_value,
    to_message,
)

HERMES = Syntax(ObjectForm("name", "arguments"), ("<tool_call>",), ("</tool_call>", "<tool_call>"), ("</tool_call>",))
LLAMA = Syntax(ObjectForm("name", "parameters"), (), (), ())
MISTRAL = Syntax(ObjectForm("name", "arguments", frozenset({"id"})), ("[TOOL_CALLS]", "["), (",",), ("]",))
MISTRAL_11 = Syntax(NamedForm(("[ARGS]",)), ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), ())
GLM4 = Syntax(NamedForm(()), (), ("<|assistant|>",), ())
DEEPSEEK = Syntax(
    NamedForm(("```json",)),
    ("<calls>", "<call>", "function", "<sep>"),
    ("```", "</call>", "<call>", "function", "<sep>"),
    ("```", "</call>", "</calls>"),
)
QWEN3_CODER = Syntax(
    TaggedForm((">",), ("<parameter=",), (">",), ("</parameter>",), "\n", "\n", ("</function>",)),
    ("<tool_call>", "<function="),
    ("</function>", "</tool_call>", "<tool_call>", "<function="),
    ("</function>", "</tool_call>"),
)
GLM45 = Syntax(
    TaggedForm((), ("<arg_key>",), ("</arg_key>", "<arg_value>"), ("</arg_value>",), "", "", ("</tool_call>",)),
    ("<tool_call>",),
    ("</tool_call>", "<tool_call>"),
    ("</tool_call>",),
)
LFM2 = Syntax(PythonForm(), ("<|tool_call_start|>",), (), ("<|tool_call_end|>",))
GEMMA4 = Syntax(
    BraceForm('<|"|>'), ("<|tool_call>", "call:"), ("<tool_call|>", "<|tool_call>", "call:"), ("<tool_call|>",)
)
CHATGLM3 = Syntax(
    KeywordForm(("```python", "tool_call")), (), ("```", "<|assistant|>"), ("```",), joint=("<|assistant|>",)
)
SYNTAXES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral 11": MISTRAL_11,
    "glm4": GLM4,
    "deepseek": DEEPSEEK,
    "qwen3 coder": QWEN3_CODER,
    "glm4.5": GLM45,
    "lfm2": LFM2,
    "gemma4": GEMMA4,
    "chatglm3": CHATGLM3,
}
X, Y = Call("f", {"a": "x y", "n": 2}), Call("g", {})


@pytest.mark.parametrize(
    ("syntax", "text", "spoken", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "x y", "n": 2}}\n</tool_call>', "", (X,)),
        (HERMES, 'see\n<tool_call>{"arguments": {}, "name": "g"}</tool_call>', "see", (Y,)),
        (
            HERMES,
            '<tool_call>{"name":"g","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{}}</tool_call> ok',
            "ok",
            (Y, Y),
        ),
        (
            HERMES,
            'a<tool_call>{"name":"g","arguments":{}}</tool_call> b <tool_call>{"name":"g","arguments":{}}</tool_call>c',
            "a\nb\nc",
            (Y, Y),
        ),
        (LLAMA, ' {"name": "f", "parameters": {"a": "x y", "n": 2}}\n', "", (X,)),
        (LLAMA, 'JSON is {"name": "f", "parameters": {}}', 'JSON is {"name": "f", "parameters": {}}', ()),
        (LLAMA, '{"city": 1}', '{"city": 1}', ()),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x y", "n": 2}, "id": "1"}, '
            '{"name": "g", "arguments": {}}]',
            "",
            (X, Y),
        ),
        (MISTRAL_11, 'see[TOOL_CALLS]f[ARGS]{"a": "x y", "n": 2}[TOOL_CALLS]g[ARGS]{}', "see", (X, Y)),
        (GLM4, 'f\n{"a": "x y", "n": 2}<|assistant|>g\n{}', "", (X, Y)),
        (GLM4, "\nLook:\n{}", "Look:\n{}", ()),
        (GLM4, "Dear all,\nit is {}", "Dear all,\nit is {}", ()),
        (
            DEEPSEEK,
            '<calls><call>function<sep>f\n```json\n{"a": "x y", "n": 2}\n```</call>\n'
            "<call>function<sep>g\n```json\n{}\n```</call></calls>",
            "",
            (X, Y),
        ),
        (
            QWEN3_CODER,
            "see\n\n<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n<parameter=n>\n2\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
            "see",
            (X, Y),
        ),
        (
            QWEN3_CODER,
            "<tool_call><function=f><parameter=a>\n\n  x\n\n</parameter></function></tool_call>",
            "",
            (Call("f", {"a": "\n  x\n"}),),
        ),
        (
            GLM45,
            "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>n</arg_key>"
            "<arg_value>2</arg_value>\n</tool_call><tool_call>g</tool_call>",
            "",
            (X, Y),
        ),
        (LFM2, "see<|tool_call_start|>[f(a='x y', n=2), g()]<|tool_call_end|>", "see", (X, Y)),
        (LFM2, "<|tool_call_start|>[get-the-weather(a=1), f.g-h()]<|tool_call_end|>", "",
            (Call("get-the-weather", {"a": 1}), Call("f.g-h", {}))),
        (LFM2, '<|tool_call_start|>[f(l=[true, None, -1.5, {"a": ""}])]<|tool_call_end|>', "",
         (Call("f", {"l": [True, None, -1.5, {"a": ""}]}),)),
        (GEMMA4, '<|tool_call>call:f{a:<|"|>x y<|"|>,n:2}<tool_call|><|tool_call>call:g{}<tool_call|>', "", (X, Y)),
        (GEMMA4, '<|tool_call>call:f{o:{b:[1,null,<|"|>{,}<|"|>]},t:true}<tool_call|>', "",
         (Call("f", {"o": {"b": [1, None, "{,}"]}, "t": True}),)),
        (CHATGLM3, "\n see<|assistant|>f\n ```python\ntool_call(a='x y', n=2)\n```", "see", (X,)),
        (CHATGLM3, "f\n ```python\ntool_call(a='x y', n=2)\n```<|assistant|>g\n ```python\ntool_call()\n```",
         "", (X, Y)),
    ],
)  # fmt: skip
def test_text_and_calls_are_told_apart(syntax, text, spoken, calls):
    assert syntax.read(text) == Answer(spoken, calls)


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}, "why": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}'),
        (HERMES, "see <tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>f()</tool_call>'),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}'),
        (MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {}}'),
        (GLM4, 'f\n{"a": 1'),
        (DEEPSEEK, "<calls><call>code<sep>f\n```json\n{}\n```</call></calls>"),
        (QWEN3_CODER, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>"),
        (QWEN3_CODER, "<tool_call><function=f>" + "<parameter=a>1</parameter>" * 2 + "</function></tool_call>"),
        (GLM45, "<tool_call><arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"),
        (LFM2, "<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[f(1)]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[f()-g()]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[f-1]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[f(**{'a': 1})]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[f(a=b'x')]<|tool_call_end|>"),
        (GEMMA4, "<|tool_call>call:f{a:x}<tool_call|>"),
        (CHATGLM3, "f\n ```python\ntool_call(a=__import__('os'))\n```"),
    ],
)  # fmt: skip
def test_what_begins_like_a_call_and_is_none_is_a_fault_with_its_text(syntax, text):
    assert syntax.read(text) == Answer(text, fault="unparsable")


@pytest.mark.parametrize(
    ("syntax", "whole"),
    [
        (HERMES, 'see <tool_call>\n{"name": "f", "arguments": {"a": "x y"}}\n</tool_call>'),
        (LLAMA, '{"name": "f", "parameters": {"a": "x y"}}'),
        (MISTRAL, 'see [TOOL_CALLS][{"name": "f", "arguments": {"a": "x y"}}]'),
        (QWEN3_CODER, "see <tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>"),
        (GEMMA4, 'see <|tool_call>call:f{a:<|"|>x y<|"|>}<tool_call|>'),
        (CHATGLM3, "ff\n ```python\ntool_call(a='x y', n=2)\n```"),
    ],
)
def test_a_call_that_is_cut_short_anywhere_is_no_call_and_no_silent_text(syntax, whole):
    first = max(whole.find(syntax.opens[0]) if syntax.opens else 0, 0)
    for end in range(first + 2, len(whole)):
        assert syntax.read(whole[:end], cut=True) == Answer(whole[:end].strip(), fault="truncated"), whole[:end]
    assert len(syntax.read(whole, cut=True).calls) == 1


def test_a_plain_value_is_what_its_type_says_and_else_what_it_looks_like():
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}}]
    text = "<tool_call><function=f><parameter=a>3</parameter><parameter=n>3</parameter></function></tool_call>"
    assert QWEN3_CODER.read(text, tools).calls == (Call("f", {"a": "3", "n": 3}),)
    assert QWEN3_CODER.read(text).calls == (Call("f", {"a": 3, "n": 3}),)
    wrapped = [{"type": "function", "function": tools[0]}]
    assert QWEN3_CODER.read(text, wrapped).calls == (Call("f", {"a": "3", "n": 3}),)
    assert [plain_value(word, set()) for word in ("True", "null", "[1, 2]", "[1, 2", "1 2", '"a"')] == [
        True,
        None,
        [1, 2],
        "[1, 2",
        "1 2",
        "a",
    ]


@pytest.mark.parametrize(
    ("thought", "text", "expected"),
    [
        (Thought(), "<think>\nwhy\n</think>\n\nso", ("why", "\n\nso")),
        (Thought(), "so <think>why</think>", ("", "so <think>why</think>")),
        (Thought(), "<think></think>so", ("", "so")),
        (Thought(), "<think>\n\n</think>\n\n<think>why</think>so", ("why", "so")),
        (Thought(), "<think>why", ("why", "")),
        (Thought(open=""), "why</think>so", ("why", "so")),
        (Thought(open=""), "so", ("", "so")),
        (Thought(open="", asked=True), "why", ("why", "")),
        (Thought("<a>", "<b>"), " <a>why<b>so", ("why", "so")),
    ],
)
def test_reasoning_is_told_from_what_follows_it(thought, text, expected):
    assert thought.split(text) == expected


def test_an_answer_ends_for_one_reason():
    called = Answer(calls=(X,))
    assert [finished(called, cut, "").finish_reason for cut in (False, True)] == ["tool_calls", "length"]
    assert [finished(Answer("x"), cut, "").finish_reason for cut in (False, True)] == ["stop", "length"]


def test_an_answer_is_a_message_of_the_next_question():
    assert to_message(Answer("hi", reasoning="why")) == {
        "role": "assistant",
        "content": "hi",
        "reasoning_content": "why",
    }
    message = to_message(Answer("", (X, Y)))
    first, second = message["tool_calls"]
    assert message["content"] is None
    assert (first["type"], first["function"]["name"]) == ("function", "f")
    assert json.loads(first["function"]["arguments"]) == {"a": "x y", "n": 2}
    assert second["function"] == {"name": "g", "arguments": "{}"}
    assert first["id"] != second["id"]
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in (first, second))


DEEP = 100_000
HOSTILE = {
    "lists": "[" * DEEP,
    "objects": '{"a":' * DEEP,
    "parentheses": "(" * DEEP,
    "signs": "-" * DEEP + "1",
    "quotes": "'\\" * DEEP,
    "spaces": " " * DEEP + "x",
    "lines": "\n" * DEEP,
    "digits": "9" * DEEP,
    "attributes": "f" + ".a" * DEEP + "()",
    "sums": "1" + "+1" * DEEP,
    "markers": "<tool_call><function=[TOOL_CALLS]" * (DEEP // 5),
    "gemma": "<|tool_call>call:f{a:" + "[" * DEEP,
    "thoughts": "<think></think>" * (DEEP // 5),
    "calls": '<tool_call>{"name":"g","arguments":{}}</tool_call>' * (DEEP // 50),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_read_at_once(name):
    began = time.monotonic()
    for syntax in SYNTAXES.values():
        markers = " ".join(syntax.opens)
        for text in (
            HOSTILE[name],
            markers + HOSTILE[name],
            f'{markers}f\n{{"a": {HOSTILE[name]}',
            f'{markers}{{"name": "f", "arguments": {{"a": {HOSTILE[name]}}}}}',
            f"{markers}f(a={HOSTILE[name]})]{' '.join(syntax.closes)}",
            f"f\n ```python\ntool_call(a={HOSTILE[name]})\n```",
        ):
            _, rest = Thought().split(text)
            for cut in (False, True):
                assert isinstance(syntax.read(rest, cut=cut), Answer)
    assert time.monotonic() - began < 10


def test_arguments_are_nested_as_deep_as_a_row_may_be():
    text = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
    nested = ['{"a":' * depth + "1" + "}" * depth for depth in (99, 100, 101)]
    assert [HERMES.read(text % one).fault for one in nested] == ["", "unparsable", "unparsable"]
