"""Checks of a folder that somebody else made, before anything in it is loaded (docs/security.md)."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from . import chatglm  # noqa: F401  registers ChatGLM2/3, which are then known to CONFIG_MAPPING
from .pickles import open_pickle
from .run.errors import ArgumentError
from .run.files import POINTER, fingerprint
from .run.hub import require_hub_or_cache
from .run.manifest import MANIFEST, Damaged, verify
from .settings.load import missing_folder, read_json_object

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or their shards by an index; the first that exists is used
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# Kinds of weights that are not opened, unless a file is of WEIGHTS, a shard of these, or of ADAPTER.
UNOPENED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
WHOLE, SAMPLES, BLOCK = 2**26, 16, 2**20  # of a file above WHOLE bytes, SAMPLES blocks of BLOCK bytes are identified
FULL = "take the full checkpoint, which is quantised to 4 bits while it loads, unless base_bits is 16"


def check_model(name_or_path: str, setting: str = "model_name_or_path") -> None:
    """Refuse a base model (folder or hub name) if its files ask for more than to be read, or are not all there.

    Args:
        setting: the one that gives the name.

    Raises:
        ArgumentError: it is an absent folder or an adapter, needs Python of its own, is quantised other than by
            bitsandbytes, is not wholly downloaded, or has weights that are neither safetensors nor plain tensors.
    """
    if fault := missing_folder(name_or_path):
        raise ArgumentError(fault)
    if not Path(name_or_path).is_dir():
        require_hub_or_cache(name_or_path, setting)
    if found := find_model_file(name_or_path, "adapter_config.json"):
        raise ArgumentError(
            f"{found}: this is an adapter, which would load another model; give its base model (to train the "
            "adapter further, give it as adapter_name_or_path)"
        )
    if found := find_model_file(name_or_path, "config.json"):
        check_config(found)
    if Path(name_or_path).is_dir():  # a hub's weights are checked when they are fetched for loading
        weights = find_weights(name_or_path)
        refuse_pointers(Path(name_or_path), weights)
        check_weights(weights)
        if not weights:
            refuse_unopened(Path(name_or_path))


def check_config(file: Path) -> None:
    """Refuse a config.json that asks for Python, for other files or for weights that are not trained here."""
    config = read_model_json(file)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ArgumentError(
            f"{file}: model_type {config.get('model_type')!r} is not known to transformers, and auto_map asks for "
            f"{config['auto_map']!r}; a model's own Python is never run: take a checkpoint for transformers' class"
        )
    tokenizer = file.with_name("tokenizer_config.json")
    if tokenizer.is_file() and read_model_json(tokenizer).get("tokenizer_class") == "ChatGLM4Tokenizer":
        raise ArgumentError(
            f"{tokenizer}: this is GLM-4 as it needs Python of its own, which is never run; take its checkpoint for "
            "transformers' class, such as zai-org/glm-4-9b-chat-hf"
        )
    for key in ("transformers_weights", "configuration_files"):
        if config.get(key):
            raise ArgumentError(f"{file}: {key} is {config[key]!r}, which leads to other files; remove the key")
    if kernel := find_kernel(config):
        raise ArgumentError(f"{file}: {kernel!r} is code from a hub, which is never run; remove the key")
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "bitsandbytes"):
        raise ArgumentError(f"{file}: the base is quantised ({method}), which is not trained or merged here; {FULL}")


def find_weights(name_or_path: str) -> list[Path]:
    """Find the files that a model's weights are loaded from; those of a hub's model are fetched. The list may be empty.

    Raises:
        ArgumentError: some of them are missing, or an index names something else than a file of weights beside it.
    """
    for whole in WEIGHTS:
        index = find_model_file(name_or_path, f"{whole}.index.json")
        shards = read_index(index, Path(whole).suffix) if index else []
        if file := find_model_file(name_or_path, whole):
            return [file]
        found = {shard: find_model_file(name_or_path, shard) for shard in shards}
        missing = [shard for shard, file in found.items() if not file]
        if missing and len(missing) < len(shards):
            raise ArgumentError(
                f"{index}: {missing[0]} is not there, {len(missing)} of {len(shards)} files are missing; the download "
                "is not complete: start it again"
            )
        if shards and not missing:
            return list(found.values())
    return []


def require_weights(name_or_path: str) -> None:
    """Raise ArgumentError for a folder without weights, which will do for looking at data but not for training."""
    if Path(name_or_path).is_dir() and not find_weights(name_or_path):
        raise ArgumentError(
            f"{name_or_path}: there are no weights, neither {WEIGHTS[0]} nor {WEIGHTS[1]} nor all shards of one; "
            "finish the download"
        )


def read_index(index: Path, suffix: str) -> list[str]:
    """Files that an index names. Raises ArgumentError unless each is a plain name that ends with `suffix`."""
    files = read_model_json(index).get("weight_map")
    files = list(files.values()) if isinstance(files, dict) else [files]
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+" + re.escape(suffix), file):
            raise ArgumentError(f"{index}: weight_map names {file!r}; expected a *{suffix} file of the folder")
    return sorted(set(files))


def check_weights(files: list[Path]) -> bool:
    """Check that each file of weights can be opened and holds plain tensors alone; return whether any is a `.bin`."""
    for file in files:
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt").__exit__(None, None, None)
            except (SafetensorError, OSError) as error:
                raise ArgumentError(f"{file}: cut short or damaged ({error}); download it again") from None
    pickles = [file for file in files if file.suffix == ".bin"]
    for file in pickles:
        open_pickle(file)
    return bool(pickles)


def refuse_pointers(folder: Path, weights: list[Path]) -> None:
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".safetensors", *UNOPENED)]
    for file in (*weights, *sorted(others)):
        with open(file, "rb") as head:
            if head.read(len(POINTER)) == POINTER:
                raise ArgumentError(
                    f"{file}: git left a pointer in the file's place; run `git lfs pull` in {folder}, or download the "
                    "model anew"
                )


def refuse_unopened(folder: Path) -> None:
    """Raise ArgumentError if a folder without WEIGHTS holds weights of a kind that is not opened."""
    unopened = sorted(path.name for path in folder.glob("*") if path.suffix in UNOPENED)
    if unopened and unopened[0].endswith(".gguf"):
        raise ArgumentError(f"{folder}: its weights are {unopened[0]}, made for llama.cpp; {FULL}")
    if unopened and not any(folder.glob("*.safetensors")):
        raise ArgumentError(
            f"{folder}: its weights are a pickle ({unopened[0]}), which can run any program and is never opened; take "
            "a *.safetensors, or convert it as docs/security.md shows, on a machine that holds nothing else"
        )


def find_model_file(name_or_path: str, file: str) -> Path | None:
    """Path of one of a model's files, in its folder or fetched from the hub; None where the model has no such file."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
        return folder and Path(folder)
    return folder / file if (folder / file).is_file() else None


