"""The program as a user runs it: refusals, through pipes, on a terminal, and in tmux."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from script import chat
from tests.component.chat.conftest import TOOLS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refusal(capsys, monkeypatch):
    """The one message with which the program ends, and exit code 2. No weight may have been loaded."""

    def refuse(*options) -> str:
        def load(*_, **__):
            raise AssertionError("weights were loaded")

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("component.inference.session.load_base", load)
            patch.setattr("component.run.process.leave", sys.exit)
            patch.setattr(sys, "argv", ["chat.py", *map(str, options)])
            chat.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refuse


def test_what_cannot_be_done_is_refused_before_weights_load(refusal, model_folder, adapter_folder, tmp_path):
    model = model_folder("llama")
    adapter = adapter_folder(model)
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    for options, told in {
        (): r"error: give either --adapter or --model",
        ("--model", model, "--base", model): r"error: --base needs --adapter",
        ("--model", model, "--temperature", "-1"): r"ERROR   temperature must be 0 or more, got -1.0",
        ("--model", model, "--tools", tmp_path / "none.json"): r"ERROR   .*none.json: could not be read \(No such file",
        ("--model", model, "--tools", tmp_path / "bad.json"): r"ERROR   .*bad.json: column 2: not JSON",
        ("--model", model, "--tools", tmp_path / "tools.json"): r"ERROR   data_format firefly: the format has no calls",
        ("--model", model, "--system", "be brief"): r"ERROR   firefly has no place for system",
        ("--model", model, "--system", "\udcff"): r"ERROR   character 1 of the text is not UTF-8",
        ("--model", tmp_path / "none"): r"ERROR   .*none",
        ("--adapter", tmp_path): r"ERROR   .*adapter",
        ("--adapter", adapter, "--base", tmp_path): r"ERROR   ",
    }.items():
        shown = refusal(*options)
        assert re.search(told, shown), (options, shown)
        assert "Traceback" not in shown


def piped(monkeypatch, capsys, lines: str, *options) -> str:
    """What is answered to lines of standard input."""
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode()))
    stdin.isatty = lambda: False
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, options)])
    chat.main()
    return capsys.readouterr().out


def test_the_base_and_the_tuned_model_answer_differently(monkeypatch, capsys, model_folder, adapter_folder):
    adapter = adapter_folder(model_folder("llama"))
    options = ("--adapter", adapter, "--max_new_tokens", 8, "--base_bits", 16)
    base, tuned = re.fullmatch(
        r"base:\n(.*)tuned:\n(.*)", piped(monkeypatch, capsys, "/compare\n你好\n", *options), re.DOTALL
    ).groups()
    assert base != tuned
    assert piped(monkeypatch, capsys, "你好\n", *options) == tuned


def program(*options) -> list[str]:
    return [sys.executable, str(ROOT / "script/chat.py"), *map(str, options)]


@pytest.mark.slow
def test_a_pipe_has_the_answers_on_standard_output_alone_and_an_exit_code(model_folder, tmp_path):
    options = ("--model", model_folder("llama"), "--max_new_tokens", 4)
    lines = f"你好\n/save {tmp_path}/x.jsonl\n/compare\n"
    done = subprocess.run(program(*options), input=lines.encode(), capture_output=True, timeout=120)
    told = done.stderr.decode()
    assert done.returncode == 2
    assert told.splitlines()[-1].endswith("line 3: /compare: there is no adapter, so the base alone answers; "
                                          "start with --adapter")  # fmt: skip
    assert "/x.jsonl has now 1 row; 1 answer cut short will not be learned" in told
    saved = json.loads((tmp_path / "x.jsonl").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert done.stdout.decode().endswith("\n")
    assert "WARNING" not in done.stdout.decode()


PROMPT = "\x1b[?2004h"  # prompt_toolkit asks for bracketed paste before it shows its prompt


class Pty:
    """The program on a terminal of its own."""

    def __init__(self, *options, **environment):
        self.master, side = pty.openpty()
        self.before = termios.tcgetattr(side)
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(
            program(*options), stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling terminal
        )  # fmt: skip
        self.side, self.shown = side, ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until a text is shown that was not read before."""
        deadline = time.monotonic() + seconds
        os.set_blocking(self.master, False)
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        self.shown = self.shown.partition(text)[2]

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def screen(model_folder, tmp_path) -> Iterator[Pty]:
    screen = Pty("--model", model_folder("llama"), "--max_new_tokens", 1900, XDG_STATE_HOME=str(tmp_path))
    yield screen
    screen.process.kill()
    screen.process.wait()
    for end in (screen.side, screen.master):
        with suppress(OSError):
            os.close(end)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_a_signal_the_program(screen, tmp_path):
    screen.wait_for("/help lists commands")
    screen.wait_for(PROMPT)
    screen.write("\x1b[200~one\ntwo\x1b[201~\r")  # pasted lines are one message
    time.sleep(1)
    for _ in range(2):  # also a second time
        screen.write("\x03")
        screen.wait_for("stopped; what was written stays")
        screen.wait_for(PROMPT)
        screen.write("/retry\r")
        screen.wait_for("temperature is 0: the same answer")
        time.sleep(0.5)
    screen.write("\x03")
    screen.wait_for("stopped")
    screen.wait_for(PROMPT)
    screen.write("\x03")
    screen.wait_for("Ctrl-D or /quit leaves")
    screen.wait_for(PROMPT)
    screen.process.send_signal(signal.SIGTERM)
    assert screen.process.wait(60) == 143
    screen.wait_for("SIGTERM: left; /save keeps a conversation")
    assert termios.tcgetattr(screen.side) == screen.before
    assert "+one\n+two\n" in (tmp_path / "luciole/chat_history").read_text()


