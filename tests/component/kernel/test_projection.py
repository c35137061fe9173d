"""Linear layers of one input, with their low-rank paths."""

import pytest
import torch

from component.kernel.model import PackedForward
from component.kernel.plain import empty_with_room

from .conftest import make_model


def share_that_arrives(output: torch.Tensor, without: torch.Tensor, update: torch.Tensor) -> float:
    """How much of an exact update is in the difference of two outputs, by least squares."""
    return ((output.double() - without.double()) * update).sum().item() / update.square().sum().item()


def test_an_update_below_the_rounding_of_half_precision_arrives():
    """One product adds the low-rank path before its only rounding; a small update that is added to a rounded output,
    as PEFT does, disappears in it."""
    projection = PackedForward(make_model("llama", rank=16, dtype=torch.bfloat16), 64).layers[0].down
    (path,) = projection.paths
    x = torch.randn(8192, projection.in_features).bfloat16()
    x = empty_with_room(*x.shape, projection.room, x).copy_(x)
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
