"""Keys of older programs and of transformers' earlier releases, to what they are called now."""

import os
from typing import Any

from loguru import logger

from .schema import ArgumentError

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


def translate(values: dict[str, Any], known: dict[str, Any], source: str) -> dict[str, Any]:
    """Old keys to their replacements, each logged. A key that says two things is an error."""
    origins: dict[str, str] = {}
    translated = {}
    for key, value in values.items():
        if key == "group_by_length" and isinstance(value, bool):
            target, value = "train_sampling_strategy", "group_by_length" if value else "random"
        elif key in CHECKPOINTING_KEYS and isinstance(value, bool):  # transformers' setting, under both its names
            target, value = CHECKPOINTING_KEYS[0], "full" if value else "none"
        elif key == "hub_token" and isinstance(value, str):
            target = "HF_TOKEN"  # which no settings are saved or shown with
        elif key in RENAMED_KEYS and (key not in known or RENAMED_KEYS[key] is None):
            target = RENAMED_KEYS[key]
        else:
            target = key
        if key == "optim" and isinstance(value, str):
            value = RENAMED_OPTIMIZERS.get(value, value)
        if target is None:
            logger.info(f"{source}: {key} has no effect here and is ignored")
        elif target.isupper():
            logger.info(f"{source}: {key} is now the environment variable {target}, which is set")
            os.environ[target] = str(value)
        elif target in origins:
            raise ArgumentError(f"{source}: {origins[target]} and {key} are one setting; keep one")
        else:
            if target != key:
                logger.info(f"{source}: {key} is now called {target}")
            origins[target], translated[target] = key, value
    return translated
