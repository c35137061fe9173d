"""Translation of keys of Firefly, LLaMA-Factory, ms-swift, axolotl and TRL. Standard library only."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

EVERY_LINEAR = (["all"], ["all-linear"], ["all_linear"])

# Keys that only have another name here.
RENAMED = {
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "sequence_len": "max_seq_length",
    "chat_template_path": "chat_template",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "dataset_streaming": "streaming",
    "tokenize_num_workers": "preprocessing_workers",
    "preprocessing_num_workers": "preprocessing_workers",
    "dataset_num_proc": "preprocessing_workers",
    "dataset_processes": "preprocessing_workers",
    "lora_r": "lora_rank",
    "lora_dropout_p": "lora_dropout",
    "lora_model_dir": "adapter_name_or_path",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "early_stopping_steps": "early_stopping_patience",
    "early_stop_interval": "early_stopping_patience",
    "hf_hub_token": "HF_TOKEN",
}


def to_data_format(template: str) -> dict[str, Any]:
    """Choose the data format for another program's template: ChatGLM's own, else the tokenizer's chat template."""
    if template.lower() in ("", "default"):
        raise ValueError(
            f"a template {template!r} does not exist here; set data_format to firefly or chat_template instead"
        )
    if template.lower() == "chatml":
        return {"chat_template": "chatml"}
    return {"data_format": template.lower() if template.lower() in ("chatglm2", "chatglm3") else "chat_template"}


def to_target_modules(names: str | list[str]) -> dict[str, Any]:
    """Take layers' names from a list or from text with commas; any program's word for all layers becomes null."""
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    return {"target_modules": None if split in EVERY_LINEAR else split}


def to_compute_dtype(dtype: str) -> dict[str, Any]:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = dtype.removeprefix("torch.")
    return {"compute_dtype": short.get(dtype, dtype)}


def to_too_long(strategy: str) -> dict[str, Any]:
    ours = {"delete": "drop", "drop": "drop", "right": "truncate", "truncation": "truncate", "truncate": "truncate"}
    if strategy not in ours:
        raise ValueError(
            f"{strategy!r} is not done with long rows; set on_too_long to truncate, truncate_left_turns or drop"
        )
    return {"on_too_long": ours[strategy]}


def to_adapter(adapters: str | list[str]) -> dict[str, Any]:
    given = [adapters] if isinstance(adapters, str) else adapters
    if len(given) > 1:
        raise ValueError(f"{', '.join(map(str, given))}: a run begins from one adapter; merge the others into the base")
    return {"adapter_name_or_path": given[0]} if given else {}


def when(**settings: Any) -> Callable[[bool], dict[str, Any]]:
    """Make the converter of a switch: true becomes these settings, false has no effect."""
    return lambda on: settings if on else {}


def rounded_to_4_bits(on: bool) -> dict[str, Any]:
    return {"base_bits": 4 if on else 16}


def to_base_bits(key: str, bits: int | str | bool) -> dict[str, Any]:
    if bits is True or bits in (4, "4", "4bit", "bnb", "nf4", "int4"):
        return {"base_bits": 4}
    if bits is False or str(bits) in ("0", "none", "null", "16"):
        return {"base_bits": 16}
    raise ValueError(f"{key}={json.dumps(bits)} is not supported: {NO_OTHER_BITS}")


