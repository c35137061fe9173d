"""The data classes, from files to items. Cases 20 and 24 to 29 of the reliability scorecard end here."""

import copy
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from component.data import dataset, store
from component.data import prepare as preparing
from component.data.dataset import (
    DATA_FORMATS,
    ChatGLM2SFTDataset,
    ChatGLM3SFTDataset,
    SFTDataset,
    check_choice,
    select_dataset,
    select_format,
)
from component.data.load import Mixture, describe_sources, load_datasets
from component.data.prepare import RowRenderer
from component.data.render import TokenizedSample
from component.data.rules import DROPPED, DataReport, DataRules, count_kind, log_report
from component.data.store import TokenStore
from component.run.errors import DataError
from component.train.batch import SFTDataCollator
from tests.conftest import read_jsonl

ROOT = Path(__file__).parents[3]


def row(question: str, answer: str = "b", **turn) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | turn]}


ROWS = [row("a" * n) for n in (1, 40, 5)]
BAD = {"conversations": [{"role": "usr", "content": "x"}]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """A ChatGLM3 data set of rows, in a cache of the test's own."""

    def make(rows=ROWS, max_seq_length=1000, **rules):
        file = write(tmp_path / "rows.jsonl", rows)
        rules = {"max_bad_share": 1.0, "cache_dir": tmp_path / "cache"} | rules
        return ChatGLM3SFTDataset(file, tiny_tokenizer, max_seq_length, **rules)

    return make


# Reading and rendering


@pytest.mark.parametrize(
    ("name", "dataset_class"), [("chatglm3", ChatGLM3SFTDataset), ("chatglm2", ChatGLM2SFTDataset)]
)
def test_every_golden_row_comes_through_a_data_set(reference, real_tokenizer, tmp_path, name, dataset_class):
    golden = read_jsonl(reference / f"golden/{name}_sft.jsonl")
    dataset = dataset_class(write(tmp_path / "g.jsonl", [row["sample"] for row in golden]), real_tokenizer, 100_000)
    assert len(dataset) == len(golden)
    for item, row_ in zip(dataset, golden, strict=True):
        assert item["input_ids"] == row_["input_ids"]
        labels = [i if m else -100 for i, m in zip(item["input_ids"], item["target_mask"], strict=True)]
        assert labels == row_["labels"]


def test_every_row_of_the_shared_real_data_loads(shared, real_tokenizer):
    counts = [
        len(dataset_class(shared / f"data/{name}.jsonl", real_tokenizer, 100_000))
        for name, dataset_class in (
            ("firefly_dummy_data", SFTDataset),
            ("firefly_dummy_data", ChatGLM2SFTDataset),
            ("firefly_dummy_data_chatglm3", ChatGLM3SFTDataset),
            ("toolalpaca_chatglm3", ChatGLM3SFTDataset),
            ("firefly_dummy_data", ChatGLM3SFTDataset),
        )
    ]
    assert counts == [33, 33, 34, 180, 33]


def test_an_item_is_three_fresh_lists_of_one_length(make):
    dataset = make()
    item = dataset[0]
    before = copy.deepcopy(item)
    assert set(item) == {"input_ids", "attention_mask", "target_mask"}
    assert all(type(value) is int for values in item.values() for value in values)
    assert len(item["input_ids"]) == len(item["target_mask"]) == sum(item["attention_mask"])
    item["input_ids"].append(1)
    item["target_mask"][0] = 1
    assert dataset[0] == before
    assert dataset.lengths.tolist() == [len(item["input_ids"]) for item in dataset]
    assert [dataset.place(i).rsplit(":", 1)[1] for i in range(3)] == ["1", "2", "3"]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_same_in_every_epoch(make, tiny_tokenizer, workers):
    """Case 29: three epochs, in the training process and in workers."""
    dataset = make()
    collate = SFTDataCollator(tiny_tokenizer, 1000)
    epochs = []
    for _ in range(3):
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate)
        epochs.append([{key: value.tolist() for key, value in batch.items()} for batch in loader])
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2


def test_bom_crlf_blank_lines_and_separators_change_no_token(tmp_path, tiny_tokenizer):
    """Case 20."""
    rows = [row(f"a{i}\u2028b\x85c") for i in range(3)]
    clean = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "odd.jsonl").write_bytes(("\ufeff" + "\r\n\r\n \n".join(clean)).encode())
    expected = ChatGLM3SFTDataset(write(tmp_path / "clean.jsonl", rows), tiny_tokenizer, 1000)
    assert [*ChatGLM3SFTDataset(tmp_path / "odd.jsonl", tiny_tokenizer, 1000)] == [*expected]


