"""A whole decoder layer as one autograd function, whose backward keeps little and recomputes what is cheap."""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import NamedTuple

import torch

from .attention import Attention, Bounds
from .projection import Projection

# Choices of what a layer keeps for its backward, from fastest to smallest.
NONE, SELECTIVE, FULL, OFFLOAD = "none", "selective", "full", "offload"
CHECKPOINTING = (NONE, SELECTIVE, FULL, OFFLOAD)


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
    low: tuple = ()  # (tokens, rank) of each projection, between the halves of its low-rank paths


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
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def adapters(self) -> list[torch.nn.Parameter]:
        return [weight for projection in self.projections for weight in projection.adapters]

    def forward(self, hidden: torch.Tensor, row: RowContext) -> tuple[torch.Tensor, Activations]:
        """(the layer's output (tokens, hidden_size), what a backward needs)."""
        kept = self.up_to_gate(hidden, row)
        out, low = self.down.forward(self.ops.swiglu(kept.gate_up, self.down.room), row.seeds)
        kept.low += (low,)
        return out.add_(kept.middle), kept

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
        context, saved = self.attention.forward(*self.split_heads(qkv), row.bounds, self.scaling)
        context = context.flatten(1)
        attended, low_out = self.out.forward(context, row.seeds)

        normed, middle = ops.rms_norm(hidden, self.second_norm, self.eps, attended, self.gate_up.room)
        gate_up, low_gate_up = self.gate_up.forward(normed, row.seeds)
        return Activations(hidden, raw, qkv, context, saved, middle, gate_up, (low_qkv, low_out, low_gate_up))

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv.split((self.heads, self.groups, self.groups), dim=1)

    def backward(
        self, grad: torch.Tensor, kept: Activations, row: RowContext, needs_input_grad: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient of the layer's input, gradients of `adapters`). `kept.gate_up` is overwritten."""
        ops, seeds = self.ops, row.seeds
        low_qkv, low_out, low_gate_up, *low_down = kept.low
        gate_up = kept.gate_up
        if gate_up is None:
            normed, _ = ops.rms_norm(kept.middle, self.second_norm, self.eps, room=self.gate_up.room)
            gate_up, _ = self.gate_up.forward(normed, seeds)
        activated, low_grad = self.down.input_grad(grad, seeds)
        ops.swiglu_backward_(activated, gate_up)
        (low,) = low_down or (self.down.low(activated, seeds),)
        down_grads = self.down.adapter_grads(grad, low_grad, activated, low, seeds)
        del activated

        inner, low_grad = self.gate_up.input_grad(gate_up, seeds)
        middle_grad, normed = ops.rms_norm_backward(inner, kept.middle, self.second_norm, self.eps, grad)
        gate_up_grads = self.gate_up.adapter_grads(gate_up, low_grad, normed, low_gate_up, seeds)
        del gate_up, inner, normed

        context_grad, low_grad = self.out.input_grad(middle_grad, seeds)
        out_grads = self.out.adapter_grads(middle_grad, low_grad, kept.context, low_out, seeds)
        by_head = (context_grad.unflatten(1, (self.heads, -1)), *self.split_heads(kept.qkv))
        context = kept.context.unflatten(1, (self.heads, -1))
        qkv_grad = torch.cat(self.attention.backward(*by_head, context, kept.attention, row.bounds, self.scaling), 1)
        turned = qkv_grad[:, : self.heads + self.groups]
        ops.rotate_(turned, row.cos, row.sin, interleaved=self.interleaved, inverse=True)
        if self.head_norms:
            parts = (states.split((self.heads, self.groups), 1) for states in (turned, kept.raw))
            for part, raw, weight in zip(*parts, self.head_norms, strict=True):
                flat = (states.reshape(-1, self.head_dim) for states in (part, raw))
                part.copy_(ops.rms_norm_backward(*flat, weight, self.eps)[0].view_as(part))

        qkv_grad = qkv_grad.flatten(1)
        if needs_input_grad:
            inner, low_grad = self.qkv.input_grad(qkv_grad, seeds)
            hidden_grad, normed = ops.rms_norm_backward(inner, kept.hidden, self.norm, self.eps, middle_grad)
        else:  # the first layer's input is the embedding, which is frozen
            hidden_grad, low_grad = None, self.qkv.low_grad(qkv_grad)
            normed, _ = ops.rms_norm(kept.hidden, self.norm, self.eps)
        qkv_grads = self.qkv.adapter_grads(qkv_grad, low_grad, normed, low_qkv, seeds)
        return hidden_grad, qkv_grads + out_grads + gate_up_grads + down_grads


class LayerFunction(torch.autograd.Function):
    """Layer.forward and Layer.backward for autograd: (hidden, layer, row, host, *layer.adapters) to hidden."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, layer: Layer, row: RowContext, host: "HostMemory | None", *adapters: torch.Tensor
    ):
        out, kept = layer.forward(hidden, row)
        ctx.layer, ctx.row, ctx.host = layer, row, host
        if layer.checkpointing in (FULL, OFFLOAD):
            kept = Activations(hidden)
        elif layer.checkpointing == SELECTIVE:
            kept.gate_up = None
        if host is not None:
            host.put(layer.number, hidden)
            kept.hidden = None
        values = [getattr(kept, item.name) for item in fields(kept)]
        flat = [value for value in values if not isinstance(value, tuple)]
        ctx.sizes = [len(value) for value in values if isinstance(value, tuple)]
        ctx.save_for_backward(*flat, *kept.attention, *kept.low)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        layer, row, host = ctx.layer, ctx.row, ctx.host
        hidden, raw, qkv, context, middle, gate_up, *rest = ctx.saved_tensors
        attention, low = tuple(rest[: ctx.sizes[0]]), tuple(rest[ctx.sizes[0] :])
        if hidden is None:
            hidden = host.take(layer.number)
        kept = Activations(hidden, raw, qkv, context, attention, middle, gate_up, low)
        if qkv is None:
            kept = layer.up_to_gate(hidden, row)
        hidden_grad, adapter_grads = layer.backward(grad.contiguous(), kept, row, ctx.needs_input_grad[0])
        return hidden_grad, None, None, None, *adapter_grads


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
