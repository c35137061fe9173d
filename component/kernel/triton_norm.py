"""Triton kernels of RMSNorm, and of the low-rank paths that read its output."""

import torch
import triton
import triton.language as tl

from .plain import empty_beside, empty_with_room, threshold
from .triton_low_rank import Blocks, block_of, fits, kept, lora_down_, lora_input_grad_

LOW = Blocks(16, 128, 8, 3)  # few tokens at a time, so that what is read twice is still in the card's cache
BACKWARD = Blocks(16, 128, 8, 3)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, update: torch.Tensor | None = None, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape
    out = empty_with_room(tokens, width, room, x)
    total = x if update is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(tokens,)](
        x, x if update is None else update, weight, out, total, width, out.stride(0), eps, update is not None, block,
        num_warps=8,
    )  # fmt: skip
    return out, total


@triton.jit
def rms_norm_kernel(
    x_ptr, update_ptr, weight_ptr, out_ptr, total_ptr, width, stride, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr
):
    """One token, its whole width."""
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    x = tl.load(x_ptr + row + columns, inside, 0.0)
    if ADDS:
        # Rounded like the sum that is stored, so that the norm is computed from the same values.
        x = (x.to(tl.float32) + tl.load(update_ptr + row + columns, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row + columns, x, inside)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
    out = out_ptr + tl.program_id(0).to(tl.int64) * stride
    tl.store(out + columns, (wide * inverse * weight).to(x.dtype), inside)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape
    out, again = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    adds = residual is not None
    rms_norm_backward_kernel[(tokens,)](
        grad, x, weight, residual if adds else x, out, again, width, eps, adds, block, num_warps=8
    )
    return out, again


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, residual_ptr, out_ptr, again_ptr, width, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr
):
    """One token, its whole width."""
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    x = tl.load(x_ptr + row + columns, inside, 0.0)
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = wide * inverse
    scaled = tl.load(grad_ptr + row + columns, inside, 0.0).to(tl.float32) * weight
    inner = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * inverse
    if ADDS:
        inner += tl.load(residual_ptr + row + columns, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row + columns, inner.to(x.dtype), inside)
    tl.store(again_ptr + row + columns, (normed * weight).to(x.dtype), inside)


def rms_norm_low(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    update: torch.Tensor | None,
    room: int,
    down: torch.Tensor,
    dropout: float,
    seed: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, width), rank = x.shape, down.shape[0]
    if not fits(x, rank):
        normed, total = rms_norm(x, weight, eps, update, room)
        return normed, total, lora_down_(empty_beside(normed, rank), normed, down, dropout, seed)
    normed = empty_with_room(tokens, width, room, x)
    low = empty_beside(normed, rank)
    total = x if update is None else torch.empty_like(x)
    rms_norm_low_kernel[(triton.cdiv(tokens, LOW.tokens),)](
        x, x if update is None else update, weight, down, normed, total, low, tokens, width, rank, normed.stride(0),
        low.stride(0), eps, seed, threshold(dropout), 1 / (1 - dropout), update is not None, dropout > 0,
        LOW.tokens, LOW.width, block_of(rank), num_warps=LOW.warps, num_stages=LOW.stages,
    )  # fmt: skip
    return normed, total, low


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit"])
def rms_norm_low_kernel(
    x_ptr, update_ptr, weight_ptr, down_ptr, out_ptr, total_ptr, low_ptr, tokens, width, rank, out_stride, low_stride,
    eps, seed_ptr, limit, scale, ADDS: tl.constexpr, DROPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of all outputs, over the whole width."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    ranks = tl.arange(0, RANK)[None, :]
    lines = rows.to(tl.int64) * width
    squares = tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)[None, :]
        inside = (rows < tokens) & (columns < width)
        x = tl.load(x_ptr + lines + columns, inside, 0.0)
        if ADDS:
            x = (x.to(tl.float32) + tl.load(update_ptr + lines + columns, inside, 0.0).to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + lines + columns, x, inside)
        squares += x.to(tl.float32) * x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
    tl.debug_barrier()  # what one thread has stored another may read
    if DROPS:
        seed = tl.load(seed_ptr)
    low = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = (rows < tokens) & (columns[None, :] < width)
        x = tl.load(total_ptr + lines + columns[None, :], inside, 0.0)
        weight = tl.load(weight_ptr + columns, columns < width, 0.0).to(tl.float32)
        down = tl.load(down_ptr + ranks * width + columns[:, None], (ranks < rank) & (columns[:, None] < width), 0.0)
        normed = x.to(tl.float32) * inverse * weight[None, :]
        tl.store(out_ptr + rows.to(tl.int64) * out_stride + columns[None, :], normed.to(x.dtype), inside)
        if DROPS:
            normed = tl.where(kept(rows, columns[None, :], width, seed, limit), normed, 0.0)
        low = tl.dot(normed.to(x.dtype), down, low)
    places = low_ptr + rows.to(tl.int64) * low_stride + ranks
    tl.store(places, (low * scale).to(low_ptr.dtype.element_ty), (rows < tokens) & (ranks < rank))


