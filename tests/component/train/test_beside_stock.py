"""LoRATrainer beside transformers' Trainer over the same data: callbacks see the same events in the same order, with
the same state, figures, weights and gradients; adapter and history are the same. Numbers are equal to the last bit."""

import ast
import dataclasses
import gc
import inspect
from collections import namedtuple
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from component.run.folder import RunFolder
from component.train.batch import SFTDataCollator
from component.train.loss import TargetLMLoss
from component.train.trainer import LoRATrainer

LENGTHS = [5, 3, 9, 4, 7, 2, 8, 6, 3, 10, 5, 4, 7]
ROWS = [
    {
        "input_ids": [(7 * row + 3 * place) % 31 + 1 for place in range(length)],
        "attention_mask": [1] * length,
        "target_mask": [0] + [int((row + place) % 3 > 0) for place in range(length - 2)] + [1],
    }
    for row, length in enumerate(LENGTHS)
]
TOKENIZER = SimpleNamespace(pad_token_id=0, save_pretrained=lambda folder: None)
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
FLAGS = ["should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop"]
LOG, EVALUATE, SAVE, LEAVE_EPOCH, STOP = FLAGS
# Figures whose values differ: times, and an estimate of operations that LoRATrainer does without.
UNEQUAL = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
ALONE = {"num_tokens", "total_flos"}  # of ours, and of stock Trainer, whose estimate of operations ours does not make
# State that differs on purpose: LoRATrainer names the best checkpoint of those saved, and restores no callback's state.
OWN = {"log_history", "total_flos", "best_model_checkpoint", "stateful_callbacks"}

STATE = ["global_step", "epoch", "max_steps", "num_train_epochs", "best_metric", "best_global_step"]

Seen = namedtuple("Seen", ["event", *STATE, "history", "flags", "figures", "given", "weights", "gradients"])
Run = namedtuple("Run", "seen history state adapter result")


def comparable(logs: dict) -> dict:
    """Figures by name, without the values of UNEQUAL, and without the tokens that LoRATrainer alone logs."""
    return {name: None if name in UNEQUAL else value for name, value in logs.items() if name not in ALONE}


def norm(tensors) -> float | None:
    present = [tensor.detach().double().flatten() for tensor in tensors if tensor is not None]
    return torch.cat(present).norm().item() if present else None


class Recorder(TrainerCallback):
    """Notes every event, and all that a callback is given with it."""

    def __init__(self):
        self.seen: list[Seen] = []
        for event in EVENTS:
            setattr(self, event, partial(self.note, event))

    def note(self, event, args, state, control, model, **given):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.seen.append(
            Seen(
                event=event,
                **{name: getattr(state, name) for name in STATE},
                history=len(state.log_history),
                flags=[flag for flag in FLAGS if getattr(control, flag)],
                figures=comparable(given.get("logs") or given.get("metrics") or {}),
                given=sorted(name for name, value in given.items() if value is not None),
                weights=norm(trained),
                gradients=norm(weight.grad for weight in trained),
            )
        )


class Ask(TrainerCallback):
    """Sets a flag of the control at an event of a step."""

    def __init__(self, event: str, step: int, flag: str):
        self.step, self.flag = step, flag
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)


