"""Pieces of a growing answer are together what the whole answer is read as, whatever it is, wherever it ends."""

import json
import random
import re
import time
from collections import Counter
from functools import partial

import pytest

from component.inference.calls import Answer, Call
from component.inference.growing import Piece, Reading, Telling
from component.inference.growing_calls import follow_syntax
from component.inference.session import Session
from component.run.errors import DataError
from tests.component.inference.test_calls import DEEP, HOSTILE, SYNTAXES
from tests.component.inference.test_session import chatglm3_ids
from tests.component.inference.test_syntax import ANSWERS, LEARNED, TOKENIZERS, TOOLS, learned_ids

# One answer with two calls for each way to write them.
CALLS = {
    "hermes": 'see\n<tool_call>\n{"name": "f", "arguments": {"a": "x y", "n": [2]}}\n</tool_call>\n<tool_call>\n'
    '{"arguments": {"b": {"c": "\\"}"}}, "name": "g"}\n</tool_call> ok',
    "llama": '{"name": "f", "parameters": {"a": "x y", "n": [2]}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x y"}, "id": "1"}, {"id": "2", "name": "g", '
    '"arguments": {"b": {}}}]',
    "mistral 11": 'see[TOOL_CALLS]f[ARGS]{"a": "x y"}[TOOL_CALLS]g[ARGS]{"b": {}}',
    "glm4": 'f\n{"a": "x y"}<|assistant|>g\n{"b": {}}',
    "deepseek": '<calls><call>function<sep>f\n```json\n{"a": "x y"}\n```</call>\n<call>function<sep>g\n```json\n'
    "{}\n```</call></calls>",
    "qwen3 coder": "see\n\n<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n<parameter=n>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "glm4.5": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>n</arg_key><arg_value>2"
    "</arg_value>\n</tool_call><tool_call>g</tool_call>",
    "lfm2": "see<|tool_call_start|>[f(a='x, (y', n=[2, None]), g(b={\"c\": -1.5})]<|tool_call_end|> ok",
    "gemma4": '<|tool_call>call:f{a:<|"|>x } y<|"|>,n:2}<tool_call|><|tool_call>call:g{b:[{}]}<tool_call|>',
    "chatglm3": " see<|assistant|>f\n ```python\ntool_call(a='x, (y', n=[2, None])\n```<|assistant|>g\n ```python\n"
    "tool_call()\n```",
}
# Words of what stands around names and values.
TAGS = {
    "name",
    "arguments",
    "parameters",
    "tool",
    "call",
    "calls",
    "start",
    "end",
    "parameter",
    "function",
    "sep",
    "id",
}
TAGS |= {"TOOL", "CALLS", "ARGS", "arg", "key", "value", "assistant", "json", "python"}
# What else the pieces need not have: a call's id, the code around ChatGLM3's arguments, and escapes.
UNTOLD = re.compile(r'"id": "[\w�]*"|```\w*|\b\w+\(|\\(u\w{4}|.)')
JSON = {"None": "null", "True": "true", "False": "false"}
FENCED = ["\n see", "f\n ```python\ntool_call(a='x, (y', n=[2, (1,)])\n```", "g\n ```python\ntool_call()\n```"]


