"""Measure a running server of OpenAI's protocol: ours, started by script/serve.py, or any other.

python benchmark/serve.py [--url http://127.0.0.1:8000] [--streams 1,4,16,64] [--prompt 512] [--new 256] [--json FILE]

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
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from openai import AsyncOpenAI, OpenAIError

from benchmark.common import table

COLUMNS = ("model", "streams", "prompt", "answer", "tok/s", "first p50 s", "first p99 s", "health p99 ms")
WARM_UP = 8  # tokens of an answer
WORDS = [chr(code) for code in range(ord("一"), ord("一") + 2000)]  # about a token each, in most vocabularies
BETWEEN = 0.1  # seconds between two questions for the health


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="[http://127.0.0.1:8000]")
    parser.add_argument("--model", help="id of the model [the server's first]")
    parser.add_argument("--streams", default="1,4,16,64", help="clients at once, comma-separated [1,4,16,64]")
    parser.add_argument("--prompt", type=int, default=512, help="Chinese characters of a prompt [512]")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer, at most [256]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    cli = parser.parse_args()
    try:
        results = asyncio.run(measure_all(cli))
    except OpenAIError as error:
        sys.exit(f"{cli.url}: {error}")
    if cli.json:
        cli.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(COLUMNS, [describe(result) for result in results]))


async def measure_all(cli: argparse.Namespace) -> list[dict]:
    key = os.environ.get("OPENAI_API_KEY", "none")
    results = []
    async with AsyncOpenAI(base_url=f"{cli.url}/v1", api_key=key, max_retries=0, timeout=600) as client:
        model = cli.model or (await client.models.list()).data[0].id
        for streams in map(int, cli.streams.split(",")):
            await measure(client, model, streams, cli.prompt, WARM_UP)
            results.append(await measure(client, model, streams, cli.prompt, cli.new))
            print(*describe(results[-1]), file=sys.stderr)
    return results


async def measure(client: AsyncOpenAI, model: str, streams: int, prompt: int, new: int) -> dict:
    """Ask `streams` questions at once, all of different beginnings, and time them."""
    questions = ["".join(random.Random(f"{streams} {new} {i}").choices(WORDS, k=prompt)) for i in range(streams)]
    health: list[float] = []
    watch = asyncio.create_task(ask_for_health(client, health))
    began = time.perf_counter()
    answers = await asyncio.gather(*(answer(client, model, question, new) for question in questions))
    seconds = time.perf_counter() - began
    watch.cancel()
    asked, written = (sum(usage[i] for usage, _ in answers) for i in (0, 1))
    first = [seconds for _, seconds in answers]
    return {"model": model, "streams": streams, "prompt": asked / streams, "answer": written / streams} | {
        "speed": written / seconds,
        "first": first,
        "health": health,
    }


async def answer(client: AsyncOpenAI, model: str, question: str, new: int) -> tuple[tuple[int, int], float]:
    """((tokens of the prompt, of the answer), seconds until its first piece)."""
    began, first, usage = time.perf_counter(), None, None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=new,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if first is None and chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].finish_reason):
            first = time.perf_counter() - began
        usage = chunk.usage or usage
    return (usage.prompt_tokens, usage.completion_tokens), first


async def ask_for_health(client: AsyncOpenAI, seconds: list[float]) -> None:
    """Ask again and again how long GET /health takes, as long as this is there."""
    url = str(client.base_url).removesuffix("/v1/") + "/health"
    with suppress(OpenAIError):
        while True:
            began = time.perf_counter()
            await client.get(url, cast_to=object)
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
