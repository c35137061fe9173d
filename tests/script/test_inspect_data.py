import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from component.chatglm import ChatGLMTokenizer
from component.data.dataset import ChatGLM3SFTDataset
from component.data.inspection import Inspection, visible

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>"
CALL = {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": {"t": 24}}
ROWS = [
    {"conversations": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "no\nharm"}]},
    {"conversations": [{"role": "usr", "content": HOSTILE}]},
    {"tools": [{"name": "weather"}], "conversations": [{"role": "user", "content": "天气"}, CALL]},
    {"conversations": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "no\nharm"}]},
    {"conversations": [{"role": "user", "content": "w"}, {"role": "assistant", "content": "long " * 1000}]},
    {"conversations": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "unseen"}]},
]


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def inspection(data, tiny_tokenizer) -> Inspection:
    rules = {"on_bad_row": "skip", "max_bad_share": 1.0}
    return Inspection(ChatGLM3SFTDataset(data, tiny_tokenizer, 500, **rules), tiny_tokenizer)


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_figures(inspection):
    summary = dict(inspection.summary())
    assert {key: summary[key] for key in ("rows", "cut", "too long, dropped", "bad rows", "duplicates")} == {
        "rows": "6",
        "cut": "1",
        "too long, dropped": "1",
        "bad rows": "1",
        "duplicates": "1",
    }
    assert summary["tokens"] == str(sum(inspection.lengths))
    edges, counts = inspection.histogram()
    assert sum(counts) == 4
    assert len(edges) == len(counts) + 1
    assert edges[-1] > inspection.report.longest
    table = inspection.table()
    assert re.search(r"rows\.jsonl:2: conversations\[0\]\.role is 'usr'", table)
    assert re.search(r"1 row, the first at .*rows\.jsonl:3: ends on a call", table)
    assert re.search(r"calls by function\nweather +1\n", table)


def test_a_row_in_the_terminal_shows_every_token(inspection, tiny_tokenizer):
    text = inspection.tokens(0, colours=False)
    head, body = text.split("\n", 1)
    item = inspection.dataset[0]
    counts = f"{len(item['input_ids'])} tokens, {sum(item['target_mask'])} learned"
    assert head == f"{inspection.dataset.place(0)}, {counts}"
    assert body.startswith("[gMASK]│sop│<|user|>│")
    assert body.endswith("</s>⟧")
    assert body.count("│") == len(item["input_ids"]) - 1
    assert "\033[32m" in inspection.tokens(0, colours=True)


def test_the_page_holds_rows_tokens_and_faults_and_no_markup_of_the_data(inspection):
    html = inspection.html("rows.jsonl", "nano", "chatglm3", limit=3)
    assert HOSTILE not in html
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg|http-equiv", "", html)
    page = page_data(html)
    assert (page["shown"], page["total"], page["bad"]) == (3, 4, 1)
    assert [row["place"].rsplit(":", 1)[1] for row in page["rows"]] == ["1", "3", "4"]
    for row, item in zip(page["rows"], inspection.dataset, strict=False):
        assert row["ids"] == item["input_ids"]
        flags = [i % 2 for i, length in enumerate(row["mask"]) for _ in range(length)]
        assert flags == item["target_mask"]
        assert {str(token) for token in row["ids"]} <= page["pieces"].keys()
    called = {"role": "tool", "content": "", "learned": True, **{key: CALL[key] for key in CALL if key != "role"}}
    assert page["rows"][1]["turns"][1] == called
    assert page["rows"][1]["tools"] == ["weather"]
    assert page["rows"][2]["notes"][0].startswith("duplicate of ")
    assert page["calls"] == [["weather", 1]]
    (fault,) = page["faults"]
    assert fault["place"].endswith("rows.jsonl:2")
    assert json.loads(fault["text"]) == ROWS[1]
    names = {page["pieces"][str(token)] for token in page["control"]}
    assert {"[gMASK]", "sop", "<|user|>", "<|assistant|>", "</s>"} <= names


