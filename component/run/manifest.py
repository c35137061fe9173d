"""A folder's manifest: sizes and hashes of its files, by which damage is seen."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MANIFEST = "manifest.json"
CARD = "README.md"  # of a model, which its owner may write anew
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
ON_CARDS, NOT_THERE = ("triton", "nvidia-cudnn-frontend"), "none"  # libraries that need not be there


class Damaged(Exception):
    """Raised for a folder that differs from its manifest, or has none."""


def seal(folder: Path, facts: dict) -> None:
    """Add a manifest of `facts` and of every file's size and sha256 but the card's, with its own checksum. Nothing is
    synced yet."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, paths)
        files = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    manifest = facts | {"files": files}
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}, indent=1), encoding="utf-8")
    for file in paths:  # safetensors lets only the owner read its files
        file.chmod(path.stat().st_mode)


def verify(folder: Path, name: str | None = None, deep: bool = True) -> dict:
    """Compare a folder with its manifest, and return that. Without `deep`, contents of files are not read.

    Args:
        name: the name under which the folder was sealed.

    Raises:
        Damaged: it differs from its manifest, or has none.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed = manifest.pop("checksum")
        if claimed != checksum(manifest):
            raise ValueError
        files = {folder / name: (int(facts["size"]), facts["sha256"]) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} is damaged") from None
    if name and manifest.get("name", name) != name:
        raise Damaged(f"it is a copy of {manifest['name']}")
    for path, (size, _) in files.items():
        if not os.path.isfile(path):  # also for a name that no file can have
            raise Damaged(f"{path.name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}")
    if deep:
        with ThreadPoolExecutor() as pool:
            for path, digest in zip(files, pool.map(sha256, files), strict=True):
                if digest != files[path][1]:
                    raise Damaged(f"{path.name} has other contents than were written")
    return manifest


def checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)


def versions() -> dict[str, str]:
    found = {library: version(library) for library in LIBRARIES}
    for library in ON_CARDS:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return dict.fromkeys(ON_CARDS, NOT_THERE) | found
