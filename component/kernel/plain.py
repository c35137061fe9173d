"""Every operation of a fused layer in plain torch. They run where Triton cannot, and Triton's kernels must equal them.

`tokens` is the length of a packed row. Operations whose name ends in `_` overwrite their first argument. Gradients of
adapters are float32, everything else has its input's dtype; norms and rotations are computed in float32. `room`
asks for an output with that many spare columns after each row, as a view of a wider matrix. The `seed` of a dropout
mask is one int64 value on the device, which a kernel reads when it runs; 0 to 2**32 - 1.
"""

from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.nn.functional import silu

# Elements of a mask that are made at a time: in the processor's cache, and on a card by few launches.
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}


def dequantize_(out: torch.Tensor, packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Fill `out` (out_features, in_features), whose rows may stand apart, from 4-bit values, two a byte."""
    return out.copy_(dequantize_4bit(packed, state))


def copier(copies: list[tuple[torch.Tensor, torch.Tensor, float]]) -> Callable[[], None]:
    """A function that copies matrices of float32 into others of any type, each times its factor.

    Args:
        copies: (source, target, factor); sources are dense, rows of targets may stand apart.
    """

    def copy() -> None:
        for source, target, factor in copies:
            torch.mul(source.detach(), factor, out=target)

    return copy


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, update: torch.Tensor | None = None, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x + update, x + update), both (tokens, width); the sum is `x` itself where there is no update."""
    total = x if update is None else x + update
    return empty_with_room(*x.shape, room, x).copy_(normalise(total, eps) * weight.float()), total


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the norm's input plus `residual`, the norm's output once more), both (tokens, width)."""
    normed = normalise(x, eps)
    scaled = grad.float() * weight.float()
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    inner = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
    inner = inner if residual is None else inner + residual.float()
    return inner.to(x.dtype), (normed * weight.float()).to(x.dtype)


def normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate_(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, inverse: bool = False
) -> torch.Tensor:
    """Rotate the first 2 * angles dimensions of every head.

    Args:
        states: (tokens, heads, head_dim), a view whose last dimension is dense.
        cos, sin: float32 (tokens, angles).
        interleaved: pairs are (0, 1), (2, 3), … as in GLM; else (0, angles), (1, angles + 1), … as in Llama.
        inverse: turn back, which is also the gradient.
    """
    angles = cos.shape[-1]
    cos, sin = cos[:, None], -sin[:, None] if inverse else sin[:, None]
    if interleaved:
        first, second = states[..., 0 : 2 * angles : 2], states[..., 1 : 2 * angles : 2]
    else:
        first, second = states[..., :angles], states[..., angles : 2 * angles]
    one, two = first.float(), second.float()
    one, two = one * cos - two * sin, two * cos + one * sin
    first.copy_(one)
    second.copy_(two)
    return states


def swiglu(gate_up: torch.Tensor, room: int = 0) -> torch.Tensor:
    """(tokens, 2 * width) to silu(gate) * up, (tokens, width)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return empty_with_room(*gate.shape, room, gate_up).copy_(silu(gate.float()) * up.float())