def test_a_sample_of_any_file_has_its_place(tmp_path, tiny_tokenizer):
    files = [write(tmp_path / name, ROWS[:2]) for name in ("a.jsonl", "b.jsonl")]
    dataset = ChatGLM3SFTDataset(files, tiny_tokenizer, 1000)
    assert [dataset.place(i) for i in range(4)] == [f"{file}:{line}" for file in files for line in (1, 2)]


def test_several_processes_make_what_one_makes(tmp_path, tiny_tokenizer, monkeypatch):
    rows = [row("你好 " * (i % 40), f"answer {i}") for i in range(2000)]
    rows[77] = rows[1500] = BAD
    file = write(tmp_path / "rows.jsonl", rows)
    stores = []
    for workers, threshold in ((1, 1 << 40), (3, 0)):
        monkeypatch.setattr(preparing, "PARALLEL_FROM", threshold)
        rules = {
            "on_bad_row": "skip",
            "on_too_long": "drop",
            "workers": workers,
            "max_bad_share": 1.0,
            "cache_dir": tmp_path / f"{workers}",
        }
        stores.append(ChatGLM3SFTDataset(file, tiny_tokenizer, 120, **rules).store)
    one, three = stores
    assert len(one) > 1000
    assert one.report == three.report
    assert one.report.bad == 2
    assert one.ends[-1] == len(one.input_ids)
    assert np.all(np.diff(one.ends) > 0)
    for name in store.FILES:
        assert np.array_equal(getattr(one, name), getattr(three, name)), name


# Faults


def test_faults_of_one_kind_are_one_line_with_the_place_of_the_first(make):
    rows = [ROWS[0], *[BAD] * 29, {"conversations": []}, {"conversations": [{"role": "bot", "content": ""}]}, ROWS[1]]
    with pytest.raises(DataError) as error:
        make(rows, on_bad_row="stop", max_bad_share=0.5)
    head, *faults = str(error.value).split("\n")
    assert head.endswith("rows.jsonl: 31 bad rows of 33; mend them"), "to skip as many would stop the run as well"
    first, second = faults
    assert first.endswith(
        "rows.jsonl:2: conversations[0].role is 'usr'; expected system, user, assistant, tool or observation "
        "(and 29 more rows like it)"
    )
    assert "rows.jsonl:31: nothing to learn" in second
    with pytest.raises(DataError, match=r"more than max_bad_share=0\.5; mend them, or raise max_bad_share\n"):
        make(rows, on_bad_row="skip", max_bad_share=0.5)
    with pytest.raises(DataError, match="1 bad row of 31; mend them, or set on_bad_row to skip"):
        make([BAD, *ROWS * 10], on_bad_row="stop")


def test_after_20_kinds_of_faults_the_rest_is_counted_together():
    faults: dict[str, list] = {}
    for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        count_kind(faults, f"f:{i}", f"{letter}[{i}] is '{i}', got {i}")
        count_kind(faults, f"f:{i}", f"{letter}[{i + 1}] is 'x y', got null (NoneType)")
    lines = DataReport(faults=faults).fault_lines()
    assert len(lines) == 21
    assert lines[0] == "f:0: a[0] is '0', got 0 (and 1 more row like it)"
    assert lines[-1] == "… and 12 rows of other kinds"


FAULTY = [
    {"conversations": [{"role": "usr", "content": "x"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"content": "x"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"role": None, "content": "x"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"role": 1, "content": "x"}, {"role": "assistant", "content": "a"}]},
    {"conversations": ["hello"]},
    {"conversations": {"role": "user"}},
    {"conversations": None},
    {"conversation_list": []},
    {"conversations": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "loss": "no"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "parameters": {}}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "parameters": "a=1"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "parameters": {"a-b": 1}}]},
    {"conversations": [{"role": "user", "content": "x"}]},
    {"conversations": []},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "loss": False}]},
]
UNUSUAL = [
    {
        "conversations": [
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "x"},
            *ROWS[0]["conversations"],
        ]
    },
    {"conversations": [*ROWS[0]["conversations"], {"role": "user", "content": "x"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "parameters": {"from": 1}}]},
    row("a", ""),
    {
        "tools": [{"name": "g"}],
        "conversations": [{"role": "tool", "name": "f", "parameters": {}}, *ROWS[0]["conversations"]],
    },
    {"conversations": [{"role": "user", "content": "x"}, *ROWS[0]["conversations"]]},
]


