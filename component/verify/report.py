"""The report of a verification, in Markdown, for an issue that anybody can read."""

import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ..model import DRIVER
from ..run.log import redact
from ..run.manifest import versions
from .steps import FAILED, PASSED, ROOT, SKIPPED, Finding


def describe_machine() -> dict[str, str]:
    """Versions, card and driver."""
    git = [shutil.which("git") or "false", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    facts = {"luciole": commit or "unknown", "python": platform.python_version(), **versions()}
    if not torch.cuda.is_available():
        return facts | {"card": "none"}
    card = torch.cuda.get_device_properties(0)
    driver = Path(DRIVER).read_text().splitlines()[0] if Path(DRIVER).exists() else "unknown"
    return facts | {"card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB", "driver": driver}


def write_report(model: str, machine: dict[str, str], findings: list[Finding], hidden: dict[str, str]) -> str:
    """The report as text. Secrets are removed from it, and paths are replaced as `hidden` says, the longest first."""
    results = [finding.result for finding in findings]
    counts = ", ".join(f"{results.count(result)} {result}" for result in (PASSED, FAILED, SKIPPED))
    lines = [f"## verify_real.py, {model}: {counts}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in machine.items()]
    for finding in findings:
        lines += ["", f"### {finding.step}: {finding.result} ({finding.seconds:.0f} s)", "", "```text"]
        lines += [finding.figures.replace("```", "'''"), "```"]
    text = "\n".join(lines) + "\n"
    for path in sorted(hidden.keys() - {"/"}, key=len, reverse=True):  # the home folder may be /
        text = text.replace(path, hidden[path])
    return redact(text)
