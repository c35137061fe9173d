"""Work by several processes, with results in order."""

import gc
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

from ..run.errors import DataError


def in_order(work: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """`map(work, tasks)` by several processes, with few tasks in flight, so that memory stays small.

    The processes are forks, as a DataLoader's are. They inherit the first item of the tasks, which must be one object
    in all of them, without a copy.
    """
    if workers < 2:
        yield from map(work, tasks)
        return
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    shared = first[0]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(workers, get_context("fork"), begin_worker, (work, shared)) as pool:
        waiting: deque = deque()
        try:
            for _, *rest in itertools.chain([first], tasks):
                waiting.append(pool.submit(work_on, rest))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that prepares the data was killed, perhaps for want of memory; lower preprocessing_workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def begin_worker(work: Callable, shared: object) -> None:
    global work_on_shared
    Thread(target=end_with_parent, daemon=True).start()
    gc.freeze()  # the collector need not look through what comes from the parent
    work_on_shared = lambda rest: work((shared, *rest))  # noqa: E731


def end_with_parent() -> None:
    """Exit when the parent is gone: if it was killed, it cannot end its pool, whose processes would wait for ever."""
    parent_process().join()
    os._exit(1)


def work_on(rest: list):
    return work_on_shared(rest)
