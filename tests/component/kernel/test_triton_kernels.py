"""Triton's kernels against their plain twins: on the card where there is one, else in Triton's interpreter."""

import os

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

ON_CARD = torch.cuda.is_available()
if not ON_CARD and "TRITON_INTERPRET" not in os.environ:  # which must be set before anything imports Triton
    pytest.skip("needs a card, or Triton's interpreter: make test-slow", allow_module_level=True)
from component.kernel import plain, triton_adamw, triton_kernels, triton_low_rank  # noqa: E402

from ..train import plain_adamw  # noqa: E402

pytestmark = pytest.mark.gpu if ON_CARD else pytest.mark.slow
DEVICE = "cuda" if ON_CARD else "cpu"
TOKENS, WIDTH, RANK = 70, 96, 8
SEED = torch.tensor(2**32 - 5, device=DEVICE)
# The interpreter multiplies bfloat16 as if its bits were integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_CARD else [])]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def same_draw():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(one, other):
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
        assert a.dtype == b.dtype
        half = b.dtype != torch.float32
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-2 if half else 5e-3 if ON_CARD and b.numel() > 1e6 else 1e-5), error


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("room", [0, 16])
def test_rms_norm(dtype, adds, room):
    x, weight = draw(TOKENS, WIDTH, dtype=dtype), draw(WIDTH, dtype=dtype)
    update = draw(TOKENS, WIDTH, dtype=dtype) if adds else None
    ours = triton_kernels.rms_norm(x, weight, 1e-5, update, room)
    assert ours[0].stride(0) == WIDTH + room
    assert_close(ours, plain.rms_norm(x, weight, 1e-5, update, room))


@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm_backward(dtype, adds):
    grad, x, weight = draw(TOKENS, WIDTH, dtype=dtype), draw(TOKENS, WIDTH, dtype=dtype), draw(WIDTH, dtype=dtype)
    residual = draw(TOKENS, WIDTH, dtype=dtype) if adds else None
    inputs = (grad, x, weight, 1e-5, residual)
    assert_close(triton_kernels.rms_norm_backward(*inputs), plain.rms_norm_backward(*inputs))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("angles", [4, 8], ids=["half a head", "whole heads"])
def test_rotate(dtype, interleaved, inverse, angles):
    states = draw(TOKENS, 11 * 16, dtype=dtype).unflatten(1, (11, 16))
    cos, sin = draw(TOKENS, angles), draw(TOKENS, angles)
    ours, theirs = states.clone(), states.clone()
    triton_kernels.rotate_(ours[:, :9], cos, sin, interleaved=interleaved, inverse=inverse)
    plain.rotate_(theirs[:, :9], cos, sin, interleaved=interleaved, inverse=inverse)
    assert_close(ours, theirs)
    assert torch.equal(ours[:, 9:], states[:, 9:])


def test_swiglu(dtype):
    gate_up = draw(TOKENS, 2 * WIDTH, dtype=dtype)
    assert_close(triton_kernels.swiglu(gate_up, 16), plain.swiglu(gate_up))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rank", [RANK, 200, 300])
@pytest.mark.parametrize("tensor_cores", [False, True], ids=["Turing", "Ampere"])
def test_low_rank_path(dtype, dropout, rank, tensor_cores, monkeypatch):
    monkeypatch.setattr(triton_low_rank, "uses_tensor_cores", lambda x: tensor_cores and x.dtype != torch.float32)
    x, down, grad = draw(TOKENS, WIDTH, dtype=dtype), draw(rank, WIDTH, dtype=dtype), draw(TOKENS, rank, dtype=dtype)
    wide = torch.cat((x, x), 1)[:, :WIDTH]
    ours = triton_kernels.lora_down_(x.new_empty(TOKENS, rank + 8)[:, :rank], wide, down, dropout, SEED)
    assert_close(ours, plain.lora_down_(x.new_empty(TOKENS, rank), x, down, dropout, SEED))
    assert_close(triton_kernels.lora_down_grad(grad, x, dropout, SEED), plain.lora_down_grad(grad, x, dropout, SEED))
    ours = triton_kernels.lora_input_grad_(x.clone(), grad, down, dropout, SEED)
    assert_close(ours, plain.lora_input_grad_(x.clone(), grad, down, dropout, SEED))


