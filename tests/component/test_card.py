"""The model card of final adapters and exports, and the licence files that go along."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from component.card.card import LIBRARIES, is_unchanged, renew_card, write_card
from component.card.facts import carry, public_name
from component.card.licences import copy_licences
from component.export.tool_parser import write_tool_parser
from component.run.files import fingerprint
from component.run.manifest import CARD, MANIFEST, seal, verify
from component.score.measure import RECALL
from component.trust import read_model_json

FIXTURE = Path(__file__).parents[1] / "fixtures/ab287a9"
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "max_steps": -1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_seq_length": 1024,
    "seed": 42,
    "base_bits": 4,
    "compute_dtype": "bfloat16",
}
RUN = {
    "settings": SETTINGS,
    "world_size": 2,
    "data": "0" * 32,
    "format": {"name": "chatglm3", "tokenizer": "1" * 32},
    "base_model": "2" * 32,
}
TRAINING = {
    "data": [{"files": ["calls.jsonl"], "rows": 1000, "kept": 975, "tokens": 50000, "learned": 10000}],
    "evaluation": [],
    "step": 150,
    "loss": 0.25,
    "eval_loss": 0.5,
}
RECORD = {"name": "final", "step": 200, "run": RUN, "versions": {"torch": "2.13.0"}, "training": TRAINING}


@pytest.fixture
def make_adapter(tmp_path):
    """Makes the folder of an adapter whose base lies in a private place, with its card; keywords change its record."""

    def make(base: str | None = None, config: dict | None = None, **changes) -> Path:
        folder = tmp_path / "output/final"
        folder.mkdir(parents=True)
        save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
        settings = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["dense", "query_key_value"]}
        base = base or str(tmp_path / "private/chatglm3-6b")
        settings |= {"base_model_name_or_path": base} | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        record = RECORD | changes
        write_card(folder, "adapter", base, folder, record=record)
        seal(folder, record)
        return folder

    return make


def read(folder: Path) -> tuple[dict, str, str]:
    """A card's front matter, and its English and Chinese parts."""
    _, head, body = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
    english, chinese = body.split("\n# 中文\n")
    return yaml.safe_load(head), english, chinese


def export(folder: Path, kind: str, adapter: Path | None, base: str = "THUDM/chatglm3-6b", files=(), **made):
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    write_card(folder, kind, base, adapter, made)
    return read(folder)


def write_score(adapter: Path, exact: float, **changes) -> None:
    """What score.py writes beside an adapter."""
    estimates = {"base": 0.0, "tuned": exact}
    values = {model: {"value": value, "low": value, "high": 1.0} for model, value in estimates.items()}
    score = {
        "title": f"eval_file {adapter.parents[1]}/private/rows.jsonl",
        "about": {"adapter": {"path": str(adapter), "digest": fingerprint([adapter / "adapter_model.safetensors"])}},
        "models": ["base", "tuned"],
        "rows": 60,
        "notes": [],
        "figures": [{"name": "call exact", "n": 19, "unit": "%", "values": values}],
        "unrelated_text": [],
    }
    (adapter.parent / "score.json").write_text(json.dumps(score | changes))


def test_a_card_tells_base_data_settings_and_figures_in_two_languages(make_adapter):
    head, english, chinese = read(make_adapter())
    assert head == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "luciole", "qlora"],
    }
    assert "# LoRA adapter of `chatglm3-6b`\n" in english
    assert "| `calls.jsonl` | 1,000 | 975 | 50,000 | 10,000 (20.0%) | 2.5% | – |" in english
    assert "| `calls.jsonl` | 1,000 | 975 | 50,000 | 10,000（20.0%） | 2.5% | – |" in chinese
    for line in (
        "| LoRA | rank 64, alpha 16, dropout 0.05; `dense`, `query_key_value` |",
        "| base | `chatglm3-6b`; 4 bits (NF4, double quantisation), bfloat16 arithmetic |",
        "| updates | 200 (3 epochs) of 16 rows; at most 1,024 tokens a row |",
        "| learning rate | 0.0002, `cosine`, warm-up 10 |",
        "| seed, processes | 42, 2 |",
        "| versions | `torch 2.13.0` |",
        "| final training loss | 0.2500 per learned token |",
        "| evaluation loss | 0.5000 per learned token |",
        "| kept | the best checkpoint, of update 150 |",
    ):
        assert line in english
    assert "| 更新 | 200 次（3 个 epoch），每次 16 行；一行最长 1,024 个 token |" in chinese
    assert "28.3% of the calls were exact as trained, and 6.7% with the full-precision base" in english
    assert "按训练时的样子有 28.3% 的调用完全正确" in chinese