def test_twenty_faulty_rows_are_rejected_and_six_unusual_ones_are_not(make, log):
    """Case 25."""
    dataset = make(FAULTY + UNUSUAL, on_bad_row="skip")
    report = dataset.store.report
    assert (report.bad, report.kept) == (20, 6)
    assert sum(count for count, _, _ in report.faults.values()) == 20
    assert [int(line.split("rows.jsonl:", 1)[1].split(":")[0]) for line in report.fault_lines()][:3] == [1, 2, 3]
    assert {kind: count for kind, (count, *_) in report.odd.items()} == {
        "the assistant speaks first": 2,
        "ends on a user turn": 1,
        "ends on a call": 1,
        "has an empty answer": 1,
        "calls a function that tools does not name": 1,
        "has a call without a result, and goes on": 1,
        "has two user turns in a row": 2,
    }
    rejected = read_jsonl(dataset.store.folder / "rejected.jsonl")
    assert [json.loads(entry["row"]) for entry in rejected] == FAULTY
    assert all(entry["reason"] and entry["line"] == i for i, entry in enumerate(rejected, 1))
    with pytest.raises(DataError, match="26 bad rows of 26"):
        make(FAULTY + UNUSUAL, strict_roles=True)


def test_a_share_of_bad_rows_above_the_limit_stops(make):
    rows = [BAD, *ROWS * 3]
    assert len(make(rows, on_bad_row="skip", max_bad_share=0.1)) == 9
    with pytest.raises(DataError, match=r"1 bad and 0 too long of 10 rows: more than max_bad_share=0\.09"):
        make(rows, on_bad_row="skip", max_bad_share=0.09)
    with pytest.raises(DataError, match=r"0 bad and 1 too long of 3 rows: more than max_bad_share=0\.1"):
        make(max_seq_length=30, on_too_long="drop", max_bad_share=0.1)


def test_strict_roles_refuses_what_is_else_a_warning(make):
    assert make([UNUSUAL[1]]).store.report.odd["ends on a user turn"][0] == 1
    with pytest.raises(DataError, match="ends on a user turn; mend the row, or set strict_roles to false"):
        make([UNUSUAL[1]], strict_roles=True)


def test_calls_that_do_not_fit_and_keys_that_are_not_read_are_one_line_a_kind(make, log):
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "integer"}, "y": {}}, "required": ["x", "y"]}}]
    call = {"role": "tool", "name": "f", "parameters": {}, "observation": 1}
    wrong = {"tools": tools, "foo": 1, "conversations": [{"role": "user", "content": "x"}, call]}
    dataset = make([ROWS[0], wrong, wrong | {"bar": 1}])
    log_report(dataset.store.report, dataset.files, dataset.rules)
    said = [line.split("rows.jsonl: ", 1)[1] for line in log if "the first at" in line]
    place = f"{dataset.files[0]}:2"
    assert said == [
        f"2 rows, the first at {place}: ends on a call\n",
        f"2 rows, the first at {place}: a call lacks the required argument 'x' of 'f'\n",
        f"2 rows, the first at {place}: `foo` of a row is not read\n",
        f"1 row, the first at {dataset.files[0]}:3: `bar` of a row is not read\n",
    ]
    assert dataset.store.report.calls == {"f": 2}
    ended = wrong["conversations"] + ROWS[0]["conversations"][-1:]
    with pytest.raises(DataError, match="a call lacks the required argument 'x' of 'f'; mend the row"):
        make([wrong | {"conversations": ended}], strict_roles=True)
    assert len(make([ROWS[0] | {"foo": 1}], strict_roles=True)) == 1, "an unread key is no fault of the roles"


@pytest.mark.parametrize(
    ("rows", "length", "reason"),
    [([], 9, "the file has no rows"), (ROWS, 3, "survives max_seq_length=3"), ([BAD], 9, "every row is bad")],
)
def test_nothing_left_to_learn_is_an_error(make, rows, length, reason):
    """Cases 24 and 26."""
    with pytest.raises(DataError, match=reason):
        make(rows, length, on_bad_row="skip")


def test_calls_that_a_format_cannot_say_are_faults(tmp_path, tiny_tokenizer):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a-b": 1}}}]}
    file = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}, call]}])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: a call of f: the parameter 'a-b' cannot be a keyword argument"
    ):
        ChatGLM3SFTDataset(file, tiny_tokenizer, 100)
    dataset = ChatGLM3SFTDataset(
        write(file, [*ROWS, {"messages": [call]}]), tiny_tokenizer, 100, on_bad_row="skip", max_bad_share=1.0
    )
    assert (dataset.store.report.turns, dataset.store.report.odd) == (6, {})
    write(file, [{"messages": [{"role": "user", "content": "x"}, call]}])
    with pytest.raises(DataError, match=r"firefly has no place for tool; set data_format to chat_template, or"):
        SFTDataset(file, tiny_tokenizer, 100)


