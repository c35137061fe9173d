"""bitsandbytes' AdamW with moments of 32 bits, in one kernel over all weights."""

from collections.abc import Callable, Iterable
from operator import is_not
from typing import NamedTuple

import numpy as np
import torch
from bitsandbytes.functional import prefetch_tensor
from bitsandbytes.optim import AdamW
from torch import nn

from ..kernel import plain
from ..kernel.model import choose_ops
from ..run.errors import ArgumentError

MOMENTS = ("state1", "state2")  # bitsandbytes' names of the means of a gradient and of its square


class Prepared(NamedTuple):
    """What a step needs, but for the rate."""

    gradients: list[torch.Tensor | None]  # of all weights
    tensors: list[tuple[torch.Tensor, ...]]  # (weight, gradient, moments) of those that have a gradient
    states: list[dict]  # of these weights
    kinds: list[tuple[int, int]]  # (number of a group, number of the step), in most runs the same for all weights
    launch: Callable[[list[tuple[float, ...]]], None]  # takes `figures_of` each kind


class FusedAdamW(AdamW):
    """AdamW whose step is one launch, where bitsandbytes launches, prefetches and waits for each weight.

    State and settings are those of bitsandbytes' AdamW, and either loads what the other has saved. Paged moments lie in
    one piece of managed memory. A step does not wait for the card, `state_dict` does: the host reads paged moments
    where the card writes them.

    Weights are float32 and on one card, moments have 32 bits.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.paged: list[torch.Tensor] = []
        self.prepared: Prepared | None = None

    def gradients(self) -> list[torch.Tensor | None]:
        return [weight.grad for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def prepare(self) -> None:
        """Do most of what a step takes the host, milliseconds for many weights, while a card still computes gradients.

        It may be left out. The step takes the gradients' values, and the rate, as they are then.
        """
        numbered = [(number, weight) for number, group in enumerate(self.param_groups) for weight in group["params"]]
        due = [(number, weight) for number, weight in numbered if weight.grad is not None]
        self.make_moments([weight for _, weight in due if not self.state[weight]])
        tensors, states, rows, kinds = [], [], [], {}
        for number, weight in due:
            state = self.state[weight]
            if not weight.is_contiguous():
                weight.data = weight.contiguous()
            tensors.append((weight, weight.grad.contiguous(), *(state[name] for name in MOMENTS)))
            states.append(state)
            rows.append(kinds.setdefault((number, state["step"] + 1), len(kinds)))
        for piece in self.paged:
            prefetch_tensor(piece)
        self.prepared = None
        if tensors:
            self.prepared = Prepared(self.gradients(), tensors, states, list(kinds), prepare_launch(tensors, rows))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change every weight that has a gradient."""
        if self.prepared is None or any(map(is_not, self.prepared.gradients, self.gradients())):
            self.prepare()
        prepared, self.prepared = self.prepared, None
        if prepared is None:
            return
        for state in prepared.states:
            state["step"] += 1
        prepared.launch([figures_of(self.param_groups[number], step) for number, step in prepared.kinds])

    def make_moments(self, weights: list[nn.Parameter]) -> None:
        """Give weights that have no state yet moments of zero."""
        if not weights:
            return
        sizes = [weight.numel() for weight in weights]
        piece = self.get_state_buffer(weights[0].new_empty(1).expand(2, sum(sizes)))
        if getattr(piece, "is_paged", False):
            self.paged.append(piece)
        for weight, mean, square in zip(weights, *(moment.split(sizes) for moment in piece), strict=True):
            self.state[weight] = {"step": 0, "state1": mean.view(weight.shape), "state2": square.view(weight.shape)}

    def state_dict(self) -> dict:
        if any(weight.is_cuda for group in self.param_groups for weight in group["params"]):
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict, move_to_device: bool = True) -> None:
        """Load what this class or bitsandbytes' AdamW has saved. Moments that are to be paged are paged again.

        Raises:
            ArgumentError: another optimizer has saved it, or the moments have 8 bits.
        """
        super().load_state_dict(state_dict, move_to_device=False)
        self.prepared = None
        loaded = {weight: state for weight, state in self.state.items() if state}
        if any(not state.keys() >= {"step", *MOMENTS} for state in loaded.values()):
            raise ArgumentError("the optimizer's state was saved by another optimizer; set optim to what it was")
        if any(state[name].dtype != torch.float32 for state in loaded.values() for name in MOMENTS):
            raise ArgumentError("the optimizer's state was saved by one of 8 bits; set optim to what it was")
        self.paged.clear()
        self.make_moments(list(loaded))
        for weight, state in loaded.items():
            self.state[weight]["step"] = state["step"]
            for name in MOMENTS:
                self.state[weight][name].copy_(state[name])


def figures_of(group: dict, step: int) -> tuple[float, ...]:
    """What a step of AdamW needs to know beside the tensors, as bitsandbytes' kernel for CUDA takes it: betas of
    float32, and the decay after the change.

    Returns:
        (beta1, 1 - beta1, beta2, 1 - beta2, eps, rate, decay). With a gradient g: mean = beta1 mean + (1 - beta1) g,
        square = beta2 square + (1 - beta2) g g, weight = decay (weight - rate mean / (sqrt(square) + eps)). The
        corrections of the means' bias are in eps and rate.
    """
    beta1, beta2 = (float(np.float32(beta)) for beta in group["betas"])
    bias1, bias2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    rate, decay = group["lr"] * bias2 / bias1, 1 - group["lr"] * group["weight_decay"]
    return beta1, 1 - beta1, beta2, 1 - beta2, group["eps"] * bias2, rate, decay


def prepare_launch(tensors: list[tuple[torch.Tensor, ...]], rows: list[int]) -> Callable:
    from ..kernel.triton_adamw import prepare_adamw

    return prepare_adamw(tensors, rows)


def fused_if_possible(optimizer: type, settings: dict, weights: Iterable[torch.Tensor]) -> type:
    """FusedAdamW in the place of bitsandbytes' AdamW where it can be used, else the optimizer as it is.

    Args:
        settings: the optimizer's keyword arguments.
        weights: those that are trained.
    """
    if optimizer is not AdamW or settings.get("optim_bits", 32) != 32:
        return optimizer
    kinds = {(weight.device, weight.dtype) for weight in weights}
    if len(kinds) != 1 or {dtype for _, dtype in kinds} != {torch.float32}:
        return optimizer
    ((device, _),) = kinds
    return FusedAdamW if choose_ops(device) is not plain else optimizer
