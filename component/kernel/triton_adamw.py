"""AdamW over all weights in one launch of a Triton kernel for CUDA."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from .decoder import upload

BLOCK = 2048  # elements that one program handles


def prepare_adamw(
    tensors: Sequence[tuple[torch.Tensor, ...]], rows: Sequence[int]
) -> Callable[[Sequence[Sequence[float]]], None]:
    """Bring to the card what a launch needs, but for the figures.

    Args:
        tensors: for each weight: the weight, its gradient, the gradient's mean and that of its square. All are float32
            and contiguous, and must live until the launch. The means may be paged, the others are on one card.
        rows: for each weight, which of the figures are its own.

    Returns:
        A function of figures, each as component.train.adamw.figures_of gives them. It changes weights and their moments
        in place, as is said there.
    """
    sizes, device = tuple(weight.numel() for weight, *_ in tensors), tensors[0][0].device
    addresses = [[part.data_ptr() for part in parts] for parts in tensors]
    places = np.column_stack((np.array(addresses, np.int64), sizes))  # numpy reads lists faster than torch
    blocks = blocks_of(sizes, device)
    aligned = not (places % 16).any()  # so that a thread may load four values at once
    places = upload(torch.from_numpy(np.column_stack((places, rows))), device)

    def launch(figures: Sequence[Sequence[float]]) -> None:
        table = upload(torch.from_numpy(np.array(figures, np.float32)), device)
        adamw_kernel[(len(blocks),)](places, table, blocks, aligned, BLOCK, num_warps=4)

    return launch


@lru_cache(maxsize=2)
def blocks_of(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(programs, 2) int64: the tensor that each program works on, and the number of its block."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(counts)
    numbers = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return upload(torch.stack((tensors, numbers), 1), device)


@triton.jit
def adamw_kernel(places_ptr, figures_ptr, blocks_ptr, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    """SIZE elements of one weight."""
    tensor = tl.load(blocks_ptr + 2 * tl.program_id(0).to(tl.int64))
    block = tl.load(blocks_ptr + 2 * tl.program_id(0).to(tl.int64) + 1)
    place = places_ptr + 6 * tensor
    weight_ptr = tl.load(place).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(place + 1).to(tl.pointer_type(tl.float32))
    mean_ptr = tl.load(place + 2).to(tl.pointer_type(tl.float32))
    square_ptr = tl.load(place + 3).to(tl.pointer_type(tl.float32))
    size = tl.load(place + 4)
    if ALIGNED:
        weight_ptr, grad_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, square_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(square_ptr, 16)
        size = tl.multiple_of(size, 16)
    figure = figures_ptr + 7 * tl.load(place + 5)
    beta1, rest1 = tl.load(figure), tl.load(figure + 1)
    beta2, rest2 = tl.load(figure + 2), tl.load(figure + 3)
    eps, rate, decay = tl.load(figure + 4), tl.load(figure + 5), tl.load(figure + 6)
    places = block * SIZE + tl.arange(0, SIZE)
    inside = places < size
    grad = tl.load(grad_ptr + places, inside, 0.0)
    mean = tl.load(mean_ptr + places, inside, 0.0) * beta1 + rest1 * grad
    square = tl.load(square_ptr + places, inside, 0.0) * beta2 + rest2 * (grad * grad)
    weight = tl.load(weight_ptr + places, inside, 0.0) - rate * (mean / (tl.sqrt(square) + eps))
    tl.store(weight_ptr + places, weight * decay, inside)
    tl.store(mean_ptr + places, mean, inside)
    tl.store(square_ptr + places, square, inside)