def test_a_tokenizer_that_cannot_render_a_chat_template_is_refused_at_once(tmp_path, tiny_tokenizer):
    for tokenizer, fault in (
        (tiny_tokenizer, "ChatGLM's tokenizer writes its prompts itself; leave out data_format and chat_template"),
        (
            SimpleNamespace(eos_token_id=0, is_fast=True, chat_template=None),
            "the tokenizer has none; set chat_template to chatml or to a file",
        ),
        (SimpleNamespace(eos_token_id=0, is_fast=False), "needs a fast tokenizer, and the model has a slow one"),
    ):
        with pytest.raises(DataError, match=fault):
            DATA_FORMATS["chat_template"](write(tmp_path / "rows.jsonl", ROWS), tokenizer, 100)


def test_a_file_that_cannot_be_read_on_stops_even_a_run_that_skips_bad_rows(tmp_path, tiny_tokenizer):
    packed = gzip.compress("".join(json.dumps(row(f"q{i}")) + "\n" for i in range(1500)).encode())
    cut, array = tmp_path / "cut.jsonl.gz", tmp_path / "array.json"
    cut.write_bytes(packed[:-8])
    array.write_text(json.dumps(ROWS)[:-1])
    rules = {"on_bad_row": "skip", "max_bad_share": 1.0}
    for file, fault in (
        (cut, r"cut\.jsonl\.gz:1\d*: cannot be read from"),
        (array, r"array\.json:1: .* not closed"),
    ):
        with pytest.raises(DataError, match=fault):
            ChatGLM3SFTDataset([file, write(tmp_path / "rows.jsonl", ROWS)], tiny_tokenizer, 1000, **rules)


def test_a_file_whose_name_is_not_utf8_is_read_and_its_rejected_rows_are_named(tmp_path, tiny_tokenizer):
    file = write(tmp_path / os.fsdecode("数据.jsonl".encode("gbk")), [*ROWS, BAD])
    dataset = ChatGLM3SFTDataset(file, tiny_tokenizer, 1000, on_bad_row="skip", max_bad_share=1.0, cache_dir=tmp_path)
    assert dataset.place(0) == f"{file}:1"
    assert dataset.store.report.fault_lines()[0].startswith(f"{file}:4: ")
    assert [entry["file"] for entry in read_jsonl(dataset.store.folder / "rejected.jsonl")] == [str(file)]


# Long rows


def long_row(rounds: int) -> dict:
    turns = [{"role": "system", "content": "be kind"}]
    for i in range(rounds):
        turns += row(f"question {i}", f"answer {i}")["conversations"]
    return {"tools": [{"name": "f"}], "conversations": turns}


def text_of(dataset, tokenizer, index=0) -> str:
    return tokenizer.decode(dataset[index]["input_ids"])


def test_a_cut_row_teaches_no_end(make, tiny_tokenizer):
    whole = make()
    short = make(max_seq_length=len(whole[2]["input_ids"]) - 1)
    assert len(short) == 2
    assert short[0] == whole[0]
    assert short[1]["input_ids"] == whole[2]["input_ids"][:-1]
    assert tiny_tokenizer.eos_token_id not in short[1]["input_ids"]
    assert {kind: count for kind, (count, *_) in short.store.report.notes.items()} == {
        "cut": 1,
        "too long, dropped": 1,
    }
    assert short.store.report.notes["too long, dropped"][1].endswith("rows.jsonl:2")


@pytest.mark.parametrize("rounds", [2, 6])
def test_early_rounds_are_left_out_before_an_answer_is_cut(make, tiny_tokenizer, rounds):
    full = [len(make([long_row(n)])[0]["input_ids"]) for n in range(1, rounds + 1)]
    for kept in range(1, rounds):
        dataset = make([long_row(rounds)], full[kept - 1], on_too_long="truncate_left_turns")
        text = text_of(dataset, tiny_tokenizer)
        assert "be kind" in text
        assert '"name": "f"' in text
        for i in range(rounds):
            assert (f"question {i}" in text, f"answer {i}" in text) == ((i >= rounds - kept),) * 2
        assert dataset[0]["input_ids"][-1] == tiny_tokenizer.eos_token_id
        assert dataset[0]["target_mask"][-1] == 1
        assert list(dataset.store.report.notes) == ["early turns dropped"]
    cut = make([long_row(rounds)], full[0] - 3, on_too_long="truncate_left_turns")
    assert len(cut[0]["input_ids"]) == full[0] - 3
    assert list(cut.store.report.notes) == ["cut"]
    assert len(make([long_row(rounds), *ROWS], full[0], on_too_long="drop")) == 3


