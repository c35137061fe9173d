"""The benchmarks that run the real command under torchrun, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_leave_together(tmp_path):
    program = [sys.executable, ROOT / "benchmark/scaling.py", "--gpus", "1,2", "--shape", "tiny-chatglm"]
    run = subprocess.run(
        [*program, "--updates", "1", "--json", tmp_path / "scaling.json"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "scaling.json").read_text())
    one, alone, more, same = report["results"]
    assert (alone["tokens"], alone["losses"]) == (2 * one["tokens"], one["losses"])
    assert more["tokens"] > 1.5 * same["tokens"] == 1.5 * one["tokens"]
    assert same["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert len(set(same["adapters"])) == len(set(more["adapters"])) == 1
    assert "checkpoint-" in report["sigterm"]
    assert len(run.stdout.splitlines()) == 8


@pytest.mark.slow
def test_runs_with_and_without_checks_are_timed():
    program = [sys.executable, ROOT / "benchmark/overhead.py", "--shape", "tiny-chatglm", "--updates", "2"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "\nchecks cost " in run.stdout