# Keys whose values are written differently here: the value's type there, and the function that makes settings of it.
CONVERTED: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    "template_name": (str, to_data_format),
    "template": (str, to_data_format),
    "lora_target": (str | list, to_target_modules),
    "lora_target_modules": (str | list, to_target_modules),
    "target_modules": (Literal["all", "all-linear", "all_linear"] | list, to_target_modules),
    "lora_target_linear": (bool, when(target_modules=None)),
    "adapters": (str | list, to_adapter),
    "torch_dtype": (str, to_compute_dtype),
    "dtype": (str, to_compute_dtype),
    "bnb_4bit_compute_dtype": (str, to_compute_dtype),
    "truncation_strategy": (str, to_too_long),
    "excess_length_strategy": (str, to_too_long),
    "mask_history": (bool, when(loss_on="last")),
    "shuffle_dataset": (bool, lambda on: {} if on else {"train_sampling_strategy": "sequential"}),
    "dataset_shuffle": (bool, lambda on: {} if on else {"train_sampling_strategy": "sequential"}),
    "disable_shuffling": (bool, when(train_sampling_strategy="sequential")),
    "disable_gradient_checkpointing": (bool, when(activation_checkpointing="none")),
    "activation_offloading": (bool, when(activation_checkpointing="offload")),
    "load_in_4bit": (bool, rounded_to_4_bits),
    "use_qlora": (bool, rounded_to_4_bits),
    "q_lora": (bool, rounded_to_4_bits),
    "quantization": (int | str | bool, partial(to_base_bits, "quantization")),
    "quantization_bit": (int | str, partial(to_base_bits, "quantization_bit")),
    "quant_bits": (int | str, partial(to_base_bits, "quant_bits")),
    "eval_file": (str, lambda path: {"eval_file": path or None}),
    "bf16": (str, lambda text: {} if text == "auto" else {"bf16": text}),
    "fp16": (str, lambda text: {} if text == "auto" else {"fp16": text}),
}

# Keys that ask for LoRA beside a base that is not rounded, by the value that does so, unless another key rounds it.
UNROUNDED: dict[str, Any] = {
    **dict.fromkeys(("train_mode", "adapter", "finetuning_type", "train_type", "tuner_type", "sft_type"), "lora"),
    **dict.fromkeys(("use_peft", "use_lora"), True),
    **dict.fromkeys(("quantization_bit", "quant_bits"), None),
}
KINDS = [key for key, value in UNROUNDED.items() if value == "lora"]  # whose value qlora asks for a base in 4 bits

NO_OTHER_BITS = "a base has 4 bits here, or the 16 that it came in; set base_bits to one of them"
FOUR_BITS = "4 bits are always those of bitsandbytes: NF4 with double quantisation"
ADAPTER = "what is trained is a LoRA adapter; base_bits says whether the base beside it is rounded"
TASK = "only supervised fine-tuning on conversations is done"
LEARNED = "only answers and calls are learned; see loss_on"
PLAIN_LORA = "the adapter is plain LoRA, scaled by lora_alpha / lora_rank"

# Keys for what never changes here: the values that agree with it, and why any other is refused.
ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(KINDS, (("lora", "qlora"), ADAPTER)),
    "peft_type": (("lora", "LORA", "qlora"), ADAPTER),
    "use_peft": ((True,), ADAPTER),
    "use_lora": ((True,), ADAPTER),
    "tuner_backend": (("peft",), ADAPTER),
    "load_in_8bit": ((False,), NO_OTHER_BITS),
    "quantization_method": (("bnb", "bitsandbytes"), FOUR_BITS),
    "quant_method": (("bnb", "bitsandbytes"), FOUR_BITS),
    "quantization_type": (("nf4",), FOUR_BITS),
    "bnb_4bit_quant_type": (("nf4",), FOUR_BITS),
    "double_quantization": ((True,), FOUR_BITS),
    "bnb_4bit_use_double_quant": ((True,), FOUR_BITS),
    "use_bnb_nested_quant": ((True,), FOUR_BITS),
    "task_type": (("", "sft", "causal_lm", "CAUSAL_LM"), TASK),
    "lora_task_type": (("CAUSAL_LM",), TASK),
    "stage": (("sft",), TASK),
    "train_on_prompt": ((False,), LEARNED),
    "train_on_inputs": ((False,), LEARNED),
    "completion_only_loss": ((True,), LEARNED),
    "assistant_only_loss": ((True,), LEARNED),
    "loss_scale": (("default",), LEARNED),
    "loss_type": (("nll",), "the loss is the mean negative log-likelihood of the learned tokens"),
    "lora_bias": (("none",), PLAIN_LORA),
    "lora_dtype": (("float32",), "the adapter's weights are always float32"),
    "lora_fan_in_fan_out": ((False,), PLAIN_LORA),
    "init_weights": ((True, "true"), PLAIN_LORA),
}

DATA = "give the data's files in train_file, and those to evaluate on in eval_file"
SPLIT = "give the rows to evaluate on as a file of their own in eval_file"
TURN = "write it as a system turn of the rows (docs/data_format.md)"
TOKENS = "the tokenizer's own tokens are used; change its folder's tokenizer_config.json"
EXTENDED = "only linear layers are adapted, by target_modules; vocabulary and embedding stay as they are"
TRACKED = "give run_name, and the rest by the tracker's environment variables, such as WANDB_PROJECT"
SHARES = "give eval_steps or save_steps below 1, a share of all steps"
PREFERENCE = f"{TASK}, not preference learning"

