"""Every field of transformers' TrainingArguments takes effect, is fixed, is translated, is refused, or is said to have
no effect; a field of a new release fails here until somebody decides which."""

import dataclasses
import inspect
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from component.run.errors import ArgumentError
from component.settings import fields, legacy
from component.settings.machine import adapt_to_machine
from component.settings.schema import QLoRAArguments
from component.train.batch import SFTDataCollator
from component.train.loss import TargetLMLoss
from component.train.progress import ProgressReport
from component.train.trainer import LoRATrainer

ROOT = Path(__file__).parents[3]
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
TRANSLATED = (legacy.CONVERTED.keys() | legacy.RENAMED_KEYS.keys()) & FIELDS - {"optim", "bf16", "fp16"}

# Rows that know their place, so that the order in which they are drawn is seen in their first token.
LENGTHS = range(2, 10)


class Rows(list):
    lengths = LENGTHS


ROWS = Rows(
    {"input_ids": [length] * length, "attention_mask": [1] * length, "target_mask": [0] + [1] * (length - 1)}
    for length in LENGTHS
)
BASE = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
BASE |= {"optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
Run = namedtuple("Run", "trainer loader batches events rates moved")


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


class Recorder(TrainerCallback):
    """The steps at which something happens."""

    def __init__(self):
        self.events: dict[str, list[int]] = {"log": [], "save": [], "evaluate": []}
        self.rates: list[float] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.events["log"].append(state.global_step)
            self.rates.append(logs["learning_rate"])

    def on_save(self, args, state, control, **kwargs):
        self.events["save"].append(state.global_step)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events["evaluate"].append(state.global_step)


@pytest.fixture
def run(load):
    """Trains a tiny model by settings, as `train_qlora` hands them on."""

    def run(**settings) -> Run:
        _, training_args = load(**BASE | settings)
        recorder, batches, model = Recorder(), [], TinyModel()

        class Layout(SFTDataCollator):
            def lay_out(self, rows):
                batches.append([LENGTHS.index(row["input_ids"][0]) for row in rows])
                return super().lay_out(rows)

        layout = Layout(SimpleNamespace(pad_token_id=0), 64)
        data = {"train_dataset": ROWS, "eval_dataset": ROWS[:4], "data_collator": layout}
        trainer = LoRATrainer(model=model, args=training_args, loss=TargetLMLoss(), callbacks=[recorder], **data)
        loader = trainer.get_train_dataloader()
        before = model.head.weight.clone()
        if not training_args.dataloader_num_workers:  # workers would collate in processes of their own
            trainer.train()
        moved = (model.head.weight - before).norm().item()
        return Run(trainer, loader, batches, recorder.events, recorder.rates, moved)

    verbosity = transformers.utils.logging.get_verbosity()
    yield run
    transformers.utils.logging.set_verbosity(verbosity)


def group(run: Run, key: str):
    return run.trainer.optimizer.param_groups[0][key]


def steps(run: Run) -> int:
    return run.trainer.state.global_step


# Fields that take effect: settings, what is looked at in a run of them, and what is seen there.
SEEN_IN_A_RUN = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 3}, lambda run: len(run.batches[0]), 3),
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 2}, steps, 8),
    "max_steps": ({"max_steps": 3}, steps, 3),
    "learning_rate": ({"learning_rate": 0.5}, lambda run: run.rates[0], 0.5),
    "lr_scheduler_type": ({"lr_scheduler_type": "linear"}, lambda run: run.rates[-1] < run.rates[0], True),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0}},
        lambda run: run.rates,
        [0.1] * 4,
    ),
    "warmup_steps": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        lambda run: [round(rate, 9) for rate in run.rates],
        [0.0, 0.05, 0.1, 0.1],
    ),
    "optim": ({"optim": "sgd"}, lambda run: type(run.trainer.optimizer), torch.optim.SGD),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.5"}, partial(group, key="momentum"), 0.5),
    "weight_decay": ({"weight_decay": 0.5}, partial(group, key="weight_decay"), 0.5),
    "adam_beta1": ({"adam_beta1": 0.5}, partial(group, key="betas"), (0.5, 0.999)),
    "adam_beta2": ({"adam_beta2": 0.5}, partial(group, key="betas"), (0.9, 0.5)),
    "adam_epsilon": ({"adam_epsilon": 0.5}, partial(group, key="eps"), 0.5),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, lambda run: len(run.batches) // steps(run), 2),
    "max_grad_norm": ({"optim": "sgd", "max_grad_norm": 1e-9}, lambda run: run.moved < 1e-6, True),
    "logging_strategy": ({"logging_strategy": "epoch"}, lambda run: run.events["log"], [4]),
    "logging_steps": ({"logging_steps": 2}, lambda run: run.events["log"], [2, 4]),
    "logging_first_step": (
        {"logging_steps": 3, "logging_first_step": True},
        lambda run: run.events["log"],
        [1, 3],
    ),
    "log_level": ({"log_level": "error"}, lambda run: run.trainer.args.get_process_log_level(), 40),
    "eval_strategy": ({"eval_strategy": "epoch"}, lambda run: run.events["evaluate"], [4]),
    "eval_steps": ({"eval_strategy": "steps", "eval_steps": 3}, lambda run: run.events["evaluate"], [3, 4]),
    "eval_delay": (
        {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3},
        lambda run: run.events["evaluate"],
        [3, 4],
    ),
    "eval_on_start": ({"eval_on_start": True, "eval_strategy": "epoch"}, lambda run: run.events["evaluate"], [0, 4]),
    "per_device_eval_batch_size": (
        {"eval_strategy": "epoch", "per_device_eval_batch_size": 3},
        lambda run: run.batches[-1],
        [3],
    ),
    "save_strategy": ({"save_strategy": "epoch"}, lambda run: run.events["save"], [4]),
    "save_steps": ({"save_strategy": "steps", "save_steps": 3}, lambda run: run.events["save"], [3, 4]),
    "dataloader_drop_last": (
        {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, "dataloader_drop_last": True},
        steps,
        2,
    ),
    "dataloader_num_workers": ({"dataloader_num_workers": 2}, lambda run: run.loader.num_workers, 2),
    "dataloader_prefetch_factor": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 5},
        lambda run: run.loader.prefetch_factor,
        5,
    ),
    "dataloader_multiprocessing_context": (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
        lambda run: getattr(run.loader.multiprocessing_context, "_name", None),
        "spawn",
    ),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "sequential"},
        lambda run: run.batches,
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
}

