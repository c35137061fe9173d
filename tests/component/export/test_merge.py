"""A merge is exact in float32, and its weights are those of training, or the base's own."""

import json
import math

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from component.export import merge
from component.export.merge import (
    Rounding,
    add_update,
    describe_rounding,
    merged_model,
    plan_merge,
    read_dtype,
    requantise,
    round_to_nf4,
    round_to_q8,
)
from component.model import four_bit, load_adapter
from component.run.errors import ArgumentError
from component.run.manifest import seal
from component.trust import identify_base

IDS = torch.arange(3, 43).reshape(2, 20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model) -> torch.Tensor:
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # as in training: where it is on, it computes in bfloat16
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def trained(folder, base=None, **settings):
    """Gives an adapter the manifest of a run with these settings."""
    described = {"base_model": identify_base(str(base))} if base else {}
    seal(folder, {"run": {"settings": settings, **described}})
    return folder


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("family", "tied"), [("chatglm", False), ("llama", False), ("llama", True)], ids=["chatglm", "llama", "tied"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_of_training_are_those_that_loading_in_4_bits_gives(
    model_folder, adapter_folder, family, tied, dtype
):
    base = model_folder(family, tie_word_embeddings=tied)
    adapter = adapter_folder(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    trained(adapter, base, compute_dtype=merge.name_of(dtype))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=four_bit(dtype)).dequantize()
    merged = merged_model(str(base), adapter, "trained", "float32").state_dict()
    assert {name: weight.dtype for name, weight in merged.items()} == dict.fromkeys(merged, torch.float32)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(merged[name], weight.float()), name


@pytest.mark.parametrize("family", ["chatglm", "llama"])
def test_each_merge_gives_the_logits_of_its_base_and_the_adapter(model_folder, adapter_folder, family):
    base = model_folder(family)
    adapter = trained(adapter_folder(base), base, compute_dtype="float32", base_bits=4)
    in_4_bits = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit(torch.float32))
    expected = {
        "trained": logits(load_adapter(in_4_bits, adapter)),
        "full": logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)),
    }
    assert (expected["trained"] - expected["full"]).abs().max() > 0.01
    for into, wanted in expected.items():
        assert (logits(merged_model(str(base), adapter, into)) - wanted).abs().max() <= 1e-5


def test_beside_a_base_in_16_bits_nothing_is_rounded(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = trained(adapter_folder(base), base, compute_dtype="float32", base_bits=16)
    plan = plan_merge(adapter)
    model, rounding = merge.merge(plan)
    wanted = logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert (plan.into, plan.bits, rounding.layers) == ("trained", 16, {})
    assert (logits(model) - wanted).abs().max() <= 1e-5
    assert "nothing was rounded" in describe_rounding(plan, rounding)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_weight_is_the_nearest_one_to_the_sum_in_float64(model_folder, adapter_folder, changes, dtype):
    base = model_folder("llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    adapter = adapter_folder(base, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)
    double = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    exact = PeftModel.from_pretrained(double, adapter).double().merge_and_unload().state_dict()
    merged = merged_model(str(base), adapter, "full").state_dict()
    differing = {name: (merged[name] != exact[name].to(dtype)).float().mean() for name in exact}
    assert max(differing.values()) < 1e-3
    assert all(differing[name] == 0 for name in exact if "q_proj" not in name and "down_proj" not in name)
    if not changes:  # peft's own safe merge rounds the update, and then the sum
        half = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        theirs = load_adapter(half, adapter).merge_and_unload(safe_merge=True).state_dict()
        name = "model.layers.1.self_attn.q_proj.weight"
        assert (theirs[name] != exact[name].to(dtype)).float().mean() > 0.05
        assert (merged[name] - exact[name]).norm() < (theirs[name] - exact[name]).norm()


def test_one_layer_at_a_time_is_in_float32(model_folder, adapter_folder, monkeypatch):
    base = model_folder("llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    wide = []

    def watched(layer, plan):
        def count(*_):
            wide.append(sum(one.weight.dtype == torch.float32 for one in linear))

        linear = [one for name, one in models[0].named_modules() if isinstance(one, nn.Linear) and "lora" not in name]
        original = layer.merge
        monkeypatch.setattr(layer, "merge", lambda **options: (count(), original(**options)))
        return add_update(layer, plan)

    models = []
    monkeypatch.setattr(merge, "add_update", watched)
    monkeypatch.setattr(merge, "load_adapter", lambda *args: models.append(load_adapter(*args)) or models[0])
    merged_model(str(base), adapter_folder(base), "full")
    assert wide == [1] * 14


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": None}, torch.float32),
    ],
    ids=["transformers 5", "transformers 4", "with its module", "of several parts", "by the weights"],
)
def test_the_type_of_the_result_is_the_bases_own(model_folder, config, dtype):
    base = model_folder("llama")
    change_config(base, **config)
    assert read_dtype(str(base), base / "config.json") == dtype


def test_a_base_whose_config_is_silent_has_the_type_of_most_of_its_weights(model_folder):
    base = model_folder("llama")
    weights = load_file(base / "model.safetensors")
    change_config(base, dtype=None)
    halves = {name: weight if "norm" in name else weight.half() for name, weight in weights.items()}
    save_file(halves, base / "model.safetensors", {"format": "pt"})
    assert read_dtype(str(base), base / "config.json") == torch.float16
    (base / "model.safetensors").unlink()
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, base / "pytorch_model.bin")
    assert read_dtype(str(base), base / "config.json") == torch.bfloat16


