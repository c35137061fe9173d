"""Runs that are stopped: by signals, by figures that are not finite, by a full disk. Real kills are in
benchmark/scorecard.py."""

import errno
import json
import os
import signal
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from component.data.stream import StreamingSFTDataset
from component.inference.engine import Engine
from component.kernel.model import PackedForward
from component.run.folder import RunFolder
from component.run.manifest import verify
from component.run.resume import find_checkpoints
from component.train import report
from component.train.checkpoint import Checkpoints
from component.train.progress import LossWatch
from component.train.trainer import LoRATrainer

from .runs import (
    ROWS,
    adapter,
    assert_same_run,
    at_call,
    figures,
    history,
    largest_difference,
    losses,
    overflow,
    send,
    write_rows,
)

SETTINGS = {"max_steps": 7, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}


def poison(trainer: LoRATrainer) -> None:
    """A NaN in one weight of the adapter."""
    with torch.no_grad():
        next(trainer.trained_weights())[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("n", "owner", "name"),
    [
        (5, PackedForward, "__call__"),
        pytest.param(30, LoRATrainer, "summed_loss", marks=pytest.mark.slow),
        (1, Checkpoints, "write"),
        pytest.param(7, LoRATrainer, "forward_and_backward", marks=pytest.mark.slow),
        (1, LoRATrainer, "save_final"),
        (4, RunFolder, "begin"),
    ],
    ids=["forward", "evaluation", "save", "last update", "export", "writing of the final adapter"],
)
def test_a_run_that_a_signal_stopped_goes_on_as_if_nothing_had_been(job, stopped, tmp_path, n, owner, name):
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_steps": 2}
    settings |= {"per_device_eval_batch_size": 2, "eval_strategy": "steps"}
    whole = job("whole", **settings)
    with at_call(n, owner, name, send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    folder = whole.parent / "stopped"
    assert not (folder / "final").exists()
    verify(find_checkpoints(folder)[-1])
    job("stopped", **settings)
    assert_same_run(whole, folder)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}


