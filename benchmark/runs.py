"""What runs of the real command are tried on, a tiny model and its rows, and what is read off their folders."""

import json
from pathlib import Path


def make_base(folder: Path, rows: list[dict], seed: int = 0) -> Path:
    """Make a folder as a user has it: config, weights and tokenizer of a two-layer ChatGLM3 of 100,000 parameters."""
    import torch
    from transformers.utils import logging

    from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
    from script.make_tiny_model import train_tokenizer

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([write_rows(folder / "text.jsonl", rows)], folder, vocab_size=320)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
    config = ChatGLMConfig(padded_vocab_size=384, initializer_range=0.1, **shape)
    ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_rows(number: int) -> list[dict]:
    """Conversations of different lengths, none equal to another."""
    return [
        {"conversations": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "word " * i}]}
        for i in range(1, number + 1)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logged(folder: Path, key: str) -> list[float]:
    """Values that a run logged under `key`, in their order."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry[key] for entry in state["log_history"] if key in entry]


def largest_difference(one, other) -> float:
    """Largest difference of two numbers at the same place of two nested structures; infinite where shapes differ."""
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return float("inf")
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return float("inf")
        return max(map(largest_difference, one, other), default=0.0)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return float("inf")
        return 0.0 if torch.equal(one, other) else (one.double() - other.double()).abs().max().item()
    if one == other:
        return 0.0
    both_numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) if both_numbers else float("inf")
