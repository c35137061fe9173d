"""What the READMEs and docs say can be done."""

import dataclasses
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from component.data.conversation import oddities
from component.data.formats import ROW_FORMATS, detect_format, parse_row, unread_keys
from component.data.messages import as_text
from component.settings.legacy import RENAMED_KEYS
from component.settings.load import load_arguments
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

    words = shlex.split(command.removesuffix(" 2>&1 | tee train.log"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[words.index("train_qlora.py") :])
        patch.chdir(ROOT)
        patch.setattr("component.settings.load.missing_folder", lambda name: None)  # of the demo, if it has not run
        patch.setattr("component.settings.load.check_trackers", lambda names: None)  # SwanLab, if it is not installed
        cli = parse_command_line()
        overrides = [text for text in cli.overrides if not text.startswith("model_name_or_path=")]
        assert load_arguments(cli.train_args_file, overrides)[0].lora_rank == 64


# The other commands, and what checks them. What is called fixed here needs a network, a card or a service: it was tried
# by hand as far as it could be, and must not change unseen.
OTHERS = {
    "make demo",  # test_the_demo_teaches_the_model
    "PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple make demo",  # the same, with a mirror
    "python3 -m venv .venv",  # what make does
    ".venv/bin/pip install -r requirements.txt",  # what make does
    ".venv/bin/pip install -r requirements.txt -i https://pypi.tuna.tsinghua.edu.cn/simple",  # fixed
    "source .venv/bin/activate",  # fixed
    # Below.
    "python script/convert_data_format.py --input data/dummy_data.jsonl --output /tmp/converted.jsonl",
    "python script/convert_data_format.py --input data/dummy_data_chatglm3.jsonl --output /tmp/messages.jsonl "
    "--to openai",
    # tests/script
    "python script/inspect_data.py --train_args_file train_args/qlora/chatglm3-tiny-sft-qlora.json "
    "--html /tmp/report.html",
    "python script/merge_lora.py --adapter output/chatglm3-6b/final --base models/chatglm3-6b --output models/merged",
    "python script/score.py --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--data data/functions_openai.jsonl --html /tmp/score.html",
    "python script/score.py --adapter output/chatglm3-6b/final --data data/test.jsonl --json output/score.json "
    "--html output/score.html",
    "python script/score.py --adapter output/chatglm3-6b/final --data data/test.jsonl "
    "--variants trained,merged,full,requantised",
    # tests/script/test_chat.py, tests/script/test_serve.py, tests/test_guide.py
    "python script/chat.py --adapter output/chatglm3-tiny/final --tools data/dummy_data_chatglm3.jsonl",
    "python script/chat.py --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--tools data/functions_openai.jsonl",
    "python script/serve.py --adapter output/chatglm3-tiny/final",
    "python script/serve.py --adapter output/chatglm3-6b/final --base models/chatglm3-6b",
    "python script/serve.py --adapter output/qwen2.5-7b-instruct/final --base Qwen/Qwen2.5-7B-Instruct",
    "python script/serve.py --adapter output/qwen2.5-7b-instruct/final --base models/Qwen2.5-7B-Instruct",
    """curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": """
    """"chatglm3-tiny", "messages": [{"role": "user", "content": "世界上最高的山是哪座？"}]}'""",
    """curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": """
    """"chatglm3-6b", "messages": [{"role": "user", "content": "你好"}]}'""",
    # tests/benchmark/test_quality.py
    "python benchmark/quality.py --model models/SmolLM2-135M-Instruct --calls ../shared/data/snips "
    "--chat chatterbot_corpus/data/english --output output/quality --gpus 4 --at_once 3",
    "python script/verify_real.py /models/chatglm3-6b",
    "pip install modelscope",  # fixed
    "modelscope download --model ZhipuAI/chatglm3-6b --local_dir models/chatglm3-6b",  # fixed; parsed by 1.40.2
    "modelscope download --model Qwen/Qwen2.5-7B-Instruct --local_dir models/Qwen2.5-7B-Instruct",  # fixed
    # test_hf_download_takes_the_options_that_are_shown
    "HF_ENDPOINT=https://hf-mirror.com hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct",
    "tensorboard --logdir output",  # fixed
    "pip install swanlab==0.7.20",  # fixed; the run that follows it was made with this version
    "cd /root/autodl-tmp/luciole",  # fixed
    "conda create -y -p /root/autodl-tmp/python python=3.12",  # fixed
    "make .venv/ready PYTHON=/root/autodl-tmp/python/bin/python",  # tests/test_demo.py
    "/usr/bin/shutdown",  # fixed
    # tests/test_demo.py, which reads the Dockerfile
    "docker build -t luciole .",
    "docker run --rm --gpus all -v ./data:/luciole/data -v ./models:/luciole/models -v ./output:/luciole/output "
    "luciole --train_args_file train_args/qlora/chatglm3-6b-sft-qlora.json model_name_or_path=models/chatglm3-6b",
    # tests/script/test_export.py
    "python script/export.py --to glm --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--output models/chatglm3-6b-glm",
    "python script/export.py --to gguf --type q8_0 --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--output models/chatglm3-6b-gguf",
    "python script/export.py --to adapter --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--output models/chatglm3-6b-lora",
    "python script/export.py --to gguf --type f32 --adapter output/chatglm3-6b/final --base models/chatglm3-6b "
    "--output models/exact-gguf",
    "python script/export.py --to gguf --base models/chatglm3-6b --output models/base-gguf",
    # fixed: docs/deploy.md says of each whether it was run, and where it was read
    "vllm serve models/chatglm3-6b-glm --served-model-name chatglm3 --enable-auto-tool-choice "
    "--tool-parser-plugin models/chatglm3-6b-glm/chatglm3_tool_parser.py --tool-call-parser chatglm3",
    "vllm serve models/merged --served-model-name chatglm3",
    "vllm serve models/chatglm3-6b --tokenizer models/chatglm3-6b-glm --generation-config models/chatglm3-6b-glm "
    "--enable-lora --max-lora-rank 64 --lora-modules tuned=output/chatglm3-6b/final",
    "python -m sglang.launch_server --model-path models/merged --served-model-name chatglm3",
    "python -m sglang.launch_server --model-path models/chatglm3-6b-glm --served-model-name chatglm3",
    "llama-server -m models/chatglm3-6b-gguf/chatglm3-6b-q8_0.gguf --skip-chat-parsing --port 8080",
    "llama-server -m models/chatglm3-6b-gguf/chatglm3-6b-q8_0.gguf --skip-chat-parsing --special --reverse-prompt "
    '"<eos>" --reverse-prompt "<|user|>" --reverse-prompt "<|observation|>" --port 8080',
    "llama-server -m models/exact-gguf/exact-f32.gguf --skip-chat-parsing --port 8080 --flash-attn off "
    "--cache-type-k f32 --cache-type-v f32",
    "llama-server -m models/base-gguf/base-f16.gguf --lora models/chatglm3-6b-lora/adapter.gguf --skip-chat-parsing "
    "--port 8080",
    "cd models/chatglm3-6b-gguf && ollama create chatglm3 -f Modelfile",
    "ollama run chatglm3",
    "lms import models/chatglm3-6b-gguf/chatglm3-6b-q8_0.gguf",
}


def test_the_other_commands_are_known():
    assert {c for c in commands() if "train_qlora.py" not in c} == OTHERS


def test_hf_download_takes_the_options_that_are_shown():
    (command,) = [c for c in OTHERS if " hf download" in c]
    words = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)[2:]]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words if word.startswith("--"))


