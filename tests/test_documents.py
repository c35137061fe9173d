"""What the READMEs and docs say can be done."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from component.settings.legacy import RENAMED_KEYS
from component.settings.schema import QLoRAArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


def commands() -> list[str]:
    """Every distinct command of a bash block."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)]
    return sorted({line.strip() for block in blocks for line in block.splitlines() if line.strip()})


@pytest.mark.parametrize("command", [c for c in commands() if "train_qlora.py" in c])
def test_every_training_command_parses_and_its_settings_load(command):
    from train_qlora import parse_command_line

    words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[words.index("train_qlora.py") :])
        patch.chdir(ROOT)
        patch.setattr("component.settings.load.missing_folder", lambda name: None)  # of the demo, if it has not run
        cli = parse_command_line()
        from component.settings.load import load_arguments

        overrides = [text for text in cli.overrides if not text.startswith("model_name_or_path=")]
        assert load_arguments(cli.train_args_file, overrides)[0].lora_rank == 64


def test_the_other_commands_are_known_and_run():
    others = {c for c in commands() if "train_qlora.py" not in c}
    assert others == {
        "make demo",  # run whole by test_the_demo_teaches_the_model
        "python3.11 -m venv .venv",
        ".venv/bin/pip install -r requirements.txt",
        "source .venv/bin/activate",
        "python script/convert_data_format.py --input data/dummy_data.jsonl --output /tmp/converted.jsonl",
        "python script/convert_data_format.py --input data/dummy_data_chatglm3.jsonl --output /tmp/messages.jsonl "
        "--to openai",
        "python script/inspect_data.py --train_args_file train_args/qlora/chatglm3-tiny-sft-qlora.json "
        "--html /tmp/report.html",  # run by tests/script/test_inspect_data.py
        "python script/merge_lora.py --adapter output/chatglm3-6b/final --base /models/chatglm3-6b "
        "--output models/merged",  # run by tests/script/test_merge_lora.py
        "python script/verify_real.py /models/chatglm3-6b",  # run by tests/script/test_verify_real.py
    }


@pytest.mark.parametrize(("name", "rows"), [("dummy_data", 34), ("dummy_data_chatglm3", 41)])
def test_the_converter_commands_convert_the_sample_data(tmp_path, name, rows):
    (command,) = [c for c in commands() if f"--input data/{name}.jsonl" in c]
    words = [str(tmp_path / "out.jsonl") if word.startswith("/tmp/") else word for word in shlex.split(command)[1:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: {rows} rows\n"


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_configuration_page_names_every_setting_and_its_default():
    page = (ROOT / "docs/configuration.md").read_text()
    for setting in dataclasses.fields(QLoRAArguments):
        row = re.search(rf"^\| `{setting.name}` \| (.+?) \|", page, re.MULTILINE)
        assert row, setting.name
        if setting.default not in ("", None, False):
            assert json.dumps(setting.default).strip('"') in row[1]
    renamed = {old for old, new in RENAMED_KEYS.items() if new and not old.startswith("per_gpu")}
    assert all(f"`{old}`" in page for old in renamed)


def test_the_names_that_programs_use_have_one_path_each():
    page = (ROOT / "docs/architecture.md").read_text()
    (paragraph,) = [part for part in page.split("\n\n") if part.startswith("Names that programs outside use")]
    module = ""
    found = set()
    for name in re.findall(r"`(\w[\w.]*)`", paragraph):
        module = name.rpartition(".")[0] or module
        assert hasattr(importlib.import_module(module), name.rpartition(".")[2]), name
        found.add(name.rpartition(".")[2])
    assert found >= {"ChatGLM3SFTDataset", "SFTDataset", "TargetLMLoss", "load_arguments", "TOOLS_PROMPT"}


def test_both_readmes_show_the_same_code():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README_zh.md"))
    for kind in ("bash", "python"):
        blocks = [re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
        assert blocks[0] == blocks[1]


@pytest.mark.slow
def test_the_demo_teaches_the_model():
    """`make demo` from a clone's files, and the READMEs' chat snippet with its adapter."""
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        'tuned  {"name": "get_current_weather", "parameters": {"location": "北京", "unit": "celsius"}}' in done.stdout
    )
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    snippet = snippet.replace("THUDM/chatglm3-6b", "models/chatglm3-tiny").replace(
        "chatglm3-6b/final", "chatglm3-tiny/final"
    )
    snippet = snippet.replace("history=[])", "history=[], do_sample=False)")
    shown = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "你好！我是萤光，一只会聊天、会调用工具的小萤火虫。有什么可以帮你？"