def test_a_card_holds_no_path_of_the_machine(make_adapter, tmp_path):
    adapter = make_adapter()
    write_score(adapter, exact=0.5)
    renew_card(adapter)
    export(tmp_path / "glm", "glm", adapter, str(tmp_path / "private/chatglm3-6b"), into="full", dtype="bfloat16")
    for folder in (adapter, tmp_path / "glm"):
        text = (folder / CARD).read_text()
        assert "private" not in text
        assert str(tmp_path) not in text
        assert "rows.jsonl`" not in text


def test_a_card_holds_no_secret(make_adapter, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "calls.jsonl")
    assert "`<SOME_TOKEN>`" in read(make_adapter())[1]


def test_a_mixture_has_its_weights_and_a_stream_its_names_alone(make_adapter):
    parts = [TRAINING["data"][0], {"files": [f"part-{i}.jsonl" for i in range(1000)]}]
    run = RUN | {"data": [["3" * 32, 3.0], ["4" * 32, 1]]}
    _, english, _ = read(make_adapter(run=run, training=TRAINING | {"data": parts, "evaluation": parts[:1]}))
    assert "| 2.5% | 3 |\n" in english
    assert "| `part-0.jsonl`, `part-1.jsonl`, `part-2.jsonl`, … (1,000) | – | – | – | – (–) | – | 1 |" in english
    assert "| `calls.jsonl` (evaluation) | 1,000 | 975 | 50,000 | 10,000 (20.0%) | 2.5% | – |" in english


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("THUDM/chatglm3-6b", "THUDM/chatglm3-6b"),
        ("gpt2", "gpt2"),
        ("/cache/hub/models--THUDM--chatglm3-6b/snapshots/abc", "THUDM/chatglm3-6b"),
        ("/home/somebody/chatglm3-6b", None),
        ("models/tuned/chatglm3-6b", None),
        ("a\nlicense: mit/b", None),
        ("../x", None),
        ("", None),
    ],
)
def test_a_base_has_the_name_that_it_has_on_the_hub(base, name):
    assert public_name(base) == name


def test_a_folder_that_is_called_like_a_hubs_model_is_none(tmp_path, monkeypatch):
    (tmp_path / "THUDM/chatglm3-6b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("THUDM/chatglm3-6b") is None


def test_a_base_of_the_hub_stands_in_the_head_and_in_the_code(make_adapter):
    head, english, _ = read(make_adapter("THUDM/chatglm3-6b", run=RUN | {"base_model": "THUDM/chatglm3-6b 103caa4"}))
    assert head["base_model"] == "THUDM/chatglm3-6b"
    assert 'base, adapter = "THUDM/chatglm3-6b", "path/to/this/folder"' in english
    assert "--base THUDM/chatglm3-6b --output merged" in english
    assert "| base | `THUDM/chatglm3-6b` at `103caa4`; 4 bits" in english


HOSTILE = "x`|\n---\nlicense: mit\n```\n# <script>alert(1)</script>\\ [a](http://b) \"'$(id) \u202e\udcff"


def test_hostile_names_are_names_and_nothing_else(make_adapter, tmp_path):
    files = {"files": [HOSTILE], "rows": 1, "kept": 1, "tokens": 1, "learned": 1}
    adapter = make_adapter(f"/models/{HOSTILE}", {"target_modules": [HOSTILE]}, training={"data": [files]})
    write_score(adapter, 0.5, models=["base", "tuned", HOSTILE])
    assert renew_card(adapter) == [adapter / CARD]
    head, *parts = read(adapter)
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}
    for part in parts:
        outside = re.sub(r"```(python|bash)\n.*?\n```\n", "", part, flags=re.DOTALL)
        assert part.count("```") == 4, "two blocks of code"
        assert "<script" not in re.sub(r"`[^`\n]*`", "", outside)
        assert not re.search("[\u202e\udcff]", part)
        tables = [line for line in outside.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in tables if "calls" not in line} == {3, 6, 8}
    for code in re.findall(r"```python\n(.*?)```", parts[0], re.DOTALL):
        compile(code, "card", "exec")
    (quoted,) = set(re.findall(r"--base (.*?) --output", parts[0]))
    assert quoted.startswith("'") and quoted.count("'") % 2 == 1, "a shell sees one word, with '\"'\"' for its quote"


@pytest.mark.parametrize("junk", [None, 1, "x", [], [[]], {"settings": 3}, {"settings": {"seed": {}, "base_bits": []}}])
def test_a_record_that_makes_no_sense_counts_as_none(make_adapter, junk):
    _, english, _ = read(make_adapter(run=junk, training=junk, versions=junk, step=junk))
    assert "The data are not recorded." in english
    assert "Nothing records how the base was loaded in training; what follows holds for 4 bits. **On a full" in english


