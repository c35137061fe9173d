"""The plain operations that do several things at once against autograd, in float32."""

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from component.kernel import plain

TOKENS, WIDTH, RANK, SEED = 9, 12, 4, 2**32 - 5


@pytest.fixture(params=[0.0, 0.3])
def dropout(request) -> float:
    torch.manual_seed(0)
    return request.param


def draw(*shape) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def assert_near(ours, theirs):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_mlps_backward_is_that_of_autograd(dropout):
    gate_up, base, down, low = draw(TOKENS, 2 * WIDTH), draw(WIDTH, 7), draw(RANK, WIDTH), draw(TOKENS, RANK)
    up_of_down, up, grad = draw(RANK, 7), draw(2 * WIDTH, RANK), torch.randn(TOKENS, 7)
    summed = gate_up + low @ up.t()
    summed.retain_grad()
    activated = silu(summed[:, :WIDTH]) * summed[:, WIDTH:]
    between = plain.dropped(activated, dropout, SEED) @ down.t()
    ((activated @ base + between @ up_of_down) * grad).sum().backward()
    with torch.no_grad():
        again, low_again = plain.swiglu_low(summed, RANK, down, dropout, SEED)
        assert_near(again, activated)
        assert_near(low_again, between)
        ours, lows = summed.clone(), [(slice(0, 2 * WIDTH), low)]
        through_base, low_grad = grad @ base.t(), grad @ up_of_down.t()
        down_grad, (up_grad,) = plain.swiglu_backward_(through_base, ours, low_grad, down, dropout, SEED, lows)
    assert_near(ours, summed.grad)
    assert_near(down_grad, down.grad)
    assert_near(up_grad, up.grad)


def test_the_norms_backward_is_that_of_autograd():
    x, update, weight = draw(TOKENS, WIDTH), draw(TOKENS, WIDTH), torch.randn(WIDTH)
    grad, residual = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    total = x + update
    total.retain_grad()
    normed = rms_norm(total, (WIDTH,), weight, 1e-5)
    ((normed * grad).sum() + (total * residual).sum()).backward()
    with torch.no_grad():
        for one, other in zip(plain.rms_norm(x, weight, 1e-5, update), (normed, total), strict=True):
            assert_near(one, other)
        out, again = plain.rms_norm_backward(grad, total, weight, 1e-5, residual)
    assert_near(out, total.grad)
    assert_near(again, normed)
