"""Tests that other libraries have in their source archives, run for our classes."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_tests_of(tmp_path) -> Callable[..., tuple[int, set[str]]]:
    """Runs a file of this folder that imports a library's own tests as the package `own`."""

    def run(
        library: str, files: list[str], stand_ins: dict[str, str], ours: str, which: str = ""
    ) -> tuple[int, set[str]]:
        """Fetch the tests of the installed version, and run them.

        Args:
            files: paths in the archive's tests/ that are needed.
            stand_ins: what they import and is not needed, as text by path.
            ours: the file that imports them; it runs in `tmp_path`.
            which: pytest's -k.

        Returns:
            How many passed, and the names of those that failed.
        """
        name = f"{library}-{version(library)}"
        sdist = ["--no-binary", library, "--no-deps", "--dest", tmp_path, name.replace("-", "==")]
        if subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *sdist]).returncode:
            pytest.skip(f"the source archive of {name} cannot be downloaded")
        with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
            texts = {f"own/{file}": archive.extractfile(f"{name}/tests/{file}").read().decode() for file in files}
        for file, text in (texts | stand_ins).items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
        # Without our settings, whose markers are strict.
        options = ["-c", os.devnull, "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-k", which]
        command = [sys.executable, "-m", "pytest", *options, Path(__file__).with_name(ours)]
        paths = filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        print(done.stdout[-100_000:], done.stderr)
        assert done.returncode in (0, 1), "the tests did not run"
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return int(re.search(r"(\d+) passed", done.stdout)[1]), set(failed)

    return run
