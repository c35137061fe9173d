"""The reliability scorecard: faults injected into the real command on a tiny model, and what became of each run.

python benchmark/scorecard.py [--cases 1,2,10] [--seeds 3] [--stock] [--json FILE] [--output docs/reliability.md]

A full round takes about 20 minutes on two cores. The exit code is 1 if a case fails.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import benchmark.serving  # noqa: F401  its cases
from benchmark.cases import CASES, GROUPS, Case, Check
from benchmark.lab import PRODUCT, STOCK, Lab, load_libraries
from benchmark.runs import make_base, make_rows, write_rows

LONG = (41, 40, 1, 17, 10, 38, 35, 36, 37, 12)  # started first, so that none is left over at the end
COLUMNS = ("#", "fault", "expected", "shown", "result", "plain Trainer")
BEGIN, END = "<!-- written by benchmark/scorecard.py --device {}: -->", "<!-- end -->"  # of what --output replaces

Outcomes = dict[tuple[int, str], list[Check]]  # by the number of a case and a program


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="numbers, comma-separated [all]")
    parser.add_argument("--seeds", type=int, default=1, help="that cases 1 to 18 are tried with [1]")
    parser.add_argument("--stock", action="store_true", help="also try the plain Trainer, where it can be compared")
    parser.add_argument("--share", type=float, default=1.0, help="of points and repetitions that are tried [1]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count(), 4), help="cases at a time [cores, at most 4]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every try, with the log of its last start")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page of which the tables are rewritten")
    return parser.parse_args()


def main() -> None:
    cli = parse_command_line()
    cases = choose(cli.cases)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scorecard-") as folder:
        outcomes = try_all(cases, cli, Path(folder))
    facts = describe_round((time.monotonic() - began) / 60)
    rows = {case.number: row(case, outcomes) for case in cases}
    print(markdown(list(rows.values())))
    if cli.json:
        entries = [
            {"case": number, "program": program, **dataclasses.asdict(check)}
            for (number, program), checks in sorted(outcomes.items())
            for check in checks
        ]
        cli.json.parent.mkdir(parents=True, exist_ok=True)
        cli.json.write_text(json.dumps(facts | {"tries": entries}, indent=1), encoding="utf-8")
    if cli.output:
        begin = BEGIN.format(cli.device)
        before, _, rest = cli.output.read_text(encoding="utf-8").partition(begin)
        old, _, after = rest.partition(END)
        kept = old if cli.cases else ""  # a round of all cases replaces everything
        cli.output.write_text(f"{before}{begin}\n\n{page(rows, facts, kept)}\n\n{END}{after}", encoding="utf-8")
    sys.exit(any(cells[4].startswith("FAIL") for cells in rows.values()))


def choose(numbers: str | None) -> list[Case]:
    chosen = numbers.split(",") if numbers else []
    if unknown := [number for number in chosen if not number.isdigit() or int(number) not in CASES]:
        sys.exit(f"case {unknown[0]!r} is unknown; there are {', '.join(map(str, sorted(CASES)))}")
    return [CASES[number] for number in (map(int, chosen) if chosen else sorted(CASES))]


def try_all(cases: list[Case], cli: argparse.Namespace, root: Path) -> Outcomes:
    """Try each case with each program, `jobs` cases at a time."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cli.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load_libraries()
    rows = make_rows(24)
    make_base(root / "chatglm3-nano", rows)
    write_rows(root / "train.jsonl", rows)
    write_rows(root / "eval.jsonl", rows[:6])
    labs = [
        (case.number, program, seed, cli.seeds if case.seeded else 1)
        for case in sorted(cases, key=lambda case: LONG.index(case.number) if case.number in LONG else len(LONG))
        for program in (PRODUCT, STOCK)
        if case.tries and (program == PRODUCT or (cli.stock and case.stock))
        for seed in range(cli.seeds if case.seeded and program == PRODUCT else 1)
    ]
    outcomes: Outcomes = {}
    with ProcessPoolExecutor(cli.jobs, multiprocessing.get_context("fork")) as pool:
        tested = pool.submit(run_tests, [case for case in cases if case.tests], root)
        waiting = {pool.submit(try_one, root, *lab, cli.device, cli.share): lab for lab in labs}
        for done in as_completed(waiting):
            (number, program, seed, _), checks = waiting[done], done.result()
            outcomes.setdefault((number, program), []).extend(checks)
            failed = [check for check in checks if check.failed]
            passed = len(checks) - len(failed)
            print(f"case {number}, {program}, seed {seed}: {passed}/{len(checks)}", file=sys.stderr)
            for check in failed if program == PRODUCT else ():
                print(f"--- {check.name}: no {', '.join(check.failed)}\n{check.log[-4000:]}\n---", file=sys.stderr)
        return outcomes | tested.result()


def try_one(root: Path, number: int, program: str, seed: int, seeds: int, device: str, share: float) -> list[Check]:
    """Make all tries of one case with one seed. A case that breaks has failed too."""
    folder = root / f"case-{number}-{program}-{seed}"
    checks = []
    try:
        checks.extend(CASES[number].tries(Lab(root, folder, program, seed, seeds, device, share)))
    except Exception:
        checks.append(Check("the case itself", ["an end"], log=traceback.format_exc()))
    shutil.rmtree(folder, ignore_errors=True)
    return checks


