"""The operations of plain.py as Triton kernels for CUDA, with the same names, arguments and, up to rounding, results.

plain.py describes them. A kernel's docstring names the part of the output that one of its programs computes.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from . import plain
from .plain import matmul_float32
from .triton_low_rank import BLOCK, lora_down_, lora_down_grad, lora_input_grad_
from .triton_mlp import swiglu, swiglu_backward_, swiglu_low
from .triton_norm import rms_norm, rms_norm_backward

__all__ = [
    "copier",
    "cross_entropy_",
    "dequantize_",
    "lora_down_",
    "lora_down_grad",
    "lora_input_grad_",
    "matmul_float32",
    "rms_norm",
    "rms_norm_backward",
    "rotate_",
    "swiglu",
    "swiglu_backward_",
    "swiglu_low",
]


def dequantize_(out: torch.Tensor, packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    nested = state.state2
    scales, steps, offset = (nested.absmax, nested.code, state.offset) if nested else (state.absmax,) * 3
    rows, width = out.shape
    if width % 2:  # a byte would hold values of two rows
        return plain.dequantize_(out, packed, state)
    dequantize_kernel[(rows, triton.cdiv(width, 2 * BLOCK))](
        packed, state.absmax, scales, steps, offset, state.code, out, width, out.stride(0), state.blocksize,
        nested.blocksize if nested else 1, nested is not None, BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, scales_ptr, steps_ptr, offset_ptr, code_ptr, out_ptr, width, stride,
    GROUP: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """2 * SIZE values of one row, from SIZE bytes."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * SIZE + tl.arange(0, SIZE)  # a byte is two values of one group
    inside = pair < width // 2
    places = row * (width // 2) + pair
    group = places * 2 // GROUP
    absmax = tl.load(absmax_ptr + group, inside)
    if NESTED:
        absmax = tl.load(steps_ptr + absmax) * tl.load(scales_ptr + group // OUTER, inside) + tl.load(offset_ptr)
    packed = tl.load(packed_ptr + places, inside, 0)
    values = tl.interleave(tl.load(code_ptr + (packed >> 4)) * absmax, tl.load(code_ptr + (packed & 15)) * absmax)
    columns = tl.program_id(1) * 2 * SIZE + tl.arange(0, 2 * SIZE)
    tl.store(out_ptr + row * stride + columns, values.to(out_ptr.dtype.element_ty), columns < width)


def copier(copies: list[tuple[torch.Tensor, torch.Tensor, float]]) -> Callable[[], None]:
    """One launch for all of them, by a table that is made again when an address has changed."""
    table: list = []
    sources = [source for source, *_ in copies]

    def copy() -> None:
        places = list(map(torch.Tensor.data_ptr, sources))
        if not table or table[0] != places:
            table[:] = places, *copy_table(copies)
        _, blocks, numbers, factors = table
        copy_kernel[(len(blocks),)](blocks, numbers, factors, copies[0][1], len(copies), BLOCK, num_warps=4)

    return copy


def copy_table(copies: list[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, ...]:
    """(number of the copy of each block, facts of each copy (6, copies), factor of each copy).

    Raises:
        ValueError: a source is not what the kernel reads its address as.
    """
    if not all(source.dtype == torch.float32 and source.is_contiguous() for source, *_ in copies):
        raise ValueError("what is copied must be dense, and float32")
    device = copies[0][0].device
    counts = [triton.cdiv(source.numel(), BLOCK) for source, *_ in copies]
    firsts = [0, *accumulate(counts)][:-1]
    facts = [
        (source.data_ptr(), target.data_ptr(), source.numel(), source.shape[1], target.stride(0), first)
        for (source, target, _), first in zip(copies, firsts, strict=True)
    ]
    blocks = torch.arange(len(copies)).repeat_interleave(torch.tensor(counts)).int()
    factors = torch.tensor([factor for *_, factor in copies])
    return blocks.to(device), torch.tensor(facts).t().contiguous().to(device), factors.to(device)


@triton.jit
def copy_kernel(blocks_ptr, facts_ptr, factors_ptr, like_ptr, copies, SIZE: tl.constexpr):
    """SIZE values of one copy; `like_ptr` has the targets' type."""
    copy = tl.load(blocks_ptr + tl.program_id(0))
    facts = facts_ptr + copy
    source = tl.load(facts).to(tl.pointer_type(tl.float32))
    target = tl.load(facts + copies).to(like_ptr.dtype)
    count, width, stride = tl.load(facts + 2 * copies), tl.load(facts + 3 * copies), tl.load(facts + 4 * copies)
    places = (tl.program_id(0) - tl.load(facts + 5 * copies)) * SIZE + tl.arange(0, SIZE)
    values = tl.load(source + places, places < count, 0.0) * tl.load(factors_ptr + copy)
    tl.store(target + places // width * stride + places % width, values.to(like_ptr.dtype.element_ty), places < count)


def rotate_(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, inverse: bool = False
) -> torch.Tensor:
    tokens, heads, _ = states.shape
    angles = cos.shape[-1]
    rotate_kernel[(tokens, triton.cdiv(heads, 8))](
        states,
        cos,
        sin,
        states.stride(0),
        states.stride(1),
        heads,
        angles,
        -1.0 if inverse else 1.0,
        interleaved,
        8,
        triton.next_power_of_2(angles),
        num_warps=4,
    )
    return states


@triton.jit
def rotate_kernel(
    states_ptr,
    cos_ptr,
    sin_ptr,
    token_stride,
    head_stride,
    heads,
    angles,
    sign,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    ANGLES: tl.constexpr,
):
    """HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    angle = tl.arange(0, ANGLES)[None, :]
    inside = (head < heads) & (angle < angles)
    cos = tl.load(cos_ptr + token * angles + angle, angle < angles, 0.0)
    sin = tl.load(sin_ptr + token * angles + angle, angle < angles, 0.0) * sign
    base = states_ptr + token * token_stride + head * head_stride
    if INTERLEAVED:  # both of a pair in one read and one write
        column = tl.arange(0, 2 * ANGLES)[None, :]
        whole = (head < heads) & (column < 2 * angles)
        pairs = tl.load(base + column, whole, 0.0)
        one, two = tl.split(tl.reshape(pairs.to(tl.float32), (HEADS, ANGLES, 2)))
        turned = tl.join(one * cos - two * sin, two * cos + one * sin)
        tl.store(base + column, tl.reshape(turned, (HEADS, 2 * ANGLES)).to(pairs.dtype), whole)
    else:
        first = tl.load(base + angle, inside, 0.0)
        one, two = first.to(tl.float32), tl.load(base + angles + angle, inside, 0.0).to(tl.float32)
        tl.store(base + angle, (one * cos - two * sin).to(first.dtype), inside)
        tl.store(base + angles + angle, (two * cos + one * sin).to(first.dtype), inside)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    learned, vocab = logits.shape
    losses = logits.new_empty(learned, dtype=torch.float32)
    cross_entropy_kernel[(learned,)](logits, targets, losses, vocab, logits.stride(0), 4096, num_warps=16)
    return losses.sum(dtype=torch.float64)


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, vocab, stride, SIZE: tl.constexpr):
    """One learned position: its loss, and then the gradient in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    highest = -float("inf")
    total = 0.0
    for start in range(0, vocab, SIZE):  # the sum of exponentials, rescaled whenever a higher logit comes
        columns = start + tl.arange(0, SIZE)
        logits = tl.load(logits_ptr + columns, columns < vocab, -float("inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(logits - new), 0)
        highest = new
    log_total = highest + tl.log(total)
    tl.store(losses_ptr + row, log_total - tl.load(logits_ptr + target).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, vocab, SIZE):
        columns = start + tl.arange(0, SIZE)
        logits = tl.load(logits_ptr + columns, columns < vocab, -float("inf"))
        grad = tl.exp(logits.to(tl.float32) - log_total) - tl.where(columns == target, 1.0, 0.0)
        tl.store(logits_ptr + columns, grad.to(logits.dtype), columns < vocab)
