import json

import pytest

from component.run.errors import DataError
from component.score.questions import called_functions, read_scored_rows

TOOLS = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
ASKED = {"role": "user", "content": "?"}


def call(city: str, **more) -> dict:
    return {"role": "tool", "name": "weather", "parameters": {"city": city}, "observation": "sunny"} | more


def said(text: str, **more) -> dict:
    return {"role": "assistant", "content": text} | more


@pytest.fixture
def read(tmp_path):
    def read(*rows, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return read_scored_rows(file, **options)

    return read


def asked(row, data_format: str) -> list[tuple[int, list[str]]]:
    """(turns before, words or cities of the right answer) of each question."""
    return [
        (len(question.history.turns), [turn.content or turn.parameters["city"] for turn in question.expected])
        for question in row.questions(data_format)
    ]


def test_each_learned_answer_is_asked_for_after_the_true_turns_before_it(read):
    (row,) = read(
        {"tools": TOOLS, "conversations": [ASKED, call("Rome"), said("Warm."), ASKED, said("No", loss=False)]}
    )
    assert asked(row, "chat_template") == asked(row, "chatglm3") == [(1, ["Rome"]), (2, ["Warm."])]
    first, second = row.questions("chatglm3")
    assert second.history.turns[1].observation == "sunny"
    assert first.history.tools == second.history.tools == TOOLS
    assert (first.place.rsplit("/", 1)[1], first.row) == ("rows.jsonl:1", 0)


def test_loss_on_last_asks_for_the_last_answer_alone(read):
    (row,) = read({"conversations": [ASKED, said("One"), ASKED, said("Two")]}, loss_on="last")
    assert asked(row, "chat_template") == [(3, ["Two"])]


def test_parallel_calls_are_one_answer_unless_a_result_must_follow_each(read):
    turns = [ASKED, said("I look."), call("Rome", joined=True), call("Oslo", joined=True)]
    (row,) = read({"tools": TOOLS, "conversations": turns})
    assert asked(row, "chat_template") == [(1, ["I look.", "Rome", "Oslo"])]
    assert asked(row, "chatglm3") == [(1, ["I look.", "Rome"]), (3, ["Oslo"])]


def test_chatglm3_writes_a_text_and_the_call_after_it_without_an_end_between(read):
    (row,) = read({"tools": TOOLS, "conversations": [ASKED, said("I look."), call("Rome")]})
    assert asked(row, "chatglm3") == [(1, ["I look.", "Rome"])]
    assert asked(row, "chat_template") == [(1, ["I look."]), (2, ["Rome"])]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"conversations": [ASKED]}, "rows.jsonl:2: nothing to learn: no answer or call"),
        ({"conversations": [ASKED, said("No", loss=False)]}, "rows.jsonl:2: nothing to learn"),
        ({"conversations": [{"role": "usr", "content": "?"}]}, "rows.jsonl:2: conversations[0].role is 'usr'"),
        ("{", "rows.jsonl:2: column 2: not JSON"),
        (
            {"tools": {"weather": "tells it"}, "conversations": [ASKED, said("Hm.")]},
            "rows.jsonl:2: tools: is no list of functions with names",
        ),
        ({"tools": [{"title": "weather"}], "conversations": [ASKED, said("Hm.")]}, "rows.jsonl:2: tools: is no list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(read, row, fault):
    good = {"conversations": [ASKED, said("Yes")]}
    with pytest.raises(DataError) as error:
        read(good, row)
    assert fault in str(error.value)
    assert len(read(good, row, skips=True)) == 1
    assert len(read(good, row, limit=1)) == 1


def test_a_file_without_rows_is_a_fault(read):
    with pytest.raises(DataError, match=r"rows\.jsonl: nothing to score: the file has no rows"):
        read()


def test_functions_that_rows_call_or_offer_are_known(read):
    rows = read({"tools": TOOLS, "conversations": [ASKED, call("Rome") | {"name": "climate"}, said("Warm.")]})
    assert called_functions(rows) == {"weather", "climate"}
