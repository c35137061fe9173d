"""Rounds of a talk: questions, calls with their results, answers, and what goes wrong without a trace in the talk."""

import gzip
import json
import os

import pytest

from component.chat.conversation import Talk, read_tools
from component.data.formats import parse_row
from component.inference.session import Session
from component.run.errors import DataError, StorageError
from tests.component.chat.conftest import TOOLS, WEATHER, call


def write(talk: Talk, adapted: bool = True) -> str:
    return "".join(piece.text for piece in talk.answer(adapted))


def ask(talk: Talk, question: str) -> str:
    talk.ask(question)
    return write(talk)


def contents(talk: Talk) -> list[str | None]:
    return [message["content"] for messages in talk.rounds for message in messages]


def test_a_question_and_its_answer_are_a_round_and_the_next_prompt_has_it(make_talk):
    talk = make_talk("one", "two", system="be brief")
    assert (ask(talk, "1"), ask(talk, "2")) == ("one", "two")
    assert contents(talk) == ["1", "one", "2", "two"]
    assert not talk.is_due
    prompt, adapted = talk.session.engine.asked[1]
    assert adapted
    assert prompt.index("be brief") < prompt.index("1<|im_end|>") < prompt.index("one<|im_end|>") < prompt.index("2<")


def test_calls_over_rounds_get_their_results_in_order(make_talk):
    talk = make_talk(call("Rome") + "\n" + call("Oslo"), call("Bern"), "all sunny")
    ask(talk, "and there?")
    assert [json.loads(one["function"]["arguments"])["city"] for one in talk.waiting] == ["Rome", "Oslo"]
    talk.give("24")
    assert not talk.is_due
    talk.give("12")
    assert talk.is_due
    assert talk.rounds == []
    write(talk)
    talk.give("18")
    assert write(talk) == "all sunny"
    first, second = (message["tool_calls"] for message in talk.rounds[0] if "tool_calls" in message)
    results = [(m["tool_call_id"], m["content"]) for m in talk.rounds[0] if m["role"] == "tool"]
    assert results == [(first[0]["id"], "24"), (first[1]["id"], "12"), (second[0]["id"], "18")]
    prompt = talk.session.engine.asked[-1][0]
    assert prompt.index("Rome") < prompt.index("24") < prompt.index("12") < prompt.index("Bern") < prompt.index("18")


def test_an_empty_result_is_asked_for_again(make_talk):
    talk = make_talk(call("Rome"))
    ask(talk, "?")
    with pytest.raises(DataError, match=r"^weather has an empty result; write one, or /skip the call$"):
        talk.give(" ")
    assert len(talk.waiting) == 1


BROKEN = '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (BROKEN, "has a call that cannot be read; the question is taken back out"),
        ((BROKEN[:40], "length"), r"ends within a call, cut short .*; the question is taken back out"),
        ((call("Rome"), "length"), r"ends within a call, cut short .*; the question is taken back out"),
        (("\n", "length"), r"ends before its text begins, cut short .*; the question is taken back out"),
    ],
)
def test_an_answer_that_cannot_stay_leaves_the_talk_as_it_was(make_talk, answer, told):
    talk = make_talk("one", answer, "two")
    ask(talk, "1")
    with pytest.raises(DataError, match=told):
        ask(talk, "2")
    assert contents(talk) == ["1", "one"]
    assert not talk.is_due
    talk.retry()
    assert write(talk) == "two"
    assert contents(talk) == ["1", "one", "2", "two"]


def test_what_was_written_of_an_unreadable_call_is_shown_before_the_error(make_talk):
    talk = make_talk(BROKEN)
    talk.ask("2")
    shown = []
    with pytest.raises(DataError):
        shown.extend(piece.text for piece in talk.answer())
    assert "weather" in "".join(shown)


