"""A score as text for the terminal, and as a page of every wrong answer."""

import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..card.card import renew_card, score_file
from ..data.inspection import printable
from ..data.page import fill_page
from ..model import bits_in_memory
from ..run.errors import ArgumentError, unusable
from ..run.files import write_atomically
from ..run.log import counted
from ..run.manifest import CARD
from .comparison import count_faults
from .figures import (
    TRAINED,
    UNREADABLE,
    Counts,
    Figure,
    Score,
    by_argument,
    by_function,
    count_unreadable,
    find_decisions,
    find_notes,
    to_json,
)
from .statistics import Estimate

PAGE = Path(__file__).with_name("score.html")
SHOWN = 20  # functions and arguments in the terminal
BESIDE = 2  # models whose intervals a terminal has room for
IN_PAGE = 2000  # wrong answers
TEXT = 4000  # characters of one text in the page


def table(score: Score) -> str:
    """The figures as text: of base and tuned model side by side, then by function and by argument."""
    models = list(score.results)
    calls = sum(bool(question.calls) for question in score.questions)
    head = f"{score.title}: {counted(len(score.rows), 'row')}, {counted(len(score.questions), 'question')}, of which "
    lines = [f"{head}{calls:,} want a call and {len(score.questions) - calls:,} a text", describe_models(score.about)]
    lines += [*map(str, find_notes(score)), ""]
    lines += figure_lines(score.figures, score)
    if kept := score.kept_figures:
        lines += ["", "on text that has nothing to do with the training (lower is better):", *figure_lines(kept, score)]
    if calls:
        decisions = {model: find_decisions(score, model) for model in models}
        unreadable = {model: count_unreadable(score, model) for model in models}
        if any(unreadable.values()):
            decisions = {model: decisions[model] | {UNREADABLE: count} for model, count in unreadable.items()}
        lines += ["", *aligned([*head_rows(["decisions"], models), *rows_by_key(decisions)])]
    faults = {model: count_faults(verdict for _, verdict in score.judged(model)) for model in models}
    if any(faults.values()):
        lines += ["", *aligned([*head_rows(["wrong answers"], models), *rows_by_key(faults)])]
    if calls:
        functions = {model: by_function(score, model) for model in models}
        lines += ["", *count_lines("exact calls by function", functions)]
        arguments = {
            model: {
                f"{function}  {argument}": counts for (function, argument), counts in by_argument(score, model).items()
            }
            for model in models
        }
        lines += ["", *count_lines("right values by argument", arguments)]
    return "\n".join(map(printable, lines))


def describe_models(about: dict) -> str:
    """Say what was scored: the adapter and its base, or the base alone, and how its weights are kept."""
    bits = bits_in_memory(about["base_bits"], getattr(torch, about["dtype"]))
    base = f"{about['base']} in {bits} bits, {about['dtype']} arithmetic"
    return f"adapter {about['adapter']['path']}, base {base}" if about["adapter"] else f"model {base}"


def figure_lines(figures: list[Figure], score: Score) -> list[str]:
    """A table of figures and differences with their 95% intervals; of more than BESIDE models without intervals, and
    with the differences in a table of their own."""
    models, references = list(score.results), score.references
    if len(models) > BESIDE:
        return compact_lines(figures, models, references)
    rows = [["", "n", *models, *(f"{model} - {reference}" for model, reference in references.items())]]
    for figure in figures:
        values = [show(figure.values[model], figure.form) for model in models]
        differences = [show(figure.differences[model], figure.form, "+") for model in references]
        rows.append([figure.name, f"{figure.count:,}", *values, *differences])
    return aligned(rows)


def compact_lines(figures: list[Figure], models: list[str], references: dict[str, str]) -> list[str]:
    """Figures of many models, and a table of differences, each marked whose interval does not contain 0."""
    values, differences = head_rows(["", "n"], models), head_rows([""], list(references))
    for figure in figures:
        shown = [show(figure.values[model], figure.form, interval=False) for model in models]
        values.append([figure.name, f"{figure.count:,}", *shown])
        differences.append(
            [figure.name, *(show_marked(figure.differences[model], figure.form) for model in references)]
        )
    first, *others = dict.fromkeys(references.values())
    compared = f"of {TRAINED} to {first}, of the others to {TRAINED}" if others else f"to {first}"
    head = f"difference {compared} (* 95% interval without 0; intervals: --json, --html):"
    return [*aligned(values), "", head, *aligned(differences)]


def show(estimate: Estimate, form: str, sign: str = "", interval: bool = True) -> str:
    """A figure with its interval: `48.0% [41.2, 54.9]`, or `–` for a figure of nothing."""
    if np.isnan(estimate.value):
        return "–"
    factor, places, unit = (100, 1, "%") if form == "%" else (1, 3, "")
    value, low, high = (f"{factor * part:{sign}.{places}f}" for part in estimate)
    return f"{value}{unit} [{low}, {high}]" if interval and not np.isnan(estimate.low) else f"{value}{unit}"


def show_marked(difference: Estimate, form: str) -> str:
    """A difference without its interval: with a star behind it if that does not contain 0, else with a space."""
    is_clear = difference.low > 0 or difference.high < 0
    return show(difference, form, "+", interval=False) + ("*" if is_clear else " ")