# Fields that take effect: the test that sees it.
SEEN_IN_A_TEST = {
    "output_dir": "test_a_run_leaves_an_adapter_a_tokenizer_and_a_picture_and_no_pickle",
    "report_to": "test_a_run_leaves_an_adapter_a_tokenizer_and_a_picture_and_no_pickle",
    "save_total_limit": "test_the_best_that_was_saved_is_kept_where_a_better_step_was_not",
    "load_best_model_at_end": "test_the_best_model_is_found_again",
    "metric_for_best_model": "test_the_best_model_is_found_again",
    "greater_is_better": "test_the_best_model_is_found_again",
    "seed": "test_the_order_of_rows_follows_from_the_seeds",
    "data_seed": "test_the_order_of_rows_follows_from_the_seeds",
    "use_cpu": "test_a_card_is_used_unless_it_is_switched_off",
    "bf16": "test_the_card_decides_the_compute_dtype",
    "fp16": "test_the_card_decides_the_compute_dtype",
    "tf32": "test_tf32_is_for_cards",
    "torch_empty_cache_steps": "test_the_cache_is_emptied_every_so_many_steps",
    "log_on_each_node": "test_other_machines_speak_at_the_level_that_is_set_for_them",
    "log_level_replica": "test_other_machines_speak_at_the_level_that_is_set_for_them",
    "disable_tqdm": "test_the_bar_is_shown_unless_it_is_switched_off",
    "do_eval": "test_an_evaluation_that_is_asked_for_needs_data",
    "full_determinism": "test_full_determinism_is_handed_on",
    "ddp_backend": "test_the_backend_of_ranks_is_handed_on_where_there_are_some",
    "ddp_timeout": "test_ranks_wait_for_slow_data_longer_than_a_collective_may_take",
    "resume_from_checkpoint": "test_length_grouping_is_exact_on_resume",
    "ignore_data_skip": "test_a_resumed_run_that_draws_other_data_differs",
}
# Fields that go to trackers, by transformers' own callbacks.
HANDED_TO_TRACKERS = {"run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}


def test_every_field_stands_in_one_table():
    tables = {
        "seen in a run": SEEN_IN_A_RUN,
        "seen in a test": SEEN_IN_A_TEST,
        "handed to trackers": HANDED_TO_TRACKERS,
        "fixed": fields.FIXED,
        "translated": TRANSLATED,
        "refused": fields.REFUSED,
        "without effect": fields.WITHOUT_EFFECT,
    }
    places = {name: [title for title, table in tables.items() if name in table] for name in FIELDS}
    assert {name: found for name, found in places.items() if len(found) != 1} == {}


@pytest.mark.parametrize("field", SEEN_IN_A_RUN)
def test_the_effect_of_a_field_is_seen_in_a_run_and_not_without_it(run, tmp_path, field):
    settings, look, expected = SEEN_IN_A_RUN[field]
    settings = {"eval_file": str(tmp_path / "rows.jsonl"), "eval_strategy": "no"} | settings
    without = {key: value for key, value in settings.items() if key != field}
    if field == "eval_strategy":
        without = {}
    assert look(run(**without)) != expected
    assert look(run(**settings)) == expected


def test_the_tests_that_see_other_fields_are_there():
    there = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    assert [name for name in SEEN_IN_A_TEST.values() if f"def {name}(" not in there] == []


@pytest.mark.parametrize("field", sorted(HANDED_TO_TRACKERS & FIELDS))
def test_trackers_read_their_fields(field):
    assert f"args.{field}" in inspect.getsource(integration_utils)


@pytest.mark.parametrize("field", sorted(fields.FIXED))
def test_a_fixed_field_stays_and_says_so(load, log, field):
    value = fields.FIXED[field]
    other = (not value) if isinstance(value, bool) else ["labels"] if isinstance(value, list) else 0.1
    _, training_args = load(**{field: other})
    assert getattr(training_args, field) == value
    assert any(f"{field}={other} is not possible here; using {value}" in line for line in log)


@pytest.mark.parametrize("field", sorted(fields.REFUSED))
def test_a_refused_field_is_named_with_the_reason(load, field):
    load(**{field: None})
    with pytest.raises(ArgumentError) as error:
        load(**{field: {"x": 1} if "config" in field else "x"})
    assert f"args.json: {field} is not supported: {fields.REFUSED[field]}" in str(error.value)


@pytest.mark.parametrize("field", sorted(fields.WITHOUT_EFFECT))
def test_a_field_without_effect_says_so(load, log, field):
    _, training_args = load(**{field: "x"})
    assert getattr(training_args, field, None) == getattr(load()[1], field, None)
    assert any(f"{field} has no effect here and is ignored: {fields.WITHOUT_EFFECT[field]}" in line for line in log)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_rows_follows_from_the_seeds(run, grouped):
    usual, other, data = (
        run(group_by_length=grouped, **seeds).batches for seeds in ({}, {"seed": 7}, {"data_seed": 7})
    )
    assert data != usual
    assert data == other


def test_a_card_is_used_unless_it_is_switched_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("component.settings.machine.check_card", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for off in (True, False):
        args = QLoRAArguments(model_name_or_path="x", train_file="x")
        adapted = adapt_to_machine(args, {"use_cpu": off, "tf32": True, "optim": "paged_lion_32bit"})
        assert (adapted["use_cpu"], adapted["bf16"], adapted["tf32"]) == (off, not off, None if off else True)
        assert adapted["optim"] == ("adamw_torch" if off else "paged_lion_32bit")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_for_cards(monkeypatch, tmp_path, tf32):
    set_to = []
    monkeypatch.setattr(transformers.training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "enable_tf32", set_to.append)
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, tf32=tf32)
    assert set_to == [tf32]


def test_the_cache_is_emptied_every_so_many_steps(run, monkeypatch):
    emptied = []
    monkeypatch.setattr("component.train.trainer.clear_device_cache", lambda: emptied.append(None))
    run()
    assert len(emptied) == 0
    run(torch_empty_cache_steps=2)
    assert len(emptied) == 2


def test_other_machines_speak_at_the_level_that_is_set_for_them(load, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: 8))
    levels = {"log_level": "info", "log_level_replica": "error"}
    assert load(**levels)[1].get_process_log_level() == 20  # of the first process of the second machine
    assert load(**levels, log_on_each_node=False)[1].get_process_log_level() == 40


@pytest.mark.parametrize("off", [True, False])
def test_the_bar_is_shown_unless_it_is_switched_off(run, monkeypatch, off):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    callbacks = run(max_steps=1, disable_tqdm=off).trainer.callback_handler.callbacks
    assert [report.show_bar for report in callbacks if isinstance(report, ProgressReport)] == [not off]


def test_an_evaluation_that_is_asked_for_needs_data(load):
    with pytest.raises(ArgumentError, match="give eval_file"):
        load(do_eval=True)


def test_full_determinism_is_handed_on(run):
    try:
        run(max_steps=1, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_backend_of_ranks_is_handed_on_where_there_are_some(monkeypatch, tmp_path, processes):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    adapted = adapt_to_machine(QLoRAArguments("x", "x"), {"ddp_backend": "gloo"})
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(
        transformers.training_args, "PartialState", lambda backend, **_: asked.append(backend) or PartialState(cpu=True)
    )
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, ddp_backend=adapted["ddp_backend"])
    assert asked == ["gloo" if processes > 1 else None]
