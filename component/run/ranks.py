"""Work that one rank does for all, work that succeeds on all ranks or fails on all, and facts that must be the same."""

import functools
import itertools
import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from loguru import logger
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from .errors import ArgumentError, Fault, RankLost
from .resume import is_digest

Result = TypeVar("Result")
Outcome = tuple[Result | None, Exception | None]
calls = itertools.count()
TOLD = "told by rank 0"  # note on an error that rank 0 logs and one rank of every other machine repeats
BUCKET = 32 << 20  # bytes that one reduction sums, few because it makes a copy of them
ARRIVAL = 600  # seconds within which the last rank must start; torchrun's agents wait as long for one another
BEAT, SILENCE = 5, 60  # seconds between signs of life, and seconds without any until a rank counts as lost
READING = 5  # seconds that the store's machine stays after an error, so that the others can read it


def on_rank_zero(make: Callable[[], Result]) -> Result:
    """Run `make` on rank 0 alone and hand its result, or its exception, to every rank. Both must be picklable.

    The other ranks wait at the process group's store. In a collective, long work would run into its timeout.
    """
    if not dist.is_initialized():
        return make()
    store, key = _get_default_store(), next_key("on_rank_zero")
    if this_rank() == 0:
        outcome = attempt(make)
        store.set(key, pickle.dumps(outcome))
    else:
        outcome = read(store, key)
    result, error = outcome
    if error is not None:
        await_readers(store, key)
        raise known_to_all(error)
    return result


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank, and return this rank's result when all ranks are done.

    If it failed on some ranks, every rank raises the exception of the lowest of them. The exception names that rank and
    its host, unless all ranks failed alike.

    In `work`, ranks must not wait for one another, since one of them may fail. Before there is a process group, ranks
    meet at the launcher's store.
    """
    result, error = attempt(work)
    raise_first(gather(error and (error, where_this_is())))
    return result


def on_each_machine(work: Callable[[], None]) -> None:
    """Run `work` on the first rank of every machine, and return on all ranks when it is done everywhere.

    The work may take any time. If it failed, every rank raises the exception of the lowest rank that failed. The
    exception names that rank and its host, unless the work failed alike on all machines.

    Raises:
        RankLost: a rank gave no sign of life while others waited for it.
    """
    if not dist.is_initialized():
        work()
        return
    store, key = _get_default_store(), next_key("on_each_machine")
    workers = [rank for rank, local in enumerate(gather(local_rank())) if local == 0]
    if local_rank() == 0:
        with signs_of_life(store, sign_of(key, this_rank())):
            _, error = attempt(work)
        store.set(f"{key}/{this_rank()}", pickle.dumps(error and (error, where_this_is())))
    try:
        raise_first([read(store, f"{key}/{rank}", sign_of(key, rank)) for rank in workers])
    except Exception:
        await_readers(store, key)
        raise


def require_same(find: Callable[[], dict[str, Any]], remedy: str) -> None:
    """Require that `find` returns the same on the first rank of every machine as on rank 0.

    Raises:
        ArgumentError: on every rank, if values differ. The text names both hosts, and ends with `remedy`.
    """
    if not dist.is_initialized():
        return
    found = on_every_rank(lambda: (where_this_is(), find()) if local_rank() == 0 else None)
    (first, facts), *others = filter(None, gather(found))
    for where, values in others:
        different = [key for key in sorted(facts) if facts[key] != values[key]]
        if different:
            lines = [describe_difference(key, facts[key], first, values[key], where) for key in different]
            raise known_to_all(ArgumentError(f"{'; '.join(lines)}; {remedy}"))
    if local_rank() == 0 and this_rank():
        logger.bind(any_rank=True).info(f"{where_this_is()} has joined; the log is that of {first}")


def gather(value: Result) -> list[Result]:
    """Collect the values of all ranks on every rank. They must be picklable."""
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
    if not is_launched():
        return [value]
    store, key = launchers_store(), f"luciole/gather/{next(calls)}"
    store.set(f"{key}/{this_rank()}", pickle.dumps(value))
    values = [read(store, f"{key}/{rank}", seconds=ARRIVAL) for rank in range(world_size())]
    await_readers(store, key)
    return values


def raise_first(errors: list[tuple[Exception, str] | None]) -> None:
    """Raise the first of these (error, where it was raised), if any. All ranks call this with the same list."""
    raised = list(filter(None, errors))
    if not raised:
        return
    error, where = raised[0]
    is_everyones = len(raised) == len(errors) and len({str(other) for other, _ in raised}) == 1
    raise known_to_all(error if is_everyones else with_place(error, where))


def with_place(error: Exception, where: str) -> Exception:
    """An error like this one that also says where it was raised."""
    if isinstance(error, Fault):
        return type(error)(f"{where}: {error}")
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, f"{error.strerror}, {where}", error.filename)
    error.add_note(where)
    return error


def known_to_all(error: Exception) -> Exception:
    """Mark an error that is raised on every rank, so that it is reported once on each machine."""
    if this_rank():
        error.add_note(TOLD)
    return error


def fault_of(error: Exception) -> Fault | None:
    """The Fault that an error is, or RankLost if a library reports that another process or the store is gone."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return RankLost(
            f"{where_this_is()} has lost another process of this run; look at the output of its machine, and start the "
            f"same command on all machines: the run goes on from its last checkpoint ({first_line(error)})"
        )
    return None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def attempt(work: Callable[[], Result]) -> Outcome:
    try:
        return work(), None
    except Exception as error:
        return None, portable(error)


