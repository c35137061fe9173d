"""Archives of torch's are opened without being read, and only where they hold plain tensors."""

import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from component import pickles
from component.pickles import open_pickle
from component.run.errors import ArgumentError

WEIGHT = torch.arange(100.0).reshape(10, 10)
SHAPE = b"K\nK\n\x86"  # (10, 10), as pickled


def rewrite(file: Path, find: bytes = b"", replace: bytes = b"", compression=zipfile.ZIP_STORED) -> None:
    """An archive of WEIGHT, whose pickle is changed in one place."""
    torch.save({"a": WEIGHT}, file)
    with zipfile.ZipFile(file) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            assert find in data or not name.endswith("data.pkl")
            archive.writestr(name, data.replace(find, replace, 1) if name.endswith("data.pkl") else data)


def overlap(file: Path) -> None:
    """Two storages, the second of which begins within the first, by the archive's own list of its entries."""
    torch.save({"a": WEIGHT, "b": torch.ones(200)}, file)
    with zipfile.ZipFile(file) as archive:
        first, second = (archive.getinfo(f"{file.stem}/data/{i}").header_offset for i in (0, 1))
    data = file.read_bytes()
    place = data.rindex(struct.pack("<I", second))
    file.write_bytes(data[:place] + struct.pack("<I", first) + data[place + 4 :])


FAULTS = {
    "compressed": (lambda file: rewrite(file, compression=zipfile.ZIP_DEFLATED), "its entries are compressed"),
    "cut off": (
        lambda file: [torch.save({"a": WEIGHT}, file), file.write_bytes(file.read_bytes()[:-50])],
        "no whole zip archive",
    ),
    "empty": (Path.touch, "no whole zip archive"),
    "the old format": (
        lambda file: torch.save({"a": WEIGHT}, file, _use_new_zipfile_serialization=False),
        "no whole zip archive",
    ),
    "another zip": (
        lambda file: zipfile.ZipFile(file, "w").writestr("x", b""),
        "no archive of weights: 0 data.pkl",
    ),
    "a foreign class": (lambda file: torch.save({"a": WEIGHT, "b": Path("x")}, file), "it asks for pathlib.PosixPath"),
    "what the unpickler allows and fills the memory": (
        lambda file: torch.save({"a": bytearray(10)}, file),
        "it asks for __builtin__.bytearray",
    ),
    "a later protocol": (
        lambda file: torch.save({"a": WEIGHT}, file, pickle_protocol=4),
        "torch's restricted unpickler refuses it",
    ),
    "no pickle": (lambda file: rewrite(file, b"\x80\x02", b"\xff\xff"), "cannot be read"),
    "no names": (lambda file: torch.save([WEIGHT], file), "it holds a list"),
    "nested": (lambda file: torch.save({"model": {"a": WEIGHT}}, file), "'model' is a dict"),
    "more rows than are stored": (
        lambda file: rewrite(file, SHAPE, b"J\x00\x00\x10\x00K\n\x86"),
        "torch's restricted unpickler refuses it",
    ),
    "one value for many": (
        lambda file: torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, file),
        "a has the shape (1000000, 1000000), for which its 4 bytes are too few",
    ),
    "overlapping": (overlap, "its tensors overlap one another"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_anything_but_plain_tensors_is_refused_by_the_files_name(tmp_path, fault):
    make, message = FAULTS[fault]
    make(tmp_path / "weights.bin")
    with pytest.raises(ArgumentError) as error:
        open_pickle(tmp_path / "weights.bin")
    assert str(error.value).startswith(f"{tmp_path}/weights.bin: {message}")


def test_tensors_are_opened_with_their_values_and_those_that_share_them(tmp_path):
    file = tmp_path / "weights.bin"
    tied = {"a": WEIGHT, "tied": WEIGHT, "part": WEIGHT[2:4], "turned": WEIGHT.T, "empty": torch.empty(0)}
    saved = OrderedDict(tied, half=WEIGHT.bfloat16(), learned=torch.nn.Parameter(WEIGHT))
    torch.save(saved, file)
    opened = open_pickle(file)
    assert opened.keys() == saved.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in saved.items())
    assert opened["a"].data_ptr() == opened["tied"].data_ptr()


def test_an_archive_is_mapped_and_not_read(tmp_path):
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(2**24)}, file)
    before = resident()
    opened = open_pickle(file)
    assert resident() - before < 2**22
    assert opened["a"].sum() == 2**24


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1"])
def test_a_torch_with_holes_opens_none(tmp_path, monkeypatch, version):
    torch.save({"a": WEIGHT}, tmp_path / "weights.bin")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(pickles.torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ArgumentError, match=f"torch {version} has security holes"):
        open_pickle(tmp_path / "weights.bin")
