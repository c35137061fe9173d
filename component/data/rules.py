"""What is done with rows, what was found in them, and whether a run may start on it."""

from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from ..run.errors import DataError

SHOWN = 20  # faults in an error message
CUT, SHORTENED, DROPPED = "cut", "early turns dropped", "too long, dropped"
NOTES = (None, CUT, SHORTENED)  # what `notes.bin` counts through


@dataclass(frozen=True)
class DataRules:
    """What is done with rows; docs/configuration.md explains each."""

    max_seq_length: int
    on_too_long: str = "truncate"
    loss_on: str = "flagged"
    on_bad_row: str = "stop"
    max_bad_share: float = 0.1
    strict_roles: bool = False


@dataclass
class DataReport:
    """What was found in a source. `notes` and `odd`: kind to [rows, place of the first]."""

    rows: int = 0
    turns: int = 0
    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0  # in tokens
    bad: int = 0
    faults: list[str] = field(default_factory=list)  # the first SHOWN
    notes: dict[str, list] = field(default_factory=dict)  # CUT, SHORTENED, DROPPED
    odd: dict[str, list] = field(default_factory=dict)  # what is unusual but legal

    def fault_lines(self) -> list[str]:
        """The first SHOWN, and how many there are beside."""
        more = self.bad - len(self.faults)
        return [*self.faults, *([f"… and {more} more"] if more else [])]

    def count_notes(self, kind: str) -> int:
        return self.notes.get(kind, [0])[0]


def judge(report: DataReport, files: list[Path], rules: DataRules) -> None:
    """Raise DataError where a run should not start: bad rows that are to stop it, bad or dropped ones above
    `max_bad_share`, or no sample."""
    name = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if report.bad and rules.on_bad_row == "stop":
        head = f"{name}: {report.bad} bad rows of {report.rows}; mend them, or set on_bad_row to skip"
        raise DataError("\n".join([head, *report.fault_lines()]))
    too_long = report.count_notes(DROPPED)
    if not report.rows:
        raise DataError(f"{name}: nothing to learn: the file has no rows")
    if not report.kept:
        at = f"no learned token survives max_seq_length={rules.max_seq_length}" if report.notes else "every row is bad"
        raise DataError("\n".join([f"{name}: nothing to learn: {at}", *report.fault_lines()]))
    if report.bad + too_long > rules.max_bad_share * report.rows:
        raise DataError(
            f"{name}: {report.bad} rows are bad and {too_long} too long, of {report.rows}: more than "
            f"max_bad_share={rules.max_bad_share:g}; mend them, raise max_seq_length={rules.max_seq_length}, or raise "
            "max_bad_share" + "".join(f"\n{fault}" for fault in report.fault_lines())
        )


def log_report(report: DataReport, files: list[Path], rules: DataRules) -> None:
    """What became of the rows, for the log."""
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files from {files[0]} on"
    mean, learned = report.tokens / report.kept, report.learned / report.tokens
    logger.info(
        f"{name}: {report.kept:,} rows, {report.tokens:,} tokens, {learned:.0%} learned; mean length {mean:.0f}, "
        f"longest {report.longest}"
    )
    for kind, (count, first) in report.notes.items():
        logger.warning(f"{name}: {count:,} rows, the first at {first}: {kind} (max_seq_length={rules.max_seq_length})")
    for kind, (count, first) in report.odd.items():
        logger.warning(f"{name}: {count:,} rows, the first at {first}: {kind}")
    if report.bad:
        logger.warning("\n".join([f"{name}: {report.bad:,} bad rows left out", *report.fault_lines()]))
