"""Rows to conversations and back; case 25 of the reliability scorecard is here."""

import contextlib
import copy
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from component.data.conversation import Conversation, Turn, choose_learned, oddities
from component.data.formats import (
    ROW_FORMATS,
    detect_format,
    parse_chatglm3,
    parse_firefly,
    parse_row,
    read_conversations,
)
from component.data.render import chatglm3_messages
from component.run.errors import DataError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": {"y": None}}
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}


def write(conversation: Conversation, name: str) -> tuple[dict, list[str]]:
    lost: list[str] = []
    return ROW_FORMATS[name].write(conversation, lost.append), lost


# One row of each format, and what it says


def test_chatglm3():
    row = {"tools": [1], "conversations": [USER, {**ANSWER, "loss": False}, CALL, ANSWER], "note": "kept elsewhere"}
    assert parse_chatglm3(row) == Conversation(
        turns=(
            Turn("user", "u"),
            Turn("assistant", "a"),
            Turn("tool", learned=True, name="f", parameters={"x": 1}, observation={"y": None}, observed=True),
            Turn("assistant", "a", learned=True),
        ),
        tools=[1],
    )


def test_firefly():
    row = {"conversation": [{"human": "h", "assistant": "a"}]}
    assert parse_firefly(row).turns == (Turn("user", "h"), Turn("assistant", "a", learned=True))


def call(name, arguments, identity):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


OPENAI = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [call("weather", '{"city": "北京"}', "1"), call("weather", {}, "2")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1", "content": "first"},
        {"role": "assistant", "content": "done", "weight": 0},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ""}},
        {"role": "function", "name": "weather", "content": "third"},
        {"role": "assistant", "content": "so", "reasoning_content": "hm"},
    ],
}


def test_openai_with_parallel_calls_answered_by_id():
    weather = Turn("tool", learned=True, name="weather", observed=True)
    assert parse_row(OPENAI) == Conversation(
        (
            Turn("system", "s"),
            Turn("user", "uv"),
            Turn("assistant", "let me see", learned=True),
            replace(weather, parameters={"city": "北京"}, observation="first", id="1", joined=True),
            replace(weather, observation="second", id="2", joined=True),
            Turn("assistant", "done"),
            replace(weather, observation="third"),
            Turn("assistant", "so", learned=True, reasoning="hm"),
        ),
        tools=[WEATHER],
    )
    assert parse_row({"functions": [WEATHER], "messages": OPENAI["messages"]}) == parse_row(OPENAI)


def test_sharegpt_with_function_calls():
    row = {
        "system": "s",
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "u"},
            {
                "from": "function_call",
                "value": '[{"name": "weather", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            },
            {"from": "observation", "value": '["one", {"two": 2}]'},
            {"from": "gpt", "value": "a", "loss": False},
            {"from": "function_call", "value": '{"name": "g", "arguments": "{}"}'},
            {"from": "observation", "value": "three"},
        ],
    }
    first = Turn("tool", learned=True, name="weather", parameters={"a": 1}, observation="one", observed=True)
    second = Turn("tool", learned=True, name="g", observation={"two": 2}, observed=True, joined=True)
    last = Turn("tool", learned=True, name="g", observation="three", observed=True)
    expected = (Turn("system", "s"), Turn("user", "u"), first, second, Turn("assistant", "a"), last)
    assert parse_row(row) == Conversation(expected, [WEATHER])


def test_alpaca_with_history_and_system():
    row = {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]}
    turns = [(turn.role, turn.content, turn.learned) for turn in parse_row(row).turns]
    assert turns == [
        ("system", "s", False),
        ("user", "q", False),
        ("assistant", "a", True),
        ("user", "do\nthis", False),
        ("assistant", "done", True),
    ]


