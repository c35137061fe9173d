"""Asks llama.cpp's own server, in a process of its own: a file that it cannot run may end the process.

PyPI's xllamacpp has it; `make demo-export` and `make test-slow` install that.
"""

import json
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ..run.errors import ArgumentError

ROOT = Path(__file__).parents[2]


def answers(gguf: Path, requests: list[tuple[str, dict]], lora: Path | None = None, parses: bool = True) -> list:
    """The server's answers to requests, each a route and a body, on a processor and with a cache in float32.

    Args:
        lora: an adapter as GGUF, put on the model.
        parses: whether the server looks for calls in answers; False is its option --skip-chat-parsing.

    Returns:
        The JSON of each answer, also of an error.

    Raises:
        ArgumentError: the server does not start, or ends; the text has the end of its log.
    """
    asked = {"gguf": str(gguf), "lora": lora and str(lora), "parses": parses, "requests": requests}
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ArgumentError(f"{gguf}: llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def encoding(text: str, special: bool = False) -> tuple[str, dict]:
    """Asks for the ids of a text; `special`, whether control tokens are found in it, as in a chat's prompt."""
    return "/tokenize", {"content": text, "parse_special": special, "add_special": True}


def continuation(prompt: list[int], length: int) -> tuple[str, dict]:
    """Asks for the greedy tokens that follow a prompt's ids."""
    return "/completion", {"prompt": prompt, "n_predict": length, "temperature": 0, "return_tokens": True}


def chat(messages: list[dict], length: int = 256, **options) -> tuple[str, dict]:
    """Asks for the greedy answer of a conversation in OpenAI's messages, by the template in the file."""
    return "/v1/chat/completions", {"messages": messages, "max_tokens": length, "temperature": 0, **options}


def template(messages: list[dict], **options) -> tuple[str, dict]:
    """Asks for the prompt that the template in the file writes."""
    return "/apply-template", {"messages": messages, **options}


def serve(gguf: str, lora: str | None, parses: bool, requests: list) -> list:
    """Start the server in this process, and answer what `answers` was asked."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_gpu_layers, params.n_parallel = 2048, 0, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.warmup = False
    params.force_pure_content_parser = not parses
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)
    return [post(f"{server.listening_address}{route}", body) for route, body in requests]


def post(url: str, body: dict):
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request) as answer:
            return json.load(answer)
    except HTTPError as error:
        return json.load(error)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(serve(**json.load(sys.stdin))))
