"""Cases 19 to 24 of the reliability scorecard: files that are broken, and files that only look so."""

import gzip
import json
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from component.data import reader
from component.data.reader import Mark, Unreadable, find_files, load_json, parse_line, read_from, read_lines, read_rows
from component.run.errors import DataError

ROOT = Path(__file__).parents[3]
ROWS = [
    {"n": 1, "text": 'a],[{"\\\u2028 \x85 \x0b'},
    {"n": [1, {"x": None}], "text": "你好 \\\\"},
    {"text": '\n"'},
]


def write(path: Path, rows=ROWS, indent=None) -> Path:
    if ".jsonl" in path.name:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        data = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    file = write(tmp_path / name)
    assert [row for _, row in read_rows(file)] == ROWS
    assert [row for _, row in read_rows(file.rename(tmp_path / f"not utf-8 \udcca{name}"))] == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_split_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(reader, "CHUNK", chunk)
    assert [row for _, row in read_rows(write(tmp_path / "a.json", indent=indent))] == ROWS


def test_an_array_names_the_line_on_which_a_row_begins(tmp_path):
    file = write(tmp_path / "a.json", indent=2)
    lines = file.read_text().split("\n")  # not splitlines: U+2028 ends no line
    starts = [number for number, line in enumerate(lines, 1) if line == "  {"]
    assert [line for line, _ in read_rows(file)] == starts


def test_parquet_rows_are_counted_and_absent_keys_stay_absent(tmp_path):
    rows = [
        {"role": "tool", "parameters": {"city": "北京"}, "list": [{"a": 1}, {"b": 2}]},
        {"role": "tool", "parameters": {"days": 2}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    odd_name = (tmp_path / "a.parquet").rename(tmp_path / "not utf-8 \udcca.parquet")
    assert list(read_rows(odd_name)) == [(1, rows[0]), (2, rows[1])]
    dated = {"n": 1, "when": datetime(2026, 1, 2), "price": Decimal("1.50")}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dated]), tmp_path / "a.parquet")
    assert next(read_rows(tmp_path / "a.parquet"))[1] == {"n": 1, "when": "2026-01-02 00:00:00", "price": "1.50"}
    odd = pyarrow.table({"x": [b"\xff"], "y": [float("nan")]})
    pyarrow.parquet.write_table(odd.select(["x"]), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(odd.select(["y"]), tmp_path / "c.parquet")
    assert "holds binary data, b'\\xff'; store text" in str(next(read_rows(tmp_path / "b.parquet"))[1])
    assert "NaN is no JSON number" in str(next(read_rows(tmp_path / "c.parquet"))[1])


def test_bom_crlf_blank_lines_and_unicode_separators_change_nothing(tmp_path):
    text = json.dumps(ROWS[0], ensure_ascii=False)
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n  \n{text}".encode())
    assert list(read_rows(tmp_path / "odd.jsonl")) == [(1, ROWS[0]), (4, ROWS[0])]
    (tmp_path / "odd.json").write_bytes(b"\xef\xbb\xbf" + f" [\r\n{text}\r\n]\r\n".encode())
    assert list(read_rows(tmp_path / "odd.json")) == [(2, ROWS[0])]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": }', "column 7: not JSON (Expecting value)"),
        (b'{"a": 1', "column 8: not JSON (Expecting ',' delimiter)"),
        (b"[1]", "a row must be a JSON object, not a list; name a file that is one JSON array .json"),
        (b"[", "not a list; name a file that is one JSON array .json"),
        (b'"x"', 'a row must be a JSON object, got "x" (str)'),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8; save the file as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "byte 8 is not UTF-8"),
        (b'{"a": "\\uD800"}', "holds '\\ud800', half of a surrogate pair; remove it"),
        (b'{"\\uDC00": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice in one object; keep one"),
        (b'{"a": NaN}', "NaN is no JSON number; write null or text"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is out of range; write it as text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number of more than 4,300 digits; write it as text"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 deep; flatten the row"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100 deep"),
    ],
)
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path, line, fault):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}')
    (_, first), (number, error), (_, last) = read_rows(file)
    assert (first, number, last) == ({"n": 1}, 2, {"n": 3})
    assert fault in str(error)