def run_tests(cases: list[Case], root: Path) -> Outcomes:
    """Run the tests that are cases, each once. Those whose file is not there count as not run."""
    nodes = sorted({node for case in cases for node in case.tests if (ROOT / node.partition("::")[0]).exists()})
    if not nodes:
        return {}
    report = root / "tests.xml"
    options = ["-q", "-m", "not gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    log = subprocess.run([sys.executable, "-m", "pytest", *options, *nodes], cwd=ROOT, capture_output=True, text=True)
    found = list(ElementTree.parse(report).iter("testcase"))

    def checks(node: str) -> list[Check]:
        path, _, function = node.partition("::")
        module = path.removesuffix(".py").replace("/", ".")
        its = [item for item in found if item.get("classname") == module]
        its = [item for item in its if not function or item.get("name").partition("[")[0] == function]
        return [test_check(item, log.stdout) for item in its] or [Check(node, ["such a test"], log=log.stdout)]

    return {
        (case.number, PRODUCT): [check for node in case.tests if node in nodes for check in checks(node)]
        for case in cases
    }


def test_check(item: ElementTree.Element, log: str) -> Check:
    failed = item.find("failure") is not None or item.find("error") is not None
    facts = {"skipped": 1} if item.find("skipped") is not None else {}
    return Check(f"`{item.get('name')}`", ["success"] if failed else [], facts, log if failed else "")


def row(case: Case, outcomes: Outcomes) -> list[str]:
    """The cells of a case, in the order of COLUMNS."""
    checks, stock = outcomes.get((case.number, PRODUCT)), outcomes.get((case.number, STOCK))
    names = sorted({node.rpartition("::")[2] for node in case.tests})
    shown = f"{figure(checks)} ({', '.join(f'`{name}`' for name in names)})" if names and checks else figure(checks)
    plain = figure(stock) if stock else f"earlier: {case.earlier}" if case.earlier else ""
    return [str(case.number), case.fault, case.expected, shown, result(checks), plain]


def figure(checks: list[Check] | None) -> str:
    """Say how many did as expected, and the range of each fact; facts of one range are named together."""
    if not checks:
        return ""
    ranges: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for check in checks for key in check.facts):
        ranges.setdefault(span([check.facts[key] for check in checks if key in check.facts]), []).append(key)
    parts = [f"{re.sub(' diff(?=, [^,]+ diff)', '', ', '.join(keys))}: {values}" for values, keys in ranges.items()]
    return "; ".join([f"{sum(not check.failed for check in checks)}/{len(checks)}", *parts])


def span(values: list[float | str]) -> str:
    if isinstance(values[0], str):
        return " or ".join(dict.fromkeys(value or "none" for value in values))
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def result(checks: list[Check] | None) -> str:
    if not checks or all("skipped" in check.facts for check in checks):
        return "not run"
    failed = [f"{check.name}: no {', '.join(check.failed)}" for check in checks if check.failed]
    return f"FAIL ({'; '.join(dict.fromkeys(failed))})" if failed else "pass"


def markdown(rows: list[list[str]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (COLUMNS, *rows)]
    cells.insert(1, ["---"] * len(COLUMNS))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def unmarkdown(text: str) -> dict[int, list[str]]:
    """The rows of tables that `markdown` wrote, by the numbers of their cases."""
    lines = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    return {
        int(number): [number, *(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", rest))]
        for number, rest in lines
    }


def page(rows: dict[int, list[str]], facts: dict, kept: str = "") -> str:
    """A line about the round, and a table for each group of cases.

    Args:
        kept: what earlier rounds wrote; their lines stay, and their rows where the case was not tried again.
    """
    kinds = Counter(cells[4].partition(" (")[0] for cells in rows.values())
    summary = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    head = (
        f"{facts['date']}; {facts['machine']}; Python {facts['python']}, {versions}; {facts['minutes']} minutes; "
        f"`{facts['command']}`. Cases: {summary}."
    )
    heads = [line for line in kept.partition("###")[0].strip().split("\n\n") if line and facts["command"] not in line]
    groups: dict[str, list[list[str]]] = {}
    for number, cells in sorted((unmarkdown(kept) | rows).items()):
        groups.setdefault(GROUPS[max(first for first in GROUPS if first <= number)], []).append(cells)
    return "\n\n".join([*heads, head, *(f"### {title}\n\n{markdown(group)}" for title, group in groups.items())])


def describe_round(minutes: float) -> dict:
    """Where, when and how the cases were tried."""
    from benchmark.common import machine

    facts = machine()
    strace, root = ("yes" if is_so else "no" for is_so in (shutil.which("strace"), os.geteuid() == 0))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{facts['device']}, {os.cpu_count()} cores, strace: {strace}, root: {root}",
        "python": facts["python"],
        "versions": facts["versions"],
        "minutes": round(minutes, 1),
        "command": shlex.join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