@pytest.mark.parametrize("text", ['weather\n{"city": 1', 'weather\n{"city": "Rome"}'])
def test_a_text_that_would_be_read_as_a_call_does_not_stay(make_talk, text):
    talk = make_talk(text)
    with pytest.raises(DataError, match=r"the answer cannot stay .*; the question is taken back out"):
        ask(talk, "1")
    assert talk.rounds == []


def stop_after(talk: Talk, pieces: int) -> str:
    shown = ""
    for i, piece in enumerate(talk.answer(), 1):
        shown += piece.text
        if i == pieces:
            talk.stop()
    return shown


def test_a_stopped_answer_stays_as_far_as_it_was_written_and_is_not_to_be_learned(make_talk):
    talk = make_talk("a long answer", "next")
    talk.ask("1")
    shown = stop_after(talk, 3)  # "a", " l", "o": white space waits for what follows it
    assert shown == "a lo"
    assert talk.rounds[0][1] == {"role": "assistant", "content": "a lo", "loss": False}
    assert ask(talk, "2") == "next"
    assert "a lo<|im_end|>" in talk.session.engine.asked[1][0]
    assert [turn.learned for turn in parse_row(talk.row()).turns] == [False, False, False, True]


def test_an_answer_that_is_stopped_within_a_call_does_not_stay(make_talk):
    talk = make_talk("see" + call("Rome") * 2)
    talk.ask("1")
    with pytest.raises(DataError, match=r"^the answer ends within a call, stopped; the question is taken back out"):
        for piece in talk.answer():
            if piece.kind == "name":
                talk.stop()
    assert talk.rounds == []


def test_what_was_held_back_when_an_answer_is_stopped_is_not_part_of_it(make_talk, monkeypatch):
    talk = make_talk("see " + call("Rome"))
    step = talk.session.engine.step

    def step_and_stop():
        step()
        if len(talk.reply.generation.tokens) == len("see <tool"):
            talk.stop()

    monkeypatch.setattr(talk.session.engine, "step", step_and_stop)
    assert ask(talk, "1") == "see"
    assert contents(talk) == ["1", "see"]


def test_a_stop_that_comes_too_late_changes_nothing(make_talk):
    talk = make_talk("one")
    ask(talk, "1")
    talk.stop()
    assert talk.reply.generation.finish_reason == "stop"


def test_a_stop_while_the_prompt_is_written_ends_the_answer_before_it_begins(make_talk, monkeypatch):
    talk = make_talk("one", "two")
    ask(talk, "1")
    reply = talk.session.reply
    monkeypatch.setattr(talk.session, "reply", lambda *asked: (talk.stop(), reply(*asked))[1])
    with pytest.raises(DataError, match=r"^stopped before the answer began; the question is taken back out"):
        ask(talk, "2")
    assert contents(talk) == ["1", "one"]
    assert len(talk.session.engine.asked) == 1
    monkeypatch.undo()
    assert ask(talk, "2") == "two"


def test_an_answer_that_is_cut_short_stays_and_is_not_to_be_learned(make_talk):
    talk = make_talk(("one", "length"))
    ask(talk, "1")
    assert talk.rounds[0][1] == {"role": "assistant", "content": "one", "loss": False}


def test_retry_replaces_the_last_answer_and_undo_takes_rounds_back(make_talk):
    talk = make_talk("one", "two", "other two", "other one")
    ask(talk, "1")
    ask(talk, "2")
    talk.retry()
    assert contents(talk) == ["1", "one", "2", "two"]  # until there is another answer
    write(talk)
    assert contents(talk) == ["1", "one", "2", "other two"]
    assert "two" not in talk.session.engine.asked[2][0]
    assert talk.undo() == "2"
    talk.retry()
    write(talk)
    assert contents(talk) == ["1", "other one"]
    assert talk.undo() == "1"
    with pytest.raises(DataError, match="no question to take back"):
        talk.undo()
    with pytest.raises(DataError, match="no question to ask again"):
        talk.retry()