def test_no_item_is_without_a_learned_token(make):
    """Case 26. What is learned of the first token alone counts as nothing, since nothing predicts it."""
    for length in range(12, 60, 4):
        dataset = make([*ROWS, long_row(2)], length, on_too_long="truncate_left_turns")
        assert all(any(item["target_mask"][1:]) for item in dataset), length
    renderer = RowRenderer(lambda conversation, tokenizer: TokenizedSample([5, 6], [1, 0]), None, DataRules(10))
    assert renderer.fit_to_length(None) == (None, DROPPED)


def test_early_rounds_are_left_out_of_chatglm2_and_counted_anew(tmp_path, tiny_tokenizer):
    pairs = [{"human": f"q{i}", "assistant": f"a{i}"} for i in range(5)]
    file = write(tmp_path / "rows.jsonl", [{"conversation": pairs}])
    text = text_of(ChatGLM2SFTDataset(file, tiny_tokenizer, 60, on_too_long="truncate_left_turns"), tiny_tokenizer)
    assert "[Round 1]" in text
    assert "q4" in text
    assert "q0" not in text


# The cache


def test_a_second_start_reads_what_the_first_wrote(make, monkeypatch):
    first = make()
    monkeypatch.setattr(preparing, "render_chunk", lambda task: pytest.fail("rendered again"))
    again = make()
    assert again.store.folder == first.store.folder
    assert [*again] == [*first]
    assert again.store.report == first.store.report
    assert make(max_bad_share=0.5).store.folder == first.store.folder


def test_a_changed_file_setting_format_tokenizer_or_library_is_noticed(make, tmp_path, tiny_tokenizer, monkeypatch):
    folders = {make().store.folder, make(ROWS[:2]).store.folder, make(max_seq_length=999).store.folder}
    folders |= {make(loss_on="last").store.folder, make(on_too_long="drop").store.folder}
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages }}"
    rules = {"max_bad_share": 1.0, "cache_dir": tmp_path / "cache"}
    file = write(tmp_path / "rows.jsonl", ROWS)
    folders.add(ChatGLM3SFTDataset(file, other, 1000, **rules).store.folder)
    other.chat_template = "{{ tools }}"
    folders.add(ChatGLM3SFTDataset(file, other, 1000, **rules).store.folder)
    pairs = write(tmp_path / "pairs.jsonl", [{"conversation": [{"human": "h", "assistant": "a"}]}])
    folders.add(ChatGLM2SFTDataset(pairs, tiny_tokenizer, 1000, **rules).store.folder)
    folders.add(ChatGLM3SFTDataset(pairs, tiny_tokenizer, 1000, **rules).store.folder)
    monkeypatch.setattr("component.data.dataset.version", lambda name: "0")
    folders.add(make().store.folder)
    monkeypatch.setattr(dataset, "PROGRAM", dataset.PROGRAM[:-1])
    folders.add(make().store.folder)
    assert len(folders) == 11


def test_bad_rows_that_were_skipped_once_stop_a_stricter_run(make):
    rows = [BAD, *ROWS]
    assert len(make(rows, on_bad_row="skip")) == 3
    with pytest.raises(DataError, match=r"1 bad row of 4.*\n.*role is 'usr'"):
        make(rows, on_bad_row="stop")


