"""A short selection of the reliability scorecard, and the scorecard itself: what is broken, it reports."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import scorecard
from benchmark.cases import CASES, FORWARD, ROTATING, SAVING, STAGES, UPDATE, Case, Check, violations_of_order

ROOT = Path(__file__).parents[2]
# What the others try is in tests/test_recovery.py and tests/component/serve, too.
SHORT, OTHERS = [13], [1, 2, 30, 10, 11, 16, 17, 36, 41, 42, 43, 44]
VERIFIES_ALL = """if True:
    import json
    import component.run.resume as resume
    resume.verify = lambda folder, deep=True: json.loads((folder / "manifest.json").read_bytes())
    from benchmark import scorecard
    scorecard.main()
"""


def run(*arguments: str, program: tuple[str, ...] = ("benchmark/scorecard.py",)) -> subprocess.CompletedProcess:
    command = [sys.executable, *program, "--jobs", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_faults_are_injected_into_functions_that_are_there_and_public():
    points = [*UPDATE.values(), *FORWARD.values(), *(at for at, _ in SAVING.values())]
    points += [point["at"] for point in (*ROTATING.values(), *STAGES.values())]
    assert [point for point in points if "._" in point or not callable(pkgutil.resolve_name(point))] == []


@pytest.mark.parametrize("cases", [SHORT, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_a_few_tries_of_each_case_are_as_expected(tmp_path, cases):
    report = tmp_path / "report.json"
    done = run("--cases", ",".join(map(str, cases)), "--share", "0.08", "--json", str(report))
    assert report.exists(), done.stderr
    tries = json.loads(report.read_text())["tries"]
    assert {check["case"] for check in tries} == set(cases)
    for check in tries:
        assert check["failed"] == [], f"case {check['case']}, {check['name']}\n{check['log']}"
    assert done.returncode == 0


@pytest.mark.slow
def test_a_product_that_takes_damaged_checkpoints_fails():
    done = run("--cases", "2", "--share", "0.1", program=("-c", VERIFIES_ALL))
    assert done.returncode == 1
    assert "FAIL (adapter_model.safetensors halved: no back to checkpoint-3, checkpoint-6 moved aside" in done.stdout


def test_a_delete_before_the_folder_is_synced_and_a_file_that_is_not_are_violations(tmp_path):
    temporary, done, old = tmp_path / ".tmp-checkpoint-2", tmp_path / "checkpoint-2", tmp_path / "checkpoint-1"
    lines = [
        f'7 openat(AT_FDCWD, "{temporary}/optimizer.pt", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 5<x>',
        f"7 fsync(5<{temporary}/optimizer.pt>) = 0",
        f"8 fsync(5<{temporary}>) = 0",
        f'7 rename("{temporary}", "{done}") = 0',
        f"7 fsync(5<{tmp_path}>) = 0",
        f'7 unlinkat(5<{old}>, "optimizer.pt", 0) = 0',
    ]

    def violations(*missing: int) -> list[str]:
        trace = tmp_path / "trace"
        trace.write_text("\n".join(line for number, line in enumerate(lines) if number not in missing))
        return violations_of_order(trace, tmp_path)[1]

    assert violations() == []
    assert violations(1) == [f"{done}: {temporary}/optimizer.pt is not synced"]
    assert violations(2) == [f"{done}: {temporary} is not synced"]
    assert violations(4) == [f"{old}/optimizer.pt is deleted before {tmp_path} is synced"]


@pytest.mark.slow
def test_a_case_whose_test_is_gone_fails(tmp_path):
    (tmp_path / "tests.xml").touch()
    case = Case(99, "a", "b", tests=("tests/test_layering.py::test_of_old", "tests/of_old.py::test"))
    checks = scorecard.run_tests([case], tmp_path)[99, scorecard.PRODUCT]
    assert [(check.name, check.failed) for check in checks] == [(case.tests[0], ["such a test"])]


def test_a_figure_sums_up_the_tries_of_a_case():
    same = {"loss diff": 0.0, "LR diff": 0.0, "orphans": 0}
    checks = [Check("a", [], {"lost steps": 0, "kept": "3"} | same), Check("b", ["exit code 0"], {"lost steps": 2})]
    assert scorecard.figure(checks) == "1/2; lost steps: 0 to 2; kept: 3; loss, LR diff, orphans: 0"
    assert scorecard.result(checks) == "FAIL (b: no exit code 0)"
    assert scorecard.result([]) == scorecard.result([Check("c", [], {"skipped": 1})]) == "not run"


def test_the_page_keeps_what_is_around_its_tables_and_a_round_of_some_cases_the_other_rows(
    monkeypatch, tmp_path, capsys
):
    page = tmp_path / "page.md"
    ours, other = scorecard.BEGIN.format("cpu"), scorecard.BEGIN.format("cuda")
    after = f"\nafter\n{other}\nof a GPU\n{scorecard.END}\n"
    earlier = ["15", "twice", "alike", "0/1", "FAIL", ""], ["2", "a \\| b", "", "30/30", "pass", "|"]
    tables = "\n\n### A\n\n".join(["a round of all", *(scorecard.markdown([cells]) for cells in earlier)])
    page.write_text(f"before\n{ours}\n\n{tables}\n\n{scorecard.END}{after}")
    passed = {(15, scorecard.PRODUCT): [Check("a second run", [], {"adapter diff": 0.0})]}
    monkeypatch.setattr(scorecard, "try_all", lambda *_: passed)
    monkeypatch.setattr(sys, "argv", ["scorecard.py", "--cases", "15,45", "--output", str(page)])
    with pytest.raises(SystemExit) as stop:
        scorecard.main()
    assert stop.value.code == 0
    text = page.read_text()
    assert text.startswith(f"before\n{ours}\n\na round of all\n\n") and text.endswith(scorecard.END + after)
    assert "| 15 | two fresh runs with one seed | identical | 1/1; adapter diff: 0 | pass | earlier: 0.0 |" in text
    assert "1 pass, 1 not run" in text and "### G. Server and security" in text
    assert scorecard.unmarkdown(text).keys() == {2, 15, 45} and scorecard.markdown([earlier[1]]) in text
    once = text
    with pytest.raises(SystemExit):
        scorecard.main()
    assert page.read_text() == once
    monkeypatch.setattr(sys, "argv", ["scorecard.py", "--output", str(page)])
    monkeypatch.setattr(scorecard, "choose", lambda _: [CASES[15]])
    with pytest.raises(SystemExit):
        scorecard.main()
    assert "a round of all" not in page.read_text() and scorecard.unmarkdown(page.read_text()).keys() == {15}


def test_an_unknown_case_is_named():
    with pytest.raises(SystemExit, match="case '99' is unknown; there are 1, 2, 3"):
        scorecard.choose("1,99")
