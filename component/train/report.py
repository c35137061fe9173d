"""What a person looks at: tables, a rendered sample, the picture of the loss."""

import io
import math
import sys
from collections import defaultdict
from pathlib import Path

from torch import nn

from ..run.files import write_atomically

LEARNED, PLAIN = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")


def parameter_table(model: nn.Module) -> str:
    """Parameters by dtype and trainability, 4-bit ones counted as weights, not as the bytes that they are packed in."""
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
    """A sample as text, its learned stretches in green on a terminal and between ⟦ and ⟧ elsewhere."""
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
    """Training loss by step, and evaluation loss where there is any, from `trainer.state.log_history`, as a PNG."""
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
    write_atomically(path, picture.getvalue())
