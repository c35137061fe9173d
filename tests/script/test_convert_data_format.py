import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from component.data.formats import parse_row
from component.data.reader import read_rows
from component.run.errors import DataError
from script.convert_data_format import convert_files, convert_row

SCRIPT = Path(__file__).parents[2] / "script/convert_data_format.py"
ROW = {"id": 7, "conversation": [{"human": "你好", "assistant": "好"}, {"human": "a", "assistant": "b"}], "tag": ["x"]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def test_pairs_become_turns_and_other_fields_stay():
    lost = []
    converted = convert_row(ROW, "chatglm3", None, lost.append)
    assert converted == {
        "id": 7,
        "tag": ["x"],
        "conversations": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "好"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
    }
    assert parse_row(converted) == parse_row(ROW)
    assert lost == []


def test_fields_of_turns_and_fields_that_clash_are_said_to_be_lost():
    lost = []
    row = {"conversation": [{"human": "h", "assistant": "a", "score": 3}], "query": "an id"}
    assert convert_row(row, "alpaca", None, lost.append) == {"instruction": "h", "input": "", "output": "a"}
    assert lost == ["'score' of a turn", "'query' of the row, which means something else in alpaca"]
    row = {"instruction": "q", "output": "a", "conversations": ["x"], "chat": 1, "messages": ["a note"]}
    converted = convert_row(row, "firefly", "alpaca", lost.append)
    assert converted == {"chat": 1, "messages": ["a note"], "conversation": [{"human": "q", "assistant": "a"}]}
    assert parse_row(converted) == parse_row({"instruction": "q", "output": "a"})
    assert lost[2:] == ["'conversations' of the row, which means something else in firefly"]


@pytest.mark.slow
def test_a_large_file_streams(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for i in range(50_000):
            file.write(json.dumps(ROW) + "\n" if i % 10 else "{}\n")
    tracemalloc.start()
    summary = convert_files([source], target, "chatglm3", skip=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (summary.rows, summary.rejected) == (45_000, 5_000)
    assert peak < 3_000_000
    assert sum(1 for _ in target.open()) == 45_000


def test_a_bad_row_is_named_and_leaves_the_earlier_output(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROW) + '\n{"conversation": [{"human": 1}]}\n')
    target.write_text("earlier")
    with pytest.raises(DataError, match=r"in\.jsonl:2: conversation\[0\]\.human must be text"):
        convert_files([source], target, "chatglm3")
    assert target.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_bad_rows_can_be_left_out_with_the_reason(tmp_path):
    call = {"conversations": [{"role": "tool", "name": "f", "parameters": {}, "observation": 1}]}
    source = write(tmp_path / "in.jsonl", [ROW, call, ROW])
    done = run("--input", source, "--output", tmp_path / "out.jsonl", "--to", "firefly", "--on_bad_row", "skip")
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: 2 rows\n"
    assert done.stderr == f"1 bad row left out, see {tmp_path / 'out.jsonl.rejected.jsonl'}\n"
    assert list(read_rows(tmp_path / "out.jsonl.rejected.jsonl")) == [
        (
            1,
            {
                "file": str(source),
                "line": 2,
                "reason": "firefly has no place for tool; convert it to another format, or remove the row",
                "row": call,
            },
        )
    ]


def test_a_file_that_cannot_be_read_on_is_not_skipped(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([ROW])[:-1])
    with pytest.raises(DataError, match=r"in\.json:1: the array is not closed"):
        convert_files([tmp_path / "in.json"], tmp_path / "out.jsonl", "chatglm3", skip=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_the_output_may_be_packed(tmp_path, name):
    source = write(tmp_path / "in.jsonl", [ROW] * 3)
    assert run("--input", source, "--output", tmp_path / name, "--to", "openai").returncode == 0
    rows = [row for _, row in read_rows(tmp_path / name)]
    assert len(rows) == 3
    assert [message["content"] for message in rows[0]["messages"]] == ["你好", "好", "a", "b"]


@pytest.mark.parametrize("name", ["out.json", "out.parquet"])
def test_an_output_whose_name_promises_something_else_is_refused(tmp_path, name):
    source = write(tmp_path / "in.jsonl", [ROW])
    done = run("--input", source, "--output", tmp_path / name)
    assert (done.returncode, (tmp_path / name).exists()) == (2, False)
    assert (
        done.stderr == f"{tmp_path / name}: JSON Lines are written; end the name with .jsonl, .jsonl.gz, .jsonl.zst\n"
    )


def test_a_pipe_is_written_and_a_link_refused_and_neither_replaced(tmp_path):
    source = write(tmp_path / "in.jsonl", [ROW])
    done = run("--input", source, "--output", "/dev/stdout")
    assert json.loads(done.stdout)["id"] == 7
    assert done.stderr == "/dev/stdout: 1 row\n"
    assert Path("/dev/stdout").is_symlink()
    (tmp_path / "real.jsonl").write_text("earlier")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    done = run("--input", source, "--output", tmp_path / "link.jsonl")
    assert done.returncode == 2
    assert f"link.jsonl: a link to {tmp_path / 'real.jsonl'}; give that name" in done.stderr
    assert (tmp_path / "real.jsonl").read_text() == "earlier"
    (tmp_path / "out.jsonl.rejected.jsonl").symlink_to(tmp_path / "real.jsonl")
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert run("--input", source, "--output", tmp_path / "out.jsonl", "--on_bad_row", "skip").returncode == 0
    assert (tmp_path / "real.jsonl").read_text() == "earlier"
    assert not (tmp_path / "nowhere.jsonl").exists()
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == 7
    assert oct(os.stat(tmp_path / "out.jsonl").st_mode)[-3:] == "644"


def test_the_command_reports_what_was_lost_and_exits_with_2_on_a_fault(tmp_path):
    call = {"role": "tool", "name": "f", "parameters": {}, "observation": {"t": 1}}
    source = write(tmp_path / "in.jsonl", [ROW, {"conversations": [{"role": "user", "content": "q"}, call]}])
    done = run("--input", source, "--output", tmp_path / "out.jsonl", "--to", "openai")
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: 2 rows\n"
    assert (
        done.stderr == f"not carried over, 1 row, the first at {source}:2: the type of a result: written as its JSON\n"
    )
    odd = source.rename(tmp_path / os.fsdecode("数据.jsonl".encode("gbk")))
    skipped = run("--input", odd, "--output", tmp_path / "out.jsonl", "--to", "firefly", "--on_bad_row", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert json.loads((tmp_path / "out.jsonl.rejected.jsonl").read_text())["file"] == str(odd)
    missing = run("--input", tmp_path / "nowhere.jsonl", "--output", tmp_path / "out.jsonl")
    assert missing.returncode == 2
    assert "nowhere.jsonl" in missing.stderr
    assert "Traceback" not in missing.stderr
