"""Lines of a talk: which are commands, what these say, and what they refuse."""

import json
import re

import pytest

from component.chat.commands import COMMANDS, enter
from component.chat.conversation import Talk
from component.inference.sampling import Sampling
from component.inference.session import Session
from component.run.errors import Fault
from tests.component.chat.conftest import TOOLS, WEATHER, call


def answer(talk: Talk, line: str) -> str:
    """What a line says and what the model then writes."""
    said = enter(talk, line)
    return said + "".join(piece.text for piece in talk.answer()) if talk.is_due else said


def refusal(talk: Talk, line: str) -> str:
    with pytest.raises(Fault) as error:
        enter(talk, line)
    return str(error.value)


def test_a_line_is_a_question_or_the_result_that_a_call_waits_for(make_talk):
    talk = make_talk(call("Rome"), "24 degrees")
    assert answer(talk, "hot?") == 'weather{"city": "Rome"}'
    assert answer(talk, "24") == "24 degrees"
    assert talk.rounds[0][2]["content"] == "24"


def test_blank_lines_are_no_questions(make_talk):
    talk = make_talk()
    assert answer(talk, "") == answer(talk, "  ") == ""
    assert not talk.is_due


def test_two_slashes_begin_a_message_with_one(make_talk):
    talk = make_talk(call("Rome"), "yes")
    answer(talk, "//etc/hosts is what?\nsay")
    assert talk.question == "/etc/hosts is what?\nsay"
    answer(talk, "///x")
    assert talk.rounds[0][2]["content"] == "//x"


SLASHES = "A message that begins with a slash is written with two"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/hepl", "/hepl is no command; did you mean /help? A message that begins with a slash is written with two"),
        (
            "/home/me",
            "/home/me is no command; /help lists them. A message that begins with a slash is written with two",
        ),
        ("/", "/ is no command; /help lists them. A message that begins with a slash is written with two"),
        ("/skip", "no call waits for a result"),
        ("/save", "/save FILE: the file's name is missing"),
        ("/save a\0b.jsonl", "a file's name has no zero byte; write it anew"),
        ("/tools ~no.one/x.json", "~no.one/x.json: could not be read (No such file or directory)"),
        ("/set top_k 3", "top_k is no setting; expected one of temperature, top_p, max_new_tokens, seed"),
        ("/set temperature", "temperature is ''; expected a number"),
        ("/set temperature nan", "temperature must be 0 or more, got nan"),
        ("/set max_new_tokens 0.5", "max_new_tokens is '0.5'; expected a number"),
        ("/set max_new_tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("a\udcff", "character 2 of the text is not UTF-8; nothing of it is used"),
    ],
)
def test_a_line_without_a_place_is_refused(make_talk, line, told):
    talk = make_talk()
    assert refusal(talk, line) == told
    assert (talk.sampling, talk.is_due) == (Sampling(), False)


def test_help_has_a_line_for_each_command(make_talk):
    lines = enter(make_talk(), "/help").splitlines()
    assert [line.split()[0] for line in lines[:-2]] == list(COMMANDS)
    assert lines[-2:] == [
        "Alt-Enter begins a new line. Ctrl-C stops an answer or a command. Tab completes.",
        "A message that begins with a slash is written with two.",
    ]


def test_functions_are_offered_shown_and_taken_away(make_talk, tmp_path):
    talk = make_talk(tools=[])
    assert enter(talk, "/tools") == "no functions are offered"
    (tmp_path / "my tools.json").write_text(json.dumps([WEATHER, {"name": "clock"}]))
    shown = "functions on offer:\n  weather(city)  how it is outside\n  clock()"
    assert enter(talk, f"/tools  {tmp_path}/my tools.json ") == shown
    assert [tool["function"]["name"] for tool in talk.tools] == ["weather", "clock"]
    assert enter(talk, "/tools") == shown
    assert refusal(talk, "/tools none.json") == "none.json: could not be read (No such file or directory)"
    assert enter(talk, "/tools off") == "no functions are offered"
    assert talk.tools == []