def fold(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """(text, reasoning, calls with their arguments as told)"""
    told, calls = {"text": "", "reasoning": ""}, []
    for piece in pieces:
        assert piece.text, "no piece is empty"
        if piece.kind == "name":
            assert piece.call == len(calls)
            calls.append((piece.text, ""))
        elif piece.kind == "arguments":
            calls[piece.call] = (calls[piece.call][0], calls[piece.call][1] + piece.text)
        else:
            told[piece.kind] += piece.text
    return told["text"], told["reasoning"], calls


def compare(pieces: list[Piece], answer: Answer, told, written: str) -> None:
    """What must hold of the pieces of an answer that is read as `answer`."""
    text, reasoning, calls = fold(pieces)
    assert told.calls == len(calls)
    assert reasoning == answer.reasoning, written
    if not answer.fault:
        assert text == answer.text, written
        assert [Call(name, json.loads(arguments)) for name, arguments in calls] == list(answer.calls), written
        assert told.complete == told.calls
    elif not calls:
        assert text == answer.text, written
    else:
        shown = Counter(words_of("\n".join([text, *map("\n".join, calls)])))
        assert not Counter(words_of(answer.text)) - shown, "nothing that was generated is lost"


def words_of(text: str) -> list[str]:
    """All words but those of the tags, as JSON has them."""
    words = re.findall(r"[^\W\d_]+", UNTOLD.sub(" ", text))
    return [JSON.get(word, word) for word in words if word not in TAGS]


def require_read(syntax, before: str, pieces: list[Piece], count: int) -> None:
    """Require that the first calls, which are complete now, are those of an answer that ends here: behind the last of
    them, or where the next one was seen to come."""
    calls = [Call(name, json.loads(arguments)) for name, arguments in fold(pieces)[2][:count]]
    ended = before[: before.rfind(syntax.between[0])] + "".join(syntax.closes) if syntax.between else before
    assert calls in [list(syntax.read(text).calls) for text in (before, ended)], before


def chunks(text: str, draw: random.Random, most: int = 6):
    while text:
        size = draw.randint(1, most)
        yield text[:size]
        text = text[size:]


def read_text(syntax, parts) -> tuple[list[Piece], Telling]:
    told, pieces = Telling(), []
    reading = Reading(told, partial(follow_syntax, syntax=syntax, tools=None))
    for part in parts:
        reading.add(part)
        pieces += told.take()
    reading.end()
    return pieces + told.take(), told


def check_text(syntax, text: str, draw: random.Random, cut: bool = False) -> str:
    """Compare what is told of a text letter by letter, and by larger parts, with what is read. Returns the fault."""
    told, answer, pieces, complete = Telling(), syntax.read(text, cut=cut), [], 0
    reading = Reading(told, partial(follow_syntax, syntax=syntax, tools=None))
    for end, letter in enumerate(text, 1):
        reading.add(letter)
        pieces += told.take()
        if told.complete > complete:
            complete = told.complete
            require_read(syntax, text[:end], pieces, complete)
    reading.end()
    pieces += told.take()
    compare(pieces, answer, told, text)
    if told.complete > complete:
        require_read(syntax, text, pieces, told.complete)
    parts, again = read_text(syntax, chunks(text, draw, draw.choice([3, 6, 40])))
    assert fold(parts) == fold(pieces), text
    assert (again.calls, again.complete) == (told.calls, told.complete)
    return answer.fault


def damaged(text: str, draw: random.Random, bits: list[str]) -> str:
    """A text with some of its parts gone, twice or elsewhere, or with strange ones."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(text) + 1)
        stop = min(len(text), start + draw.choice([0, 1, 1, 5, 30]))
        middle = draw.choice(["", "", text[start:stop] * 2, draw.choice(bits), draw.choice(bits)])
        text = text[:start] + middle + text[stop:]
    return text


@pytest.mark.parametrize("name", SYNTAXES)
def test_calls_of_every_form_are_told_as_they_are_read_wherever_the_answer_ends(name):
    syntax, whole, draw = SYNTAXES[name], CALLS[name], random.Random(0)
    assert not syntax.read(whole).fault
    for end in range(len(whole) + 1):
        check_text(syntax, whole[:end], draw, cut=end % 2)
    check_text(syntax, whole, draw)


@pytest.mark.parametrize("name", SYNTAXES)
def test_damaged_calls_are_told_as_they_are_read(name):
    syntax, whole, draw = SYNTAXES[name], CALLS[name], random.Random(1)
    bits = ["{", "}", '"', "'", "\\", ",", "(", ")", "\n", " ", "]", "f", "=", "北", "1", "null", '"\\ud800"', "NaN"]
    bits += [*syntax.opens, *syntax.closes, *syntax.between, *syntax.joint, '{"a": 1, "a": 2}', "a=1, a=2", "(b=2)"]
    bits += ['"name"', '"arguments":', ".g(", "#", '"""', "'''", "```", whole]
    faults = sum(bool(check_text(syntax, damaged(whole, draw, bits), draw)) for _ in range(300))
    assert 50 < faults < 295


@pytest.mark.parametrize(
    "code", ["f(a=1, a=2)", "f(,)", "f(a=1,,b=2)", "class(a=1)", "None(a=1)", "f(a=1), 3", "f(a=1))"]
)
def test_a_list_of_calls_that_cannot_be_read_has_none(code):
    text = f"<|tool_call_start|>[{code}]<|tool_call_end|>"
    pieces, told = read_text(SYNTAXES["lfm2"], text)
    assert (fold(pieces), told.calls) == ((text, "", []), 0)


def stream(session, ids, tools=None, reason="stop"):
    growing = session.answer_stream(tools)
    pieces = [piece for token in ids for piece in growing.add(token)]
    return pieces + growing.end(), growing


def check(session, ids, tools, reason) -> None:
    answer = session.read(ids, reason, tools)
    pieces, growing = stream(session, ids, tools, reason)
    compare(pieces, answer, growing, answer.raw)


def written_answers(session, family: str):
    for turns, wanted in ANSWERS.values():
        try:
            yield learned_ids(session.tokenizer, turns, TOOLS if wanted.calls and family != "deepseek" else None)[:-1]
        except DataError:
            continue


@pytest.mark.parametrize("family", [*LEARNED, "deepseek", "smollm2"])
def test_answers_of_every_family_are_told_as_they_are_read_cut_at_every_token(family):
    session, draw = Session(TOKENIZERS[family], "chat_template"), random.Random(2)
    taught = list(written_answers(session, family))
    for ids in taught:
        check(session, ids, TOOLS, "stop")
        for end in range(len(ids)):
            check(session, ids[:end], TOOLS, "length")
    for _ in range(30):
        ids = list(draw.choice(taught))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(ids) + 1)
            other = draw.choice(taught)
            start = draw.randrange(len(other) + 1)
            ids[place : place + draw.choice([0, 0, 1, 9])] = other[start : start + draw.choice([0, 1, 9])]
        ids = [token for token in ids if token not in session.stop_ids]
        check(session, ids, TOOLS, draw.choice(["stop", "length"]))


def test_answers_of_chatglm3_are_told_as_they_are_read_cut_at_every_token(tiny_tokenizer):
    session, draw = Session(tiny_tokenizer, "chatglm3"), random.Random(3)
    bits = ["\n", " ", "```", "f", "北京", "(", ")", "'", ",", "a=1, a=2", "(b=2)", "<think>", "</think>",
            "\n```", "x y"]  # fmt: skip
    answers = [FENCED, ["晴"], ["it is\nso"], FENCED[1:], ["\n<think>why", "\n b"]]
    answers += [["\n <think>\nwhy\n</think>\n\nsee 👋"]]
    for messages in answers:
        ids = chatglm3_ids(tiny_tokenizer, *messages)
        check(session, ids, None, "stop")
        for end in range(len(ids)):
            check(session, ids[:end], None, "length")
    for _ in range(600):
        messages = [damaged(message, draw, bits) for message in draw.choice(answers)]
        check(session, chatglm3_ids(tiny_tokenizer, *messages), None, draw.choice(["stop", "length"]))


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "qwen3", "qwen3.5", "glm4", "mistral"])
def test_random_tokens_are_told_as_they_are_read(tiny_tokenizer, name):
    tokenizer = tiny_tokenizer if "chatglm" in name else TOKENIZERS[name]
    session, draw = Session(tokenizer, name if "chatglm" in name else "chat_template"), random.Random(4)
    known = [token for token in range(len(tokenizer)) if token not in session.stop_ids]
    for _ in range(100):
        check(session, [draw.choice(known) for _ in range(draw.randint(1, 60))], None, draw.choice(["stop", "length"]))


