"""Rendered samples in flat files, memory-mapped.

A store's folder holds `input_ids.bin` (int32) and `target_mask.bin` (uint8) of all samples end to end, `ends.bin`
(int64: where each sample ends), `lines.bin` (int64: file number and line of each sample, see PLACE_BITS), `notes.bin`
(uint8: see NOTES), `report.json` and `rejected.jsonl`.
"""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..run.errors import DataError
from .rules import DataReport

PLACE_BITS = 40  # low bits of a place, which hold the line; the higher ones hold the file's number
FILES = {"input_ids": np.int32, "target_mask": np.uint8, "ends": np.int64, "lines": np.int64, "notes": np.uint8}
REPORT, REJECTED = "report.json", "rejected.jsonl"


class Missing(DataError):
    """Raised for a store that is not there, perhaps because another process has just removed it."""


class TokenStore:
    """The samples of a folder that `fill_store` filled, memory-mapped. `ends[i]` is where sample i ends. As long as the
    store is open, no process removes its files (`hold`)."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.held = hold(folder)
            self.report = DataReport(**json.loads((folder / REPORT).read_text(encoding="utf-8")))
            for name, dtype in FILES.items():
                path = folder / f"{name}.bin"
                setattr(self, name, np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype))
            tokens, kept = self.report.tokens, self.report.kept
            sizes = [len(getattr(self, name)) for name in FILES]
            if [*sizes, *self.ends[-1:]] != [tokens] * 2 + [kept] * 3 + [tokens] * bool(kept):
                raise ValueError("its files do not fit one another")
        except Missing:
            raise
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: damaged; delete it, and it will be made anew ({error})") from error

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, target_mask) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return self.input_ids[part], self.target_mask[part]

    def place(self, index: int) -> tuple[int, int]:
        """(number of the file, line) of a sample."""
        return divmod(int(self.lines[index]), 1 << PLACE_BITS)


def hold(folder: Path) -> BinaryIO:
    """Keep a store from being removed (cache.limit_cache) until the returned file is closed, and note this use of it.

    Raises:
        Missing: the store is not there.
        OSError: it is there without its report.
    """
    missing = Missing(f"{folder}: not there; set cache_dir to a folder that all machines share")
    try:
        report = open(folder / REPORT, "rb")  # noqa: SIM115  the lock lasts as long as it is open
        with suppress(OSError):  # a file system without locks, from which nothing is removed
            fcntl.flock(report, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(report.fileno()), os.stat(folder / REPORT)):  # it was removed, and made anew
            raise missing
    except FileNotFoundError:
        if folder.is_dir():
            raise
        raise missing from None
    with suppress(OSError):  # another user's
        os.utime(report.fileno())
    return report
