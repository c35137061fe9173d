"""Rules for rows, the report on what was found in them, and the decision whether a run may start."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from ..run.errors import DataError
from ..run.log import counted

SHOWN = 20  # kinds of faults that are counted separately, and as many of notes and of oddities
OTHERS = "of other kinds"
# Parts of a text that differ between two faults of one kind: numbers, and values in quotes or after "got".
DETAIL = re.compile(r"""\[\d+\]|(?<!\w)'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\bgot .*|\d+""", re.DOTALL)
CUT, SHORTENED, DROPPED = "cut", "early turns dropped", "too long, dropped"
NOTES = (None, CUT, SHORTENED)  # a byte of `notes.bin` is an index into these


@dataclass(frozen=True)
class DataRules:
    """Settings that decide what is done with a row; docs/configuration.md explains each."""

    max_seq_length: int
    on_too_long: str = "truncate"
    loss_on: str = "flagged"
    on_bad_row: str = "stop"
    max_bad_share: float = 0.1
    strict_roles: bool = False


@dataclass
class DataReport:
    """Findings in a source. `faults`, `notes` and `odd` map each kind to [rows, place of the first, its text]."""

    rows: int = 0
    turns: int = 0
    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0  # in tokens
    bad: int = 0
    faults: dict[str, list] = field(default_factory=dict)  # of bad rows
    notes: dict[str, list] = field(default_factory=dict)  # CUT, SHORTENED, DROPPED
    odd: dict[str, list] = field(default_factory=dict)  # what is unusual but legal
    calls: dict[str, int] = field(default_factory=dict)  # how many, by function

    def fault_lines(self) -> list[str]:
        """One line for each kind of fault: the first fault, and how many more there are."""
        return [
            f"… and {counted(count, 'row')} {OTHERS}"
            if kind == OTHERS
            else f"{place}: {text}" + (f" (and {counted(count - 1, 'more row')} like it)" if count > 1 else "")
            for kind, (count, place, text) in self.faults.items()
        ]

    def warnings(self) -> list[tuple[int, str, str]]:
        """Notes and oddities, which are worth a look but no faults, as (rows, place of the first, its text)."""
        return [(count, place, text) for count, place, text in (self.notes | self.odd).values()]

    def count_notes(self, kind: str) -> int:
        return self.notes.get(kind, [0])[0]


def kind_of(text: str) -> str:
    """The kind of a fault, note or oddity: its text without numbers and values (DETAIL)."""
    return DETAIL.sub("…", text)


def count_kind(totals: dict[str, list], place: str, text: str) -> int:
    """Count a text under its kind. After SHOWN kinds, all further ones are counted together as OTHERS.

    Returns:
        How many texts of its kind there are now.
    """
    kind = kind_of(text)
    if kind not in totals and len(totals) >= SHOWN:
        kind = text = OTHERS
    entry = totals.setdefault(kind, [0, place, text])
    entry[0] += 1
    return entry[0]


def judge(report: DataReport, files: list[Path], rules: DataRules) -> None:
    """Raise DataError if a run should not start: because of bad rows with `on_bad_row: stop`, more bad or dropped rows
    than `max_bad_share` allows, or no sample."""
    name = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if report.bad and rules.on_bad_row == "stop":
        few = report.bad <= rules.max_bad_share * report.rows  # with more, skipping them would stop the run as well
        remedy = "mend them, or set on_bad_row to skip" if few else "mend them"
        head = f"{name}: {counted(report.bad, 'bad row')} of {report.rows:,}; {remedy}"
        raise DataError("\n".join([head, *report.fault_lines()]))
    if not report.rows:
        raise DataError(f"{name}: nothing to learn: the file has no rows")
    if not report.kept:
        at = f"no learned token survives max_seq_length={rules.max_seq_length}" if report.notes else "every row is bad"
        raise DataError("\n".join([f"{name}: nothing to learn: {at}", *report.fault_lines()]))
    judge_share(report, name, rules)


def judge_share(report: DataReport, name: str, rules: DataRules) -> None:
    """Raise DataError if more than `max_bad_share` of all rows are bad or dropped."""
    too_long = report.count_notes(DROPPED)
    if report.bad + too_long > rules.max_bad_share * report.rows:
        remedies = ["mend them"] * bool(report.bad)
        remedies += [f"raise max_seq_length={rules.max_seq_length}"] * bool(too_long)
        head = f"{name}: {report.bad:,} bad and {too_long:,} too long of {counted(report.rows, 'row')}: more than "
        head += f"max_bad_share={rules.max_bad_share:g}; {', '.join(remedies)}, or raise max_bad_share"
        raise DataError("\n".join([head, *report.fault_lines()]))


def log_report(report: DataReport, files: list[Path], rules: DataRules) -> None:
    """Log how many rows and tokens were kept, and what was unusual, dropped or bad."""
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files from {files[0]} on"
    mean, learned = report.tokens / report.kept, report.learned / report.tokens
    logger.info(
        f"{name}: {counted(report.kept, 'row')}, {report.tokens:,} tokens, {learned:.0%} learned; "
        f"mean length {mean:.0f}, longest {report.longest}"
    )
    for count, first, what in report.warnings():
        limit = f" (max_seq_length={rules.max_seq_length})" if what in report.notes else ""
        logger.warning(f"{name}: {counted(count, 'row')}, the first at {first}: {what}{limit}")
    if report.bad:
        logger.warning("\n".join([f"{name}: {counted(report.bad, 'bad row')} left out", *report.fault_lines()]))
