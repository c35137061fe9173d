"""Nothing with meaning is dropped: keys, system prompts, tools and calls of rows as many tools write them."""

import json

import pytest

from component.data.conversation import Conversation, Turn, choose_learned, oddities
from component.data.formats import ROW_FORMATS, parse_row, unread_keys
from component.data.reader import find_files, read_rows
from component.data.tools import misfits
from component.run.errors import DataError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}
ROWS = {
    "firefly": {"conversation": [{"human": "u", "assistant": "a"}]},
    "chatglm3": {"conversations": [USER, ANSWER]},
    "openai": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "u", "output": "a"},
    "glaive": {"chat": "USER: u\n\n\nASSISTANT: a"},
}
SEARCH = {
    "name": "book_search",
    "parameters": {
        "type": "object",
        "properties": {
            "topic": {"type": "string"},
            "order": {"enum": ["new", "old"]},
            "pages": {"type": "integer"},
            "place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            "tags": {"type": "array", "items": {"type": ["string", "null"]}},
        },
        "required": ["topic"],
    },
}


def with_key(name: str, of: str, key: str, value) -> dict:
    """A row with one more key, of the row or of its last turn."""
    row = json.loads(json.dumps(ROWS[name]))
    turns = row.get("conversations") or row.get("conversation") or row.get("messages")
    (row if of == "row" else turns[-1])[key] = value
    return row


def flags(row: dict) -> list[bool]:
    return [turn.learned for turn in parse_row(row).turns if turn.role != "user"]


@pytest.mark.parametrize("name", ROWS)
def test_a_note_is_nothing_and_an_unknown_key_is_reported(name):
    row = ROWS[name] | {
        "id": 1,
        "conversation_id": "x",
        "lang": "zh",
        "quality_score": 3,
        "label": "chat",
        "images": [],
    }
    assert unread_keys(row) == []
    assert unread_keys(row | {"foo": 1, "empty": "", "none": None}) == ["`foo` of a row is not read"]
    if "chat" not in row and "instruction" not in row:
        assert unread_keys(with_key(name, "turn", "foo", 1)) == ["`foo` of a turn is not read"]
    assert parse_row(row).turns[-1].learned


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("chosen", {"from": "gpt", "value": "x"}, "DPO.*keep the chosen answer as the last turn"),
        ("rejected", "x", "DPO"),
        ("rejected_response", "x", "DPO"),
        ("margin", 0.3, "DPO"),
        ("images", ["a.png"], "only text can be learned; remove the row"),
        ("audios", ["a.wav"], "only text"),
        ("label", False, "KTO"),
        ("kto_tag", False, "KTO"),
        ("loss_weight", 0, "give its turns `loss`"),
        ("weight", 0.5, "weigh files in train_file"),
        ("train", False, "give its turns `loss`"),
        ("system_prompt", "s", "name the key system"),
    ],
)
def test_a_key_that_changes_what_is_learned_makes_a_bad_row(name, key, value, remedy):
    with pytest.raises(DataError, match=rf"{key}.*{remedy}"):
        parse_row(ROWS[name] | {key: value})


@pytest.mark.parametrize("name", ["firefly", "chatglm3", "openai", "sharegpt"])
@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("loss_weight", 0.5, "must be 0 or 1, got 0.5"),
        ("train", "no", "must be 0 or 1"),
        ("train_detail", [{"begin_offset": 0}], "learned whole or not at all"),
        ("prefix", True, "beginning that is to be continued"),
        ("partial", True, "beginning"),
        ("refusal", "I cannot.", "write the refusal there"),
        ("audio", {"id": "x"}, "only text"),
        ("images", ["x"], "only text"),
    ],
)
def test_a_key_of_a_turn_that_cannot_be_honoured_makes_a_bad_row(name, key, value, remedy):
    with pytest.raises(DataError, match=rf"\[\d\]\.{key}.*{remedy}"):
        parse_row(with_key(name, "turn", key, value))


