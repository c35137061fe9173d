"""Reads files of rows into JSON objects, strictly. A bad row becomes a DataError in its place; the next is read.

`read_lines` splits a file into the bytes of its rows. `parse_line` parses one of them, possibly in another process.
`read_from` splits a file from a Mark on.
"""

import codecs
import functools
import glob
import gzip
import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from ..run.errors import DataError
from ..run.files import POINTER
from .conversation import describe

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet")
LINE_LIMIT = 16 << 20  # bytes of one row, more than any model reads
DEPTH_LIMIT = 100  # levels of nested lists and objects
CHUNK = 1 << 20  # bytes that are read at a time


class Unreadable(DataError):
    """A file cannot be read from here on, so the rest of its rows is unknown."""


def find_files(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """List the files that a path, a folder, a glob, or a list of these names, each file once.

    The files of a folder or a glob are sorted by name. In a folder, files and folders whose names begin with a dot are
    left out, as editors and notebooks keep copies there.

    Raises:
        DataError: a name leads to no file, or a file's ending is not one of SUFFIXES.
    """
    found: dict[Path, Path] = {}  # by resolved path, since several links may lead to one file
    for item in [source] if isinstance(source, (str, Path)) else source:
        path = Path(item)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            files = [file for file in inside if not is_hidden(file.relative_to(path))]
            if hidden := [file for file in inside if is_hidden(file.relative_to(path))]:
                tell_hidden(path, len(hidden), hidden[0])
        elif path.exists() or not glob.has_magic(str(item)):
            files = [path]
        else:
            files = sorted(file for name in glob.glob(str(item), recursive=True) if (file := Path(name)).is_file())
        if not files:
            raise DataError(f"{item}: no file there; expected one of {', '.join(SUFFIXES)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError("no file is named")
    for file in found.values():
        if not file.is_file():
            raise DataError(f"{file}: no such file in {Path.cwd()}")
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    return list(found.values())


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@functools.lru_cache  # a run lists its files more than once, and this is logged once
def tell_hidden(folder: Path, count: int, first: Path) -> None:
    files = "1 file is" if count == 1 else f"{count} files are"
    logger.info(f"{folder}: {files} left out because of a name that begins with a dot; the first is {first}")


def read_rows(file: Path) -> Iterator[tuple[int, dict | DataError]]:
    """Yield (line, the row or what is wrong with it) for every line that is not blank.

    Lines count from 1. In Parquet, the number of the row takes the place of the line.
    """
    for line, raw in read_lines(file):
        try:
            yield line, raw if isinstance(raw, DataError) else parse_line(raw)
        except DataError as error:
            yield line, error


def rejected_line(file: Path, line: int, reason: str, row: str | dict | None) -> str:
    """Describe a bad row as a line of JSON: file and line, what is wrong, and the row itself if it could be read."""
    entry = {"file": str(file), "line": line, "reason": reason} | ({} if row is None else {"row": row})
    return json.dumps(entry, ensure_ascii=False) + "\n"


class Mark(NamedTuple):
    """A place between two rows of a file, described by what comes before it. The file's beginning is Mark()."""

    rows: int = 0
    line: int = 0  # where the last of these rows begins
    byte: int = 0  # where that row ends in the unpacked file, if it is a file of lines; otherwise 0


def read_lines(file: Path) -> Iterator[tuple[int, bytes | DataError]]:
    """Yield (line, bytes) for each row of a file, in constant memory. An unreadable row is a DataError instead."""
    for mark, raw in read_from(file, Mark()):
        yield mark.line, raw


def read_from(file: Path, start: Mark) -> Iterator[tuple[Mark, bytes | DataError]]:
    """Yield (the mark after a row, the row's bytes or a DataError) for each row after `start`.

    A .jsonl file is read from the mark on, and Parquet from the row group of the mark on. Other files are read from
    their beginning, and the rows before the mark are skipped.
    """
    rows, line = start.rows, start.line
    try:
        with open(file, "rb") as stream:
            fault = no_data(stream.read(64))
        if fault:
            yield Mark(rows + 1, 1), Unreadable(fault)
            return
        if file.name.endswith(".parquet"):
            found = read_parquet(file, start.rows)
        else:
            stream = open_bytes(file)
            head = stream.peek(4)[:4]
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (b"\0" in head and any(head)):
                fault = "not UTF-8 but UTF-16 or UTF-32 by its first bytes; save it as UTF-8"
                yield Mark(rows + 1, 1), Unreadable(fault)
                return
            byte = max(start.byte, len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8))
            pass_over(stream, byte)
            if file.name.endswith(".json"):
                found = ((line, 0, raw) for line, raw in islice(split_array(stream), start.rows, None))
            else:
                found = split_lines(stream, start.line, byte)
        for line, byte, raw in found:
            if isinstance(raw, DataError) or raw.strip():
                rows += 1
                yield Mark(rows, line, byte), raw
    except Exception as error:  # each library's own, for a failing disk, a file cut short or of another kind
        yield Mark(rows + 1, line + 1), Unreadable(f"cannot be read from here on ({error}); restore the file")


def no_data(head: bytes) -> str | None:
    """Say what a file is, and what to do, if its first bytes show that it holds no data; otherwise return None."""
    if head.startswith(POINTER):
        return "git left a pointer in the file's place; run `git lfs pull` there, or download the file anew"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, and not the data; download the file itself"
    return None


def open_bytes(file: Path) -> io.BufferedReader:
    if file.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(file))
    if file.name.endswith(".zst"):
        import pyarrow  # reports a file that ends early, as zstandard does not

        return io.BufferedReader(pyarrow.CompressedInputStream(open(file, "rb"), "zstd"))
    return open(file, "rb")


