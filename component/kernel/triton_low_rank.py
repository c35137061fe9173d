"""Triton kernels of the low-rank paths and of their dropout."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .plain import matmul_float32, threshold

BLOCK = 1024  # elements that one program of an elementwise kernel handles
RANKS = 128  # that one program of a fused kernel takes


class Blocks(NamedTuple):
    """What one program of a kernel handles at a time, and how."""

    tokens: int
    width: int
    warps: int
    stages: int


@triton.jit
def survives(rows, columns, width, seed, limit):
    """Whether elements at these places are not dropped: those of plain.dropout_mask."""
    x = (rows * width).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32) + columns.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    # x ^ (x >> 16) >= limit: the lower halves count only where the upper ones, which x keeps, are the limit's.
    return (x ^ (limit.to(tl.uint32) >> 16)) >= limit.to(tl.uint32)


def masked(x: torch.Tensor, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    tokens, width = x.shape
    out = x.new_empty(tokens, width)
    masked_kernel[(tokens, triton.cdiv(width, BLOCK))](
        x, out, width, x.stride(0), seed, threshold(dropout), BLOCK, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["seed_ptr", "limit"])
def masked_kernel(x_ptr, out_ptr, width, stride, seed_ptr, limit, SIZE: tl.constexpr):
    """SIZE columns of one token."""
    seed = tl.load(seed_ptr)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, inside, 0.0)
    x = tl.where(survives(row, columns, width, seed, limit), x, 0.0).to(x.dtype)
    tl.store(out_ptr + row * width + columns, x, inside)


def uses_tensor_cores(x: torch.Tensor) -> bool:
    """Whether Triton multiplies by tensor cores. Without them its products do not fit the registers, on Turing not even
    the shared memory, and torch's are used instead."""
    return x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def fits(x: torch.Tensor, *ranks: int) -> bool:
    """Whether a kernel can do the work of low-rank paths on its way."""
    return uses_tensor_cores(x) and max(ranks) <= RANKS


def block_of(rank: int) -> int:
    """The smallest block of a product that holds so many ranks."""
    return max(triton.next_power_of_2(rank), 16)