def test_glaive_with_calls():
    row = {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(WEATHER, indent=2)
        + "\n\n"
        + json.dumps({"name": "g"}),
        "chat": "USER: How is it?\n\n\n"
        """ASSISTANT: <functioncall> {"name": "weather", "arguments": '{"city": "Xi\\'an"}'} <|endoftext|>\n\n\n"""
        'FUNCTION RESPONSE: {"t": 3}\n\n\nASSISTANT: Cold. <|endoftext|>\n\n\n'
        'USER: Now g.\nPlease.\n\n\nASSISTANT: Well <functioncall> {"name": "g"} <|endoftext|>',
    }
    assert parse_row(row) == Conversation(
        (
            Turn("user", "How is it?"),
            Turn(
                "tool",
                learned=True,
                name="weather",
                parameters={"city": "Xi'an"},
                observation='{"t": 3}',
                observed=True,
            ),
            Turn("assistant", "Cold.", learned=True),
            Turn("user", "Now g.\nPlease."),
            Turn("assistant", "Well", learned=True),
            Turn("tool", learned=True, name="g", joined=True),
        ),
        [WEATHER, {"name": "g"}],
    )
    plain = {"system": "SYSTEM: Be brief.", "chat": "USER: a\n\n\nASSISTANT: b"}
    assert parse_row(plain).turns[0] == Turn("system", "Be brief.")


# Faults


def with_turn(**change) -> dict:
    return {"conversations": [USER, {**ANSWER, **change}]}


def with_call(**change) -> dict:
    return {"conversations": [USER, {**CALL, **change}]}


def messages(*rows) -> dict:
    return {"messages": list(rows)}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "unknown kind of row, with no key; expected conversations (ChatGLM3, ShareGPT)"),
        ({"text": "x"}, "unknown kind of row, with 'text'"),
        ({"conversations": "x"}, 'conversations must be a list, got "x" (str)'),
        ({"conversations": []}, "nothing to learn"),
        ({"conversations": [USER]}, "nothing to learn"),
        ({"conversations": [{**ANSWER, "loss": False}]}, "nothing to learn"),
        ({"conversations": ["x"]}, "conversations[0]: must be an object with role"),
        ({"conversations": [{"content": "x"}]}, "conversations[0].role: missing"),
        (
            with_turn(role="usr"),
            "conversations[1].role is 'usr'; expected system, user, assistant, tool or",
        ),
        (with_turn(role=None), "conversations[1].role must be text, got null (NoneType)"),
        (with_turn(content=3), "conversations[1].content must be text, got 3 (int)"),
        (with_turn(content=None), "conversations[1].content must be text, got null"),
        (with_turn(loss=0.5), "conversations[1].loss must be 0 or 1, got 0.5 (float)"),
        (with_call(name=""), "conversations[1].name is ''"),
        (with_call(name="a\nb"), "conversations[1].name is 'a\\nb'"),
        (with_call(name=7), "conversations[1].name must be text, got 7 (int)"),
        (with_call(parameters=None), "conversations[1].parameters must be an object, got null"),
        (with_call(parameters=[1]), "conversations[1].parameters must be an object, got [1] (list)"),
        (with_call(parameters={"a b": 1}), "conversations[1].parameters: 'a b' cannot be a keyword argument"),
        ({"conversations": [{"role": "tool", "name": "f"}]}, "conversations[0].parameters: missing"),
        (with_call(joined=True), "conversations[1].joined: there is no answer or call before it"),
        ({"conversation": []}, "nothing to learn"),
        ({"conversation": [{"human": "h"}]}, "conversation[0].assistant: missing; expected text"),
        ({"conversation": [["h", "a"]]}, "conversation[0]: must be an object with human and assistant"),
        (messages({"role": "bot", "content": "x"}), "messages[0].role is 'bot'"),
        (
            messages({"role": "user", "content": [{"type": "image_url"}]}),
            "messages[0].content: holds a part that is no text",
        ),
        (messages({"role": "assistant", "content": None}), "messages[0].content must be text, got null"),
        (
            messages({"role": "tool", "tool_call_id": "1", "content": "x"}),
            'messages[0]: answers no call with the id "1" (str) of the message before; give that call, or remove',
        ),
        (
            messages({"role": "assistant", "tool_calls": [call("f", "[1]", "1")]}),
            "arguments must be an object, got [1] (list)",
        ),
        (messages({"role": "assistant", "tool_calls": [call("f", '{"a": NaN}', "1")]}), "NaN is no JSON number"),
        (
            messages({"role": "assistant", "tool_calls": [call("f", "{", "1")]}),
            "function.arguments: column 2: not JSON",
        ),
        (
            messages({"role": "assistant", "tool_calls": [call("f", "", "1"), call("f", "", "1")]}),
            "two calls have one id",
        ),
        ({"messages": [ANSWER], "tools": {"a": 1}}, "tools must be a list of functions"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "conversations[0].from is 'bot'; expected one of system, human",
        ),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "[0]: answers no call of the message before"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value: column 1: not JSON"),
        ({"instruction": "a"}, "output: missing; expected text"),
        (
            {"instruction": "a", "output": "b", "history": [["q"]]},
            'history[0] must be [question, answer], got ["q"] (list)',
        ),
        ({"chat": "hello"}, "chat: must begin with 'USER: '"),
        ({"chat": "ASSISTANT: <functioncall> f(1)"}, "<functioncall> is followed by no call"),
        ({"system": "functions { x", "chat": "ASSISTANT: a"}, "system: a function's description is not JSON"),
        (
            {"system": "functions " + '{"a":' * 50_000, "chat": "ASSISTANT: a"},
            "system: a function's description is not",
        ),
        ({"system": 'functions {"a": "\\ud800"}', "chat": "ASSISTANT: a"}, "system: holds '\\ud800', half of a surr"),
        (
            {"chat": 'ASSISTANT: <functioncall> {"name": "f", "arguments": ' + '{"a":' * 9999 + "1" + "}" * 10_000},
            "the arguments of a <functioncall>: nested more than 100 deep",
        ),
        ({"instruction": "a", "input": 0, "output": "b"}, "input must be text, got 0 (int)"),
        ({"instruction": "a", "system": [], "output": "b"}, "system must be text, got [] (list)"),
        ({"instruction": "a", "history": {}, "output": "b"}, "history must be a list, got {} (dict)"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "conversations[0].value: holds no call"),
        (messages({**ANSWER, "reasoning_content": False}), "messages[0].reasoning_content must be text, got false"),
    ],
)
def test_a_bad_row_is_named_with_its_field(tmp_path, row, fault):
    with pytest.raises(DataError) as error:
        choose_learned(parse_row(row), "flagged")
    assert fault in str(error.value)


