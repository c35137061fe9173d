import json

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from component.run.errors import ArgumentError
from component.settings.load import load_arguments


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs {}: lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs {}: lr_scheduler_type warmup_stable_decay"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs {'foo': 1}: lr_scheduler_type linear cannot be"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_kwargs {'power': "),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}},
            "lr_scheduler_kwargs {'lr_end': 1}",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs {'num_cyc"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 1}},
            "constant cannot be built: it takes no",
        ),
        (
            {
                "lr_scheduler_type": "cosine_warmup_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "warmup_lr_rate": -1},
                "warmup_steps": 5,
            },
            "the learning rate of step 0 is -",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles=2"}, "lr_scheduler_kwargs num_cycles=2: "),
        ({"optim_args": "foo=1"}, "optim_args: adamw_torch cannot be built: it takes no 'foo'"),
        ({"optim": "paged_adamw_32bit", "optim_args": "foo=1"}, "paged_adamw_32bit cannot be built: it takes no 'foo'"),
        ({"optim": "rmsprop_bnb", "optim_args": "foo=1"}, "optim_args: rmsprop_bnb cannot be built: "),
        ({"optim": "sgd", "optim_args": "momentum"}, "'momentum' is not key=value"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "optim_args: sgd cannot be built: could not convert"),
        (
            {"optim": "sgd", "optim_args": "momentum=-1"},
            "optim_args: sgd cannot be built: Invalid momentum value: -1.0",
        ),
        ({"optim": "galore_adamw"}, "optim galore_adamw is not supported: it projects the gradients of full weights"),
        ({"optim": "schedule_free_adamw"}, "optim schedule_free_adamw is not supported: it has other weights"),
        ({"optim": "grokadamw"}, "optim: grokadamw cannot be built"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_built_is_a_fault_of_the_settings(load, settings, fault):
    with pytest.raises(ArgumentError, match=r"args\.json: ") as error:
        load(**{"optim": "adamw_torch"} | settings)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 3000},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1000}},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
        {"lr_scheduler_type": "polynomial", "max_steps": 1},
        {"lr_scheduler_type": "inverse_sqrt", "max_steps": 10**9},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "ademamix", "optim_args": "beta1=0.9,alpha=5.0"},  # which are what it has anyway
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
    ],
)
def test_what_can_be_built_is_left_as_it_is(load, settings):
    _, training_args = load(**settings)
    assert training_args.lr_scheduler_type == settings.get("lr_scheduler_type", "linear")
    if settings.get("optim") in ("sgd", "rmsprop"):
        assert training_args.optim_args == settings["optim_args"]


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_built_or_refused_without_a_traceback(load, optim):
    try:
        load(optim=optim)
    except ArgumentError as error:
        assert f"optim {optim} is not supported" in str(error) or f"optim: {optim} cannot be built" in str(error)


@pytest.mark.parametrize("schedule", [name.value for name in SchedulerType])
def test_every_schedule_is_built_or_refused_without_a_traceback(load, tmp_path, schedule):
    needed = {"warmup_stable_decay": {"num_decay_steps": 5}}
    needed |= {name: {"min_lr_rate": 0.1} for name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")}
    settings = {"lr_scheduler_kwargs": needed.get(schedule), "eval_file": str(tmp_path / "rows.jsonl")}
    assert load(lr_scheduler_type=schedule, **settings)[1].lr_scheduler_type == schedule


def test_a_warm_up_that_the_schedule_does_not_have_is_said(load, log):
    load(lr_scheduler_type="constant", warmup_steps=10)
    assert any("warmup_steps has no effect: lr_scheduler_type constant has no warm-up" in line for line in log)


def learning_rates(training_args, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = training_args.get_warmup_steps(steps)
    schedule = get_scheduler(training_args.lr_scheduler_type, optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("ratio", [1.0, 1])
@pytest.mark.parametrize("steps", [1, 3, 10, 1000, 12345])
def test_a_warm_up_ratio_of_one_is_all_steps(load, ratio, steps):
    _, training_args = load(warmup_ratio=ratio)
    assert training_args.get_warmup_steps(steps) == steps
    if steps <= 10:
        assert learning_rates(training_args, steps) == pytest.approx([step / steps for step in range(steps)])


@pytest.mark.parametrize(("key", "value", "of_ten"), [("warmup_ratio", 0, 0), ("warmup_ratio", 0.25, 3)])
def test_a_smaller_ratio_is_a_share_of_the_steps(load, key, value, of_ten):
    assert load(**{key: value})[1].get_warmup_steps(10) == of_ten
    assert load(f"{key}={value}")[1].get_warmup_steps(10) == of_ten


def test_warm_up_steps_are_steps_from_one_on(load):
    assert load(warmup_steps=1)[1].get_warmup_steps(10) == 1
    assert load(warmup_steps=0.5)[1].get_warmup_steps(10) == 5


@pytest.mark.parametrize("ratio", [1.5, 100, -0.1])
def test_what_is_no_ratio_is_refused(load, ratio):
    with pytest.raises(ArgumentError, match=r"args\.json: warmup_ratio must be from 0 to 1, got .* as warmup_steps"):
        load(warmup_ratio=ratio)


def test_the_cases_that_people_bring_have_the_right_outcome(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("component.settings.load.missing_folder", lambda name: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dummy_data_chatglm3.jsonl").touch()
    cases = shared / "cases/settings"
    faults = {"cosine_min_lr": "lr_scheduler_kwargs", "compile": "torch_compile is not supported"}
    for file in sorted(cases.glob("*.json")):
        if fault := faults.get(file.stem):
            with pytest.raises(ArgumentError, match=fault):
                load_arguments(file)
            continue
        args, training_args = load_arguments(file)
        written = json.loads(file.read_text())
        if file.stem == "firefly-chatglm3":
            assert args.data_format == "chatglm3"
        if file.stem == "warmup_ratio_1":
            assert training_args.get_warmup_steps(100) == 100
        if file.stem in ("cutoff_len", "firefly-chatglm3"):
            assert args.max_seq_length == written.get("cutoff_len", 1024)
        assert args.target_modules is None
