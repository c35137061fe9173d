"""AdamW in plain torch, in the place of component.kernel.triton_adamw."""

from collections.abc import Callable, Sequence

import torch


def prepare_adamw(tensors: list[tuple[torch.Tensor, ...]], rows: Sequence[int]) -> Callable:
    return lambda figures: adamw_(tensors, [figures[row] for row in rows])


def adamw_(tensors: list[tuple[torch.Tensor, ...]], figures: list[tuple[float, ...]]) -> None:
    assert all(part.is_contiguous() and part.dtype == torch.float32 for parts in tensors for part in parts)
    for (weight, grad, mean, square), (beta1, rest1, beta2, rest2, eps, rate, decay) in zip(
        tensors, figures, strict=True
    ):
        mean.mul_(beta1).add_(rest1 * grad)
        square.mul_(beta2).add_(rest2 * grad * grad)
        weight.data.sub_(rate * mean / (square.sqrt() + eps)).mul_(decay)