def is_at_home(file: Path) -> bool:
    """Whether a file of a model's folder lies in that folder, or in the hub's cache of this model.

    What is copied from a folder that somebody else made must: a link could lead to a private file.
    """
    folder = file.absolute().parent
    cached = folder.parent.name == "snapshots"  # models--OWNER--NAME/snapshots/COMMIT, of links to ../../blobs
    home = folder.parents[1] if cached else folder
    return file.resolve().is_relative_to(home.resolve())


def read_model_file(file: Path, parse: Callable[[str], Any] = str) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{file}: cannot be read ({error}); fetch it again") from None


def read_model_json(file: Path) -> dict:
    values = read_model_file(file, json.loads)
    if not isinstance(values, dict):
        raise ArgumentError(f"{file}: must hold one JSON object; fetch it again")
    return values


def find_kernel(config: dict) -> str | None:
    """Hub repository whose code a configuration, or one within it, names for attention or experts; None without one."""
    for key, value in config.items():
        if isinstance(value, dict) and (kernel := find_kernel(value)):
            return kernel
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            return str(value)
    return None


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# Keys of an adapter's settings: the check of the value, and what is expected. Every other key must have peft's default,
# so that no key can make peft compute, import or match patterns.
ADAPTER_KEYS = {
    "peft_type": (lambda value: value == "LORA", "'LORA'"),
    "task_type": (lambda value: value in ("CAUSAL_LM", None), "'CAUSAL_LM'"),
    "base_model_name_or_path": (lambda value: isinstance(value, str | None), "a folder's or model's name"),
    "peft_version": (lambda value: isinstance(value, str | None), "text"),
    "revision": (lambda value: isinstance(value, str | None), "text"),
    "inference_mode": (lambda value: isinstance(value, bool), "true or false"),
    "r": (lambda value: type(value) is int and value > 0, "a positive integer"),
    "lora_alpha": (lambda value: is_number(value) and value > 0, "a positive number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    "target_modules": (
        lambda value: isinstance(value, list) and value and all(isinstance(name, str) for name in value),
        "a list of layers' names",
    ),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    # The weights come from the file; other values would change the base model.
    "init_lora_weights": (lambda value: isinstance(value, bool) or value == "gaussian", "true, false or 'gaussian'"),
}


