"""Cases 41 to 44 of the reliability scorecard: script/serve.py, asked by OpenAI's client and by sockets.

The server runs as a user starts it, on the tiny base with the adapter of an uninterrupted run.
"""

import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

from benchmark.cases import Check, case, check
from benchmark.lab import ROOT, Lab, Launch

CLIENTS, REQUESTS, SOAK_SECONDS = 50, 20, 600
SLOTS, WAITING = 8, 64  # --max_batch where places are counted, and the server's own number of answers that may wait
LONG = 4000  # tokens of an answer that is not awaited
KEY = "a-key-of-the-scorecard-0123456789"
QUESTIONS = [f"Say {i}" for i in range(1, 101)]


class Server(Launch):
    """A start of script/serve.py."""

    @property
    def port(self) -> int:
        found = re.search(r"listening at http://\S+:(\d+)/v1", self.log)
        return int(found[1]) if found else 0

    @property
    def memory(self) -> float:
        """MiB of the process that are resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def models(self) -> list[str]:
        _, _, body = ask_once(self.port, request("GET", "/v1/models"))
        return [model["id"] for model in json.loads(body)["data"]]

    def active(self) -> int:
        """Answers that run or wait."""
        return json.loads(ask_once(self.port, request("GET", "/health"))[2])["active"]


@contextlib.contextmanager
def serving(lab: Lab, name: str, *options: str, key: str = "") -> Iterator[Server]:
    """Start the server, and wait until it listens or has ended. It does not outlive the block."""
    from component.run.process import die_with_parent

    adapter = lab.reference() / "final"
    log_file = lab.folder / f"{name}.log"
    command = [sys.executable, str(ROOT / "script/serve.py"), "--adapter", str(adapter), "--port", "0", *options]
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=lab.folder,
            env=os.environ | {"LUCIOLE_API_KEY": key, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    server = Server(lab.folder, log_file, log_file, process, "", 0)
    try:
        yield server.wait_for(lambda: server.port, 120)
    finally:
        process.kill()
        process.wait()


# What clients do


def openai_client(server: Server):
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    http_client = DefaultAsyncHttpxClient(trust_env=False)  # no proxy stands between
    url = f"http://127.0.0.1:{server.port}/v1"
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120, http_client=http_client)


async def tokens_of(client, model: str, question: str, streamed: bool) -> tuple:
    """The tokens of a greedy answer, and why it ended."""
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24}
    asked |= {"temperature": 0, "logprobs": True}
    if streamed:
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        choices = [choice for chunk in chunks for choice in chunk.choices]
    else:
        choices = (await client.chat.completions.create(**asked)).choices
    tokens = [tuple(entry.bytes) for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    return tokens, choices[-1].finish_reason


Turn = tuple[str, str, bool]  # the model that is asked, the question, and whether the answer is streamed


def plan(models: list[str], requests: int) -> list[list[Turn]]:
    """What each of the clients asks, one request after another."""
    turns = [(models[i % 2], QUESTIONS[i // 2 % len(QUESTIONS)], bool(i // 3 % 2)) for i in range(CLIENTS * REQUESTS)]
    return [turns[first : first + requests] for first in range(0, len(turns), REQUESTS)]


@dataclass
class Told:
    """What clients were told: seconds of each answer, how many had other tokens than expected, and errors."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)

    async def ask(self, client, turns: list[Turn], expected: dict, deadline: float = math.inf) -> None:
        """Ask one request after another, until the deadline."""
        from openai import OpenAIError

        for turn in turns:
            began = time.monotonic()
            if began > deadline:
                return
            try:
                answer = await tokens_of(client, *turn)
            except OpenAIError as error:
                self.errors.append(repr(error))
                continue
            self.seconds.append(time.monotonic() - began)
            self.wrong += answer != expected[turn[:2]]

    def check(self, name: str, server: Server, further: dict[str, bool], **facts: float) -> Check:
        holds = {"answers without an error": not self.errors, "the tokens of one after another": self.wrong == 0}
        facts |= {"requests": f"{len(self.seconds):,}", "mismatches": self.wrong, "errors": len(self.errors)}
        result = check(name, server, holds | further, **facts, **percentiles(self.seconds))
        result.log = "\n".join([*self.errors[:5], result.log])
        return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [0.0] * 99
    return {"p50 s": cuts[49], "p99 s": cuts[98]}


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request as it is sent. An underscore in a header's name stands for a hyphen; None leaves a header out."""
    told = {"host": "127.0.0.1", "connection": "close"}
    if method == "POST":
        told |= {"content-type": "application/json", "content-length": str(len(body))}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in told.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


