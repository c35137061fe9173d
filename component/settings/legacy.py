"""Keys of transformers' earlier releases, of our own earlier versions and of other programs, to what they are now."""

import json
import math
from collections.abc import Callable
from typing import Any

from loguru import logger

from ..run.errors import ArgumentError
from . import fields, foreign
from .schema import is_a, name_type, show

# Keys of older transformers that only have another name now. A name in capitals is an environment variable's.
RENAMED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "hub_token": "HF_TOKEN",  # which no settings are saved or shown with
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
ALL_STEPS = math.nextafter(1, 0)  # a fraction of the steps that is rounded up to all of them; 1 itself is one step


def to_warmup_steps(ratio: float) -> dict[str, Any]:
    """A share of all steps as `warmup_steps`, which is one where it is below 1."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"warmup_ratio must be from 0 to 1, got {show(ratio)}; give a number of steps as warmup_steps")
    return {"warmup_steps": ALL_STEPS if ratio == 1 else ratio}


def to_checkpointing(on: bool) -> dict[str, Any]:
    return {"activation_checkpointing": "full" if on else "none"}


def rows_of_pack_to(value: int) -> dict[str, Any]:
    """The settings that `pack_to` of earlier versions is: its 0 meant padded batches, any other value a length."""
    return {"packing": value != 0, "packing_length": value or None}


# Keys whose value is written differently now: the type that it has then, and the function to what it is. A value of
# another type is that of today's key, where there is one.
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
    """Keys of before and of elsewhere to what they are now, each said in a line.

    Returns:
        (settings, environment variables that the keys stand for now).

    Raises:
        ArgumentError: a key asks for what is not here, or two keys say different things of one setting.
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


def hint_of(key: str, known: dict[str, Any]) -> Any:
    """The type of a key's value, also of one that has another name now; Any where it is not known."""
    if key in known:
        return known[key]
    return CONVERTED[key][0] if key in CONVERTED else known.get((RENAMED_KEYS | foreign.RENAMED).get(key), Any)


def translate_key(key: str, value: Any, known: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a key is now, and a remark, or none where it is what it was.

    Raises:
        ValueError: the key asks for what is not here. The text says why, and what there is instead.
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
        return {}, f"{key} has no effect here: {why}"
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
    """What CONVERTED makes of a key, and a remark."""
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
