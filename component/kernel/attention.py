"""Causal attention over a packed row, in which no sample sees another, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

Saved = tuple[torch.Tensor, ...]


class Bounds(NamedTuple):
    """Bounds of the samples in a row: `ends` (samples + 1,), int32, with 0 first, and the length of the longest."""

    ends: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Attention:
    """One way to compute attention.

    forward(query, key, value, bounds, scale) -> (context, saved); backward(grad, query, key, value, context, saved,
    bounds, scale) -> the gradients of query, key and value. query and context: (tokens, heads, head_dim); key and
    value: (tokens, groups, head_dim), `groups` dividing `heads`.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, Saved]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def flash_forward(query, key, value, bounds: Bounds, scale: float) -> tuple[torch.Tensor, Saved]:
    context, log_sums, *random_state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds.ends, bounds.ends, bounds.longest, bounds.longest, 0.0, True, False, scale=scale
    )
    return context, (log_sums, *random_state)


def flash_backward(grad, query, key, value, context, saved: Saved, bounds: Bounds, scale: float):
    log_sums, *random_state = saved
    ends, longest = bounds
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, context, log_sums, ends, ends, longest, longest, 0.0, True, *random_state, scale=scale
    )


def sample_by_sample_forward(query, key, value, bounds: Bounds, scale: float) -> tuple[torch.Tensor, Saved]:
    samples = [attend(*parts, scale) for parts in zip(*(split(x, bounds) for x in (query, key, value)), strict=True)]
    return torch.cat(samples), ()


def sample_by_sample_backward(grad, query, key, value, context, saved: Saved, bounds: Bounds, scale: float):
    grads = []
    with torch.enable_grad():
        for part, *inputs in zip(*(split(x, bounds) for x in (grad, query, key, value)), strict=True):
            inputs = [x.detach().requires_grad_() for x in inputs]
            grads.append(torch.autograd.grad(attend(*inputs, scale), inputs, part))
    return tuple(map(torch.cat, zip(*grads, strict=True)))


def attend(query, key, value, scale: float) -> torch.Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    context = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return context[0].transpose(0, 1)


def split(x: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, ...]:
    return x.split(bounds.ends.diff().tolist())


FLASH = Attention("flash", flash_forward, flash_backward)
SAMPLE_BY_SAMPLE = Attention("sample by sample", sample_by_sample_forward, sample_by_sample_backward)


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """Choose torch's variable-length flash attention if card, type and head size allow it, else SAMPLE_BY_SAMPLE."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0
    if (
        fits
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    ):
        return FLASH
    return SAMPLE_BY_SAMPLE
