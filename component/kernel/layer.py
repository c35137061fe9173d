"""Decoder layers with a backward of their own, which keeps little and computes again what is cheap."""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from .attention import Attention, Bounds
from .projection import Projection

# Choices of what a layer keeps for its backward, from fastest to smallest.
NONE, SELECTIVE, FULL, OFFLOAD = "none", "selective", "full", "offload"
CHECKPOINTING = (NONE, SELECTIVE, FULL, OFFLOAD)
PROJECTIONS = ("qkv", "out", "gate_up", "down")  # of a layer


class RowContext(NamedTuple):
    """Facts of a packed row that every layer needs."""

    bounds: Bounds
    cos: torch.Tensor  # float32 (tokens, angles)
    sin: torch.Tensor
    seeds: torch.Tensor | None  # int64, of the dropout mask of each projection by its number; None for no dropout


@dataclass
class Activations:
    """Tensors that a layer's backward needs. Outputs of norms and of SwiGLU are cheap, and computed again instead."""

    hidden: torch.Tensor  # (tokens, hidden_size)
    raw: torch.Tensor | None = None  # queries and keys before their norms, if the model has these
    qkv: torch.Tensor | None = None  # (tokens, heads + 2 * groups, head_dim), rotated
    context: torch.Tensor | None = None  # (tokens, heads * head_dim)
    attention: tuple = ()
    middle: torch.Tensor | None = None  # (tokens, hidden_size), after attention
    gate_up: torch.Tensor | None = None  # (tokens, 2 * intermediate_size)
    low: tuple = ()  # (tokens, rank) of each projection, between the halves of its low-rank paths; that of `down` stays