@pytest.mark.parametrize("name", ["firefly", "chatglm3", "openai", "sharegpt"])
@pytest.mark.parametrize("key", ["loss", "loss_weight", "loss_scale", "weight", "train", "training"])
def test_every_name_of_the_flag_is_honoured(name, key):
    assert flags(with_key(name, "turn", key, False)) == [False]
    assert flags(with_key(name, "turn", key, True)) == [True]
    assert flags(with_key(name, "turn", key, None)) == [True]
    if key != "loss":
        assert flags(with_key(name, "turn", key, 0.0)) == [False]
        with pytest.raises(DataError, match=f"loss and {key} say different things"):
            parse_row(both(name, key))


def both(name: str, key: str) -> dict:
    row = with_key(name, "turn", key, 0)
    turns = row.get("conversations") or row.get("conversation") or row.get("messages")
    turns[-1]["loss"] = True
    return row


def test_what_the_model_does_not_write_cannot_be_learned():
    for row in (
        {"messages": [{**USER, "train": True}, ANSWER]},
        {"conversations": [{**USER, "loss": True}, ANSWER]},
        {"conversations": [{**HUMAN, "weight": 1}, GPT]},
    ):
        with pytest.raises(DataError, match="only what the model writes can be learned"):
            parse_row(row)
    slim = {"conversations": [{"from": "system", "value": "s", "weight": None}, {**HUMAN, "weight": 0.0}, GPT]}
    assert flags(slim) == [False, True]


# System prompts and tools


@pytest.mark.parametrize("name", [name for name in ROWS if name != "glaive"])
def test_a_row_may_give_its_system_prompt_in_every_format(name):
    first, *rest = parse_row(ROWS[name] | {"system": "s"}).turns
    assert first == Turn("system", "s")
    assert tuple(rest) == parse_row(ROWS[name]).turns
    assert parse_row(ROWS[name] | {"system": ""}) == parse_row(ROWS[name])


def test_two_system_prompts_must_agree():
    row = {"system": "s", "messages": [{"role": "system", "content": "s"}, USER, ANSWER]}
    assert [turn.content for turn in parse_row(row).turns] == ["s", "u", "a"]
    with pytest.raises(DataError, match="system: says something else than the first turn"):
        parse_row(row | {"system": "t"})


def test_a_firefly_row_keeps_its_system_prompt_when_it_is_written():
    conversation = parse_row(ROWS["firefly"] | {"system": "s"})
    assert ROW_FORMATS["firefly"].write(conversation, pytest.fail) == {"system": "s"} | ROWS["firefly"]


def in_system(*turns, key="messages", content="") -> dict:
    system = {"role": "system", "content": content, "tools": [{"type": "function", "function": SEARCH}]}
    return {key: [system, USER, *turns]}


CALLED = Turn("tool", name="book_search", parameters={"topic": "birds"}, learned=True)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    "turn",
    [
        {"content": 'book_search\n{"topic": "birds"}'},
        {"content": "book_search\n```python\ntool_call(topic='birds')\n```"},
        {"content": "```python\ntool_call(topic='birds')\n```", "metadata": "book_search"},
        {"content": '{"topic": "birds"}', "metadata": "book_search"},
        {"content": " \n```python\ntool_call(topic='birds')```", "metadata": "book_search"},
    ],
)
def test_tools_in_the_system_turn_and_calls_that_stand_as_text(key, turn):
    turn = {"role": "assistant"} | turn
    result = {"role": "observation", "content": "a book"}
    conversation = parse_row(in_system(turn, result, ANSWER, key=key))
    assert conversation.tools == [SEARCH]
    assert conversation.turns == (
        Turn("user", "u"),
        Turn(
            "tool", name="book_search", parameters={"topic": "birds"}, learned=True, observation="a book", observed=True
        ),
        Turn("assistant", "a", learned=True),
    )
    assert parse_row(in_system({**turn, "loss": False}, key=key)).turns[-1].learned is False


