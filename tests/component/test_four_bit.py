"""4-bit weights made on a card and on a processor, since an adapter may be trained on one and used on the other."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.gpu
SHAPES = {  # of ChatGLM3-6B's layers; and one whose values fill neither a whole byte nor a whole group of 64
    "query_key_value": (4608, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (27392, 4096),
    "dense_4h_to_h": (4096, 13696),
    "odd sizes": (129, 333),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_card_and_a_processor_make_the_same_four_bits(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    made = []
    for device in ("cpu", "cuda"):
        packed, state = quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True, blocksize=64)
        parts = {
            "4-bit values": torch.cat((packed >> 4, packed & 15)),
            "8-bit scales": state.absmax,
            "scales of scales": state.state2.absmax,
            "offset": state.offset,
            "codes": torch.cat((state.code, state.state2.code)),
            "weight": dequantize_4bit(packed, state),
        }
        made.append({name: part.cpu() for name, part in parts.items()})
    ours, theirs = made
    differing = {name: (ours[name] != theirs[name]).sum().item() for name in ours}
    print({name: f"{count} of {ours[name].numel()}" for name, count in differing.items()})
    assert differing["codes"] == 0
    # The mean of all scales is summed in another order, so that a scale can fall on the other side of a step.
    assert ours["offset"].item() == pytest.approx(theirs["offset"].item(), rel=1e-5)
    assert differing["4-bit values"] <= 1e-6 * weight.numel()
    assert differing["8-bit scales"] <= 1e-2 * ours["8-bit scales"].numel()
    error = (ours["weight"].float() - theirs["weight"].float()).norm() / weight.float().norm()
    assert error < 1e-3
