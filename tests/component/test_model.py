"""What is said of a machine and a model before anything is loaded."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig

from component.chatglm import ChatGLMConfig
from component.model import (
    check_bits,
    find_linear_layers,
    find_stops,
    four_bit,
    load_base,
    longest_text,
    sketch_base,
    sketch_model,
    warn_of_cpu,
    warn_of_length,
)
from component.run.errors import ArgumentError, DoesNotFit
from component.settings.schema import QLoRAArguments
from component.train.progress import ProgressReport

QWEN = {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}


@pytest.fixture
def configured(tmp_path):
    """Makes the settings of a model that is a configuration alone."""

    def make(bits: int = 4, **changes) -> SimpleNamespace:
        (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
        return SimpleNamespace(model_name_or_path=str(tmp_path), base_bits=bits)

    return make


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_model_of_billions_without_cuda_is_warned_of(configured, monkeypatch, log, has_cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    warn_of_cpu(configured())
    assert ["has 3.1 billion parameters and there is no CUDA" in line for line in log] == [True] * (not has_cuda)
    warn_of_cpu(configured(num_hidden_layers=2))
    assert len(log) == (not has_cuda), "a small one is not"
    warn_of_cpu(configured(bits=16))
    assert ["in float32, a base of 16 bits takes 12 GB" in line for line in log] == [False, True] * (not has_cuda)


def test_samples_longer_than_the_base_was_made_for_are_warned_of(configured, log):
    args = QLoRAArguments(configured(max_position_embeddings=32_768).model_name_or_path, "x", max_seq_length=32_768)
    sketch_model(args)
    assert not [line for line in log if "was made for" in line]
    args = dataclasses.replace(args, max_seq_length=40_000)
    sketch_model(args)
    (line,) = [line for line in log if "was made for" in line]
    assert "max_seq_length is 40,000, and " in line
    assert " was made for 32,768 tokens: beyond them it has learned nothing; lower max_seq_length" in line


@pytest.mark.parametrize(
    ("rope", "reaches"),
    [
        ({"rope_type": "default"}, 32_768),
        ({"rope_type": "linear", "factor": 2.0}, 65_536),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8_192}, 32_768),
        ({"rope_type": "yarn", "factor": 4.0}, 131_072),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8_192}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            32_768,
        ),
    ],
)
def test_a_base_whose_positions_are_stretched_is_made_for_longer_texts(configured, rope, reaches):
    rope = rope | {"rope_theta": 10_000.0}
    config = AutoConfig.from_pretrained(
        configured(max_position_embeddings=32_768, rope_parameters=rope).model_name_or_path
    )
    assert longest_text(config) == reaches
    assert longest_text(SimpleNamespace()) == math.inf


@pytest.mark.parametrize(("positions", "longer"), [(8192, "chatglm3-6b-32k"), (32_768, "a base for longer texts")])
def test_the_base_for_longer_texts_is_named_where_it_is_known(positions, longer, log):
    base = SimpleNamespace(config=ChatGLMConfig(seq_length=positions))
    warn_of_length(base, QLoRAArguments("chatglm3-6b", "x", max_seq_length=40_000))
    (line,) = log
    assert line.strip().endswith(f"lower max_seq_length, or take {longer}")


@pytest.mark.parametrize("bits", [4, 16])
def test_a_base_has_the_bits_and_the_type_that_were_asked_for(model_folder, bits):
    folder = model_folder("llama")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = load_base(str(folder), bits, dtype, "cpu")
        kinds = {type(layer) for layer in find_linear_layers(model).values()}
        assert kinds == {Linear4bit if bits == 4 else torch.nn.Linear}
        kept = {weight.dtype for weight in model.parameters()}
        assert kept == ({dtype, torch.uint8} if bits == 4 else {dtype})


def test_a_base_that_was_saved_in_4_bits_has_no_16(configured):
    name = configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}).model_name_or_path
    check_bits(name, 4)
    with pytest.raises(ArgumentError, match=r"config.json: the base is saved quantised, .* set base_bits to 4"):
        load_base(name, 16, torch.float32, "cpu")


def test_a_base_that_does_not_fit_the_card_says_so(model_folder, monkeypatch):
    def fill(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 214.00 MiB. GPU 0 has …")

    monkeypatch.setattr("component.model.AutoModelForCausalLM.from_pretrained", fill)
    with pytest.raises(DoesNotFit, match=r"does not fit the card \(CUDA out of memory\): free .* set base_bits to 4"):
        load_base(str(model_folder("llama")), 16, torch.bfloat16, "cpu")


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


def test_a_base_that_is_said_to_be_quantised_and_is_not_is_refused(model_folder):
    folder = model_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    quantised = four_bit(torch.float32).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ArgumentError, match="says that it is quantised, and its weights are not"):
        load_base(str(folder), 4, torch.float32, "cpu")


def test_a_config_with_values_that_its_class_refuses_is_one_message(model_folder):
    folder = model_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(ArgumentError, match="attention heads"):
        load_base(str(folder), 16, torch.float32, "cpu")