def test_many_brackets_in_text_are_no_depth():
    assert load_json(json.dumps({"a": "[" * 500, "b": [[]] * 200}))["a"] == "[" * 500
    assert parse_line(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize(
    ("text", "rows", "fault"),
    [
        ('{"a": 1}', 0, "not a JSON array; write [row, row, …], or name the file .jsonl"),
        ('[{"a": 1}', 0, "the array is not closed; the file may be cut short"),
        ('[{"a": 1}, {"b"', 1, "the array is not closed"),
        ("", 0, "the array is not closed"),
        ('[{"a": 1}] x', 1, "not a JSON array"),
        ('[{"a": 1}][{"a": 2}]', 1, "not a JSON array"),
        ('[{"a": 1},, {"b": 2}]', 2, "a row is missing before or after a comma"),
        ('[{"a": 1},]', 1, "a row is missing before or after a comma"),
        ('[{"a": 1}}', 1, "'}' where the array should end"),
        ('[{"a": 1}, 7]', 1, "a row must be a JSON object, got 7 (int)"),
    ],
)
def test_a_bad_array_is_said_to_be_one(tmp_path, text, rows, fault):
    (tmp_path / "a.json").write_text(text)
    got = [row for _, row in read_rows(tmp_path / "a.json")]
    assert sum(isinstance(row, dict) for row in got) == rows
    assert [fault in str(row) for row in got if isinstance(row, DataError)] == [True]
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(read_rows(tmp_path / "empty.json")) == []


def test_a_file_cut_short_says_where(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        file = write(tmp_path / name, rows=[{"n": n} for n in range(100_000)])
        file.write_bytes(file.read_bytes()[:-20])
        *rows, (line, error) = read_rows(file)
        assert isinstance(error, DataError), name
        assert "restore the file" in str(error) or "not JSON" in str(error)
        assert line >= len(rows)
    packed = gzip.compress(b'{"n": 1}' * 1000)
    (tmp_path / "c.jsonl.gz").write_bytes(packed[:12] + b"\xff" * 9 + packed[21:])
    for name in ("b.jsonl.gz", "b.jsonl.zst", "b.parquet", "c.jsonl.gz"):
        if name.startswith("b"):
            (tmp_path / name).write_text("plain text")
        ((line, error),) = read_rows(tmp_path / name)
        assert line == 1
        assert "cannot be read from here on" in str(error)


def test_a_zst_file_cut_between_rows_is_noticed_and_several_frames_are_one_file(tmp_path):
    file, packer = tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compressobj()
    file.write_bytes(packer.compress(b'{"n": 1}\n') + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    *_, (_, error) = read_rows(file)
    assert "cannot be read from here on (Truncated" in str(error)
    file.write_bytes(zstandard.compress(b'{"n": 1}\n') + zstandard.compress(b'{"n": 2}\n'))
    assert list(read_rows(file)) == [(1, {"n": 1}), (2, {"n": 2})]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_cut_anywhere_is_not_whole_and_a_damaged_one_stops_no_reading(tmp_path, name):
    file = write(tmp_path / name, rows=[{"n": n, "text": "x" * (n % 7)} for n in range(200)])
    packed = file.read_bytes()
    for at in range(1, len(packed)):
        file.write_bytes(packed[:at])
        assert isinstance(list(read_rows(file))[-1][1], DataError), at
        file.write_bytes(packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :])
        assert all(isinstance(row, (dict, DataError)) for _, row in read_rows(file))


def test_a_parquet_row_that_cannot_be_had_is_named_and_the_next_is_read(tmp_path, monkeypatch):
    dates = pyarrow.array([1, 2**62, 2], pyarrow.timestamp("us"))
    ends = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, ends, pyarrow.py_buffer(b"a\xffb")])
    for column in (dates, text, pyarrow.array(["a", "b" * 99, "c"])):
        monkeypatch.setattr(reader, "LINE_LIMIT", 50)
        pyarrow.parquet.write_table(pyarrow.table({"x": column}), tmp_path / "a.parquet")
        got = list(read_rows(tmp_path / "a.parquet"))
        assert [line for line, _ in got] == [1, 2, 3]
        assert [line for line, row in got if isinstance(row, DataError)] == [2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_reading_goes_on_after_any_row_of_any_kind_of_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reader, "LINE_LIMIT", 60)
    rows = [{"text": "你好" * (n % 5)} for n in range(40)]
    rows[7], rows[8] = {"text": "x" * 70}, {"text": "x" * 47}
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name, row_group_size=6)
    elif name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows[:20])[:-1] + ",\n" + json.dumps(rows[20:])[1:])
    else:
        lines = "\r\n \n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
        (tmp_path / name).write_bytes(packed(b"\xef\xbb\xbf" + lines.encode()))

    def plain(found):
        return [(mark, str(raw)) for mark, raw in found]

    whole = plain(read_from(tmp_path / name, Mark()))
    assert [mark.rows for mark, _ in whole] == [*range(1, 41)]
    assert "longer than" in whole[7][1]
    assert [(mark.line, raw) for mark, raw in whole] == plain(read_lines(tmp_path / name))
    for rows, (mark, _) in enumerate(whole, 1):
        assert plain(read_from(tmp_path / name, mark)) == whole[rows:], mark


