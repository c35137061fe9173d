"""The folder of rendered data stays within its size, and what is used or not ours stays in it."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from component.data import dataset as dataset_room
from component.data.cache import OURS, limit_cache
from component.data.dataset import ChatGLM3SFTDataset
from component.data.store import REPORT
from component.run.files import make_once
from tests.runs import ROWS

FORK = multiprocessing.get_context("fork")
DAY = 86400


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def render(tmp_path, cache, tiny_tokenizer):
    """Opens the rendered rows of a number, which are made if they are not in the cache."""

    def render(number: int) -> ChatGLM3SFTDataset:
        rows = tmp_path / f"{number}.jsonl"
        turns = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": "word"}]
        rows.write_text(json.dumps({"conversations": turns}) + "\n")
        return ChatGLM3SFTDataset(rows, tiny_tokenizer, 64, cache_dir=cache)

    return render


@pytest.fixture
def fill(render):
    """Makes rendered rows that nobody has open, the first used longest ago; returns their folders."""

    def fill(count: int) -> list[Path]:
        folders = [render(number).folder for number in range(count)]
        for days, folder in enumerate(reversed(folders), start=1):
            os.utime(folder / REPORT, (time.time() - days * DAY,) * 2)
        return folders

    return fill


def size(*folders: Path) -> float:
    """Of these folders, in GiB."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / 2**30


def wait_for(happens) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin(work, *args) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def test_what_was_used_longest_ago_is_removed_until_the_rest_fits_and_said_in_one_line(render, fill, cache, log):
    folders = fill(4)
    render(1)  # the newest use of an old one
    keep = size(folders[1], folders[3])
    limit_cache(cache, size(*folders))
    assert all(folder.exists() for folder in folders)
    limit_cache(cache, keep)
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    lines = [line for line in log if "cache_dir" in line]
    assert len(lines) == 1
    assert f"cache_dir {cache}: removed 2 of 4 sets of rendered data, not used since 20" in lines[0]
    assert {path.name for path in cache.iterdir()} == {folders[1].name, folders[3].name, ".limit.lock"}
    assert render(0)[0] == render(0)[0], "it is made anew"


def test_without_a_limit_or_a_cache_nothing_is_done(fill, cache):
    limit_cache(cache, 1e-9)
    assert not cache.exists()
    folders = fill(2)
    limit_cache(cache, None)
    assert all(folder.exists() for folder in folders)


def test_what_this_process_has_open_stays(render, fill, cache):
    old, new = fill(2)
    opened = render(0)
    os.utime(old / REPORT, (0, 0))
    limit_cache(cache, 1e-9)
    assert [old.exists(), new.exists()] == [True, False]
    del opened
    limit_cache(cache, 1e-9)
    assert not old.exists()


def use(render, ready: Path, go: Path, read: Path) -> None:
    rows = render(0)
    ready.touch()
    wait_for(go.exists)
    read.write_text(json.dumps(rows[0]["input_ids"]))
    time.sleep(60)


def test_what_another_process_has_open_stays_until_that_process_is_gone(render, fill, cache, tmp_path):
    expected = render(0)[0]["input_ids"]
    old, new = fill(2)
    ready, go, read = (tmp_path / name for name in ("ready", "go", "read"))
    user = begin(use, render, ready, go, read)
    wait_for(ready.exists)
    os.utime(old / REPORT, (0, 0))
    limit_cache(cache, 1e-9)
    assert [old.exists(), new.exists()] == [True, False]
    go.touch()
    wait_for(lambda: read.exists() and read.read_text())
    assert json.loads(read.read_text()) == expected
    os.kill(user.pid, signal.SIGKILL)
    user.join()
    limit_cache(cache, 1e-9)
    assert not old.exists()


def remove_all_the_time(cache: Path) -> None:
    while True:
        limit_cache(cache, 1e-9)


def test_a_process_opens_what_another_removes_all_the_time(render, cache):
    expected = render(0)[0]
    removers = [begin(remove_all_the_time, cache) for _ in range(2)]
    made, opened, deadline = set(), 0, time.monotonic() + 60
    try:
        while opened < 60 or len(made) <= 5:
            assert time.monotonic() < deadline, f"it was removed {len(made) - 1} times"
            rows = render(0)
            assert rows[0] == expected
            made.add((rows.folder / REPORT).stat().st_ino)
            opened += 1
            del rows
            time.sleep(0.005)  # in which it may be removed
    finally:
        for remover in removers:
            remover.kill()
            remover.join()


def test_what_is_removed_between_being_found_and_being_opened_is_made_again(render, fill, cache, monkeypatch):
    (old,) = fill(1)
    calls = []

    def find_and_lose(folder, make):
        found = make_once(folder, make)
        calls.append(found)
        if len(calls) == 1:
            limit_cache(cache, 1e-9)
            assert not old.exists()
        return found

    monkeypatch.setattr(dataset_room, "make_once", find_and_lose)
    assert len(render(0)) == 1
    assert len(calls) == 2


