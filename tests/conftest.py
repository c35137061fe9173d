"""Shared fixtures: the reference files where they are present, and tiny stand-ins made in the test process."""

import json
from pathlib import Path

import pytest
import torch
from loguru import logger

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from script.make_tiny_model import train_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
TEXT = [
    "Hello, world! 你好，世界。",
    "tool_call(city='北京', days=2)\n    indented",
    "[Round 1]\n\n问：天气\n\n答：晴",
] * 5


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Rendered data of a test run goes to its own folder, that of the programs it starts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared reference folder is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared) -> Path:
    return shared / "reference"


@pytest.fixture(scope="session")
def real_tokenizer(reference) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(reference / "chatglm3-6b")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> ChatGLMTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = [{"conversation": [{"human": text, "assistant": text}]} for text in TEXT]
    data = folder / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return train_tokenizer([data], folder, vocab_size=340)


@pytest.fixture(params=["tiny", "real"])
def tokenizer(request) -> ChatGLMTokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def make_model():
    """Random models of a few thousand parameters; keywords change the configuration."""

    def make(**changes) -> ChatGLMForConditionalGeneration:
        shape = {
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_layers": 2,
            "num_attention_heads": 4,
            "kv_channels": 16,
        }
        torch.manual_seed(0)
        config = ChatGLMConfig(**{"padded_vocab_size": 448, "initializer_range": 0.2, **shape, **changes})
        return ChatGLMForConditionalGeneration(config).eval()

    return make


@pytest.fixture
def log():
    """The log lines of a test."""
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)))
    yield lines
    logger.remove(sink)