def test_a_cache_that_cannot_be_written_or_was_damaged_is_said(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir a folder with room in which files can be written"):
        make(cache_dir=tmp_path / "file")
    folder = make().store.folder
    for name in (*(f"{name}.bin" for name in store.FILES), "report.json"):
        whole = (folder / name).read_bytes()
        for damaged in (whole[:-1], b"", None, b"[]"):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            with pytest.raises(DataError, match=f"{folder}: damaged; delete it, and it will be made anew"):
                make()
            (folder / name).write_bytes(whole)
    (folder / "ends.bin").write_bytes(bytes((folder / "ends.bin").stat().st_size))
    with pytest.raises(DataError, match="its files do not fit one another"):
        make()


def kill_self(task) -> None:
    os.kill(os.getpid(), 9)


def test_a_killed_worker_is_said(make, monkeypatch):
    monkeypatch.setattr(preparing, "PARALLEL_FROM", 0)
    monkeypatch.setattr(preparing, "render_chunk", kill_self)
    with pytest.raises(DataError, match="was killed, perhaps for want of memory; lower preprocessing_workers"):
        make(workers=2)


def test_workers_of_a_killed_process_end(tmp_path):
    code = """if True:
        import os, sys, time
        from component.data.pool import in_order
        def work(task):
            os.write(1, b"%d\\n" % os.getpid())  # at once, so that two workers' lines do not mix
            time.sleep(1)
        list(in_order(work, [(None, i) for i in range(100)], 2))
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = {int(process.stdout.readline()) for _ in range(2)}
    process.kill()
    try:
        process.communicate(timeout=20)  # ends when no process holds the pipe's other end any more
    except subprocess.TimeoutExpired:
        for worker in workers:
            os.kill(worker, 9)
        pytest.fail("the workers live on")


def test_a_store_on_another_machine_asks_for_a_shared_folder(tmp_path):
    with pytest.raises(DataError, match="set cache_dir to a folder that all machines share"):
        TokenStore(tmp_path / "nowhere")


def test_another_machine_without_the_store_makes_the_same_from_the_same_files(make, tmp_path):
    made = make()
    elsewhere = pickle.loads(pickle.dumps(made))
    assert "store" not in elsewhere.__dict__
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    shutil.rmtree(made.folder)
    elsewhere.require_store()
    assert {path.name: path.read_bytes() for path in elsewhere.folder.iterdir()} == before
    assert list(elsewhere) == list(made)


def test_another_machine_with_other_files_or_none_makes_no_store(make, tmp_path, monkeypatch):
    monkeypatch.setattr("component.run.files.SIGHT", 0)
    made = make()
    shutil.rmtree(made.folder)
    write(made.files[0], ROWS[:2])
    with pytest.raises(DataError, match="or the program is not what rank 0 made it with; set cache_dir to a folder"):
        pickle.loads(pickle.dumps(made)).require_store()
    made.files[0].unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl, to make it from, cannot be read; set cache_dir to a folder"):
        pickle.loads(pickle.dumps(made)).require_store()


def test_data_that_changes_while_it_is_read_is_not_kept(tmp_path, tiny_tokenizer, monkeypatch):
    file = write(tmp_path / "rows.jsonl", ROWS)
    original = dataset.fill_store

    def fill_store(*args):
        original(*args)
        write(file, ROWS[:1])

    monkeypatch.setattr(dataset, "fill_store", fill_store)
    with pytest.raises(DataError, match=r"rows\.jsonl: the data changed while it was read"):
        ChatGLM3SFTDataset(file, tiny_tokenizer, 100, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_tokenizer_that_was_saved_cutting_prepares_data_as_any_other(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "[UNK]": 2}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    file = write(tmp_path / "rows.jsonl", ROWS[:1])
    assert len(SFTDataset(file, tokenizer, 100, cache_dir=tmp_path / "cache")) == 1


# Several files


def settings(train_file, tmp_path, **changes) -> SimpleNamespace:
    rules = {name: field.default for name, field in DataRules.__dataclass_fields__.items()}
    own = {"max_seq_length": 1000, "max_bad_share": 1.0, "cache_dir": str(tmp_path / "cache"), "cache_size_limit": None}
    others = {"train_file": train_file, "eval_file": None, "streaming": False, "preprocessing_workers": 1}
    return SimpleNamespace(**rules | own | others | changes)


def test_files_are_mixed_by_weight(tmp_path, tiny_tokenizer):
    parts = []
    for name, size in (("a", 10), ("b", 40)):
        file = write(tmp_path / f"{name}.jsonl", [row(name, str(i)) for i in range(size)])
        parts.append(ChatGLM3SFTDataset(file, tiny_tokenizer, 1000, cache_dir=tmp_path / "cache"))
    mixed = Mixture(parts, [3, 1], seed=0)
    assert len(mixed) == 50
    indices = mixed.indices.tolist()
    assert sum(index < 10 for index in indices) == 38  # 37.5, of 10 rows: each three times or four
    assert {indices.count(i) for i in range(10)} == {3, 4}
    assert all(indices.count(i) <= 1 for i in range(10, 50))
    assert mixed[0] == parts[0][0]
    assert mixed.lengths.tolist() == [len(item["input_ids"]) for item in mixed]
    assert indices == Mixture(parts, [3, 1], seed=0).indices.tolist()
    assert indices != Mixture(parts, [3, 1], seed=1).indices.tolist()


def test_loading_mixes_logs_and_writes_what_was_rejected(tmp_path, tiny_tokenizer, log):
    first, second = write(tmp_path / "a.jsonl", [*ROWS, BAD]), write(tmp_path / "b.jsonl", [*ROWS, UNUSUAL[1], {}])
    many = write(tmp_path / "many.jsonl", [*ROWS, *[BAD] * 30])
    args = settings({str(first): 1, str(second): 1}, tmp_path, on_bad_row="skip", eval_file=str(first))
    trained, evaluated = load_datasets(args, ChatGLM3SFTDataset, tiny_tokenizer, 0, str(tmp_path / "out"))
    assert len(trained) == 7  # 3.5 of each, rounded
    assert len(evaluated) == 3
    (a, b), (c,) = map(describe_sources, (trained, evaluated))
    assert (a["files"], a["rows"], a["kept"]) == (["a.jsonl"], 4, 3)
    assert (b["files"], b["rows"], b["kept"]) == (["b.jsonl"], 5, 4)
    assert c == a and 0 < a["learned"] < a["tokens"] < b["tokens"]
    assert describe_sources(None) == []
    rejected = read_jsonl(tmp_path / "out/rejected.jsonl")
    assert [(Path(entry["file"]).name, entry["line"]) for entry in rejected] == [
        ("a.jsonl", 4),
        ("b.jsonl", 5),
    ]
    text = "".join(log)
    assert "b.jsonl: 1 row, the first at" in text
    assert "ends on a user turn" in text
    assert "1 bad row left out" in text
    load_datasets(settings(str(many), tmp_path, on_bad_row="skip"), ChatGLM3SFTDataset, tiny_tokenizer, 0, None)
    assert log[-1].endswith("assistant, tool or observation (and 29 more rows like it)\n")
    args = settings(str(many), tmp_path, on_bad_row="skip", max_bad_share=0.1)
    with pytest.raises(DataError, match=r"more than max_bad_share=0\.1"):
        load_datasets(args, ChatGLM3SFTDataset, tiny_tokenizer, 0, str(tmp_path / "out"))
    assert len(read_jsonl(tmp_path / "out/rejected.jsonl")) == 30


# Which class


@pytest.mark.parametrize(
    ("name", "data_format", "expected"),
    [
        ("THUDM/chatglm3-6b", None, ChatGLM3SFTDataset),
        ("/models/ChatGLM3-6B-32k/", None, ChatGLM3SFTDataset),
        ("/chatglm2/tuned/my-chatglm3", None, ChatGLM3SFTDataset),
        ("THUDM/chatglm2-6b", None, ChatGLM2SFTDataset),
        ("Qwen/Qwen2.5-7B", None, SFTDataset),
        ("Qwen/Qwen2.5-7B", "chatglm3", ChatGLM3SFTDataset),
        ("THUDM/chatglm3-6b", "firefly", SFTDataset),
    ],
)
def test_the_name_or_the_setting_picks_the_class(name, data_format, expected):
    assert select_dataset(name, data_format) is expected


def test_a_chatglm_under_another_name_stops_and_asks_for_the_format(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    with pytest.raises(DataError, match="set data_format to chatglm2 or chatglm3"):
        select_dataset(str(tmp_path))
    assert select_dataset(str(tmp_path), "chatglm2") is ChatGLM2SFTDataset
    with pytest.raises(
        DataError, match="data_format is 'glm'; expected one of chatglm2, chatglm3, firefly, chat_template"
    ):
        select_dataset("x", "glm")


def test_a_batch_is_padded_on_the_right_and_cut(tiny_tokenizer):
    samples = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "target_mask": [0, 1, 1]},
        {"input_ids": [8], "attention_mask": [1], "target_mask": [0]},
    ]
    batch = SFTDataCollator(tiny_tokenizer, 10)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target_mask"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert SFTDataCollator(tiny_tokenizer, 2)(samples)["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert samples[1]["input_ids"] == [8]


def write_config(folder: Path, model_type: str, **others) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **others}))
    return str(folder)


@pytest.mark.parametrize(
    ("folder", "model_type", "expected"),
    [
        ("chatglm3_project/Qwen2.5-7B", "qwen2", "firefly"),
        ("llama/ChatGLM3-6b/", "chatglm", "chatglm3"),
        ("chatglm3/chatglm2-6b", "chatglm", "chatglm2"),
        ("chatglm2-to-chatglm3", "chatglm", "chatglm3"),
        ("models--THUDM--chatglm3-6b/snapshots/0123abcd", "chatglm", "chatglm3"),
    ],
)
def test_the_last_part_of_a_models_path_picks_the_format(tmp_path, folder, model_type, expected):
    assert select_format(write_config(tmp_path / folder, model_type))[0] == expected


def test_a_model_started_from_its_own_folder_is_known_by_that_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_config(tmp_path / "chatglm3-6b", "chatglm"))
    assert select_format(".")[0] == "chatglm3"


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"chatglm_version": 2}, "chatglm2"), ({"_name_or_path": "THUDM/chatglm3-6b"}, "chatglm3")],
)
def test_a_folder_of_another_name_is_known_by_the_version_in_its_config(tmp_path, config, expected):
    """As merge_lora.py writes it, and the publisher."""
    folder = write_config(tmp_path / "merged", "chatglm", **config)
    assert select_format(folder) == (expected, f"{folder}/config.json is of ChatGLM{expected[-1]}")


@pytest.mark.parametrize(
    ("folder", "model_type", "remedy"),
    [
        ("my-chatglm3-like-qwen", "qwen2", "contains 'chatglm3': rename the folder, or set data_format to firefly or"),
        (
            "chatglm3/merged",
            "chatglm",
            "contains neither 'chatglm2' nor 'chatglm3': rename the folder, or set",
        ),
    ],
)
def test_a_folder_whose_name_and_config_disagree_is_refused_with_both(tmp_path, folder, model_type, remedy):
    name = write_config(tmp_path / folder, model_type)
    with pytest.raises(DataError) as refused:
        select_format(name)
    assert f"{name}/config.json: model_type is {model_type!r}, but the folder's name" in str(refused.value)
    assert remedy in str(refused.value)
    assert select_format(name, "firefly") == ("firefly", "data_format says so")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": ["chatglm"]}', "\x00"])
def test_a_config_that_says_nothing_leaves_the_choice_to_the_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert select_format(str(tmp_path))[0] == "firefly"


OPENAI = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
FIREFLY = {"conversation": [{"human": "a", "assistant": "b"}]}


def choose(train_file, tokenizer, data_format: str | None = None, name: str = "firefly") -> None:
    args = SimpleNamespace(model_name_or_path="qwen-instruct", train_file=train_file, data_format=data_format)
    check_choice(args, name, tokenizer)


def test_rows_of_another_kind_on_a_model_with_a_template_need_a_named_format(tmp_path, log):
    templated, plain = SimpleNamespace(chat_template="{{ messages }}"), SimpleNamespace(chat_template=None)
    firefly, openai = write(tmp_path / "f.jsonl", [FIREFLY] * 2), write(tmp_path / "o.jsonl", ["{", OPENAI])
    for source in (str(openai), [str(firefly), str(openai)], {str(firefly): 1, str(openai): 1}, str(tmp_path)):
        with pytest.raises(DataError) as refused:
            choose(source, templated)
        assert f"{openai} holds rows of the kind 'openai'" in str(refused.value)
        assert "\n  data_format=chat_template " in str(refused.value)
        assert "\n  data_format=firefly " in str(refused.value)
    choose(str(openai), templated, data_format="firefly")
    choose(str(openai), templated, name="chatglm3")
    choose(str(openai), plain)
    assert log == []


def test_fireflys_rows_on_a_model_with_a_template_are_trained_with_a_warning(tmp_path, log):
    choose(str(write(tmp_path / "f.jsonl", [FIREFLY])), SimpleNamespace(chat_template="{{ messages }}"))
    (line,) = log
    assert "WARNING" in line
    assert "data_format=chat_template trains them by its template" in line


def test_chatglms_formats_on_another_tokenizer_are_refused(tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=1)
    for dataset_class, name in ((ChatGLM2SFTDataset, "chatglm2"), (ChatGLM3SFTDataset, "chatglm3")):
        with pytest.raises(DataError, match=f"data_format {name} needs ChatGLM's tokenizer"):
            dataset_class(write(tmp_path / "f.jsonl", [FIREFLY]), tokenizer, 64)


@pytest.mark.parametrize("says", [{"chatglm_version": 3}, {"_name_or_path": "THUDM/chatglm3-6b"}])
def test_a_name_of_another_version_than_config_json_says_is_refused(tmp_path, says):
    folder = tmp_path / "chatglm2-6b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"} | says))
    with pytest.raises(DataError, match=r"is of ChatGLM3, but the folder's name 'chatglm2-6b' contains 'chatglm2'"):
        select_format(str(folder))
    assert select_format(str(folder), "chatglm3")[0] == "chatglm3"