def test_a_renewed_card_shows_the_score_and_stays_whole(make_adapter):
    adapter = make_adapter()
    before = (adapter / CARD).read_text()
    assert "Score" not in before
    assert renew_card(adapter) == []
    write_score(adapter, exact=0.5)
    assert renew_card(adapter) == [adapter / CARD]
    _, english, chinese = read(adapter)
    assert "| | n | `base` | `tuned` |" in english
    assert "| `call exact` | 19 | 0.0% [0.0, 100.0] | 50.0% [50.0, 100.0] |" in english
    assert "| 调用完全一致 | 19 | 0.0% [0.0, 100.0] | 50.0% [50.0, 100.0] |" in chinese
    assert "training rows" not in english
    write_score(adapter, exact=0.75, notes=[RECALL])
    assert renew_card(adapter) == [adapter / CARD], "another score takes the place of the first"
    _, english, chinese = read(adapter)
    assert "75.0%" in english and "50.0%" not in english
    assert "**These are training rows**" in english and "**这些就是训练数据**" in chinese
    assert verify(adapter, "final"), "the card is not sealed"
    (adapter.parent / "score.json").unlink()
    renew_card(adapter)
    assert (adapter / CARD).read_text() == before


@pytest.mark.parametrize(
    "edit", [lambda text: text + "Mine.", lambda text: text.replace("Made by", "made by"), lambda text: "", str.upper]
)
def test_a_card_that_somebody_has_edited_stays(make_adapter, edit):
    adapter = make_adapter()
    own = edit((adapter / CARD).read_text())
    (adapter / CARD).write_text(own)
    write_score(adapter, exact=0.5)
    assert renew_card(adapter) == []
    assert (adapter / CARD).read_text() == own
    assert verify(adapter, "final")


@pytest.mark.parametrize(
    "change",
    [
        {"about": {"adapter": {"digest": "0" * 32}}},
        {"about": {"adapter": None}},
        {"models": None},
        {"figures": 3},
        {"figures": [3, {"name": 3}]},
    ],
)
def test_a_score_of_other_weights_or_of_nothing_is_not_shown(make_adapter, change):
    adapter = make_adapter()
    write_score(adapter, 0.5, **change)
    assert renew_card(adapter) == []
    (adapter.parent / "score.json").write_text("{")
    assert renew_card(adapter) == []


def test_a_card_is_left_out_of_the_seal_and_an_earlier_manifest_still_holds_it(make_adapter, tmp_path):
    adapter = make_adapter()
    assert CARD not in json.loads((adapter / MANIFEST).read_text())["files"]
    (adapter / CARD).unlink()
    assert verify(adapter, "final")
    assert CARD in verify(FIXTURE / "final", "final")["files"]
    inner = tmp_path / "inner"
    (inner / "docs").mkdir(parents=True)
    (inner / "docs" / CARD).write_text("sealed")
    seal(inner, {})
    assert verify(inner)["files"].keys() == {f"docs/{CARD}"}


def test_each_export_says_what_runs_it(make_adapter, tmp_path):
    adapter = make_adapter()
    made = {"into": "trained", "dtype": "bfloat16"}
    head, english, _ = export(tmp_path / "glm", "glm", adapter, **made)
    assert head["library_name"] == "transformers"
    assert "merged into it, as transformers' own `GlmForCausalLM`, in `bfloat16`." in english
    assert "component" not in english and "apply_chat_template" in english
    assert "Do not round it to 4 bits again" in english
    head, english, _ = export(tmp_path / "gguf", "gguf", adapter, files=["a b.gguf", "Modelfile"], into="full")
    assert head["library_name"] == "gguf"
    assert "llama-server --model 'a b.gguf' --skip-chat-parsing\n" in english and "ollama create" in english
    assert "merged into the full-precision ones" in english and "6.7%" in english
    head, english, _ = export(tmp_path / "merged", "merged", adapter, **made)
    assert "import component.chatglm" in english and "model.chat(" in english
    for kind in LIBRARIES.keys() - {"adapter", "glm-adapter"}:
        for code in re.findall(r"```python\n(.*?)```", export(tmp_path / f"{kind} 2", kind, adapter)[1], re.DOTALL):
            compile(code, "card", "exec")
    _, english, chinese = export(tmp_path / "base", "gguf", None)
    assert "adapter" not in english and "28.3%" not in english + chinese


