import pytest

from component.data.conversation import Conversation, Turn
from component.inference.calls import Answer, Call
from component.score.comparison import compare, count_arguments, count_faults, is_same
from component.score.questions import Question

WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
}
TIME = {"name": "time"}  # whose arguments nobody describes
BEIJING = Call("weather", {"city": "北京", "days": 2})


def question(*calls: Call, text: str = "") -> Question:
    turns = [Turn("assistant", text, learned=True)] if text else []
    turns += [Turn("tool", name=call.name, parameters=call.arguments, learned=True) for call in calls]
    return Question("rows.jsonl:1", 0, Conversation((Turn("user", "?"),), [WEATHER, TIME]), tuple(turns))


def given(*calls: Call, **more) -> Answer:
    return Answer(calls=calls, finish_reason="tool_calls", **more)


@pytest.mark.parametrize(
    ("expected", "answer", "fault"),
    [
        ([BEIJING], given(BEIJING), ""),
        ([BEIJING], given(Call("weather", {"days": 2.0, "city": "北京"})), ""),
        ([BEIJING], given(BEIJING, text="I look it up."), ""),
        ([BEIJING], Answer(finish_reason="length", fault="cut"), "truncated"),
        ([BEIJING], Answer(fault="no literals"), "unparsable"),
        ([BEIJING], Answer("Sunny."), "missed call"),
        ([], given(BEIJING), "needless call"),
        ([], Answer(fault="no literals"), "unparsable"),
        ([BEIJING], given(Call("wether", {"city": "北京", "days": 2})), "unknown function"),
        ([BEIJING], given(Call("time", {"city": "北京", "days": 2})), "other function"),
        ([BEIJING], given(BEIJING, BEIJING), "other number of calls"),
        ([BEIJING], given(Call("weather", {"days": 2})), "missing required argument"),
        ([BEIJING], given(Call("weather", {"city": "北京", "day": 2})), "unknown argument"),
        ([BEIJING], given(Call("weather", {"city": "北京", "days": "2"})), "wrong type"),
        ([BEIJING], given(Call("weather", {"city": "北京", "days": True})), "wrong type"),
        ([BEIJING], given(Call("weather", {"city": "北京", "days": 3})), "wrong value"),
        ([BEIJING], given(Call("weather", {"city": "北京"})), "wrong value"),  # days may be left out
        ([BEIJING], given(Call("weather", {"city": "北京", "days": 2, "unit": "K"})), "wrong value"),
        ([BEIJING], given(Call("weather", {"day": "2"})), "missing required argument"),  # and more is wrong
        # Without a description, the right call says which arguments there are.
        ([Call("time", {"zone": 8})], given(Call("time", {})), "missing required argument"),
        ([Call("time", {"zone": 8})], given(Call("time", {"zone": 8, "x": 1})), "unknown argument"),
        ([Call("time", {"zone": 8})], given(Call("time", {"zone": "8"})), "wrong type"),
        ([Call("time", {"zone": 8})], given(Call("time", {"zone": 9})), "wrong value"),
    ],
)
def test_each_wrong_answer_has_one_class(expected, answer, fault):
    asked = question(*expected, text="" if expected else "Good morning.")
    verdict = compare(asked, answer)
    assert verdict.fault == fault
    assert verdict.is_exact == (fault == "")
    assert not verdict.is_nearly_exact or verdict.is_exact


@pytest.mark.parametrize(
    ("expected", "answer", "expects", "gives"),
    [
        ([BEIJING], given(Call("time", {})), True, True),
        ([BEIJING], Answer("Sunny."), True, False),
        ([], given(BEIJING), False, True),
        ([], Answer("Sunny."), False, False),
        ([], Answer(fault="no literals"), False, True),  # no correct refusal to call
    ],
)
def test_the_decision_to_call_is_right_whatever_is_called(expected, answer, expects, gives):
    verdict = compare(question(*expected, text="" if expected else "Hi."), answer)
    assert (verdict.expects_call, verdict.gives_call) == (expects, gives)


def test_texts_are_exact_but_for_space_at_their_ends():
    asked = question(text="24 ℃ today")
    assert compare(asked, Answer(" 24 ℃ today\n")).is_exact
    near = compare(asked, Answer("24  °C today"))
    assert (near.fault, near.is_nearly_exact) == ("other text", True)
    assert not compare(asked, Answer("25 ℃ today")).is_nearly_exact
    assert compare(asked, Answer("24 ℃ today", finish_reason="length")).fault == "truncated"


def test_calls_are_nearly_exact_after_nfkc_and_with_single_spaces():
    asked = question(Call("weather", {"city": "New York", "days": 2}))
    near = compare(asked, given(Call("weather", {"city": " Ｎew\nYork", "days": 2})))
    assert (near.fault, near.is_nearly_exact) == ("wrong value", True)
    assert not compare(asked, given(Call("weather", {"city": "New York", "days": "2"}))).is_nearly_exact
    assert not compare(asked, given(Call("weather", {"city": "New-York", "days": 2}))).is_nearly_exact


def test_several_calls_match_in_any_order():
    shanghai = Call("weather", {"city": "上海", "days": 2})
    asked = question(BEIJING, shanghai)
    assert compare(asked, given(shanghai, BEIJING)).is_exact
    half = compare(asked, given(shanghai, Call("weather", {"city": "广州", "days": 2})))
    assert half.fault == "wrong value"
    assert half.has_right_names
    assert [(pair.expected.arguments["city"], pair.given.arguments["city"]) for pair in half.pairs] == [
        ("北京", "广州"),
        ("上海", "上海"),
    ]
    assert count_arguments(half.pairs) == (3, 4, 4)
    assert compare(asked, given(BEIJING)).fault == "other number of calls"
    twice = compare(question(BEIJING, BEIJING), given(BEIJING, shanghai))
    assert twice.fault == "wrong value", "one call does not answer two"


def test_arguments_count_for_calls_that_are_missed_and_needless():
    assert count_arguments(compare(question(BEIJING), Answer("Sunny.")).pairs) == (0, 0, 2)
    assert count_arguments(compare(question(text="Hi."), given(BEIJING)).pairs) == (0, 2, 0)
    assert count_arguments(compare(question(BEIJING), given(Call("time", {"city": "北京"}))).pairs) == (0, 1, 2)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (2, 2.0, True),
        (1, True, False),
        (0, False, False),
        (0, None, False),
        ("1", 1, False),
        (1.5, 15, False),
        ([1, [2.0]], [1.0, [2]], True),
        ([1], [True], False),
        ([1, 2], [2, 1], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ({"a": {"b": 1}}, {"a": {"b": True}}, False),
    ],
)
def test_values_are_the_same_with_their_types(one, other, same):
    assert is_same(one, other) == is_same(other, one) == same


def test_the_worst_class_comes_first_and_other_texts_last():
    asked = question(text="Hi.")
    answers = [Answer("Ho."), Answer("Ha."), given(BEIJING), given(BEIJING), Answer(fault="?"), Answer("Hi.")]
    faults = count_faults(compare(asked, answer) for answer in [*answers, Answer("Hm.")])
    assert list(faults.items()) == [("needless call", 2), ("unparsable", 1), ("other text", 3)]
