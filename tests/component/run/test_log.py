"""Secrets that reach a stream in parts."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from component.run.log import RedactedStream

ROOT = Path(__file__).parents[3]
TOKEN = "hf_" + "Ab1" * 10
TEXT = f"one 0123456789,\nhttps://me:pass@host/x {TOKEN}. aaaaaaaaa\nfirst line\nsecond line; the end: h"
SHOWN = "one <SOME_API_KEY>,\nhttps://<credentials>@host/x <token>. <AS_TOKEN>a\n<LINES_SECRET>; the end: h"


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    monkeypatch.setenv("AS_TOKEN", "a" * 8)
    monkeypatch.setenv("LINES_SECRET", "first line\nsecond line")


def shown(*parts: str) -> str:
    """What a stream that got these parts has shown when the program ends."""
    stream = RedactedStream(io.StringIO())
    for part in parts:
        assert stream.write(part) == len(part)
        stream.flush()
    stream.release()
    return stream.stream.getvalue()


def test_a_secret_in_two_parts_is_shown_as_a_whole_one_is():
    assert shown(TEXT) == SHOWN
    for cut in range(len(TEXT)):
        assert shown(TEXT[:cut], TEXT[cut:]) == SHOWN, TEXT[:cut]


def test_a_secret_in_parts_of_any_size_is_not_shown():
    for size in range(1, 12):
        assert shown(*(TEXT[at : at + size] for at in range(0, len(TEXT), size))) == SHOWN, size


def test_what_begins_no_secret_is_shown_at_once():
    stream = RedactedStream(io.StringIO())
    for text in ("a line\n", "\r 50%|###  | 1/2 [00:01<00:01]", "http: //", "the end. "):
        before = stream.stream.getvalue()
        stream.write(text)
        assert stream.stream.getvalue() == before + text


def test_a_short_line_takes_no_longer_for_a_long_secret(monkeypatch):
    monkeypatch.setenv("LONG_SECRET", "a line or another " * 2**14)
    begun = time.process_time()
    assert shown("a line", " or another\n") == "a line or another\n"
    assert time.process_time() - begun < 0.1


def test_lines_that_are_written_together_hold_no_secret():
    stream = RedactedStream(io.StringIO())
    stream.writelines(["01234", "56789\n"])
    assert stream.stream.getvalue() == "<SOME_API_KEY>\n"


def test_a_program_prints_its_last_words_though_they_may_begin_a_secret():
    code = "from component.run.log import configure_logging; configure_logging(0); print('01234', end='')"
    code += "; import sys; sys.stderr.write('0123'); sys.stderr.write('456789')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("01234", "<SOME_API_KEY>")


def test_a_name_that_steers_a_terminal_is_shown_in_a_log_line_as_text():
    program = "from component.run.log import configure_logging\n"
    program += "configure_logging(0)\nfrom loguru import logger\nlogger.error('a\\x1b[31mb\\u202ec\\r\\n\\t天\u3000地')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert "ERROR   aU+001B[31mbU+202EcU+000D\n\t天\u3000地\n" in done.stderr
