"""What is refused in a folder that somebody else made, before anything of it is loaded (docs/security.md)."""

import json
import math
import re
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from .run.errors import ArgumentError
from .run.hub import require_hub_or_cache
from .settings.load import missing_folder, read_json_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = "convert it to safetensors as docs/security.md shows, on a machine that holds nothing else"


def check_model(name_or_path: str) -> None:
    """Refuse a base model, a folder or a hub name, whose files ask for more than to be read.

    Raises:
        ArgumentError: it is an absent folder or an adapter, needs Python of its own, names weights that are no
            safetensors, or has none but pickled ones.
    """
    if fault := missing_folder(name_or_path):
        raise ArgumentError(fault)
    if not Path(name_or_path).is_dir():
        require_hub_or_cache(name_or_path)
    if found := find_model_file(name_or_path, "adapter_config.json"):
        raise ArgumentError(f"{found}: this is an adapter, which would load another model; give its base model")
    if found := find_model_file(name_or_path, "config.json"):
        config = read_model_json(found)
        if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
            raise ArgumentError(
                f"{found}: model_type {config.get('model_type')!r} is not known to transformers, and auto_map asks for "
                f"{config['auto_map']!r}; a model's own Python is never run: take a checkpoint for transformers' class"
            )
        for key in ("transformers_weights", "configuration_files"):
            if config.get(key):
                raise ArgumentError(f"{found}: {key} is {config[key]!r}, which leads to other files; remove the key")
        if kernel := find_kernel(config):
            raise ArgumentError(f"{found}: {kernel!r} is code from a hub, which is never run; remove the key")
    if found := find_model_file(name_or_path, "model.safetensors.index.json"):
        files = read_model_json(found).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ArgumentError(f"{found}: weight_map names {file!r}; expected a *.safetensors file of the folder")
    refuse_pickles(Path(name_or_path))


def refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise ArgumentError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run any program and is never opened; "
            f"take a *.safetensors, or {CONVERT}"
        )


def find_model_file(name_or_path: str, file: str) -> Path | None:
    """A file of a folder or of a hub's repository, None where it has none."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
        return folder and Path(folder)
    return folder / file if (folder / file).is_file() else None


def read_model_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{file}: cannot be read ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{file}: must hold one JSON object; fetch it again")
    return values


def find_kernel(config: dict) -> str | None:
    """The hub's repository that a configuration, or one within it, has attention or experts computed by."""
    for key, value in config.items():
        if isinstance(value, dict) and (kernel := find_kernel(value)):
            return kernel
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            return str(value)
    return None


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Every other key must have peft's default, so that none which computes, imports or matches patterns is honoured.
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
    # The weights are in the file; what else can stand here would change the base model.
    "init_lora_weights": (lambda value: isinstance(value, bool) or value == "gaussian", "true, false or 'gaussian'"),
}


def check_adapter(folder: Path) -> dict:
    """The adapter's settings, after they and the shapes of its tensors were checked; no tensor is read.

    Raises:
        ArgumentError: no LoRA adapter for a causal language model in safetensors, or one that asks for more.
    """
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ArgumentError(f"{folder}: no adapter_config.json there; give an adapter's folder, such as output/x/final")
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
    if not weights.is_file():
        refuse_pickles(folder)
        raise ArgumentError(f"{weights}: no such file; the adapter's weights must be there as safetensors")
    try:
        with safe_open(weights, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                shape = tensors.get_slice(name).get_shape()
                if ".lora_" not in name or ("magnitude" not in name and config["r"] not in shape):
                    raise ArgumentError(
                        f"{weights}: {name} of shape {shape} is no part of a LoRA of rank {config['r']}"
                    )
    except SafetensorError as error:
        raise ArgumentError(f"{weights}: no safetensors file ({error}); fetch or train it again") from None
    return config
