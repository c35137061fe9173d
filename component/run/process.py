"""How a program ends: by a signal that asks it to leave, or by a Fault in one line, and with which exit code."""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children

from .errors import Fault

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Interrupted(BaseException):
    """A signal asks to leave. Like KeyboardInterrupt, no `except Exception` catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class SignalWatch:
    """Within its block, remembers the first signal, and raises Interrupted unless `deferred`: then somebody asks for
    `received`. A SIGINT after it leaves without a word. Children keep out of it: their parent decides.
    """

    def __init__(self):
        self.received = 0
        self.deferred = False
        self.process = os.getpid()

    def __enter__(self) -> "SignalWatch":
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.replaced = {signum: old for signum, old in handlers.items() if old != signal.SIG_IGN}  # as nohup sets it
        for signum in self.replaced:
            signal.signal(signum, self.handle)
        return self

    def __exit__(self, *error) -> None:
        for signum, old in self.replaced.items():
            signal.signal(signum, old)

    def cause(self, error: BaseException) -> Interrupted:
        """The Interrupted that ended the block; within an import, a library may have made `error` of it.

        Raises:
            error: no signal came, or it was deferred and something else went wrong.
        """
        if isinstance(error, Interrupted):
            return error
        if self.deferred or not self.received:
            raise error
        return Interrupted(self.received)

    def handle(self, signum: int, frame) -> None:
        if os.getpid() != self.process:
            return
        if self.received and signum == signal.SIGINT:
            os._exit(128 + signum)
        first, self.received = not self.received, self.received or signum
        if not self.deferred:
            raise Interrupted(self.received)
        if first and os.environ.get("RANK", "0") == "0":  # not through the logger, which may be what was interrupted
            with suppress(OSError):  # the terminal, or who read the log, may be what has gone
                os.write(
                    2, f"{signal.Signals(signum).name}: leaving as soon as the run can go on from there\n".encode()
                )


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies, so that none is left behind."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in the meantime
        os._exit(128 + signal.SIGKILL)


def outlive_signals() -> None:
    """For helper processes: signals to the whole group are the parent's business, and its death is theirs."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()


def run_program(work: Callable[[SignalWatch], None], if_stopped: Callable[[], str], rank: int = 0) -> None:
    """Do `work`, and end the process where it did not end well.

    The exit code is that of the Fault, told in one line, or 128 + n after signal n, which is SIGPIPE where nobody reads
    the output any more. A signal ends it at once, without waiting for other ranks, which may still be at work. Any
    other error ends in its traceback, with a line that says where to report it.

    Args:
        work: is given the watch over signals.
        if_stopped: what is told where a signal ended it and `work` did not defer signals to tell of them itself.
        rank: of this process; of others than 0 little is heard.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        die_with_parent()
    try:
        with SignalWatch() as watch:
            exit_code = exit_code_of(work, watch, rank)
    except (Interrupted, Exception) as error:
        if isinstance(error, BrokenPipeError) and output_is_unread():
            leave(128 + signal.SIGPIPE)
        sys.excepthook = tell_of_bug
        stop = watch.cause(error)
        if not watch.deferred:
            with suppress(OSError):
                sys.stderr.write(f"{stop}: {if_stopped()}\n")
                sys.stderr.flush()
        leave(stop.exit_code)
    if exit_code:
        sys.exit(exit_code)


def output_is_unread() -> bool:
    """Whether standard output is a pipe whose reader has gone, such as `head`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def tell_of_bug(kind: type[BaseException], error: BaseException, trace) -> None:
    """Show an error that is no Fault, and that it is ours."""
    sys.__excepthook__(kind, error, trace)
    with suppress(OSError):
        sys.stderr.write(
            "This is a mistake of Luciole and not yours: open an issue with the lines above and the command\n"
        )


def leave(exit_code: int) -> None:
    os._exit(exit_code)


def exit_code_of(work: Callable[[SignalWatch], None], watch: SignalWatch, rank: int) -> int:
    """0 where `work` is done, else the exit code of the Fault that ended it, which is logged."""
    from .log import configure_logging

    configure_logging(rank)  # before libraries are imported that have something to say

    import torch.distributed as dist
    from loguru import logger

    from .ranks import TOLD

    exit_code = 0
    try:
        work(watch)
        sys.stdout.flush()
    except Fault as error:
        exit_code = error.exit_code
        logger.error(error)
        if rank and TOLD not in getattr(error, "__notes__", ()):
            sys.stderr.write(f"rank {rank}: {error}\n")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the end of a helper for an error
        for helper in active_children():  # they outlive other signals, and would be waited for
            helper.kill()
    if dist.is_initialized():  # after an error that other ranks do not know of, they may still be at work
        dist.destroy_process_group()
    return exit_code
