"""The rows and the tables of docs/quality.md."""

import argparse
import gzip
import json

import pytest

from benchmark import quality
from benchmark.quality import Experiment, list_experiments, make_data, print_tables, read_chat


def call(name: str, **arguments) -> dict:
    return {"name": name, "arguments": arguments}


def row(number: int) -> dict:
    question = {"role": "user", "content": f"question {number}"}
    calls = [{"type": "function", "function": {"name": "play", "arguments": json.dumps({"song": number})}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    return {"messages": [question, answer], "tools": [{"type": "function", "function": {"name": "play"}}]}


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "DEV", 4)
    monkeypatch.setattr(quality, "DEV_CHAT", 2)
    monkeypatch.setattr(quality, "TEST_CHAT", 1)
    for name, numbers in (("train", range(24)), ("validate", range(100, 103))):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row(number)) + "\n" for number in numbers)
    talks = "".join(f"- - hello {number}\n  - good day {number}\n  - never used\n" for number in range(6))
    (tmp_path / "talk.yml").write_text(
        f"categories:\n- talk\nconversations:\n{talks}- - a question without an answer\n"
    )
    (tmp_path / "code.yml").write_text("conversations:\n- - q\n  - a\n" + "# long\n" * 1000)
    return argparse.Namespace(calls=tmp_path, chat=tmp_path, output=tmp_path, sizes=[10, 20], seeds=[0, 1])


def questions(file) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]


def test_no_question_is_in_two_parts_and_a_smaller_part_begins_a_larger_one(cli):
    make_data(cli)
    dev, test, small, large = (
        questions(cli.output / f"{name}.jsonl") for name in ("dev", "test", "train-10", "train-20")
    )
    assert [len(part) for part in (dev, test, small, large)] == [4 + 2, 3 + 1, 10 + 1, 20 + 2]
    assert small[:10] == large[:10]
    assert not {*dev} & {*large} and not {*test} & {*large} and not {*dev} & {*test}
    assert {question for question in test if question.startswith("question")} == {
        f"question {n}" for n in (100, 101, 102)
    }
    plain = json.loads((cli.output / "train-20.jsonl").read_text().splitlines()[-1])
    assert plain["tools"] == row(0)["tools"]
    assert plain["messages"][1]["content"].startswith("good day")


def test_talk_is_the_first_answer_of_each_question_in_short_files(cli):
    assert read_chat(cli.chat) == [(f"hello {number}", f"good day {number}") for number in range(6)]


def test_the_main_experiment_has_every_seed_and_its_merges(cli):
    assert list_experiments(cli) == [
        Experiment("peft", 20, 4, 0),
        Experiment("peft", 20, 4, 1),
        Experiment("ours", 20, 4, 0, True),
        Experiment("ours", 20, 4, 1, True),
        Experiment("ours", 20, 16, 0),
        Experiment("ours", 20, 16, 1),
        Experiment("ours", 10, 4, 0),
        Experiment("ours", 10, 4, 1),
    ]


def answer(expected: list[dict], **given: tuple[list[dict], str]) -> dict:
    """A question of a report, with the calls of each model and their class of fault."""
    return {
        "expected": {"calls": expected},
        "given": {model: {"calls": calls, "fault": fault, "unreadable": ""} for model, (calls, fault) in given.items()},
    }


def report(right: bool) -> dict:
    good, other = [call("play", song=1)], [call("stop")]
    models = ("base", "tuned", "merged")
    tuned = (good, "") if right else (other, "other function")
    answers = [
        answer(good, base=([], "missed call"), tuned=tuned, merged=([call("play", song=2)], "wrong value")),
        answer(good, base=([], "missed call"), tuned=(good, ""), merged=(good, "")),
        answer([], base=([], ""), tuned=(other, "needless call"), merged=([], "")),
    ]
    losses = [
        {"name": name, "values": {model: {"value": 1.0 + right / 2} for model in models}} for name in quality.LOSSES
    ]
    return {"models": models, "answers": answers, "figures": losses[:1], "unrelated_text": losses[1:]}


def test_the_tables_are_means_over_seeds(cli, capsys):
    for seed in (0, 1):
        folder = cli.output / Experiment("ours", 20, 4, seed).name
        folder.mkdir()
        for data in ("dev", "test"):
            (folder / f"{data}.json").write_text(json.dumps(report(right=seed == 0)))
    print_tables(cli.output, list_experiments(cli))
    shown = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    cells = {line[0]: line[1:] for line in lines}
    assert "On 2 questions of test that want a call:" in shown
    # One of two questions is right with both seeds, the other with one of them.
    exact, named, needless, *losses = cells["ours, 20 calls, 4 bits, 2 seeds"]
    assert (exact, named, needless) == ("75.0% [50.0, 100.0]", "75.0% [50.0, 100.0]", "100.0%")
    assert losses == ["1.250 (1.000 to 1.500)"] * 3
    assert cells["base, 4 bits"][:3] == [*["0.0% [0.0, 0.0]"] * 2, "0.0%"]
    # The merge gets a value wrong, of the right function.
    merged = cells["merged"]
    assert merged[0].startswith("50.0%")
    assert merged[1].startswith("-25.0%")
    assert merged[2:4] == ["100.0% [100.0, 100.0]", "0.0%"]