def test_a_call_is_told_while_it_is_written(tiny_tokenizer):
    session = Session(tiny_tokenizer, "chatglm3")
    growing, seen = session.answer_stream(), []
    for message in ("\n see", "get_weather\n ```python\ntool_call(city='北京', days=[1, None], exact=True)\n```"):
        seen += growing.add(session.reader.parting) if seen else []
        for token in chatglm3_ids(tiny_tokenizer, message):
            seen += growing.add(token)
    assert "".join(piece.text for piece in seen if piece.kind == "text") == "see"
    assert [piece for piece in seen if piece.kind != "text"] == [
        Piece("name", "get_weather"),
        Piece("arguments", '{"city": "北京"'),
        Piece("arguments", ', "days": [1, null]'),
        Piece("arguments", ', "exact": true'),
    ]
    assert (growing.calls, growing.complete) == (1, 0)
    assert growing.end() == [Piece("arguments", "}")]
    assert (growing.calls, growing.complete) == (1, 1)


def test_json_is_told_as_it_is_written():
    text = 'see <tool_call>\n{"name": "f", "arguments": {"a": "x", "b": 1}}\n</tool_call>'
    pieces, _ = read_text(SYNTAXES["hermes"], text)
    assert pieces[:4] == [Piece("text", "s"), Piece("text", "e"), Piece("text", "e"), Piece("name", "f")]
    assert pieces[4:] == [Piece("arguments", letter) for letter in '{"a": "x", "b": 1}']


