"""score_at_end: a run scores its final adapter, which is safe whatever becomes of the score."""

import json
import os
import signal
from dataclasses import replace

import pytest

from component.run.errors import StorageError
from component.run.manifest import verify
from component.score.at_end import check_eval_rows, is_scored, read_train_rows
from component.score.measure import Task
from component.score.questions import called_functions, read_scored_rows
from component.settings.schema import QLoRAArguments

from .runs import ROWS, write_rows


@pytest.fixture
def settings(tmp_path):
    return {
        "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS[:3])),
        "score_at_end": True,
        "eval_strategy": "no",
    }


def test_a_run_prints_its_score_and_scores_again_only_where_the_score_is_missing(job, settings, capsys):
    output = job(**settings)
    shown = capsys.readouterr().out
    assert "3 rows, 3 questions, of which 0 want a call and 3 a text" in shown
    facts = json.loads((output / "score.json").read_text())
    assert facts["models"] == ["base", "tuned"]
    about = facts["about"]
    assert about["adapter"]["path"] == str(output / "final")
    assert (about["base_bits"], about["dtype"], about["data_format"]) == (4, "float32", "chatglm3")
    (loss,) = [figure for figure in facts["figures"] if figure["name"] == "loss per token"]
    assert loss["values"]["tuned"]["value"] < loss["values"]["base"]["value"]
    assert (output / "score.html").read_text().startswith("<!DOCTYPE html>")
    card = (output / "final/README.md").read_text()
    assert "| `train.jsonl` | 12 | 12 | " in card
    assert f"| `loss per token` | {loss['n']} | {loss['values']['base']['value']:.3f} [" in card
    assert str(output.parent) not in card
    assert verify(output / "final", "final")

    job(**settings)
    assert "3 questions" not in capsys.readouterr().out, "it has been scored"
    (output / "score.json").unlink()
    job(**settings)
    assert "3 questions" in capsys.readouterr().out
    again = json.loads((output / "score.json").read_text())
    assert [f["values"]["tuned"]["value"] for f in again["figures"]] == pytest.approx(
        [f["values"]["tuned"]["value"] for f in facts["figures"]], rel=1e-4
    ), "the model in memory and the published one are the same"


def test_functions_that_training_has_seen_stand_apart(tmp_path):
    called = {"role": "tool", "name": "weather", "parameters": {}}
    question = {"role": "user", "content": "?"}
    rows = [{"tools": [{"name": "weather"}], "conversations": [question, called]}]
    args = QLoRAArguments(model_name_or_path="x", train_file={str(write_rows(tmp_path / "rows.jsonl", rows)): 1.0})
    (row,) = read_scored_rows(tmp_path / "rows.jsonl")
    task = Task([row], [*row.questions("chatglm3")], [], [], {}, 1)
    assert called_functions(read_train_rows(args, task)) == {"weather"}
    assert read_train_rows(args, replace(task, questions=[])) is None


def test_a_score_that_fails_leaves_the_final_adapter(stopped, settings, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("component.score.at_end.write_files", fail)
        assert stopped("run", **settings) == 4
    final = tmp_path / "run/final"
    assert (final / "adapter_model.safetensors").is_file()
    assert f"the final adapter is whole: {final}" in capfd.readouterr().err


@pytest.mark.parametrize(("questions", "is_told"), [(2, True), (3, False)])
def test_so_many_questions_that_they_take_long_are_told_before_training(settings, log, monkeypatch, questions, is_told):
    monkeypatch.setattr("component.score.at_end.MANY", questions)
    args = QLoRAArguments(model_name_or_path="x", train_file="y", eval_file=settings["eval_file"])
    check_eval_rows(args, "chatglm3")
    assert ("asks 3 questions of both models, which may take long; a smaller eval_file" in "".join(log)) == is_told


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_score_at_once_and_the_same_command_scores(
    job, stopped, settings, tmp_path, monkeypatch, capfd, signum
):
    with monkeypatch.context() as patch:
        patch.setattr("component.score.at_end.score_models", lambda *_, **__: os.kill(os.getpid(), signum))
        assert stopped("run", **settings) == 128 + signum
    told = capfd.readouterr().err
    assert f"stopped while scoring; the final adapter is whole: {tmp_path / 'run/final'}" in told
    assert "checkpoint as soon as possible" not in told
    assert (job(**settings) / "score.json").is_file()


def test_an_older_score_is_not_that_of_a_newer_adapter(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/manifest.json").touch()
    assert not is_scored(tmp_path)
    (tmp_path / "score.json").touch()
    assert is_scored(tmp_path)
    os.utime(tmp_path / "score.json", (1, 1))
    assert not is_scored(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"eval_file": None}, "score_at_end needs eval_file, whose answers are asked for"),
        ({"tools": "a hammer"}, "eval.jsonl:1: tools: is no list of functions with names"),
    ],
)
def test_what_cannot_be_scored_is_told_before_training(stopped, settings, tmp_path, capfd, changes, fault):
    if "tools" in changes:
        write_rows(tmp_path / "eval.jsonl", [ROWS[0] | changes])
    else:
        settings |= changes
    assert stopped("run", **settings) == 2
    assert fault in capfd.readouterr().err
    assert not list(tmp_path.glob("run/*"))
