"""Linear layers that read one input, run as one: their bases of 4 or 16 bits, biases and low-rank paths."""

from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from .plain import empty_beside


class LowRankPath(NamedTuple):
    """A layer's low-rank update: `scaling * up(down(dropout(x)))`, added to some columns of the output."""

    down: nn.Parameter  # (rank, in_features), float32
    up: nn.Parameter  # (out_features, rank), float32
    scaling: float
    columns: slice  # of the output
    ranks: slice  # this path's part of all paths' ranks


class Kept(NamedTuple):
    """A projection's matrices in the type of its arithmetic, made once."""

    weight: torch.Tensor  # (width, in_features + room), the bases and, in spare columns, `ups`
    ups: torch.Tensor  # (width, rank), the second halves of all low-rank paths, scaled; zero where a path has no part
    downs: torch.Tensor  # (rank, in_features), their first halves


class Projection:
    """Linear layers of one input as one layer, their outputs side by side.

    `width` is the width of all outputs together. All low-rank paths of a projection share one dropout mask; `number`
    makes it differ from other projections' masks.

    Bases that are plain, of `dtype`, are used as they lie. If they are several, their weights are moved into one matrix
    first, of which the layers' own parameters become views, so that nothing lies twice.

    By default its matrices are made for each product and then dropped. After `keep` they stay, and whoever changes the
    adapter must copy it to them (`copies`) before the next row.

    Args:
        layers: nn.Linear, bitsandbytes' Linear4bit, or peft's LoRA layer around one.
        dtype: of the arithmetic; adapters are kept in float32 and rounded to this type.
        ops: plain or triton_kernels.
        adapted: False to leave the low-rank paths out.
    """

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype, ops: ModuleType, number: int, adapted: bool = True):
        self.bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.dtype, self.ops, self.number = dtype, ops, number
        self.in_features = self.bases[0].in_features
        self.width = sum(base.out_features for base in self.bases)
        self.paths: list[LowRankPath] = []
        self.dropout = 0.0
        column = rank = 0
        for layer, base in zip(layers, self.bases, strict=True):
            if adapted and hasattr(layer, "lora_A"):
                (name,) = layer.active_adapters
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                columns, ranks = slice(column, column + base.out_features), slice(rank, rank + len(down))
                self.paths.append(LowRankPath(down, up, layer.scaling[name], columns, ranks))
                self.dropout = getattr(layer.lora_dropout[name], "p", 0.0)
                rank = ranks.stop
            column += base.out_features
        self.plain = join_weights(self.bases) if all(is_plain(base, dtype) for base in self.bases) else None
        self.kept: Kept | None = None
        self.bias = None
        if any(base.bias is not None for base in self.bases):
            biases = [
                base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in self.bases
            ]
            self.bias = torch.cat([bias.detach().to(dtype) for bias in biases])

    @property
    def adapters(self) -> list[nn.Parameter]:
        return [weight for path in self.paths for weight in (path.down, path.up)]

    @property
    def rank(self) -> int:
        """Rank of all low-rank paths together."""
        return self.paths[-1].ranks.stop if self.paths else 0

    @property
    def room(self) -> int:
        """Spare columns of an input that `forward` can use: `rank`, or 0 where rows would not stay aligned, or where
        plain bases have no columns to spare."""
        return self.rank if self.rank % 16 == 0 and self.plain is None else 0

    def weight(self, room: int = 0) -> torch.Tensor:
        """The bases as one matrix (width, in_features + room), whose last `room` columns are not filled."""
        if self.kept is not None and room <= self.room:
            return self.kept.weight[:, : self.in_features + room]
        if self.plain is not None and not room:
            return self.plain
        device = self.bases[0].weight.device
        whole = torch.empty(self.width, self.in_features + room, dtype=self.dtype, device=device)
        parts = whole[:, : self.in_features].split([base.out_features for base in self.bases])
        for base, part in zip(self.bases, parts, strict=True):
            if isinstance(base, Linear4bit):
                self.ops.dequantize_(part, base.weight.data, base.weight.quant_state)
            else:
                part.copy_(base.weight)
        return whole

    def down(self) -> torch.Tensor:
        """All low-rank paths' first halves, (rank, in_features)."""
        if self.kept is not None:
            return self.kept.downs
        downs = [path.down.detach().to(self.dtype) for path in self.paths]
        return downs[0] if len(downs) == 1 else torch.cat(downs)

    def swiglu(self, gate_up: torch.Tensor, seeds: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(SwiGLU of gate_up, `low` of it): this projection's input, with `room` spare columns."""
        if not self.paths:
            return self.ops.swiglu(gate_up, self.room), None
        return self.ops.swiglu_low(gate_up, self.room, self.down(), *self.drop(seeds))

    def forward(
        self, x: torch.Tensor, seeds: torch.Tensor | None, low: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output (tokens, width), what the low-rank paths hold between their halves (tokens, rank)).

        If the input has `room` spare columns, the low-rank paths' first halves write there. Their second halves stand
        beside the bases, so that one product makes the whole output. Elsewhere the product of the bases is added to the
        update, and so in both cases the sum is rounded once: a small update is not lost in a rounded output.

        Args:
            seeds: of the row's dropout masks, by `number`; None for no dropout.
            low: `low` of the input, if it is there already; in the spare columns, if there are any.
        """
        low = self.low(x, seeds) if low is None else low
        if x.stride(0) == self.in_features:
            if not self.paths:
                return self.product(x, self.weight()), low
            return self.product(low, self.ups()).addmm_(x, self.weight().t()), low
        weight = self.weight_beside_ups()
        wide = x.as_strided((len(x), weight.shape[1]), (x.stride(0), 1))
        return self.product(wide, weight), low.clone()  # a copy, so that the wide input can be freed

    def weight_beside_ups(self) -> torch.Tensor:
        """The bases and, in `rank` columns beside them, the scaled second halves of the low-rank paths."""
        weight = self.weight(self.rank)
        if self.kept is None:
            self.fill_ups_(weight[:, self.in_features :])
        return weight

    def ups(self) -> torch.Tensor:
        """All low-rank paths' second halves, scaled, (width, rank)."""
        if self.kept is not None:
            return self.kept.ups
        device = self.bases[0].weight.device
        return self.fill_ups_(torch.empty(self.width, self.rank, dtype=self.dtype, device=device))

    def fill_ups_(self, ups: torch.Tensor) -> torch.Tensor:
        if len(self.bases) > 1:  # a path fills only its own columns and ranks
            ups.zero_()
        for path in self.paths:
            torch.mul(path.up.detach(), path.scaling, out=ups[path.columns, path.ranks])
        return ups

    def keep(self) -> None:
        """Make the matrices, the adapter's part apart, and keep them."""
        weight, ups = self.weight(self.room), None
        if self.room:
            ups = weight[:, self.in_features :].zero_()
        elif self.paths:
            ups = weight.new_zeros(self.width, self.rank)
        self.kept = Kept(weight, ups, weight.new_empty(self.rank, self.in_features))

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(weight of the adapter, its place in the kept matrices, factor) of each half of each path."""
        if self.kept is None:
            return []
        downs = [(path.down, self.kept.downs[path.ranks], 1.0) for path in self.paths]
        ups = [(path.up, self.kept.ups[path.columns, path.ranks], path.scaling) for path in self.paths]
        return downs + ups

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() if self.bias is None else torch.addmm(self.bias, x, weight.t())

    def low(self, x: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor | None:
        """The first halves of the low-rank paths, dropout(x) @ down.T (tokens, rank)."""
        if not self.paths:
            return None
        return self.ops.lora_down_(empty_beside(x, self.rank), x, self.down(), *self.drop(seeds))

    def by_path(self, low: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
        """(columns of the output, part of `low`) of each path."""
        return [(path.columns, low[:, path.ranks]) for path in self.paths]

    def input_grad(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(gradient of the input through the bases alone, gradient between the halves of the low-rank paths)."""
        return grad @ self.weight(), self.low_grad(grad)

    def low_grad(self, grad: torch.Tensor) -> torch.Tensor | None:
        return grad @ self.ups() if self.paths else None

    def add_low_rank_(self, grad: torch.Tensor, low_grad: torch.Tensor | None, seeds: torch.Tensor | None) -> None:
        """Add the low-rank paths' part to a gradient of the input."""
        if self.paths:
            self.ops.lora_input_grad_(grad, low_grad, self.down(), *self.drop(seeds))

    def swiglu_backward_(
        self,
        grad: torch.Tensor,
        gate_up: torch.Tensor,
        low_grad: torch.Tensor | None,
        lows: list[tuple[slice, torch.Tensor]],
        seeds: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """plain.swiglu_backward_ with this projection's paths."""
        down = self.down() if self.paths else None
        return self.ops.swiglu_backward_(grad, gate_up, low_grad, down, *self.drop(seeds), lows)

    def down_grads(
        self, low_grad: torch.Tensor | None, x: torch.Tensor, seeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Gradient of all first halves, float32 (rank, in_features)."""
        return self.ops.lora_down_grad(low_grad, x, *self.drop(seeds)) if self.paths else None

    def up_grads(self, grad: torch.Tensor, low: torch.Tensor | None) -> list[torch.Tensor]:
        """Gradient of each second half, float32, which is still to be scaled."""
        return [self.ops.matmul_float32(grad[:, columns].t(), part) for columns, part in self.by_path(low)]

    def adapter_grads(self, downs: torch.Tensor | None, ups: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients in the order of `adapters`, of `down_grads` and `up_grads`."""
        grads = []
        for path, up in zip(self.paths, ups, strict=True):
            grads += [downs[path.ranks], up.mul_(path.scaling)]
        return grads

    def drop(self, seeds: torch.Tensor | None) -> tuple[float, torch.Tensor | int]:
        """(share of the elements that is dropped, seed of this projection's mask)."""
        return (0.0, 0) if seeds is None else (self.dropout, seeds[self.number])


def is_plain(base: nn.Linear, dtype: torch.dtype) -> bool:
    return not isinstance(base, Linear4bit) and base.weight.dtype == dtype


def join_weights(layers: list[nn.Linear]) -> torch.Tensor:
    """Move the weights of layers into one matrix (sum of out_features, in_features), of which each becomes a view.

    Weights that a call has moved before stay, so that all that is built on one model shares them.
    """
    weights = [layer.weight.detach() for layer in layers]
    if len(weights) == 1:
        return weights[0]
    places = [(weight.untyped_storage().data_ptr(), weight.storage_offset()) for weight in weights]
    sizes = [len(weight) * weight.stride(0) for weight in weights]
    if all(two == (one[0], one[1] + size) for (one, two), size in zip(pairwise(places), sizes, strict=False)):
        return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
    whole = torch.cat(weights)
    for layer, part in zip(layers, whole.split([len(weight) for weight in weights]), strict=True):
        layer.weight.data = part
    return whole