def portable(error: Exception) -> Exception:
    """The error itself, or a RuntimeError with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def is_launched() -> bool:
    """Whether a launcher such as torchrun has started several processes for one run."""
    return "LOCAL_RANK" in os.environ and world_size() > 1


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def where_this_is() -> str:
    return f"rank {this_rank()} on {socket.gethostname()}"


def next_key(name: str) -> str:
    return f"luciole/{group_name()}/{name}/{next(calls)}"


@functools.cache
def group_name() -> str:
    """A name that all ranks of this process group share, and no other group has.

    When torchrun restarts the ranks, it keeps the store with all that the earlier ranks wrote. The number of restarts
    cannot be the name, since each machine counts its own.
    """
    return gather(uuid4().hex)[0]


@functools.cache
def launchers_store() -> dist.Store:
    """The store at which the process group will be formed.

    Raises:
        RankLost: rank 0's machine cannot be reached.
    """
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))[0]
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(
            f"{where_this_is()} cannot reach rank 0's machine at {address} ({first_line(error)}); the name must lead "
            "there from every machine, and its ports be open: torchrun --local_addr=ADDRESS there gives another name"
        ) from None


def read(store: dist.Store, key: str, sign: str | None = None, seconds: float | None = None) -> Any:
    """Wait until a rank has written a value under `key`, and return it.

    Args:
        sign: the key under which the rank gives signs of life meanwhile.
        seconds: how long to wait at most, if there is no `sign`.

    Raises:
        RankLost: no sign of life came for SILENCE seconds, or no value within `seconds`.
    """
    begun = heard = time.monotonic()
    last = None
    while not store.check([key]):  # during store.wait, no signal would be handled
        time.sleep(0.02)
        now = time.monotonic()
        if sign and store.check([sign]) and (beat := store.get(sign)) != last:
            last, heard = beat, now
        silent = now - heard > SILENCE if sign else seconds and now - begun > seconds
        if silent:
            raise RankLost(
                f"{where_this_is()} hears nothing from rank {key.rpartition('/')[2]}; look at the output of its "
                "machine, and start the same command on all machines"
            )
    return pickle.loads(store.get(key))


@contextmanager
def signs_of_life(store: dist.Store, key: str) -> Iterator[None]:
    """Change the value under `key` every BEAT seconds until the `with` block ends."""
    done = Event()

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone; its next use will raise an error
            for count in itertools.count():
                store.set(key, str(count))
                if done.wait(BEAT):
                    return

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def sign_of(key: str, rank: int) -> str:
    return f"{key}/alive/{rank}"


def await_readers(store: dist.Store, key: str) -> None:
    """On the machine whose store may end with this process, wait until every rank has read the value under `key`."""
    count, deadline = store.add(f"{key}/read", 1), time.monotonic() + READING
    if os.environ.get("GROUP_RANK", "0") == "0":
        while count < world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
            count = store.add(f"{key}/read", 0)


def describe_difference(key: str, expected: Any, first: str, found: Any, where: str) -> str:
    if is_digest(found):
        return f"{key}: other contents on {where} than on {first}"
    shown, wanted = (json.dumps(value, default=str, ensure_ascii=False) for value in (found, expected))
    return f"{key}: {shown} on {where}, {wanted} on {first}"


def sum_over_ranks(*tensors: torch.Tensor) -> torch.Tensor | None:
    """Sum each tensor over all ranks, in place. All tensors of a call have the same dtype. Returns the first."""
    if dist.is_initialized():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
    return tensors[0] if tensors else None


def total_over_ranks(device: torch.device, value: torch.Tensor) -> float | int:
    """The sum over all ranks of a scalar on the host. With several ranks, it is added up on `device`."""
    return sum_over_ranks(value.to(device, copy=True)).item() if dist.is_initialized() else value.item()


def buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors, in order: as many at a time as fit into BUCKET bytes, but at least one."""
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
    """The largest of each value over all ranks. The values are compared on `device`."""
    if all(isinstance(value, int) for value in values):
        if not dist.is_initialized():
            return list(values)  # without a wait for the card
        facts = torch.tensor(values, dtype=torch.int64, device=device)
    else:
        facts = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(facts, dist.ReduceOp.MAX)
    return facts.tolist()


def copy_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the values that rank 0 has, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