def ask_once(port: int, parts: bytes | Iterator[bytes], seconds: float = 60) -> tuple[int, dict, bytes]:
    """Send what may be no proper request, and read what comes back.

    Returns:
        (status, headers by their names in small letters, body); the status is 0 where the connection was closed.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):  # the server need not read what it refuses
            for part in [parts] if isinstance(parts, bytes) else parts:
                connection.sendall(part)
        response = HTTPResponse(connection)
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()
        except (OSError, HTTPException):
            return 0, {}, b""


def chat(model: str, content: object = "Say 3", **fields) -> bytes:
    row = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return json.dumps(row | fields).encode()


# 41: many at once


@case(
    41,
    "50 clients with 20 greedy requests each, streamed and whole, to the tuned model and its base; 10 minutes of that",
    "no errors; the tokens of one after another; memory grows by less than 5%",
)
def many_at_once(lab: Lab) -> Iterator[Check]:
    with serving(lab, "many") as server:
        yield from asyncio.run(ask_many(lab, server))


async def ask_many(lab: Lab, server: Server) -> list[Check]:
    client, models = openai_client(server), server.models()
    turns = plan(models, max(1, round(REQUESTS * lab.share)))
    used = dict.fromkeys(turn[:2] for clients_own in turns for turn in clients_own)
    expected = {one: await tokens_of(client, *one, streamed=False) for one in used}
    both = [question for _, question in used if all((model, question) in used for model in models)]
    tuned, base = ([expected[model, question] for question in both] for model in models)

    told = Told()
    await asyncio.gather(*(told.ask(client, own, expected) for own in turns))
    checks = [told.check(f"{CLIENTS} clients", server, {"two models that differ": tuned != base})]

    told, before, began = Told(), server.memory, time.monotonic()
    deadline = began + max(2, SOAK_SECONDS * lab.share)
    while time.monotonic() < deadline:
        await asyncio.gather(*(told.ask(client, own, expected, deadline) for own in turns))
    facts = {"minutes": (time.monotonic() - began) / 60, "growth_%": 100 * (server.memory / before - 1)}
    return [
        *checks,
        told.check("the soak", server, {"memory that grows by less than 5%": facts["growth_%"] < 5}, **facts),
    ]


# 42: clients that leave, more than there is room for, and an end under load


@case(
    42,
    "100 clients leave in mid-stream or before a whole answer; more requests than there are places; SIGTERM under load",
    "no slot is lost; 429 with Retry-After; `/health` within 100 ms; running answers end whole, new ones are refused, "
    "exit 143",
)
def load_and_leaving(lab: Lab) -> Iterator[Check]:
    with serving(lab, "load", "--max_batch", str(SLOTS)) as server:
        for tries in (leave, overload, end_under_load):
            yield asyncio.run(tries(lab, server, server.models()[-1]))


async def connect(server: Server, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("POST", "/v1/chat/completions", body))
    return reader, writer


async def begin_stream(server: Server, model: str, tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream, and wait for its first text. Raises IncompleteReadError or TimeoutError where none comes."""
    reader, writer = await connect(server, chat(model, stream=True, max_tokens=tokens))
    await asyncio.wait_for(reader.readuntil(b'"delta":{"content"'), 30)
    return reader, writer


