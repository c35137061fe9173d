"""What the guide leads a stranger through, with tiny models of Qwen2's kind: functions, and Firefly's rows."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from component.data.chat_template import render_chat_template
from component.data.formats import parse_row
from component.data.render import render_firefly

from .component.data.test_beside_trl import CONTROL, PACKAGE, TEMPLATES
from .component.data.test_chat_template import FAMILIES, QWEN25, make_tokenizer

ROOT = Path(__file__).parents[1]
SECTION, CHINESE_SECTION, SERVED, CHINESE_SERVED = (
    (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    for page, heading in (
        ("README.md", "Teach an Instruct model your functions"),
        ("README_zh.md", "教 Instruct 模型用你的函数"),
        ("README.md", "Chat, serve, score"),
        ("README_zh.md", "聊天、部署、评分"),
    )
)
DATA_PAGE = (ROOT / "docs/data_format.md").read_text(encoding="utf-8")
ROWS = (ROOT / "data/functions_openai.jsonl").read_text(encoding="utf-8")


CHANGES = {  # what a random model needs to learn a dozen rows
    "learning_rate": "3e-3",
    "lora_alpha": "256",
    "lora_dropout": "0",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "num_train_epochs": "70",
    "lr_scheduler_type": "cosine",
}


def make_model(folder: Path, **tokens: str) -> Path:
    """Make a random model of Qwen2's layers, with a vocabulary of the sample rows.

    Its generation ends on <|endoftext|>, as that of a base model, whatever its tokenizer's EOS is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(ROWS.splitlines(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<tool_call>", "</tool_call>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "vocab_size": 1024, "initializer_range": 0.06}
    end = tokenizer.token_to_id("<|endoftext|>")
    Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=end, pad_token_id=end)).save_pretrained(folder)
    return folder


def train(command: str, changes: dict[str, str]) -> None:
    words = [word for word in shlex.split(command) if word.partition("=")[0] not in changes]
    words += [f"{key}={value}" for key, value in changes.items()]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_code(page: str, names: dict[str, Path | str]) -> tuple[str, subprocess.CompletedProcess]:
    """The first Python block of a page, run with something else for some of its text: (its text, what came of it)."""
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    for name, path in names.items():
        assert name in code
        code = code.replace(name, str(path))
    return code, subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_row_that_is_shown_is_the_first_of_the_sample_file():
    row = re.search(r"```json\n(.*?)```", SECTION, re.DOTALL)[1]
    first = json.loads(ROWS.splitlines()[0])
    assert json.loads(row) == first | {"tools": first["tools"][:1]}  # the file has a second function


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3.1", "mistral"])
def test_every_sample_row_fits_the_templates_that_the_readmes_name(family):
    for line in ROWS.splitlines():
        assert 1 in render_chat_template(parse_row(json.loads(line)), FAMILIES[family]).target_mask


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGE, reason="trl is not installed")
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3_1"])
def test_every_sample_row_fits_the_published_templates(family):
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template, "<s>", "<|end|>", control=CONTROL.findall(template))
    for line in ROWS.splitlines():
        assert 1 in render_chat_template(parse_row(json.loads(line)), tokenizer).target_mask


@pytest.mark.parametrize("section", [SECTION, CHINESE_SECTION], ids=["en", "zh"])
def test_the_guide_says_what_the_test_changes(section):
    (paragraph,) = [part for part in section.split("\n\n") if "`tests/test_guide.py`" in part]
    named = dict(re.findall(r"`(\w+)`(?: \(|（)([^)）]+)[)）]", paragraph))
    assert named == CHANGES
    assert "`model_name_or_path`" in paragraph and "`output_dir`" in paragraph


@pytest.mark.slow
def test_an_instruct_model_learns_functions_by_the_readmes_alone(tmp_path):
    base = make_model(
        tmp_path / "Qwen2.5-7B-Instruct", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN25
    )
    output = tmp_path / "output"
    for command in re.findall(r"```bash\npython (.*?)\n```", SECTION):
        train(command, {"model_name_or_path": str(base), "output_dir": str(output)} | CHANGES)
    for section, name in ((SECTION, "Qwen/Qwen2.5-7B-Instruct"), (CHINESE_SECTION, "models/Qwen2.5-7B-Instruct")):
        names = {name: base, "output/qwen2.5-7b-instruct": output}
        code, shown = run_code(section, names)
        replies = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
        assert shown.stdout.split() == " ".join(replies).split(), shown.stderr
    _, untaught = run_code(CHINESE_SECTION, names | {"PeftModel.from_pretrained(model, adapter)": "model"})
    assert untaught.returncode == 0, untaught.stderr  # its reply holds no call
    check_server(base, output)


def check_server(base: Path, output: Path) -> None:
    """The READMEs' way to serve that model, and their code that asks it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = ["script/serve.py", "--adapter", str(output / "final"), "--base", str(base), "--port", port]
    server = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == f"listening at http://127.0.0.1:{port}/v1\n"
        for section in (SERVED, CHINESE_SERVED):
            _, shown = run_code(section, {"8000": port, "qwen2.5-7b-instruct": output.name})
            assert """arguments='{"order": "4711"}', name='find_order'""" in shown.stdout, shown.stderr
    finally:
        server.terminate()
        assert server.wait(20) == 143


@pytest.mark.slow
@pytest.mark.parametrize("bos", [{}, {"bos_token": "<|im_start|>"}], ids=["no BOS", "BOS"])
def test_a_model_of_fireflys_format_is_chatted_with_by_the_lines_of_the_data_page(tmp_path, bos):
    base, output = make_model(tmp_path / "Qwen2.5-7B", eos_token="<|im_end|>", **bos), tmp_path / "output"
    rows = map(json.loads, re.findall(r"```json\n(.*?)```", DATA_PAGE, re.DOTALL))
    (row,) = [row for row in rows if "conversation" in row]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    own = {"model_name_or_path": str(base), "output_dir": str(output), "train_file": str(tmp_path / "rows.jsonl")}
    train("train_qlora.py --train_args_file train_args/qlora/qwen2.5-7b-sft-qlora.json", own | CHANGES)
    names = {"Qwen/Qwen2.5-7B": base, "output/qwen2.5-7b": output}
    _, shown = run_code(DATA_PAGE, names | {"    print(": "    print(ids)\n    print("})
    lines = shown.stdout.splitlines()
    assert lines[1::2] == [turn["assistant"] for turn in row["conversation"]], shown.stderr
    assert json.loads(lines[2]) == render_firefly(parse_row(row), AutoTokenizer.from_pretrained(base)).input_ids
