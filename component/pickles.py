"""Safe opening of torch's archives (`.bin`), by its restricted unpickler and after checks (docs/security.md)."""

import itertools
import pickletools
import zipfile
from pathlib import Path

import torch

from .run.errors import ArgumentError

SAFE_SINCE = "2.10"  # torch's version; earlier, CVE-2026-24747 and, before 2.6, CVE-2025-32434 lead past weights_only
LARGEST_PICKLE = 2**26  # bytes of names and shapes; those of a 7B model take 100 KB
DTYPES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
# Names that a pickle of tensors imports. torch's unpickler allows more, such as bytearray, which can fill the memory.
GLOBALS = {f"torch.{dtype}Storage" for dtype in DTYPES}
GLOBALS |= {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}


def open_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Open the tensors of a `.bin` file, memory-mapped: their values are read when they are used.

    Raises:
        ArgumentError: the file is anything but a zip archive of named plain tensors that do not overlap.
    """
    if torch.__version__ < SAFE_SINCE:
        raise ArgumentError(
            f"{file}: torch {torch.__version__} has security holes where it opens weights; update it to {SAFE_SINCE}, "
            "or take a *.safetensors"
        )
    if fault := find_fault_of_archive(file):
        raise refusal(file, fault)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive can make torch raise any kind
        raise refusal(file, f"torch's restricted unpickler refuses it ({str(error).strip().splitlines()[0]})") from None
    if fault := find_fault_of_tensors(tensors, file.stat().st_size):
        raise refusal(file, fault)
    return tensors


def refusal(file: Path, fault: str) -> ArgumentError:
    return ArgumentError(f"{file}: {fault}; nothing of it was run. Fetch it again, or take a *.safetensors")


def find_fault_of_archive(file: Path) -> str | None:
    """Fault of an archive, as far as it shows without unpickling; None if there is none."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "its entries are compressed, which torch's never are"
            if sum(entry.file_size for entry in entries) > file.stat().st_size:
                return "its entries are larger than the file"
            if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                return f"no archive of weights: {len(pickles)} data.pkl in it, expected 1 of at most {LARGEST_PICKLE} B"
            foreign = find_foreign_global(archive.read(pickles[0]))
    except zipfile.BadZipFile as error:
        return f"no whole zip archive ({error}): it is damaged, or in torch's older format, which is never opened"
    except (OSError, ValueError, RuntimeError) as error:
        return f"cannot be read ({error})"
    return foreign and f"it asks for {foreign}, which is no part of a tensor"


def find_foreign_global(pickled: bytes) -> str | None:
    """First name that a pickle imports beside GLOBALS, or None. Raises ValueError where it is not well formed."""
    texts = ["?", "?"]
    for operation, value, _ in pickletools.genops(pickled):
        texts += [value] * isinstance(value, str)
        if operation.name in ("GLOBAL", "INST"):
            name = value.replace(" ", ".")
        elif operation.name == "STACK_GLOBAL":
            name = ".".join(texts[-2:])
        elif operation.name.startswith("EXT"):
            name = f"extension {value}"
        else:
            continue
        if name not in GLOBALS:
            return name
    return None


def find_fault_of_tensors(tensors: object, file_size: int) -> str | None:
    """Fault of tensors that are more than names and plain values, overlap or claim more bytes than the file has."""
    if not isinstance(tensors, dict):
        return f"it holds a {type(tensors).__name__}, expected tensors by their names"
    parts = set()  # of the file: (start, bytes)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"{name!r} is a {type(tensor).__name__}, expected a tensor"
        stored = tensor.untyped_storage()
        if tensor.nbytes > stored.nbytes():
            return f"{name} has the shape {tuple(tensor.shape)}, for which its {stored.nbytes():,} bytes are too few"
        parts.add((stored.data_ptr(), stored.nbytes()))
    if any(start + size > following for (start, size), (following, _) in itertools.pairwise(sorted(parts))):
        return "its tensors overlap one another"
    if (claimed := sum(size for _, size in parts)) > file_size:
        return f"its tensors have {claimed:,} bytes, it has {file_size:,}"
    return None
