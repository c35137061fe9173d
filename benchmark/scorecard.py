"""The reliability scorecard: faults injected into the real command on a tiny model, and what became of each run.

python benchmark/scorecard.py [--cases 1,2,10] [--seeds 3] [--stock] [--json FILE] [--output docs/reliability.md]

A full round takes about 15 minutes on two cores. The exit code is 1 if a case fails.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
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
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark.cases import CASES, GROUPS, Case, Check
from benchmark.faults import PRODUCT, STOCK, Lab, load_libraries, make_model, make_rows, write_rows

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
LONG = (39, 40, 1, 17, 10, 38, 35, 36, 37, 31, 12)  # first, so that none is left over at the end
COLUMNS = ("#", "fault", "expected", "shown", "result", "plain Trainer")
BEGIN, END = "<!-- written by benchmark/scorecard.py --device {}: -->", "<!-- end -->"  # of what --output replaces


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
    folder = Path(tempfile.mkdtemp(prefix="scorecard-"))
    try:
        outcomes = try_all(cases, cli, folder)
    finally:
        shutil.rmtree(folder)
    facts = machine(cli) | {"minutes": round((time.monotonic() - began) / 60, 1)}
    table = [row(case, outcomes) for case in cases]
    print(markdown(table))
    if cli.json:
        entries = [
            {"case": number, "program": program, **dataclasses.asdict(check)}
            for (number, program), checks in sorted(outcomes.items())
            for check in checks
        ]
        cli.json.write_text(json.dumps(facts | {"tries": entries}, indent=1), encoding="utf-8")
    if cli.output:
        begin = BEGIN.format(cli.device)
        before, _, rest = cli.output.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n\n{tables(cases, outcomes, facts)}\n\n{END}{after}"
        cli.output.write_text(text, encoding="utf-8")
    sys.exit(any(cells[4].startswith("FAIL") for cells in table))


def choose(numbers: str | None) -> list[Case]:
    known = {str(case.number): case for case in CASES}
    chosen = numbers.split(",") if numbers else list(known)
    if unknown := [number for number in chosen if number not in known]:
        sys.exit(f"case {unknown[0]!r} is unknown; there are {', '.join(known)}")
    return [known[number] for number in chosen]


def prepare(root: Path) -> None:
    rows = make_rows(24)
    make_model(root / "chatglm3-nano", rows)
    write_rows(root / "train.jsonl", rows)
    write_rows(root / "eval.jsonl", rows[:6])


def try_all(cases: list[Case], cli: argparse.Namespace, root: Path) -> dict[tuple[int, str], list[Check]]:
    """The tries of each case and program, made by `jobs` processes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cli.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load_libraries()
    prepare(root)
    outcomes: dict[tuple[int, str], list[Check]] = {}
    labs = [
        (case, {"program": program, "seed": seed, "seeds": cli.seeds if case.seeded else 1})
        for case in sorted(cases, key=lambda case: LONG.index(case.number) if case.number in LONG else len(LONG))
        for program in (PRODUCT, STOCK)
        if case.tries and (program == PRODUCT or (cli.stock and case.stock))
        for seed in range(cli.seeds if case.seeded and program == PRODUCT else 1)
    ]
    with ProcessPoolExecutor(cli.jobs, multiprocessing.get_context("fork")) as pool:
        tested = pool.submit(run_tests, [case for case in cases if case.tests], root)
        waiting = {
            pool.submit(
                try_one, case.number, root, {"device": cli.device, "share": cli.share} | settings
            ): f"case {case.number}, {settings['program']}, seed {settings['seed']}"
            for case, settings in labs
        }
        for done in as_completed(waiting):
            key, checks = done.result()
            outcomes.setdefault(key, []).extend(checks)
            failed = [check for check in checks if check.failed]
            print(f"{waiting[done]}: {len(checks) - len(failed)}/{len(checks)}", file=sys.stderr)
            for check in failed if key[1] == PRODUCT else ():
                print(f"--- {check.name}: no {', '.join(check.failed)}\n{check.log[-4000:]}\n---", file=sys.stderr)
        return outcomes | tested.result()