@pytest.mark.parametrize(("kind", "end"), [("glm", "<|observation|>"), ("gguf", "")])
def test_the_code_of_a_card_reads_a_call(make_adapter, tmp_path, monkeypatch, capsys, kind, end):
    write_tool_parser(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    said = f"\n 我查一下。<|assistant|>weather\n ```python\ntool_call(city='北京')\n```{end}"
    for part in export(tmp_path / kind, kind, make_adapter(), files=["chatglm3_tool_parser.py"])[1:]:
        (code,) = re.findall(r"```python\n(from chatglm3_tool_parser.*?)```", part, re.DOTALL)
        exec(code, {"text": said, "content": said})
        assert capsys.readouterr().out == "我查一下。 (Call(name='weather', arguments={'city': '北京'}),)\n"
    sys.modules.pop("chatglm3_tool_parser")


def test_a_card_shows_how_servers_read_calls(make_adapter, tmp_path):
    adapter, files = make_adapter(), ["chatglm3_tool_parser.py", "x.gguf"]
    _, english, _ = export(tmp_path / "glm", "glm", adapter, files=files)
    assert "skip_special_tokens" not in english, "what parts two messages is shown"
    plugin = "--tool-parser-plugin path/to/this/folder/chatglm3_tool_parser.py --tool-call-parser chatglm3\n"
    assert plugin in english
    _, english, _ = export(tmp_path / "gguf", "gguf", adapter, files=files)
    stops = '--reverse-prompt "<eos>" --reverse-prompt "<|user|>" --reverse-prompt "<|observation|>"'
    assert f"llama-server --model x.gguf --skip-chat-parsing --special {stops}\n" in english
    run = RUN | {"format": {"name": "chatglm2"}}
    (adapter / MANIFEST).write_text(json.dumps(RECORD | {"run": run}))
    for kind in ("glm", "gguf"):
        _, english, _ = export(tmp_path / f"{kind} 2", kind, adapter, files=["x.gguf"])
        assert "read_answer" not in english and "vllm" not in english and "tools=" not in english


def test_an_adapter_under_glms_names_says_what_it_is_loaded_beside(make_adapter, tmp_path):
    adapter = make_adapter(run=RUN | {"settings": SETTINGS | {"compute_dtype": "float16"}})
    folder = tmp_path / "lora"
    folder.mkdir()
    layers = [f"model.layers.{i}.mlp.down_proj" for i in range(10)]
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16, "target_modules": layers}))
    (folder / "lora.gguf").touch()
    write_card(folder, "glm-adapter", "THUDM/chatglm3-6b", adapter)
    head, english, chinese = read(folder)
    assert head["library_name"] == "peft"
    assert "| LoRA | rank 8, alpha 16, dropout –; `model.layers.0.mlp.down_proj`, " in english
    assert "`model.layers.8.mlp.down_proj`, … (10) |" in english, "those of this folder"
    for part in (english, chinese):
        code = "".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))
        compile(code, "card", "exec")
        assert "AutoTokenizer.from_pretrained(base)" in code and 'dtype="float16"' in code and "print(text)" in code
        assert "--to glm --base THUDM/chatglm3-6b --output base-glm\n" in part and 'base, adapter = "base-glm"' in code
        assert "--to gguf --base THUDM/chatglm3-6b --output base-gguf\n" in part
        assert "llama-server --model base-gguf/base-f16.gguf --lora lora.gguf" in part
    assert "On a full-precision base it is not the model that was trained" in english


@pytest.mark.parametrize(
    ("into", "words"),
    [("trained", "Do not round it to 4 bits again"), ("full", "**It is not the model that was trained**")],
)
def test_the_merge_decides_the_words_where_no_bits_are_recorded(make_adapter, tmp_path, into, words):
    adapter = make_adapter()
    (adapter / MANIFEST).unlink()
    _, english, _ = export(tmp_path / "merged", "merged", adapter, into=into)
    assert f"Nothing records how the base was loaded in training; what follows holds for 4 bits. {words}" in english
    assert ("6.7%" in english) == (into == "full")


def test_an_adapter_under_other_names_keeps_its_data_and_figures(make_adapter, tmp_path):
    moved = make_adapter()
    seal(moved, carry(read_model_json(moved / MANIFEST)) | {"run": RUN})
    assert json.loads((moved / MANIFEST).read_text()).keys() == {*RECORD, "files", "checksum"} - {"name"}
    _, english, _ = export(tmp_path / "merged", "merged", moved, into="trained")
    for line in ("| `calls.jsonl` | 1,000 |", "| updates | 200 (3 epochs)", "| versions | `torch 2.13.0` |"):
        assert line in english
    assert carry({}) == {}


