"""Programs start in any folder: they find `component` and what lies beside it; paths of the user's are relative to
where he stands."""

import subprocess
import sys

import pytest

from .test_layering import PROGRAMS, ROOT

STARTED = [program for program in PROGRAMS if "__main__" in program.read_text(encoding="utf-8")]
# They import before --help.
SLOW = {"chat_demo", "make_tiny_model", "generate", "plain_peft", "preprocessing", "quality", "stock"}
REFUSALS = {
    ("script/chat_demo.py",): "no folder output/chatglm3-tiny/final in {here}",
    ("script/make_tiny_model.py", "--data", "a.jsonl"): "a.jsonl: no such file in {here}",
    ("script/convert_data_format.py", "--input", "a.jsonl", "--output", "b.jsonl"): "a.jsonl: no such file in {here}",
    ("train_qlora.py", "--train_args_file", str(ROOT / "train_args/qlora/chatglm3-tiny-sft-qlora.json")): (
        "train_file: no file 'data/dummy_data_chatglm3.jsonl' in {here}"
    ),
}
SLOW_REFUSALS = {
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