@pytest.mark.slow
def test_a_terminal_that_is_gone_ends_the_program(screen):
    screen.wait_for(PROMPT)
    os.close(screen.side)
    os.close(screen.master)
    assert screen.process.wait(60) == 129


class Tmux:
    """A terminal of 80 columns and 30 lines, whose screen can be read."""

    def __init__(self, command: list[str], **environment):
        self.name = f"luciole-{os.getpid()}"
        settings = [f"{name}={value}" for name, value in environment.items()]
        shell = " ".join(map(repr, ["env", *settings, *command])) + "; echo left with $?; sleep 60"
        self.call("-f", "/dev/null", "-u", "new-session", "-d", "-x", "80", "-y", "30", shell)

    def call(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self.name, *words], capture_output=True, text=True, check=True)
        return done.stdout

    def keys(self, *keys: str) -> None:
        self.call("send-keys", *keys)

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, screen := self.call("capture-pane", "-p"), re.MULTILINE):
            assert time.monotonic() < deadline, screen
            time.sleep(0.05)
        return screen


@pytest.fixture
def tmux(model_folder, tmp_path) -> Iterator[Tmux]:
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    command = program("--model", model_folder("llama"), "--max_new_tokens", 1900)
    screen = Tmux(command, LANG="C.UTF-8", XDG_STATE_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    yield screen
    screen.call("kill-server")


@pytest.mark.slow
def test_in_tmux_chinese_is_edited_and_an_answer_is_seen_to_grow(tmux, tmp_path):
    tmux.wait_for("^> *$", 60)
    tmux.keys("北天气怎么样？")
    tmux.keys(*["Left"] * 6, "京", "BSpace", "京", "Right", "Right", "BSpace", "气", "Home", "/system ")
    tmux.wait_for("^> /system 北京天气怎么样？$")
    tmux.keys("C-c")
    tmux.wait_for("^> *$")
    tmux.keys("Up", "第一行", "Escape", "Enter", "第二行")
    tmux.wait_for("^> 第一行\n *第二行$")
    tmux.keys("Enter")
    tmux.wait_for("第二行\n.+")
    first = tmux.wait_for("第二行\n.{9}")
    assert "tokens/s" not in first
    tmux.wait_for(f"^{re.escape(first.rstrip()[-5:])}.*\\S|(.*\n){{5}}")
    tmux.keys("C-c")
    tmux.wait_for("stopped; what was")
    tmux.keys(f"/save {tmp_path}/x.jsonl", "Enter", "/qui", "Tab")
    tmux.wait_for("^> /quit$")
    tmux.keys("Enter")
    tmux.wait_for("^left with 0$")
    saved = json.loads((tmp_path / "x.jsonl").read_text())["messages"]
    assert saved[0]["content"] == "第一行\n第二行"
    assert saved[1]["loss"] is False
