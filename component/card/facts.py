"""Facts of a model card: what is recorded of a model's base, data, training and score, checked for its kind.

An adapter may be anybody's, so a record may hold anything: what is not of the expected kind counts as not known.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..run.errors import ArgumentError
from ..run.files import fingerprint
from ..run.manifest import MANIFEST
from ..run.resume import is_digest
from ..trust import find_adapter_weights, is_number, read_model_json

TRAINING = "training"  # key of a final adapter's manifest: its data and figures
SCORE = "score.json"  # beside a final adapter
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
CACHED = re.compile(r"models--([^/]+)/snapshots/[^/]+$")
BITS, DTYPES = (4, 16), ("bfloat16", "float16", "float32")
FORMATS = ("chatglm2", "chatglm3", "firefly", "chat_template")
# Calls that were exact on the small model of docs/quality.md: as trained in 4 bits, and beside its full-precision base.
EXACT_AS_TRAINED, EXACT_BESIDE_FULL = "28.3%", "6.7%"
SCORED = ("decision right", "function right", "call exact", "argument F1", "text exact", "loss per token")
UNRELATED = "loss per token, "  # how figures of unrelated text begin
RECALL = "recall: "  # how a score's note begins that says that the scored rows were learned


def look_up(record: Any, *keys: str) -> Any:
    """A value within nested objects of JSON; None where it is not there."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def number(record: Any, *keys: str) -> int | float | None:
    value = look_up(record, *keys)
    return value if is_number(value) else None


def text(record: Any, *keys: str) -> str | None:
    value = look_up(record, *keys)
    return value if isinstance(value, str) else None


def objects(record: Any, *keys: str) -> list[dict]:
    value = look_up(record, *keys)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def known(value: Any, among: tuple) -> Any:
    return value if isinstance(value, int | str) and value in among else None


def public_name(base: str) -> str | None:
    """A base's name on the hub. None for a folder, unless it lies in the hub's cache: what somebody calls a folder does
    not tell whose model it holds."""
    if found := CACHED.search(os.path.abspath(base)):
        return found[1].replace("--", "/", 1)
    return base if not os.path.isdir(base) and REPOSITORY.fullmatch(base) else None


def describe_base(base: str, record: dict) -> dict:
    """A base's names, without the folders above it."""
    hub, recorded = public_name(base), text(record, "run", "base_model")
    name = hub or Path(os.path.abspath(base)).name
    of_hub = recorded and not is_digest(recorded) and hub == recorded.rpartition(" ")[0]
    revision = recorded.rpartition(" ")[2] if of_hub else None
    return {"name": name, "hub": hub, "place": hub or f"path/to/{name}", "revision": revision}


def describe_adapter(adapter: Path, record: dict) -> dict:
    """How the adapter in a folder is built, and how its base was loaded beside it in training."""
    config, settings = read_model_json(adapter / "adapter_config.json"), look_up(record, "run", "settings")
    targets = config.get("target_modules")
    settings = settings if isinstance(settings, dict) else {}
    return {
        "rank": number(config, "r"),
        "alpha": number(config, "lora_alpha"),
        "dropout": number(config, "lora_dropout"),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else [],
        "dora": config.get("use_dora") is True,
        "rslora": config.get("use_rslora") is True,
        "bits": known(settings.get("base_bits", 4), BITS) if settings else None,  # earlier versions had 4 alone
        "dtype": known(look_up(settings, "compute_dtype"), DTYPES),
    }


def describe_data(record: dict) -> list[dict]:
    """The sources that an adapter was trained on, each with its weight in a mixture, and those it was evaluated on."""
    digests = look_up(record, "run", "data")
    weighted = digests if isinstance(digests, list) else []
    weights = [entry[1] if isinstance(entry, list) and len(entry) == 2 else None for entry in weighted]
    found = []
    for role in ("data", "evaluation"):
        for index, source in enumerate(objects(record, TRAINING, role)):
            files = look_up(source, "files")
            counts = {key: number(source, key) for key in ("rows", "kept", "tokens", "learned")}
            weight = weights[index] if role == "data" and index < len(weights) else None
            found.append(
                counts
                | {"files": [name for name in files if isinstance(name, str)] if isinstance(files, list) else []}
                | {"weight": weight if is_number(weight) else None, "is_evaluation": role == "evaluation"}
            )
    return found


def describe_training(record: dict) -> dict:
    """Settings of a run that shape what it learns, and its figures."""
    run, settings = look_up(record, "run"), look_up(record, "run", "settings")
    factors = [number(settings, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    ranks, max_steps = number(run, "world_size"), number(settings, "max_steps")
    versions = look_up(record, "versions")
    return {
        "steps": number(record, "step"),
        "kept_step": number(record, TRAINING, "step"),
        "epochs": None if max_steps and max_steps > 0 else number(settings, "num_train_epochs"),
        "rows": ranks * factors[0] * factors[1] if None not in (ranks, *factors) else None,
        "ranks": ranks,
        "rate": number(settings, "learning_rate"),
        "schedule": text(settings, "lr_scheduler_type"),
        "warmup": number(settings, "warmup_steps"),
        "longest": number(settings, "max_seq_length"),
        "seed": number(settings, "seed"),
        "format": known(look_up(run, "format", "name"), FORMATS),
        "loss": number(record, TRAINING, "loss"),
        "eval_loss": number(record, TRAINING, "eval_loss"),
        "versions": [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, dict) else [],
    }


def is_chatglm(base: str, record: dict) -> bool:
    """Whether a model needs our classes under its official names."""
    config = Path(base, "config.json")
    of_type = config.is_file() and read_model_json(config).get("model_type") == "chatglm"
    return of_type or text(record, "run", "format", "name") in ("chatglm2", "chatglm3")


def read_record(adapter: Path) -> dict:
    """What an adapter's manifest says; empty for one without a manifest."""
    return read_model_json(adapter / MANIFEST) if (adapter / MANIFEST).is_file() else {}


def carry(record: dict) -> dict:
    """What a manifest says of an adapter that is also true of it under other names: data, figures, versions."""
    return {key: record[key] for key in ("step", "versions", TRAINING) if key in record}


def read_score(adapter: Path) -> dict | None:
    """The main figures of the score beside an adapter; None where there is none, or it is of other weights."""
    try:
        score = json.loads((adapter.parent / SCORE).read_bytes())
        digest = fingerprint([find_adapter_weights(adapter)])
    except (OSError, ValueError, RecursionError, ArgumentError):
        return None
    models = look_up(score, "models")
    if look_up(score, "about", "adapter", "digest") != digest or not isinstance(models, list):
        return None
    models = [model for model in models if isinstance(model, str)]
    figures = [
        {"name": name, "n": number(figure, "n"), "is_share": look_up(figure, "unit") == "%"}
        | {"estimates": [estimate(look_up(figure, "values", model)) for model in models]}
        for key in ("figures", "unrelated_text")
        for figure in objects(score, key)
        if (name := text(figure, "name") or "") in SCORED or name.startswith(UNRELATED)
    ]
    notes = look_up(score, "notes")
    recall = isinstance(notes, list) and any(str(note).startswith(RECALL) for note in notes)
    return {"models": models, "figures": figures, "recall": recall, "rows": number(score, "rows")} if figures else None


def estimate(value: Any) -> tuple:
    """(value, low, high) of a figure, each None where it is not known."""
    return tuple(number(value, key) for key in ("value", "low", "high"))