def try_one(number: int, root: Path, settings: dict) -> tuple[tuple[int, str], list[Check]]:
    """All tries of one case with one seed. A case that breaks is a failure too."""
    case = next(case for case in CASES if case.number == number)
    folder = root / f"case-{number}-{settings['program']}-{settings['seed']}"
    checks = []
    try:
        checks.extend(case.tries(Lab(root, folder, **settings)))
    except Exception:
        checks.append(Check("the case itself", ["an end"], log=traceback.format_exc()))
    shutil.rmtree(folder, ignore_errors=True)
    return (number, settings["program"]), checks


def run_tests(cases: list[Case], root: Path) -> dict[tuple[int, str], list[Check]]:
    """The tests of the suite that are cases, each once. Those whose file is not there count as not run."""
    nodes = sorted({node for case in cases for node in case.tests if (ROOT / node.partition("::")[0]).exists()})
    if not nodes:
        return {}
    report = root / "tests.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    log = subprocess.run([sys.executable, "-m", "pytest", *options, *nodes], cwd=ROOT, capture_output=True, text=True)
    found = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {}
    for case in cases:
        checks = []
        for node in [node for node in case.tests if node in nodes]:
            its = [test_check(item, log.stdout) for item in found if is_of(node, item)]
            checks += its or [Check(node, ["such a test"], log=log.stdout)]
        outcomes[case.number, PRODUCT] = checks
    return outcomes


def is_of(node: str, item: ElementTree.Element) -> bool:
    path, _, function = node.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    return item.get("classname") == module and (not function or item.get("name").partition("[")[0] == function)


def test_check(item: ElementTree.Element, log: str) -> Check:
    failed = item.find("failure") is not None or item.find("error") is not None
    facts = {"skipped": 1} if item.find("skipped") is not None else {}
    return Check(f"`{item.get('name')}`", ["success"] if failed else [], facts, log if failed else "")


def row(case: Case, outcomes: dict[tuple[int, str], list[Check]]) -> list[str]:
    checks, stock = outcomes.get((case.number, PRODUCT)), outcomes.get((case.number, STOCK))
    names = sorted({node.rpartition("::")[2] for node in case.tests})
    shown = f"{figure(checks)} ({', '.join(f'`{name}`' for name in names)})" if names and checks else figure(checks)
    plain = figure(stock) if stock else f"earlier: {case.earlier}" if case.earlier else ""
    return [str(case.number), case.fault, case.expected, shown, result(checks), plain]


def figure(checks: list[Check] | None) -> str:
    """How many did as expected, and the range of each fact; facts of one range are named together."""
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


def tables(cases: list[Case], outcomes: dict[tuple[int, str], list[Check]], facts: dict) -> str:
    rows = {case.number: row(case, outcomes) for case in cases}
    results = [
        next(kind for kind in ("pass", "FAIL", "not run") if cells[4].startswith(kind)) for cells in rows.values()
    ]
    summary = ", ".join(f"{count} {kind}" for kind, count in Counter(results).items())
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    head = (
        f"{facts['date']}; {facts['machine']}; Python {facts['python']}, {versions}; {facts['minutes']} minutes; "
        f"`{facts['command']}`. Cases: {summary}."
    )
    groups: dict[str, list[list[str]]] = {}
    for number, cells in rows.items():
        groups.setdefault(GROUPS[max(first for first in GROUPS if first <= number)], []).append(cells)
    return "\n\n".join([head, *(f"### {title}\n\n{markdown(group)}" for title, group in groups.items())])


def machine(cli: argparse.Namespace) -> dict:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(": ")[2] if names else platform.machine()
    if cli.device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    means = [f"{tool}: {'yes' if there else 'no'}" for tool, there in (("strace", shutil.which("strace")),)]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{name}, {os.cpu_count()} cores, {', '.join(means)}, root: {'no' if os.geteuid() else 'yes'}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": shlex.join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
