"""What a person looks at: log lines, tables, a rendered sample, the picture of the loss."""

import io
import logging
import math
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .cache import write_atomically

LEARNED, PLAIN = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)S?$")
SECRET_TEXT = re.compile(r"(?<=://)[^/\s'\"]+@|\bhf_\w{20,}")


def redact(text: str) -> str:
    """A text without the values of environment variables that are secret by their name (of 8 characters on),
    credentials in URLs, and Hugging Face tokens."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name):
            text = text.replace(value, f"<{name}>")
    return SECRET_TEXT.sub(lambda match: "<credentials>@" if match[0].endswith("@") else "<token>", text)


class RedactedStream:
    """Standard output or error, all that is written to which passes `redact`: lines, tables, tracebacks, warnings."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.stream.write(redact(text))


def configure_logging(rank: int) -> None:
    """One readable line an event, above the progress bar; of other ranks than 0 what is bound to `any_rank` alone.
    Libraries speak up from warnings on.

    Nothing that is printed from here on holds a secret.
    """
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, RedactedStream) else RedactedStream(stream) for stream in (sys.stdout, sys.stderr)
    )
    logger.remove()
    logger.add(
        lambda line: tqdm.write(line, file=sys.stderr, end=""),
        format="{time:HH:mm:ss} {level: <7} {message}",
        filter=lambda record: rank == 0 or "any_rank" in record["extra"],
        diagnose=False,  # a traceback shows code, never the values of variables
    )
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).handlers = [logging.lastResort]  # theirs hold the error stream of their import
    transformers_logging.set_verbosity(logging.WARNING if rank == 0 else logging.ERROR)
    transformers_logging.disable_progress_bar()
    # Not for the user: a hint at a package of kernels from a hub, and how peft reads a renamed property.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers says nothing below errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


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
