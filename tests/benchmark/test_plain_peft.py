"""The program that others are measured by learns what ours learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmark.plain_peft import make_sample, read_rows
from component.chat_templates import set_chat_template
from component.data.chat_template import render_chat_template
from component.data.formats import parse_row

from ..component.data.test_chat_template import FAMILIES
from ..test_guide import make_model

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "data/functions_openai.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model of Qwen2's layers, whose tokenizer has ChatML's control tokens and no template."""
    return make_model(tmp_path_factory.mktemp("base") / "qwen", eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture
def chatml(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    set_chat_template(tokenizer, "chatml")
    return tokenizer


@pytest.mark.parametrize("family", ["chatml", "qwen2.5"])
def test_it_learns_the_tokens_that_we_learn(chatml, family):
    tokenizer = chatml if family == "chatml" else FAMILIES[family]
    rows = read_rows(str(ROWS))
    for row in rows:
        ours = render_chat_template(parse_row(row), tokenizer)
        theirs = make_sample(row, tokenizer, 4096)
        learned = [label != -100 for label in theirs["labels"]]
        assert theirs["input_ids"][: len(ours.input_ids)] == ours.input_ids
        assert learned[: len(ours.input_ids)] == [bool(flag) for flag in ours.target_mask]
        assert not any(learned[len(ours.input_ids) :])
    assert any("tool_calls" in message for row in rows for message in row["messages"])
    cut = make_sample(rows[0], tokenizer, 50)
    assert (len(cut["input_ids"]), len(cut["labels"])) == (50, 50)


@pytest.mark.slow
def test_it_trains_by_the_settings_file_of_ours(base, tmp_path):
    settings = {
        "output_dir": str(tmp_path / "output"),
        "model_name_or_path": str(base),
        "train_file": str(ROWS),
        "data_format": "chat_template",
        "chat_template": "chatml",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "lora_rank": 4,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    (tmp_path / "run.json").write_text(json.dumps(settings))
    command = [sys.executable, "benchmark/plain_peft.py", "--train_args_file", str(tmp_path / "run.json"), "seed=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "output/final/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 16, 7)
    weights = load_file(tmp_path / "output/final/adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for weight in weights.values())  # B began at zero
    losses = [float(part.split("'")[0]) for part in done.stdout.split("'loss': '")[1:]]
    assert len(losses) == 6 and losses[-1] < losses[0]