async def idle(server: Server, seconds: float = 60) -> float:
    """Seconds until the server has no answer to write; as many as given where it still has."""
    began = time.monotonic()
    while server.active() and time.monotonic() < began + seconds:
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def leave(lab: Lab, server: Server, model: str) -> Check:
    """Have clients leave, half of them in mid-stream and half before a whole answer, and see whether all slots are
    there again."""

    async def one_client(number: int) -> None:
        if number % 2:
            _, writer = await begin_stream(server, model, LONG)
        else:
            _, writer = await connect(server, chat(model, max_tokens=LONG))
            await asyncio.sleep(0.5)
        writer.close()

    count, at_once = max(10, round(100 * lab.share)), 2 * SLOTS
    for first in range(0, count, at_once):
        await asyncio.gather(*map(one_client, range(first, min(first + at_once, count))))
    seconds, left = await idle(server, 10), server.active()
    began = time.monotonic()
    streams = await asyncio.gather(*(begin_stream(server, model, LONG) for _ in range(SLOTS)))
    prompt, running = time.monotonic() - began, server.active()
    for _, writer in streams:
        writer.close()
    holds = {
        "an idle server within 2 s": seconds < 2,
        f"{SLOTS} answers at once": running == SLOTS,
        "their beginning within 5 s": prompt < 5,
    }
    facts = {"clients": str(count), "leaked_slots": SLOTS - running + left, "idle_after_s": seconds}
    return check("clients leave", server, holds, **facts)


async def overload(lab: Lab, server: Server, model: str) -> Check:
    """Take every place of the server, ask for more, and ask for its health meanwhile."""
    await idle(server)
    taken = [await connect(server, chat(model, stream=True, max_tokens=LONG)) for _ in range(SLOTS + WAITING)]
    for reader, _ in taken:
        await reader.readuntil(b"200 OK")
    more = request("POST", "/v1/chat/completions", chat(model))
    refused = [await asyncio.to_thread(ask_once, server.port, more, 10) for _ in range(max(2, round(20 * lab.share)))]
    with multiprocessing.get_context("fork").Pool(1) as pool:  # a process, which the streams here do not delay
        waits = await asyncio.to_thread(pool.apply, time_health, (server.port, max(1, 10 * lab.share)))
    full = server.active()
    for _, writer in taken:
        writer.close()
    errors = [json.loads(body)["error"] for status, _, body in refused if status == 429]
    slowest = percentiles(waits)["p99 s"]
    holds = {
        "429 for each": len(errors) == len(refused),
        "Retry-After": all(headers.get("retry-after", "").isdigit() for _, headers, _ in refused),
        "OpenAI's shape": all(error.keys() == {"message", "type", "param", "code"} for error in errors),
        "a full server": full == SLOTS + WAITING,
        "/health within 100 ms": slowest < 0.1,
    }
    return check("overload", server, holds, **{"refused": str(len(errors)), "/health_p99_s": slowest})


def time_health(port: int, seconds: float) -> list[float]:
    """Seconds that each of many requests for /health took."""
    waits, connection = [], HTTPConnection("127.0.0.1", port, timeout=30)
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        connection.request("GET", "/health")
        connection.getresponse().read()
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    return waits


async def end_under_load(lab: Lab, server: Server, model: str) -> Check:
    """Send SIGTERM while answers run and wait, and read them to their ends."""
    await idle(server)
    asked = [await connect(server, chat(model, stream=True, max_tokens=100)) for _ in range(2 * SLOTS)]
    for reader, _ in asked:
        await reader.readuntil(b"200 OK")
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    await asyncio.sleep(0.3)
    try:
        more = request("POST", "/v1/chat/completions", chat(model))
        status, *_ = await asyncio.to_thread(ask_once, server.port, more)
    except ConnectionRefusedError:
        status = 0
    streams = await asyncio.gather(*(reader.read() for reader, _ in asked))
    whole = sum(bool(re.search(rb'"finish_reason":"(stop|length)".*\[DONE\]', one, re.DOTALL)) for one in streams)
    await asyncio.to_thread(server.wait, 60)
    seconds = time.monotonic() - began
    holds = {
        "whole answers": whole == len(asked),
        "new requests refused": status in (0, 503),
        "exit code 143": server.code == 143,
        "an end within 12 s": seconds < 12,
    }
    return check("SIGTERM under load", server, holds, whole_answers=f"{whole}/{len(asked)}", drain_s=seconds)


# 43: requests that are hostile or broken

NESTED = b'{"model": "x", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def slowly(*parts: bytes, pause: float) -> Iterator[bytes]:
    for part in parts:
        yield part
        time.sleep(pause)


