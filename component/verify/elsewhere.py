"""Asks programs that know nothing of this project what exported folders answer: plain transformers, and llama.cpp."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..run.errors import ArgumentError
from .llama_cpp import answers, continuation, encoding, template

LENGTH = 256  # tokens of an answer, at most
# Run by Python's isolated mode, in which nothing of the folder that it is started in can be imported.
PLAIN = """
import json, sys
sys.modules["component"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32)
replies = []
for messages, tools in asked["questions"]:
    prompt = tokenizer.apply_chat_template(
        messages, tools, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=asked["length"], do_sample=False)
    size = prompt["input_ids"].shape[1]
    replies.append((output[0, :size].tolist(), output[0, size:].tolist()))
print(json.dumps(replies))
"""


class Told(NamedTuple):
    """Token ids of a question as a program puts it to the model, and of the greedy answer, its end included."""

    prompt: list[int]
    answer: list[int]


def ask_transformers(folder: Path, questions: list[tuple[list[dict], list | None]]) -> list[Told]:
    """What transformers alone makes of an export (`--to glm`), on a processor in float32.

    Args:
        questions: messages and functions, or None, both in OpenAI's shape.

    Raises:
        ArgumentError: it cannot load the folder, or answer.
    """
    asked = {"folder": str(folder.absolute()), "questions": questions, "length": LENGTH}
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise ArgumentError(f"{folder}: transformers cannot run it ({done.stderr.strip().splitlines()[-1]})")
    return [Told(*told) for told in json.loads(done.stdout.splitlines()[-1])]


def ask_llama_cpp(gguf: Path, questions: list[tuple[list[dict], list | None]], lora: Path | None = None) -> list[Told]:
    """What llama.cpp makes of an export (`--to gguf`). Arguments and errors are those of `ask_transformers`.

    Args:
        lora: an adapter as GGUF, put on the model.
    """
    written = answers(
        gguf, [template(messages, **({"tools": tools} if tools else {})) for messages, tools in questions]
    )
    prompts = [found["tokens"] for found in answers(gguf, [encoding(one["prompt"], special=True) for one in written])]
    found = answers(gguf, [continuation(prompt, LENGTH) for prompt in prompts], lora)
    return [Told(prompt, one["tokens"]) for prompt, one in zip(prompts, found, strict=True)]
