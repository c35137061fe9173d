"""transformers' own tests of models (the sdist's tests/test_modeling_common.py), run for ChatGLM's classes."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[3]
# The sdist has test_modeling_common.py alone; what it imports beside is made empty.
EMPTY = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


@pytest.fixture
def own(tmp_path) -> Path:
    """The folder of a package `own` with transformers' model tests, of the version that is installed."""
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized; make test-slow installs it")
    name = f"transformers-{transformers.__version__}"
    sdist = ["--no-binary", "transformers", "--no-deps", "--dest", tmp_path, name.replace("-", "==")]
    if subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *sdist]).returncode:
        pytest.skip(f"the source archive of {name} cannot be downloaded")
    package = tmp_path / "own"
    for file, mixin in EMPTY.items():
        (package / file).parent.mkdir(parents=True)
        (package / file).write_text(f"class {mixin}: pass\n")
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        source = archive.extractfile(f"{name}/tests/test_modeling_common.py").read()
    (package / "test_modeling_common.py").write_bytes(source)
    return tmp_path


@pytest.mark.slow
def test_chatglm_passes_transformers_own_model_tests(own):
    file = Path(__file__).with_name("transformers_own.py")
    # Without our settings, whose markers are strict.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-q", "-p", "no:cacheprovider", file]
    paths = filter(None, (str(own), str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 80
