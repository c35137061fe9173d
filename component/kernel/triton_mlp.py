"""Triton kernels between the MLP's two products: SwiGLU, and what low-rank paths do with the tensors that it reads."""

import torch
import triton
import triton.language as tl

from .plain import empty_beside, empty_with_room, matmul_float32, threshold
from .triton_low_rank import (
    BLOCK,
    Blocks,
    block_of,
    fits,
    lora_down_,
    lora_down_grad,
    lora_input_grad_,
    survives,
)

LOW = Blocks(32, 128, 4, 3)
BACKWARD = Blocks(64, 32, 4, 1)
HOPPER_BACKWARD = Blocks(32, 64, 4, 3)  # their products read shared memory, and leave registers free
WIDE_BACKWARD = Blocks(64, 32, 8, 1)
PROGRAMS = 1712  # that share the backward of a row


def swiglu(gate_up: torch.Tensor, room: int = 0) -> torch.Tensor:
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty_with_room(tokens, width, room, gate_up)
    swiglu_kernel[(tokens, triton.cdiv(width, BLOCK))](gate_up, out, width, out.stride(0), BLOCK, num_warps=4)
    return out


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, stride, SIZE: tl.constexpr):
    """SIZE columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    gate = tl.load(gate_up_ptr + token * 2 * width + columns, inside, 0.0)
    up = tl.load(gate_up_ptr + token * 2 * width + width + columns, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + token * stride + columns, (wide * tl.sigmoid(wide) * up).to(gate.dtype), inside)


def swiglu_low(
    gate_up: torch.Tensor, room: int, down: torch.Tensor, dropout: float, seed: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width, rank = gate_up.shape[0], gate_up.shape[1] // 2, down.shape[0]
    if not dropout or not fits(gate_up, rank):
        activated = swiglu(gate_up, room)
        return activated, lora_down_(empty_beside(activated, rank), activated, down, dropout, seed)
    activated = empty_with_room(tokens, width, room, gate_up)
    low = empty_beside(activated, rank)
    swiglu_low_kernel[(triton.cdiv(tokens, LOW.tokens),)](
        gate_up, down, activated, low, tokens, width, rank, activated.stride(0), low.stride(0), seed,
        threshold(dropout), 1 / (1 - dropout), LOW.tokens, LOW.width, block_of(rank),
        num_warps=LOW.warps, num_stages=LOW.stages,
    )  # fmt: skip
    return activated, low


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit"])
def swiglu_low_kernel(
    gate_up_ptr, down_ptr, out_ptr, low_ptr, tokens, width, rank, out_stride, low_stride, seed_ptr, limit, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of both outputs, over the whole width."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    ranks = tl.arange(0, RANK)[None, :]
    gates, outs = gate_up_ptr + rows.to(tl.int64) * 2 * width, out_ptr + rows.to(tl.int64) * out_stride
    seed = tl.load(seed_ptr)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = (rows < tokens) & (columns[None, :] < width)
        gate = tl.load(gates + columns[None, :], inside, 0.0)
        up = tl.load(gates + width + columns[None, :], inside, 0.0).to(tl.float32)
        down = tl.load(down_ptr + ranks * width + columns[:, None], (ranks < rank) & (columns[:, None] < width), 0.0)
        wide = gate.to(tl.float32)
        activated = wide * logistic(wide) * up
        tl.store(outs + columns[None, :], activated.to(gate.dtype), inside)
        activated = tl.where(survives(rows, columns[None, :], width, seed, limit), activated, 0.0)
        total = tl.dot(activated.to(gate.dtype), down, total)
    places = low_ptr + rows.to(tl.int64) * low_stride + ranks
    tl.store(places, (total * scale).to(low_ptr.dtype.element_ty), (rows < tokens) & (ranks < rank))


def swiglu_backward_(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    low_grad: torch.Tensor | None,
    down: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | int,
    lows: list[tuple[slice, torch.Tensor]],
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    tokens, width = grad.shape
    rank = 0 if low_grad is None else low_grad.shape[1]
    halves = by_half(lows, width)
    ranks = (rank, *(0 if low is None else low.shape[1] for low in halves or ()))
    if halves is None or not any(ranks) or not fits(grad, *ranks):
        return separate_backward_(grad, gate_up, low_grad, down, dropout, seed, lows)
    blocks = HOPPER_BACKWARD if is_hopper_or_server_blackwell(grad.device) else BACKWARD
    if sum(block_of(rank) for rank in ranks if rank) > 192:
        blocks = WIDE_BACKWARD
    columns = triton.cdiv(width, blocks.width)
    parts = max(1, min(PROGRAMS // columns, triton.cdiv(tokens, 8 * blocks.tokens)))
    share = triton.cdiv(triton.cdiv(tokens, parts), blocks.tokens) * blocks.tokens  # tokens that one program sums over
    sums = grad.new_empty(parts, sum(ranks) * width, dtype=torch.float32)  # added up in order, so runs are repeatable
    read = [grad if x is None else x for x in (low_grad, *halves)]  # what is None is not read
    swiglu_backward_kernel[(columns, parts)](
        grad, gate_up, grad if down is None else down, *read, sums, tokens, width, *ranks,
        grad.stride(0), *(x.stride(0) for x in read), seed, threshold(dropout), 1 / (1 - dropout), share,
        dropout > 0, read[1] is read[2], blocks.tokens, blocks.width, *(rank and block_of(rank) for rank in ranks),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    total = sums[0] if parts == 1 else sums.sum(0)
    ups = []
    for part, low in lows:
        size = part.stop - part.start, low.shape[1]
        start = rank * width + part.start * ranks[1]
        ups.append(total[start : start + size[0] * size[1]].view(size))
    return None if low_grad is None else total[: rank * width].view(rank, width), ups


def is_hopper_or_server_blackwell(device: torch.device) -> bool:
    return device.type != "cpu" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def by_half(lows: list[tuple[slice, torch.Tensor]], width: int) -> list[torch.Tensor | None] | None:
    """The low-rank path of each half, gate and up, or None; None for both where they do not lie along halves."""
    halves: list[torch.Tensor | None] = [None, None]
    for columns, low in lows:
        of_pair = {(0, 2 * width): (0, 1), (0, width): (0,), (width, 2 * width): (1,)}.get(
            (columns.start, columns.stop)
        )
        if of_pair is None or any(halves[half] is not None for half in of_pair):
            return None
        for half in of_pair:
            halves[half] = low
    return halves


def separate_backward_(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    low_grad: torch.Tensor | None,
    down: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | int,
    lows: list[tuple[slice, torch.Tensor]],
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """swiglu_backward_ by a kernel for each of its parts."""
    if low_grad is not None:
        lora_input_grad_(grad, low_grad, down, dropout, seed)
    swiglu_grad_(grad, gate_up)
    down_grad = None if low_grad is None else lora_down_grad(low_grad, grad, dropout, seed)
    return down_grad, [matmul_float32(gate_up[:, columns].t(), low) for columns, low in lows]


@triton.jit(do_not_specialize=["tokens", "seed_ptr", "limit", "share"])
def swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, down_ptr, low_grad_ptr, gate_low_ptr, up_low_ptr, sums_ptr,
    tokens, width, rank, gate_rank, up_rank, grad_stride, low_grad_stride, gate_low_stride, up_low_stride,
    seed_ptr, limit, scale, share, DROPS: tl.constexpr, SAME: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of both halves for `share` tokens, and of one part's sums over these: those of `down`'s gradient
    and those, transposed, of the gradients of the low-rank paths of both halves. A rank of 0 is a path that is not."""
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    if DROPS:
        seed = tl.load(seed_ptr)
    if RANK:
        ranks = tl.arange(0, RANK)[:, None]
        down = tl.load(down_ptr + ranks * width + columns, (ranks < rank) & (columns < width), 0.0)
        down_total = tl.zeros((RANK, WIDTH), tl.float32)
    if GATE_RANK:
        gate_total = tl.zeros((GATE_RANK, WIDTH), tl.float32)
    if UP_RANK:
        up_total = tl.zeros((UP_RANK, WIDTH), tl.float32)
    for start in range(first, last, TOKENS):
        rows = start + tl.arange(0, TOKENS)[:, None]
        inside = (rows < last) & (columns < width)
        gates = gate_up_ptr + rows.to(tl.int64) * 2 * width + columns
        grad = tl.load(grad_ptr + rows.to(tl.int64) * grad_stride + columns, inside, 0.0)
        gate, up = tl.load(gates, inside, 0.0), tl.load(gates + width, inside, 0.0)
        wide, up, grad = gate.to(tl.float32), up.to(tl.float32), grad.to(tl.float32)
        if RANK:
            low_grad = load_rows(low_grad_ptr, rows, low_grad_stride, last, rank, RANK)
            through_down = tl.dot(low_grad, down)
            # Beyond the last row all are zeros. This gives what follows the layout of a product's result at once; else
            # it would be brought from the layout of loads into that in the midst, in float32.
            wide = tl.where(rows < last, wide, through_down)
        sigmoid = logistic(wide)
        activated = wide * sigmoid
        if RANK:
            whole, factor = activated * up, scale
            if DROPS:
                alive = survives(rows, columns, width, seed, limit)
                whole, factor = tl.where(alive, whole, 0.0), tl.where(alive, scale, 0.0)
            grad += through_down * factor
            down_total = tl.dot(tl.trans(low_grad), whole.to(gate.dtype), down_total)
        up_grad = (grad * activated).to(gate.dtype)
        gate_grad = (grad * up * (sigmoid + activated * (1 - sigmoid))).to(gate.dtype)
        tl.store(gates + width, up_grad, inside)
        tl.store(gates, gate_grad, inside)
        if GATE_RANK:
            gate_low = load_rows(gate_low_ptr, rows, gate_low_stride, last, gate_rank, GATE_RANK)
            gate_total = tl.dot(tl.trans(gate_low), gate_grad, gate_total)
        if UP_RANK:
            up_low = gate_low if SAME else load_rows(up_low_ptr, rows, up_low_stride, last, up_rank, UP_RANK)
            up_total = tl.dot(tl.trans(up_low), up_grad, up_total)
    sums = sums_ptr + tl.program_id(1).to(tl.int64) * (rank + gate_rank + up_rank) * width
    if RANK:
        tl.store(sums + ranks * width + columns, down_total * scale, (ranks < rank) & (columns < width))
    if GATE_RANK:
        store_transposed(sums + rank * width, gate_total, columns, width, gate_rank)
    if UP_RANK:
        store_transposed(sums + (rank + gate_rank) * width, up_total, columns, width, up_rank)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)) in fewer instructions than a division takes."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def load_rows(ptr, rows, stride, last, width, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + rows.to(tl.int64) * stride + columns, (rows < last) & (columns < width), 0.0)


