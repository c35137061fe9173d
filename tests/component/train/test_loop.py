"""The order of work in LoRATrainer's loop: what is done while a card is at work, and where the host waits for it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import TrainingArguments

from component.kernel.model import PackedForward
from component.train import adamw
from component.train.adamw import FusedAdamW
from component.train.batch import PackingCollator
from component.train.health import Health
from component.train.loss import TargetLMLoss
from component.train.trainer import LoRATrainer

from ..kernel.conftest import make_model, make_samples
from . import plain_adamw
from .test_updates import Stream


class Rows(list):
    """Samples that note when they are read, an update's together."""

    def __init__(self, samples, events):
        super().__init__(samples)
        self.events = events

    def __getitem__(self, number):
        if self.events[-1:] != ["read"]:
            self.events.append("read")
        return super().__getitem__(number)


def make_trainer(cls, folder, samples, device="cpu", **settings) -> LoRATrainer:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = make_model("llama", rank=16, dropout=0.1, device=device, dtype=dtype)
    PackedForward(model, 64)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    return cls(model=model, args=args, train_dataset=samples, data_collator=PackingCollator(64), loss=TargetLMLoss())


def test_the_next_update_is_read_before_the_gradients_of_this_one_are_needed(tmp_path):
    events = []

    class Noting(LoRATrainer):
        def forward_and_backward(self, update):
            events.append("backward")
            return super().forward_and_backward(update)

        def sum_gradients(self):
            events.append("agree")

        def step(self, *facts):
            super().step(*facts)
            events.append("step")

    trainer = make_trainer(Noting, tmp_path, Rows(make_samples(), events), optim="sgd", max_steps=3)
    trainer.train()
    epoch = ["read", "backward", "read", "agree", "step", "backward", "agree", "step"]
    assert events == [*epoch, *epoch[:2], *epoch[3:5]], "and none behind the run's last update"


def test_a_second_training_on_a_stream_goes_on_behind_the_last_update_that_was_learned(tmp_path):
    """The first one ends after an update, when the next one has been fetched."""
    places = []

    class Conversations(Stream):
        def __iter__(self):
            samples = make_samples()
            for row in super().__iter__():
                row.sample = samples[row.number % len(samples)]
                yield row

    class Noting(LoRATrainer):
        def step(self, *facts):
            super().step(*facts)
            places.append(self.updates.state_dict()["place"])
            self.control.should_training_stop = len(places) == 1

    trainer = make_trainer(Noting, tmp_path, Conversations(), optim="sgd", max_steps=2)
    trainer.train()
    trainer.train()
    assert places == [2, 4, 6]


def test_a_step_is_prepared_once_an_update_and_before_the_host_waits(tmp_path, monkeypatch):
    events = []

    def note(cls, name):
        method = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *facts: (events.append(name), method(self, *facts))[1])

    monkeypatch.setattr(adamw, "choose_ops", lambda device: None)
    monkeypatch.setattr(adamw, "prepare_launch", plain_adamw.prepare_adamw)
    note(FusedAdamW, "prepare")
    note(Health, "accepts")
    note(LoRATrainer, "step")
    trainer = make_trainer(LoRATrainer, tmp_path, make_samples(), optim="paged_adamw_32bit", max_steps=2)
    trainer.train()
    assert events == ["prepare", "accepts", "step"] * 2
    assert {state["step"] for state in trainer.optimizer.state.values()} == {2}


def test_layers_that_a_callback_has_put_to_evaluation_train_in_the_next_update(tmp_path):
    modes = []

    class Evaluating(LoRATrainer):
        def forward_and_backward(self, update):
            next(module for name, module in self.model.named_modules() if name.endswith("layers.1")).eval()
            losses = super().forward_and_backward(update)
            modes.append({module.training for module in self.model.modules()})
            return losses

    make_trainer(Evaluating, tmp_path, make_samples(), optim="sgd", max_steps=2).train()
    assert modes == [{True}, {True}]


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def noted_waits(waits: list[int]) -> Iterator[None]:
    """Add how often the host waited for the card."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits.append(sum("called a synchronizing CUDA operation" in str(warning.message) for warning in noted))


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_torch_fused"])
def test_the_host_waits_for_the_card_once_an_update(tmp_path, optim):
    """In `agree`. The first update compiles kernels and makes the optimizer's state."""
    waits = []

    class Hasty(LoRATrainer):
        def forward_and_backward(self, update):
            if not self.state.global_step:
                return super().forward_and_backward(update)
            with no_waiting():
                return super().forward_and_backward(update)

        def agree(self, *facts):
            if not self.state.global_step:
                return super().agree(*facts)
            with noted_waits(waits):
                return super().agree(*facts)

        def step(self, *facts):
            if not self.state.global_step:
                return super().step(*facts)
            with no_waiting():
                super().step(*facts)

        def log_evaluate_save(self):
            with no_waiting():
                super().log_evaluate_save()

    make_trainer(Hasty, tmp_path, make_samples(), "cuda", optim=optim, bf16=True).train()
    assert waits == [1] * 5