def test_a_model_without_calls_says_why(tiny_tokenizer):
    talk = Talk(Session(tiny_tokenizer, "firefly"))
    for line in ("/tools", "/tools x.json"):
        assert refusal(talk, line).startswith("data_format firefly: the format has no calls")


def test_the_system_message_is_set_shown_and_removed(make_talk):
    talk = make_talk()
    assert enter(talk, "/system") == "there is no system message"
    assert enter(talk, "/system be brief\nand kind") == "system message: be brief\nand kind"
    assert talk.system == "be brief\nand kind"
    assert enter(talk, "/system off") == "there is no system message"
    assert talk.system == ""


def test_settings_are_changed_and_shown(make_talk):
    talk = make_talk()
    assert enter(talk, "/set") == "temperature 0.0, top_p 1.0, max_new_tokens 512, seed none"
    enter(talk, "/set temperature  0.7")
    enter(talk, "/set seed 3")
    assert talk.sampling == Sampling(temperature=0.7, seed=3)
    assert enter(talk, "/set seed none") == "temperature 0.7, top_p 1.0, max_new_tokens 512, seed none"


def test_retry_says_when_the_answer_will_be_the_same(make_talk):
    talk = make_talk("one", "two", "three", "four")
    answer(talk, "1")
    same = "temperature is 0: the same answer, unless something else has changed; /set temperature 0.7 varies it"
    assert answer(talk, "/retry") == f"{same}two"
    enter(talk, "/set temperature 1")
    assert answer(talk, "/retry") == "three"
    enter(talk, "/set seed 3")
    assert answer(talk, "/retry").startswith("the seed is set: the same answer")


def test_undo_skip_and_clear_tell_what_is_gone(make_talk):
    talk = make_talk("one", call("Rome"), system="be brief")
    answer(talk, "1")
    answer(talk, "2")
    assert enter(talk, "/skip") == "the question is taken back out; /retry asks it again"
    assert not talk.is_due
    assert enter(talk, "/undo") == "taken back out: 1"
    assert refusal(talk, "/undo") == "there is no question to take back"
    assert enter(talk, "/clear") == "a new conversation; the system message and the functions stay"
    assert (talk.rounds, talk.system, talk.tools) == ([], "be brief", TOOLS)
    assert refusal(talk, "/retry") == "there is no question to ask again; write one"


def test_save_says_how_many_rows_there_are_and_what_is_not_learned(make_talk, tmp_path):
    talk = make_talk("one", ("two", "length"))
    answer(talk, "1")
    assert enter(talk, f"/save {tmp_path}/x.jsonl") == f"{tmp_path}/x.jsonl has now 1 row"
    answer(talk, "2")
    said = enter(talk, f"/save {tmp_path}/x.jsonl")
    assert said == f"{tmp_path}/x.jsonl has now 2 rows; 1 answer cut short will not be learned (loss: false)"


def test_a_talk_that_waits_for_a_result_is_not_saved(make_talk, tmp_path):
    talk = make_talk(call("Rome"))
    answer(talk, "1")
    told = refusal(talk, f"/save {tmp_path}/x.jsonl")
    assert told.endswith("x.jsonl: the last question has no answer yet; /skip takes it back out")
    assert not (tmp_path / "x.jsonl").exists()


def test_compare_needs_an_adapter(make_talk):
    talk = make_talk()
    assert re.match("each question is answered by the base, then by the tuned model", enter(talk, "/compare"))
    assert talk.compares
    assert enter(talk, "/compare") == "the tuned model alone answers"
    assert not talk.compares
    talk.session.adapter = None
    assert refusal(talk, "/compare").startswith("/compare: there is no adapter")


def test_quit_leaves(make_talk):
    with pytest.raises(EOFError):
        enter(make_talk(), "/quit")
