"""Decides what is done with an update whose loss or gradient is not finite, and finds the rows that cause it."""

from itertools import chain

import numpy as np
import torch
from loguru import logger

from ..run.errors import NumericError
from ..run.ranks import gather, known_to_all
from .batch import Sample
from .updates import Update

SHOWN_ROWS = 20  # rows of a bad update that each rank names
OVERFLOWS = 20  # float16 updates in a row that may overflow; each halves the loss scale


class Health:
    """Decides whether a trainer's updates may be used, and its weights written.

    Args:
        max_skipped: how many updates that are not finite a run may leave out.
    """

    def __init__(self, trainer, max_skipped: int):
        self.trainer, self.max_skipped = trainer, max_skipped

    def accepts(self, update: Update, bad_loss: int, bad_gradient: int) -> bool:
        """Whether an update may be used. All ranks call this together, with the same facts.

        A gradient that overflows float16 is accepted here: the loss scaler itself leaves the update out.

        Raises:
            NumericError: the update is not finite, and `max_skipped` updates have been left out before.
        """
        overflowed = bad_gradient and not bad_loss and self.trainer.accelerator.scaler is not None
        counters = self.trainer.counters
        counters.overflows = counters.overflows + 1 if overflowed else 0
        is_bad = bad_loss or counters.overflows > OVERFLOWS or (bad_gradient and not overflowed)
        if is_bad:
            self.refuse(update, "loss" if bad_loss else "gradient")
        return not is_bad

    def refuse(self, update: Update, what: str) -> None:
        """Leave an update out and log its rows, or raise NumericError if too many have been left out."""
        trainer = self.trainer
        rows = "\n  ".join(chain.from_iterable(gather(self.suspects(update))))
        message = f"step {trainer.state.global_step + 1}: the {what} is not finite. Rows of this update:\n  {rows}"
        trainer.counters.skipped += 1
        if trainer.counters.skipped > self.max_skipped:
            saved = trainer.checkpoints.saved_step
            whole = f"checkpoint-{saved} is as it was" if saved else "there is no checkpoint yet"
            raise known_to_all(
                NumericError(
                    f"{message}\nNothing of it was used; {whole}. Look at these rows (script/inspect_data.py); "
                    "set max_skipped_updates to leave such updates out, or begin anew with a lower learning_rate"
                )
            )
        logger.warning(f"{message}\nleft out, {trainer.counters.skipped} of max_skipped_updates={self.max_skipped}")

    @torch.no_grad()
    def suspects(self, update: Update) -> list[str]:
        """`file:line` of this rank's samples whose loss is not finite. If that is none or all of them, of all."""
        self.trainer.model.eval()
        bad = [not torch.isfinite(self.loss_of(sample)) for sample in update.samples]
        self.trainer.model.train()
        some = any(bad) and not all(bad)
        named = [s for s, is_bad in zip(update.samples, bad, strict=True) if is_bad] if some else update.samples
        names = [place_of(self.trainer.train_dataset, sample) for sample in named[:SHOWN_ROWS]]
        return [*names, f"and {len(named) - SHOWN_ROWS} more"] if len(named) > SHOWN_ROWS else names

    def loss_of(self, sample: Sample) -> torch.Tensor:
        (part,) = self.trainer.data_collator.lay_out([sample])
        return self.trainer.summed_loss(self.trainer.on_device(part))


def place_of(dataset, sample: Sample) -> str:
    """`file:line` of a sample, or its first tokens if neither it nor its dataset knows the place."""
    ids: np.ndarray = sample["input_ids"]
    place = sample.get("place") or (dataset.find_place(ids) if hasattr(dataset, "find_place") else None)
    return place or f"a sample of {len(ids)} tokens that begins with {ids[:10].tolist()}"