def test_reading_stops_at_the_first_bad_row_with_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": [USER, ANSWER]}) + "\n\n" + json.dumps(with_turn(content=1)) + "\n")
    with pytest.raises(DataError, match=rf"{file}:3: conversations\[1\]\.content must be text"):
        list(read_conversations(file))


# Round trips

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
any_flag = st.booleans()
names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
tools = st.lists(
    st.fixed_dictionaries({"name": names, "parameters": st.dictionaries(names, values, max_size=2)}),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw, pairs=False, results=texts, parallel=True, text=texts, flags=any_flag):
    turns = [Turn("system", draw(text.filter(bool)))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(text)))
        for _ in range(0 if pairs else draw(st.integers(0, 2))):
            learned, joined = draw(flags), False
            if draw(st.booleans()) and parallel:
                turns.append(Turn("assistant", draw(text.filter(bool)), learned))
                joined = True
            for _ in range(draw(st.integers(1, 3 if parallel else 1))):
                parameters = draw(st.dictionaries(names, values, max_size=2))
                turns.append(Turn("tool", "", learned, draw(names), parameters, draw(results), True, joined=joined))
                joined = True
        turns.append(Turn("assistant", draw(text), draw(flags)))
    return Conversation(tuple(turns), None if pairs else draw(st.none() | tools))


def back(row: dict) -> Conversation:
    return parse_row(json.loads(json.dumps(row)))


@settings(max_examples=150, deadline=None)
@given(conversations(results=values))
def test_chatglm3_rows_lose_nothing(conversation):
    row, lost = write(conversation, "chatglm3")
    assert back(row) == conversation
    assert not lost


@settings(max_examples=150, deadline=None)
@given(conversations(results=texts))
def test_openai_rows_lose_nothing_but_gain_ids(conversation):
    row, lost = write(conversation, "openai")
    returned = back(row)
    assert replace(returned, turns=tuple(replace(turn, id="") for turn in returned.turns)) == conversation
    assert back(write(returned, "openai")[0]) == returned
    assert not lost


@settings(max_examples=150, deadline=None)
@given(conversations(results=values, parallel=False, flags=st.just(True)))
def test_sharegpt_rows_mean_the_same_to_the_model(conversation):
    row, lost = write(conversation, "sharegpt")
    assert chatglm3_messages(back(row)) == chatglm3_messages(conversation)
    assert set(lost) <= {"the type of a result: written as its JSON"}


