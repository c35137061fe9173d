import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from component.conversation import DataError, parse_chatglm3, parse_firefly
from script.convert_data_format import convert_file, convert_row

SCRIPT = Path(__file__).parents[2] / "script/convert_data_format.py"
ROW = {"id": 7, "conversation": [{"human": "你好", "assistant": "好"}, {"human": "a", "assistant": "b"}], "tag": ["x"]}


def test_pairs_become_turns_and_other_fields_stay():
    assert convert_row(ROW) == {
        "id": 7,
        "tag": ["x"],
        "conversations": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "好"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
    }
    assert parse_chatglm3(convert_row(ROW)) == parse_firefly(ROW)


def test_a_large_file_streams(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for _ in range(50_000):
            file.write(json.dumps(ROW) + "\n")
    tracemalloc.start()
    assert convert_file(source, target) == 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert sum(1 for _ in target.open()) == 50_000


def test_a_bad_row_is_named_and_leaves_the_earlier_output(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROW) + '\n{"conversation": [{"human": 1}]}\n')
    target.write_text("earlier")
    with pytest.raises(DataError, match=r"in\.jsonl:2: conversation\[0\]\.human must be text"):
        convert_file(source, target)
    assert target.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_the_command_reports_and_exits_with_2_on_a_fault(tmp_path):
    def run(source):
        command = [sys.executable, str(SCRIPT), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
        return subprocess.run(command, capture_output=True, text=True)

    (tmp_path / "in.jsonl").write_text(json.dumps(ROW) + "\n")
    assert run(tmp_path / "in.jsonl").stdout == f"{tmp_path / 'out.jsonl'}: 1 rows\n"
    missing = run(tmp_path / "nowhere.jsonl")
    assert missing.returncode == 2
    assert "nowhere.jsonl" in missing.stderr
    assert "Traceback" not in missing.stderr
