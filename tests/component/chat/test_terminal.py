"""What is written of answers, through pipes and on a terminal, and the history of lines."""

import io
import re
import stat
from types import SimpleNamespace

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory

from component.chat.terminal import LineCompleter, Pipes, Terminal, open_history
from component.run.errors import ArgumentError, DataError
from tests.component.chat.conftest import TOOLS, call
from tests.component.chat.test_conversation import BROKEN


def piped(talk, *lines: str | bytes) -> str:
    out = io.StringIO()
    raw = [line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines]
    try:
        Pipes(talk, raw, out).run()
    finally:
        talk.shown = out.getvalue()
    return out.getvalue()


def test_pipes_have_answers_alone_and_a_line_for_each_call(make_talk, log):
    talk = make_talk("a\nb", "see\n" + call("罗马") + "\n" + call("Oslo"), "", tools=[])
    talk.tools = make_talk().tools
    shown = piped(talk, "1\r", "", "/set temperature 0", "2", "24", "12")
    assert shown == 'a\nb\nsee\n→ weather {"city": "罗马"}\n→ weather {"city": "Oslo"}\n\n'
    assert [m["content"] for m in talk.rounds[0]] == ["1", "a\nb"]
    told = "".join(log)
    assert "temperature 0.0, top_p 1.0" in told
    assert "line 5 is the result of weather" in told
    assert "line 6 is the result of weather" in told


def test_pipes_leave_reasoning_out(make_talk):
    talk = make_talk("<think>\nhm\n</think>\n\nyes", family="qwen3")
    assert piped(talk, "1") == "yes\n"
    assert talk.rounds[0][1]["reasoning_content"] == "hm"


def test_pipes_compare_under_headings(make_talk):
    assert piped(make_talk("b", "t"), "/compare", "1") == "base:\nb\ntuned:\nt\n"


@pytest.mark.parametrize(
    ("line", "kind", "told"),
    [
        ("/hepl", ArgumentError, "^line 2: /hepl is no command; did you mean /help"),
        (b"\xff\n", DataError, "^line 2: character 1 of the text is not UTF-8"),
        ("2", DataError, "^line 2: the answer has a call that cannot be read"),
    ],
)
def test_the_first_fault_ends_the_pipe(make_talk, line, kind, told):
    talk = make_talk("one", BROKEN)
    with pytest.raises(kind, match=told):
        piped(talk, "1", line, "3")
    assert talk.shown.startswith("one\n")
    assert talk.question != "3"


def test_an_answer_that_is_cut_short_is_told(make_talk, log):
    assert piped(make_talk(("one", "length")), "1") == "one\n"
    assert "WARNING" in "".join(log)
    assert "cut short as the context is full" in "".join(log)


def test_quit_ends_the_pipe(make_talk):
    assert piped(make_talk("one"), "1", "/quit", "2") == "one\n"


def test_nothing_that_a_model_writes_steers_the_terminal(make_talk):
    talk = make_talk("a\x1b[2Jb\rc\td\u202e", call("x\u202e").replace("weather", "we\\u001bather", 1))
    assert piped(talk, "1", "2") == 'aU+001B[2JbU+000Dc\tdU+202E\n→ weU+001Bather {"city": "xU+202E"}\n'


