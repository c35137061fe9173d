"""GPU memory of a step: an estimate, the choice of a plan by it, and the proof of that plan on the largest row."""

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from loguru import logger

from ..run.errors import DoesNotFit
from .decoder import free_memory
from .graph import suits
from .head import LOGITS
from .layer import CHECKPOINTING, FULL, NONE, OFFLOAD, SELECTIVE, Layer
from .model import PackedForward
from .projection import Projection

GIB = 2**30
# Bytes per value: 4 bits, its part of the 8-bit scale of 64 values, and that scale's part of the float32 of 256 scales.
FOUR_BIT = 0.5 + 1 / 64 + 4 / 64 / 256
SPARE = 0.92  # share of the free memory that a plan may use; fragments and libraries take the rest
# (tokens of a row, what layers keep, whether weights are kept unpacked), fastest first for ChatGLM3-6B on an H100. If
# two are about as fast there, the one that computes less is first, as it is faster on slower cards. Weights are kept
# beside `none` alone: elsewhere the same memory gains more if layers keep more.
PLANS = (
    (32768, NONE, True),
    (16384, NONE, True),
    (16384, NONE, False),
    (8192, NONE, True),
    (8192, NONE, False),
    (4096, NONE, False),
    (2048, NONE, False),
    (8192, SELECTIVE, False),
    (4096, SELECTIVE, False),
    (32768, FULL, False),
    (8192, FULL, False),
    (4096, FULL, False),
    (8192, OFFLOAD, False),
    (4096, OFFLOAD, False),
    (2048, OFFLOAD, False),
)
UNPROVEN_TOKENS = 8192  # of a row on a processor
PADDED = 0  # instead of the tokens of a row where batches are padded
UNFUSED_TOKENS = 2048  # of a row in a model's own layers, whose attention needs a mask of tokens x tokens


@dataclass(frozen=True)
class Plan:
    tokens: int  # of a packed row at most, or PADDED
    checkpointing: str
    keeps_weights: bool = False

    def __str__(self) -> str:
        layout = f"rows of {self.tokens:,} tokens" if self.tokens != PADDED else "padded batches"
        weights = ", weights kept unpacked" * self.keeps_weights
        return f"{layout}, activation_checkpointing {self.checkpointing}{weights}"


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
    stays = layer.down.rank  # beside the input, however little is kept
    kept = {NONE: hidden + inside + wide, SELECTIVE: hidden + inside, FULL: hidden + stays, OFFLOAD: stays}
    again = {NONE: 0, SELECTIVE: wide, FULL: inside + wide, OFFLOAD: 2 * hidden + inside + wide}
    unpacked = [part.width * part.in_features for part in layer.projections if part.plain is None]
    widest = 0 if plan.keeps_weights else max(unpacked, default=0)  # a plain base is used as it lies
    weights = sum(map(kept_elements, layer.projections)) if plan.keeps_weights else 0
    backward = plan.tokens * (again[plan.checkpointing] + intermediate + 5 * hidden) + widest
    logits = min(2 * LOGITS, plan.tokens * vocab)  # one piece is still there when the next is made
    head = logits + plan.tokens * 3 * hidden  # its backward needs 6 * hidden, which is less than a layer's
    layers_keep = (plan.tokens * kept[plan.checkpointing] + weights) * len(layers)
    # Memory that recorded rows use is theirs alone, so that the head cannot use it after them.
    together = backward + head if suits(layers, plan.checkpointing, plan.tokens) else max(backward, head)
    workspace = plan.tokens * layer.out.in_features * layer.attention.workspace
    return fixed + (layers_keep + together) * size + int(workspace)


def kept_elements(part: Projection) -> int:
    """Elements that `Projection.keep` makes."""
    unpacked = part.width * part.in_features if part.plain is None else 0
    return unpacked + (part.width + part.in_features) * part.rank


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


def list_plans(forward: PackedForward, plans: list[Plan], optimizer_bytes: int) -> str:
    """Lines for the user: the plans that a run may take, and their estimated memory."""
    fixed = fixed_bytes(forward, optimizer_bytes)
    sizes = (f"\n  {estimate(forward.layers, forward.vocab, fixed, plan) / GIB:6.1f}  {plan}" for plan in plans)
    return f"A run takes the first of these that fits the card's free memory, in GiB by estimate:{''.join(sizes)}"


def optimizer_bytes(optim: str, on_card: bool) -> int:
    """Bytes of an optimizer's state, two moments, for each trainable value.

    Paged moments can move to the host's memory, so they do not count `on_card`.
    """
    if "sgd" in optim or (on_card and "paged" in optim):
        return 0
    return 2 if "8bit" in optim else 8