def test_what_is_removed_and_made_anew_before_it_is_locked_is_opened_anew(render, fill, cache, monkeypatch):
    (old,) = fill(1)
    flock = fcntl.flock

    def lock_late(file, operation) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        limit_cache(cache, 1e-9)
        assert not old.exists()
        render(0)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    rows = render(0)
    assert os.path.samestat(os.fstat(rows.store.held.fileno()), os.stat(old / REPORT))


def test_what_is_not_a_stores_files_alone_stays(fill, cache, tmp_path):
    holding_more, linked, damaged, _ = fill(4)
    (damaged / REPORT).unlink()
    (holding_more / "mine.txt").write_text("precious")
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    for name in ("models/deep", "0" * 32, "5" * 32, "1" * 31, f".tmp-{'2' * 32}", f".removed-{'3' * 32}"):
        (cache / name).mkdir(parents=True)
    for name in ("mine.txt", "models/deep/input_ids.bin", f"{'0' * 32}/mine.bin", f"{'1' * 31}/{REPORT}"):
        (cache / name).write_text("precious")
    for name in ("2" * 32, "3" * 32):
        (cache / f".{'tmp' if name < '3' else 'removed'}-{name}" / "mine.bin").write_text("precious")
    with_link = cache / ("4" * 32)
    shutil.copytree(tmp_path / "elsewhere", with_link)
    (with_link / "notes.bin").unlink()
    (with_link / "notes.bin").symlink_to(cache / "mine.txt")
    before = {path: path.read_bytes() for path in [*cache.rglob("*"), *tmp_path.glob("elsewhere/*")] if path.is_file()}
    limit_cache(cache, 1e-9)
    gone = {path.relative_to(cache).parts[0] for path in before if not path.exists()}
    assert len(gone) == 1, "the last of our own"
    assert (cache / ("5" * 32)).exists()
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())


def remove_and_die(cache: Path) -> None:
    unlink, done = Path.unlink, []

    def unlink_two(path: Path, **options) -> None:
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(unlink(path, **options))

    Path.unlink = unlink_two
    limit_cache(cache, 1e-9)


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_whole(render, fill, cache):
    expected = render(0)[0]
    (old,) = fill(1)
    remover = begin(remove_and_die, cache)
    remover.join()
    assert remover.exitcode == -signal.SIGKILL
    (half,) = cache.glob(".removed-*")
    assert len(list(half.iterdir())) == len(OURS) - 2
    assert not old.exists()
    rows = render(0)
    assert rows[0] == expected
    limit_cache(cache, 1)
    assert not half.exists()
    assert old.exists()


def make_slowly(folder: Path) -> None:
    def make(empty: Path) -> None:
        (empty / "input_ids.bin").write_text("half")
        time.sleep(60)

    make_once(folder, make)


def test_what_a_killed_process_had_begun_is_removed_and_what_is_being_made_is_not(cache):
    maker = begin(make_slowly, cache / ("a" * 32))
    unfinished = cache / f".tmp-{'a' * 32}"
    wait_for((unfinished / "input_ids.bin").exists)
    limit_cache(cache, 1)
    assert (unfinished / "input_ids.bin").exists()
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    limit_cache(cache, 1)
    assert not unfinished.exists()


def test_while_one_process_removes_another_leaves_it_to_that_one(fill, cache):
    (old,) = fill(1)
    with FileLock(cache / ".limit.lock"):
        limit_cache(cache, 1e-9)
        assert old.exists()
    limit_cache(cache, 1e-9)
    assert not old.exists()


def test_a_failure_to_remove_is_said_and_ends_nothing(fill, cache, monkeypatch, log):
    fill(1)

    def fail(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "unlink", fail)
    limit_cache(cache, 1e-9)
    assert [f"cache_dir {cache}: rendered data could not be removed (not yours)" in line for line in log] == [True]


def test_a_run_keeps_its_own_data_and_removes_that_of_earlier_runs(job, tmp_path, capsys):
    cache, settings = tmp_path / "cache", {"max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    job("first", **settings)
    (first,) = cache.glob("*[0-9a-f]")
    evaluated = {"eval_file": str(tmp_path / "first.jsonl")}
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "first.jsonl")
    for name, limit in (("second", 1.0), ("third", 1e-9)):
        job(name, rows=ROWS[:4], **settings, **evaluated, cache_size_limit=limit)
        told = capsys.readouterr().err
        assert told.count(f"cache_dir {cache}: removed 1 of 3 sets of rendered data") == (name == "third")
        assert len(list(cache.glob("*[0-9a-f]"))) == 3 - (name == "third")
    assert not first.exists()