def pass_over(stream: io.BufferedReader, count: int) -> None:
    """Skip the first `count` bytes of a stream that is at its beginning."""
    if stream.seekable():
        stream.seek(count)
        return
    while count and (read := len(stream.read(min(count, CHUNK)))):
        count -= read


def split_lines(stream: io.BufferedReader, line: int, byte: int) -> Iterator[tuple[int, int, bytes | DataError]]:
    r"""Yield (line, byte where it ends, its bytes) for the lines that follow in a stream.

    Lines end at \n alone, since U+2028 and NEL may occur inside a JSON string.

    Args:
        line: the number of lines before the stream's position.
        byte: the stream's position in its file.
    """
    while raw := stream.readline(LINE_LIMIT + 1):
        line += 1
        byte += len(raw)
        if len(raw) > LINE_LIMIT:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(CHUNK)
                byte += len(raw)
            yield line, byte, too_long()
        else:
            yield line, byte, raw


def split_array(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | DataError]]:
    """Yield (line where it starts, bytes) for each element of the JSON array that a file consists of."""
    structure = re.compile(rb'["\\\[\]{},\n]')
    line, start_line, depth, in_string, escaped, element, closed = 1, 1, 0, False, -1, bytearray(), False
    after_comma = False
    while chunk := stream.read(CHUNK):
        done = 0
        for match in structure.finditer(chunk):
            at, mark = match.start(), match.group()
            if at == escaped:
                line += mark == b"\n"
            elif mark == b"\n":
                line += 1
            elif mark == b"\\":
                escaped = at + 1
            elif mark == b'"':
                in_string = not in_string
            elif in_string:
                continue
            elif mark in b"[{":
                depth += 1
                if depth == 1:
                    if mark != b"[" or chunk[done:at].strip() or closed:
                        yield line, Unreadable("not a JSON array; write [row, row, …], or name the file .jsonl")
                        return
                    done, start_line = at + 1, 0
            elif mark in b"]}" or depth == 1:  # the end of something, or the comma between two elements
                if depth == 1:
                    element += chunk[done:at]
                    done = at + 1
                    if element.strip() or mark == b"," or after_comma:
                        yield start_line or line, element_of(element)
                    if mark == b"}":
                        yield line, Unreadable("'}' where the array should end; write ]")
                        return
                    element, start_line, after_comma = bytearray(), 0, mark == b","
                depth -= mark in b"]}"
                closed = closed or depth == 0
            if depth and not start_line and (depth > 1 or in_string):
                start_line = line
        escaped -= len(chunk)
        if depth:
            element += chunk[done:] if len(element) <= LINE_LIMIT else b""
        elif chunk[done:].strip():
            yield line, Unreadable("not a JSON array; write [row, row, …], or name the file .jsonl")
            return
    if depth or not closed:
        yield start_line or line, Unreadable("the array is not closed; the file may be cut short")