@triton.jit
def store_transposed(ptr, values, columns, width, height):
    """Store a block of a (height, width) matrix as a block of its transpose, whose rows are dense."""
    rows = tl.arange(0, values.shape[0])[:, None]
    inside = (rows < height) & (columns < width)
    tl.store(ptr + tl.trans(columns * height + rows), tl.trans(values), tl.trans(inside))


def swiglu_grad_(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    tokens, width = grad.shape
    swiglu_grad_kernel[(tokens, triton.cdiv(width, BLOCK))](grad, gate_up, width, grad.stride(0), BLOCK, num_warps=4)


@triton.jit
def swiglu_grad_kernel(grad_ptr, gate_up_ptr, width, stride, SIZE: tl.constexpr):
    """SIZE columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    gates = gate_up_ptr + token * 2 * width + columns
    gate = tl.load(gates, inside, 0.0)
    wide = gate.to(tl.float32)
    up = tl.load(gates + width, inside, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + token * stride + columns, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    activated = wide * sigmoid
    tl.store(grad_ptr + token * stride + columns, (activated * up).to(gate.dtype), inside)
    tl.store(gates + width, (grad * activated).to(gate.dtype), inside)
    tl.store(gates, (grad * up * sigmoid * (1 + wide * (1 - sigmoid))).to(gate.dtype), inside)
