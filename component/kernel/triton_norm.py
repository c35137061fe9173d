"""Triton kernels of RMSNorm."""

import torch
import triton
import triton.language as tl

from .plain import empty_with_room


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
