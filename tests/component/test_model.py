"""What is said of a machine and a model before anything is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch

from component.model import find_stops, sketch_base, warn_of_cpu
from component.run.errors import ArgumentError
from component.train.progress import ProgressReport

QWEN = {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}


@pytest.fixture
def configured(tmp_path):
    """Makes the settings of a model that is a configuration alone."""

    def make(**changes) -> SimpleNamespace:
        (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
        return SimpleNamespace(model_name_or_path=str(tmp_path))

    return make


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_model_of_billions_without_cuda_is_warned_of(configured, monkeypatch, log, has_cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    warn_of_cpu(configured())
    assert ["has 3.1 billion parameters and there is no CUDA" in line for line in log] == [True] * (not has_cuda)
    warn_of_cpu(configured(num_hidden_layers=2))
    assert len(log) == (not has_cuda), "a small one is not"


@pytest.mark.parametrize(
    ("eos", "stops"), [(1, {1}), ([1, 2], {1, 2}), (None, set()), ([[1], 2, "x"], {2}), ({"a": 1}, set())]
)
def test_the_stops_of_a_model_are_those_of_its_generation_config(configured, tmp_path, eos, stops):
    configured(eos_token_id=5)
    assert find_stops(str(tmp_path), SimpleNamespace(eos_token_id=5)) == {5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert find_stops(str(tmp_path), SimpleNamespace(eos_token_id=5)) == stops


def test_a_driver_that_torch_cannot_use_is_named(configured, monkeypatch, log, tmp_path):
    args = configured(num_hidden_layers=1)

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update …")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("component.model.DRIVER", str(tmp_path / "config.json"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    warn_of_cpu(args)
    (line,) = log
    assert "WARNING" in line
    assert "(The NVIDIA driver on your system is too old (found version 11040)), so this runs on the processor" in line
    assert "install a driver for CUDA 12.8 or newer" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    warn_of_cpu(args)
    monkeypatch.setattr("component.model.DRIVER", str(tmp_path / "absent"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    warn_of_cpu(args)
    assert len(log) == 1, "who hides the cards, or has none, knows"


@pytest.mark.parametrize("changes", [{"model_type": "t5"}, {"num_attention_heads": 0}, {"hidden_size": -1}])
def test_a_configuration_that_makes_no_language_model_is_a_fault(configured, changes):
    with pytest.raises(ArgumentError, match="Give a folder with all of the model's files"):
        sketch_base(configured(**changes).model_name_or_path)


@pytest.mark.parametrize(("seconds", "told"), [(360, "the other 99 take 9:54:00"), (1, None)])
def test_the_length_of_a_long_run_is_said_after_its_first_update(monkeypatch, log, seconds, told):
    state = SimpleNamespace(global_step=5, max_steps=105, is_world_process_zero=True)
    clock = iter([0.0, 10.0, 10.0 + seconds, 10.0 + 2 * seconds])
    monkeypatch.setattr("component.train.progress.time.monotonic", lambda: next(clock))
    report = ProgressReport(lambda: 0, show_bar=False)
    report.on_train_begin(None, state, None)
    for _ in range(2):
        state.global_step += not report.on_step_begin(None, state, None)
        report.on_step_end(None, state, None)
    assert [told in line for line in log] == [True] * bool(told)