def test_the_first_call_is_complete_before_the_second_begins():
    told = Telling()
    reading = Reading(told, partial(follow_syntax, syntax=SYNTAXES["hermes"], tools=None))
    for letter in CALLS["hermes"].partition("</tool_call>")[0] + "</tool_call":
        reading.add(letter)
    assert (told.calls, told.complete) == (1, 0)
    reading.add(">")
    assert (told.calls, told.complete) == (1, 1)


def test_an_unreadable_call_keeps_its_name_and_what_the_model_wrote():
    pieces, told = read_text(SYNTAXES["hermes"], '<tool_call>{"name": "f", "arguments": {"a": }} </tool_call> so')
    assert fold(pieces) == ("", "", [("f", '{"a": }} </tool_call> so')])
    assert (told.calls, told.complete) == (1, 0)
    pieces, _ = read_text(SYNTAXES["chatglm3"], "f\n ```python\ntool_call(a=1, b=open('x'))\n```")
    assert fold(pieces) == ("", "", [("f", "{\"a\": 1, b=open('x'))\n```")])


@pytest.mark.parametrize("kind", ["text", "reasoning", "call", "fenced call"])
def test_a_token_costs_the_same_however_long_the_answer_is(tiny_tokenizer, kind):
    session = Session(tiny_tokenizer if kind == "fenced call" else TOKENIZERS["qwen3"], "chat_template"
                      if kind != "fenced call" else "chatglm3")  # fmt: skip
    words = {
        "text": "word " * 2000,
        "reasoning": "<think>" + "word " * 2000,
        "call": '<tool_call>{"name": "f", "arguments": {"a": "' + "word " * 2000,
        "fenced call": "f\n ```python\ntool_call(a='" + "word " * 2000,
    }[kind]
    if kind == "fenced call":
        ids = chatglm3_ids(tiny_tokenizer, words)
    else:
        ids = session.tokenizer.encode(words, add_special_tokens=False)
    growing, began = session.answer_stream(), time.process_time()
    for token in ids:
        growing.add(token)
    assert (time.process_time() - began) / len(ids) < 0.0005


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_told_in_time(name):
    began = time.process_time()
    for syntax in SYNTAXES.values():
        markers = " ".join(syntax.opens)
        for begun in ("", f'{markers}{{"name": "f", "arguments": {{"a": ', f"{markers}[f(a="):
            text = (begun + HOSTILE[name])[: DEEP // 100]
            pieces, told = read_text(syntax, text)
            compare(pieces, syntax.read(text), told, text)
    assert time.process_time() - began < 10
