"""Causal attention over a packed row, in which no sample sees another, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from loguru import logger
from torch.nn.functional import scaled_dot_product_attention

from . import cudnn

Saved = tuple[torch.Tensor, ...]


class Bounds(NamedTuple):
    """Bounds of the samples in a row: `ends` (samples + 1,), int32, with 0 first, and the length of the longest."""

    ends: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Attention:
    """One way to compute attention.

    forward(query, key, value, bounds, scale, room=0) -> (context, saved). query: (tokens, heads, head_dim), key and
    value: (tokens, groups, head_dim), `groups` dividing `heads`, views of one matrix that holds nothing else; context:
    (tokens, heads * head_dim). Where a way can do it for free, `room` makes the context a view of a matrix with that
    many spare columns.

    backward(grad, query, key, value, context, saved, bounds, scale) -> gradients (tokens, heads + 2 * groups, head_dim)
    of query, key and value. grad: (tokens, heads * head_dim), whose rows may stand apart.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, Saved]]
    backward: Callable[..., torch.Tensor]


def flash_forward(query, key, value, bounds: Bounds, scale: float, room: int = 0) -> tuple[torch.Tensor, Saved]:
    context, log_sums, *random_state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds.ends, bounds.ends, bounds.longest, bounds.longest, 0.0, True, False, scale=scale
    )
    return context.flatten(1), (log_sums, *random_state)


def flash_backward(grad, query, key, value, context, saved: Saved, bounds: Bounds, scale: float) -> torch.Tensor:
    log_sums, *random_state = saved
    ends, longest = bounds
    grad, context = (x.unflatten(1, query.shape[1:]) for x in (grad, context))
    grads = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, context, log_sums, ends, ends, longest, longest, 0.0, True, *random_state, scale=scale
    )
    return torch.cat(grads, 1)


def sample_by_sample_forward(
    query, key, value, bounds: Bounds, scale: float, room: int = 0
) -> tuple[torch.Tensor, Saved]:
    samples = [attend(*parts, scale) for parts in zip(*(split(x, bounds) for x in (query, key, value)), strict=True)]
    return torch.cat(samples).flatten(1), ()


def sample_by_sample_backward(grad, query, key, value, context, saved: Saved, bounds: Bounds, scale: float):
    grad, grads = grad.unflatten(1, query.shape[1:]), []
    with torch.enable_grad():
        for part, *inputs in zip(*(split(x, bounds) for x in (grad, query, key, value)), strict=True):
            inputs = [x.detach().requires_grad_() for x in inputs]
            grads.append(torch.cat(torch.autograd.grad(attend(*inputs, scale), inputs, part), 1))
    return torch.cat(grads)


def attend(query, key, value, scale: float) -> torch.Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    context = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return context[0].transpose(0, 1)


def split(x: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, ...]:
    return x.split(bounds.ends.diff().tolist())


FLASH = Attention("flash", flash_forward, flash_backward)
CUDNN = Attention("cuDNN", cudnn.forward, cudnn.backward)
SAMPLE_BY_SAMPLE = Attention("sample by sample", sample_by_sample_forward, sample_by_sample_backward)


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """Choose the fastest way that card, type and head size allow.

    These are cuDNN's attention, which is for Hopper and newer and needs the package nvidia-cudnn-frontend; torch's
    variable-length flash attention, for Ampere and newer; else SAMPLE_BY_SAMPLE.
    """
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0
    capability = torch.cuda.get_device_capability(device) if fits else (0, 0)
    if capability < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return SAMPLE_BY_SAMPLE
    if capability >= (9, 0) and head_dim <= 128 and head_dim % 16 == 0 and cudnn_serves(device, dtype, head_dim):
        return CUDNN
    return FLASH


@cache
def cudnn_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether cuDNN computes a small row's attention and gradients as flash attention does; logs why if it does not."""
    try:
        ends = torch.tensor([0, 5, 133, 390], dtype=torch.int32, device=device)  # not a power of two of samples
        draw = torch.Generator(device).manual_seed(0)
        states, grad = torch.randn(2, 390, 8, head_dim, dtype=dtype, device=device, generator=draw)
        states, grad = states.split((4, 2, 2), 1), grad[:, :4].flatten(1)
        results = []
        for way in (FLASH, CUDNN):
            context, saved = way.forward(*states, Bounds(ends, 257), head_dim**-0.5)
            grads = way.backward(grad, *states, context, saved, Bounds(ends, 257), head_dim**-0.5)
            results.append(torch.cat((context, grads.flatten(1)), 1).float())
        error = (results[1] - results[0]).norm() / results[0].norm()
        if not error < 0.02:  # half precision rounds by less, and NaN is not less
            raise ArithmeticError(f"its results differ from those of flash attention by {error:.1%}")
    except Exception as error:  # cuDNN has errors of its own for what a version or a card cannot do
        level, remedy = "INFO", ""
        if isinstance(error, ImportError):
            level, remedy = "WARNING", "; pip install -r requirements.txt brings the package nvidia-cudnn-frontend"
        reason = f"{type(error).__name__}: {error}{remedy}"
        logger.log(level, f"attention {FLASH.name}, which is slower here than cuDNN's: {reason}")
        return False
    return True
