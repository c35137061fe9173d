"""Views of what a model will learn from its data: a table, one sample as tokens, one HTML page."""

import hashlib
import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..run.log import counted, harmless
from .conversation import count_rounds
from .dataset import SFTDataset
from .page import fill_page
from .reader import read_lines
from .rules import CUT, DROPPED, NOTES, SHORTENED, SHOWN
from .store import REJECTED
from .tools import names_of

PAGE = Path(__file__).with_name("inspection.html")
BARS = 12  # in the histogram
FAULT_TEXT = 2000  # characters of a bad row that are shown


class Inspection:
    """The figures of a data set, and its rows on demand."""

    def __init__(self, dataset: SFTDataset, tokenizer):
        self.dataset, self.tokenizer, self.report = dataset, tokenizer, dataset.store.report
        self.lengths = dataset.lengths
        self.duplicates = find_duplicates(dataset)
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control = added | set(tokenizer.all_special_ids)

    def summary(self) -> list[tuple[str, str]]:
        report = self.report
        return [
            ("rows", f"{report.rows:,}"),
            ("turns", f"{report.turns:,}"),
            ("tokens", f"{report.tokens:,}"),
            ("learned", f"{report.learned / max(report.tokens, 1):.1%}"),
            ("mean length", f"{report.tokens / max(report.kept, 1):,.0f}"),
            ("longest", f"{report.longest:,}"),
            (CUT, f"{report.count_notes(CUT):,}"),
            (SHORTENED, f"{report.count_notes(SHORTENED):,}"),
            (DROPPED, f"{report.count_notes(DROPPED):,}"),
            ("bad rows", f"{report.bad:,}"),
            ("duplicates", f"{len(self.duplicates):,}"),
        ]

    def histogram(self) -> tuple[list[int], list[int]]:
        """(edges, counts) of the samples' lengths in tokens; one edge more than counts."""
        width = max(-(-int(self.report.longest + 1) // BARS), 1)
        edges = [width * i for i in range(BARS + 1)]
        return edges, np.histogram(self.lengths, edges)[0].tolist()

    def table(self) -> str:
        """The figures and the histogram as text."""
        lines = [f"{name:<22}{value:>16}" for name, value in self.summary()]
        edges, counts = self.histogram()
        lines += ["", "samples by length in tokens"]
        for start, end, count in zip(edges, edges[1:], counts, strict=False):
            bar = "█" * round(40 * count / max(counts)) or "▏" * bool(count)
            lines.append(f"{start:>7} – {end - 1:<7}{count:>10,} {bar}")
        calls = self.calls()
        lines += ["", "calls by function", *(f"{name:<30}{count:>10,}" for name, count in calls)] if calls else []
        lines += [
            f"{counted(count, 'row')}, the first at {first}: {what}" for count, first, what in self.report.warnings()
        ]
        lines += ["", counted(self.report.bad, "bad row"), *self.report.fault_lines()] if self.report.bad else []
        return "\n".join(lines)

    def tokens(self, index: int, colours: bool) -> str:
        """One sample with every token visible: its text, the learned stretches in green or between ⟦ and ⟧."""
        ids, mask = (values.tolist() for values in self.dataset.store[index])
        parts = []
        for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
            shown = "│".join(visible(self.piece(token)) for token, _ in run)
            start, end = ("\033[32m", "\033[0m") if colours else ("⟦", "⟧")
            parts.append(f"{start}{shown}{end}" if learned else shown)
        return f"{self.dataset.place(index)}, {len(ids)} tokens, {sum(mask)} learned\n" + "│".join(parts)

    def piece(self, token: int) -> str:
        """A token's text as it appears within a sample, leading space included, or a control token's name."""
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if token in self.control:
            return str(raw or self.tokenizer.added_tokens_decoder[token])  # ChatGLM's has no name for its end token
        text = self.tokenizer.decode([token])
        if text == "\ufffd" and str(raw).startswith("<0x"):  # a byte of a character that the vocabulary does not have
            return raw
        return f" {text}" if str(raw).startswith("▁") and not text.startswith(" ") else text

    def html(self, title: str, model: str, data_format: str, limit: int) -> str:
        """One page with the first `limit` samples, which loads nothing else."""
        edges, counts = self.histogram()
        shown = min(len(self.dataset), limit)
        rows = self.describe_rows(shown)
        used = {token for row in rows for token in row["ids"]}
        data = {
            "title": title,
            "model": model,
            "format": data_format,
            "max_seq_length": self.dataset.rules.max_seq_length,
            "summary": self.summary(),
            "shown": shown,
            "total": len(self.dataset),
            "histogram": {"edges": edges, "counts": counts},
            "bad": self.report.bad,
            "faults": self.faults(),
            "warnings": [
                {"reason": what, "count": count, "first": first} for count, first, what in self.report.warnings()
            ],
            "calls": self.calls(),
            "pieces": {str(token): self.piece(token) for token in sorted(used)},
            "control": sorted(used & self.control),
            "rows": rows,
        }
        return fill_page(PAGE, data)

    def calls(self) -> list[tuple[str, int]]:
        """(function, number of calls), the most called first; after SHOWN functions, the rest is one entry."""
        ranked = sorted(self.report.calls.items(), key=lambda item: -item[1])
        rest = ranked[SHOWN:]
        return ranked[:SHOWN] + ([(f"{len(rest):,} other functions", sum(n for _, n in rest))] if rest else [])

    def faults(self) -> list[dict[str, str]]:
        with open(self.dataset.store.folder / REJECTED, encoding="utf-8") as lines:
            rejected = [json.loads(line) for line, _ in zip(lines, range(1000), strict=False)]
        return [
            {"place": f"{row['file']}:{row['line']}", "reason": row["reason"], "text": row["row"][:FAULT_TEXT]}
            for row in rejected
        ]

    def describe_rows(self, shown: int) -> list[dict[str, Any]]:
        """Tokens and turns of the first samples; turns are read from the files again."""
        wanted: dict[int, dict[int, int]] = defaultdict(dict)  # file number: line: sample
        for index in range(shown):
            number, line = self.dataset.store.place(index)
            wanted[number][line] = index
        rows: list[dict[str, Any]] = [{} for _ in range(shown)]
        for number, lines in wanted.items():
            last = max(lines)
            for line, raw in read_lines(self.dataset.files[number]):
                if line in lines:
                    rows[lines[line]] = self.describe_row(lines[line], raw)
                if line >= last:
                    break
        return rows

    def describe_row(self, index: int, raw: bytes) -> dict[str, Any]:
        conversation, odd = self.dataset.renderer.parse(raw)
        note = NOTES[self.dataset.store.notes[index]]
        if note and self.dataset.rules.on_too_long == "truncate_left_turns" and count_rounds(conversation) > 1:
            conversation = self.dataset.renderer.shorten(conversation)
        notes = [*([note] if note else []), *odd]
        ids, mask = (values.tolist() for values in self.dataset.store[index])
        if index in self.duplicates:
            notes.append(f"duplicate of {self.dataset.place(self.duplicates[index])}")
        runs = [len(list(run)) for _, run in groupby(mask)]
        return {
            "place": self.dataset.place(index),
            "ids": ids,
            "mask": [0, *runs] if mask[0] else runs,
            "notes": notes,
            "tools": sorted(names_of(conversation.tools)),
            "turns": [
                {"role": turn.role, "content": turn.content, "learned": turn.learned}
                | ({"name": turn.name, "parameters": turn.parameters} if turn.role == "tool" else {})
                | ({"observation": turn.observation} if turn.observed else {})
                for turn in conversation.turns
            ],
        }


def find_duplicates(dataset: SFTDataset) -> dict[int, int]:
    """Indices of samples whose tokens repeat an earlier sample's, to that sample's index."""
    first: dict[bytes, int] = {}
    duplicates = {}
    for index in range(len(dataset)):
        digest = hashlib.blake2b(dataset.store[index][0].tobytes(), digest_size=16).digest()
        if (earlier := first.setdefault(digest, index)) != index:
            duplicates[index] = earlier
    return duplicates


def visible(piece: str) -> str:
    """Text that is safe to print: no row can move a terminal's cursor or reverse a line's direction."""
    shown = piece.replace(" ", "·").replace("\t", "→")
    return "".join("↵\n" if c == "\n" else printable(c) for c in shown) or "∅"


def printable(text: str) -> str:
    """Text on one line that is safe to print, with the numbers of characters that are not."""
    return harmless(text, kept="")
