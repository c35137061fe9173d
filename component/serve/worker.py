"""The thread that owns the engine: it decodes the requests that are there together, and tells each what it got. Beside
it, the thread that reads requests."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from loguru import logger

from ..inference.engine import Engine
from ..inference.sampling import Generation, Sampling
from ..run.errors import ArgumentError, DataError
from ..run.log import counted
from .answer import Writer
from .protocol import ApiError

STEP_SECONDS = 3  # that the end of the program waits for a step
ENDING = ApiError(503, "the server is ending")


@dataclass(eq=False)
class Job:
    """A request that is being answered, by one generation for each of its writers.

    Attributes:
        deadline: on time.monotonic's clock.
        when_over: called in the event loop when all answers have ended, whether or not anyone hears of that.
        events: what the worker tells: choices of chunks; None when all answers have ended; an ApiError if they cannot.
    """

    prompt: list[int]
    samplings: Sequence[Sampling]
    writers: Sequence[Writer]
    adapted: bool
    deadline: float
    when_over: Callable[[], None] = lambda: None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    generations: list[Generation] = field(default_factory=list)

    @property
    def usage(self) -> dict:
        written = sum(len(generation.tokens) for generation in self.generations)
        cached = self.generations[0].cached if self.generations else 0
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": written,
            "total_tokens": len(self.prompt) + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Worker(threading.Thread):
    """Steps the engine while there is something to do, and sleeps otherwise.

    A step that fails ends all requests that are running with an error, and the engine is made anew. If it cannot be,
    the worker ends and calls `when_broken`.

    Args:
        make_engine: makes the engine, which nothing else may use.
        loop: where the jobs' events are put into their queues.
    """

    def __init__(self, make_engine: Callable[[], Engine], loop: asyncio.AbstractEventLoop, when_broken: Callable):
        super().__init__(name="engine", daemon=True)
        self.make_engine, self.loop, self.when_broken = make_engine, loop, when_broken
        self.engine = make_engine()
        self.room = self.engine.room
        self.change = threading.Condition()
        self.submitted: list[Job] = []
        self.cancelled: list[Job] = []
        self.running: list[Job] = []
        self.failure: ApiError | None = None  # of all that runs and waits
        self.is_closing = self.is_over = False
        self.told: list[tuple[Job, list]] = []

    def submit(self, job: Job) -> None:
        """Have a request answered. Raises ApiError when the thread has ended."""
        with self.change:
            if self.is_over:
                raise ENDING
            self.submitted.append(job)
            self.change.notify()

    def cancel(self, job: Job) -> None:
        with self.change:
            self.cancelled.append(job)
            self.change.notify()

    def fail_all(self, failure: ApiError) -> None:
        """End all requests that are there with an error."""
        with self.change:
            self.failure = failure
            self.change.notify()

    def close(self) -> None:
        """End the thread, and wait for that, but not for a step that takes long."""
        with self.change:
            self.is_closing = True
            self.change.notify()
        self.join(STEP_SECONDS)

    def run(self) -> None:
        while self.take_orders() and self.advance_all():
            pass
        with self.change:
            self.is_over = True
            self.running += self.submitted
        self.end_all(ENDING)

    def advance_all(self) -> bool:
        """Take a step, and tell what it gave. Returns False if the engine is lost."""
        try:
            if self.running:
                self.engine.step()
        except Exception as error:
            reason = reason_of(error)
        else:
            for job in list(self.running):
                self.guarded(job, self.advance)
            self.deliver()
            return True
        # Not within the block, where the error's trace holds the engine and its memory.
        logger.error(f"a step failed, and with it {counted(len(self.running), 'request')}: {reason}")
        self.end_all(ApiError(500, "the model could not go on; the server's log says why"))
        return self.renew_engine()

    def take_orders(self) -> bool:
        """Wait for something to do, and take in what was submitted and cancelled. Returns False to end."""
        with self.change:
            while not (self.submitted or self.cancelled or self.failure or self.is_closing or self.running):
                self.change.wait()
            submitted, self.submitted = self.submitted, []
            cancelled, self.cancelled = self.cancelled, []
            failure, self.failure = self.failure, None
        self.running += submitted
        for job in submitted:
            self.guarded(job, self.start_job)
        for job in cancelled:
            self.end(job)
        now = time.monotonic()
        for job in [job for job in self.running if job.deadline < now]:
            self.end(job, ApiError(504, "the request took longer than the server allows; ask for fewer tokens"))
        if failure:
            self.end_all(failure)
        self.deliver()
        return not self.is_closing

    def start_job(self, job: Job) -> None:
        job.generations = [self.engine.submit(job.prompt, sampling, job.adapted) for sampling in job.samplings]
        self.told.append((job, [writer.begin() for writer in job.writers]))

    def advance(self, job: Job) -> None:
        choices = []
        for writer, generation in zip(job.writers, job.generations, strict=True):
            if writer.finish_reason is None and (len(generation.tokens) > writer.read or generation.finish_reason):
                choices += writer.advance(generation)
                if writer.finish_reason:
                    self.engine.cancel(generation)
        if choices:
            self.told.append((job, choices))
        if all(writer.finish_reason for writer in job.writers):
            self.end(job)

    def guarded(self, job: Job, act: Callable[[Job], None]) -> None:
        """Do something for a request. An error ends it alone."""
        try:
            act(job)
        except DataError as error:  # the engine was made anew, with less room
            self.end(job, ApiError(400, str(error), "messages"))
        except Exception as error:
            logger.error(f"an answer could not be told: {reason_of(error)}")
            self.end(job, ApiError(500, "the answer could not be told; the server's log says why"))

    def end(self, job: Job, failure: ApiError | None = None) -> None:
        for generation in job.generations:
            self.engine.cancel(generation)
        if job in self.running:
            self.running.remove(job)
            self.told.append((job, [failure]))

    def end_all(self, failure: ApiError) -> None:
        for job in list(self.running):
            self.end(job, failure)
        self.deliver()

    def deliver(self) -> None:
        """Put what there is to tell into the requests' queues, in one call of the event loop."""
        told, self.told = self.told, []
        if told:
            self.loop.call_soon_threadsafe(put_all, told)

    def renew_engine(self) -> bool:
        """Make the engine anew, with an empty cache. Returns False if that is impossible."""
        self.engine = None
        gc.collect()
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.engine = self.make_engine()
            return True
        except Exception as error:
            logger.error(f"the engine cannot be made anew: {reason_of(error)}")
            self.loop.call_soon_threadsafe(self.when_broken)
            return False


class Reader(threading.Thread):
    """Does one piece of work after another. The end of the program does not wait for it, as it would for a pool's."""

    def __init__(self):
        super().__init__(name="prompts", daemon=True)
        self.orders: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()

    async def do(self, work: Callable[[], Any]) -> Any:
        """The result of work, or what it raised. Work that nobody waits for any more is not begun."""
        future: Future = Future()
        self.orders.put((future, work))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after what has been ordered."""
        self.orders.put(None)

    def run(self) -> None:
        while order := self.orders.get():
            future, work = order
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
            del order, future, work  # while it waits


def put_all(told: list[tuple[Job, list]]) -> None:
    for job, events in told:
        for event in events:
            job.events.put_nowait(event)
            if not isinstance(event, dict):
                job.when_over()


def reason_of(error: Exception) -> str:
    """An error's kind and place in one line, and its first line where that can hold nothing of a conversation."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    speaks = isinstance(error, RuntimeError | MemoryError | ArgumentError) and str(error)
    return f"{type(error).__name__} at {place}" + (f": {str(error).splitlines()[0]}" if speaks else "")
