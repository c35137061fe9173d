"""Ends of a program: by a signal, by a Fault in one line, or by a bug with its traceback, and the exit codes."""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children

from .errors import RankLost

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Interrupted(BaseException):
    """Raised when a signal asks the program to end. Like KeyboardInterrupt, no `except Exception` catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class SignalWatch:
    """Remembers the first signal within its block, and raises Interrupted.

    While `deferred` is true nothing is raised, and the program asks for `received` when it can end. A later SIGINT ends
    the process at once. Forked children do nothing: their parent decides.
    """

    def __init__(self):
        self.received = 0
        self.deferred = False
        self.process = os.getpid()

    def __enter__(self) -> "SignalWatch":
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.replaced = {signum: old for signum, old in handlers.items() if old != signal.SIG_IGN}  # as under nohup
        for signum in self.replaced:
            signal.signal(signum, self.handle)
        return self

    def __exit__(self, *error) -> None:
        for signum, old in self.replaced.items():
            signal.signal(signum, old)

    def end_deferral(self) -> None:
        """Have signals end the program at once from here on. Raises Interrupted if one came meanwhile."""
        self.deferred = False
        if self.received:
            raise Interrupted(self.received)

    def cause(self, error: BaseException) -> Interrupted:
        """The Interrupted that ended the block, also where a library turned it into another `error` during an import.

        Raises:
            error: no signal came, or signals were deferred and something else went wrong.
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
        if first and os.environ.get("RANK", "0") == "0":  # not by the logger, which the signal may have interrupted
            with suppress(OSError):  # the terminal or the reader of the log may have gone
                name = signal.Signals(signum).name
                os.write(2, f"{name}: saving a checkpoint as soon as possible, then leaving\n".encode())


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies, so that none is left behind."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in the meantime
        os._exit(128 + signal.SIGKILL)


def outlive_signals() -> None:
    """Have a helper process ignore signals to the whole group, which its parent handles, and die with its parent."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()


def run_program(work: Callable[[SignalWatch], None], if_stopped: Callable[[], str], rank: int = 0) -> None:
    """Run `work`, and end the process with an exit code if it fails.

    A Fault is logged in one line, and has its own exit code. Signal n gives 128 + n and ends the process at once,
    without waiting for other ranks, which may still be at work. Output that nobody reads any more counts as SIGPIPE.
    Any other error ends in its traceback, with a line that says where to report it.

    Args:
        work: is given the watch over signals.
        if_stopped: gives the text to print after a signal, unless `work` defers signals and reports them itself.
        rank: of this process; ranks other than 0 log little.
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
    """Print the traceback of an error that is no Fault, and that the mistake is ours."""
    sys.__excepthook__(kind, error, trace)
    with suppress(OSError):
        sys.stderr.write(
            "This is a mistake of Luciole and not yours: open an issue with the lines above and the command\n"
        )


def leave(exit_code: int) -> None:
    os._exit(exit_code)


def exit_code_of(work: Callable[[SignalWatch], None], watch: SignalWatch, rank: int) -> int:
    """Run `work` and return 0, or log the Fault that ended it and return its exit code."""
    from .log import configure_logging

    configure_logging(rank)  # before libraries are imported that have something to say

    import torch.distributed as dist
    from loguru import logger

    from .ranks import TOLD, fault_of, local_rank

    exit_code = 0
    try:
        work(watch)
        sys.stdout.flush()
    except Exception as error:
        fault = fault_of(error)
        if not fault:
            raise
        exit_code = fault.exit_code
        logger.error(fault)
        if TOLD not in getattr(fault, "__notes__", ()):
            sys.stderr.write(f"rank {rank}: {fault}\n" * bool(rank))
        elif local_rank() == 0:  # rank 0 is on another machine
            sys.stderr.write(f"{fault}\n")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a helper's end for an error
        for helper in active_children():  # they ignore other signals, and Python would wait for them
            helper.kill()
    if exit_code == RankLost.exit_code:
        leave(exit_code)  # a library would wait for who is gone
    if dist.is_initialized():  # not after other errors: ranks that do not know of them may be at work
        dist.destroy_process_group()
    return exit_code
