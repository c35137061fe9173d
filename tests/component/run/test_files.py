import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from component.run.files import fingerprint, make_once, write_atomically


def fill(folder: Path) -> None:
    (folder / "a").write_text("whole")


def test_a_folder_is_made_once_and_whole(tmp_path):
    folder = make_once(tmp_path / "deep" / "x", fill)
    assert (folder / "a").read_text() == "whole"
    assert make_once(folder, lambda _: pytest.fail("made twice")) == folder


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []
    assert (make_once(tmp_path / "x", fill) / "a").exists()


def hang(folder: Path) -> None:
    fill(folder)
    (folder.parent / "started").touch()
    time.sleep(60)


def test_what_a_killed_process_left_is_made_anew(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=make_once, args=(tmp_path / "x", hang))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "x").exists()
    assert (tmp_path / ".tmp-x" / "a").exists()
    assert (make_once(tmp_path / "x", fill) / "a").exists()
    assert not (tmp_path / ".tmp-x").exists()


def make_slowly(folder: Path) -> None:
    with open(folder.parent / "makers", "a") as file:
        file.write("x")
    time.sleep(0.3)
    fill(folder)


def test_of_several_processes_one_makes_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_once, args=(tmp_path / "x", make_slowly)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "makers").read_text() == "x"


def fail_slowly(folder: Path) -> None:
    (folder.parent / "busy").mkdir()  # fails where two make at once
    time.sleep(0.02)
    (folder.parent / "busy").rmdir()
    raise OSError("disk full")


def try_often(folder: Path) -> None:
    for _ in range(6):
        with pytest.raises(OSError, match="disk full"):
            make_once(folder, fail_slowly)


def test_of_several_processes_that_fail_no_two_make_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=try_often, args=(tmp_path / "x",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_and_a_link_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "victim"}


def test_a_fingerprint_is_of_content_and_order(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "copy").write_text("a")
    one = fingerprint([tmp_path / "a", "x"])
    assert len(one) == 32
    assert one == fingerprint([tmp_path / "copy", "x"])
    assert len({one, fingerprint([tmp_path / "b", "x"]), fingerprint(["x", tmp_path / "a"]), fingerprint(["x"])}) == 4