def test_a_failed_retry_keeps_the_answer_that_was_there(make_talk):
    talk = make_talk("one", BROKEN, "other")
    ask(talk, "1")
    talk.retry()
    with pytest.raises(DataError, match="its earlier answer stays; /retry asks it again"):
        write(talk)
    assert contents(talk) == ["1", "one"]
    talk.retry()
    write(talk)
    assert contents(talk) == ["1", "other"]


def test_undo_of_a_call_goes_back_to_before_its_question(make_talk):
    talk = make_talk("one", call("Rome"))
    ask(talk, "1")
    ask(talk, "2")
    assert talk.undo() == "2"
    assert (contents(talk), talk.waiting) == (["1", "one"], [])


def test_undo_of_a_question_that_is_asked_again_takes_its_earlier_answer_too(make_talk):
    talk = make_talk("one", "two", call("Rome"))
    ask(talk, "1")
    ask(talk, "2")
    talk.retry()
    write(talk)
    assert talk.undo() == "2"
    assert contents(talk) == ["1", "one"]


def test_the_base_answers_without_a_trace(make_talk):
    talk = make_talk("base", "tuned")
    talk.ask("1")
    assert (write(talk, adapted=False), write(talk)) == ("base", "tuned")
    assert [adapted for _, adapted in talk.session.engine.asked] == [False, True]
    assert contents(talk) == ["1", "tuned"]


def test_a_question_that_is_too_long_leaves_the_talk_as_it_was(make_talk):
    talk = make_talk()
    talk.session.engine.room = 600
    with pytest.raises(DataError, match="the last round has a prompt of"):
        ask(talk, "x" * 2000)
    assert (talk.rounds, talk.is_due) == ([], False)


def test_early_rounds_are_left_out_and_stay_in_the_talk(make_talk, log):
    talk = make_talk("one", "two", tools=[])
    ask(talk, "x" * 2000)
    talk.session.engine.room = 1500
    ask(talk, "2")
    assert "1 early round left out" in "".join(log)
    assert "xx" not in talk.session.engine.asked[1][0]
    assert len(talk.rounds) == 2


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "glm4"])
def test_a_saved_talk_is_a_row_of_training_with_the_same_prompt(make_talk, tmp_path, family):
    answers = {"glm4": ('weather\n{"city": "北京"}', "晴"), "qwen3": (f"<think>\nhm\n</think>\n\n{call('北京')}", "晴")}
    talk = make_talk(*answers.get(family, (call("北京"), "晴")), "再见", family=family, system="简洁")
    ask(talk, "天气？")
    talk.give('{"t": 24}')
    write(talk)
    file = tmp_path / "rows.jsonl"
    assert talk.save(file) == 1
    ask(talk, "谢谢")
    assert talk.save(file) == 2
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [5, 7]
    assert rows[1]["tools"] == TOOLS
    conversation = parse_row(rows[0])
    assert [turn.role for turn in conversation.turns] == ["system", "user", *["assistant"] * (family == "qwen3"),
                                                          "tool", "assistant"]  # fmt: skip
    session = talk.session
    asked = [*rows[0]["messages"], {"role": "user", "content": "谢谢"}]
    prompt = session.prompt(session.conversation(asked, rows[0]["tools"]))
    assert session.tokenizer.decode(prompt) == session.engine.asked[2][0]


def test_saving_adds_to_a_file_and_overwrites_nothing(make_talk, tmp_path):
    talk = make_talk("one")
    with pytest.raises(DataError, match=r"^nothing is added to .*x.jsonl: there is no question with an answer yet$"):
        talk.save(tmp_path / "x.jsonl")
    ask(talk, "1")
    (tmp_path / "x.jsonl").write_text('{"a": 1}')  # without an end of its line
    assert talk.save(tmp_path / "x.jsonl") == 2
    first, second = (tmp_path / "x.jsonl").read_text().splitlines()
    assert first == '{"a": 1}'
    assert parse_row(json.loads(second)).turns[-1].content == "one"
    with pytest.raises(DataError, match=r"let the name end with .jsonl"):
        talk.save(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"none/x.jsonl: there is no folder .*none; make it, or choose another$"):
        talk.save(tmp_path / "none/x.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("folder.jsonl", "pipe.jsonl"):
        with pytest.raises(DataError, match="is no file but a folder, a pipe or a device"):
            talk.save(tmp_path / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("Ctrl-C")])
