import json

import pytest

from component.conversation import Conversation, DataError, Turn, parse_chatglm3, parse_firefly, read_conversations

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": {"y": None}}


def test_a_row_becomes_turns_with_what_is_learned():
    row = {"tools": [1], "conversations": [USER, {**ANSWER, "loss": False}, CALL, ANSWER], "note": "kept elsewhere"}
    assert parse_chatglm3(row) == Conversation(
        turns=(
            Turn("user", "u"),
            Turn("assistant", "a", learned=False),
            Turn("tool", learned=True, name="f", parameters={"x": 1}, observation={"y": None}),
            Turn("assistant", "a", learned=True),
        ),
        tools=[1],
    )


def test_firefly_pairs_become_turns():
    row = {"conversation": [{"human": "h", "assistant": "a"}]}
    assert parse_firefly(row).turns == (Turn("user", "h"), Turn("assistant", "a", learned=True))


def with_turn(**change) -> dict:
    return {"conversations": [USER, {**ANSWER, **change}]}


def with_call(**change) -> dict:
    return {"conversations": [USER, {**CALL, **change}]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "conversations: missing; expected a list"),
        ({"conversations": "x"}, 'conversations must be a list, got "x" (str)'),
        ({"conversations": []}, "conversations: nothing to learn"),
        ({"conversations": [USER]}, "conversations: nothing to learn"),
        ({"conversations": [{**ANSWER, "loss": False}]}, "conversations: nothing to learn"),
        ({"conversations": ["x"]}, "conversations[0]: must be an object with role"),
        ({"conversations": [{"content": "x"}]}, "conversations[0].role: missing"),
        (with_turn(role="usr"), "conversations[1].role is 'usr'; expected system, user, assistant or tool"),
        (with_turn(role=None), "conversations[1].role must be text, got null (NoneType)"),
        (with_turn(content=3), "conversations[1].content must be text, got 3 (int)"),
        (with_turn(content=None), "conversations[1].content must be text, got null"),
        (with_turn(loss=1), "conversations[1].loss must be true or false, got 1 (int)"),
        (with_call(name=""), "conversations[1].name is ''"),
        (with_call(name="a\nb"), "conversations[1].name is 'a\\nb'"),
        (with_call(parameters=None), "conversations[1].parameters must be an object, got null"),
        (with_call(parameters=[1]), "conversations[1].parameters must be an object, got [1] (list)"),
        (with_call(parameters={"a b": 1}), "conversations[1].parameters: 'a b' cannot be a keyword argument"),
        (
            {"conversation": [{"human": "h", "assistant": "a"}]},
            "convert the file with python script/convert_data_format.py",
        ),
    ],
)
def test_a_bad_chatglm3_row_is_named_with_file_line_and_field(tmp_path, row, fault):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": [USER, ANSWER]}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        list(read_conversations(file, parse_chatglm3))
    assert str(error.value).startswith(f"{file}:3: ")
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"conversation": []}, "conversation: empty"),
        ({"conversation": [{"human": "h"}]}, "conversation[0].assistant: missing; expected text"),
        ({"conversation": [["h", "a"]]}, "conversation[0]: must be an object with human and assistant"),
        ({"conversations": [USER, ANSWER]}, "conversation: missing, and this row has ChatGLM3's conversations"),
    ],
)
def test_a_bad_firefly_row_is_named(row, fault):
    with pytest.raises(DataError) as error:
        parse_firefly(row)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": }', ":2:7: not JSON (Expecting value); write one object a line"),
        (b"[1]", ":2: a row must be a JSON object, got [1] (list)"),
        (b'{"a": "\xff"}', ":2: byte 8 is not UTF-8; save the file as UTF-8"),
        (b"[" * 100_000, ":2: nested too deeply"),
        (b'{"a": NaN}', ":2: NaN is no JSON number; write null or text"),
        (b'{"a": ' + b"9" * 5000 + b"}", ":2: Exceeds the limit"),
        (b'{"a": "\\uD800"}', ":2: holds '\\ud800', half of a surrogate pair; remove it"),
    ],
)
def test_a_line_that_is_no_object_is_named_by_place(tmp_path, line, fault):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps({"conversations": [USER, ANSWER]}).encode() + b"\n" + line)
    with pytest.raises(DataError) as error:
        list(read_conversations(file, parse_chatglm3))
    assert f"{file}{fault}" in str(error.value)


def test_bom_crlf_blank_lines_and_unicode_separators_change_nothing(tmp_path):
    row = {"conversations": [USER, {**ANSWER, "content": "a\u2028b\x85c"}]}
    text = json.dumps(row, ensure_ascii=False)
    plain, odd = tmp_path / "plain.jsonl", tmp_path / "odd.jsonl"
    plain.write_bytes(f"{text}\n{text}\n".encode())
    odd.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n  \n{text}".encode())
    rows = [[conversation for _, conversation in read_conversations(file, parse_chatglm3)] for file in (plain, odd)]
    assert rows[0] == rows[1] == [parse_chatglm3(row)] * 2
    assert [number for number, _ in read_conversations(odd, parse_chatglm3)] == [1, 4]