@settings(max_examples=150, deadline=None)
@given(conversations(results=values, flags=st.just(True)))
def test_parallel_calls_in_sharegpt_keep_their_own_results(conversation):
    assert chatglm3_messages(back(write(conversation, "sharegpt")[0])) == chatglm3_messages(conversation)


@settings(max_examples=100, deadline=None)
@given(conversations(pairs=True, flags=st.just(True)))
def test_alpaca_and_firefly_rows_lose_nothing(conversation):
    row, lost = write(conversation, "alpaca")
    assert back(row) == conversation
    if conversation.turns[0].role != "system":
        row, more = write(conversation, "firefly")
        assert back(row) == conversation
        assert not more
    assert not lost


plain = st.text("ab 你'\"{\\", min_size=1, max_size=12).filter(lambda text: text == text.strip())


@settings(max_examples=100, deadline=None)
@given(conversations(results=plain, parallel=False, text=plain, flags=st.just(True)))
def test_glaive_rows_mean_the_same_to_the_model(conversation):
    if conversation.tools is None or conversation.turns[0].role != "system":
        assert chatglm3_messages(back(write(conversation, "glaive")[0])) == chatglm3_messages(conversation)


rare = st.sampled_from(["", " x ", "a", "[see", '["a","b"]', "'", 'f"g', "USER: x", "<functioncall>", "functions {}"])
odd_names = st.sampled_from(["f", 'a"b', "USER: x", "<functioncall>", " f"])
rare_values = st.recursive(rare | st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=2), max_leaves=3)
odd_tools = st.fixed_dictionaries({"name": odd_names}, optional={"parameters": rare_values})
odd_tools |= st.fixed_dictionaries({"type": st.just("function"), "function": odd_tools})


@st.composite
def odd_conversations(draw):
    turns = []
    for role in draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool", "tool"]), max_size=5)):
        learned = role in ("assistant", "tool") and draw(any_flag)
        if role != "tool":
            turns.append(Turn(role, draw(rare), learned))
            continue
        observed = draw(any_flag)
        joined = bool(turns) and turns[-1].role in ("assistant", "tool") and draw(any_flag)
        parameters = draw(st.dictionaries(st.sampled_from(["x", "a b"]), rare_values, max_size=2))
        result, identity = draw(rare_values) if observed else None, draw(st.sampled_from(["", "1", "2", "call00001"]))
        turns.append(Turn(role, "", learned, draw(odd_names), parameters, result, observed, identity, joined))
    return Conversation(tuple(turns), draw(st.none() | st.lists(odd_tools, max_size=2) | rare_values))


@settings(max_examples=300, deadline=None)
@given(odd_conversations())
def test_what_does_not_come_back_was_said_to_be_lost(conversation):
    for name in ROW_FORMATS if conversation.turns else []:
        with contextlib.suppress(DataError):
            row, lost = write(conversation, name)
            try:
                returned = back(row)
            except DataError as error:
                pytest.fail(f"{name} wrote what it cannot read: {error}")
            for one, two in itertools.zip_longest(returned.turns, conversation.turns, fillvalue=Turn("none")):
                assert lost or replace(one, id="") == replace(two, id=""), name
            assert lost or returned.tools == conversation.tools, name


def test_texts_that_look_like_lists_are_results_and_no_call_is_lost():
    value = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    turns = [("human", "u"), ("function_call", value), ("observation", "[see page 3"), ("observation", "[2]")]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    assert [turn.observation for turn in parse_row(row).turns[1:]] == ["[see page 3", "[2]"]
    called = {"role": "assistant", "content": "x", "tool_calls": [], "function_call": {"name": "f", "arguments": "{}"}}
    assert [turn.name for turn in parse_row(messages(called)).turns] == ["", "f"]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_conversation_without_turns_is_written_or_refused(name):
    with contextlib.suppress(DataError):
        assert write(Conversation(()), name)