def head_rows(first: list[str], models: list[str]) -> list[list[str]]:
    """The head of a table: its first columns and the models, whose names take two rows where they are many."""
    parts = [model.replace(" to ", " to\n").split("\n") if len(models) > BESIDE else [model] for model in models]
    height = max(map(len, parts))
    columns = [[""] * (height - len(part)) + part for part in [*([name] for name in first), *parts]]
    return [list(row) for row in zip(*columns, strict=True)]


def rows_by_key(held: dict[str, dict[str, int]]) -> Iterable[list[str]]:
    """A row for each key of several models' counts."""
    for key in dict.fromkeys(key for counts in held.values() for key in counts):
        yield [key, *(f"{counts.get(key, 0):,}" for counts in held.values())]


def count_lines(head: str, held: dict[str, dict[str, Counts]]) -> list[str]:
    """A table of what was right, the most expected first, and of how many were given where a terminal has room."""
    totals = {key: counts.expected for table in held.values() for key, counts in table.items()}
    ranked = sorted(totals, key=lambda key: (-totals[key], key))
    rows = head_rows([head, "n"], list(held))
    for key in ranked[:SHOWN]:
        found = [table.get(key, Counts()) for table in held.values()]
        given = [f" ({counts.given:,} given)" if len(held) <= BESIDE else "" for counts in found]
        shown = [f"{counts.right:,}{more}" for counts, more in zip(found, given, strict=True)]
        rows.append([key, f"{totals[key]:,}", *shown])
    more = [f"… {len(ranked) - SHOWN:,} more, in --json"] if len(ranked) > SHOWN else []
    return aligned(rows) + more


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of a table with the first column on the left and all others on the right, as wide as they need to be."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        gaps = [" " * (width - width_of(cell)) for cell, width in zip([first, *others], widths, strict=True)]
        lines.append("  ".join([first + gaps[0], *(gap + cell for cell, gap in zip(others, gaps[1:], strict=True))]))
    return lines


def width_of(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese characters take two each, and combining marks none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def html(score: Score) -> str:
    """One page with every wrong answer beside the right one, the class with the most first. It loads nothing else.

    The wrong answers are those of the last model but variants: the tuned one, or the base where there is no other.
    """
    facts = to_json(score)
    model = next(iter(score.references), next(iter(score.results)))
    wrong = [answer for answer in facts.pop("answers") if (answer["given"][model] or {}).get("fault")]
    order = {fault: i for i, fault in enumerate(facts["faults"][model])}
    wrong.sort(key=lambda answer: order[answer["given"][model]["fault"]])
    facts |= {
        "model": model,
        "notes": [vars(note) for note in find_notes(score)],
        "wrong": len(wrong),
        "answers": [shorten(answer) for answer in wrong[:IN_PAGE]],
    }
    return fill_page(PAGE, facts)


def shorten(value):
    """A JSON value whose texts have at most TEXT characters."""
    if isinstance(value, str):
        return value if len(value) <= TEXT else f"{value[:TEXT]}… ({len(value) - TEXT:,} more characters)"
    if isinstance(value, dict):
        return {shorten(key): shorten(item) for key, item in value.items()}
    return [shorten(item) for item in value] if isinstance(value, list) else value


def check_file(file: Path | None, name: str, read: Iterable[Path] = ()) -> None:
    """Raise ArgumentError where `write_files` could not write a file that was asked for as `name`, or would write over
    one of those that are read."""
    if not file:
        return
    if file.resolve() in {path.resolve() for path in read}:
        raise ArgumentError(f"{name} {file}: holds rows that are read, and would be written over; choose another name")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ArgumentError(f"{name} {file}: a link or no file; give the name of a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"{name} {file}: nothing can be written in {file.parent}; choose another folder")


def write_files(score: Score, json_file: Path | None, page: Path | None) -> list[Path]:
    """Write the page and then the figures, each whole or not at all, where a name is given. Figures beside a final
    adapter go into its card, too. Returns the names.

    Raises:
        Fault: a file could not be written.
    """
    written = []
    for file, make in ((page, lambda score: html(score).encode(errors="backslashreplace")), (json_file, figures_of)):
        if file:
            try:
                write_atomically(file, make(score))
            except OSError as error:
                raise unusable(f"{file} could not be written ({error}); choose another name", error) from None
            written.append(file)
    return written + renew_card_beside(score, json_file)


def renew_card_beside(score: Score, json_file: Path | None) -> list[Path]:
    """Renew the card of the scored adapter, if it shows the figures of this file. Returns its name, if it was written.

    Raises:
        Fault: the card could not be written.
    """
    adapter = score.about["adapter"] and Path(score.about["adapter"]["path"])
    if not adapter or not json_file or json_file.resolve() != score_file(adapter).resolve():
        return []
    try:
        return renew_card(adapter)
    except OSError as error:
        raise unusable(f"{adapter / CARD} could not be written ({error}); the score is not in it", error) from None


def figures_of(score: Score) -> bytes:
    """The file of all figures, as JSON."""
    return json.dumps(to_json(score), ensure_ascii=False, indent=1).encode(errors="backslashreplace")