def find_adapter(name_or_path: str) -> Path:
    """Find the folder of an adapter. That of a hub's adapter is fetched.

    Raises:
        ArgumentError: there is no such adapter, or it cannot be had.
    """
    if fault := missing_folder(name_or_path):
        raise ArgumentError(fault)
    if not Path(name_or_path).is_dir():
        require_hub_or_cache(name_or_path, "adapter_name_or_path", ("adapter_config.json", ADAPTER[0]))
    try:
        config = find_model_file(name_or_path, "adapter_config.json")
        for weights in ADAPTER:
            if find_model_file(name_or_path, weights):
                break
    except (OSError, ValueError) as error:  # no such repository, no network, or no name for a hub
        raise ArgumentError(f"adapter {name_or_path!r}: {error}") from None
    return config.parent if config else Path(name_or_path)


def check_adapter(folder: Path) -> dict:
    """Check an adapter's manifest if it has one, its settings and its tensors' shapes; no tensor is opened.

    Returns:
        The settings, with peft's defaults for those that an older peft did not write.

    Raises:
        ArgumentError: it is damaged, is no LoRA adapter for a causal language model, or asks for more than its tensors.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        fault = f"{folder}: no adapter_config.json there; give an adapter's folder, such as output/x/final"
        raise ArgumentError(missing_folder(str(folder)) or fault)
    if (folder / MANIFEST).exists():
        try:
            verify(folder)
        except Damaged as damage:
            raise ArgumentError(
                f"{folder}: {damage}; copy it again, or give a checkpoint of the run (if you changed it yourself, "
                f"remove its {MANIFEST})"
            ) from None
    config = read_json_object(str(file))
    defaults = LoraConfig().to_dict()
    for key in ("peft_type", "r", "target_modules", *config):
        value = config.get(key)
        if key not in ADAPTER_KEYS and value and value != defaults.get(key):
            raise ArgumentError(
                f"{file}: {key} is {value!r}, which is not supported; remove the key if training did not use it"
            )
        holds, expected = ADAPTER_KEYS.get(key, (lambda _: True, ""))
        if not holds(value):
            raise ArgumentError(f"{file}: {key} is {value!r}; expected {expected}")
    for name, shape in read_adapter_shapes(folder).items():
        if ".lora_" not in name or ("magnitude" not in name and config["r"] not in shape):
            raise ArgumentError(
                f"{find_adapter_weights(folder)}: {name} of shape {shape} is no part of a LoRA of rank {config['r']}"
            )
    return defaults | config


def read_run(folder: Path) -> dict:
    """What an adapter of ours records of the run that trained it (component.train.identity); empty for any other."""
    run = read_model_json(folder / MANIFEST).get("run") if (folder / MANIFEST).exists() else None
    return run if isinstance(run, dict) else {}


def lasting_name(name_or_path: str) -> str:
    """A base's name that holds wherever a program is started: a folder's absolute path, or a hub's name as it is. A
    link keeps its own name."""
    if not os.path.isdir(name_or_path):
        return name_or_path
    climbs = ".." in Path(name_or_path).parts  # which leads elsewhere after a link
    return os.path.realpath(name_or_path) if climbs else os.path.abspath(name_or_path)


def find_base(folder: Path, config: dict) -> str:
    """The base that an adapter's settings name, a folder.

    The name may be relative to the folder that the run was started in, as earlier versions wrote it, and a project's
    folder may have been moved. So the name, or the last parts of it, are also looked for above the adapter, and taken
    where the folder there holds what the adapter's run records.

    Raises:
        ArgumentError: there is no such folder.
    """
    named = config["base_model_name_or_path"]
    if named and ".." not in Path(named).parts:
        recorded = read_run(folder).get("base_model")
        tails = [os.path.join(*Path(named).parts[-parts:]) for parts in (2, 1)] if os.path.isabs(named) else [named]
        above = [os.path.join(start, tail) for tail in tails for start in folder.absolute().parents]
        for base in dict.fromkeys([named, *above] if recorded else ()):
            if os.path.isfile(os.path.join(base, "config.json")) and identify_base(base) == recorded:
                return base
        if os.path.isdir(named):  # no error for a name that is too long
            return named
    raise ArgumentError(
        f"{folder / 'adapter_config.json'}: base_model_name_or_path is {named!r}, which is no folder here; give the "
        "base with --base, so that nothing but what you name is loaded"
    )


def find_adapter_weights(folder: Path) -> Path:
    """The file that holds an adapter's weights. Raises ArgumentError where there is none."""
    weights = next((folder / name for name in ADAPTER if (folder / name).is_file()), None)
    if not weights:
        raise ArgumentError(f"{folder}: no {' or '.join(ADAPTER)} there; the adapter's weights must be in one of them")
    return weights


