"""Programs start in any folder, where they find `component` and the sample data, and adapters load from any folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

from component.inference.session import Session
from component.run.errors import ArgumentError
from component.run.manifest import seal
from component.trust import lasting_name
from script import score

from .runs import ROWS, write_rows
from .test_layering import PROGRAMS, ROOT

STARTED = [program for program in PROGRAMS if "__main__" in program.read_text(encoding="utf-8")]
# They import before --help.
SLOW = {"chat_demo", "make_tiny_model", "generate", "plain_peft", "preprocessing", "quality", "stock"}
REFUSALS = {
    ("script/chat_demo.py",): "no folder output/chatglm3-tiny/final in {here}",
    ("script/convert_data_format.py", "--input", "a.jsonl", "--output", "b.jsonl"): "a.jsonl: no such file in {here}",
}
SLOW_REFUSALS = {
    ("script/make_tiny_model.py", "--data", "a.jsonl"): "a.jsonl: no such file in {here}",
    ("train_qlora.py", "--train_args_file", str(ROOT / "train_args/qlora/chatglm3-tiny-sft-qlora.json")): (
        "train_file: no file 'data/dummy_data_chatglm3.jsonl' in {here}"
    ),
    ("script/inspect_data.py", "--data", "a.jsonl", "--model", "models/a"): "train_file: no file 'a.jsonl' in {here}",
    ("script/merge_lora.py", "--adapter", "models/a", "--output", "b"): "no folder models/a in {here}",
    (
        "script/score.py",
        "--adapter",
        "models/a",
        "--data",
        str(ROOT / "data/keep.jsonl"),
    ): "no folder models/a in {here}",
    ("script/verify_real.py", "models/a"): "no folder models/a in {here}",
}


def start(folder, program: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / program, *options], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(str(program.relative_to(ROOT)), marks=[pytest.mark.slow] * (program.stem in SLOW))
        for program in STARTED
    ],
)
def test_a_program_explains_itself_in_any_folder(program, tmp_path):
    run = start(tmp_path, program, "--help")
    assert program.rpartition("/")[2] in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "line"),
    [*REFUSALS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_REFUSALS.items())],
)
def test_a_refusal_in_any_folder_names_what_is_missing_there(command, line, tmp_path):
    run = start(tmp_path, *command)
    assert run.returncode == 2
    assert line.format(here=tmp_path) in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that a test may start a program in, or go to."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def relative(job, checkpoint, tmp_path, monkeypatch) -> Path:
    """The output folder of a run whose settings name everything relative to tmp_path / "work", the base by a link."""
    work = tmp_path / "work"
    (work / "models").mkdir(parents=True)
    shutil.copytree(checkpoint, work / "models/base")
    (work / "models/chatglm3").symlink_to("base")
    monkeypatch.chdir(work)
    paths = {"model_name_or_path": "models/chatglm3", "output_dir": "output/x"}
    job(**paths, max_steps=2, save_strategy="steps", save_steps=1)
    return work / "output/x"


def named_base(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_what_a_run_saves_loads_from_another_folder(relative, elsewhere, monkeypatch):
    base = str(relative.parents[1] / "models/chatglm3")
    assert [named_base(relative / name) for name in ("final", "checkpoint-1", "checkpoint-2")] == [base] * 3
    assert str(relative.parents[1]) not in (relative / "final/README.md").read_text()
    monkeypatch.chdir(elsewhere)
    assert AutoPeftModelForCausalLM.from_pretrained(relative / "final").active_peft_config.r == 4
    assert Session.prepare(adapter="../work/output/x/final").base == base
    write_rows(elsewhere / "rows.jsonl", ROWS[:1])
    options = ["--adapter", "../work/output/x/final", "--data", "rows.jsonl", "--json", "score.json"]
    monkeypatch.setattr(sys, "argv", ["score.py", *options])
    score.main()
    assert (elsewhere / "score.json").exists()


def test_an_earlier_adapter_finds_its_base_above_itself_by_what_its_run_records(relative, elsewhere, monkeypatch):
    final, work = relative / "final", relative.parents[1]
    config = json.loads((final / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/chatglm3"
    (final / "adapter_config.json").write_text(json.dumps(config))
    manifest = json.loads((final / "manifest.json").read_text())
    (final / "manifest.json").unlink()
    seal(final, {key: value for key, value in manifest.items() if key not in ("files", "checksum")})
    another = elsewhere / "models/chatglm3"
    shutil.copytree(work / "models/base", another)
    (another / "config.json").write_text((another / "config.json").read_text() + " ")
    monkeypatch.chdir(elsewhere)
    assert Session.prepare(adapter=final).base == str(work / "models/chatglm3")
    monkeypatch.chdir(work)
    assert Session.prepare(adapter="output/x/final").base == "models/chatglm3"
    shutil.copy(another / "config.json", work / "models/base/config.json")
    with pytest.raises(ArgumentError, match="trained on a base with other weights"):
        Session.prepare(adapter=final)
    monkeypatch.chdir("/")
    with pytest.raises(ArgumentError, match="'models/chatglm3', which is no folder here; give the base with --base"):
        Session.prepare(adapter=final)


def test_an_adapter_finds_its_base_in_a_project_that_was_moved(relative, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    monkeypatch.chdir(tmp_path)
    relative.parents[1].rename(moved)
    (moved / "output/models").mkdir()
    shutil.copytree(moved / "models/base", moved / "output/models/chatglm3")
    config = moved / "output/models/chatglm3/config.json"
    config.write_text(config.read_text() + " ")
    assert Session.prepare(adapter=moved / "output/x/final").base == str(moved / "models/chatglm3")
    (moved / "models/chatglm3").rename(moved / "chatglm3")
    (moved / "chatglm3").unlink()
    (moved / "models/base").rename(moved / "chatglm3")
    assert Session.prepare(adapter="moved/output/x/final").base == str(moved / "chatglm3")
    shutil.copy(config, moved / "chatglm3/config.json")
    with pytest.raises(ArgumentError, match="which is no folder here; give the base with --base"):
        Session.prepare(adapter="moved/output/x/final")


def test_a_folder_gets_a_name_that_holds_anywhere_and_a_hubs_model_keeps_its_own(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path)
    names = {
        "THUDM/chatglm3-6b": "THUDM/chatglm3-6b",
        "": "",
        "c": f"{tmp_path}/c",
        "./c/": f"{tmp_path}/c",
        "link": f"{tmp_path}/link",
        "link/../b": f"{tmp_path}/a/b",
        str(tmp_path / "link"): f"{tmp_path}/link",
    }
    assert {name: lasting_name(name) for name in names} == names