class StockTrainer(Trainer):
    """Stock but for evaluation, which is the mean over all learned tokens instead of that of the batches' means."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        total, count = torch.zeros((), dtype=torch.float64), 0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(self.eval_dataset), self.args.eval_batch_size):
                batch = pad_with_labels(self.eval_dataset[start : start + self.args.eval_batch_size])
                labels = batch.pop("labels")
                total += mean_over_learned(self.model(**batch), labels, num_items_in_batch=1)
                count += labels.ne(-100).sum()
        metrics = {f"{metric_key_prefix}_loss": (total / count).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def pad_with_labels(rows: list[dict]) -> dict[str, torch.Tensor]:
    pad = partial(pad_sequence, batch_first=True)
    batch = {key: pad([torch.tensor(row[key]) for row in rows]) for key in rows[0]}
    labels = batch["input_ids"].masked_fill(batch.pop("target_mask") == 0, -100)
    return batch | {"labels": labels}


def mean_over_learned(outputs, labels, num_items_in_batch) -> torch.Tensor:
    rows, places = labels[:, 1:].ne(-100).nonzero(as_tuple=True)
    losses = cross_entropy(outputs.logits[rows, places].float(), labels[rows, places + 1], reduction="none")
    return losses.sum(dtype=torch.float64) / num_items_in_batch


def stock(args: TrainingArguments, resume: str | None, **parts):
    """A trained stock Trainer, and what `train` returned."""
    parts |= {"data_collator": pad_with_labels, "compute_loss_func": mean_over_learned}
    trainer = StockTrainer(args=args, processing_class=TOKENIZER, **parts)
    trainer.remove_callback(PrinterCallback)
    return trainer, trainer.train(resume_from_checkpoint=resume and str(Path(args.output_dir, resume)))


def ours(args: TrainingArguments, resume: str | None, **parts):
    """A trained LoRATrainer, and what `train` returned."""
    parts |= {"data_collator": SFTDataCollator(TOKENIZER, max_seq_length=16), "loss": TargetLMLoss()}
    with RunFolder(args.output_dir, {"settings": {}}) as folder:
        start = folder.open(resume)
        trainer = LoRATrainer(args=args, processing_class=TOKENIZER, folder=folder, **parts)
        return trainer, trainer.train(resume_from_checkpoint=start.checkpoint)


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Leaves what is imported out of the garbage collections that begin each run, which take longer than a tiny run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(make_model, tmp_path, monkeypatch):
    """Trains a tiny adapter by one of the two, and returns what was to be seen of it."""

    def run(train, rows=ROWS, callbacks=list, resume=None, lora_dropout=0.0, tracked=False, **settings) -> Run:
        shape = {"hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2, "kv_channels": 8}
        base = make_model(padded_vocab_size=32, **shape)
        lora = LoraConfig(r=2, target_modules=["query_key_value"], lora_dropout=lora_dropout)
        recorder = Recorder()
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", recorder)
        defaults = {
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": ["recorder"] if tracked else [],
        }
        trainer, result = train(
            TrainingArguments(output_dir=str(tmp_path / train.__name__), **defaults | settings),
            resume,
            model=get_peft_model(base, lora),
            train_dataset=rows,
            eval_dataset=ROWS[3:8],
            callbacks=callbacks() + [recorder] * (not tracked),
        )
        state = dataclasses.asdict(trainer.state)
        adapter = [weight.tolist() for weight in trainer.model.parameters() if weight.requires_grad]
        return Run(
            recorder.seen,
            [comparable(entry) for entry in state["log_history"]],
            {name: value for name, value in state.items() if name not in OWN},
            adapter,
            (result.global_step, result.training_loss, comparable(result.metrics)),
        )

    return run


def assert_alike(run, **settings) -> Run:
    """Hold a run of ours against one of stock: each in turn, so that a failure names the first thing that differs."""
    expected, found = run(stock, **settings), run(ours, **settings)
    if "resume" in settings and found.seen[2].event == "on_epoch_end":
        del found.seen[2]  # stock Trainer forgets the end of an epoch whose last step a run goes on from
    for number, (there, here) in enumerate(zip(expected.seen, found.seen, strict=False)):
        assert here == there, f"event {number}"
    assert len(found.seen) == len(expected.seen)
    assert found.history == expected.history
    assert found.state == expected.state
    assert found.adapter == expected.adapter
    assert found.result == expected.result
    return found


def events(run: Run, event: str) -> list[int]:
    """Steps at which an event was."""
    return [seen.global_step for seen in run.seen if seen.event == event]


@pytest.mark.parametrize(("log", "evaluate", "save"), [*product(["no", "steps", "epoch"], repeat=3)])
def test_what_is_due_by_steps_and_by_epochs_is_done_when_stock_does_it(run, log, evaluate, save):
    strategies = {"logging_strategy": log, "eval_strategy": evaluate, "save_strategy": save}
    found = assert_alike(run, **strategies, per_device_train_batch_size=4, logging_steps=2, eval_steps=3, save_steps=2)
    assert events(found, "on_evaluate") == {"no": [], "steps": [3, 6, 8], "epoch": [4, 8]}[evaluate]
    assert events(found, "on_save") == {"no": [], "steps": [2, 4, 6, 8], "epoch": [4, 8]}[save]


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
SETTINGS = {
    "logging_first_step": {"logging_first_step": True, "logging_steps": 3},
    "a loss logged across an epoch's end": {"logging_steps": 4},
    "steps as fractions": {"logging_steps": 0.2, "eval_strategy": "steps", "eval_steps": 0.3, "save_strategy": "steps"}
    | {"save_steps": 0.4},
    "max_steps within an epoch": {"max_steps": 3},
    "max_steps at an epoch's end": {"max_steps": 7},
    "max_steps beyond epochs": {"max_steps": 17, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "one epoch": {"num_train_epochs": 1},
    "two epochs and a half": {"num_train_epochs": 2.5, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "accumulation of 2, a rest": {"gradient_accumulation_steps": 2},
    "accumulation of 3, a rest": {"gradient_accumulation_steps": 3},
    "accumulation of 2, no rest": {"gradient_accumulation_steps": 2, "rows": ROWS[:12]},
    "accumulation of 3, no rest": {"gradient_accumulation_steps": 3, "rows": ROWS[:12]},
    "accumulation beyond an epoch": {"gradient_accumulation_steps": 9},
    "accumulation and max_steps within an epoch": {"gradient_accumulation_steps": 2, "max_steps": 6},
    "drop_last": {"dataloader_drop_last": True},
    "drop_last and accumulation": {"dataloader_drop_last": True, "gradient_accumulation_steps": 4},
    "linear": {"lr_scheduler_type": "linear"},
    "cosine and warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "cosine and warm-up as a fraction": {"lr_scheduler_type": "cosine", "warmup_steps": 0.2},
    "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
    "reduce_lr_on_plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    | {"lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0}, "eval_on_start": True},
    "greedy": {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "no clipping": {"max_grad_norm": 0.0},
    "clipping": {"max_grad_norm": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.5"},
    "dropout": {"lora_dropout": 0.1, "eval_strategy": "steps", "eval_steps": 2},
    "dropout and another seed": {"lora_dropout": 0.1, "seed": 7, "gradient_accumulation_steps": 2},
    "data_seed": {"data_seed": 7},
    "sequential": {"train_sampling_strategy": "sequential"},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "epoch"},
    "eval_delay in steps": {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5},
    "eval_delay in epochs": {"eval_strategy": "epoch", "eval_delay": 2},
    "the best at the end": BEST,
    "the worst at the end": BEST | {"greater_is_better": True, "save_total_limit": 1},
    "save_strategy best": BEST | {"save_strategy": "best"},
    "save_strategy best, and none is better": BEST | {"save_strategy": "best", "greater_is_better": True},
    "a metric without saving": {"eval_strategy": "epoch", "metric_for_best_model": "loss"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_arguments_do_what_they_do_in_stock(run, settings):
    assert_alike(run, **settings)


# Requests of callbacks: an event, a step and a flag. An epoch has 4 updates of 2 batches, of which the last has 1.
REQUESTS = {
    "log after a step": [("on_step_end", 2, LOG)],
    "log before a step": [("on_step_begin", 2, LOG)],
    "evaluate after a step": [("on_step_end", 2, EVALUATE)],
    "save after a step": [("on_step_end", 2, SAVE)],
    "everything after a step": [("on_step_end", 3, flag) for flag in FLAGS[:3]],
    "everything after an epoch's last step": [("on_step_end", 4, flag) for flag in FLAGS[:3]],
    "everything after an epoch": [("on_epoch_end", 4, flag) for flag in FLAGS[:3]],
    "everything twice at an epoch's end": [*product(["on_step_end", "on_epoch_end"], [4], FLAGS[:3])],
    "an evaluation after a log": [("on_step_end", 2, LOG), ("on_log", 2, EVALUATE)],
    "a save after an evaluation": [("on_step_end", 2, EVALUATE), ("on_evaluate", 2, SAVE)],
    "evaluate before training": [("on_train_begin", 0, EVALUATE)],
    "evaluate around an optimizer's step": [("on_pre_optimizer_step", 1, EVALUATE), ("on_optimizer_step", 3, EVALUATE)],
    "leave an epoch after a step": [("on_step_end", 2, LEAVE_EPOCH)],
    "leave an epoch at a log": [("on_step_end", 2, LOG), ("on_log", 2, LEAVE_EPOCH)],
    "stop after a step": [("on_step_end", 2, STOP)],
    "stop after an epoch": [("on_epoch_end", 4, STOP)],
    "stop at an evaluation and save": [("on_step_end", 2, EVALUATE), *product(["on_evaluate"], [2], [SAVE, STOP])],
    "stop at a save": [("on_step_end", 2, SAVE), ("on_save", 2, STOP)],
}


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_callbacks_are_obeyed_as_in_stock(run, requests):
    def callbacks():
        return [Ask(*request) for request in requests]

    assert_alike(run, callbacks=callbacks, logging_strategy="epoch", gradient_accumulation_steps=2, num_train_epochs=3)


# What is asked for before an update is over: with accumulation, stock Trainer leaves it half done, and its gradients go
# into the next one.
EARLY_REQUESTS = {
    "leave an epoch before a step": ("on_step_begin", 2, LEAVE_EPOCH),
    "stop before a step": ("on_step_begin", 2, STOP),
    "stop before an epoch": ("on_epoch_begin", 4, STOP),
}


@pytest.mark.parametrize("request_", EARLY_REQUESTS.values(), ids=EARLY_REQUESTS)
def test_an_end_that_is_asked_for_before_a_step_comes_after_it(run, request_):
    settings = {"logging_strategy": "epoch", "per_device_train_batch_size": 4, "num_train_epochs": 3}
    assert_alike(run, callbacks=lambda: [Ask(*request_)], **settings)


def test_an_end_that_is_asked_for_within_an_update_comes_after_it(run):
    found = run(ours, callbacks=lambda: [Ask("on_substep_end", 1, STOP)], gradient_accumulation_steps=2)
    assert found.state["global_step"] == 2


@pytest.mark.parametrize("threshold", [0.0, 10.0])
@pytest.mark.parametrize("by", ["steps", "epoch"])
def test_early_stopping_stops_where_it_stops_stock(run, by, threshold):
    settings = BEST | {"eval_strategy": by, "save_strategy": by}
    settings |= {"per_device_train_batch_size": 4, "num_train_epochs": 3}
    found = assert_alike(run, callbacks=lambda: [EarlyStoppingCallback(1, threshold)], **settings)
    stopped = {"steps": 4, "epoch": 8}[by]
    assert found.state["global_step"] == (stopped if threshold else 12)


def test_trackers_of_report_to_are_told_what_stock_tells_them(run):
    found = assert_alike(run, tracked=True, eval_strategy="epoch", save_strategy="epoch")
    assert {"loss", "grad_norm", "learning_rate", "epoch"} == found.history[0].keys() - {"step"}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="divides a resumed run's train_loss by all its steps"
)
@pytest.mark.parametrize(("accumulation", "step"), [(1, 2), (1, 4), (2, 2), (2, 3)])
def test_a_resumed_run_is_resumed_as_stock_is(run, accumulation, step):
    settings = {"save_strategy": "steps", "save_steps": step, "eval_strategy": "steps", "eval_steps": step}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "lora_dropout": 0.1}
    whole = assert_alike(run, num_train_epochs=2 * accumulation, **settings)
    resumed = assert_alike(run, num_train_epochs=2 * accumulation, resume=f"checkpoint-{step}", **settings)
    assert resumed.seen[1].global_step == step
    assert (resumed.adapter, resumed.history[:-1]) == (whole.adapter, whole.history[:-1])


def test_a_run_goes_on_after_an_epoch_that_was_left_early(run):
    settings = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, "num_train_epochs": 3}
    leave = {"callbacks": lambda: [Ask("on_step_end", 2, LEAVE_EPOCH)]}
    whole = run(ours, **leave, **settings)
    resumed = run(ours, **leave, **settings, resume="checkpoint-3")
    assert (resumed.adapter, resumed.history[:-1]) == (whole.adapter, whole.history[:-1])


def private(names) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def attributes(source: str) -> list[ast.Attribute]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]


def private_names_of_trainer() -> set[str]:
    of_self = [node.attr for node in attributes(inspect.getsource(Trainer)) if ast.unparse(node.value) == "self"]
    return private([*dir(Trainer), *of_self])


def test_no_private_name_of_trainer_is_overridden():
    own = [kind for kind in LoRATrainer.__mro__ if kind.__module__.startswith("component.")]
    assert sorted(private_names_of_trainer() & set().union(*map(vars, own))) == []


def test_at_most_three_private_names_of_trainer_are_used():
    sources = [path.read_text(encoding="utf-8") for path in Path(inspect.getfile(LoRATrainer)).parent.glob("*.py")]
    used = private_names_of_trainer() & {node.attr for source in sources for node in attributes(source)}
    assert len(used) <= 3, sorted(used)