@pytest.mark.parametrize(("name", "rows"), [("dummy_data", 34), ("dummy_data_chatglm3", 41)])
def test_the_converter_commands_convert_the_sample_data(tmp_path, name, rows):
    (command,) = [c for c in commands() if f"--input data/{name}.jsonl" in c]
    words = [str(tmp_path / "out.jsonl") if word.startswith("/tmp/") else word for word in shlex.split(command)[1:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: {rows} rows\n"


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", path.read_text()):
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {target}#{anchor}"


def anchors(page: Path) -> list[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


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


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


# What differs between the READMEs: in the Chinese one models are folders, and are spoken to in Chinese.
OWN_WORDS = {"bash": r" (model_name_or_path=|--base )\S+", "python": r""""[^"]*"|'[^']*'|#.*"""}


@pytest.mark.parametrize("kind", ["bash", "python"])
def test_the_chinese_readme_shows_all_code_of_the_english_one_in_its_order(kind):
    english, chinese = (
        [re.sub(OWN_WORDS[kind], "", block) for block in blocks(page, kind)] for page in ("README.md", "README_zh.md")
    )
    assert [block for block in chinese if block in english] == english


def test_every_model_of_the_chinese_readme_lies_where_it_was_downloaded_to():
    page = (ROOT / "README_zh.md").read_text()
    downloaded = set(re.findall(r"modelscope download .*--local_dir (\S+)", page))
    used = re.findall(r'(?:model_name_or_path=|--base |base, adapter = "|verify_real.py )([^\s"`]+)', page)
    assert set(used) == downloaded == {"models/chatglm3-6b", "models/Qwen2.5-7B-Instruct"}
    assert len(used) == 17


def test_both_readmes_answer_the_same_questions():
    numbers = []
    for page, heading in (("README.md", "## Questions"), ("README_zh.md", "## 常见问题")):
        section = (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
        numbers.append(len(re.findall(r"^\*\*", section, re.MULTILINE)))
    assert numbers == [11, 11]


def settings_table(page: str, heading: str) -> list[tuple[str, str]]:
    """(name, default) of each row of a page's first table after a heading."""
    section = (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE)


def values(cell: str) -> list[str]:
    """What is not prose of a default: code, numbers, true and false; and whether it is required or none."""
    words = {"必填": "required", "无": "none"}
    return [words[cell]] if cell in words else re.findall(r"`[^`]+`|\d[\d.e-]*|true|false|^required$|^none$", cell)


def test_the_chinese_page_has_every_setting_and_default_of_the_english_one():
    pages = (("docs/configuration.md", "[中文](configuration_zh.md)"), ("docs/configuration_zh.md", "## 自己的设置"))
    english, chinese = ([(name, values(default)) for name, default in settings_table(*page)] for page in pages)
    assert chinese == english
    assert len(english) == len(dataclasses.fields(QLoRAArguments))


def test_the_ten_arguments_that_people_change_have_transformers_defaults_and_stand_in_every_file():
    pages = (
        ("docs/configuration.md", "## The ten that people change"),
        ("docs/configuration_zh.md", "## 最常改的十项"),
    )
    english, chinese = (dict(settings_table(*page)) for page in pages)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    shown = {key: str(getattr(defaults[key], "value", defaults[key])) for key in english}
    assert {key: value.strip("`") for key, value in english.items()} == shown | {"output_dir": "required"}
    assert {key: values(value) for key, value in chinese.items()} == {k: values(v) for k, v in english.items()}
    assert len(english) == 10
    for file in set(ROOT.glob("train_args/qlora/*.json")) - {ROOT / "train_args/qlora/chatglm3-tiny-sft-qlora.json"}:
        assert english.keys() <= json.loads(file.read_text()).keys()


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/data_format.md"])
def test_every_row_that_is_shown_is_a_good_one(page):
    rows = [row for block in blocks(page, "json") if "train_file" not in (row := json.loads(block))]
    assert rows
    for row in rows:
        assert not list(oddities(parse_row(row)))
        assert not unread_keys(row)


def test_the_yaml_that_is_shown_and_its_json_are_the_same_settings(tmp_path, monkeypatch):
    (there,) = blocks("README_zh.md", "yaml")
    (here,) = [block for block in blocks("README_zh.md", "json") if "train_file" in block]
    expected = yaml.safe_load(there) | {"train_file": "data/functions_openai.jsonl"}
    del expected["dataset"]
    assert json.loads(here) == expected
    (tmp_path / "orders.json").write_text(here)
    monkeypatch.chdir(ROOT)
    args, training_args = load_arguments(tmp_path / "orders.json")
    assert (args.lora_rank, args.max_seq_length, args.data_format) == (8, 2048, "chat_template")
    assert (args.lora_alpha, training_args.warmup_steps) == (16, 0.1)


def test_the_rows_of_each_format_say_the_same():
    rows = [json.loads(block) for block in blocks("docs/data_format.md", "json")]
    formats = ["chatglm3", "openai", "openai", "sharegpt", "glaive", "firefly", "alpaca", "alpaca"]
    assert [detect_format(row) for row in rows] == formats
    assert set(formats) == ROW_FORMATS.keys()
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    for conversation in map(parse_row, rows[:5]):
        assert conversation.tools == [{"name": "get_weather", "parameters": schema}]
        question, call, answer = conversation.turns
        assert (question.content, answer.content) == ("Is it warm in Beijing?", "Yes, it has 24 degrees.")
        assert (call.name, call.parameters, call.learned) == ("get_weather", {"city": "Beijing"}, True)
        assert as_text(call.observation) == '{"celsius": 24}'
    first, *others = [parse_row(row) for row in rows[5:]]
    assert [turn.role for turn in first.turns] == ["user", "assistant"] * 2
    assert others == [first, first]


def test_the_figures_of_the_readmes_are_those_of_the_code():
    files = [ROOT / "train_qlora.py", *ROOT.glob("script/*.py"), *ROOT.glob("component/**/*.py")]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    for page in ("README.md", "README_zh.md"):
        (shown,) = re.findall(r"(?:About|约) ([\d,]+) (?:lines of Python|行 Python)", (ROOT / page).read_text())
        assert int(shown.replace(",", "")) == pytest.approx(lines, rel=0.05)


@pytest.mark.slow
def test_the_demo_teaches_the_model():
    """`make demo-export`, which begins with `make demo`, from a clone's files, and what the READMEs and docs do with
    what it makes."""
    done = subprocess.run(["make", "demo-export"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        'tuned  {"name": "get_current_weather", "parameters": {"location": "北京", "unit": "celsius"}}' in done.stdout
    )
    assert re.search(r"^call exact +19 +0\.0% .* 100\.0% ", done.stdout, re.MULTILINE), "the score's table"
    (snippet,) = [block for block in blocks("README.md", "python") if "component.chatglm" in block]
    snippet = snippet.replace("THUDM/chatglm3-6b", "models/chatglm3-tiny").replace(
        "chatglm3-6b/final", "chatglm3-tiny/final"
    )
    snippet = snippet.replace("history=[])", "history=[], do_sample=False)")
    shown = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "你好！我是萤光，一只会聊天、会调用工具的小萤火虫。有什么可以帮你？"
    check_chat()
    check_server()
    check_exports(done.stdout)


def check_chat() -> None:
    """The READMEs' talk with the demo's model: what is written there is what comes of it."""
    (command,) = [c for c in commands() if "script/chat.py" in c and "tiny" in c]
    (talk,) = [block for block in blocks("README.md", "text") if block.startswith("> ")]
    given = [re.sub(r"^(result of \w+)?> ", "", line) for line in talk.splitlines() if re.match(r"(result.*)?> ", line)]
    words = [sys.executable, *shlex.split(command)[1:]]
    shown = subprocess.run(words, cwd=ROOT, input="\n".join(given), capture_output=True, text=True)
    assert shown.stdout.splitlines() == [line for line in talk.splitlines() if not re.match(r"(result.*)?> ", line)]


def check_exports(told: str) -> None:
    """What `make demo-export` says, and docs/deploy.md's code where nothing of this project can be imported."""
    assert told.endswith("The exports answer as the tuned model, token for token.\n")
    assert len(re.findall(r"^(?:transformers alone|llama\.cpp) +the same \d+ \+ \d+ tokens$", told, re.MULTILINE)) == 4
    code, _ = blocks("docs/deploy.md", "python")
    code = code.replace("models/chatglm3-6b-glm", str(ROOT / "output/exports/glm"))
    shown = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip()


def check_server() -> None:
    """The commands and the code that ask the demo's model over HTTP, at the port that they name."""
    (serve,) = [c for c in commands() if "script/serve.py" in c and "tiny" in c]
    (curl,) = [c for c in commands() if c.startswith("curl") and "tiny" in c]
    server = subprocess.Popen([sys.executable, *shlex.split(serve)[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "listening at http://127.0.0.1:8000/v1\n"
        shown = subprocess.run(["curl", "-sS", *shlex.split(curl)[1:]], capture_output=True, text=True)
        assert "珠穆朗玛" in json.loads(shown.stdout)["choices"][0]["message"]["content"]
        (code,) = blocks("docs/serve.md", "python")
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        call = "get_current_weather {'location': '北京', 'unit': 'celsius'}"
        assert shown.stdout.splitlines() == [call, "北京今天晴，气温24摄氏度，风力3级，适合出门走走。"], shown.stderr
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 130


LESSON = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "word"}]
SNIPPETS = {"README.md": "THUDM/chatglm3-6b", "README_zh.md": "models/chatglm3-6b"}


def chat(code: str, **names: Path) -> str:
    """What a chat prints whose code names a base and an adapter; greedy, in a process of its own."""
    for name, path in names.items():
        code = code.replace(name, str(path))
    code = code.replace("history=[])", "history=[], do_sample=False, max_length=64)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def taught(job) -> Path:
    """An adapter that answers 你好 with "word"."""
    return job("chat", [{"conversations": LESSON}] * 4, max_steps=40) / "final"


@pytest.mark.slow
@pytest.mark.parametrize("page", SNIPPETS)
def test_the_chat_snippet_loads_the_base_as_it_was_trained_and_answers(taught, checkpoint, page):
    (snippet,) = [block for block in blocks(page, "python") if "component.chatglm" in block]
    count = "\nprint(sum(type(weight).__name__ == 'Params4bit' for weight in model.parameters()))"
    names = {SNIPPETS[page]: checkpoint, "output/chatglm3-6b/final": taught}
    assert chat(snippet + count, **names).split() == ["word", "8"]


OFFICIAL = """import component.chatglm
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("models/chatglm3-6b")
model = AutoModel.from_pretrained("models/chatglm3-6b").half().cuda()
model = model.eval()
response, history = model.chat(tokenizer, "你好", history=[])
print(response)
"""


@pytest.mark.slow
def test_the_official_code_chats_with_a_merged_model(taught, tmp_path):
    """As ChatGLM3's page has it; without a card, `.cuda()` is left out."""
    merge = [sys.executable, "script/merge_lora.py", "--adapter", str(taught), "--output", str(tmp_path / "merged")]
    assert subprocess.run(merge, cwd=ROOT).returncode == 0
    code = OFFICIAL if torch.cuda.is_available() else OFFICIAL.replace(".cuda()", "")
    assert chat(code, **{"models/chatglm3-6b": tmp_path / "merged"}) == "word"
    for page in SNIPPETS:
        assert "`AutoModel.from_pretrained(base).half().cuda()`" in (ROOT / page).read_text()