# Keys for what does not exist here, and what to do instead. A value that asks for nothing (false, null, empty) is
# accepted.
ELSEWHERE = {
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_dir", "dataset_config", "data_path"), DATA),
    **dict.fromkeys(("dataset_train_split", "dataset_text_field", "media_dir", "pretraining_dataset"), DATA),
    **dict.fromkeys(("eval_dataset", "val_dataset", "test_datasets", "dataset_test_split"), DATA),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio"), SPLIT),
    **dict.fromkeys(("max_samples", "max_train_samples"), "write the rows that are wanted to a file of their own"),
    **dict.fromkeys(("mix_strategy", "interleave_probs"), "give train_file as an object of files to their weights"),
    **dict.fromkeys(("system", "default_system"), TURN),
    "chat_template_jinja": "write the template to a file, and name it in chat_template",
    **dict.fromkeys(("eos_token", "pad_token", "special_tokens", "new_special_tokens", "tokens"), TOKENS),
    **dict.fromkeys(("resize_vocab", "additional_target", "lora_modules_to_save", "modules_to_save"), EXTENDED),
    **dict.fromkeys(("use_rslora", "use_dora", "peft_use_rslora", "peft_use_dora", "pissa_init"), PLAIN_LORA),
    **dict.fromkeys(("loraplus_lr_ratio", "lorap_lr_ratio", "use_badam", "use_galore", "use_apollo"), PLAIN_LORA),
    **dict.fromkeys(("relora_steps", "loftq_config", "lora_weight_init"), PLAIN_LORA),
    **dict.fromkeys(("rope_scaling", "rope_theta"), "positions are the model's own; change its config.json"),
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "mlflow_tracking_uri"), TRACKED),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), SHARES),
    **dict.fromkeys(("pref_beta", "beta", "ref_model", "reward_model", "rl", "rlhf_type"), PREFERENCE),
    "create_new_adapter": "an adapter is trained further itself; for a new one beside it, merge it into its base first "
    "(script/merge_lora.py)",
    "resume_only_model": "give the checkpoint's folder as adapter_name_or_path, which takes its weights alone",
    "model_revision": "download that revision, and give its folder as model_name_or_path",
    "tool_format": "data_format decides how tools are written",
    "train_from_scratch": ADAPTER,
    "freeze_trainable_layers": ADAPTER,
}

ATTENTION = "the fastest attention that is available is always used"
CACHED = "rendered data is kept in cache_dir, and rendered again when anything that decides it has changed"
QUIET = "it does not change what is learned"

# Keys that are ignored because they change nothing here, and why.
WITHOUT_EFFECT = {
    **dict.fromkeys(("use_unsloth", "use_unsloth_gc", "enable_liger_kernel"), "fused layers of our own are used"),
    **dict.fromkeys(
        ("flash_attn", "attn_impl", "attn_implementation", "flash_attention", "xformers_attention"), ATTENTION
    ),
    **dict.fromkeys(
        ("sdp_attention", "padding_free", "packing_strategy", "eval_packing", "eval_sample_packing"), ATTENTION
    ),
    **dict.fromkeys(("pad_to_sequence_len", "pad_to_multiple_of"), "packed rows are not padded"),
    **dict.fromkeys(("overwrite_cache", "load_from_cache_file", "dataset_prepared_path", "lazy_tokenize"), CACHED),
    **dict.fromkeys(("preprocessing_batch_size", "ignore_pad_token_for_loss", "low_cpu_mem_usage"), QUIET),
    **dict.fromkeys(("use_fast_tokenizer", "print_param_status", "add_version", "check_model", "use_hf"), QUIET),
    **dict.fromkeys(("use_reentrant_gc", "quantization_device_map", "infer_backend", "upcast_layernorm"), QUIET),
    **dict.fromkeys(("model_type", "tokenizer_type", "is_llama_derived_model"), "the model's config.json says it"),
    "plot_loss": "loss.png is always drawn",
    "trust_remote_code": "a model's own Python is never run",
}
