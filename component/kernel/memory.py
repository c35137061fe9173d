"""GPU memory of a step: estimated beforehand, chosen by, and proven on the largest row before the first step."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from loguru import logger

from ..run.errors import DoesNotFit
from .head import LOGITS
from .layer import CHECKPOINTING, FULL, NONE, OFFLOAD, SELECTIVE, Layer
from .model import PackedForward

GIB = 2**30
FOUR_BIT = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a value: itself, and its shares of an 8-bit scale and of that one's
SPARE = 0.92  # of the card's memory that may be planned with; fragments and libraries take the rest
# (tokens of a row, what layers keep), fastest first. Measured are 8,192 and the offloaded 2,048 (benchmark/README.md).
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
PADDED = 0  # tokens of a row where there is none
UNFUSED_TOKENS = 2048  # of a row whose attention needs a mask of tokens x tokens


@dataclass(frozen=True)
class Plan:
    tokens: int  # of a packed row, at most, or PADDED
    checkpointing: str

    def __str__(self) -> str:
        layout = f"rows of {self.tokens:,} tokens" if self.tokens != PADDED else "padded batches"
        return f"{layout}, activation_checkpointing {self.checkpointing}"


def estimate(layers: list[Layer], vocab: int, fixed: int, plan: Plan) -> int:
    """Bytes at the peak of a step.

    Args:
        layers: of a PackedForward.
        fixed: bytes of weights, adapters, their gradients and what of the optimizer stays on the card.
    """
    layer = layers[0]
    size = layer.norm.element_size()
    hidden, intermediate = layer.out.width, layer.down.in_features
    low = sum(projection.rank for projection in layer.projections)
    inside = layer.qkv.width + layer.out.in_features + hidden + low  # kept of a layer beside its input and its MLP
    if layer.head_norms:
        inside += (layer.heads + layer.groups) * layer.head_dim
    wide = 2 * intermediate
    kept = {NONE: hidden + inside + wide, SELECTIVE: hidden + inside, FULL: hidden, OFFLOAD: 0}[plan.checkpointing]
    again = {NONE: 0, SELECTIVE: wide, FULL: inside + wide, OFFLOAD: 2 * hidden + inside + wide}[plan.checkpointing]
    widest = max(projection.width * projection.in_features for projection in layer.projections)
    backward = plan.tokens * (again + intermediate + 5 * hidden) * size + widest * size
    head = LOGITS * size + plan.tokens * 3 * hidden * size
    return fixed + plan.tokens * kept * len(layers) * size + max(backward, head)


def fixed_bytes(forward: PackedForward, optimizer_bytes: int) -> int:
    """Of weights, and for each trainable value its gradient and `optimizer_bytes`.

    The linear layers of a model that is still on the meta device count as the 4 bits that they will have.
    """
    bases = {base.weight for layer in forward.layers for part in layer.projections for base in part.bases}
    total = 0
    for weight in forward.model.parameters():
        four_bit = weight.is_meta and weight in bases
        total += int(weight.numel() * FOUR_BIT) if four_bit else weight.numel() * weight.element_size()
        total += weight.numel() * (4 + optimizer_bytes) * weight.requires_grad
    return total


def table(forward: PackedForward, tokens: int, optimizer_bytes: int) -> str:
    """What each way of checkpointing is estimated to need, for a person."""
    fixed = fixed_bytes(forward, optimizer_bytes)
    sizes = (
        f"{kept} {estimate(forward.layers, forward.vocab, fixed, Plan(tokens, kept)) / GIB:.1f}"
        for kept in CHECKPOINTING
    )
    return f"GPU memory by estimate, in GiB, with rows of {tokens:,} tokens: {', '.join(sizes)}"


def optimizer_bytes(optim: str, on_card: bool) -> int:
    """Bytes of an optimizer's state for each trainable value: two moments.

    Paged ones lie in memory that the host can take back, so that none of them counts `on_card`.
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
    """Choose what was left open, prove it, and set the forward to it.

    Args:
        tokens: of a packed row; None: to be chosen.
        checkpointing: of layer.CHECKPOINTING, or auto.
        longest: tokens that the longest sample may have.
        optimizer_bytes: for each trainable value, on the card.
        packing: False: batches are padded, and nothing is to be chosen but what layers keep.

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
    # Of all ranks' cards the fullest, so that all try the same plans.
    free = least(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), device)
    optimizer_bytes += 4 * dist.is_initialized()  # DistributedDataParallel has a copy of the gradients
    fixed = fixed_bytes(forward, optimizer_bytes)
    beside = optimizer_bytes * sum(weight.numel() for weight in forward.model.parameters() if weight.requires_grad)
    sizes = {plan: estimate(forward.layers, forward.vocab, fixed, plan) for plan in dict.fromkeys(plans)}
    fitting = [plan for plan, size in sizes.items() if size < SPARE * free] or [min(sizes, key=sizes.get)]
    for plan in fitting:
        forward.use(plan.checkpointing)
        if least(forward.probe(plan.tokens, beside), device):
            logger.info(f"{plan}: about {sizes[plan] / GIB:.1f} of {free / GIB:.1f} GiB")
            return plan
        logger.warning(f"{plan}: out of memory on the longest row")
    raise DoesNotFit(
        f"{plan} needs about {sizes[plan] / GIB:.1f} GiB, of which {free / GIB:.1f} are free: lower packing_length, "
        "max_seq_length or lora_rank, set activation_checkpointing to auto, or free the card of other programs"
    )


def unproven_plan(forward: PackedForward, tokens: int | None, checkpointing: str, longest: int, packing: bool) -> Plan:
    """Where there is nothing to estimate with (a model's own layers) or nothing to run out of (a CPU)."""
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
