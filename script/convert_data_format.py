"""Convert Firefly's rows to ChatGLM3's.

python script/convert_data_format.py --input FILE --output FILE

`conversation`, a list of {"human", "assistant"}, becomes `conversations`, a list of turns with roles; every other field
of a row is kept. The file is read line by line. The output appears only when it is whole; a bad row is named by line
and leaves an earlier output as it was.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.conversation import DataError, parse_firefly, read_rows


def convert_row(row: dict) -> dict:
    """One Firefly row as a ChatGLM3 row. Raises DataError where it is none."""
    turns = [{"role": turn.role, "content": turn.content} for turn in parse_firefly(row).turns]
    return {key: value for key, value in row.items() if key != "conversation"} | {"conversations": turns}


def converted_lines(source: Path) -> Iterator[str]:
    for number, row in read_rows(source):
        try:
            yield json.dumps(convert_row(row), ensure_ascii=False) + "\n"
        except DataError as error:
            raise DataError(f"{source}:{number}: {error}") from None


def convert_file(source: Path, target: Path) -> int:
    """Convert a whole file or nothing. Returns the number of rows."""
    rows = 0
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=target.parent, delete=False) as output:
        try:
            for line in converted_lines(source):
                output.write(line)
                rows += 1
            output.flush()
            os.fsync(output.fileno())
            os.chmod(output.name, 0o644)
            os.replace(output.name, target)
        except BaseException:
            os.unlink(output.name)
            raise
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="Firefly's JSONL")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ChatGLM3's JSONL")
    cli = parser.parse_args()
    try:
        print(f"{cli.output}: {convert_file(cli.input, cli.output)} rows")
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
