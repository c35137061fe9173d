"""Shared fixtures: the reference files where they are present, and tiny stand-ins made in the test process."""

import json
import sys
from pathlib import Path

import pytest
import torch
from loguru import logger
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_qlora
from benchmark.runs import make_base
from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from component.model import attach_lora
from component.settings.schema import QLoRAArguments
from script.make_tiny_model import train_tokenizer

from .runs import ROWS, write_rows

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


@pytest.fixture
def model_folder(tmp_path, tiny_tokenizer):
    """Makes folders as a user has them: a random two-layer model of a family, its tokenizer and its configuration."""

    def make(family: str = "chatglm", **changes) -> Path:
        folder = tmp_path / f"{family}3-nano"
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.1}
        if family == "chatglm":
            config = ChatGLMConfig(padded_vocab_size=448, ffn_hidden_size=64, num_layers=2, kv_channels=16, **shape)
            ChatGLMForConditionalGeneration(config).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        else:
            sizes = {"vocab_size": 258, "intermediate_size": 64, "num_hidden_layers": 2, **shape, **changes}
            LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
            alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
            tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
                folder
            )
        return folder

    return make


@pytest.fixture
def adapter_folder(tmp_path):
    """Makes a random adapter of a model's folder, whose path is what it names as its base."""

    def make(base: Path, **changes) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        args = QLoRAArguments(model_name_or_path=str(base), train_file="x", lora_rank=4)
        model = attach_lora(model, args) if not changes else get_peft_model(model, LoraConfig(r=4, **changes))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as a user has it: config, weights and tokenizer of a two-layer ChatGLM3."""
    return make_base(tmp_path_factory.mktemp("models") / "chatglm3-nano", ROWS)


@pytest.fixture
def job(checkpoint, tmp_path):
    """Runs the command with small settings, in this process; returns the output folder."""

    def run(name: str = "run", rows: list[dict] = ROWS, dry_run: bool = False, **overrides) -> Path:
        settings = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(checkpoint),
            "train_file": str(write_rows(tmp_path / "train.jsonl", rows)),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "lora_dropout": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        } | overrides
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_qlora.py", "--train_args_file", str(file)] + ["--dry_run"] * dry_run)
            train_qlora.main()
        return tmp_path / name

    return run


@pytest.fixture
def stopped(job, monkeypatch):
    """Runs a job that has to stop; returns its exit code."""
    monkeypatch.setattr("component.run.process.leave", sys.exit)

    def run(*args, **settings) -> int:
        with pytest.raises(SystemExit) as stop:
            job(*args, **settings)
        return stop.value.code

    return run
