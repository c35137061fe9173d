"""Fused layers on a CUDA card: Triton, flash attention and half precision against the plain path."""

import pytest
import torch

from component.kernel import attention, plain
from component.kernel.attention import Bounds
from component.kernel.head import HeadLoss
from component.kernel.layer import CHECKPOINTING
from component.kernel.memory import choose_plan
from component.kernel.model import PackedForward
from component.train.batch import PackingCollator

from .conftest import gradients, make_model, make_samples

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def run(model, samples):
    (row,) = PackingCollator(512).lay_out(samples)
    loss = model(**{key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in row.items()})
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_fused_equals_the_models_own_layers(family, dtype, tolerance, checkpointing):
    samples = make_samples((70, 1, 129, 35))
    plain = make_model(family, device=DEVICE, rank=16)
    PackedForward(plain, 512, fuses=False)
    expected = run(plain, samples)
    fused = make_model(family, device=DEVICE, rank=16, dtype=dtype)
    PackedForward(fused, 512).use(checkpointing)
    loss, grads = run(fused, samples)
    assert loss == pytest.approx(expected[0], rel=tolerance)
    for name, grad in expected[1].items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - grad).norm() <= tolerance * 2 * grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_equals_attention_sample_by_sample(dtype):
    torch.manual_seed(0)
    bounds = Bounds(torch.tensor([0, 100, 101, 300], dtype=torch.int32, device=DEVICE), 199)
    query, key, value = (torch.randn(300, heads, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2))
    grad = torch.randn_like(query)
    results = []
    for way in (attention.FLASH, attention.SAMPLE_BY_SAMPLE):
        context, saved = way.forward(query, key, value, bounds, 0.125)
        results.append((context, *way.backward(grad, query, key, value, context, saved, bounds, 0.125)))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()


def test_two_runs_are_one_bit_for_bit():
    model = make_model("chatglm", device=DEVICE, rank=16, dropout=0.1, dtype=torch.bfloat16)
    PackedForward(model, 512)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(run(model, make_samples((70, 1, 129, 35))))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_a_plan_is_proven_and_leaves_nothing_behind():
    model = make_model("llama", device=DEVICE, dtype=torch.bfloat16)
    forward = PackedForward(model, 512)
    state = torch.get_rng_state()
    plan = choose_plan(forward, None, "auto", 512, 0)
    assert (plan.tokens, plan.checkpointing) == (8192, "none")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_loss_scale_of_float16_is_applied_before_the_gradient_is_rounded():
    """65,536 does not exist in float16: as a factor of that type it makes every gradient of a first update infinite."""
    hidden = torch.full((4, 8), 0.01, dtype=torch.float16, device=DEVICE, requires_grad=True)
    learned, targets = torch.tensor([1, 3], device=DEVICE), torch.tensor([0, 5], device=DEVICE)
    head = torch.eye(8, dtype=torch.float16, device=DEVICE)
    loss = HeadLoss.apply(hidden, learned, targets, None, 0.0, head, plain, True)
    (loss * 65536).backward()
    assert hidden.grad[1].tolist() == pytest.approx([-57344.0, *[8192.0] * 7], rel=1e-3)
    assert hidden.grad[[0, 2]].abs().max() == 0


def test_a_mask_of_dropout_is_the_same_on_a_card():
    shape = 5000, 4096  # more than the card makes at a time
    masks = [plain.dropout_mask(*shape, 0.05, 2**32 - 5, torch.device(device)) for device in ("cpu", DEVICE)]
    assert torch.equal(masks[0], masks[1].cpu())