def test_tools_in_two_places_must_agree():
    row = in_system(ANSWER, content="be brief")
    assert parse_row(row | {"tools": [SEARCH]}).turns[0] == Turn("system", "be brief")
    assert parse_row(row | {"tools": [SEARCH]}).tools == [SEARCH]
    with pytest.raises(DataError, match=r"messages\[0\]\.tools: says something else"):
        parse_row(row | {"tools": [{"name": "other"}]})
    with pytest.raises(DataError, match=r"messages\[0\]\.tools: belongs to the row"):
        parse_row({"messages": [{**USER, "tools": [SEARCH]}, ANSWER]})


def test_the_official_system_message_is_not_written_twice():
    prompt = "Answer the following questions as best as you can. You have access to the following tools:"
    assert parse_row(in_system(ANSWER, content=prompt)).turns[0].role == "user"


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    "content",
    [
        "```python\ntool_call(topic=__import__('os').getcwd())\n```",
        "```python\ntool_call('birds')\n```",
        "```python\ntool_call(topic={1})\n```",
        "```python\ntool_call(topic=1e999)\n```",
        "print(1)",
    ],
)
def test_a_call_that_is_no_literal_is_refused_and_never_evaluated(key, content):
    turn = {"role": "assistant", "metadata": "book_search", "content": content}
    with pytest.raises(DataError, match=r"\[2\]\.content: no call of 'book_search' with literal arguments"):
        parse_row(in_system(turn, key=key))
    with pytest.raises(DataError, match=r"\[2\]\.content: .*not JSON"):
        parse_row(in_system({"role": "assistant", "content": "book_search\n{topic: birds}"}, key=key))


def test_text_that_only_begins_like_a_call_stays_text():
    for text in ("book_search\nis a function", "another\n{}", "book_search"):
        assert parse_row(in_system({"role": "assistant", "content": text})).turns[-1].content == text
    with pytest.raises(DataError, match="answers no call"):
        parse_row(in_system({"role": "observation", "content": "x"}))


def test_swift_calls_after_one_another_are_parallel():
    calls = [{"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}})} for name in "fg"]
    results = [{"role": "tool_response", "content": text} for text in ("one", "two")]
    turns = parse_row({"messages": [USER, *calls, *results, ANSWER]}).turns
    assert [(turn.name, turn.observation, turn.joined) for turn in turns[1:3]] == [
        ("f", "one", False),
        ("g", "two", True),
    ]


# Calls and what the row offers


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"topic": "x", "order": "new", "pages": 3, "place": {"city": "y"}, "tags": ["z", None]}, []),
        ({"topic": "x", "pages": None}, []),
        ({"topic": "x", "pages": 2.0}, []),
        ({}, ["a call lacks the required argument 'topic' of 'book_search'"]),
        ({"topic": "x", "topics": 1}, ["a call has the argument 'topics', which 'book_search' does not have"]),
        ({"topic": 1}, ["a call has an argument of the wrong type: 'topic' of 'book_search' must be string"]),
        ({"topic": None}, ["a call has an argument of the wrong type: 'topic' of 'book_search' must be string"]),
        (
            {"topic": "x", "pages": True},
            ["a call has an argument of the wrong type: 'pages' of 'book_search' must be integer"],
        ),
        ({"topic": "x", "order": "best"}, ["a call has an argument outside its enum: 'order' of 'book_search'"]),
        ({"topic": "x", "place": {}}, ["a call lacks the required argument 'city' of 'place' of 'book_search'"]),
        (
            {"topic": "x", "tags": [1]},
            ["a call has an argument of the wrong type: an item of 'tags' of 'book_search' must be string or null"],
        ),
    ],
)
def test_a_call_is_held_against_its_schema(arguments, expected):
    for tool in (SEARCH, {"type": "function", "function": SEARCH}):
        assert [misfit.text for misfit in misfits("book_search", arguments, [tool])] == expected


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"topic": "text"},
        {"topic": {"type": "str"}},
        {"type": "object", "properties": {"topic": {"type": "str, optional"}}},
        {"type": "object", "properties": {"topic": {"$ref": "#/x"}}, "required": True},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"properties": {}, "anyOf": []},
        {"properties": []},
    ],
)
def test_parameters_that_are_no_schema_are_not_judged(parameters):
    assert list(misfits("f", {"topic": 1}, [{"name": "f", "parameters": parameters}])) == []
    assert list(misfits("f", {}, ["f: does f"])) == []


