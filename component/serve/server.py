"""Runs the service: socket, signals, and uvicorn between them."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..inference.engine import Engine
from ..run.errors import ArgumentError, Fault
from ..run.process import SIGNALS, Interrupted
from .app import Service
from .guard import Guard, is_loopback
from .protocol import ApiError
from .worker import Worker

KEY_VARIABLE, KEY_CHARACTERS = "LUCIOLE_API_KEY", 16
HEADER_SECONDS, KEEP_ALIVE_SECONDS, DRAIN_SECONDS = 10, 30, 10
SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class EngineLost(Fault):
    """The model cannot answer any more, as when the card is lost."""

    exit_code = 1


def find_key(file: str | None, host: str) -> str:
    """The key that requests must bring, from a file or the environment; empty for none.

    Raises:
        ArgumentError: there is none and other machines reach the host, or it is too short.
    """
    place = file or f"the variable {KEY_VARIABLE}"
    try:
        key = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(KEY_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--api_key_file {file}: cannot be read ({error})") from None
    if not key and (file or not is_loopback(host)):
        reason = "is empty" if file else f"is not set, and other machines reach --host {host}"
        raise ArgumentError(
            f"{place} {reason}; give a key of {KEY_CHARACTERS} characters or more in a file (--api_key_file) or in "
            f"{KEY_VARIABLE}, such as that of: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    if key and (len(key) < KEY_CHARACTERS or len(key.split()) > 1):
        raise ArgumentError(f"{place}: a key is one word of {KEY_CHARACTERS} characters or more; give a longer one")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything is loaded. Raises ArgumentError where that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        remedy = "give another --port, or end what listens there" if port else "give another --host"
        raise ArgumentError(f"--host {host} --port {port}: cannot listen there ({error}); {remedy}") from None
    return bound


class PatientProtocol(H11Protocol):
    """HTTP by h11. A connection whose request has not all its headers within HEADER_SECONDS is closed."""

    waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_headers()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.waits:
            self.waits.cancel()

    def watch_headers(self) -> None:
        is_open = self.conn.their_state is h11.IDLE
        if is_open and not self.waits:
            self.waits = self.loop.call_later(HEADER_SECONDS, self.give_up)
        elif not is_open and self.waits:
            self.waits.cancel()
            self.waits = None

    def give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(SLOW)
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with our signals: SIGTERM lets answers end, SIGINT cuts them, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]):
        super().__init__(config)
        self.when_ready, self.received = when_ready, 0

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
        loop = asyncio.get_running_loop()
        loop.call_later(grace, self.when_cut, ApiError(503, "the server is ending"))
        loop.call_later(grace + 0.5, setattr, self, "force_exit", True)


def serve(
    service: Service,
    engine: Engine,
    make_engine: Callable[[], Engine],
    listening: socket.socket,
    guard: Callable[..., Guard],
    when_ready: Callable[[], None],
) -> None:
    """Answer until a signal comes.

    Args:
        engine: made by `make_engine`, which makes another one if it fails.
        guard: puts the routes behind a Guard.
        when_ready: called when requests are taken.

    Raises:
        Interrupted: by the signal that came.
        EngineLost: the model cannot answer any more.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    config = uvicorn.Config(
        guard(service.app()),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = Server(config, when_ready)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def break_off() -> None:
            server.should_exit = server.force_exit = True

        service.worker = Worker(engines.pop(), make_engine, loop, break_off)
        server.when_cut = service.worker.fail_all
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                loop.add_signal_handler(signum, server.stop, signum)
        service.worker.start()
        try:
            await server.serve(sockets=[listening])
        finally:
            is_lost = service.worker.is_over
            await asyncio.to_thread(service.worker.close)
        if server.received:
            raise Interrupted(server.received)
        if is_lost:
            raise EngineLost("the model cannot answer any more; start the server again")

    engines = [engine]
    del engine
    asyncio.run(run())


def greeting(service: Service, host: str, listening: socket.socket) -> str:
    """What is printed when the server is ready: where it listens, its models, and how to ask."""
    port = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}"
    key = ' -H "Authorization: Bearer $LUCIOLE_API_KEY"' if service.needs_key else ""
    first, *others = service.models
    body = f'{{"model": "{first}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [f"listening at {url}/v1", f"model {first}" + "".join(f"; its base is {other}" for other in others)]
    lines.append(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if service.needs_key:
        lines.append("every request to /v1 needs the key, as `Authorization: Bearer KEY`")
    return "\n".join(lines)
