"""Weights that are read one at a time are those of the whole model, with and without an adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from component.export.merge import merge, plan_merge
from component.export.weights import ChatGLMWeights
from component.run.errors import ArgumentError
from component.run.manifest import seal

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # a buffer in the official files
DENSE = "transformer.encoder.layers.1.self_attention.dense.weight"


def check_equal(base, adapter, into: str, dtype: str) -> ChatGLMWeights:
    plan = plan_merge(adapter, str(base), into, dtype)
    model, rounding = merge(plan)
    weights = ChatGLMWeights(plan.base, plan.dtype, plan)
    state = model.state_dict()
    assert weights.shapes == {name: tuple(weight.shape) for name, weight in state.items()}
    for name, weight in state.items():
        read = weights.read(name)
        assert read.dtype == weight.dtype == plan.dtype and torch.equal(read, weight), name
    assert weights.rounding == rounding
    return weights


def trained(adapter, **settings):
    seal(adapter, {"run": {"settings": {"compute_dtype": "bfloat16", "base_bits": 4} | settings}})
    return adapter


@pytest.mark.parametrize("into", ["trained", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_a_whole_merge(model_folder, adapter_folder, into, dtype):
    base = model_folder()
    weights = check_equal(base, trained(adapter_folder(base)), into, dtype)
    assert len(weights.rounding.layers) == 8


@pytest.mark.parametrize("into", ["trained", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["layers.1.self_attention.dense", "dense_4h_to_h"]},
        {"target_modules": ["output_layer", "query_key_value"], "use_dora": True},
        {"target_modules": ["word_embeddings"]},
    ],
    ids=["rslora", "dora", "some layers", "the output layer", "the embedding"],
)
def test_weights_are_those_of_a_whole_merge_for_every_kind_of_adapter(model_folder, adapter_folder, changes, into):
    base = model_folder()
    shape = {"target_modules": ["query_key_value", "dense_h_to_4h"], "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    adapter = adapter_folder(base, **shape | changes)
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight + 0.03 for name, weight in load_file(file).items()}, file)
    check_equal(base, trained(adapter), into, "float32")


@pytest.mark.parametrize("settings", [{"base_bits": 16}, None], ids=["of 16 bits", "of another tool"])
def test_beside_a_base_that_was_not_rounded_or_is_not_recorded(model_folder, adapter_folder, settings):
    base = model_folder()
    adapter = adapter_folder(base)
    check_equal(base, trained(adapter, **settings) if settings else adapter, "trained", "bfloat16")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_weights_come_from_shards_as_publishers_lay_them_out(model_folder, adapter_folder, kind):
    base = model_folder()
    adapter = adapter_folder(base)
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file)
    state = {name: weight.half() for name, weight in load_file(base / "model.safetensors").items()}
    state[INV_FREQ] = torch.ones(4)
    (base / "model.safetensors").unlink()
    stem, save = ("pytorch_model", torch.save) if kind == "bin" else ("model", save_file)
    names = sorted(state)
    shards = {f"{stem}-0000{number + 1}-of-00002.{kind}": names[number::2] for number in range(2)}
    for shard, part in shards.items():
        save({name: state[name] for name in part}, base / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (base / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    weights = check_equal(base, adapter, "full", "float16")
    assert INV_FREQ not in weights.shapes


def test_without_an_adapter_weights_are_the_bases(model_folder):
    base = model_folder()
    weights = ChatGLMWeights(str(base), torch.bfloat16)
    for name, weight in AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(weights.read(name), weight), name


def change(file, name, change_weight) -> None:
    weights = load_file(file)
    if (weight := change_weight(weights.pop(name))) is not None:
        weights[name] = weight.contiguous()
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change_weight", "told"),
    [
        (lambda weight: None, f"{DENSE} is not there, and config.json asks for \\[64, 64\\]; fetch it again"),
        (lambda weight: weight[:3], f"{DENSE} has the shape \\[3, 64\\], and config.json asks for \\[64, 64\\]"),
    ],
)
def test_a_weight_that_is_missing_or_of_another_shape_is_refused_at_once(model_folder, change_weight, told):
    base = model_folder()
    change(base / "model.safetensors", DENSE, change_weight)
    with pytest.raises(ArgumentError, match=told):
        ChatGLMWeights(str(base), torch.float32)


def test_values_that_are_not_finite_are_refused_when_they_are_read(model_folder):
    base = model_folder()
    change(base / "model.safetensors", DENSE, lambda weight: weight.index_fill(0, torch.tensor(3), 7e4))
    with pytest.raises(ArgumentError, match=f"--dtype float16: {DENSE} has a value .* 65,504.*; give --dtype bfloat16"):
        ChatGLMWeights(str(base), torch.float16).read(DENSE)
    change(base / "model.safetensors", DENSE, lambda weight: weight * torch.inf)
    with pytest.raises(ArgumentError, match=f"^{DENSE}: the base has a value there that is not finite; fetch it again"):
        ChatGLMWeights(str(base), torch.bfloat16).read(DENSE)


LORA_B = f"base_model.model.{DENSE.replace('weight', 'lora_B.weight')}"


@pytest.mark.parametrize(
    ("change_weight", "told"),
    [
        (lambda weight: weight * torch.nan, f"{LORA_B} and 0 others are not finite; take an earlier checkpoint"),
        (lambda weight: None, f"{LORA_B} is missing, and target_modules in adapter_config.json asks for it"),
        (lambda weight: weight[:8], f"{LORA_B} of shape \\[8, 4\\] has no place in .*; give its base"),
    ],
    ids=["not finite", "missing", "of another shape"],
)
def test_an_adapter_that_does_not_fit_is_refused_before_a_weight_is_read(
    model_folder, adapter_folder, change_weight, told
):
    base = model_folder()
    adapter = adapter_folder(base)
    change(adapter / "adapter_model.safetensors", LORA_B, change_weight)
    plan = plan_merge(adapter)
    with pytest.raises(ArgumentError, match=told):
        ChatGLMWeights(plan.base, plan.dtype, plan)


def test_another_family_and_a_quantised_base_are_refused(model_folder):
    with pytest.raises(ArgumentError, match="its model_type is 'llama', and not ChatGLM2's or 3's"):
        ChatGLMWeights(str(model_folder("llama")), torch.float32)
    base = model_folder()
    config = json.loads((base / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(ArgumentError, match="it is saved quantised; merge it first"):
        ChatGLMWeights(str(base), torch.float32)
