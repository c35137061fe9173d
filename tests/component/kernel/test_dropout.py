"""Dropout as a hash: what it must be whatever computes it."""

import pytest
import torch

from component.kernel import plain
from component.kernel.model import PackedForward

from .conftest import make_model


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(dropout):
    kept = plain.dropped(torch.ones(1000, 1000), dropout, seed=7)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
    assert kept.mean().item() == pytest.approx(1, abs=5e-3)


def test_every_projection_of_every_layer_has_a_mask_of_its_own():
    forward = PackedForward(make_model("llama", dropout=0.5), 64)
    seeds = forward.draw_seeds()
    drops = [projection.drop(seeds) for layer in forward.layers for projection in layer.projections]
    masks = [plain.dropout_mask(64, 64, *drop, torch.device("cpu")) for drop in drops]
    assert len(masks) == 4 * len(forward.layers)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_masks_seeds_follow_from_one_random_number_of_the_run():
    forward = PackedForward(make_model("llama", dropout=0.5), 64)
    torch.manual_seed(0)
    number = int(torch.randint(1 << 31, ()))
    torch.manual_seed(0)
    assert forward.draw_seeds().tolist() == [(number + n * 0x9E3779B9) % (1 << 32) for n in range(8)]
