"""Signals, sent to processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUSY = "print('ready', flush=True)\nwhile True: time.sleep(0.01)"


def start(program: str, **settings) -> subprocess.Popen:
    """A process that runs `program` and has said that it is ready."""
    head = "import os, signal, sys, time\nfrom component.run.process import *\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_raises_where_it_is_not_deferred(signum, code):
    program = f"""
try:
    with SignalWatch():
        print('ready', flush=True)
        while True: time.sleep(0.01)
except Exception: pass
except Interrupted as stop:
    assert str(stop) == {signal.Signals(signum).name!r}
    os._exit(stop.exit_code)
"""
    process = start(program)
    process.send_signal(signum)
    assert process.wait(10) == code


def test_a_deferred_signal_is_remembered_and_a_second_interrupt_leaves_at_once():
    process = start("watch = SignalWatch().__enter__(); watch.deferred = True\n" + BUSY)
    process.send_signal(signal.SIGTERM)
    assert b"SIGTERM: saving a checkpoint as soon as possible" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(10) == 130
    assert time.monotonic() - sent < 1


def test_a_signal_is_remembered_though_nobody_can_be_told():
    process = start(
        f"os.close(2)\nwatch = SignalWatch().__enter__(); watch.deferred = True\n{BUSY}".replace(
            "time.sleep(0.01)", "time.sleep(0.01); watch.received and os._exit(7)"
        )
    )
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 7


def test_a_signal_that_was_ignored_stays_so():
    process = start("signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwatch = SignalWatch().__enter__()\n" + BUSY)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()


def test_handlers_are_put_back():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    from component.run.process import SignalWatch

    with SignalWatch() as watch:
        assert signal.getsignal(signal.SIGTERM) == watch.handle
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_helpers_outlive_signals_and_not_their_parent():
    program = """
pid = os.fork()
if not pid:
    outlive_signals()
    while True: time.sleep(0.01)
time.sleep(0.2)
print('ready', flush=True); print(pid, flush=True)
while True: time.sleep(0.01)
"""
    parent = start(program)
    child = Path("/proc", parent.stdout.readline().decode().strip())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        subprocess.run(["kill", f"-{int(signum)}", child.name], check=True)
    time.sleep(0.3)
    assert state(child) not in "ZX"
    parent.kill()
    parent.wait()
    for _ in range(100):
        if state(child) in "ZX":
            return
        time.sleep(0.05)
    pytest.fail("the helper outlived its parent")


def state(process: Path) -> str:
    """Of /proc: R, S, Z, …; X where it is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def run(program: str, **settings) -> subprocess.CompletedProcess:
    head = "from component.run.process import *\nfrom component.run.errors import *\n"
    return subprocess.run(
        [sys.executable, "-c", head + program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, **settings
    )


def test_an_error_that_is_ours_ends_in_its_traceback_and_where_to_report_it():
    done = run("def work(watch): {}['rows']\nrun_program(work, lambda: 'stopped')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert done.stderr.splitlines()[-2:] == [
        "KeyError: 'rows'",
        "This is a mistake of Luciole and not yours: open an issue with the lines above and the command",
    ]


def test_a_fault_of_the_users_is_no_mistake_of_ours():
    done = run("def work(watch): raise StorageError('the disk is full')\nrun_program(work, lambda: 'stopped')")
    assert done.returncode == 4
    assert done.stderr.endswith("the disk is full\n")
    assert "mistake" not in done.stderr + done.stderr


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_output_that_nobody_reads_any_more_ends_like_any_programs(lines):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(f"run_program(lambda watch: [print('line') for _ in range({lines})], lambda: 'stopped')", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