def read_adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of an adapter's tensors by name; no tensor is read. Raises ArgumentError."""
    weights = find_adapter_weights(folder)
    refuse_pointers(folder, [weights])
    with faults_of_adapter(weights):
        return read_shapes(weights)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by name. Raises ArgumentError."""
    weights = find_adapter_weights(folder)
    if weights.suffix == ".bin":
        return open_pickle(weights)
    with faults_of_adapter(weights):
        return load_file(weights)


def read_conversation(folder: Path) -> dict[str, str]:
    """Read `chat_template` and `eos_token` from the files of a tokenizer beside an adapter, as far as they have them.

    Several templates by name are left out: they are a base's own, since training gives a tokenizer one at most.

    Raises:
        ArgumentError: a file cannot be read.
    """
    config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    values = read_model_json(config) if config.is_file() else {}
    if isinstance(eos := values.get("eos_token"), dict):
        values["eos_token"] = eos.get("content")
    if template.is_file() and not (folder / "additional_chat_templates").exists():
        values["chat_template"] = read_model_file(template)
    return {name: values[name] for name in ("chat_template", "eos_token") if isinstance(values.get(name), str)}


@contextmanager
def faults_of_adapter(weights: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ArgumentError(f"{weights}: no safetensors file ({error}); fetch or train it again") from None


def read_shapes(weights: Path) -> dict[str, list[int]]:
    """Shapes of a file's tensors by name; no tensor is read. Raises ArgumentError or SafetensorError."""
    if weights.suffix == ".bin":
        return {name: list(tensor.shape) for name, tensor in open_pickle(weights).items()}
    with safe_open(weights, "pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def identify_base(name_or_path: str) -> str:
    """Name and commit of a hub's model, or digest of a folder's configuration and weights (large files by samples)."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        commit = find_model_file(name_or_path, "config.json").parent.name  # a folder of the hub's cache
        return f"{name_or_path} {commit}"
    weights = {*folder.glob("*.safetensors"), *find_weights(name_or_path)}  # torch's .bin, if used
    return fingerprint([folder / "config.json", *map(digest_of, sorted(weights))])


def digest_of(path: Path) -> str:
    """Digest of a file's size and contents. Of a large file, evenly spread blocks are read, from head to tail."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for place in range(SAMPLES):
                file.seek((size - BLOCK) * place // (SAMPLES - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
