"""Rows that are read and rendered while the run trains: their order, their place, what is counted and what ends."""

import gzip
import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from torch.utils.data import DataLoader

from component.data import reader, stream
from component.data.formats import parse_row
from component.data.load import describe_sources, load_datasets
from component.data.render import TokenizedSample, render_chatglm3
from component.data.rules import CUT, DROPPED, DataRules
from component.data.stream import StreamedRow, StreamingSFTDataset
from component.run.errors import DataError

BAD = {"conversations": [{"role": "usr", "content": "x"}]}


def row(number: int, length: int = 1) -> dict:
    """A row whose sample is its number and `length` learned tokens."""
    answer = {"role": "assistant", "content": "b" * length}
    return {"conversations": [{"role": "user", "content": str(number)}, answer]}


def rows_of(count: int, first: int = 0) -> list[dict]:
    return [row(first + i) for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))  # all on one line
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(lines))
    return path


@pytest.fixture
def make(tmp_path):
    """Makes streams of sources in blocks of 10 rows; `rendered` has the numbers of rows as they were rendered, also by
    a loader's workers."""

    def render(conversation, tokenizer) -> TokenizedSample:
        question, answer, *_ = conversation.turns
        with notes.open("a") as out:
            out.write(f"{question.content}\n")
        length = len(answer.content)
        return TokenizedSample([int(question.content), *[1] * length], [0, *[1] * length])

    def make(*sources, weights=None, seed=0, check=True, **rules) -> StreamingSFTDataset:
        rules = DataRules(**{"max_seq_length": 1000, "on_too_long": "drop"} | rules)
        tokenizer, weights = SimpleNamespace(eos_token_id=2), weights or [1.0] * len(sources)
        return StreamingSFTDataset(list(sources), weights, render, tokenizer, rules, seed, check=check)

    notes = tmp_path / "rendered"
    notes.touch()
    make.rendered = lambda: [int(line) for line in notes.read_text().split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHUFFLE_BUFFER", 10)
        yield make


def first(count: int, dataset: StreamingSFTDataset, ranks: int = 1, workers: int = 0) -> list[StreamedRow]:
    """The first rows of a stream from where it stands, as a run of several processes has them together."""
    dataset.ranks, shares = ranks, []
    for dataset.rank in range(ranks):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        shares.append(list(islice(loader, -(-(count - dataset.rank) // ranks))))
    return [shares[number % ranks][number // ranks] for number in range(count)]


def numbers(rows: list[StreamedRow]) -> list[int]:
    assert all(row.sample["input_ids"].dtype == np.int32 for row in rows)
    return [int(row.sample["input_ids"][0]) for row in rows]


def plain(rows: list[StreamedRow]) -> list[dict]:
    """All that rows hold, for ==."""
    return [vars(row) | {"sample": row.sample and plain_sample(**row.sample)} for row in rows]


def plain_sample(input_ids: np.ndarray, target_mask: np.ndarray, place: str) -> tuple:
    return input_ids.tolist(), target_mask.tolist(), (input_ids.dtype, target_mask.dtype), place


def go_on(dataset: StreamingSFTDataset, state: dict) -> StreamingSFTDataset:
    dataset.load_state_dict(json.loads(json.dumps(state)))
    return dataset


# Order


def test_a_pass_is_all_rows_shuffled_in_blocks_and_the_next_has_another_order(tmp_path, make):
    file = write(tmp_path / "a.jsonl", rows_of(25))
    found = numbers(first(50, make(file)))
    assert [sorted(found[start:end]) for start, end in ((0, 10), (10, 20), (20, 25))] == [
        [*range(10)],
        [*range(10, 20)],
        [*range(20, 25)],
    ]
    assert found[:10] != sorted(found[:10])
    assert sorted(found[25:]) == [*range(25)]
    assert found[25:] != found[:25]
    assert numbers(first(50, make(file))) == found
    assert numbers(first(50, make(file, seed=1))) != found


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2)])
def test_the_order_is_the_same_on_any_number_of_ranks_and_workers(tmp_path, make, ranks, workers):
    sources = [write(tmp_path / "a.jsonl", rows_of(33)), write(tmp_path / "b.jsonl", [*rows_of(20, 100), BAD])]
    one = make(*sources, weights=[2.0, 1.0], on_bad_row="skip")
    several = make(*sources, weights=[2.0, 1.0], on_bad_row="skip")
    assert plain(first(120, several, ranks, workers)) == plain(first(120, one))


def test_a_row_is_rendered_by_one_process_alone(tmp_path, make):
    dataset = make(write(tmp_path / "a.jsonl", rows_of(100)), check=False)
    used = numbers(first(60, dataset, ranks=2, workers=2))
    rendered = Counter(make.rendered())
    assert set(rendered.values()) == {1}
    assert set(used) <= set(rendered)


def test_sources_are_drawn_from_by_weight_until_one_of_them_ends(tmp_path, make):
    sources = [write(tmp_path / "a.jsonl", rows_of(300)), write(tmp_path / "b.jsonl", rows_of(300, 1000))]
    found = [row for row in first(500, make(*sources, weights=[3.0, 1.0], check=False)) if not row.block.pass_number]
    drawn = numbers(found)
    assert sorted(number for number in drawn if number < 1000) == [*range(300)]
    of_second = sorted(number for number in drawn if number >= 1000)
    assert of_second == [*range(1000, 1000 + len(of_second))]
    assert 0.2 < len(of_second) / len(drawn) < 0.3


def test_long_rows_make_short_blocks(tmp_path, make, monkeypatch):
    file = write(tmp_path / "a.jsonl", rows_of(12))
    monkeypatch.setattr(stream, "BLOCK_BYTES", 3 * len(json.dumps(row(0))))
    dataset = make(file)
    found = first(14, dataset)
    assert [(row.block.pass_number, row.block.number, row.position) for row in found] == [
        *((0, number, position) for number in range(4) for position in range(3)),
        *((1, 0, position) for position in range(2)),
    ]
    dataset.take(found[:7])
    assert plain(first(7, go_on(make(file, check=False), dataset.state_dict()))) == plain(found[7:])


# Going on


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_stream_goes_on_from_every_place(tmp_path, make, ending):
    """Across blocks, files and passes, with sources of several files."""
    files = [write(tmp_path / f"{i}.{ending}", rows_of(17, 20 * i)) for i in range(3)]
    files[2] = write(tmp_path / "last.jsonl", [*rows_of(10, 40), row(50, 2000), *rows_of(6, 51)])

    def make_stream(**settings) -> StreamingSFTDataset:
        return make(files[:2], files[2], weights=[2.0, 1.0], check=False, **settings)

    whole = make_stream()
    rows = first(130, whole)
    assert len({row.block.pass_number for row in rows}) > 2
    assert DROPPED in {row.note for row in rows}
    for taken in range(115):
        parts = go_on(make_stream(), whole.state_dict())
        assert plain(list(islice(parts, 15))) == plain(rows[taken : taken + 15]), taken
        parts.take(rows[taken : taken + 1])
        whole.take(rows[taken : taken + 1])
        assert parts.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (3, 0)])
def test_a_stream_goes_on_with_another_number_of_processes(tmp_path, make, ranks, workers):
    file = write(tmp_path / "a.jsonl", rows_of(33))
    dataset = make(file)
    rows = first(90, dataset)
    dataset.take(rows[:47])
    assert plain(first(43, go_on(make(file, check=False), dataset.state_dict()), ranks, workers)) == plain(rows[47:])


def test_going_on_reads_from_the_block_on_and_renders_what_was_not_taken(tmp_path, make, monkeypatch):
    lines = []

    def split_lines(*args):
        for found in split(*args):
            lines.append(found[0])
            yield found

    file, split = write(tmp_path / "a.jsonl", rows_of(300)), reader.split_lines
    dataset = make(file, check=False)
    rows = first(260, dataset)
    dataset.take(rows[:255])
    before = len(make.rendered())
    monkeypatch.setattr(reader, "split_lines", split_lines)
    again = list(islice(go_on(make(file, check=False), dataset.state_dict()), 5))
    assert lines == [*range(251, 261)]
    assert make.rendered()[before:] == numbers(again) == numbers(rows[255:])
    assert sorted({row.place for row in again}) == sorted(f"{file}:{number + 1}" for number in numbers(rows[255:]))


def test_what_was_taken_and_not_what_was_read_ahead_moves_the_place(tmp_path, make):
    dataset = make(write(tmp_path / "a.jsonl", rows_of(30)))
    rows = first(25, dataset)
    assert (dataset.report.rows, dataset.position) == (0, 0)
    dataset.take(rows[:3])
    assert dataset.state_dict() == dataset.state_dict() | {
        "pass": 0,
        "block": 0,
        "starts": [[0, 0, 0, 0]],
        "position": 3,
    }
    dataset.take(rows[3:14])
    start = [0, 10, 10, len("".join(json.dumps(row(i)) + "\n" for i in range(10)))]
    assert dataset.state_dict() == dataset.state_dict() | {"pass": 0, "block": 1, "starts": [start], "position": 4}
    assert dataset.report.rows == dataset.report.kept == 14


def test_rows_that_are_taken_out_of_order_or_of_other_sources_are_refused(tmp_path, make):
    files = [write(tmp_path / f"{name}.jsonl", rows_of(30)) for name in "ab"]
    dataset = make(files[0])
    with pytest.raises(ValueError, match="row 1 of the stream is taken where row 0 should be"):
        dataset.take(first(2, dataset)[1:])
    with pytest.raises(DataError, match="begun with 1 sources and has 2 now; give those that it was begun with"):
        make(*files).load_state_dict(dataset.state_dict())


# The first rows


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_rendered_for_the_check_is_used(tmp_path, make, monkeypatch, workers):
    monkeypatch.setattr(stream, "CHECKED_FIRST", 12)
    sources = [write(tmp_path / "a.json", rows_of(20)), write(tmp_path / "b.jsonl", rows_of(200, 100))]
    dataset = make(*sources, weights=[1.0, 2.0])
    assert make.rendered() == [*range(12), *range(100, 112)]
    rows = first(40, dataset, workers=workers)
    assert rows[-1].block.pass_number == 0
    assert len(set(make.rendered())) == len(make.rendered())
    assert plain(rows) == plain(first(40, make(*sources, weights=[1.0, 2.0], check=False)))
    dataset.take(rows)
    assert not {row.key for row in rows} & set(dataset.checked)  # which are not kept longer than they are needed


def test_a_stream_that_goes_on_is_loaded_without_a_check_and_a_copy_for_another_rank_is_small(tmp_path, make):
    file = write(tmp_path / "a.jsonl", rows_of(300))
    rules = {name: field.default for name, field in DataRules.__dataclass_fields__.items()} | {"max_seq_length": 9}
    others = {"eval_file": None, "preprocessing_workers": 1, "cache_dir": None, "cache_size_limit": None}
    args = SimpleNamespace(**rules, **others, train_file=str(file), streaming=True)
    kind, tokenizer = SimpleNamespace(render=make(file).renderer.render), SimpleNamespace(eos_token_id=2)
    load_datasets(args, kind, tokenizer, 0, None, goes_on=True)
    assert len(make.rendered()) == 300  # by the fixture alone
    dataset, _ = load_datasets(args, kind, tokenizer, 0, None)
    assert len(make.rendered()) == len(dataset.checked) + 300 == 600
    assert describe_sources(dataset) == [{"files": ["a.jsonl"]}]
    dataset.renderer = None
    assert len(pickle.dumps(dataset)) < 2000


def test_a_stream_stops_early_for_the_first_rows(tmp_path, make):
    def stream_of(rows, **rules):
        return make(write(tmp_path / "rows.jsonl", rows), **rules)

    with pytest.raises(DataError, match=r"1 bad row of 3; mend them\n.*rows\.jsonl:3: conversations\[0\]\.role is 'u"):
        stream_of([*rows_of(2), BAD])
    with pytest.raises(DataError, match=r"rows\.jsonl:1000: conversations\[0\]\.role is 'usr'"):
        stream_of([*rows_of(999), BAD, *rows_of(5)])
    with pytest.raises(DataError, match=r"rows\.jsonl:20: conversations\[0\]\.role is 'usr'"):
        stream_of([row(0, 2000)] * 19 + [BAD])
    with pytest.raises(DataError, match="0 bad and 2 too long of 10 rows: more than max_bad_share="):
        stream_of([*rows_of(8), row(8, 2000), row(9, 2000)])
    with pytest.raises(DataError, match="nothing to learn: the file has no rows"):
        stream_of([])
    stream_of([*rows_of(1000), BAD])


def test_a_stream_shows_its_first_sample(tmp_path, tiny_tokenizer):
    good = {"conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]}
    file = write(tmp_path / "a.jsonl", [*[good] * 9, BAD])
    rules = DataRules(1000, on_bad_row="skip")
    dataset = StreamingSFTDataset([file], [1.0], render_chatglm3, tiny_tokenizer, rules, seed=0)
    expected = render_chatglm3(parse_row(good), tiny_tokenizer)
    length = len(expected.input_ids)
    assert dataset.first_sample() == {
        "input_ids": expected.input_ids,
        "attention_mask": [1] * length,
        "target_mask": expected.target_mask,
    }
    assert dataset.report.rows == 0


# What is counted, told and refused


def take_on(dataset: StreamingSFTDataset, count: int, at_once: int = 16) -> None:
    """Take rows as a run does."""
    rows = iter(dataset)
    while count > 0:
        dataset.take(list(islice(rows, min(count, at_once))))
        count -= at_once


def test_too_many_rows_that_are_too_long_stop_a_stream(tmp_path, make, monkeypatch):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 1000)
    file = write(tmp_path / "a.jsonl", [*rows_of(1000), *[row(i, 10) for i in range(3000)]])
    dataset = make(file, max_seq_length=5)
    fault = r"a\.jsonl:1\d\d\d: 0 bad and 112 too long of 1,112 rows: more than max_bad_share=0\.1; "
    with pytest.raises(DataError, match=fault + "raise max_seq_length=5, or raise max_bad_share"):
        take_on(dataset, 4000)


def test_too_many_bad_rows_stop_a_stream_and_are_shown(tmp_path, make):
    dataset = make(write(tmp_path / "a.jsonl", [*rows_of(1500), *[BAD] * 100]), max_bad_share=0.01)
    fault = r"a\.jsonl:15\d\d: 16 bad and 0 too long of 1,516 rows: more than max_bad_share=0\.01; mend them, or "
    with pytest.raises(DataError, match=rf"{fault}raise max_bad_share\n.*'usr'.* \(and 15 more rows like it\)"):
        take_on(dataset, 1600)


def test_what_was_found_in_the_first_rows_of_a_run_that_went_on_still_counts(tmp_path, make):
    file = write(tmp_path / "a.jsonl", [*rows_of(1000), *[row(i, 10) for i in range(3000)]])
    dataset = make(file, max_seq_length=5)
    take_on(dataset, 1111)
    again = go_on(make(file, max_seq_length=5, check=False), dataset.state_dict())
    with pytest.raises(DataError, match="112 too long of 1,112 rows"):
        take_on(again, 1)


def test_a_state_is_not_changed_by_the_run_that_goes_on_from_it(tmp_path, make):
    file = write(tmp_path / "a.jsonl", [*rows_of(20), row(20, 10)])
    dataset = make(file, max_seq_length=5)
    take_on(dataset, 21)
    state = dataset.state_dict()
    before = json.dumps(state)
    dataset.load_state_dict(state)
    take_on(dataset, 42)
    assert dataset.report.count_notes(DROPPED) == 3
    assert json.dumps(state) == before


def test_a_stream_within_its_bounds_goes_on_and_says_how_many_after_the_first_pass(tmp_path, make, log):
    rows = [*rows_of(1000), *[row(i, 10) for i in range(300)], *[BAD] * 5]
    dataset = make(write(tmp_path / "a.jsonl", rows), max_seq_length=5, max_bad_share=0.25)
    del log[:]
    take_on(dataset, 1305)
    early = [line.partition("a.jsonl:")[2] for line in log]
    assert len(early) == 2
    assert early[0].partition(": ")[2] == "too long, dropped (max_seq_length=5); rows like it are only counted\n"
    assert early[1].partition(": ")[2].startswith("left out, as all like it: conversations[0].role is 'usr'")
    take_on(dataset, 2)
    text = "".join(log[2:])
    assert "a.jsonl: 1,000 rows, 2,000 tokens, 50% learned; mean length 2, longest 2" in text
    assert "a.jsonl: 300 rows, the first at" in text
    assert "a.jsonl: 5 bad rows left out" in text
    del log[:]
    take_on(dataset, 1305 * 2)
    assert log == []
    assert dataset.report.count_notes(DROPPED) > 600


def test_cut_and_odd_rows_are_told_once_and_what_the_check_told_is_not_told_again(tmp_path, make, log):
    odd = {"conversations": [*row(7)["conversations"], {"role": "user", "content": "c"}]}
    rows = [row(0, 10), *rows_of(999), odd, row(1, 10), odd]
    dataset = make(write(tmp_path / "a.jsonl", rows), max_seq_length=5, on_too_long="truncate")
    assert ": cut (max_seq_length=5)" in log[-1]
    del log[:]
    rows = first(1003, dataset)
    dataset.take(rows)
    (line,) = log
    assert "ends on a user turn; rows like it are only counted" in line
    assert dataset.report.odd["ends on a user turn"][0] == 2
    assert [row.note for row in rows].count(CUT) == 2
    assert dataset.report.count_notes(CUT) == 2


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_file_that_is_cut_short_ends_a_stream_on_every_rank_where_its_row_would_be(tmp_path, make, ranks, workers):
    whole, cut = write(tmp_path / "a.jsonl", rows_of(1000)), write(tmp_path / "b.json", rows_of(1005, 1000))
    cut.write_text(cut.read_text()[:-1] + ", ")
    dataset = make([whole, cut], max_bad_share=1.0)
    rows = first(2200, dataset, ranks, workers)
    fatal = next(row for row in rows if row.fatal)
    assert fatal.number in range(2000, 2010)
    dataset.take(rows[: fatal.number])
    state = dataset.state_dict()
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.json:1: the array is not closed; the file may be cut short"):
            dataset.take(rows[fatal.number :])
        assert dataset.state_dict() == state


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_a_file_that_is_cut_short_within_the_first_rows_stops_a_run_before_it_starts(tmp_path, make, rule):
    packed = write(tmp_path / "a.jsonl.gz", rows_of(300))
    packed.write_bytes(packed.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be read from here on"):
        make(packed, on_bad_row=rule, max_bad_share=1.0)


def test_a_pass_without_a_sample_ends_a_stream(tmp_path, make):
    fault = "whole pass had no sample; of 25 rows 0 are bad and 25 too long; mend the data, or raise max_seq_length=5"
    dataset = make(write(tmp_path / "a.jsonl", [row(i, 10) for i in range(25)]), max_seq_length=5, check=False)
    take_on(dataset, 25)
    with pytest.raises(DataError, match=fault):
        take_on(dataset, 1)


def test_a_later_pass_without_a_sample_ends_a_stream_too(tmp_path, make):
    dataset = make(write(tmp_path / "a.jsonl", rows_of(25)), max_seq_length=5)
    rows = iter(dataset)
    dataset.take(list(islice(rows, 25)))
    write(tmp_path / "a.jsonl", [row(i, 10) for i in range(25)])
    dataset.take(list(islice(rows, 25)))
    with pytest.raises(DataError, match="whole pass had no sample; of 50 rows 0 are bad and 25 too long"):
        dataset.take([next(rows)])


def test_a_stream_without_a_row_ends(tmp_path, make):
    dataset = make(write(tmp_path / "a.jsonl", []), check=False)
    with pytest.raises(DataError, match=r"a\.jsonl:1: nothing to learn: the file has no rows"):
        take_on(dataset, 1)