def test_what_lies_before_a_mark_is_not_read(tmp_path, monkeypatch):
    split, groups = [], []
    monkeypatch.setattr(reader, "split_lines", lambda stream, line, byte: split.append((stream.read(), line)) or [])
    list(read_from(write(tmp_path / "a.jsonl", [{"n": n} for n in range(9)]), Mark(rows=7, line=7, byte=7 * 9)))
    assert split == [(b'{"n": 7}\n{"n": 8}\n', 7)]
    pyarrow.parquet.write_table(pyarrow.table({"n": range(9)}), tmp_path / "a.parquet", row_group_size=3)
    iterate = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda file, row_groups, **settings: groups.extend(row_groups) or iterate(file, row_groups=row_groups),
    )
    assert list(read_from(tmp_path / "a.parquet", Mark(rows=7, line=7))) == [
        (Mark(8, 8), b'{"n": 7}'),
        (Mark(9, 9), b'{"n": 8}'),
    ]
    assert groups == [2]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_cut_short_before_a_mark_says_so(tmp_path, name):
    file = write(tmp_path / name, [{"n": n} for n in range(100_000)])
    *_, (mark, _) = read_from(file, Mark())
    file.write_bytes(file.read_bytes()[:-2000])
    ((after, error),) = read_from(file, mark)
    assert isinstance(error, Unreadable)
    assert after.line == 100_001
    assert "cannot be read from here on" in str(error)


def test_a_line_of_200_mb_is_refused_in_bounded_memory(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from component.data.reader import read_rows
        def highest():  # of this program alone; ru_maxrss begins with that of the process that started it
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = highest()
        for line, row in read_rows(Path(sys.argv[1])):
            print(line, row)
        print((highest() - before) // 1024)
    """
    for name, head, tail in (("a.jsonl", b"", b'{"n": 2}\n'), ("a.json", b"[", b',\n{"n": 2}]')):
        file = tmp_path / name
        with file.open("wb") as out:
            out.write(head + b'{"a": "')
            for _ in range(200):
                out.write(b"x" * 1_000_000)
            out.write(b'"}' + (b"\n" if name == "a.jsonl" else b"") + tail)
        done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True)
        first, second, grown = done.stdout.splitlines()
        assert first == "1 longer than 16 MiB; split the row, or end rows with a newline"
        assert second == "2 {'n': 2}"
        assert int(grown) < 100, f"{name}: {grown} MiB"


def test_a_path_a_folder_a_glob_and_a_list_name_files(tmp_path):
    for name in ("b.jsonl", "a.json", "sub/c.jsonl.gz", "notes.txt", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    names = lambda source: [str(file.relative_to(tmp_path)) for file in find_files(source)]  # noqa: E731
    assert names(tmp_path) == ["a.json", "b.jsonl", "odd[1].jsonl", "sub/c.jsonl.gz"]
    assert names(str(tmp_path / "*.json*")) == ["a.json", "b.jsonl", "odd[1].jsonl"]
    assert names(tmp_path / "odd[1].jsonl") == ["odd[1].jsonl"]
    assert names([tmp_path / "b.jsonl", tmp_path]) == ["b.jsonl", "a.json", "odd[1].jsonl", "sub/c.jsonl.gz"]
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    assert len(find_files(str(tmp_path / "**/*.jsonl*"))) == 3
    assert names([tmp_path / "b.jsonl", tmp_path / "sub/loop/b.jsonl"]) == ["b.jsonl"]
    for source, fault in (
        ([], "no file is named"),
        (tmp_path / "gone.jsonl", "no such file"),
        (tmp_path / "notes.txt", "unknown kind of file; expected one of .jsonl"),
        (tmp_path / "*.parquet", "no file there"),
    ):
        with pytest.raises(DataError, match=fault):
            find_files(source)


def test_hidden_files_and_folders_within_a_folder_are_left_out_and_said_once(tmp_path, log):
    for name in (
        "a.jsonl",
        ".b.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "sub/.cache/deep/c.json",
        "sub/d.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    for _ in range(2):
        assert [file.name for file in find_files(tmp_path)] == ["a.jsonl", "d.json"]
    said = [line for line in log if "left out" in line]
    assert len(said) == 1
    assert f"{tmp_path}: 3 files are left out" in said[0]
    hidden = tmp_path / ".ipynb_checkpoints"
    assert [file.name for file in find_files(hidden)] == ["a-checkpoint.jsonl"], "whoever names it means it"
    assert find_files(tmp_path / ".b.jsonl") == [tmp_path / ".b.jsonl"]
    (tmp_path / "sub/d.json").unlink()
    with pytest.raises(DataError, match="no file there"):
        find_files(tmp_path / "sub")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf_16_is_named_with_or_without_a_bom(tmp_path, name, encoding):
    text = json.dumps(ROWS if name.endswith(".json") else ROWS[1], ensure_ascii=False).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    ((line, fault),) = read_rows(tmp_path / name)
    assert line == 1
    assert "not UTF-8 but UTF-16" in str(fault)
    assert "save it as UTF-8" in str(fault)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("head", "told"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        ("\n<!DOCTYPE html>\n<html></html>", "a web page, and not the data"),
    ],
)
def test_what_stands_where_data_should_be_is_named(tmp_path, name, head, told):
    (tmp_path / name).write_text(head)
    ((line, fault),) = read_rows(tmp_path / name)
    assert line == 1
    assert told in str(fault)