@pytest.mark.parametrize("save", [{"eval_steps": 3}, {"eval_steps": 3, "save_strategy": "best"}], ids=["steps", "best"])
@pytest.mark.parametrize("worse", [False, True], ids=["last is best", "first is best"])
def test_the_best_model_is_found_again(job, stopped, tmp_path, save, worse):
    settings = {**SETTINGS, **BEST, "max_steps": 6, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), **save}
    settings |= {"greater_is_better": worse}
    whole = job("whole", **settings)
    with at_call(2, LoRATrainer, "evaluate", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    (tmp_path / "stopped").rename(tmp_path / "moved")
    job("moved", **settings)
    assert largest_difference(whole, tmp_path / "moved") == 0
    assert (whole / "final/README.md").read_bytes() == (tmp_path / "moved/final/README.md").read_bytes()


def scores(*values: float):
    """Evaluations of these losses, one after the other."""
    left = iter(values)

    def evaluate(trainer, *args, **kwargs) -> dict[str, float]:
        metrics = {"eval_loss": next(left)}
        trainer.log(metrics)
        trainer.call_back("on_evaluate", metrics)
        return metrics

    return evaluate


def test_the_best_that_was_saved_is_kept_where_a_better_step_was_not(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LoRATrainer, "evaluate", scores(3, 2, 1, 1.5, 5, 6))
    settings = {**SETTINGS, **BEST, "max_steps": 6, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    run = job(**settings | {"eval_steps": 1, "save_steps": 2, "save_total_limit": 2})
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    assert all(map(torch.equal, adapter(run / "final").values(), adapter(run / "checkpoint-4").values()))
    assert "the final adapter is that of checkpoint-4, the best that was saved: loss 1.5" in capsys.readouterr().err
    card = (run / "final/README.md").read_text()
    assert "| evaluation loss | 1.5000 per learned token |\n| kept | the best checkpoint, of update 4 |" in card
    assert not (run / "checkpoint-4/README.md").exists()


def test_the_best_of_the_checkpoint_that_is_fallen_back_to_is_there(job, stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LoRATrainer, "evaluate", scores(2, 3, 1, 4, 1, 4))
    settings = {**SETTINGS, **BEST, "max_steps": 8, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    settings |= {"eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    with at_call(6, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        assert stopped(**settings) == 143
    kept = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (tmp_path / "run/checkpoint-6/optimizer.pt").unlink()
    job(**settings)
    assert "continuing from" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_best_model_that_is_not_whole_ends_the_run(job, stopped, tmp_path, monkeypatch, capsys, harm):
    monkeypatch.setattr(LoRATrainer, "evaluate", scores(1, 2, 3, 4, 5, 6))
    settings = {**SETTINGS, **BEST, "max_steps": 6, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    settings |= {"eval_steps": 2, "save_steps": 2}
    with at_call(5, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        assert stopped(**settings) == 143
    weights = tmp_path / "run/checkpoint-2/adapter_model.safetensors"
    if harm == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        weights.parent.rename(tmp_path / "run" / "lost")
    assert stopped(**settings) == 4
    assert f"{weights.parent} has the best model, and" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


EARLY = {"early_stopping_patience": 2, "early_stopping_threshold": 10.0, "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    ("n", "owner", "name"),
    [(4, LoRATrainer, "forward_and_backward"), (3, LoRATrainer, "evaluate"), (1, LoRATrainer, "save_final")],
    ids=["before", "in the evaluation that stops it", "after"],
)
def test_a_run_that_gets_no_better_stops_with_its_best_also_if_it_was_interrupted(
    job, stopped, tmp_path, capsys, n, owner, name
):
    settings = {**SETTINGS, **EARLY, "max_steps": 30, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    whole = job("whole", **settings)
    assert [entry["step"] for entry in figures(whole) if "eval_loss" in entry] == [2, 4, 6]
    message = capsys.readouterr().err
    assert "step 6: stopping, as 2 evaluations in a row were not better than step" in message
    assert "the final adapter is that of checkpoint-6, the best that was saved" in message
    with at_call(n, owner, name, send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("n", "owner", "name"),
    [(3, LoRATrainer, "agree"), (1, LoRATrainer, "evaluate"), (1, Checkpoints, "write")],
    ids=["before the end of the epoch", "in its evaluation", "in its save"],
)
@pytest.mark.parametrize("by", ["epoch", "steps"])
def test_the_best_checkpoint_may_be_one_at_which_a_signal_came(job, stopped, tmp_path, n, owner, name, by):
    settings = {**SETTINGS, **BEST, "max_steps": 6, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    settings |= {"eval_strategy": by, "save_strategy": by, "eval_steps": 3, "greater_is_better": True}
    whole = job("whole", **settings)
    with at_call(n, owner, name, send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    job("stopped", **settings)
    assert all(map(torch.equal, adapter(whole / "final").values(), adapter(whole / "checkpoint-3").values()))
    assert_same_run(whole, tmp_path / "stopped")


def test_a_checkpoint_that_only_a_signal_asked_for_is_not_the_best(job, stopped, tmp_path):
    settings = {**SETTINGS, **BEST, "max_steps": 8, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    settings |= {"eval_steps": 1, "save_steps": 4, "greater_is_better": True}  # the first one evaluated
    whole = job("whole", **settings)
    with at_call(2, LoRATrainer, "agree", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    assert [path.name for path in find_checkpoints(tmp_path / "stopped")] == ["checkpoint-2"]
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")


def test_the_picture_of_the_loss_is_drawn_at_every_evaluation_and_checkpoint(job, stopped, tmp_path, monkeypatch):
    drawn = []
    original = report.draw_loss
    monkeypatch.setattr(report, "draw_loss", lambda history: drawn.append(history[-1]["step"]) or original(history))
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "logging_steps": 1}
    folder = job(**settings)
    assert drawn == [2, 3, 4, 6, 7, 7]  # once for the evaluation and the checkpoint of step 6, and at the end
    with at_call(1, LoRATrainer, "agree", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    assert (tmp_path / "stopped" / "loss.png").exists()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_after_the_last_update_of_a_part_of_an_epoch_is_made_up(job, stopped, tmp_path):
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_strategy": "epoch"}
    whole = job("whole", **settings)
    assert [entry["step"] for entry in figures(whole) if "eval_loss" in entry] == [3, 6, 7]
    with at_call(3, LoRATrainer, "evaluate", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")


def test_what_lies_in_a_checkpoint_beside_its_adapter_is_not_loaded(job, stopped, tmp_path):
    whole = job("whole", **SETTINGS)
    with at_call(6, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        assert stopped("stopped", **SETTINGS) == 143
    first, last = find_checkpoints(tmp_path / "stopped")
    copytree(first, last / "default")
    job("stopped", **SETTINGS)
    assert_same_run(whole, tmp_path / "stopped")


def test_settings_changed_on_request_are_those_of_the_next_update(job, stopped, tmp_path, capsys):
    with at_call(3, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        assert stopped(**SETTINGS) == 143
    changes = {"learning_rate": 1e-4, "weight_decay": 0.5, "adam_beta1": 0.5, "max_steps": 14}
    job(**SETTINGS | changes | {"resume_despite_changes": True, "save_steps": 4, "logging_steps": 1})
    assert "learning rate 5.71e-03 until now, 7.86e-05 at the next update" in capsys.readouterr().err
    rates = [entry["learning_rate"] for entry in figures(tmp_path / "run") if "loss" in entry]
    assert rates[-11:] == pytest.approx([1e-4 * (14 - step) / 14 for step in range(3, 14)])
    saved = torch.load(find_checkpoints(tmp_path / "run")[-1] / "optimizer.pt", weights_only=True)
    group = saved["param_groups"][0]
    assert (group["weight_decay"], group["betas"][0], group["initial_lr"]) == (0.5, 0.5, 1e-4)


def test_an_error_in_the_update_of_a_signal_is_told(stopped, monkeypatch):
    def fail(trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise LookupError("of a library")

    with at_call(1, Checkpoints, "write", fail), pytest.raises(LookupError, match="of a library"):
        stopped(**SETTINGS)


def test_a_signal_before_the_first_new_update_leaves_at_once(job, stopped, tmp_path, capsys):
    settings = SETTINGS | {"streaming": True}
    with at_call(4, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        assert stopped(**settings) == 143
    with at_call(1, StreamingSFTDataset, "__iter__", send(signal.SIGINT)):
        assert stopped(**settings) == 130
    assert "SIGINT: stopped before training; the same command starts it" in capsys.readouterr().err
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("is_trained", [False, True], ids=["after training", "in a later start"])
def test_a_signal_while_scoring_leaves_at_once_and_says_that_the_adapter_is_whole(
    job, stopped, tmp_path, capsys, is_trained
):
    settings = {"max_steps": 2, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS[:2])), "eval_strategy": "no"}
    if is_trained:
        job(**settings)
    with at_call(3, Engine, "step", send(signal.SIGINT)):
        assert stopped(**settings, score_at_end=True) == 130
    told = capsys.readouterr().err
    final = tmp_path / "run/final"
    assert f"SIGINT: stopped while scoring; the final adapter is whole: {final}; the same command scores it" in told
    assert "checkpoint as soon as" not in told
    verify(final)
    assert not (tmp_path / "run/score.json").exists()
    job(**settings, score_at_end=True)
    assert (tmp_path / "run/score.json").exists()


def test_a_signal_between_training_and_scoring_is_not_forgotten(stopped, tmp_path, capsys):
    settings = {"max_steps": 2, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS[:2])), "eval_strategy": "no"}
    with at_call(2, Checkpoints, "publish", send(signal.SIGTERM)):
        assert stopped(**settings, save_strategy="steps", save_steps=2, score_at_end=True) == 143
    assert "SIGTERM: stopped while scoring; the final adapter is whole" in capsys.readouterr().err
    assert not (tmp_path / "run/score.json").exists()


def test_a_loss_of_an_evaluation_that_is_not_finite_ends_the_run(stopped, tmp_path, monkeypatch, capsys):
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_steps": 2}
    with at_call(1, LoRATrainer, "evaluate", poison):
        assert stopped(**settings, eval_strategy="steps") == 3
    assert "step 2: the loss over eval_file is not finite" in capsys.readouterr().err


def test_no_checkpoint_of_the_last_step_holds_the_best_weights(job, stopped, tmp_path):
    settings = {**SETTINGS, **BEST, "max_steps": 6, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS))}
    settings |= {"eval_steps": 3, "save_strategy": "best", "greater_is_better": True}
    with at_call(1, LoRATrainer, "save_final", send(signal.SIGTERM)):
        assert stopped(**settings) == 143
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    job(**settings)


def test_a_rate_that_follows_evaluations_does_so_after_a_stop_in_one(job, stopped, tmp_path):
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    settings |= {"lr_scheduler_kwargs": {"patience": 0, "threshold": 0.9}}
    whole = job("whole", **settings)
    with at_call(2, LoRATrainer, "evaluate", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    assert stopped("stopped", **settings | {"eval_steps": 3}) == 2
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_each_signal_has_its_exit_code_and_a_checkpoint_of_the_very_step(stopped, tmp_path, signum, code):
    with at_call(2, LoRATrainer, "forward_and_backward", send(signum)):
        assert stopped(**SETTINGS | {"save_strategy": "no"}) == code
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.slow),
        pytest.param({"packing": False}, marks=pytest.mark.slow),
        {"dataloader_num_workers": 2},
        pytest.param(
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "logging_strategy": "epoch"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"max_steps": -1, "num_train_epochs": 3, "logging_strategy": "epoch"}, marks=pytest.mark.slow),
        pytest.param({"streaming": True}, marks=pytest.mark.slow),
    ],
    ids=[
        "length grouping",
        "padded",
        "workers",
        "accumulation",
        "epochs",
        "epoch logs",
        "stream",
    ],
)
def test_ten_stops_in_one_run_change_nothing(job, stopped, settings):
    settings = SETTINGS | {"max_steps": 10} | settings
    whole = job("whole", **settings)
    steps = json.loads((whole / "trainer_state.json").read_text())["global_step"]
    for step in range(1, steps):
        with at_call(1, LoRATrainer, "agree", send(signal.SIGTERM)):
            assert stopped("stopped", **settings) == 143
        assert find_checkpoints(whole.parent / "stopped")[-1].name == f"checkpoint-{step}"
    job("stopped", **settings)
    assert_same_run(whole, whole.parent / "stopped")


def test_the_mean_loss_of_a_resumed_run_is_that_of_its_own_updates(job, stopped, tmp_path):
    settings = SETTINGS | {"max_steps": 8, "logging_steps": 8}
    means = []
    for name in ("whole", "stopped"):
        if name == "stopped":
            with at_call(6, LoRATrainer, "agree", send(signal.SIGTERM)):
                assert stopped(name, **settings) == 143
        means.append(history(job(name, **settings))[-1]["train_loss"])
    single = history(job("single", **settings | {"logging_steps": 1}))
    each = [entry["loss"] for entry in single if "loss" in entry]
    assert means == pytest.approx([sum(each) / 8, sum(each[6:]) / 2])


def test_a_resumed_run_that_draws_other_data_differs(job, stopped):
    whole = job("whole", **SETTINGS)
    with at_call(2, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)):
        stopped("stopped", **SETTINGS)
    assert stopped("stopped", **SETTINGS, ignore_data_skip=True) == 2
    job("stopped", **SETTINGS, ignore_data_skip=True, resume_despite_changes=True)
    assert largest_difference(whole, whole.parent / "stopped") > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.01 then, 0.001 now"),
        ({"rows": ROWS[:-1]}, "train_file: contents have changed"),
        ({"data_format": "firefly"}, "data_format: "),
    ],
    ids=["seed", "learning rate", "data", "format"],
)
def test_another_run_in_the_folder_is_refused_before_the_model_loads(job, stopped, capsys, monkeypatch, change, named):
    job(**SETTINGS)
    monkeypatch.setattr("component.model.load_model", lambda *args: pytest.fail("the model was loaded"))
    assert stopped(**SETTINGS | change) == 2
    assert named in capsys.readouterr().err


def test_another_base_model_is_another_run(job, stopped, checkpoint, capsys, tmp_path):
    from safetensors.torch import save_file

    job(**SETTINGS)
    other = copytree(checkpoint, tmp_path / "chatglm3-other")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert stopped(**SETTINGS, model_name_or_path=str(other)) == 2
    assert "model_name_or_path, weights or config.json: contents have changed" in capsys.readouterr().err


def test_the_same_command_does_nothing_when_the_run_is_done(job, capsys, monkeypatch):
    folder = job(**SETTINGS)
    before = adapter(folder / "final")
    monkeypatch.setattr("component.model.load_model", lambda *args: pytest.fail("the model was loaded"))
    job(**SETTINGS | {"logging_steps": 1})
    assert "this run is done" in capsys.readouterr().err
    assert all(torch.equal(before[name], weight) for name, weight in adapter(folder / "final").items())


def test_a_run_with_its_final_adapter_gone_only_exports_it(job, monkeypatch):
    folder = job(**SETTINGS)
    before = adapter(folder / "final")
    (folder / "final").rename(folder / "lost")
    monkeypatch.setattr(LoRATrainer, "forward_and_backward", lambda *args: pytest.fail("a step was made"))
    job(**SETTINGS)
    assert all(torch.equal(before[name], weight) for name, weight in adapter(folder / "final").items())


def nan_files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*.safetensors")
        if not all(tensor.isfinite().all() for tensor in load_file(path).values())
    ]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_weight_that_is_not_finite_stops_the_run_before_the_update(stopped, tmp_path, capsys, packing):
    with at_call(5, LoRATrainer, "forward_and_backward", poison):
        assert stopped(**SETTINGS, packing=packing) == 3
    message = capsys.readouterr().err
    assert "step 5: the loss is not finite" in message
    assert f"{tmp_path / 'train.jsonl'}:" in message
    assert "checkpoint-3 is as it was" in message
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not nan_files(tmp_path / "run")


def test_a_gradient_that_is_not_finite_stops_the_run(stopped, tmp_path, capsys):
    with at_call(4, LoRATrainer, "agree", overflow):
        assert stopped(**SETTINGS, max_grad_norm=0) == 3
    assert "step 4: the gradient is not finite" in capsys.readouterr().err
    verify(tmp_path / "run" / "checkpoint-3")


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_a_learning_rate_beyond_all_bounds_writes_nothing_that_is_not_finite(stopped, tmp_path, max_grad_norm):
    assert stopped(**SETTINGS | {"save_steps": 1}, learning_rate=1e20, max_grad_norm=max_grad_norm) == 3
    assert not nan_files(tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()


def test_a_bad_row_is_named_alone_and_left_out_as_often_as_is_allowed(job, stopped, tmp_path, capsys, monkeypatch):
    whole = job("whole", **SETTINGS)
    original = LoRATrainer.summed_loss

    def summed_loss(self, part):
        is_bad = part["longest"] > 100
        return original(self, part) * (torch.nan if is_bad else 1)

    rows = [*ROWS, {"conversations": [{"role": "user", "content": "x" * 99}, ROWS[0]["conversations"][1]]}]
    monkeypatch.setattr(LoRATrainer, "summed_loss", summed_loss)
    settings = SETTINGS | {"max_seq_length": 512, "rows": rows}
    assert stopped("refused", **settings) == 3
    named = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip().startswith(str(tmp_path))]
    assert named == [f"{tmp_path / 'train.jsonl'}:13"]
    folder = job("skipped", **settings, max_skipped_updates=2)
    assert "left out, 1 of max_skipped_updates=2" in capsys.readouterr().err
    assert all(map(torch.isfinite, map(torch.tensor, losses(folder))))
    assert not nan_files(folder)
    assert 0 not in losses(folder)
    assert len(losses(folder)) == len(losses(whole))


def test_an_update_that_is_left_out_changes_no_weight_and_no_moment(job, tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(
        LoRATrainer,
        "log_evaluate_save",
        lambda self: states.append(
            [value.clone() for state in self.optimizer.state.values() for value in state.values()]
            + [weight.detach().clone() for weight in self.model.parameters() if weight.requires_grad]
        ),
    )
    with at_call(3, LoRATrainer, "agree", overflow):
        job(**SETTINGS | {"max_steps": 3, "save_strategy": "no"}, max_skipped_updates=1)
    first, second, third = states[:3]
    assert not all(map(torch.equal, first, second))
    assert all(map(torch.equal, second, third))


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(job, stopped, tmp_path, capsys):
    whole = job("whole", **SETTINGS)

    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with at_call(2, Checkpoints, "write", fill):
        assert stopped(**SETTINGS) == 4
    message = capsys.readouterr().err
    assert "checkpoint-6 could not be written beyond" in message
    assert "(OSError: [Errno 28] No space left on device)" in message
    assert "checkpoint-3 is untouched" in message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "checkpoint-3", "loss.png"}
    job(**SETTINGS)
    assert_same_run(whole, tmp_path / "run")


def test_a_process_that_loads_the_data_and_is_killed_ends_the_run_in_one_line(stopped, monkeypatch, capsys):
    def die(samples):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("component.train.updates.as_arrays", die)
    assert stopped(**SETTINGS, dataloader_num_workers=1) == 2
    assert "a process that loads the data was killed, perhaps for want of memory" in capsys.readouterr().err


def test_a_tracker_that_cannot_write_ends_the_run_with_4(stopped, monkeypatch, capsys):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LossWatch, "on_log", fill)
    assert stopped(**SETTINGS) == 4
    assert "a tracker could not write ([Errno 28] No space left on device)" in capsys.readouterr().err


def test_a_full_disk_at_the_results_ends_with_4_and_a_picture_is_no_reason_to_stop(job, stopped, monkeypatch, capsys):
    def fill(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("component.run.files.write_atomically", fill)
        assert stopped(**SETTINGS) == 4
    assert "trainer_state.json could not be written" in capsys.readouterr().err
    monkeypatch.setattr("component.train.report.write_atomically", fill)
    assert (job(**SETTINGS) / "final").exists()
    assert "loss.png could not be drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "writer", ["dataset.fill_store", "load.write_atomically"], ids=["prepared data", "rejected rows"]
)
def test_a_full_disk_before_the_model_loads_ends_with_4(stopped, monkeypatch, capsys, writer):
    def fail(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"component.data.{writer}", fail)
    monkeypatch.setattr("component.model.load_model", lambda *args: pytest.fail("the model was loaded"))
    assert stopped(rows=[*ROWS, {"conversations": []}], on_bad_row="skip") == 4
    assert "No space left on device" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before_the_first_step(stopped, capsys, monkeypatch):
    monkeypatch.setattr("component.run.folder.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(LoRATrainer, "forward_and_backward", lambda *args: pytest.fail("a step was made"))
    assert stopped(**SETTINGS) == 4
    assert "1000" not in (message := capsys.readouterr().err)
    assert "two checkpoints need 0.1" in message


def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(job, monkeypatch):
    asked = []
    monkeypatch.setattr(RunFolder, "check_room", lambda self, size: asked.append(size))
    folder = job(**SETTINGS, lora_rank=128)
    files = [
        path.stat().st_size for path in (folder / "checkpoint-6").iterdir() if path.suffix in (".pt", ".safetensors")
    ]
    assert asked[0] == pytest.approx(sum(files), rel=0.1)


def test_losses_that_look_like_a_mistake_are_told_once(log):
    watch, state = LossWatch(), SimpleNamespace(global_step=1, is_world_process_zero=True)

    def see(loss: float, times: int) -> list[str]:
        log.clear()
        for _ in range(times):
            watch.on_log(None, state, None, {"loss": loss})
        return [line.split("the loss is ")[1][:6].strip() for line in log]

    assert see(2.0, 20) == []
    assert see(7.0, 2) == ["7.00 a"]
    assert see(2.0, 28) == []
    assert see(2.0, 100) == ["2.0000"]
    assert see(0.0, 2) == ["0.0e+0"]