def rms_norm_low_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    low_grad: torch.Tensor,
    low: torch.Tensor,
    down: torch.Tensor,
    dropout: float,
    seed: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, width), rank = x.shape, down.shape[0]
    if not fits(x, rank):
        return rms_norm_backward(lora_input_grad_(grad, low_grad, down, dropout, seed), x, weight, eps, residual)
    out, again = torch.empty_like(x), torch.empty_like(x)
    adds = residual is not None
    rms_norm_low_backward_kernel[(triton.cdiv(tokens, BACKWARD.tokens),)](
        grad, x, weight, residual if adds else x, low_grad, low, down, out, again, tokens, width, rank,
        low_grad.stride(0), low.stride(0), eps, seed, threshold(dropout), 1 / (1 - dropout), adds, dropout > 0,
        BACKWARD.tokens, BACKWARD.width, block_of(rank), num_warps=BACKWARD.warps, num_stages=BACKWARD.stages,
    )  # fmt: skip
    return out, again


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit"])
def rms_norm_low_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, residual_ptr, low_grad_ptr, low_ptr, down_ptr, out_ptr, again_ptr,
    tokens, width, rank, low_grad_stride, low_stride, eps, seed_ptr, limit, scale, ADDS: tl.constexpr,
    DROPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of both outputs, over the whole width."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    ranks = tl.arange(0, RANK)
    lines = rows.to(tl.int64) * width
    squares, products = tl.zeros((TOKENS, WIDTH), tl.float32), tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)[None, :]
        inside = (rows < tokens) & (columns < width)
        x = tl.load(x_ptr + lines + columns, inside, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, columns < width, 0.0).to(tl.float32)
        squares += x * x
        products += x * weight * tl.load(grad_ptr + lines + columns, inside, 0.0).to(tl.float32)
    of_path = (rows < tokens) & (ranks[None, :] < rank)
    low_grad = tl.load(low_grad_ptr + rows.to(tl.int64) * low_grad_stride + ranks[None, :], of_path, 0.0)
    low = tl.load(low_ptr + rows.to(tl.int64) * low_stride + ranks[None, :], of_path, 0.0)
    inverse = tl.rsqrt(tl.sum(squares, 1) / width + eps)
    # The path is linear: its input gradient times its input is the gradient of its output times that.
    product = tl.sum(low_grad.to(tl.float32) * low.to(tl.float32), 1)
    mean = ((tl.sum(products, 1) * inverse + product) / width)[:, None]
    inverse = inverse[:, None]
    if DROPS:
        seed = tl.load(seed_ptr)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)[None, :]
        inside = (rows < tokens) & (columns < width)
        x = tl.load(x_ptr + lines + columns, inside, 0.0)
        grad = tl.load(grad_ptr + lines + columns, inside, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, columns < width, 0.0).to(tl.float32)
        down_inside = (ranks[:, None] < rank) & (columns < width)
        down = tl.load(down_ptr + ranks[:, None] * width + columns, down_inside, 0.0)
        factor = tl.where(kept(rows, columns, width, seed, limit), scale, 0.0) if DROPS else scale
        grad += tl.dot(low_grad, down) * factor
        normed = x.to(tl.float32) * inverse
        inner = (grad * weight - normed * mean) * inverse
        if ADDS:
            inner += tl.load(residual_ptr + lines + columns, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + lines + columns, inner.to(x.dtype), inside)
        tl.store(again_ptr + lines + columns, (normed * weight).to(x.dtype), inside)