def test_a_base_of_16_bits_needs_no_warning(make_adapter):
    run = RUN | {"settings": SETTINGS | {"base_bits": 16}, "format": {"name": "chat_template"}}
    head, english, _ = read(make_adapter(run=run))
    assert head["tags"] == ["lora", "luciole"]
    assert "28.3%" not in english
    assert "BitsAndBytes" not in english
    assert "component" not in english and "tokenizer.apply_chat_template" in english


def test_an_earlier_adapter_has_a_card_of_what_it_records(tmp_path):
    _, english, _ = export(tmp_path / "glm", "glm", FIXTURE / "final", str(FIXTURE / "chatglm3-nano"), into="trained")
    assert "The data are not recorded." in english
    assert "| base | `chatglm3-nano`; 4 bits (NF4, double quantisation), float32 arithmetic |" in english
    assert "| updates | 8 of 4 rows; at most 256 tokens a row |" in english
    assert not is_unchanged((FIXTURE / "final" / CARD).read_bytes()), "its own card is of peft, and sealed"


def test_an_adapter_of_another_tool_has_a_card_of_its_settings(make_adapter, tmp_path):
    adapter = make_adapter()
    (adapter / MANIFEST).unlink()
    _, english, _ = export(tmp_path / "merged", "merged", adapter, "Qwen/Qwen2.5-7B-Instruct", into="full")
    assert "| LoRA | rank 64, alpha 16" in english
    assert "| base | `Qwen/Qwen2.5-7B-Instruct` |" in english
    assert "component.chatglm" not in english and "updates" not in english


NAMES = [
    "LICENSE",
    "license.md",
    "Licence-2",
    "LICENSE-APACHE-2.0.txt",
    "MODEL_LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "模型使用协议.pdf",
]
OTHERS = [
    "config.json",
    "license.py",
    "license_key.txt",
    "licensed_data.jsonl",
    "license-plate-secrets.json",
    "NOTICE.html",
    "保密协议.txt",
    "许可密钥.txt",
    "README.md",
]


def test_licence_files_go_along_and_others_do_not(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "export"
    base.mkdir(), folder.mkdir()
    for name in [*NAMES, *OTHERS]:
        (base / name).write_text(f"of the base: {name}")
    (folder / "LICENSE").write_text("its own")
    copy_licences(str(base), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert (folder / "LICENSE").read_text() == "its own"
    assert (folder / "NOTICE.txt").read_text() == "of the base: NOTICE.txt"


def test_a_card_names_the_licences_that_stay_with_the_base(tmp_path):
    base = tmp_path / "base"
    (base / "LICENSES").mkdir(parents=True)
    (base / "LICENSE-HUGE").write_bytes(bytes(2**20 + 1))
    (base / "NOTICES").mkdir()
    (tmp_path / "secret").write_text("key")
    (base / "LICENSE-LINK").symlink_to(tmp_path / "secret")
    (base / "LICENSE-LOST").symlink_to(tmp_path / "nowhere")
    left = "`LICENSE-HUGE`, `LICENSE-LINK`, `LICENSE-LOST`, … (4)"
    _, english, chinese = export(tmp_path / "one", "gguf", None, str(base))
    assert f"The base's licence also binds this copy: see the base ({left}).\n" in english
    assert f"原模型的许可证对这份副本同样有效：见原模型（{left}）。\n" in chinese
    (base / "LICENSE").touch()
    _, english, chinese = export(tmp_path / "two", "gguf", None, str(base))
    assert f"binds this copy: `LICENSE`; further with the base: {left}.\n" in english
    assert f"同样有效：`LICENSE`；另在原模型处：{left}。\n" in chinese
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["LICENSE", "README.md"]


def test_licence_files_of_a_hubs_cache_go_along(tmp_path):
    model, folder = tmp_path / "models--THUDM--chatglm3-6b", tmp_path / "export"
    snapshot = model / "snapshots/103caa4"
    snapshot.mkdir(parents=True), (model / "blobs").mkdir(), folder.mkdir()
    for name in ("config.json", "MODEL_LICENSE"):
        (model / "blobs" / name.lower()).write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name.lower()}")
    copy_licences(str(snapshot), folder)
    assert [(path.name, path.is_symlink(), path.read_text()) for path in folder.iterdir()] == [
        ("MODEL_LICENSE", False, "MODEL_LICENSE")
    ]


def test_a_base_that_is_gone_takes_no_licence_and_no_result(tmp_path):
    copy_licences(str(tmp_path / "gone"), tmp_path)
    assert not list(tmp_path.iterdir())
