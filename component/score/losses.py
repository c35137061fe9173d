"""The loss of each conversation's learned tokens, by the packed forward of training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from accelerate.utils import send_to_device

from ..data.prepare import as_item
from ..data.render import TokenizedSample
from ..kernel.model import PackedForward, base_of
from ..run.errors import DataError
from ..train.batch import PackingCollator, pack
from .questions import Row

ROW = 4096  # tokens that go through the model at once, unless a row of data is longer
Told = Callable[[int], None]  # is told how many more are done


def render_row(row: Row, render: Callable, tokenizer) -> TokenizedSample:
    """Render a row as training does. Raises DataError, by file and line, if it cannot be rendered."""
    try:
        return render(row.conversation, tokenizer)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from None


def longest_answer(samples: Sequence[TokenizedSample]) -> int:
    """Tokens of the longest stretch that is learned."""
    stretches = (stretch for sample in samples for stretch in groupby(sample.target_mask))
    return max((len(list(run)) for learned, run in stretches if learned), default=0)


def count_learned(samples: Sequence[TokenizedSample]) -> np.ndarray:
    """(samples,) learned tokens of each. The first token is none, as nothing predicts it."""
    return np.array([sum(sample.target_mask[1:]) for sample in samples], dtype=float)


@torch.no_grad()
def summed_losses(
    model, samples: Sequence[TokenizedSample], adapted: bool, told: Told = lambda count: None
) -> np.ndarray:
    """(samples,) the sum of the cross-entropies of each sample's learned tokens, in natural logarithms.

    Args:
        model: with its adapter or without one.
        adapted: False for the base's own losses, without its adapter.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    longest = max(lengths, default=1)
    found = np.zeros(len(samples))
    with packed(model, longest, adapted) as forward:
        rows = pack(lengths, max(longest, ROW)) if forward.layers and samples else [[i] for i in range(len(samples))]
        for row in rows:
            laid_out = PackingCollator(ROW).lay_out_row(
                [as_item(samples[i].input_ids, samples[i].target_mask) for i in row]
            )
            if len(laid_out["targets"]):
                laid_out = send_to_device(laid_out, forward.model.device)
                sums = forward.losses_by_sample(**laid_out) if forward.layers else forward(**laid_out)[None]
                found[row] = sums.cpu().numpy()
            told(len(row))
    return found


@contextmanager
def packed(model, longest: int, adapted: bool) -> Iterator[PackedForward]:
    """A model's packed forward within the block, in which nothing is dropped out. Afterwards the model is as before."""
    training = model.training
    model.eval()
    inner = base_of(model)
    replaced = vars(inner).get("forward")
    try:
        yield PackedForward(model, longest, adapted=adapted)
    finally:
        vars(inner).pop("forward", None)
        if replaced is not None:
            inner.forward = replaced
        model.train(training)