def test_pieces_are_the_text_that_they_stand_for(real_tokenizer, data, inspection: Inspection):
    shown = Inspection(inspection.dataset, real_tokenizer)
    text = "Hello world, 你好"
    assert "".join(map(shown.piece, real_tokenizer.encode(text, add_special_tokens=False))).strip() == text
    assert shown.piece(real_tokenizer.eos_token_id) == "</s>"
    rare = map(shown.piece, real_tokenizer.encode("\n𓀀", add_special_tokens=False))
    assert list(rare)[-5:] == ["\n", "<0xF0>", "<0x93>", "<0x80>", "<0x80>"]


def test_turns_that_were_left_out_are_not_shown(tmp_path, tiny_tokenizer):
    rounds = [{"human": f"question {i}", "assistant": f"answer {i}"} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversation": rounds}))
    rules = {"on_too_long": "truncate_left_turns"}
    for length, shown in ((100, 6), (20, 2), (1000, 18)):
        dataset = ChatGLM3SFTDataset(file, tiny_tokenizer, length, **rules)
        turns = Inspection(dataset, tiny_tokenizer).describe_rows(1)[0]["turns"]
        assert [turn["content"] for turn in turns][-2:] == ["question 8", "answer 8"]
        assert len(turns) == shown


def test_the_most_called_functions_are_counted_and_the_rest_together(inspection):
    inspection.report.calls = {f"f{i}": i for i in range(1, 31)}
    calls = inspection.calls()
    assert calls[0] == ("f30", 30)
    assert calls[-1] == ("10 other functions", 55)
    assert len(calls) == 21


def test_no_text_of_a_row_moves_the_cursor():
    assert visible("a\x1b[2J\r\u202e\x9b \t\n你") == "aU+001B[2JU+000DU+202EU+009B·→↵\n你"


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "script/inspect_data.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_table_and_page(data, tmp_path, tiny_tokenizer: ChatGLMTokenizer):
    model = tmp_path / "chatglm3-nano"
    tiny_tokenizer.save_pretrained(model)
    done = run("--data", data, "--model", model, "--html", tmp_path / "page.html", "max_seq_length=500")
    assert done.returncode == 0, done.stderr
    assert f"{data} for {model}, data format chatglm3" in done.stdout
    assert page_data((tmp_path / "page.html").read_text())["max_seq_length"] == 500


@pytest.mark.slow
def test_the_command_shows_one_row_and_takes_names_that_are_no_utf_8(data, tmp_path, tiny_tokenizer: ChatGLMTokenizer):
    model = tmp_path / "chatglm3-nano"
    tiny_tokenizer.save_pretrained(model)
    one = run("--data", data, "--model", model, "--row", 1, "max_seq_length=500")
    assert "weather" in one.stdout.replace("│", "")
    named = data.rename(tmp_path / os.fsdecode("数据.jsonl".encode("gbk")))
    odd = run("--data", named, "--model", model, "--html", tmp_path / "odd.html", "max_seq_length=500")
    assert odd.returncode == 0, odd.stderr
    assert page_data((tmp_path / "odd.html").read_text())["title"] == str(named)


@pytest.mark.slow
def test_the_command_takes_settings_and_refuses_what_it_cannot_show(data, tmp_path, tiny_tokenizer: ChatGLMTokenizer):
    model = tmp_path / "chatglm3-nano"
    tiny_tokenizer.save_pretrained(model)
    settings = {"model_name_or_path": str(model), "train_file": {str(data): 1}, "output_dir": str(tmp_path / "out")}
    settings["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "args.json").write_text(json.dumps(settings))
    for changes in ((), ("max_seq_length=500", "cache_size_limit=1e-9")):
        assert "rows" in run("--train_args_file", tmp_path / "args.json", *changes).stdout
        assert len(list((tmp_path / "cache").glob("*[0-9a-f]"))) == 1, "what was rendered before was removed"
    for words, fault in (
        (["--data", data, "--model", model, "--row", 99], "--row 99: there are samples 0 to"),
        (["--data", tmp_path / "gone.jsonl", "--model", model], "gone.jsonl"),
        (["--data", data], "give --train_args_file, or --data and --model"),
    ):
        failed = run(*words)
        assert failed.returncode == 2
        assert fault in failed.stderr
        assert "Traceback" not in failed.stderr
