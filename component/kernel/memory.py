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
from .graph import pays
from .head import LOGITS
from .layer import FULL, NONE, OFFLOAD, SELECTIVE, Layer
from .model import PackedForward
from .projection import Projection

GIB = 2**30
# Bytes per value: 4 bits, its part of the 8-bit scale of 64 values, and that scale's part of the float32 of 256 scales.
FOUR_BIT = 0.5 + 1 / 64 + 4 / 64 / 256
WORKSPACE = 5.2  # bytes that cuDNN's attention takes in a backward for each value of a context, measured on an H100
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
    """Estimate the bytes at the peak of a step, as on a card with cuDNN's attention and CUDA graphs.

    So a sketch has the estimate of the model, whatever runs on the machine; without these two a step needs less.

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
    together = backward + head if pays(layer, plan.checkpointing, plan.tokens) else max(backward, head)
    workspace = plan.tokens * layer.out.in_features * WORKSPACE
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


def estimates(forward: PackedForward, plans: list[Plan], optimizer_bytes: int) -> dict[Plan, int]:
    """Estimated bytes of plans, the fastest first. Those that need no less than one before them are left out."""
    fixed, sizes = fixed_bytes(forward, optimizer_bytes), {}
    for plan in plans:
        size = estimate(forward.layers, forward.vocab, fixed, plan)
        if size < min(sizes.values(), default=math.inf):
            sizes[plan] = size
    return sizes


def list_plans(forward: PackedForward, plans: list[Plan], optimizer_bytes: int) -> str:
    """Lines for the user: the plans that a run may take, and their estimated memory."""
    sizes = estimates(forward, plans, optimizer_bytes)
    return (
        f"A run takes the first of these that needs less than {SPARE:.0%} of the card's free memory (GiB by estimate) "
        "and passes a trial:" + "".join(f"\n  {size / GIB:6.1f}  {plan}" for plan, size in sizes.items())
    )


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
    ways = None if keeps_weights is None else sorted({keeps_weights, False}, reverse=True)  # of the same values
    most = samples * longest if samples else math.inf  # tokens of all samples together
    plans = (
        Plan(max(longest, min(size, most)) if tokens is None else tokens, kept, keeps)
        for size, kept, fastest in PLANS
        if checkpointing in ("auto", kept)
        for keeps in ways or [fastest]
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
    goes_on: bool = False,
) -> Plan:
    """Choose the parts of a plan that were left open, prove the plan, and set `forward` to it.

    Args:
        tokens: of a packed row; None to have them chosen.
        checkpointing: one of layer.CHECKPOINTING, or auto.
        longest: tokens that the longest sample may have.
        optimizer_bytes: for each trainable value, on the card.
        packing: False if batches are padded; then only the checkpointing is chosen.
        samples: of an update on one rank, so that no row is longer than they are; None if that is not known.
        keeps_weights: whether weights may be kept unpacked; None to have it chosen, if `tokens` are chosen too.
        goes_on: whether this is the plan of a run that was begun with it.

    Raises:
        DoesNotFit: nothing fits.
    """
    device = forward.model.device
    if not packing or not forward.layers or device.type != "cuda":
        plan = unproven_plan(forward, tokens, checkpointing, longest, packing)
        forward.use(plan.checkpointing)
        logger.info(plan)
        return plan
    plans = possible_plans(tokens, checkpointing, longest, samples, keeps_weights)
    return prove_plan(forward, plans, optimizer_bytes, advise(forward, tokens, checkpointing, longest, goes_on))


def advise(forward: PackedForward, tokens: int | None, checkpointing: str, longest: int, goes_on: bool) -> str:
    """What to do where nothing fits, beside freeing memory. Arguments are those of `choose_plan`."""
    if goes_on:
        shorter = max(longest, min(8192, tokens // 2))
        return (
            "this run was begun with such rows; go on, not exactly, with "
            f"packing_length={shorter} resume_despite_changes=true"
        )
    rows = "packing_length, " * (tokens is not None and tokens > longest)
    remedies = [f"lower {rows}max_seq_length or lora_rank"]
    if checkpointing != "auto":
        remedies.append("set activation_checkpointing to auto")
    if any(part.plain is not None for part in forward.layers[0].projections):
        remedies.append("set base_bits to 4")
    return ", ".join(remedies)


def prove_plan(forward: PackedForward, plans: list[Plan], optimizer_bytes: int, advice: str) -> Plan:
    """Set `forward` to the first plan that fits by estimate and on the longest row. Raises DoesNotFit with `advice`."""
    device = forward.model.device
    # Free memory of the fullest card and host, so that all ranks try the same plans.
    free = least(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), device)
    host = least(host_memory(), device)
    beside = optimizer_bytes * sum(weight.numel() for weight in forward.model.parameters() if weight.requires_grad)
    sizes = estimates(forward, plans, optimizer_bytes)
    fitting = {plan: size for plan, size in sizes.items() if size < SPARE * free}
    for plan in fitting or [min(sizes, key=sizes.get)]:
        size, available = f"{sizes[plan] / GIB:.1f} GiB", f"{free / GIB:.1f}"
        release = "free the card of other programs"
        if (pinned := pinned_bytes(forward.layers, plan)) > host:
            fault = f"needs {pinned / GIB:.1f} GiB of the host's memory, of which it may take {host / GIB:.1f}"
            release = "free the host's memory or raise the container's limit"
            logger.warning(f"{plan}: not enough memory of the host")
        elif fits(forward, plan, beside):
            logger.info(f"{plan}: about {sizes[plan] / GIB:.1f} of {available} GiB")
            return plan
        else:
            fault = f"needs about {size}, of which {available} are free"
            if fitting:
                fault = f"ran out of memory, although by estimate it needs {size}, and {available} were free; another "
                fault += "program may have taken them"
            logger.warning(f"{plan}: out of memory on the longest row")
    raise DoesNotFit(f"{plan} {fault}: {advice}, or {release}")


def fits(forward: PackedForward, plan: Plan, beside: int) -> bool:
    """Set `forward` to a plan, and try it on the longest row, on all ranks. Weights that were kept for a plan that
    fails are freed.

    Args:
        beside: bytes that are still to come.
    """
    try:
        forward.use(plan.checkpointing, plan.keeps_weights, plan.tokens)
        done = forward.probe(plan.tokens, beside)
    except torch.cuda.OutOfMemoryError:  # there is no room to keep weights
        done = False
    done = bool(least(done, forward.model.device))
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