def test_what_has_no_place_is_said():
    with_tools = parse_row({"tools": ["f: does f"], "conversations": [USER, CALL, {**ANSWER, "loss": False}]})
    row, lost = write(with_tools, "openai")
    assert chatglm3_messages(back(row)) == chatglm3_messages(with_tools)
    assert lost == [
        "the type of a result: written as its JSON",
        "tools that are no function descriptions: written as the system message that ChatGLM3 shows",
    ]
    for name, fault in (
        ("firefly", "no place for tool and tools"),
        ("alpaca", "no place for"),
        ("glaive", "no function descr"),
    ):
        with pytest.raises(DataError, match=fault):
            write(with_tools, name)
    assert write(parse_row({"conversation": [{"human": "h", "assistant": "a"}]}), "alpaca")[1] == []
    assert write(parse_row(with_turn(loss=False)), "firefly")[1] == ["loss=false of an answer"]
    for name in ("alpaca", "glaive"):
        with pytest.raises(DataError, match="has no question"):
            write(Conversation((Turn("system", "s"),)), name)
    marker = parse_row(with_turn(content="x\nUSER: y"))
    with pytest.raises(DataError, match="marker of Glaive's"):
        write(marker, "glaive")
    with pytest.raises(DataError, match="'a-b' of f cannot be a Python keyword"):
        write(parse_row(messages({"role": "assistant", "tool_calls": [call("f", {"a-b": 1}, "1")]})), "chatglm3")
    mixed = Conversation((Turn("user", "u"), Turn("assistant", "a", True), Turn("tool", name="f", joined=True)))
    assert write(mixed, "openai")[1] == ["loss=false of a part of a message"]


def test_the_shared_rows_survive_every_format_that_can_hold_them(shared):
    count = 0
    for name in ("firefly_dummy_data", "firefly_dummy_data_chatglm3", "toolalpaca_chatglm3"):
        for _, conversation in read_conversations(shared / "data" / f"{name}.jsonl"):
            for target in ("chatglm3", "openai", "sharegpt"):
                row, _ = write(conversation, target)
                assert detect_format(row) == target
                assert chatglm3_messages(back(row)) == chatglm3_messages(conversation)
            count += 1
    assert count == 247


def paths(value, at=()):
    """Every place inside a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*at, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = copy.deepcopy(value)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return copied


WHOLE_ROWS = [
    {"tools": [WEATHER], "conversations": [USER, {**CALL, "id": "1", "joined": False}, {**ANSWER, "loss": True}]},
    {"conversation": [{"human": "h", "assistant": "a"}]},
    OPENAI,
    {
        "system": "s",
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "loss": True},
            {"from": "observation", "value": "x"},
            {"from": "gpt", "value": "a", "weight": 1},
        ],
    },
    {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]},
    {"system": "SYSTEM: functions {}", "chat": 'USER: u\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{}\'}'},
]
ODD_VALUES = [None, 0, 1.5, True, "", "x", "[]", "{", '{"name": 1}', [], [None], ["x"], [[]], {}, {"name": None}]


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=detect_format)
def test_whatever_stands_in_a_field_a_row_is_read_or_refused(row):
    """Every value anywhere in a row of every format, through parser, renderer and writers: a DataError or a result."""
    outcomes = {"read": 0, "refused": 0}
    for path in paths(row):
        for value in ODD_VALUES if path else []:
            try:
                conversation = choose_learned(parse_row(replaced(row, path, value)), "flagged")
                list(oddities(conversation))
                chatglm3_messages(conversation)
                for row_format in ROW_FORMATS.values():
                    with contextlib.suppress(DataError):
                        json.dumps(row_format.write(conversation, lambda what: None))
                outcomes["read"] += 1
            except DataError as error:
                assert str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_reasoning_keeps_its_field_where_a_format_has_one_and_is_said_to_become_text_elsewhere():
    conversation = Conversation((Turn("user", "u"), Turn("assistant", "a", True, reasoning="hm")))
    for name in ("chatglm3", "openai"):
        row, lost = write(conversation, name)
        assert back(row) == conversation
        assert lost == []
    for name in ("firefly", "sharegpt", "alpaca", "glaive"):
        row, lost = write(conversation, name)
        assert back(row).turns[1] == Turn("assistant", "<think>\nhm\n</think>\n\na", True)
        assert lost == ["that reasoning is no part of the answer: written as <think> text"]
    assert chatglm3_messages(conversation)[1][0].content == "<think>\nhm\n</think>\n\na"
