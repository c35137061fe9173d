"""The ways to the demo and to an environment: make, the notebook, the container."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASKED = "import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"


@pytest.fixture
def make(tmp_path):
    """What `make -n` answers where these Pythons can be found: names to minor versions, None for one that fails."""

    def run(*options: str, **pythons: int | None) -> subprocess.CompletedProcess:
        for tool in ("sh", "sed", "tr", "echo"):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        for name, minor in pythons.items():
            answer = "exit 127" if minor is None else f'exec {sys.executable} -c "{ASKED.format(minor=minor)}" "$2"'
            file = tmp_path / name.replace("_", ".")
            file.write_text(f"#!{shutil.which('sh')}\n{answer}\n")
            file.chmod(0o755)
        # `make test` hands its own level and flags on to what it starts, and a make below another says where it is.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHON" and "MAKE" not in key}
        return subprocess.run(
            [shutil.which("make"), "-n", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/ready", *options],
            cwd=ROOT,
            env=environment | {"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3_11": 11, "python3_13": 13, "python3": 11}, "python3.13"),
        ({"python3_13": None, "python3_11": 11}, "python3.11"),  # a shim of pyenv
        ({"python3": 12}, "python3"),
    ],
)
def test_make_takes_the_newest_python_that_starts(make, pythons, chosen):
    assert make(**pythons).stdout.startswith(f"{chosen} -m venv ")


@pytest.mark.parametrize("pythons", [{}, {"python3": 10}, {"python3": 14}])
def test_make_says_what_to_install_where_no_python_will_do(make, pythons):
    done = make(**pythons)
    assert done.returncode == 2
    assert "no Python from 3.11 to 3.13 starts here: install one" in done.stderr


def test_make_takes_the_python_that_it_is_given(make):
    assert make("PYTHON=/opt/py/bin/python", python3_13=13).stdout.startswith("/opt/py/bin/python -m venv ")


def test_an_environment_that_is_there_keeps_its_python(make, tmp_path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/pip").touch()
    assert make(python3_13=13).stdout.lstrip().startswith(f"{tmp_path}/venv/bin/pip install ")


def test_every_file_names_the_same_versions_of_python():
    (minors,) = re.findall(r"for name in (.*?) python3;", (ROOT / "Makefile").read_text())
    assert minors.split() == ["python3.13", "python3.12", "python3.11"]
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text()
    assert "# Python 3.11, 3.12 or 3.13." in (ROOT / "requirements.txt").read_text()
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()
    assert "Python 3.11 到 3.13" in (ROOT / "README_zh.md").read_text()


def test_the_notebook_takes_the_steps_of_make_demo():
    notebook = json.loads((ROOT / "docs/demo.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0] == "%cd .."
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    steps = [line.strip().replace("$(RUN)", "python") for line in recipe.splitlines()]
    asked = [cell.removeprefix("!") for cell in cells if cell.startswith("!")]
    assert [command for command in asked if "--dry_run" not in command] == steps
    assert f"{steps[1]} --dry_run" in asked


def test_the_container_is_built_from_requirements_and_starts_the_training_command():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in lines]
    assert [name for name, _ in instructions] == ["FROM", "RUN", "WORKDIR", "ARG", "COPY", "RUN", "COPY", "ENTRYPOINT"]
    texts = [text for _, text in instructions]
    assert texts[0] == "python:3.12-slim"
    assert texts[4] == "requirements.txt ."
    assert texts[5] == "pip install --no-cache-dir --requirement requirements.txt"
    assert json.loads(texts[7]) == ["python", "train_qlora.py"]
    (command,) = re.findall(r"^docker run .*$", (ROOT / "README_zh.md").read_text(), re.MULTILINE)
    words = shlex.split(command)
    mounts = [word for word in words if word.startswith("./")]
    assert mounts == [f"./{name}:{texts[2]}/{name}" for name in ("data", "models", "output")]
    assert words[words.index("--train_args_file") + 1] in map(str, (p.relative_to(ROOT) for p in ROOT.rglob("*.json")))
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv*", "models", "output"} <= set(ignored)
