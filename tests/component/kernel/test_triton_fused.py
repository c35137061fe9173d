"""Kernels that do a low-rank path's work on their way against their plain twins, on the card or in the interpreter."""

import os

import pytest
import torch

ON_CARD = torch.cuda.is_available()
if not ON_CARD and "TRITON_INTERPRET" not in os.environ:  # which must be set before anything imports Triton
    pytest.skip("needs a card, or Triton's interpreter: make test-slow", allow_module_level=True)
from component.kernel import plain, triton_kernels, triton_low_rank, triton_mlp  # noqa: E402

pytestmark = pytest.mark.gpu if ON_CARD else pytest.mark.slow
DEVICE = "cuda" if ON_CARD else "cpu"
WIDTH = 96
SEED = torch.tensor(2**32 - 5, device=DEVICE)
# The interpreter multiplies bfloat16 as if its bits were integers.
HALF = torch.bfloat16 if ON_CARD else torch.float16


@pytest.fixture(autouse=True)
def ampere(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_low_rank, "uses_tensor_cores", lambda x: x.dtype != torch.float32)


@pytest.fixture
def separate(monkeypatch) -> list:
    """Calls that no fused kernel took."""
    calls, run = [], triton_mlp.separate_backward_
    monkeypatch.setattr(triton_mlp, "separate_backward_", lambda *inputs: calls.append(inputs) or run(*inputs))
    return calls


def draw(*shape, dtype=HALF, spare=8) -> torch.Tensor:
    """Random values, in rows that stand apart."""
    return torch.randn(*shape[:-1], shape[-1] + spare, device=DEVICE).to(dtype)[..., : shape[-1]]


def assert_close(ours, theirs, dtype):
    """`dtype` is that of the inputs: in half precision the twin rounds more often."""
    bound = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}[dtype]
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).norm() <= bound * theirs.double().norm()


def lows_for(kind: str, tokens: int, rank: int, dtype: torch.dtype) -> list[tuple[slice, torch.Tensor]]:
    one, two = draw(tokens, 2 * rank, dtype=dtype).chunk(2, 1)
    gate, up = (slice(0, WIDTH), one), (slice(WIDTH, 2 * WIDTH), two)
    pairs = {"both": [(slice(0, 2 * WIDTH), one)], "each": [gate, up], "swapped": [up, gate], "gate": [gate]}
    return {**pairs, "up": [up], "none": [], "odd": [(slice(5, WIDTH), one)], "twice": [gate, gate]}[kind]


def run_backward(ops, tokens, rank, dropout, kind, dtype=HALF, down_rank=None):
    """(gradient of gate_up, gradient of down, gradients of the ups), from the same draw for any `ops`."""
    torch.manual_seed(1)
    down_rank = rank if down_rank is None else down_rank
    grad, gate_up = draw(tokens, WIDTH, dtype=dtype), draw(tokens, 2 * WIDTH, dtype=dtype, spare=0)
    low_grad, down = draw(tokens, down_rank, dtype=dtype, spare=0), draw(down_rank, WIDTH, dtype=dtype, spare=0)
    path = (low_grad * down_rank**-0.5, down) if down_rank else (None, None)
    lows = lows_for(kind, tokens, rank, dtype)
    down_grad, ups = ops.swiglu_backward_(grad, gate_up, *path, dropout, SEED if dropout else 0, lows)
    assert (down_grad is None) == (not down_rank)
    return [gate_up, *([] if down_grad is None else [down_grad]), *ups]


def assert_same_backward(*inputs, **options):
    pairs = zip(run_backward(triton_kernels, *inputs, **options), run_backward(plain, *inputs, **options), strict=True)
    for ours, theirs in pairs:
        assert_close(ours, theirs, options.get("dtype", HALF))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rank", [8, 64, 128])
@pytest.mark.parametrize("kind", ["both", "each", "swapped", "gate", "up", "none"])
def test_swiglu_backward(dropout, rank, kind, separate):
    assert_same_backward(70, rank, dropout, kind)
    assert not separate


@pytest.mark.parametrize("kind", ["both", "gate"])
def test_swiglu_backward_without_a_low_rank_path_in_the_down_projection(kind, separate):
    assert_same_backward(70, 8, 0.1, kind, down_rank=0)
    assert not separate


@pytest.mark.parametrize("tokens", [5, 1100])
def test_swiglu_backward_sums_over_fewer_tokens_than_a_block_and_over_several_parts(tokens, separate):
    assert_same_backward(tokens, 8, 0.1, "each", down_rank=64)
    assert not separate


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rank", "kind", "options"),
    [
        (200, "both", {}),
        (8, "each", {"down_rank": 200}),
        (8, "odd", {}),
        (8, "twice", {}),
        (8, "none", {"down_rank": 0}),
        (8, "each", {"dtype": torch.float32}),
    ],
)
def test_what_fits_no_kernel_is_computed_by_several(rank, kind, options, dropout, separate):
    assert_same_backward(70, rank, dropout, kind, **options)
    assert separate


def test_turing_has_no_tensor_cores_for_it(separate, monkeypatch):
    monkeypatch.setattr(triton_low_rank, "uses_tensor_cores", lambda x: False)
    assert_same_backward(70, 8, 0.1, "both")
    assert separate


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rank", [8, 64, 128, 200])
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_swiglu_low(dropout, rank, room, dtype):
    gate_up, down = draw(70, 2 * WIDTH, dtype=dtype, spare=0), draw(rank, WIDTH, dtype=dtype, spare=0)
    inputs = gate_up, rank * room, down, dropout, SEED
    activated, low = triton_kernels.swiglu_low(*inputs)
    assert activated.stride(0) == WIDTH + rank * room
    assert (low.data_ptr() == activated.data_ptr() + WIDTH * activated.element_size()) == room
    for ours, theirs in zip((activated, low), plain.swiglu_low(*inputs), strict=True):
        assert ours.stride() == theirs.stride()
        assert_close(ours, theirs, dtype)