def test_a_type_that_is_none_of_ours_is_refused(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    change_config(base, dtype="float8_e4m3fn")
    with pytest.raises(ArgumentError, match=r"config.json: the base's dtype is 'float8_e4m3fn'; expected one of"):
        plan_merge(adapter)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_values_that_float16_cannot_hold_are_refused(model_folder, adapter_folder, name):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[5] = 7e4
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    told = f"--dtype float16: {name} has a value .* is 65,504.*; give --dtype bfloat16"
    with pytest.raises(ArgumentError, match=told):
        merged_model(str(base), adapter, "full", "float16")
    merged_model(str(base), adapter, "full", "bfloat16")


def test_the_manifest_decides_what_is_merged_into(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    assert (plan_merge(adapter).into, plan_merge(adapter).bits) == ("full", None)
    for settings, bits, compute_dtype in (
        ({}, 4, torch.float32),
        ({"compute_dtype": "bfloat16"}, 4, torch.bfloat16),
        ({"compute_dtype": "float16", "base_bits": 16}, 16, torch.float16),
    ):
        (adapter / "manifest.json").unlink(missing_ok=True)
        trained(adapter, base, **settings)
        plan = plan_merge(adapter)
        assert (plan.into, plan.bits, plan.compute_dtype, plan.dtype) == ("trained", bits, compute_dtype, torch.float32)
        assert plan_merge(adapter, into="full").into == "full"


@pytest.mark.parametrize("settings", [{"base_bits": 8}, {"base_bits": "4"}, {"base_bits": []}, {"compute_dtype": "x"}])
def test_a_manifest_with_values_that_there_are_not_is_refused(model_folder, adapter_folder, settings):
    adapter = trained(adapter_folder(model_folder("llama")), **settings)
    with pytest.raises(ArgumentError, match=r"manifest.json: base_bits is .* expected 4 or 16"):
        plan_merge(adapter)


def test_another_base_than_that_of_training_is_refused(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = trained(adapter_folder(base), base)
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match="was trained on a base with other weights"):
        plan_merge(adapter)


def test_a_base_that_is_saved_in_4_bits_is_merged_into_its_values(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    in_4_bits = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit(torch.float32))
    in_4_bits.save_pretrained(base)
    wanted = logits(load_adapter(in_4_bits, adapter))
    with pytest.raises(ArgumentError, match="the base is quantised"):
        plan_merge(adapter)
    plan = plan_merge(adapter, into="trained")
    model, rounding = merge.merge(plan)
    assert (logits(model) - wanted).abs().max() <= 1e-5
    assert "is not known" in describe_rounding(plan, rounding)
    assert not hasattr(model.config, "quantization_config")


def test_the_rounding_is_measured_beside_the_update(model_folder, adapter_folder, monkeypatch):
    """By hand: rounding to whole numbers moves 2 * 64 values by 0.25, so its norm is 0.25 * sqrt(128). With alpha 8 of
    rank 4, A of ones in its first row, and B of 0.5 in its first column, the update is 8 / 4 * 0.5 everywhere: its norm
    is sqrt(64 * 64) = 64."""
    base = model_folder("llama")
    weights = load_file(base / "model.safetensors")
    layer = "model.layers.1.self_attn.v_proj"
    weights[f"{layer}.weight"] = torch.eye(64)
    weights[f"{layer}.weight"][:2] += 0.25
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_folder(base, lora_alpha=8, target_modules=["v_proj"], task_type="CAUSAL_LM")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor.zero_()
        if "lora_A" in name:
            tensor[0] = 1
        elif "layers.1" in name:
            tensor[:, 0] = 0.5
    save_file(tensors, adapter / "adapter_model.safetensors")
    monkeypatch.setattr(merge, "round_to_nf4", torch.round)
    for into in ("trained", "full"):
        plan = plan_merge(adapter, into=into)
        rounding = merge.merge(plan)[1]
        assert rounding.layers.keys() == {layer.replace("1", "0"), layer}
        assert rounding.layers[layer] == pytest.approx((0.25 * math.sqrt(128), 64))
        assert rounding.layers[layer.replace("1", "0")][1] == 0
        told = describe_rounding(plan, rounding)
        assert f"from 0.0442 times in {layer} to inf in {layer.replace('1', '0')}" in told
        assert ("--into trained" in told) == (into == "full")


def test_ratios_of_roundings():
    rounding = Rounding({"a": (3.0, 6.0), "b": (4.0, 8.0 / 3), "c": (0.0, 0.0)})
    assert rounding.total == pytest.approx(5 / math.hypot(6, 8 / 3))
    assert rounding.by_layer() == {"c": 0, "a": 0.5, "b": pytest.approx(1.5)}
    assert Rounding({"a": (1.0, 0.0)}).total == math.inf


def test_requantising_to_4_bits_is_bitsandbytes(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    layer = model.model.layers[0].mlp.up_proj
    packed = Linear4bit(64, 64, bias=False, compress_statistics=True, quant_type="nf4")
    packed.weight = Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    packed.support_avx512bf16_for_cpu = False
    wanted = packed(torch.eye(64)).T
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    requantise(model, 4)
    assert torch.equal(layer.weight, wanted)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_rounding_again_to_4_bits_removes_a_small_update_of_rounded_values_and_keeps_some_of_others():
    """docs/quality.md: why a merge that will be rounded to 4 bits again is made into the full-precision base."""
    generator = torch.Generator().manual_seed(0)
    base, update = torch.randn(64, 256, generator=generator), 0.01 * torch.randn(64, 256, generator=generator)
    rounded = round_to_nf4(base)
    on_the_grid = round_to_nf4(rounded + update) - rounded
    off_the_grid = round_to_nf4(base + update) - rounded

    def arrives(change) -> float:
        """How much of the update is in the change, as the projection on it."""
        return ((change * update).sum() / update.square().sum()).item()

    assert abs(arrives(on_the_grid)) < 0.05
    assert arrives(off_the_grid) == pytest.approx(1, abs=0.3)


def test_8_bits_by_hand():
    """A block's scale is its largest magnitude over 127, as float16; a half step goes away from zero."""
    row = torch.zeros(1, 64)
    row[0, :5] = torch.tensor([127.0, 1.5, -1.5, 2.4, -126.6])
    row[0, 32] = -254.0
    row[0, 33] = 3.1
    expected = torch.zeros(1, 64)
    expected[0, :5] = torch.tensor([127.0, 2, -2, 2, -127])
    expected[0, 32], expected[0, 33] = -254, 4
    assert torch.equal(round_to_q8(row), expected)
    assert torch.equal(round_to_q8(row.bfloat16()), expected.bfloat16())
    odd = torch.randn(3, 40)
    assert torch.equal(round_to_q8(odd), odd)


@pytest.mark.slow
@pytest.mark.parametrize("std", [1e-6, 0.02, 1.0, 300.0])
def test_8_bits_are_ggufs(std):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * std
    weight[0, :32] = 0
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(round_to_q8(weight).numpy(), wanted)
