"""Whole runs in float16, as cards without bfloat16 train: on a card, or with a card's loss scaler on the processor."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from component.kernel import model as kernel_model
from component.run.resume import find_checkpoints
from component.settings import machine
from component.train.trainer import LoRATrainer

from .runs import adapter, assert_same_run, at_call, history, largest_difference, losses, overflow, send

ON_CARD = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if ON_CARD else []
STEPS = 20 if ON_CARD else 8  # half precision is slow on processors
SETTINGS = {"compute_dtype": "float16", "max_steps": STEPS, "lora_dropout": 0.05}
SETTINGS |= {"save_strategy": "steps", "save_steps": STEPS // 2}
SAID = "a gradient was too large for float16, so no weight has changed; the loss scale is {:,.0f} from here on"


@pytest.fixture(autouse=True)
def scaler_of_a_card(monkeypatch):
    """On a processor, the type that was asked for, and the scaler that accelerate makes on a card."""
    if ON_CARD:
        return
    begin = Accelerator.__init__

    def begin_with_scaler(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(machine, "choose_compute_dtype", lambda asked, *_: asked)
    monkeypatch.setattr(Accelerator, "__init__", begin_with_scaler)


@pytest.fixture(params=["chatglm", pytest.param("llama", marks=pytest.mark.slow)])
def settings(request, model_folder) -> dict:
    return SETTINGS | {"model_name_or_path": str(model_folder(request.param))}


def scaler(folder: Path) -> dict:
    """The scaler's state in the last checkpoint."""
    return torch.load(find_checkpoints(folder)[-1] / "scaler.pt", weights_only=True)


def test_a_float16_run_learns_what_a_bfloat16_run_learns(job, settings):
    half = job("half", **settings)
    wide = job("wide", **settings | {"compute_dtype": "bfloat16"})
    assert losses(half) == pytest.approx(losses(wide), rel=0.05)
    assert losses(half)[-1] < losses(half)[0] / 2
    plain = job("plain", **settings | {"base_bits": 16})
    assert losses(plain)[-1] < losses(plain)[0] / 2


def test_a_stopped_float16_run_goes_on_as_if_nothing_had_been(job, stopped, tmp_path, settings):
    with at_call(3, LoRATrainer, "agree", overflow):
        whole = job("whole", **settings)
    with (
        at_call(3, LoRATrainer, "agree", overflow),
        at_call(5, LoRATrainer, "forward_and_backward", send(signal.SIGTERM)),
    ):
        assert stopped("stopped", **settings) == 143
    assert scaler(tmp_path / "stopped")["scale"] < 65536  # with which torch begins
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")
    assert scaler(whole) == scaler(tmp_path / "stopped")


def test_an_update_that_overflows_changes_nothing_and_is_said(job, capsys):
    settings = SETTINGS | {"lr_scheduler_type": "constant", "save_strategy": "no"}
    two = job("two", **settings | {"max_steps": 2})
    capsys.readouterr()
    with at_call(3, LoRATrainer, "agree", overflow):
        three = job("three", **settings | {"max_steps": 3})
    assert capsys.readouterr().err.count(f"step 3: {SAID.format(32768)}") == 1
    assert largest_difference(two, three) == 0
    assert [("grad_norm" in entry) for entry in history(three)[:3]] == [True, True, False]


def test_a_loss_scale_that_is_too_large_is_halved_until_gradients_fit_and_each_time_said(job, settings, capsys):
    def raise_scale(trainer: LoRATrainer) -> None:
        trainer.accelerator.scaler.update(2.0**30)

    with at_call(2, LoRATrainer, "forward_and_backward", raise_scale):
        folder = job(**settings | {"max_steps": 20, "save_steps": 20})
    said = capsys.readouterr().err
    halved = said.count("a gradient was too large for float16")
    assert halved >= 5
    assert all(SAID.format(2.0 ** (29 - number)) in said for number in range(halved))

    assert losses(folder)[-1] < losses(folder)[0]
    assert all(weight.isfinite().all() for weight in adapter(folder / "final").values())


def test_gradients_that_fit_at_no_scale_end_the_run(stopped, tmp_path, monkeypatch, capsys):
    agree = LoRATrainer.agree
    monkeypatch.setattr(LoRATrainer, "agree", lambda trainer, *facts: overflow(trainer) or agree(trainer, *facts))
    assert stopped(**SETTINGS | {"max_steps": 30}) == 3
    said = capsys.readouterr().err
    assert said.count("a gradient was too large for float16") == 20
    assert "step 21: the gradient is not finite" in said
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="needs Triton's interpreter: make test-slow")
@pytest.mark.slow
def test_with_the_kernels_of_a_turing_card_a_run_is_the_same(job, settings, monkeypatch):
    from component.kernel import triton_kernels

    settings |= {"max_steps": 4, "per_device_train_batch_size": 1, "save_steps": 2}
    plain = job("plain", **settings)
    monkeypatch.setattr(kernel_model, "choose_ops", lambda device: triton_kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    fused = job("fused", **settings)
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-3)
