"""The benchmark of generation on tiny shapes: what it prints is what it measures."""

import json
import sys

import pytest

from benchmark import generate


def run(monkeypatch, capsys, *arguments: str) -> str:
    sizes = ["--shape", "tiny", "--streams", "1,3", "--prompt", "20", "--new", "12"]
    monkeypatch.setattr(sys, "argv", ["benchmark/generate.py", *sizes, *arguments])
    generate.main()
    return capsys.readouterr().out


def test_each_row_has_its_speed(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--only", "engine", "--json", str(tmp_path / "figures.json"))
    rows = [line.split("|")[1:5] for line in printed.splitlines() if line.startswith("| tiny")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [model, weights, "engine", streams]
        for model, weights in (
            ("tiny-chatglm", "16 bits"),
            ("tiny-chatglm", "4 bits, adapter of rank 64"),
            ("tiny-llama", "16 bits"),
        )
        for streams in ("1", "3")
    ]
    first = json.loads((tmp_path / "figures.json").read_text())["results"][1]
    assert (first["streams"], first["new"]) == (3, 12)
    speed = 36 / first["seconds"]
    assert f"| {speed:,.0f} " in printed


def test_writing_is_what_comes_after_the_first_token_of_each():
    row = {"model": "m", "weights": "w", "program": "p", "streams": 4, "new": 11, "first": 2.0, "seconds": 4.0}
    assert generate.describe(row | {"peak_gib": 3.25}) == ["m", "w", "p", "4", "11", "20", "2.00", "3.2"]


def test_a_program_that_answers_with_fewer_tokens_is_a_row_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(generate, "by_engine", lambda *_: lambda prompts, new: [prompt[:new] for prompt in prompts])
    printed = run(monkeypatch, capsys, "--only", "tiny-llama 16 bits engine", "--new", "30")
    assert printed.count("ValueError: 1 answers of 30 tokens are expected, got [20]") == 1


@pytest.mark.slow
def test_all_programs_run(monkeypatch, capsys):
    assert "Error" not in run(monkeypatch, capsys)
