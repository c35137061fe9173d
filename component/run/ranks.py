"""Work that one process does for all, and work that all do or none has done."""

import itertools
import os
import pickle
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

Result = TypeVar("Result")
calls = itertools.count()
TOLD = "told by rank 0"


def on_rank_zero(make: Callable[[], Result]) -> Result:
    """Run `make` on rank 0 alone and hand its result, or its exception, to every rank. Both must be picklable.

    The others wait at the group's store and not in a collective, whose timeout long work would trip.
    """
    if not dist.is_initialized():
        return make()
    # torchrun keeps the store when it starts the ranks again, and what the ranks before them said.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, key = _get_default_store(), f"luciole/on_rank_zero/{attempt}/{next(calls)}"
    if dist.get_rank() == 0:
        try:
            outcome = (make(), None)
        except Exception as error:
            outcome = (None, portable(error))
        store.set(key, pickle.dumps(outcome))
    else:
        while not store.check([key]):  # and not store.wait, during which no signal is handled
            time.sleep(0.02)
        outcome = pickle.loads(store.get(key))
    result, error = outcome
    if error is not None:
        raise known_to_all(error)
    return result


def on_every_rank(work: Callable[[], None]) -> None:
    """Run `work` on every rank, and return when all have; the lowest rank's exception is raised on all.

    In `work`, ranks must not wait for one another: one of them may fail.
    """
    error = None
    try:
        work()
    except Exception as raised:
        error = portable(raised)
    if error := next(filter(None, gather(error)), None):
        raise known_to_all(error)


def known_to_all(error: Exception) -> Exception:
    """An error that is raised on every rank, and need be told on rank 0 alone."""
    if dist.is_initialized() and dist.get_rank():
        error.add_note(TOLD)
    return error


def portable(error: Exception) -> Exception:
    """The error, or its text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather(value: Result) -> list[Result]:
    """Each rank's value, which must be picklable, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
