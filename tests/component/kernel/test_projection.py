"""Linear layers of one input, with their low-rank paths."""

import pytest
import torch
from safetensors.torch import load_file

from component.kernel.decoder import FrozenProjection
from component.kernel.model import PackedForward
from component.kernel.plain import empty_with_room

from .conftest import make_model


def share_that_arrives(output: torch.Tensor, without: torch.Tensor, update: torch.Tensor) -> float:
    """How much of an exact update is in the difference of two outputs, by least squares."""
    return ((output.double() - without.double()) * update).sum().item() / update.square().sum().item()


@pytest.mark.parametrize(("name", "rank"), [("down", 16), ("down", 12), ("out", 16)])
def test_an_update_below_the_rounding_of_half_precision_arrives(bits, name, rank):
    """The low-rank path is added before the output's only rounding; a small update that is added to a rounded output,
    as PEFT does, disappears in it."""
    model = make_model("llama", rank=rank, dtype=torch.bfloat16, bits=bits)
    projection = getattr(PackedForward(model, 64).layers[0], name)
    (path,) = projection.paths
    x = torch.randn(8192, projection.in_features).bfloat16()
    x = empty_with_room(*x.shape, projection.room * (name == "down"), x).copy_(x)  # attention may leave no room
    with torch.no_grad():
        path.up.zero_()
        without, _ = projection.forward(x, None)
        path.up.normal_()
        update = x.double() @ projection.down().double().t() @ path.up.double().t() * path.scaling
        small = 3e-4 * without.double().std() / update.std()
        path.up.mul_(small)
        output, _ = projection.forward(x, None)
    assert share_that_arrives(output, without, small * update) == pytest.approx(1, abs=0.2)
    assert share_that_arrives(without + (small * update).bfloat16(), without, small * update) < 0.5


@pytest.mark.parametrize(("name", "rank"), [("qkv", 16), ("qkv", 12), ("out", 16)])
def test_what_decodes_rounds_as_what_trains(bits, name, rank):
    model = make_model("qwen2", rank=rank, dtype=torch.bfloat16, bits=bits)
    projection = getattr(PackedForward(model, 64).layers[0], name)
    x = torch.randn(9, projection.in_features).bfloat16()
    with torch.no_grad():
        frozen = FrozenProjection(projection, wide=False)
        outputs = [part.forward(x, None)[0] for part in (projection, frozen)]
        assert torch.equal(*outputs)
        assert torch.equal(frozen.without_adapter().forward(x, None)[0], frozen.product(x, projection.weight()))


def bytes_of_storages(model: torch.nn.Module) -> int:
    return sum({part.data_ptr(): part.nbytes() for part in (w.untyped_storage() for w in model.parameters())}.values())


def test_a_base_of_16_bits_lies_once_and_its_layers_stay_what_they_were(tmp_path):
    model = make_model("glm", bits=16)
    before, size = {name: weight.clone() for name, weight in model.state_dict().items()}, bytes_of_storages(model)
    layers = [PackedForward(model, 64).layers[0] for _ in range(2)]
    assert bytes_of_storages(model) == size
    attention, mlp = model.get_base_model().model.layers[0].self_attn, model.get_base_model().model.layers[0].mlp
    for layer in layers:  # what is built twice on one model shares its weights
        assert layer.qkv.weight().data_ptr() == attention.q_proj.base_layer.weight.data_ptr()
        assert layer.gate_up.weight().data_ptr() == mlp.gate_up_proj.base_layer.weight.data_ptr()
    assert layers[0].qkv.weight()[-1].equal(attention.v_proj.base_layer.weight[-1])

    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    read = load_file(tmp_path / "model.safetensors")
    assert read["model.layers.0.self_attn.k_proj.weight"].equal(merged.model.layers[0].self_attn.k_proj.weight)
    assert layers[0].qkv.weight()[64:96].equal(merged.model.layers[0].self_attn.k_proj.weight)


def test_a_base_of_another_type_than_the_arithmetic_is_rounded_to_it():
    model = make_model("llama", bits=16)
    model.get_base_model().model.layers[0].mlp.to(torch.bfloat16)
    projection = PackedForward(model, 64).layers[0].gate_up
    assert projection.weight().dtype == torch.float32
    assert projection.weight().shape == (192, 64)