class Lines:
    """What a person enters. A line that is an exception is raised in the prompt, as a key does."""

    def __init__(self, *lines):
        self.lines = iter(lines)
        self.default_buffer = SimpleNamespace(text="")

    def prompt(self, text: str) -> str:
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """Makes the terminal of a talk, and what is entered on it. Signals stay as they are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("time.monotonic", iter(range(100)).__next__)

    def make(talk, *lines) -> Terminal:
        monkeypatch.setattr("component.chat.terminal.PromptSession", lambda **settings: Lines(*lines))
        return Terminal(talk, io.StringIO())

    return make


def test_a_terminal_shows_reasoning_dim_and_tokens_after_each_answer(make_talk, terminal):
    talk = make_talk("<think>\nhm\n</think>\n\nyes", family="qwen3")
    count = len(talk.session.engine.tokenizer.encode("<think>\nhm\n</think>\n\nyes"))
    talk.ask("1")
    front = terminal(talk)
    front.answer()
    assert front.out.getvalue().replace("\x1b[0m\x1b[2m", "") == (
        f"\x1b[2mhm\x1b[0m\nyes\n\x1b[2m{count} tokens; {count}.0 tokens/s\x1b[0m\n"
    )


def test_a_terminal_tells_of_an_answer_that_is_cut_short(make_talk, terminal):
    talk = make_talk(("abcdef", "length"), ("abcdef", "length"), compares=True)
    talk.ask("1")
    front = terminal(talk)
    front.answer()
    assert front.out.getvalue() == (
        "base:\nabcdef\n\x1b[2m6 tokens; 6.0 tokens/s; cut short as the context is full: /clear empties it\x1b[0m\n"
        "tuned:\nabcdef\n\x1b[2m6 tokens; 6.0 tokens/s; cut short as the context is full: /clear empties it; "
        "what was written stays, and is not learned if it is saved\x1b[0m\n"
    )


def test_the_base_alone_is_stopped_and_the_tuned_model_then_answers(make_talk, terminal):
    talk = make_talk("abcdef", "tuned", compares=True)
    talk.ask("1")
    front = terminal(talk)
    step, engine = talk.session.engine.step, talk.session.engine

    def step_and_interrupt():
        step()
        if len(engine.asked) == 1 and len(engine.running.tokens) == 3:
            front.interrupt(2, None)

    engine.step = step_and_interrupt
    front.answer()
    assert re.findall(r"^(base|tuned|.*stopped)", front.out.getvalue(), re.MULTILINE) == [
        "base", "\x1b[2m3 tokens; 3.0 tokens/s; stopped", "tuned", "tuned"
    ]  # fmt: skip
    assert talk.rounds[0][1]["content"] == "tuned"


def test_whoever_is_asked_for_a_result_is_told_once_how_to_leave_the_call(make_talk, terminal):
    talk = make_talk(call("Rome"), call("Oslo"))
    front = terminal(talk, KeyboardInterrupt(), "1", KeyboardInterrupt(), "24")
    front.run()
    shown = front.out.getvalue()
    assert shown.startswith("Ctrl-D or /quit leaves the program\n→ weather")
    assert shown.count("write it, or /skip to take your question back\n") == 1
    assert shown.count("/skip leaves the call, Ctrl-D or /quit leaves the program\n") == 1
    assert len(talk.current) == 4  # the second call was asked for its result as well


def test_ctrl_c_ends_a_command_that_is_at_work_and_the_talk_goes_on(make_talk, terminal, monkeypatch):
    talk = make_talk("one")
    front = terminal(talk, "/tools x.json", "1")
    monkeypatch.setattr("component.chat.commands.read_tools", lambda file: front.interrupt(2, None))
    front.run()
    assert front.out.getvalue().startswith("stopped; the command has changed nothing\none\n")
    assert talk.tools == TOOLS


def complete(text: str) -> list[str]:
    return [found.text for found in LineCompleter().get_completions(Document(text), CompleteEvent())]


def test_commands_settings_and_files_are_completed(tmp_path):
    (tmp_path / "tools.json").touch()
    assert complete("/s") == ["/system", "/set", "/skip", "/save"]
    assert complete("/set t") == ["temperature", "top_p"]
    assert complete(f"/tools {tmp_path}/to") == ["ols.json"]
    assert complete("") == complete("hello /s") == complete("/undo x") == complete("//s") == []


def is_kept(line: str) -> bool:
    return True


def test_the_history_has_questions_alone(make_talk, terminal, tmp_path):
    talk = make_talk(call("Rome"), "warm", "cold")
    front = terminal(talk)
    for line in ("//why?", "/system secret", "24 at home", "and now?"):
        history = open_history(front.is_question)
        history.append_string(line)
        assert history.get_strings()[-1] == line  # for the arrow keys
        front.enter(line)
        if talk.is_due:
            front.answer()
    assert list(open_history(is_kept).load_history_strings()) == ["and now?", "//why?"]


def test_the_history_is_the_users_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    open_history(is_kept).append_string("你好\nand more")
    file = tmp_path / "luciole/chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    assert list(open_history(is_kept).load_history_strings()) == ["你好\nand more"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_no_history_can_be_kept_it_is_in_memory(monkeypatch, tmp_path, log):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert isinstance(open_history(is_kept), InMemoryHistory)
    assert "lines are remembered until the end of this talk alone" in "".join(log)


def test_a_disk_that_is_full_ends_no_talk(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = open_history(is_kept)
    history.filename = tmp_path  # which cannot be written to
    history.append_string("x")
    assert history.get_strings() == ["x"]