def element_of(element: bytearray) -> bytes | DataError:
    if len(element) > LINE_LIMIT:
        return too_long()
    return bytes(element).strip() or DataError("a row is missing before or after a comma; remove the comma")


def too_long() -> DataError:
    return DataError(f"longer than {LINE_LIMIT >> 20} MiB; split the row, or end rows with a newline")


def read_parquet(file: Path, start: int) -> Iterator[tuple[int, int, bytes | DataError]]:
    """Yield (number from 1, 0, row as JSON) for the rows after the first `start`. Earlier row groups are not read.

    Arrow fills the keys that a row lacks with null, so a null key counts as absent.
    """
    import pyarrow.parquet

    with open(file, "rb") as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        groups = range(table.num_row_groups)
        ends = [0, *accumulate(table.metadata.row_group(group).num_rows for group in groups)]
        first = bisect_right(ends, start) - 1
        batches = table.iter_batches(batch_size=256, row_groups=groups[first:])
        rows = (batch.slice(i, 1) for batch in batches for i in range(len(batch)))
        for line, row in enumerate(islice(rows, start - ends[first], None), start + 1):
            try:
                (values,) = row.to_pylist()
                raw = json.dumps(without_null(values), ensure_ascii=False, default=as_text).encode()
                yield line, 0, raw if len(raw) <= LINE_LIMIT else too_long()
            except Exception as error:  # dates out of range, text that is not UTF-8, bytes …: each has its own error
                yield line, 0, DataError(f"{error}; store text, numbers, lists and structs alone")


def as_text(value: Any) -> str:
    """Write a date, a time or a decimal as text. Raises TypeError for bytes."""
    if isinstance(value, bytes):
        raise TypeError(f"holds binary data, {value[:20]!r}")
    return str(value)


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def parse_line(raw: bytes) -> dict:
    """Parse one row. Raises DataError unless it is one JSON object in UTF-8 that Python can hold and write again."""
    try:
        text = raw.decode().strip()
        if text.startswith("["):
            raise DataError("a row must be a JSON object, not a list; name a file that is one JSON array .json")
        row = load_json(text)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got {describe(row)}")
    return row


def load_json(text: str) -> Any:
    """Parse JSON as json.loads does, but raise DataError also for what it lets pass: duplicate keys, NaN, infinity,
    unpaired surrogates and deep nesting."""
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
        if "\\ud" in text.lower():  # an escaped surrogate, valid only as half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds {error.object[error.start]!r}, half of a surrogate pair; remove it") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"its line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"nested more than {DEPTH_LIMIT} deep; flatten the row") from None
    except DataError:
        raise
    except ValueError:  # Python's guard against numbers of thousands of digits
        raise DataError("holds a number of more than 4,300 digits; write it as text") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT:
        refuse_depth(value)
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{twice!r} occurs twice in one object; keep one")
    return row


def refuse_constant(constant: str) -> None:
    raise DataError(f"{constant} is no JSON number; write null or text")


def finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise DataError(f"the number {number[:20]} is out of range; write it as text")
    return value


def refuse_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return
    raise DataError(f"nested more than {DEPTH_LIMIT} deep; flatten the row")
