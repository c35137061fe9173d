"""Measure generation, beside transformers' own: one table, one run, everything warm.

python benchmark/generate.py [--shape 6b] [--streams 1,4,16,64] [--prompt 512] [--new 256] [--json FILE]

Each row answers as many random prompts as it has streams, greedily and without an end of their own, once for warm-up
with a few tokens and once timed. `tok/s` counts the new tokens over the whole time. `writing` is their speed after the
first one of each, by the difference to the time of answers of one token, which is `reading`.
"""

import argparse
import gc
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmark.common import LORA_ALPHA, LORA_RANK, build_model, machine, now, peak_memory, table
from component.inference.engine import Engine
from component.inference.sampling import Sampling
from component.inference.slots import CHUNK
from component.model import find_linear_names

COLUMNS = ("model", "weights", "program", "streams", "tok/s", "writing tok/s", "reading s", "peak GiB")
MODELS = {"6b": ("chatglm3-6b", "llama-16"), "tiny": ("tiny-chatglm", "tiny-llama")}
WARM_UP = 8  # new tokens
MERGED, ADAPTED = "16 bits", f"4 bits, adapter of rank {LORA_RANK}"

# From prompts and the number of new tokens to the answers.
Program = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="6b", help="of the models [6b]")
    parser.add_argument("--streams", default="1,4,16,64", help="conversations at once, comma-separated [1,4,16,64]")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt [512]")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer [256]")
    parser.add_argument("--only", default="", help="rows whose model, weights or program contain this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, rewritten after each row")
    cli = parser.parse_args()
    streams = [int(part) for part in cli.streams.split(",")]
    chatglm, llama = MODELS[cli.shape]
    report = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M")} | machine() | {"results": []}
    for shape, weights in ((chatglm, MERGED), (chatglm, ADAPTED), (llama, MERGED)):
        for result in measure(shape, weights, streams, cli):
            report["results"].append(result)
            print(*describe(result), file=sys.stderr)
            if cli.json:
                cli.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{report['device']}; {versions}; prompts of {cli.prompt} tokens, {cli.new} new ones\n")
    print(table(COLUMNS, [describe(result) for result in report["results"]]))


def measure(shape: str, weights: str, streams: list[int], cli: argparse.Namespace) -> Iterator[dict]:
    """Measure all programs with one model, which exists meanwhile."""
    makers = {"generate": by_generate, "generate_batch": by_generate_batch, "engine": by_engine}
    rows = [({"model": shape, "weights": weights, "program": name}, maker) for name, maker in makers.items()]
    wanted = [(row, maker) for row, maker in rows if cli.only in " ".join(row.values())]
    if not wanted:
        return
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(shape, device, dtype, bits=16 if weights == MERGED else 4).eval()
    model.config.use_cache = True
    if weights == ADAPTED:
        model = get_peft_model(
            model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=find_linear_names(model))
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, 0, 0.02)
    for row, maker in wanted:
        try:
            program = maker(model, max(streams), cli.prompt + cli.new)
            warm_up = cli.new if maker is by_generate_batch else WARM_UP  # it takes its size from the first call
            for count in streams:
                figures = time_it(program, count, cli, warm_up, device, model.config.vocab_size)
                yield row | {"streams": count} | figures
        except Exception as error:
            traceback.print_exc()
            yield row | {"streams": "", "error": f"{type(error).__name__}: {error}"[:200]}
        program = None
        model.destroy_cached_continuous_batching_manager()
        free(device)


def time_it(
    program: Program, streams: int, cli: argparse.Namespace, warm_up: int, device: torch.device, vocab: int
) -> dict:
    """Seconds of answers of one token and of all, after a warm-up; each with prompts of its own."""

    def run(seed: int, new: int) -> float:
        draw = random.Random(seed)
        prompts = [[draw.randrange(16, vocab) for _ in range(cli.prompt)] for _ in range(streams)]
        started = now(device)
        answers = program(prompts, new)
        seconds = now(device) - started
        if [len(answer) for answer in answers] != [new] * streams:
            raise ValueError(
                f"{streams} answers of {new} tokens are expected, got {[len(answer) for answer in answers]}"
            )
        return seconds

    run(0, warm_up)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return {"first": run(1, 1), "seconds": run(2, cli.new), "new": cli.new, "peak_gib": peak_memory(device)}


def by_generate(model, streams: int, length: int) -> Program:
    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            answers = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return answers[:, ids.shape[1] :].tolist()

    return run


def by_generate_batch(model, streams: int, length: int) -> Program:
    """transformers' continuous batching, whose cache and graphs stay from call to call of as many prompts."""
    sized_for = 0

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        nonlocal sized_for
        if len(prompts) != sized_for:
            model.destroy_cached_continuous_batching_manager()
            sized_for = len(prompts)
        settings = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        # As much as the engine takes; by itself it takes nearly all memory.
        memory = ContinuousBatchingConfig(num_blocks=streams * (length // 256 + 2), max_batch_tokens=CHUNK["cuda"])
        answers = model.generate_batch(prompts, settings, memory, persistent_manager=True)
        return [answer.generated_tokens for answer in answers.values()]

    return run


def by_engine(model, streams: int, length: int) -> Program:
    engine = Engine(model, (), max_batch=streams, max_tokens=length)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        return [answer.tokens for answer in engine.run(prompts, Sampling(max_new_tokens=new))]

    return run


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(result: dict) -> list[str]:
    cells = [str(result[key]) for key in ("model", "weights", "program", "streams")]
    if "error" in result:
        return [*cells, result["error"], "", "", ""]
    tokens, seconds, first = result["streams"] * result["new"], result["seconds"], result["first"]
    writing = f"{(tokens - result['streams']) / (seconds - first):,.0f}" if seconds > first else ""
    peak = "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}"
    return [*cells, f"{tokens / seconds:,.0f}", writing, f"{first:.2f}", peak]


if __name__ == "__main__":
    main()
