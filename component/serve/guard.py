"""What stands before the routes: who may ask, how much and how long; and one line of the log for each request."""

import asyncio
import hmac
import ipaddress
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from loguru import logger
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..run.log import harmless
from .protocol import ApiError
from .worker import ENDING, reason_of

BODY_BYTES = 4 * 2**20
BODY_SECONDS = 20
LARGE_BYTES, LARGE_BODIES = 2**16, 32  # so many larger bodies are read at once
HOST = re.compile(r"([\w.-]*|\[[\da-f:.]+\])(:\d{1,5})?", re.ASCII | re.IGNORECASE)  # a name or address, and a port
PROTECTED = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}


class Gone(Exception):
    """Raised when the client has gone."""


def to_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other machine reaches."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() in ("localhost", "localhost.")


@dataclass
class Guard:
    """ASGI middleware.

    A request's Host must be an address of loopback, by any port, as tunnels have it, or the host that the server was
    given; a page that comes from elsewhere under a name of its own is refused. With a host that stands for all
    addresses any Host is taken, and the key decides.

    Args:
        host: at which the server listens.
        key: which requests to /v1/ must bring; empty for none.
    """

    app: ASGIApp
    host: str
    key: str = ""
    large: int = field(default=0, init=False)  # bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 0
        notes = scope.setdefault("state", {}).setdefault("notes", [])

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(name.encode(), value.encode()) for name, value in PROTECTED.items()]
            await send(message)

        try:
            await self.pass_on(scope, receive, tell)
        except Gone:
            status = 499
        except asyncio.CancelledError:  # by the end of the program, and nobody awaits this
            if not status:
                await to_response(ENDING)(scope, receive, tell)
        except ApiError as error:
            await to_response(error)(scope, receive, tell)
        except Exception as error:
            logger.error(f"a request failed: {reason_of(error)}")
            if not status:
                await to_response(ApiError(500, "the server's log says why"))(scope, receive, tell)
        finally:
            if scope["path"] != "/health":
                seconds = f"{time.monotonic() - began:.2f} s"
                path = harmless(scope["path"][:80], kept="")  # a newline in it would begin a line of the log
                logger.info(" ".join([scope["method"], path, str(status or "-"), *notes, seconds]))

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self.check_origin(headers)
        if scope["path"].startswith("/v1"):
            self.check_key(headers)
        if "transfer-encoding" in headers and "content-length" in headers:  # servers differ in which one counts
            raise ApiError(400, "give Content-Length or Transfer-Encoding, not both", connection="close")
        if scope["method"] == "POST":
            receive = await self.read_body(headers, receive)
        await self.app(scope, receive, send)

    def check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        found = HOST.fullmatch(host)
        name = found[1].strip("[]").lower() if found else ""
        is_any = not self.host or self.host in ("0.0.0.0", "::")
        if not found or not (is_any or is_loopback(name) or name == self.host.strip("[]").lower()):
            raise ApiError(403, f"this server does not answer for the Host {host[:80]!r}", code="host_not_allowed")
        if any(urlsplit_or_none(origin) != host for origin in headers.getlist("origin")):
            raise ApiError(403, "pages of other origins may not ask this server", code="origin_not_allowed")

    def check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip().encode("latin-1")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(given, self.key.encode())):
            message = "the server's key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", **{"www_authenticate": "Bearer"})

    async def read_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read a body of JSON whole, within its limits. Returns a `receive` that gives it, then tells of the client.

        Raises:
            ApiError: it is no JSON, too large or too slow, or too many large ones are being read.
            Gone: the client left.
        """
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")
        length, is_large = 0, False
        with suppress(ValueError):
            length = int(headers.get("content-length", "0"))
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    size = max(length, len(body))
                    if size > BODY_BYTES:
                        raise ApiError(413, f"the body has more than {BODY_BYTES // 2**20} MiB; send less")
                    if size > LARGE_BYTES and not is_large:
                        self.take_large()
                        is_large = True
                    if not more:
                        break
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_SECONDS} seconds", connection="close") from None
        finally:
            self.large -= is_large
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def give() -> Message:
            return whole.pop() if whole else await receive()

        return give

    def take_large(self) -> None:
        """Count a large body in. Raises ApiError when too many are being read."""
        if self.large >= LARGE_BODIES:
            message = f"the server is busy: at most {LARGE_BODIES} large bodies are read at once; ask again soon"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after="2")
        self.large += 1


def urlsplit_or_none(origin: str) -> str | None:
    """The host and port of an origin, as a Host header names them; None where it is none of the web."""
    with suppress(ValueError):
        parts = urlsplit(origin)
        return parts.netloc if parts.scheme in ("http", "https") else None
    return None