def possible_plans(
    tokens: int | None,
    checkpointing: str,
    longest: int,
    samples: int | None = None,
    keeps_weights: bool | None = None,
) -> list[Plan]:
    """Plans in which stands what was asked for, the fastest first. Arguments are those of `choose_plan`."""
    if tokens is not None and keeps_weights is None:
        keeps_weights = False  # who limits the rows limits the memory
    most = samples * longest if samples else math.inf  # tokens of all samples together
    plans = (
        Plan(
            max(longest, min(size, most)) if tokens is None else tokens,
            kept,
            keeps if keeps_weights is None else keeps_weights,
        )
        for size, kept, keeps in PLANS
        if checkpointing in ("auto", kept)
    )
    return list(dict.fromkeys(plans))


def choose_plan(
    forward: PackedForward,
    tokens: int | None,
    checkpointing: str,
    longest: int,
    optimizer_bytes: int,
    packing: bool = True,
    samples: int | None = None,
    keeps_weights: bool | None = None,
) -> Plan:
    """Choose the parts of a plan that were left open, prove the plan, and set `forward` to it.

    Args:
        tokens: of a packed row; None to have them chosen.
        checkpointing: one of layer.CHECKPOINTING, or auto.
        longest: tokens that the longest sample may have.
        optimizer_bytes: for each trainable value, on the card.
        packing: False if batches are padded; then only the checkpointing is chosen.
        samples: of an update on one rank, so that no row is longer than they are; None if that is not known.
        keeps_weights: whether weights are kept unpacked; None to have it chosen, if `tokens` are chosen too.

    Raises:
        DoesNotFit: nothing fits.
    """
    device = forward.model.device
    if not packing or not forward.layers or device.type != "cuda":
        plan = unproven_plan(forward, tokens, checkpointing, longest, packing)
        forward.use(plan.checkpointing)
        logger.info(plan)
        return plan
    return prove_plan(forward, possible_plans(tokens, checkpointing, longest, samples, keeps_weights), optimizer_bytes)


def prove_plan(forward: PackedForward, plans: list[Plan], optimizer_bytes: int) -> Plan:
    """Set `forward` to the first plan that fits by estimate and on the longest row. Raises DoesNotFit."""
    device = forward.model.device
    # Free memory of the fullest card and host, so that all ranks try the same plans.
    free = least(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), device)
    host = least(host_memory(), device)
    optimizer_bytes += 4 * dist.is_initialized()  # DistributedDataParallel has a copy of the gradients
    fixed = fixed_bytes(forward, optimizer_bytes)
    beside = optimizer_bytes * sum(weight.numel() for weight in forward.model.parameters() if weight.requires_grad)
    sizes = {plan: estimate(forward.layers, forward.vocab, fixed, plan) for plan in plans}
    fitting = [plan for plan, size in sizes.items() if size < SPARE * free] or [min(sizes, key=sizes.get)]
    for plan in fitting:
        needs = f"{plan} needs about {sizes[plan] / GIB:.1f} GiB, of which {free / GIB:.1f} are free"
        if (pinned := pinned_bytes(forward.layers, plan)) > host:
            needs += f", and {pinned / GIB:.1f} GiB of the host's memory, of which it may take {host / GIB:.1f}"
            logger.warning(f"{plan}: not enough memory of the host")
        elif least(fits(forward, plan, beside), device):
            logger.info(f"{plan}: about {sizes[plan] / GIB:.1f} of {free / GIB:.1f} GiB")
            return plan
        else:
            logger.warning(f"{plan}: out of memory on the longest row")
    plain = any(part.plain is not None for part in forward.layers[0].projections)
    remedy = "set base_bits to 4, " * plain
    raise DoesNotFit(
        f"{needs}: lower packing_length, max_seq_length or lora_rank, set activation_checkpointing to auto, {remedy}or "
        "free the card of other programs"
    )


def fits(forward: PackedForward, plan: Plan, beside: int) -> bool:
    """Set `forward` to a plan, and try it on the longest row. Weights that were kept for a plan that fails are freed.

    Args:
        beside: bytes that are still to come.
    """
    try:
        forward.use(plan.checkpointing, plan.keeps_weights, plan.tokens)
        done = forward.probe(plan.tokens, beside)
    except torch.cuda.OutOfMemoryError:  # there is no room to keep weights
        done = False
    if not done and plan.keeps_weights:
        forward.use(plan.checkpointing)
        torch.cuda.empty_cache()
    return done


def pinned_bytes(layers: list[Layer], plan: Plan) -> int:
    """Bytes of the host's memory that hold layers' inputs. torch takes a power of two for each."""
    each = plan.tokens * layers[0].out.width * layers[0].norm.element_size()
    return len(layers) * (1 << (each - 1).bit_length()) if plan.checkpointing == OFFLOAD else 0


def host_memory() -> int:
    """Bytes that this process may pin: its part of half of the machine's or container's memory."""
    return free_memory(torch.device("cpu")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def unproven_plan(forward: PackedForward, tokens: int | None, checkpointing: str, longest: int, packing: bool) -> Plan:
    """Choose without a proof: for a model's own layers, which have no estimate, or a CPU, which has no card to fill."""
    if checkpointing == "auto":
        checkpointing = FULL if forward.on_cuda else NONE
    size = UNPROVEN_TOKENS
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
