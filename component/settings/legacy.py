"""Translation of older transformers' keys, of our own older keys and of other programs' keys to today's settings."""

import json
import math
from collections.abc import Callable
from typing import Any

from loguru import logger

from ..run.errors import ArgumentError
from . import fields, foreign
from .schema import is_a, name_type, show

# Keys of older transformers that only have another name now. A name in capitals is an environment variable.
RENAMED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "hub_token": "HF_TOKEN",  # a variable, since settings are saved and shown
}
GONE = "transformers has no such setting any more"
WITHOUT_EFFECT = {
    **fields.WITHOUT_EFFECT,
    **foreign.WITHOUT_EFFECT,
    **dict.fromkeys(("fp16_backend", "fp16_opt_level", "half_precision_backend", "ray_scope", "tpu_num_cores"), GONE),
    **dict.fromkeys(("tpu_metrics_debug", "use_legacy_prediction_loop", "use_mps_device", "use_ipex"), GONE),
    **dict.fromkeys(("jit_mode_eval", "past_index", "mp_parameters", "sharded_ddp", "dispatch_batches"), GONE),
    **dict.fromkeys(("split_batches", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), GONE),
    **dict.fromkeys(("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"), fields.UNPUSHED),
    "include_inputs_for_metrics": fields.EVALUATES,
    "include_tokens_per_second": "tokens/s are always reported",
    "save_safetensors": "weights are always saved as safetensors",
}
REFUSED = fields.REFUSED | foreign.ELSEWHERE | {"torchdynamo": fields.COMPILED}
ALL_STEPS = math.nextafter(1, 0)  # a share of the steps that rounds up to all of them; 1 would mean one step


def to_warmup_steps(ratio: float) -> dict[str, Any]:
    """Turn a share of all steps into `warmup_steps`, which below 1 means such a share."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"warmup_ratio must be from 0 to 1, got {show(ratio)}; give a number of steps as warmup_steps")
    return {"warmup_steps": ALL_STEPS if ratio == 1 else ratio}


def to_checkpointing(on: bool) -> dict[str, Any]:
    return {"activation_checkpointing": "full" if on else "none"}


def rows_of_pack_to(value: int) -> dict[str, Any]:
    """Translate `pack_to` of earlier versions, where 0 meant padded batches and any other value a row's length."""
    return {"packing": value != 0, "packing_length": value or None}


# Keys whose values are written differently now: the old value's type, and the function that makes settings of it. If
# the key exists today too, a value of another type is taken for today's.
CONVERTED: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    **foreign.CONVERTED,
    "activation_checkpointing": (bool, to_checkpointing),
    "gradient_checkpointing": (bool, to_checkpointing),
    "group_by_length": (bool, lambda on: {"train_sampling_strategy": "group_by_length" if on else "random"}),
    "optim": (str, lambda name: {"optim": {"adamw_hf": "adamw_torch"}.get(name, name)}),
    "pack_to": (int, rows_of_pack_to),
    "warmup_ratio": (float, to_warmup_steps),
}


def translate(values: dict[str, Any], known: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate older and foreign keys to today's settings, and log a line for each.

    Returns:
        (settings, environment variables to set).

    Raises:
        ArgumentError: a key asks for something that is not supported, or two keys give one setting different values.
    """
    origins: dict[str, str] = {}
    translated: dict[str, Any] = {}
    environment: dict[str, str] = {}
    faults: list[str] = []
    for key, value in values.items():
        try:
            now, remark = translate_key(key, value, known)
        except ValueError as error:
            faults.append(f"{source}: {error}")
            continue
        for name, new in now.items():
            if name.isupper() and name != key:
                environment[name] = str(new)
            elif name in origins and translated[name] != new:
                raise ArgumentError(f"{source}: {origins[name]} and {key} are one setting; keep one")
            else:
                origins[name], translated[name] = key, new
        if remark:
            logger.info(f"{source}: {remark}")
    if faults:
        raise ArgumentError("\n".join(faults))
    return translated, environment


def decide_base_bits(values: dict[str, Any], asked: dict[str, Any]) -> None:
    """Set `base_bits` where only the kind of adapter says it: `lora`, in programs whose other word is qlora, means a
    base that is not rounded.

    Args:
        values: today's settings, which may have `base_bits` already.
        asked: keys of file and command line as they were written.
    """
    by = [key for key, plain in foreign.UNROUNDED.items() if key in asked and asked[key] == plain]
    rounding = [key for key in foreign.KINDS if asked.get(key) == "qlora"]
    if by and not rounding and "base_bits" not in values:
        values["base_bits"] = 16
        logger.info(
            f"{by[0]}={as_json(asked[by[0]])} is base_bits=16 here, since no key rounds the base; "
            "base_bits=4 takes about a quarter of its memory"
        )
    if rounding and values.get("base_bits") == 16:
        logger.warning(f'{rounding[0]}="qlora" rounds the base, but base_bits=16 wins: it is not rounded')


def hint_of(key: str, known: dict[str, Any]) -> Any:
    """Type hint of the value of a key, be it today's, older or foreign; Any for an unknown key."""
    if key in known:
        return known[key]
    return CONVERTED[key][0] if key in CONVERTED else known.get((RENAMED_KEYS | foreign.RENAMED).get(key), Any)


def translate_key(key: str, value: Any, known: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Translate one key: (today's settings, a remark for the log, empty where nothing changed).

    Raises:
        ValueError: the key asks for something that is not supported. The text says why, and what to use instead.
    """
    if key in REFUSED:
        if value:
            raise ValueError(f"{key} is not supported: {REFUSED[key]}")
        return {}, ""
    if key in WITHOUT_EFFECT:
        return {}, f"{key} has no effect here and is ignored: {WITHOUT_EFFECT[key]}"
    if key in foreign.ALWAYS:
        always, why = foreign.ALWAYS[key]
        if value is not None and value not in always:
            raise ValueError(f"{key}={as_json(value)} is not supported: {why}")
        return {}, f"{key}={as_json(value)} is always so here: {why}" if value is not None else ""
    if key in CONVERTED and (key not in known or is_a(value, CONVERTED[key][0])):
        return convert(key, value)
    if key in RENAMED_KEYS | foreign.RENAMED and value is not None:
        name = (RENAMED_KEYS | foreign.RENAMED)[key]
        if name.isupper():
            if not isinstance(value, str):
                raise ValueError(f"{key} must be text or null, got {type(value).__name__}")
            return {name: value}, f"{key} is now the environment variable {name}, which is set"
        return {name: value}, f"{key} is now called {name}" if key in RENAMED_KEYS else f"{key} is called {name} here"
    return ({}, "") if key in foreign.RENAMED else ({key: value}, "")


def convert(key: str, value: Any) -> tuple[dict[str, Any], str]:
    """Translate a key of CONVERTED: (today's settings, a remark for the log, empty where nothing changed)."""
    hint, to_settings = CONVERTED[key]
    if value is None:
        return {}, ""
    if not is_a(value, hint):
        raise ValueError(f"{key} must be {name_type(hint)}, got {show(value)}")
    now = to_settings(value)
    if now == {key: value}:
        return now, ""
    written = " and ".join(f"{name}={as_json(new)}" for name, new in now.items())
    return now, f"{key}={as_json(value)} is {written} here" if now else f"{key}={as_json(value)} has no effect here"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