def test_a_disk_that_is_full_and_ctrl_c_leave_no_half_row(make_talk, tmp_path, monkeypatch, error):
    talk = make_talk("one")
    ask(talk, "1")
    talk.save(tmp_path / "x.jsonl")
    before = (tmp_path / "x.jsonl").read_bytes()

    def fail(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises((StorageError, KeyboardInterrupt), match=r"No space left|Ctrl-C"):
        talk.save(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps([WEATHER])),
        ("wrapped.json", json.dumps(TOOLS)),
        ("one.json", json.dumps(WEATHER)),
        ("one_wrapped.json", json.dumps(TOOLS[0])),
        ("row.json", json.dumps({"tools": [WEATHER], "conversations": []}, indent=1)),
        ("text.json", json.dumps({"tools": json.dumps([WEATHER]), "messages": []})),
        ("rows.jsonl", json.dumps({"messages": []}) + "\n" + json.dumps({"tools": [WEATHER]}) + "\n"),
    ],
)
def test_functions_are_read_in_every_shape(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_tools(tmp_path / name) == TOOLS
    (tmp_path / f"link_{name}").symlink_to(tmp_path / name)
    assert read_tools(tmp_path / f"link_{name}") == TOOLS


def test_of_rows_no_more_is_read_than_the_first_with_functions(tmp_path):
    row = json.dumps({"messages": [], "tools": [WEATHER]}).encode()
    with open(tmp_path / "rows.jsonl", "wb") as rows:
        rows.write(row + b"\n")
        rows.truncate(1 << 40)  # a hole of a terabyte
    assert read_tools(tmp_path / "rows.jsonl") == TOOLS
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"{}\n" + row + b"\nx\n"))
    assert read_tools(tmp_path / "rows.jsonl.gz") == TOOLS


def test_what_could_be_read_for_ever_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe", "link.jsonl", "zero.json", "."):
        with pytest.raises(DataError, match=r"is no file but a folder, a pipe or a device; give a file$"):
            read_tools(tmp_path / name)
    with open(tmp_path / "long.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"long.json: is longer than 4 MiB; give functions alone, or rows as .jsonl$"):
        read_tools(tmp_path / "long.json")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b"[", r"a.json: column 2: not JSON"),
        ("a.json", b'"text"', r"a.json: tools: column 1: not JSON"),
        ("a.json", b"[]", r"a.json: no functions with names; give a list"),
        ("a.json", b"[{}]", r"a.json: no functions with names"),
        ("a.json", b"[3]", r"a.json: no functions with names"),
        ("a.json", b'{"tools": null}', r"a.json: no functions with names"),
        ("a.json", b"\xff", r"a.json: is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n', r"a.jsonl: no functions with names"),
        ("a.jsonl", b"x\n", r"a.jsonl: column 1: not JSON"),
    ],
)
def test_a_file_without_functions_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_tools(tmp_path / name)


@pytest.mark.parametrize("name", ["none.json", "none.jsonl"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: could not be read"):
        read_tools(tmp_path / name)


def test_what_the_model_has_no_place_for_is_refused_and_changes_nothing(tiny_tokenizer, make_talk):
    talk = Talk(Session(tiny_tokenizer, "chatglm2"))
    with pytest.raises(DataError, match=r"^data_format chatglm2: the format has no calls"):
        talk.offer(TOOLS)
    with pytest.raises(DataError, match="no place for system"):
        talk.instruct("be brief")
    assert (talk.tools, talk.system) == ([], "")
    spoken = make_talk('weather\n{"city": 1', tools=[])
    ask(spoken, "1")
    with pytest.raises(DataError):  # what was said would be read as a call
        spoken.offer(TOOLS)
    assert spoken.tools == []