def empty_with_room(tokens: int, width: int, room: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(tokens, width + room)[:, :width]


def swiglu_low(
    gate_up: torch.Tensor, room: int, down: torch.Tensor, dropout: float, seed: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(swiglu(gate_up, room), dropout(that) @ down.T (tokens, rank)); the latter lies in the room if it fills that."""
    activated = swiglu(gate_up, room)
    return activated, lora_down_(empty_beside(activated, len(down)), activated, down, dropout, seed)


def empty_beside(x: torch.Tensor, rank: int) -> torch.Tensor:
    """(tokens, rank) in the spare columns of `x` where it has just so many, else in memory of its own."""
    tokens, width = x.shape
    if x.stride(0) != width + rank:
        return x.new_empty(tokens, rank)
    return x.as_strided((tokens, rank), x.stride(), x.storage_offset() + width)


def swiglu_backward_(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    low_grad: torch.Tensor | None,
    down: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | int,
    lows: list[tuple[slice, torch.Tensor]],
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The MLP's backward between its two products: `gate_up` becomes its gradient, and `grad` is used up.

    Args:
        grad: (tokens, width), the gradient of swiglu(gate_up) through the base of the product that reads it.
        gate_up: (tokens, 2 * width).
        low_grad: (tokens, rank), the gradient between the halves of that product's low-rank path; None without one.
        down: (rank, width), the path's first half.
        dropout, seed: of the path's input.
        lows: columns of `gate_up`, and what the low-rank path that was added to them holds between its halves (tokens,
            its rank).

    Returns:
        The gradient of `down`, or None; for each of `lows`, the gradient of the second half (columns, its rank) that
        is still to be scaled.
    """
    if low_grad is not None:
        lora_input_grad_(grad, low_grad, down, dropout, seed)
    swiglu_grad_(grad, gate_up)
    down_grad = None if low_grad is None else lora_down_grad(low_grad, grad, dropout, seed)
    return down_grad, [matmul_float32(gate_up[:, columns].t(), low) for columns, low in lows]


def swiglu_grad_(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Turn `gate_up` (tokens, 2 * width) into its gradient, and `grad` (tokens, width) into swiglu(gate_up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide_gate, wide_up, wide_grad = gate.float(), up.float(), grad.float()
    sigmoid = wide_gate.sigmoid()
    activated = wide_gate * sigmoid
    grad_up, grad_gate = wide_grad * activated, wide_grad * wide_up * sigmoid * (1 + wide_gate * (1 - sigmoid))
    grad.copy_(activated * wide_up)
    up.copy_(grad_up)
    gate.copy_(grad_gate)


def dropout_mask(
    tokens: int, width: int, dropout: float, seed: torch.Tensor | int, device: torch.device
) -> torch.Tensor:
    """(tokens, width) bool, True where an element is kept: a hash of its place and the seed, the same on any device."""
    kept = torch.empty(tokens * width, dtype=torch.bool, device=device)
    chunk, seed = CHUNK[device.type], int(seed)
    for start in range(0, len(kept), chunk):
        part = kept[start : start + chunk]
        x = torch.arange(len(part), dtype=torch.int32, device=device)
        x.mul_(signed(0x9E3779B1)).add_(signed((start * 0x9E3779B1 + seed) & 0xFFFFFFFF))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            high = (x >> shift).bitwise_and_(0xFFFFFFFF >> shift)  # as an unsigned number would shift
            x.bitwise_xor_(high).mul_(signed(factor))
        torch.ge(x.bitwise_xor_(signed(1 << 31)), threshold(dropout) - (1 << 31), out=part)
    return kept.view(tokens, width)


def signed(number: int) -> int:
    """The int32 of the same 32 bits; its products wrap as those of unsigned numbers do."""
    return number - (1 << 32) if number >> 31 else number


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


def threshold(dropout: float) -> int:
    return round(dropout * 2**32)


def dropped(x: torch.Tensor, dropout: float, seed: torch.Tensor | int) -> torch.Tensor:
    """Apply dropout to `x`: the elements that are kept are scaled so that the mean stays."""
    return masked(x, dropout, seed) / (1 - dropout) if dropout else x


def masked(x: torch.Tensor, dropout: float, seed: torch.Tensor | int) -> torch.Tensor:
    return x * dropout_mask(*x.shape, dropout, seed, x.device) if dropout else x


def lora_down_(
    out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, dropout: float, seed: torch.Tensor | int
) -> torch.Tensor:
    """dropout(x) @ down.T into `out` (tokens, rank), from x (tokens, width) and down (rank, width)."""
    return torch.mm(dropped(x, dropout, seed), down.t(), out=out)


def lora_down_grad(grad: torch.Tensor, x: torch.Tensor, dropout: float, seed: torch.Tensor | int) -> torch.Tensor:
    """The gradient of `down`: grad.T @ dropout(x), float32 (rank, width), from grad (tokens, rank).

    It is scaled after the sum, so that nothing is rounded to half precision in between.
    """
    return matmul_float32(grad.t(), masked(x, dropout, seed)) / (1 - dropout)


def lora_input_grad_(
    total: torch.Tensor, grad: torch.Tensor, down: torch.Tensor, dropout: float, seed: torch.Tensor | int
) -> torch.Tensor:
    """Add the low-rank path's input gradient, grad @ down through dropout, to `total` (tokens, width)."""
    if not dropout:
        return total.addmm_(grad, down)
    return total.add_(dropped(grad @ down, dropout, seed))


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss, float64; `logits` (learned, vocab) become its gradient."""
    wide = logits.float()  # a float32 copy of half precision; float32 itself is overwritten at once
    log_total = wide.logsumexp(-1, keepdim=True)
    loss = (log_total - wide.gather(1, targets[:, None])).sum(dtype=torch.float64)
    wide.sub_(log_total).exp_()
    # Before the only rounding: a probability near one rounds to one, and leaves no gradient.
    wide[torch.arange(len(targets), device=wide.device), targets] -= 1
    logits.copy_(wide)
    return loss


def matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, float32, accumulated in float32 whatever the operands are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