@dataclass
class Layer:
    """Pre-norm attention and SwiGLU: ChatGLM, GLM, Llama, Mistral, Qwen2 and Qwen3.

    head_norms: weights of the norms of queries and keys (Qwen3).
    """

    number: int
    norm: torch.Tensor
    second_norm: torch.Tensor
    eps: float
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    heads: int
    groups: int
    head_dim: int
    scaling: float
    interleaved: bool
    attention: Attention
    ops: ModuleType
    checkpointing: str = NONE
    head_norms: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(getattr(self, name) for name in PROJECTIONS)

    @property
    def adapters(self) -> list[torch.nn.Parameter]:
        return [weight for projection in self.projections for weight in projection.adapters]

    def forward(self, hidden: torch.Tensor, row: RowContext) -> tuple[torch.Tensor, Activations]:
        """(the layer's output (tokens, hidden_size), what a backward needs)."""
        kept = self.up_to_gate(hidden, row)
        activated, low = self.down.swiglu(kept.gate_up, row.seeds)
        out, low = self.down.forward(activated, row.seeds, low)
        kept.low += (low,)
        return out.add_(kept.middle), kept

    def keep(self, kept: Activations, host: "HostMemory | None") -> Activations:
        """What stays in memory until the backward, by `checkpointing`; the input waits in `host`, if there is one."""
        if self.checkpointing in (FULL, OFFLOAD):
            kept = Activations(kept.hidden, low=kept.low[-1:])
        elif self.checkpointing == SELECTIVE:
            kept.gate_up = None
        if host is not None:
            host.put(self.number, kept.hidden)
            kept.hidden = None
        return kept

    def restore(self, kept: Activations, row: RowContext, host: "HostMemory | None") -> Activations:
        """All that the backward needs, from what was kept."""
        if kept.hidden is None:
            kept.hidden = host.take(self.number)
        if kept.qkv is None:
            low_down = kept.low
            kept = self.up_to_gate(kept.hidden, row)
            kept.low += low_down
        elif kept.gate_up is None:
            normed, _ = self.ops.rms_norm(kept.middle, self.second_norm, self.eps, room=self.gate_up.room)
            kept.gate_up, _ = self.gate_up.forward(normed, row.seeds)
        return kept

    def up_to_gate(self, hidden: torch.Tensor, row: RowContext) -> Activations:
        """Run the layer as far as a backward needs it: without SwiGLU and the `down` projection."""
        ops = self.ops
        normed, _ = ops.rms_norm(hidden, self.norm, self.eps, room=self.qkv.room)
        qkv, low_qkv = self.qkv.forward(normed, row.seeds)
        qkv = qkv.unflatten(1, (-1, self.head_dim))
        turned = qkv[:, : self.heads + self.groups]
        raw = turned.clone() if self.head_norms else None
        if self.head_norms:
            for part, weight in zip(turned.split((self.heads, self.groups), 1), self.head_norms, strict=True):
                part.copy_(ops.rms_norm(part.reshape(-1, self.head_dim), weight, self.eps)[0].view_as(part))
        ops.rotate_(turned, row.cos, row.sin, interleaved=self.interleaved)
        context, saved = self.attention.forward(*self.split_heads(qkv), row.bounds, self.scaling, self.out.room)
        attended, low_out = self.out.forward(context, row.seeds)

        normed, middle = ops.rms_norm(hidden, self.second_norm, self.eps, attended, self.gate_up.room)
        gate_up, low_gate_up = self.gate_up.forward(normed, row.seeds)
        return Activations(hidden, raw, qkv, context, saved, middle, gate_up, (low_qkv, low_out, low_gate_up))

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split((self.heads, self.groups, self.groups), dim=1)

    def backward(
        self, grad: torch.Tensor, kept: Activations, row: RowContext
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient of the layer's input, gradients of `adapters`). The first layer's input, which is a frozen
        embedding, has no gradient. `kept.gate_up` is overwritten."""
        ops, seeds = self.ops, row.seeds
        gate_up, kept.gate_up = kept.gate_up, None
        low_qkv, low_out, low_gate_up, low_down = kept.low
        inner, low_grad = self.down.input_grad(grad)
        downs, ups = self.down.swiglu_backward_(inner, gate_up, low_grad, self.gate_up.by_path(low_gate_up), seeds)
        down_grads = self.down.adapter_grads(downs, self.down.up_grads(grad, low_down))

        inner, low_grad = self.gate_up.input_grad(gate_up)
        self.gate_up.add_low_rank_(inner, low_grad, seeds)
        middle_grad, normed = ops.rms_norm_backward(inner, kept.middle, self.second_norm, self.eps, grad)
        downs = self.gate_up.down_grads(low_grad, normed, seeds)
        gate_up_grads = self.gate_up.adapter_grads(downs, ups)
        del gate_up, inner, normed

        context_grad, low_grad = self.out.input_grad(middle_grad)
        self.out.add_low_rank_(context_grad, low_grad, seeds)
        downs = self.out.down_grads(low_grad, kept.context, seeds)
        out_grads = self.out.adapter_grads(downs, self.out.up_grads(middle_grad, low_out))
        by_head = self.split_heads(kept.qkv)
        qkv_grad = self.attention.backward(
            context_grad, *by_head, kept.context, kept.attention, row.bounds, self.scaling
        )
        turned = qkv_grad[:, : self.heads + self.groups]
        ops.rotate_(turned, row.cos, row.sin, interleaved=self.interleaved, inverse=True)
        if self.head_norms:
            parts = (states.split((self.heads, self.groups), 1) for states in (turned, kept.raw))
            for part, raw, weight in zip(*parts, self.head_norms, strict=True):
                flat = (states.reshape(-1, self.head_dim) for states in (part, raw))
                part.copy_(ops.rms_norm_backward(*flat, weight, self.eps)[0].view_as(part))

        qkv_grad = qkv_grad.flatten(1)
        if self.number:
            inner, low_grad = self.qkv.input_grad(qkv_grad)
            self.qkv.add_low_rank_(inner, low_grad, seeds)
            hidden_grad, normed = ops.rms_norm_backward(inner, kept.hidden, self.norm, self.eps, middle_grad)
        else:
            hidden_grad, low_grad = None, self.qkv.low_grad(qkv_grad)
            normed, _ = ops.rms_norm(kept.hidden, self.norm, self.eps)
        downs = self.qkv.down_grads(low_grad, normed, seeds)
        qkv_grads = self.qkv.adapter_grads(downs, self.qkv.up_grads(qkv_grad, low_qkv))
        return hidden_grad, qkv_grads + out_grads + gate_up_grads + down_grads


class LayersFunction(torch.autograd.Function):
    """All layers as one function for autograd: (hidden, layers, row, host, trains) to hidden.

    The backward adds the gradients of the layers' adapters to their `grad` itself, and gives back none: a layer's input
    is the output of another, or of an embedding, which is frozen.

    Args:
        hidden: (tokens, hidden_size), which requires a gradient if a backward will come.
        host: where layers' inputs wait for the backward, or None.
        trains: whether a backward will come.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, layers: list[Layer], row: RowContext, host: "HostMemory | None", trains: bool
    ) -> torch.Tensor:
        ctx.layers, ctx.row, ctx.host = layers, row, host
        hidden, ctx.kept = forward_layers(layers, hidden, row, host, trains)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        backward_layers(ctx.layers, grad.contiguous(), ctx.kept, ctx.row, ctx.host)
        return (None,) * 5


