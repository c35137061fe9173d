"""What every program does with folders as publishers make them: it works, or says what to do instead."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_qlora
from component.model import attach_lora
from component.settings.schema import QLoRAArguments
from script import inspect_data, merge_lora

from .conftest import SHARED
from .published import LAYOUTS, write
from .runs import ROWS, write_rows

ROOT = Path(__file__).parents[1]
ADVICE = {  # what is said of folders that no program takes
    "glm-4-9b-chat": "glm-4-9b-chat-hf",
    "chatglm3-6b-half": "model-00002-of-00002.safetensors is not there, 1 of 2 files are missing",
    "chatglm3-6b-pointers": "model-00001-of-00002.safetensors: git left a pointer in the file's place; run `git lfs",
    "chatglm3-6b-pointer": "tokenizer.model: git left a pointer in the file's place; run `git lfs pull`",
    "chatglm3-6b-int4": "quantization_bit=4",
    "chatglm3-6b-gguf": "chatglm3-6b-q4_0.gguf, made for llama.cpp",
    "Qwen2.5-7B-GPTQ-Int4": "the base is quantised (gptq)",
    "Qwen2.5-7B-AWQ": "the base is quantised (awq)",
    "Qwen3-8B-FP8": "the base is quantised (fp8)",
}
COMMANDS = ("dry_run", "train", "inspect", "merge", "chat")
QUICK = {  # cells of the normal suite; the others are slow
    ("chatglm3-6b", "merge"),
    ("chatglm2-6b", "train"),
    ("chatglm2-6b", "chat"),
    ("chatglm3-6b-later", "inspect"),
    ("chatglm3-merged-by-4.40", "dry_run"),
    ("Qwen2.5-7B", "dry_run"),
    ("Mistral-7B-v0.3", "merge"),
    *((layout, "merge") for layout in ADVICE),
    *((layout, "dry_run") for layout in ADVICE),
}
CELLS = [
    pytest.param(layout, command, marks=[] if (layout, command) in QUICK else pytest.mark.slow)
    for layout in LAYOUTS
    for command in COMMANDS
    if command != "chat" or ("chatglm" in layout and layout not in ADVICE)
]


def call(program, *options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, options)])
        program.main()


@pytest.fixture(scope="session")
def published(tmp_path_factory, tiny_tokenizer):
    """A published folder by its layout's name, made once."""
    real = SHARED / "reference/chatglm3-6b/tokenizer.model"
    vocabulary = real if real.is_file() else Path(tiny_tokenizer.vocab_file)
    root = tmp_path_factory.mktemp("published")

    def make(layout: str) -> Path:
        if not (root / layout).exists():
            LAYOUTS[layout](root / layout, vocabulary)
        return root / layout

    return make


@pytest.fixture
def adapter(published, tmp_path):
    """An adapter of a layout; of one that does not load, ChatGLM3-6B's, which no program comes to open."""

    def make(layout: str) -> Path:
        base = published("chatglm3-6b" if layout in ADVICE else layout)
        args = QLoRAArguments(model_name_or_path=str(base), train_file="x", lora_rank=4)
        attach_lora(AutoModelForCausalLM.from_pretrained(base), args).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=False
        )
        return tmp_path / "adapter"

    return make


@pytest.fixture
def commands(published, adapter, tmp_path):
    """The programs by name, each on a layout."""
    usual = {"max_steps": 2, "lora_rank": 4, "save_strategy": "no", "max_seq_length": 256}
    options = [f"{key}={value}" for key, value in usual.items()]

    def settings(layout: str) -> tuple:
        paths = {"model_name_or_path": published(layout), "output_dir": tmp_path / "run"}
        given = [f"{key}={value}" for key, value in paths.items()]
        data = write_rows(tmp_path / "data.jsonl", ROWS)
        return (
            *("--train_args_file", ROOT / "train_args/qlora/chatglm3-tiny-sft-qlora.json"),
            *options,
            *given,
            (f"train_file={data}"),
        )

    def chat(layout: str) -> None:
        """The README's own lines."""
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        snippet = re.search(r"```python\n(import component.chatglm.*?)```", readme, re.DOTALL)[1]
        for name, path in (("THUDM/chatglm3-6b", published(layout)), ("output/chatglm3-6b/final", adapter(layout))):
            snippet = snippet.replace(f'"{name}"', f'"{path}"')
        scope = {}
        exec(snippet.replace("history=[])", "history=[], max_new_tokens=3)"), scope)
        assert isinstance(scope["response"], (str, dict))

    return {
        "dry_run": lambda layout: call(train_qlora, *settings(layout), "--dry_run"),
        "train": lambda layout: call(train_qlora, *settings(layout)),
        "inspect": lambda layout: call(inspect_data, *settings(layout)),
        "merge": lambda layout: call(
            merge_lora, "--base", published(layout), "--adapter", adapter(layout), "--output", tmp_path / "merged"
        ),
        "chat": chat,
    }


