"""Convert conversations between Firefly, ChatGLM3, OpenAI, ShareGPT, Alpaca and Glaive (docs/data_format.md).

python script/convert_data_format.py --input FILE … --output FILE [--to FORMAT]

Every row's own format is detected. Fields that belong to no format are kept. Rows are read and written one by one; the
output appears only when it is whole, so that a fault leaves an earlier output as it was. What the target has no place
for is counted and reported; a row that it cannot hold at all is a bad row.
"""

import argparse
import contextlib
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.data.formats import ROW_FORMATS, detect_format, parse_row
from component.data.reader import Unreadable, find_files, read_rows, rejected_line
from component.run.errors import DataError, Fault
from component.run.files import replacing
from component.run.log import counted

OUTPUTS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass
class Summary:
    rows: int = 0
    lost: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where each thing was lost first
    rejected: int = 0


def convert_row(row: dict, target: str, source: str | None, lost) -> dict:
    """Convert one row. Raises DataError for a bad row and for one that the target format cannot hold."""
    name = source or detect_format(row)
    own = ROW_FORMATS[name]
    written = ROW_FORMATS[target].write(parse_row(row, name), lost)
    for turns in own.keys & {"conversations", "conversation", "messages"}:
        for key in sorted({key for turn in row[turns] for key in turn} - own.turn_keys):
            lost(f"{key!r} of a turn")
    kept = {key: value for key, value in row.items() if key not in own.keys}
    for key in sorted(kept):
        if key in ROW_FORMATS[target].keys or detect_format({key: kept[key]} | written) != detect_format(written):
            lost(f"{key!r} of the row, which means something else in {target}")
            del kept[key]
    return kept | written


def convert_files(
    sources: list[Path], output: Path, target: str, source: str | None = None, skip: bool = False
) -> Summary:
    """Convert whole files or nothing.

    Raises:
        DataError: a bad row, unless `skip`, which writes it to `OUTPUT.rejected.jsonl` with the reason; a file that
            cannot be read to its end.
    """
    summary = Summary()
    with whole_or_absent(output) as file, whole_or_absent(rejected_path(output) if skip else None) as rejects:
        for path in sources:
            for line, row in read_rows(path):
                noted: list[str] = []
                try:
                    if isinstance(row, DataError):
                        raise row
                    converted = convert_row(row, target, source, noted.append)
                except DataError as error:
                    if not skip or isinstance(error, Unreadable):
                        raise DataError(f"{path}:{line}: {error}") from None
                    kept = row if isinstance(row, dict) else None
                    rejects.write(rejected_line(path, line, str(error), kept).encode(errors="backslashreplace"))
                    summary.rejected += 1
                    continue
                file.write(json.dumps(converted, ensure_ascii=False).encode() + b"\n")
                summary.rows += 1
                for what in dict.fromkeys(noted):
                    summary.lost[what] += 1
                    summary.first.setdefault(what, f"{path}:{line}")
    return summary


def rejected_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.rejected.jsonl")


@contextlib.contextmanager
def whole_or_absent(output: Path | None) -> Iterator[BinaryIO | None]:
    """Open a file that replaces `output`, even a link, when all is written. A pipe or device is written to directly."""
    if output is None:
        yield None
        return
    if output.exists() and not output.is_file():
        with open(output, "wb") as file:
            yield file
        return
    with replacing(output) as file, compressing(file, output.name) as compressed:
        yield compressed


def compressing(file: BinaryIO, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if name.endswith(".gz"):
        return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
    if name.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "wb", closefd=False)
    return contextlib.nullcontext(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders or globs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=", ".join(OUTPUTS))
    parser.add_argument("--to", choices=ROW_FORMATS, default="chatglm3", help="format to write [chatglm3]")
    parser.add_argument("--from", dest="source", choices=ROW_FORMATS, help="format to read [each row's own]")
    parser.add_argument(
        "--on_bad_row", choices=("stop", "skip"), default="stop", help="skip: leave bad rows out [stop]"
    )
    cli = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for files' names that are not UTF-8
    try:
        sources = find_files(cli.input)
        if cli.output.is_symlink() and cli.output.is_file():
            raise DataError(f"{cli.output}: a link to {cli.output.resolve()}; give that name if you mean that file")
        if not cli.output.resolve().name.endswith(OUTPUTS) and (cli.output.is_file() or not cli.output.exists()):
            raise DataError(f"{cli.output}: JSON Lines are written; end the name with {', '.join(OUTPUTS)}")
        summary = convert_files(sources, cli.output, cli.to, cli.source, skip=cli.on_bad_row == "skip")
    except (Fault, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    print(f"{cli.output}: {counted(summary.rows, 'row')}", file=sys.stdout if cli.output.is_file() else sys.stderr)
    for what, count in summary.lost.items():
        print(f"not carried over, {counted(count, 'row')}, the first at {summary.first[what]}: {what}", file=sys.stderr)
    if summary.rejected:
        print(f"{counted(summary.rejected, 'bad row')} left out, see {rejected_path(cli.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