def test_a_call_without_a_result_is_told_where_the_conversation_goes_on():
    user, answer = Turn("user", "u"), Turn("assistant", "a", True)
    parallel = Turn("tool", name="g", learned=True, joined=True)
    assert list(oddities(Conversation((user, CALLED, answer)))) == ["has a call without a result, and goes on"]
    assert list(oddities(Conversation((user, CALLED, parallel)))) == ["ends on a call"]


def test_no_real_row_is_refused_and_none_is_warned_of_without_reason(shared, reference):
    """Calls with golden arguments, and the rows from which the golden tokens were made."""
    files = [(file, None) for file in sorted((shared / "data").glob("*.jsonl"))]
    files += [(shared / "data/snips/validate.jsonl.gz", None)]
    files += [(file, "sample") for file in sorted((reference / "golden").glob("*_sft.jsonl"))]
    warned, rows = [], 0
    for file, key in files:
        for line, row in read_rows(file):
            row = row[key] if key else row
            conversation = choose_learned(parse_row(row), "all")
            rows += 1
            warned += [(file.name, line, what) for what in [*oddities(conversation), *unread_keys(row)]]
    assert rows == 180 + 33 + 34 + 345 + 59 + 38
    assert [what for _, _, what in warned if "argument" in what or "is not read" in what] == []


# Files as other tools write them

SAMPLES = {
    "LLaMA-Factory alpaca": ({"instruction": "i", "input": "", "output": "o", "system": "", "history": []}, None),
    "LLaMA-Factory sharegpt": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "{}"},
                GPT,
            ],
            "tools": '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]',
        },
        None,
    ),
    "LLaMA-Factory dpo": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "no"}},
        "chosen: a comparison of answers",
    ),
    "LLaMA-Factory dpo alpaca": (
        {"instruction": "i", "input": "", "output": ["good", "bad"]},
        "output is a list: a comp",
    ),
    "LLaMA-Factory kto, wanted": ({"messages": [USER, ANSWER], "label": True}, None),
    "LLaMA-Factory kto, not wanted": ({"messages": [USER, ANSWER], "label": False}, "label is false .*KTO"),
    "LLaMA-Factory mllm": ({"messages": [USER, ANSWER], "images": ["a.jpg"]}, "images is .*only text can be learned"),
    "LLaMA-Factory pretraining": ({"text": "t"}, "unknown kind of row, with 'text'"),
    "axolotl": ({"messages": [{**USER, "train": False}, {**ANSWER, "train": True}]}, None),
    "axolotl detail": (
        {"conversations": [HUMAN, {**GPT, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]},
        "train_detail is .*whole or not at all",
    ),
    "axolotl template-free": ({"segments": [{"label": True, "text": "t"}]}, "unknown kind of row, with 'segments'"),
    "ms-swift messages": ({"messages": [{"role": "system", "content": "s"}, USER, {**ANSWER, "loss": True}]}, None),
    "ms-swift query": ({"system": "s", "query": "q", "response": "r", "history": [["q0", "r0"]]}, None),
    "ms-swift dpo": ({"messages": [USER, ANSWER], "rejected_response": "no"}, "rejected_response: a comparison"),
    "Firefly": ({"conversation_id": 1, "category": "c", "system": "s", "dataset": "d", **ROWS["firefly"]}, None),
    "Firefly dpo": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "chosen: a comparison"),
    "TRL dpo": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen: a comparison"),
    "OpenAI": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "refusal": None}], "parallel_tool_calls": False},
        None,
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_other_tools_are_read_or_refused_by_what_they_are(name):
    row, fault = SAMPLES[name]
    if fault is None:
        assert choose_learned(parse_row(row), "flagged").turns[-1].learned
        assert unread_keys(row) == []
    else:
        with pytest.raises(DataError, match=fault):
            parse_row(row)