def hostile(model: str) -> dict[str, tuple[Callable[[], bytes | Iterator[bytes]], set[int]]]:
    """What is sent by name, and the statuses that are right; 0 is a closed connection. Slow ones come last."""

    def post(body: bytes, **headers: str) -> bytes:
        return request("POST", "/v1/chat/completions", body, **headers)

    def with_fields(**fields) -> bytes:
        return post(chat(model, **fields))

    def with_text(*change: bytes) -> bytes:
        return post(chat(model).replace(*change))

    def chunked() -> Iterator[bytes]:
        yield post(b"", content_length=None, transfer_encoding="chunked")
        for _ in range(100):
            yield b"100000\r\n" + b" " * 2**20 + b"\r\n"

    head = post(chat(model))[:60]
    picture = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    many = [{"role": "user", "content": "a"}] * 10_000
    refused, closed = {400}, {0, 400}
    return {
        "a body of 100 MB": (lambda: post(b" " * 100_000_000), {413}),
        "100 MB in chunks": (chunked, {413}),
        "n of 1e6": (lambda: with_fields(n=1_000_000), refused),
        "max_tokens of 1e9": (lambda: with_fields(max_tokens=1_000_000_000), refused),
        "a temperature of NaN": (lambda: with_fields(temperature=float("nan")), refused),
        "a temperature of 1e999": (lambda: with_text(b'"max_tokens": 4', b'"temperature": 1e999'), refused),
        "a number of 5,000 digits": (lambda: with_text(b": 4", b": " + b"9" * 5000), refused),
        "10,000 messages": (lambda: with_fields(messages=many), refused),
        "a message of 3 MB": (lambda: post(chat(model, "a b " * 750_000)), refused),
        "JSON 100,000 deep": (lambda: post(NESTED), refused),
        "a chat_template": (lambda: with_fields(chat_template="{{ cycler.__init__ }}"), refused),
        "an unknown field": (lambda: with_fields(guided_json="{}"), refused),
        "a key twice": (lambda: with_text(b'"max_tokens": 4', b'"max_tokens": 4, "max_tokens": 5'), refused),
        "bytes that are not UTF-8": (lambda: with_text(b"Say", b"\xff\xfe"), refused),
        "half a surrogate": (lambda: with_text(b"Say", b"\\ud800"), refused),
        "no JSON": (lambda: post(b"hello"), refused),
        "no body": (lambda: post(b""), refused),
        "a list": (lambda: post(b"[]"), refused),
        "a picture": (lambda: post(chat(model, picture)), refused),
        "an unknown model": (lambda: post(chat("../../etc/passwd")), {404}),
        "a form": (lambda: post(chat(model), content_type="application/x-www-form-urlencoded"), {415}),
        "a header of 1 MB": (lambda: request("GET", "/v1/models", x="a" * 2**20), {0, 400, 431}),
        "50,000 headers": (
            lambda: request("GET", "/v1/models", **{f"x{i}": "a" for i in range(50_000)}),
            {0, 400, 431},
        ),
        "a line of 1 MB": (lambda: request("GET", "/" + "a" * 2**20), {0, 400, 414}),
        "two lengths": (lambda: post(chat(model), content_type="application/json\r\ncontent-length: 5"), closed),
        "a length and chunks": (lambda: post(chat(model), transfer_encoding="chunked"), closed | {408}),
        "a length below zero": (lambda: post(chat(model), content_length="-1"), closed),
        "no HTTP": (lambda: b"\x16\x03\x01\x02\x00hello\r\n\r\n", closed),
        "a path to above": (lambda: request("GET", "/../../etc/passwd"), {404}),
        "an encoded path to above": (lambda: request("GET", "/v1/models/..%2f..%2fetc%2fpasswd"), {404}),
        "a path with a null": (lambda: request("GET", "/v1/models/%00"), {404}),
        "another server's path": (lambda: request("GET", "http://example.com/v1/models"), {400, 403, 404}),
        "a method that is not there": (lambda: request("DELETE", "/v1/chat/completions"), {404, 405}),
        "half a request": (lambda: head, closed | {408}),
        "slow headers": (lambda: slowly(*(bytes([byte]) for byte in head), pause=0.5), {0, 408}),
        "a slow body": (lambda: slowly(post(b"", content_length="100"), *[b" "] * 60, pause=0.5), {0, 408}),
    }


