"""Measure a running server of OpenAI's protocol: ours, started by script/serve.py, or any other.

python benchmark/serve.py [--host NAME] [--port 8000] [--streams 1,4,16,64] [--prompt 512] [--new 256] [--json FILE]

Each row has as many clients at once as it has streams; each asks for one streamed, greedy answer to random words, once
for warm-up with a few tokens and once timed. `tok/s` counts the tokens of all answers, as the server's usage tells
them, over the whole time. `first` is the time until an answer's first piece, and `health` that of GET /health, asked
for ten times a second meanwhile (ours alone). The key, if the server wants one, is taken from OPENAI_API_KEY.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COLUMNS = ("model", "streams", "prompt", "answer", "tok/s", "first p50 s", "first p99 s", "health p99 ms")
WARM_UP = 8  # tokens of an answer
WORDS = [chr(code) for code in range(ord("一"), ord("一") + 2000)]  # about a token each, in most vocabularies
USAGE = {"include_usage": True}
BETWEEN = 0.1  # seconds between two questions for the health


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="[127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="[8000]")
    parser.add_argument("--model", help="id of the model [the server's first]")
    parser.add_argument("--streams", default="1,4,16,64", help="clients at once, comma-separated [1,4,16,64]")
    parser.add_argument("--prompt", type=int, default=512, help="Chinese characters of a prompt [512]")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer, at most [256]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    cli = parser.parse_args()

    from benchmark.common import table  # loads torch, which --help need not wait for

    try:
        results = asyncio.run(measure_all(cli))
    except (OSError, Refused) as error:
        sys.exit(f"{cli.host}:{cli.port}: {error}")
    if cli.json:
        cli.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(COLUMNS, [describe(result) for result in results]))


class Refused(Exception):
    """The server's answer to a request that it does not fulfil."""


@dataclass
class Client:
    """Asks a server by plain sockets: a client that parses every event would be slower than the server."""

    host: str
    port: int

    async def ask(self, path: str, body: dict | None = None) -> AsyncIterator[bytes]:
        """The lines of an answer's body. HTTP/1.0, in which an answer ends with its connection."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        data = json.dumps(body).encode() if body else b""
        head = [f"{'POST' if body else 'GET'} {path} HTTP/1.0", f"Host: {self.host}:{self.port}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        head.append(f"Authorization: Bearer {os.environ.get('OPENAI_API_KEY', 'none')}")
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        try:
            status = (await reader.readline()).decode().split(maxsplit=1)[1].strip()
            while (await reader.readline()).strip():
                pass
            if not status.startswith("200"):
                raise Refused(f"{status} {(await reader.read()).decode()}")
            async for line in reader:
                yield line
        finally:
            writer.close()

    async def get(self, path: str) -> Any:
        return json.loads(b"".join([line async for line in self.ask(path)]))


async def measure_all(cli: argparse.Namespace) -> list[dict]:
    client, results = Client(cli.host, cli.port), []
    model = cli.model or (await client.get("/v1/models"))["data"][0]["id"]
    for streams in map(int, cli.streams.split(",")):
        await measure(client, model, streams, cli.prompt, WARM_UP)
        results.append(await measure(client, model, streams, cli.prompt, cli.new))
        print(*describe(results[-1]), file=sys.stderr)
    return results


async def measure(client: Client, model: str, streams: int, prompt: int, new: int) -> dict:
    """Ask `streams` questions at once, all of different beginnings, and time them."""
    questions = ["".join(random.Random(f"{streams} {new} {i}").choices(WORDS, k=prompt)) for i in range(streams)]
    health: list[float] = []
    watch = asyncio.create_task(ask_for_health(client, health))
    began = time.perf_counter()
    answers = await asyncio.gather(*(answer(client, model, question, new) for question in questions))
    seconds = time.perf_counter() - began
    watch.cancel()
    asked, written = (sum(usage[name] for usage, _ in answers) for name in ("prompt_tokens", "completion_tokens"))
    return {"model": model, "streams": streams, "prompt": asked / streams, "answer": written / streams} | {
        "speed": written / seconds,
        "first": [seconds for _, seconds in answers],
        "health": health,
    }


async def answer(client: Client, model: str, question: str, new: int) -> tuple[dict, float]:
    """(usage, seconds until the answer's first piece)."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": new, "temperature": 0}
    began, events, first, last = time.perf_counter(), 0, 0.0, b""
    async for line in client.ask("/v1/chat/completions", body | {"stream": True, "stream_options": USAGE}):
        if line.startswith(b"data: {"):
            events, last = events + 1, line
            if events == 2:  # the first one tells the role alone
                first = time.perf_counter() - began
    return json.loads(last.removeprefix(b"data: "))["usage"], first


async def ask_for_health(client: Client, seconds: list[float]) -> None:
    """Ask again and again how long GET /health takes, as long as this is there."""
    with suppress(Refused):
        while True:
            began = time.perf_counter()
            await client.get("/health")
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(BETWEEN)


def describe(result: dict) -> list[str]:
    health = f"{1000 * percentile(result['health'], 99):.0f}" if result["health"] else "–"
    waits = [f"{percentile(result['first'], share):.2f}" for share in (50, 99)]
    sizes = [f"{result[name]:.0f}" for name in ("streams", "prompt", "answer")]
    return [result["model"], *sizes, f"{result['speed']:,.0f}", *waits, health]


def percentile(values: list[float], share: int) -> float:
    """The smallest value that is at least as large as `share` percent of all."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * share // 100), 1) - 1]


if __name__ == "__main__":
    main()