def test_copies_of_all_sizes_go_in_one_launch_and_follow_a_source_that_moves(dtype):
    sources = [draw(*shape) for shape in ((3, 5), (40, 96), (1, 3000))]
    wide = draw(40, 100, dtype=dtype)
    targets = [draw(3, 5, dtype=dtype), wide[:, 4:], draw(1, 3000, dtype=dtype)]
    copy = triton_kernels.copier(list(zip(sources, targets, (1.0, 0.25, 2.0), strict=True)))
    beside = wide[:, :4].clone()
    for _ in range(2):
        copy()
        for source, target, factor in zip(sources, targets, (1.0, 0.25, 2.0), strict=True):
            assert torch.equal(target, (source * factor).to(dtype))
        assert torch.equal(wide[:, :4], beside)
        sources[1].data = draw(40, 96)


@pytest.mark.parametrize("source", [draw(4, 6).double(), draw(6, 4).t()], ids=["float64", "turned"])
def test_a_source_that_is_not_dense_float32_is_refused(source):
    with pytest.raises(ValueError, match="what is copied must be dense, and float32"):
        triton_kernels.copier([(source, draw(4, 6), 1.0)])()


def test_the_mask_is_that_of_the_plain_operation_where_only_the_lower_half_of_a_hash_decides():
    ones = torch.ones(512, 1024, device=DEVICE)
    assert torch.equal(triton_low_rank.masked(ones, 0.7, SEED), plain.masked(ones, 0.7, SEED))


def test_cross_entropy(dtype):
    logits, targets = draw(9, 5000, dtype=dtype), torch.randint(5000, (9,), device=DEVICE)
    ours, theirs = logits.clone(), logits.clone()
    assert_close(triton_kernels.cross_entropy_(ours, targets), plain.cross_entropy_(theirs, targets))
    assert_close(ours, theirs)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_confident_token_keeps_its_gradient(half):
    logits = torch.zeros(1, 1000, dtype=half, device=DEVICE)
    logits[0, 7] = 16  # a probability of 1 - 999 * e**-16 / (1 + 999 * e**-16), which rounds to one
    triton_kernels.cross_entropy_(logits, torch.tensor([7], device=DEVICE))
    assert logits[0, 7].item() == pytest.approx(-1.1241e-4, rel=4e-3)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [576, 333], ids=["even", "odd"])
def test_dequantize(dtype, nested, kind, width):
    weight = draw(96, width, dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    ours = triton_kernels.dequantize_(draw(96, 600, dtype=dtype)[:, :width], packed, state)
    assert_close(ours, plain.dequantize_(torch.empty_like(weight), packed, state))
    assert (ours.float() - weight.float()).norm() < 0.2 * weight.float().norm()


def test_the_mask_drops_its_share_and_no_two_seeds_agree():
    masks = [plain.dropout_mask(1000, 1000, 0.05, seed, torch.device("cpu")) for seed in (77, 78)]
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.95, abs=1e-3)
        assert (mask[:, 1:] & mask[:, :-1]).float().mean().item() == pytest.approx(0.95**2, abs=1e-3)
        assert (mask[1:] & mask[:-1]).float().mean().item() == pytest.approx(0.95**2, abs=1e-3)
    assert (masks[0] & masks[1]).float().mean().item() == pytest.approx(0.95**2, abs=1e-3)


@pytest.mark.parametrize("sizes", [(4096, 48, 2048, 2064), (5000, 1, 2049, 7)], ids=["aligned", "unaligned"])
def test_adamw(sizes):
    ours = [tuple(part.abs() if at == 3 else part for at, part in enumerate(draw(4, size))) for size in sizes]
    theirs = [tuple(part.clone() for part in parts) for parts in ours]
    figures = [(0.9 - n / 10, 0.1 + n / 10, 0.99, 0.01, 1e-3, 0.1 * n, 1 - n / 100) for n in range(len(sizes))]
    rows = [*range(1, len(sizes)), 0]
    triton_adamw.prepare_adamw(ours, rows)(figures)
    plain_adamw.prepare_adamw(theirs, rows)(figures)
    for parts in zip(ours, theirs, strict=True):
        assert_close(*parts)