@case(
    43,
    "bodies of 100 MB, absurd figures, broken JSON, HTTP and paths, slow clients, templates and pictures",
    "4xx or closed within 30 s; the next request is answered; memory grows by less than 64 MiB",
)
def hostile_requests(lab: Lab) -> Iterator[Check]:
    with serving(lab, "hostile") as server:
        model = server.models()[0]
        normal = request("POST", "/v1/chat/completions", chat(model))
        ask_once(server.port, normal)
        before, everything = server.memory, hostile(model)

        def attempt(name: str) -> Check:
            make, right = everything[name]
            began = time.monotonic()
            status, _, body = ask_once(server.port, make())
            seconds = time.monotonic() - began
            shaped = not body or not 400 <= status < 500 or status == 400 or "error" in json.loads(body)
            holds = {
                f"{' or '.join(map(str, sorted(right)))} but {status}": status in right,
                "an error in OpenAI's shape": shaped,
                "an end within 30 s": seconds < 30,
                "an answer to the next request": ask_once(server.port, normal)[0] == 200,
            }
            return check(name, server, holds, status=str(status or "closed"))

        *quick, a, b, c = everything
        with ThreadPoolExecutor(3) as threads:
            yield from [attempt(name) for name in lab.some(quick)]
            yield from threads.map(attempt, (a, b, c) if lab.share == 1 else ())
        grown = server.memory - before
        yield check("memory", server, {"less than 64 MiB more": grown < 64, "a server": server.code is None}, MiB=grown)


# 44: who may ask


@case(
    44,
    "0.0.0.0 without a key; no key and wrong ones; another Origin; another Host",
    "refused before the model loads; 401; 403; no CORS; the key is in no log",
)
def who_may_ask(lab: Lab) -> Iterator[Check]:
    for host in ["0.0.0.0", "::", "example.invalid"][: max(1, round(3 * lab.share))]:
        with serving(lab, f"open-{host.replace(':', '-')}", "--host", host) as server:
            holds = {"exit code 2": server.code == 2, "an end before loading": "loading" not in server.log}
            yield check(f"--host {host} without a key", server, holds)
    with serving(lab, "key", key=KEY) as server:
        for name, headers, right in lab.some(strangers(server.port)):
            method = "OPTIONS" if "preflight" in name else "GET"
            status, told, body = ask_once(server.port, request(method, "/v1/models", **headers))
            holds = {
                f"{right} but {status}": status == right,
                "no CORS": not any(header.startswith("access-control") for header in told),
                "no word of models": status == 200 or b"chatglm3-nano" not in body,
            }
            yield check(name, server, holds)
    yield check("the log", server, {"no key": KEY not in server.log, "requests": "/v1/models" in server.log})


def strangers(port: int) -> list[tuple[str, dict[str, str], int]]:
    """Ways to ask for the models, by name: headers, and the status that is right."""
    right = {"authorization": f"Bearer {KEY}"}
    return [
        ("the key", right, 200),
        ("no key", {}, 401),
        ("another key", {"authorization": f"Bearer {KEY[::-1]}"}, 401),
        ("the key in other letters", {"authorization": f"Bearer {KEY.upper()}"}, 401),
        ("the beginning of the key", {"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ("the key and more", {"authorization": f"Bearer {KEY}0"}, 401),
        ("a key that is not ASCII", {"authorization": "Bearer \u94a5\u5319"}, 401),
        ("an empty key", {"authorization": "Bearer "}, 401),
        ("the key by another scheme", {"authorization": f"Basic {KEY}"}, 401),
        ("another Origin", right | {"origin": "http://example.com"}, 403),
        ("the Origin null", right | {"origin": "null"}, 403),
        ("the Origin of another port", right | {"origin": f"http://127.0.0.1:{port + 1}"}, 403),
        ("a preflight", {"origin": "http://example.com", "access_control_request_method": "POST"}, 403),
        ("another Host", right | {"host": "example.com"}, 403),
        ("a Host that begins alike", right | {"host": "127.0.0.1.example.com"}, 403),
        ("no Host", right | {"host": None}, 400),
    ]
