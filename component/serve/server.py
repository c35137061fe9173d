"""Runs the service: socket, signals, and uvicorn between them."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import h11
import uvicorn
from loguru import logger
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..inference.engine import Engine
from ..run.errors import ArgumentError, Fault
from ..run.log import counted
from ..run.process import SIGNALS, Interrupted
from .app import Service
from .guard import Guard, is_loopback
from .worker import ENDING, Worker

KEY_VARIABLE, KEY_CHARACTERS = "LUCIOLE_API_KEY", 16
HEADER_SECONDS, KEEP_ALIVE_SECONDS, SEND_SECONDS = 10, 30, 30
DRAIN_SECONDS, CUT_SECONDS = 10, 0.5  # that answers may take to end, and their errors to be told
WAITING = 64  # answers that may wait until others have ended
SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class EngineLost(Fault):
    """The model cannot answer any more, as when the card is lost."""

    exit_code = 1


def find_key(file: str | None, host: str) -> str:
    """The key that requests must bring, from a file or the environment; empty for none.

    Raises:
        ArgumentError: there is none and other machines reach the host, or it is too short or can stand in no header.
    """
    place = file or f"the variable {KEY_VARIABLE}"
    try:
        key = Path(file).read_text(encoding="utf-8-sig").strip() if file else os.environ.get(KEY_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--api_key_file {file}: cannot be read ({error})") from None
    if not key and (file or not is_loopback(host)):
        reason = "is empty" if file else f"is not set, and other machines reach --host {host}"
        raise ArgumentError(
            f"{place} {reason}; give a key of {KEY_CHARACTERS} characters or more in a file (--api_key_file) or in "
            f"{KEY_VARIABLE}, such as that of: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    is_word = key.isascii() and key.isprintable() and " " not in key  # others can stand in no header
    if key and (len(key) < KEY_CHARACTERS or not is_word):
        reason = f"a key is one word of {KEY_CHARACTERS} characters or more, all of them printable ASCII"
        raise ArgumentError(f"{place}: {reason}; give another one")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything is loaded; who connects waits. Raises ArgumentError where that is impossible."""
    if not 0 <= port < 2**16:
        raise ArgumentError(f"--port {port}: give one of 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except (OSError, UnicodeError) as error:
        remedy = "give another --port, or end what listens there" if port else "give another --host"
        raise ArgumentError(f"--host {host} --port {port}: cannot listen there ({error}); {remedy}") from None
    return bound


class PatientProtocol(H11Protocol):
    """HTTP by h11. A connection is closed if within HEADER_SECONDS a request has not all its headers, or a body that
    was refused, and is not kept, is not yet over; and if the client takes nothing of what it is sent for SEND_SECONDS.
    """

    waits: asyncio.TimerHandle | None = None
    sends: asyncio.TimerHandle | None = None
    unsent = 0  # bytes

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing is paused while anything is unsent
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in (self.waits, self.sends):
            if timer:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unsent = self.transport.get_write_buffer_size()
        self.sends = self.loop.call_later(SEND_SECONDS, self.expect_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.sends.cancel()

    def expect_progress(self) -> None:
        if self.transport.get_write_buffer_size() < self.unsent:
            self.pause_writing()
        else:
            self.transport.abort()

    @property
    def is_waiting(self) -> bool:
        is_refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        return is_refused or self.conn.their_state is h11.IDLE

    def watch(self) -> None:
        if self.is_waiting and not self.waits:
            self.waits = self.loop.call_later(HEADER_SECONDS, self.give_up)
        elif not self.is_waiting and self.waits:
            self.waits.cancel()
            self.waits = None

    def give_up(self) -> None:
        self.waits = None
        if self.is_waiting and not self.transport.is_closing():
            if self.conn.our_state is h11.IDLE:
                self.transport.write(SLOW)
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with our signals: SIGTERM lets answers end, SIGINT cuts them, a second one ends at once.

    Args:
        guard: puts the routes of the service behind a Guard.
        when_ready: called when requests are taken.
    """

    def __init__(self, service: Service, guard: Callable[..., Guard], when_ready: Callable[[], None]):
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # Guard logs the requests
        config = uvicorn.Config(
            guard(service.app()),
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self.service, self.when_ready, self.received = service, when_ready, 0

    async def answer(self, make_engine: Callable[[], Engine], listening: socket.socket) -> None:
        """Answer requests until `stop` is called. Raises EngineLost if the model cannot answer any more."""
        worker = self.service.worker = Worker(make_engine, asyncio.get_running_loop(), self.cut)
        worker.start()
        self.service.reader.start()
        try:
            await self.serve(sockets=[listening])
        finally:
            is_lost = worker.is_over
            self.service.reader.close()
            await asyncio.to_thread(worker.close)
        if is_lost:
            raise EngineLost("the model cannot answer any more; start the server again")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.when_ready()

    @contextmanager
    def capture_signals(self):
        yield

    def stop(self, signum: int) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received, self.should_exit = signum, True
        grace = 0 if signum == signal.SIGINT else DRAIN_SECONDS
        if grace and self.service.active:
            running = counted(self.service.active, "answer")
            logger.info(f"{running} may take {grace} seconds to end; another signal ends at once")
        asyncio.get_running_loop().call_later(grace, self.cut)

    def cut(self) -> None:
        """End all answers with an error, and soon after it their connections, for which the end would wait."""
        self.should_exit = True
        self.service.worker.fail_all(ENDING)
        asyncio.get_running_loop().call_later(CUT_SECONDS, self.leave)

    def leave(self) -> None:
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(server: Server, make_engine: Callable[[], Engine], listening: socket.socket) -> None:
    """Answer until a signal comes.

    Raises:
        Interrupted: by the signal that came.
        ArgumentError: the memory does not hold one conversation.
        EngineLost: the model cannot answer any more.
    """

    gc.freeze()  # what has been loaded stays: else each large body has it walked through
    allow_files()

    async def run() -> None:
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(signum, server.stop, signum)
        await server.answer(make_engine, listening)

    asyncio.run(run())
    if server.received:
        raise Interrupted(server.received)


def allow_files() -> None:
    """Raise the limit of open files, of which each connection is one, as far as the system lets us."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS calls a limit infinite, and allows less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def greeting(models: Iterable[str], host: str, listening: socket.socket, needs_key: bool) -> str:
    """What is printed when the server is ready: where it listens, its models, its page, and how to ask."""
    port = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}"
    key = ' -H "Authorization: Bearer $LUCIOLE_API_KEY"' if needs_key else ""
    first, *others = models
    body = f'{{"model": "{first}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [f"listening at {url}/v1", f"model {first}" + "".join(f"; its base is {other}" for other in others)]
    lines.append(f"page {url}/")
    lines.append(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if needs_key:
        lines.append("every request to /v1 needs the key, as `Authorization: Bearer KEY`")
    return "\n".join(lines)
