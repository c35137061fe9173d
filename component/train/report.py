"""Shows a run to a person: settings in words, tables, a rendered sample, the picture of the loss."""

import io
import math
import sys
from collections import defaultdict
from pathlib import Path

from loguru import logger
from torch import nn

from ..kernel.model import PackedForward
from ..run.files import write_atomically
from ..run.log import counted
from .adamw import FusedAdamW
from .updates import count_steps, count_updates

LEARNED, PLAIN = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")


SCHEDULES = {  # lr_scheduler_type: what the learning rate does after its warm-up
    "linear": "falls in a straight line to 0",
    "cosine": "falls along a cosine to 0",
    "cosine_with_restarts": "falls along a cosine to 0 and starts again, as lr_scheduler_kwargs say",
    "polynomial": "falls along a polynomial",
    "constant": "stays",
    "constant_with_warmup": "stays",
    "inverse_sqrt": "falls with the square root of the updates",
    "reduce_lr_on_plateau": "falls where evaluations get no better",
    "cosine_with_min_lr": "falls along a cosine to the least that lr_scheduler_kwargs say",
    "cosine_warmup_with_min_lr": "falls along a cosine to the least that lr_scheduler_kwargs say",
    "warmup_stable_decay": "stays, and falls at the end",
    "greedy": "follows the loss",
}
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def describe_update(training_args) -> str:
    """Say how many samples an update has, and why."""
    ranks, batch = training_args.world_size, training_args.per_device_train_batch_size
    batches = training_args.gradient_accumulation_steps
    return (
        f"an update is {ranks * batch * batches} samples: {ranks} process{'es' * (ranks > 1)} x {batch} x {batches} "
        "(per_device_train_batch_size x gradient_accumulation_steps)"
    )


def describe_schedule(rows: int | None, training_args) -> str:
    """Say how long a run is and how its learning rate moves. `rows` is the number of samples, None for a stream."""
    steps, schedule = count_steps(rows, training_args), training_args.lr_scheduler_type.value
    if rows is None:
        length = f"{counted(steps, 'update')} (max_steps) from a stream"
    elif training_args.max_steps > 0:
        epochs = steps / count_updates(rows, training_args)
        length = (
            f"{counted(steps, 'update')} (max_steps), {counted(epochs, 'epoch', '.3g')} of {counted(rows, 'sample')}"
        )
    else:
        epochs = counted(training_args.num_train_epochs, "epoch", "g")
        length = f"{epochs} of {counted(rows, 'sample')}: {counted(steps, 'update')}"
    rate = training_args.learning_rate
    warmup = 0 if schedule in WITHOUT_WARMUP else training_args.get_warmup_steps(steps)
    if warmup >= steps:
        reached = f"to {rate * steps / warmup:g} of {rate:g}"
        return (
            f"{length}; the learning rate only rises, {reached}, as warmup_steps={warmup:,} covers the run ({schedule})"
        )
    rise = (
        f"rises to {rate:g} over {counted(warmup, 'update')} of warm-up, then"
        if warmup
        else (f"begins at {rate:g} without a warm-up and")
    )
    return f"{length}; the learning rate {rise} {SCHEDULES[schedule]} ({schedule})"


def describe_ways(forward: PackedForward, optimizer: type) -> str:
    """Say by which of several ways a run with fused layers computes, of which not every machine has the fastest."""
    rows = "rows as CUDA graphs" if forward.graphs else "rows launched kernel by kernel"
    step = "AdamW in one launch" if issubclass(optimizer, FusedAdamW) else f"optimizer {optimizer.__name__}"
    return f"attention {forward.layers[0].attention.name}, {rows}, {step}"


def parameter_table(model: nn.Module) -> str:
    """Table of parameters by dtype and trainability. 4-bit ones count as weights, not as the bytes that hold them."""
    counts: dict[tuple[str, bool], int] = defaultdict(int)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        dtype = str(parameter.dtype).removeprefix("torch.") if state is None else f"4-bit {state.quant_type}"
        counts[dtype, parameter.requires_grad] += math.prod(parameter.shape if state is None else state.shape)
    total = sum(counts.values())
    lines = [f"{'dtype':<12}{'trainable':<12}{'parameters':>16}{'share':>9}"]
    for (dtype, trainable), count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f"{dtype:<12}{'yes' if trainable else 'no':<12}{count:>16,}{count / total:>9.2%}")
    return "\n".join([*lines, f"{'total':<24}{total:>16,}"])


def render_sample(sample: dict[str, list[int]], tokenizer) -> str:
    """Show a sample as text. Learned stretches are green on a terminal, and between ⟦ and ⟧ elsewhere."""
    ids, mask = sample["input_ids"], sample["target_mask"]
    # ChatGLM's decoding drops the end of sequence, which the reader wants to see.
    end_text = "" if tokenizer.decode([tokenizer.eos_token_id]) else tokenizer.eos_token
    rendered = decoded = ""
    for end in range(1, len(ids) + 1):
        ends_sequence = ids[end - 1] == tokenizer.eos_token_id
        if end == len(ids) or mask[end] != mask[end - 1] or ends_sequence:
            whole = tokenizer.decode(ids[:end])
            part = whole[len(decoded) :] + end_text * ends_sequence
            rendered += f"{LEARNED}{part}{PLAIN}" if mask[end - 1] else part
            decoded = whole
    return rendered


def plot_loss(history: list[dict], path: str | Path) -> None:
    """Draw the training loss by step, and the evaluation loss if there is any, as a PNG.

    An error is only logged, since a missing picture is no reason to end a run.

    Args:
        history: `trainer.state.log_history`.
    """
    try:
        write_atomically(path, draw_loss(history))
    except Exception as error:
        logger.warning(f"{path} could not be drawn: {error}")


def draw_loss(history: list[dict]) -> bytes:
    """A PNG of 960 x 540 pixels, from `trainer.state.log_history`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
    axes.set(xlabel="step", ylabel="loss per learned token", title="Luciole")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture.getvalue()