def forward_layers(
    layers: list[Layer], hidden: torch.Tensor, row: RowContext, host: "HostMemory | None", trains: bool
) -> tuple[torch.Tensor, list[Activations]]:
    """(output of the last layer, what each layer keeps for its backward, if one will come)."""
    activations = []
    for layer in layers:
        hidden, kept = layer.forward(hidden, row)
        if trains:
            activations.append(layer.keep(kept, host))
    return hidden, activations


def backward_layers(
    layers: list[Layer], grad: torch.Tensor, activations: list[Activations], row: RowContext, host: "HostMemory | None"
) -> None:
    """Add the gradients of the layers' adapters to their `grad`. `activations` are used up."""
    for layer in reversed(layers):
        kept = layer.restore(activations.pop(), row, host)
        grad, adapter_grads = layer.backward(grad, kept, row)
        del kept
        add_to_gradients(layer.adapters, adapter_grads)


def add_to_gradients(weights: list[torch.nn.Parameter], parts: list[torch.Tensor]) -> None:
    earlier = [(weight.grad, part) for weight, part in zip(weights, parts, strict=True) if weight.grad is not None]
    if earlier:
        torch._foreach_add_(*zip(*earlier, strict=True))
    for weight, part in zip(weights, parts, strict=True):
        if weight.grad is None:
            weight.grad = part


class HostMemory:
    """Layers' inputs in the host's memory between a row's forward and backward, copied while the card computes."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[int, torch.Tensor] = {}  # pinned, by layer, kept from row to row
        self.sizes: dict[int, torch.Size] = {}
        self.coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}

    def put(self, number: int, hidden: torch.Tensor) -> None:
        if number not in self.buffers or self.buffers[number].numel() < hidden.numel():
            self.buffers[number] = torch.empty(hidden.numel(), dtype=hidden.dtype, pin_memory=True)
        self.sizes[number] = hidden.shape
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.buffers[number][: hidden.numel()].copy_(hidden.view(-1), non_blocking=True)
        hidden.record_stream(self.stream)

    def take(self, number: int) -> torch.Tensor:
        """Return layer `number`'s input, and start to fetch the input of the layer before it."""
        if number not in self.coming:
            self.fetch(number)
        hidden, ready = self.coming.pop(number)
        if number - 1 in self.sizes:
            self.fetch(number - 1)
        torch.cuda.current_stream().wait_event(ready)
        del self.sizes[number]
        return hidden

    def fetch(self, number: int) -> None:
        buffer, size = self.buffers[number], self.sizes[number]
        hidden = torch.empty(size, dtype=buffer.dtype, device=self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            hidden.view(-1).copy_(buffer[: hidden.numel()], non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        hidden.record_stream(self.stream)
        self.coming[number] = (hidden, ready)
