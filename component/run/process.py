"""Signals that ask a run to leave: at once before and after training, at the end of the update during it."""

import ctypes
import os
import signal
from contextlib import suppress

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
