"""Keys of older programs and of transformers' earlier releases, to what they are called now."""

from typing import Any

from loguru import logger

from ..run.errors import ArgumentError

# Keys of older transformers: to their new name, or to None where nothing depends on them any more.
RENAMED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # a fraction of all steps where it is below 1
    "save_safetensors": None,  # always
    "fp16_backend": None,
    "fp16_opt_level": None,
    "half_precision_backend": None,
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "ray_scope": None,
    "tpu_num_cores": None,
    "tpu_metrics_debug": None,
    "use_legacy_prediction_loop": None,
    "use_mps_device": None,
    "use_ipex": None,
    "jit_mode_eval": None,
    "past_index": None,
    "mp_parameters": None,
    "sharded_ddp": None,
    "dispatch_batches": None,
    "split_batches": None,
    "include_inputs_for_metrics": None,
    "include_tokens_per_second": None,  # always reported
    "include_num_input_tokens_seen": None,
    "deepspeed": None,  # a 4-bit base with LoRA needs no sharding
    "gradient_checkpointing_kwargs": None,
    "activation_checkpointing_kwargs": None,
}
CHECKPOINTING_KEYS = ("activation_checkpointing", "gradient_checkpointing")
RENAMED_OPTIMIZERS = {"adamw_hf": "adamw_torch"}


def translate(values: dict[str, Any], known: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Old keys to their replacements, each logged.

    Returns:
        (settings, environment variables that the keys stand for now).

    Raises:
        ArgumentError: two keys say one thing.
    """
    origins: dict[str, str] = {}
    translated: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for key, value in values.items():
        now = renamed(key, value, known)
        for name, new in now.items():
            if name.isupper():
                logger.info(f"{source}: {key} is now the environment variable {name}, which is set")
                environment[name] = str(new)
            elif name in origins:
                raise ArgumentError(f"{source}: {origins[name]} and {key} are one setting; keep one")
            else:
                origins[name], translated[name] = key, new
        if not now:
            logger.info(f"{source}: {key} has no effect here and is ignored")
        elif key not in now and not any(map(str.isupper, now)):
            logger.info(f"{source}: {key} is now called {' and '.join(now)}")
    return translated, environment


def renamed(key: str, value: Any, known: dict[str, Any]) -> dict[str, Any]:
    """What a key is now, with values of now. A name in capitals is an environment variable's; none has no effect."""
    if key == "group_by_length" and isinstance(value, bool):
        return {"train_sampling_strategy": "group_by_length" if value else "random"}
    if key in CHECKPOINTING_KEYS and isinstance(value, bool):  # transformers' setting, under both its names
        return {CHECKPOINTING_KEYS[0]: "full" if value else "none"}
    if key == "hub_token" and isinstance(value, str):
        return {"HF_TOKEN": value}  # which no settings are saved or shown with
    if key == "pack_to":
        return rows_of_pack_to(value)
    if key == "optim" and isinstance(value, str):
        return {key: RENAMED_OPTIMIZERS.get(value, value)}
    if key in RENAMED_KEYS and (key not in known or RENAMED_KEYS[key] is None):
        return {RENAMED_KEYS[key]: value} if RENAMED_KEYS[key] else {}
    return {key: value}


def rows_of_pack_to(value: Any) -> dict[str, Any]:
    """The settings that `pack_to` of earlier versions is: its 0 meant padded batches, any other value a length."""
    padded = type(value) is int and value == 0
    return {"packing": not padded, "packing_length": None if padded else value}