def test_the_query_of_ms_swift_has_its_history_and_system_prompt():
    turns = parse_row(SAMPLES["ms-swift query"][0]).turns
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "r0"),
        ("user", "q"),
        ("assistant", "r"),
    ]
    with pytest.raises(DataError, match="response: missing"):
        parse_row({"query": "q"})


# The inputs of public reports


def test_the_cases_of_public_reports_have_their_outcome(shared):
    def read(name: str) -> list:
        return [row for _, row in read_rows(shared / "cases/rows" / name)]

    (firefly,) = map(parse_row, read("firefly_system.jsonl"))
    assert firefly.turns[0] == Turn("system", "You answer only in French.")
    call, hello = map(parse_row, read("tools_in_system.jsonl"))
    assert call.turns[-1] == CALLED
    assert [tool["name"] for tool in hello.tools] == ["book_search"]
    (weighted,) = read("loss_weight.jsonl")
    assert flags(weighted) == [False, True]
    for row in read("dpo_multiturn.json"):
        with pytest.raises(DataError, match="DPO"):
            parse_row(row)
    (fault,) = read("utf16.json")
    assert "save it as UTF-8" in str(fault)
    assert [file.name for file in find_files(shared / "cases/hidden")] == ["train.jsonl"]


WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CLOCK = {"name": "get_time", "parameters": {"type": "object", "properties": {}}}
ASKED = {"role": "user", "content": "?"}


def test_a_result_that_names_its_function_and_no_call_goes_to_that_functions_call():
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("get_weather", "get_time")]
    results = [{"role": "tool", "name": name, "content": f"of {name}"} for name in ("get_time", "get_weather")]
    row = {"tools": [WEATHER, CLOCK], "messages": [ASKED, {"role": "assistant", "tool_calls": calls}, *results]}
    turns = parse_row(row).turns
    assert [(turn.name, turn.observation) for turn in turns[1:]] == [
        ("get_weather", "of get_weather"),
        ("get_time", "of get_time"),
    ]


@pytest.mark.parametrize("kind", ["openai", "sharegpt"])
def test_calls_in_hermes_tags_are_calls_where_tools_are_offered(kind):
    said = 'Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "b"}}\n</tool_call>'
    messages = [ASKED, {"role": "assistant", "content": said}, {"role": "tool", "content": "rain"}]
    row = {"tools": [json.dumps(WEATHER)], "messages": messages}
    if kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "tool": "tool"}
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]
        row = {"tools": [json.dumps(WEATHER)], "conversations": turns}
    conversation = parse_row(row)
    text, call = conversation.turns[1:]
    assert (text.content, call.name, call.parameters, call.observation) == (
        "Let me see.",
        "get_weather",
        {"city": "b"},
        "rain",
    )
    assert call.joined and call.learned
    assert conversation.tools == [WEATHER]
    assert parse_row(row | {"tools": None, "messages": messages[:2]} if kind == "openai" else row)


@pytest.mark.parametrize("mark", [{"kto_tag": 0}, {"kto_tag": "false"}, {"desirable": "False"}, {"label": "False"}])
def test_an_answer_that_is_not_to_be_given_is_a_bad_row_however_that_is_written(mark):
    with pytest.raises(DataError, match="marks an answer that is not to be given"):
        parse_row({"instruction": "q", "output": "bad"} | mark)
    good = {key: {0: 1, "false": "true", "False": "True"}[value] for key, value in mark.items()}
    assert parse_row({"instruction": "q", "output": "good"} | good).turns[-1].learned


def test_two_answers_and_calls_that_stay_text_are_said():
    answers = [{"role": "assistant", "content": text} for text in ("a", "[TOOL_CALLS] [...]")]
    odd = list(oddities(parse_row({"messages": [ASKED, *answers]})))
    assert "has two answers in a row" in odd
    assert "has an answer that looks like a call written as text, which is learned as text" in odd
