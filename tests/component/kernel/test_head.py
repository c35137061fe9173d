"""The loss of the output head, and its gradient in half precision."""

import pytest
import torch

from component.kernel import plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_confident_token_keeps_its_gradient(dtype):
    """In half precision its probability rounds to one, from which nothing is left when one is subtracted."""
    logits = torch.zeros(2, 1000, dtype=dtype)
    logits[0, 7], logits[1, 3] = 16, 2
    exact = logits.double().softmax(-1)
    assert exact[0, 7].to(dtype) == 1
    exact[[0, 1], [7, 3]] -= 1
    assert exact[0, 7].item() == pytest.approx(-1.1241e-4, rel=1e-4)  # 999 / (999 + e**16)
    loss = plain.cross_entropy_(logits, torch.tensor([7, 3]))
    assert loss.item() == pytest.approx(1.1241e-4 + 4.9141, rel=1e-4)
    # The spacing of the type, and half of float16's smallest step, below which the other 999 gradients are.
    assert torch.allclose(logits.double(), exact, rtol=torch.finfo(dtype).eps, atol=2**-25)
