import pytest

from component.data.conversation import Conversation, Turn, choose_learned, count_rounds, oddities, without_first_rounds
from component.run.errors import DataError

SYSTEM, USER = Turn("system", "s"), Turn("user", "u")
ANSWER = Turn("assistant", "a", learned=True)
CALL = Turn("tool", learned=True, name="f", observation=1, observed=True)


def learned(conversation: Conversation) -> list[bool]:
    return [turn.learned for turn in conversation.turns]


@pytest.mark.parametrize(
    ("turns", "tools", "expected"),
    [
        ((SYSTEM, USER, CALL, ANSWER), [{"name": "f"}], []),
        ((USER, CALL, ANSWER), [{"type": "function", "function": {"name": "f"}}], []),
        ((USER, CALL, ANSWER), ["f: does f"], []),  # tools that name none
        ((ANSWER, USER, ANSWER), None, ["the assistant speaks first"]),
        ((USER, ANSWER, USER), None, ["ends on a user turn"]),
        ((USER, CALL), None, ["ends on a call"]),
        ((USER, Turn("assistant", " \n", True)), None, ["has an empty answer"]),
        ((USER, USER, ANSWER), None, ["has two user turns in a row"]),
        ((USER, ANSWER, SYSTEM, USER, ANSWER), None, ["has a system turn after the first turn"]),
        ((USER, CALL, ANSWER), [{"name": "g"}], ["calls a function that tools does not name"]),
    ],
)
def test_what_is_unusual_is_named(turns, tools, expected):
    assert list(oddities(Conversation(turns, tools))) == expected


def test_whose_tokens_are_learned():
    quiet = Turn("assistant", "quiet")
    joined = Turn("tool", name="g", learned=True, joined=True)
    conversation = Conversation((USER, quiet, USER, ANSWER, joined, USER))
    assert learned(choose_learned(conversation, "flagged")) == [False, False, False, True, True, False]
    assert learned(choose_learned(conversation, "all")) == [False, True, False, True, True, False]
    assert learned(choose_learned(conversation, "last")) == [False, False, False, True, True, False]
    assert learned(choose_learned(Conversation((USER, ANSWER, CALL)), "last")) == [False, False, True]


@pytest.mark.parametrize(("turns", "loss_on"), [((), "all"), ((USER,), "last"), ((USER, Turn("assistant")), "flagged")])
def test_a_row_with_nothing_to_learn_is_refused(turns, loss_on):
    with pytest.raises(DataError, match="nothing to learn"):
        choose_learned(Conversation(turns), loss_on)


def test_early_rounds_go_and_system_turns_and_tools_stay():
    late = Turn("system", "late")
    conversation = Conversation((SYSTEM, USER, USER, CALL, ANSWER, late, USER, ANSWER, USER, CALL), tools=[1])
    assert count_rounds(conversation) == 3
    assert without_first_rounds(conversation, 0) == conversation
    assert without_first_rounds(conversation, 1) == Conversation((SYSTEM, late, USER, ANSWER, USER, CALL), [1])
    assert without_first_rounds(conversation, 2) == Conversation((SYSTEM, late, USER, CALL), [1])
    assert count_rounds(Conversation((ANSWER, USER, ANSWER))) == 2