def lora_down_(
    out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, dropout: float, seed: torch.Tensor
) -> torch.Tensor:
    if not dropout:
        return torch.mm(x, down.t(), out=out)
    if not uses_tensor_cores(x):
        return torch.mm(masked(x, dropout, seed), down.t(), out=out).div_(1 - dropout)
    tokens, width = x.shape
    rank = down.shape[0]
    ranks = min(block_of(rank), 128)
    grid = (triton.cdiv(tokens, 32), triton.cdiv(rank, ranks))
    lora_down_kernel[grid](
        x, down, out, tokens, width, rank, x.stride(0), out.stride(0), seed, threshold(dropout), 1 / (1 - dropout),
        32, 128, ranks, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit"])
def lora_down_kernel(
    x_ptr, down_ptr, out_ptr, tokens, width, rank, x_stride, out_stride, seed_ptr, limit, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """TOKENS rows and RANK columns of the output, over the whole width."""
    seed = tl.load(seed_ptr)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * x_stride
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        x = tl.load(x_rows + columns[None, :], (rows[:, None] < tokens) & (columns[None, :] < width), 0.0)
        x = tl.where(survives(rows[:, None].to(tl.int64), columns[None, :], width, seed, limit), x, 0.0).to(x.dtype)
        down = tl.load(
            down_ptr + ranks[None, :] * width + columns[:, None],
            (ranks[None, :] < rank) & (columns[:, None] < width),
            0.0,
        )
        total += tl.dot(x, down)
    places = out_ptr + rows[:, None].to(tl.int64) * out_stride + ranks[None, :]
    tl.store(places, (total * scale).to(out_ptr.dtype.element_ty), (rows[:, None] < tokens) & (ranks[None, :] < rank))


def lora_down_grad(grad: torch.Tensor, x: torch.Tensor, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    if not dropout:
        return matmul_float32(grad.t(), x)
    if not uses_tensor_cores(x):
        return matmul_float32(grad.t(), masked(x, dropout, seed)) / (1 - dropout)
    tokens, width = x.shape
    rank = grad.shape[1]
    ranks = min(block_of(rank), 128)
    columns, parts = triton.cdiv(width, 64), max(1, min(triton.cdiv(tokens, 1024), 8))
    share = triton.cdiv(triton.cdiv(tokens, parts), 64) * 64  # tokens that one program sums over
    sums = grad.new_empty(parts, rank, width, dtype=torch.float32)  # added up in order, so that runs are repeatable
    lora_down_grad_kernel[(columns, parts, triton.cdiv(rank, ranks))](
        grad, x, sums, tokens, width, rank, x.stride(0), seed, threshold(dropout), 1 / (1 - dropout), share, 64, 64,
        ranks, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums.sum(0)


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit", "share"])
def lora_down_grad_kernel(
    grad_ptr, x_ptr, sums_ptr, tokens, width, rank, stride, seed_ptr, limit, scale, share,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """RANK rows and WIDTH columns of one part's sum, over that part's `share` of the tokens."""
    seed = tl.load(seed_ptr)
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    first = tl.program_id(1) * share
    total = tl.zeros((RANK, WIDTH), tl.float32)
    for start in range(first, tl.minimum(first + share, tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        inside = rows < tl.minimum(first + share, tokens)
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :],
            inside[:, None] & (columns[None, :] < width),
            0.0,
        )
        x = tl.where(survives(rows[:, None].to(tl.int64), columns[None, :], width, seed, limit), x, 0.0).to(x.dtype)
        grad = tl.load(
            grad_ptr + rows[None, :].to(tl.int64) * rank + ranks[:, None],
            inside[None, :] & (ranks[:, None] < rank),
            0.0,
        )
        total += tl.dot(grad, x)
    places = sums_ptr + tl.program_id(1).to(tl.int64) * rank * width + ranks[:, None] * width + columns[None, :]
    tl.store(places, total * scale, (ranks[:, None] < rank) & (columns[None, :] < width))


def lora_input_grad_(
    total: torch.Tensor, grad: torch.Tensor, down: torch.Tensor, dropout: float, seed: torch.Tensor
) -> torch.Tensor:
    if not dropout:
        return total.addmm_(grad, down)
    tokens, width = total.shape
    rank = down.shape[0]
    ranks = block_of(rank)
    if ranks > 256 or not uses_tensor_cores(total):  # a block of more ranks does not fit the registers either
        return total.add_(masked(grad @ down, dropout, seed), alpha=1 / (1 - dropout))
    grid = (triton.cdiv(tokens, 64), triton.cdiv(width, 128))
    lora_input_grad_kernel[grid](
        total, grad, down, tokens, width, rank, total.stride(0), seed, threshold(dropout), 1 / (1 - dropout), 64, 128,
        ranks, num_warps=8, num_stages=2,
    )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit"])
def lora_input_grad_kernel(
    total_ptr, grad_ptr, down_ptr, tokens, width, rank, stride, seed_ptr, limit, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """TOKENS rows and WIDTH columns of the total."""
    seed = tl.load(seed_ptr)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    ranks = tl.arange(0, RANK)
    grad = tl.load(
        grad_ptr + rows[:, None].to(tl.int64) * rank + ranks[None, :],
        (rows[:, None] < tokens) & (ranks[None, :] < rank),
        0.0,
    )
    down = tl.load(
        down_ptr + ranks[:, None] * width + columns[None, :], (ranks[:, None] < rank) & (columns[None, :] < width), 0.0
    )
    share = tl.dot(grad, down) * scale
    share = tl.where(survives(rows[:, None].to(tl.int64), columns[None, :], width, seed, limit), share, 0.0)
    places = total_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows[:, None] < tokens) & (columns[None, :] < width)
    total = tl.load(places, inside, 0.0)
    tl.store(places, (total.to(tl.float32) + share).to(total.dtype), inside)
