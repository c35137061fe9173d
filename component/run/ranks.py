"""Work that one process does for all, and work that all do or none has done."""

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

Result = TypeVar("Result")
calls = itertools.count()
TOLD = "told by rank 0"
BUCKET = 32 << 20  # bytes that one reduction takes, so that its copy takes little memory


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


def on_every_rank(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every rank, and return what it returned on each; the lowest rank's exception is raised on all.

    In `work`, ranks must not wait for one another: one of them may fail.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = portable(raised)
    outcomes = gather((result, error))
    if error := next(filter(None, (error for _, error in outcomes)), None):
        raise known_to_all(error)
    return [result for result, _ in outcomes]


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


def sum_over_ranks(*tensors: torch.Tensor) -> torch.Tensor | None:
    """Sum each tensor over all ranks, in place. Tensors of one call have one dtype. Returns the first."""
    if dist.is_initialized():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
    return tensors[0] if tensors else None


def buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors in order, as many at a time as BUCKET bytes hold, at least one."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def largest_over_ranks(device: torch.device, *values: int | torch.Tensor) -> list[int]:
    """The largest of each value over all ranks. Ranks meet on `device`."""
    facts = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(facts, dist.ReduceOp.MAX)
    return facts.tolist()


def copy_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the values that rank 0 has, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
