"""GPU memory of a step: an estimate, the choice of a plan by it, and the proof of that plan on the largest row."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from loguru import logger

from ..run.errors import DoesNotFit
from .head import LOGITS
from .layer import CHECKPOINTING, FULL, NONE, OFFLOAD, SELECTIVE, Layer
from .model import PackedForward

GIB = 2**30
# Bytes per value: 4 bits, its part of the 8-bit scale of 64 values, and that scale's part of the float32 of 256 scales.
FOUR_BIT = 0.5 + 1 / 64 + 4 / 64 / 256
SPARE = 0.92  # share of the free memory that a plan may use; fragments and libraries take the rest
# (tokens of a row, what layers keep), fastest first. benchmark/README.md has figures of 8,192 and the offloaded 2,048.
PLANS = (
    (8192, NONE),
    (4096, NONE),
    (8192, SELECTIVE),
    (4096, SELECTIVE),
    (8192, FULL),
    (8192, OFFLOAD),
    (4096, OFFLOAD),
    (2048, OFFLOAD),
    (1024, OFFLOAD),
)
PADDED = 0  # instead of the tokens of a row where batches are padded
UNFUSED_TOKENS = 2048  # of a row in a model's own layers, whose attention needs a mask of tokens x tokens


@dataclass(frozen=True)
class Plan:
    tokens: int  # of a packed row at most, or PADDED
    checkpointing: str

    def __str__(self) -> str:
        layout = f"rows of {self.tokens:,} tokens" if self.tokens != PADDED else "padded batches"
        return f"{layout}, activation_checkpointing {self.checkpointing}"


def estimate(layers: list[Layer], vocab: int, fixed: int, plan: Plan) -> int:
    """Estimate the bytes at the peak of a step.

    Args:
        layers: of a PackedForward.
        fixed: bytes of weights, adapters, gradients and the optimizer's state on the card.
    """
    layer = layers[0]
    size = layer.norm.element_size()
    hidden, intermediate = layer.out.width, layer.down.in_features
    low = sum(projection.rank for projection in layer.projections)
    inside = layer.qkv.width + layer.out.in_features + hidden + low  # kept beside the input and the MLP's
    if layer.head_norms:
        inside += (layer.heads + layer.groups) * layer.head_dim
    wide = 2 * intermediate
    kept = {NONE: hidden + inside + wide, SELECTIVE: hidden + inside, FULL: hidden, OFFLOAD: 0}[plan.checkpointing]
    again = {NONE: 0, SELECTIVE: wide, FULL: inside + wide, OFFLOAD: 2 * hidden + inside + wide}[plan.checkpointing]
    unpacked = [part.width * part.in_features for part in layer.projections if part.plain is None]
    widest = max(unpacked, default=0)  # a plain base is used as it lies
    backward = plan.tokens * (again + intermediate + 5 * hidden) * size + widest * size
    head = LOGITS * size + plan.tokens * 3 * hidden * size
    return fixed + plan.tokens * kept * len(layers) * size + max(backward, head)


def fixed_bytes(forward: PackedForward, optimizer_bytes: int) -> int:
    """Bytes of all weights, and of a gradient and `optimizer_bytes` for each trainable value.

    4-bit layers on the meta device, whose weights are not packed there, count with the 4 bits that they will have.
    """
    packed = {layer.weight for layer in forward.model.modules() if isinstance(layer, Linear4bit)}
    total = 0
    for weight in forward.model.parameters():
        four_bit = weight.is_meta and weight in packed
        total += int(weight.numel() * FOUR_BIT) if four_bit else weight.numel() * weight.element_size()
        total += weight.numel() * (4 + optimizer_bytes) * weight.requires_grad
    return total


def table(forward: PackedForward, tokens: int, optimizer_bytes: int) -> str:
    """Line for the user: the estimated memory of each way of checkpointing."""
    fixed = fixed_bytes(forward, optimizer_bytes)
    sizes = (
        f"{kept} {estimate(forward.layers, forward.vocab, fixed, Plan(tokens, kept)) / GIB:.1f}"
        for kept in CHECKPOINTING
    )
    return f"GPU memory by estimate, in GiB, with rows of {tokens:,} tokens: {', '.join(sizes)}"


def optimizer_bytes(optim: str, on_card: bool) -> int:
    """Bytes of an optimizer's state, two moments, for each trainable value.

    Paged moments can move to the host's memory, so they do not count `on_card`.
    """
    if "sgd" in optim or (on_card and "paged" in optim):
        return 0
    return 2 if "8bit" in optim else 8


def choose_plan(
    forward: PackedForward,
    tokens: int | None,
    checkpointing: str,
    longest: int,
    optimizer_bytes: int,
    packing: bool = True,
) -> Plan:
    """Choose the parts of a plan that were left open, prove the plan, and set `forward` to it.

    Args:
        tokens: of a packed row; None to have them chosen.
        checkpointing: one of layer.CHECKPOINTING, or auto.
        longest: tokens that the longest sample may have.
        optimizer_bytes: for each trainable value, on the card.
        packing: False if batches are padded; then only the checkpointing is chosen.

    Raises:
        DoesNotFit: nothing fits.
    """
    device = forward.model.device
    if not packing or not forward.layers or device.type != "cuda":
        plan = unproven_plan(forward, tokens, checkpointing, longest, packing)
        forward.use(plan.checkpointing)
        logger.info(plan)
        return plan
    plans = [
        Plan(max(size, longest) if tokens is None else tokens, kept)
        for size, kept in PLANS
        if checkpointing in ("auto", kept) and (tokens is None or size == PLANS[0][0])
    ]
    # Free memory of the fullest card, so that all ranks try the same plans.
    free = least(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), device)
    optimizer_bytes += 4 * dist.is_initialized()  # DistributedDataParallel has a copy of the gradients
    fixed = fixed_bytes(forward, optimizer_bytes)
    beside = optimizer_bytes * sum(weight.numel() for weight in forward.model.parameters() if weight.requires_grad)
    sizes = {plan: estimate(forward.layers, forward.vocab, fixed, plan) for plan in dict.fromkeys(plans)}
    fitting = [plan for plan, size in sizes.items() if size < SPARE * free] or [min(sizes, key=sizes.get)]
    for plan in fitting:
        forward.use(plan.checkpointing, tokens=plan.tokens)
        if least(forward.probe(plan.tokens, beside), device):
            logger.info(f"{plan}: about {sizes[plan] / GIB:.1f} of {free / GIB:.1f} GiB")
            return plan
        logger.warning(f"{plan}: out of memory on the longest row")
    plain = any(part.plain is not None for part in forward.layers[0].projections)
    remedy = "set base_bits to 4, " * plain
    raise DoesNotFit(
        f"{plan} needs about {sizes[plan] / GIB:.1f} GiB, of which {free / GIB:.1f} are free: lower packing_length, "
        f"max_seq_length or lora_rank, set activation_checkpointing to auto, {remedy}or free the card of other programs"
    )


def unproven_plan(forward: PackedForward, tokens: int | None, checkpointing: str, longest: int, packing: bool) -> Plan:
    """Choose without a proof: for a model's own layers, which have no estimate, or a CPU, which has no card to fill."""
    if checkpointing == "auto":
        checkpointing = FULL if forward.on_cuda else NONE
    size = PLANS[0][0]
    if not forward.layers:
        size = UNFUSED_TOKENS
        checkpointing = NONE if checkpointing == NONE else FULL  # a model's own layers keep all, or their input alone
        if packing and not forward.isolates():
            logger.warning("padded batches, which are slower: in rows, this model's samples would see each other")
            packing = False
    return Plan((tokens or max(size, longest)) if packing else PADDED, checkpointing)


def least(number: int, device: torch.device) -> int:
    """The smallest of all ranks' numbers."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(int(number), device=device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value.item()