@pytest.mark.parametrize(("layout", "command"), CELLS)
def test_a_published_folder_works_or_is_refused_with_advice(layout, command, commands, tmp_path, capsys):
    if layout not in ADVICE:
        commands[command](layout)
        made = {"train": "run/final/adapter_model.safetensors", "merge": "merged/config.json"}.get(
            command, "data.jsonl"
        )
        assert (tmp_path / made).exists() or command == "chat"
        return
    with pytest.raises(SystemExit) as stop:
        commands[command](layout)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert ADVICE[layout] in said
    assert "Traceback" not in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_hubs_bin_shards_train_and_merge_in_processes_of_their_own(published, tmp_path):
    """From the hub's cache, offline; and nothing registers ChatGLM but the program that needs it."""
    cache, commit = tmp_path / "hub/models--THUDM--chatglm2-6b", "a" * 40
    shutil.copytree(published("chatglm2-6b"), cache / "snapshots" / commit)
    write(cache / "refs/main", commit)
    for absent in ("adapter_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        write(cache / ".no_exist" / commit / absent, "")
    settings = {"model_name_or_path": "THUDM/chatglm2-6b", "output_dir": tmp_path / "run", "max_steps": 2}
    settings |= {"train_file": "data/dummy_data.jsonl", "max_seq_length": 128, "save_strategy": "no"}
    options = ("--train_args_file", "train_args/qlora/chatglm3-tiny-sft-qlora.json")
    options = (*options, *(f"{key}={value}" for key, value in settings.items()))
    merging = ("--base", "THUDM/chatglm2-6b", "--adapter", tmp_path / "run/final", "--output", tmp_path / "merged")
    for program in (("train_qlora.py", *options), ("script/merge_lora.py", *merging)):
        done = subprocess.run(
            [sys.executable, *map(str, program)],
            cwd=ROOT,
            env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.fixture
def llama_without_rows(model_folder) -> Path:
    """A Llama whose tokenizer was given a padding token and another, and whose embedding was not resized."""
    folder = model_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|SVG|>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_that_the_embedding_has_no_row_for_is_refused_where_it_is_used(llama_without_rows, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [*ROWS, {"conversation": [{"human": "x", "assistant": "<|SVG|>"}]}])
    options = ("--train_args_file", ROOT / "train_args/qlora/chatglm3-tiny-sft-qlora.json", f"train_file={data}")
    options = (*options, f"model_name_or_path={llama_without_rows}", "data_format=firefly", "max_seq_length=64")
    options = (*options, f"output_dir={tmp_path / 'run'}", "max_steps=2", "save_strategy=no", "lora_rank=4")
    with pytest.raises(SystemExit) as stop:
        call(train_qlora, *options)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "data.jsonl:13: token '<|SVG|>' has the id 259" in said
    assert "the tokenizer has ids up to 259, the embedding has rows up to 257" in said
    write_rows(data, ROWS)
    call(train_qlora, *options, "packing=false")  # whose batches are padded, by EOS
    assert (tmp_path / "run/final").is_dir()


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_weights_that_are_cut_or_not_there_end_a_run_before_its_data_is_read(job, model_folder, capsys, harm):
    folder = model_folder()
    file = folder / "model.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        job(model_name_or_path=str(folder))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert ("cut short or damaged" if harm == "cut" else "there are no weights") in told
    assert "rows," not in told
