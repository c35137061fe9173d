"""What becomes of those fields of TrainingArguments that are not simply handed on. Standard library only.

A field that stands in no table here, nor in `legacy`, takes effect: tests/component/settings/test_fields.py says for
each how that is seen, and fails for one that a new release brings.
"""

from typing import Literal

# What the dataset, the loss, the trainer and an exact continuation rely on.
FIXED = {
    "average_tokens_across_devices": True,  # the loss is over the learned tokens of all processes
    "dataloader_in_order": True,
    "dataloader_persistent_workers": False,  # every epoch has its own order
    "label_names": ["target_mask"],
    "label_smoothing_factor": 0.0,
    "logging_nan_inf_filter": False,  # it hides what stops a run here
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": False,  # the checkpoint's other files hold what is restored
    "skip_memory_metrics": True,
    "use_cache": False,
}

SHARDED = "every process holds the whole 4-bit model; start one for each card with torchrun"
COMPILED = "the fused layers do its work, and it cannot trace them or 4-bit weights; remove it"
EVALUATED = "evaluation computes in compute_dtype, as training does; remove it"
PUBLISHED = "nothing is uploaded; publish final/ yourself when the run is done, by `hf upload`"

# Fields that ask for what is not done here, and why. They may stand there with a value that asks for nothing.
REFUSED = {
    "accelerator_config": "the order of samples and the loss rely on accelerate's defaults; remove it",
    "auto_find_batch_size": "the layout of rows is fitted to the card's memory without it; remove it",
    "bf16_full_eval": EVALUATED,
    "debug": "a loss or gradient that is not finite ends the run and names its rows without it; remove it",
    "enable_jit_checkpoint": "SIGTERM and SIGINT write a checkpoint without it; remove it",
    "fp16_full_eval": EVALUATED,
    "liger_kernel_config": "packed rows go through fused layers of our own; see fused_layers",
    "neftune_noise_alpha": "packed rows do not pass the embedding that it adds noise to; remove it",
    "optim_target_modules": "it is of optimizers for full weights; see target_modules for what the adapter adapts",
    "parallelism_config": SHARDED,
    "push_to_hub": PUBLISHED,
    "save_on_each_node": "output_dir is one folder, which all machines share; remove it",
    "save_only_model": "such a checkpoint cannot be continued; final/ is the adapter alone",
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "use_liger_kernel": "packed rows go through fused layers of our own; see fused_layers",
}

SUMMED = "the adapter's gradients are summed over processes once an update, without DistributedDataParallel"
EVALUATES = "evaluation computes the loss alone and keeps no predictions"
UNPUSHED = "nothing is uploaded"

# Fields that no number depends on here, and why.
WITHOUT_EFFECT = {
    "activation_checkpointing_kwargs": "see activation_checkpointing",
    "batch_eval_metrics": EVALUATES,
    "ddp_broadcast_buffers": SUMMED,
    "ddp_bucket_cap_mb": SUMMED,
    "ddp_find_unused_parameters": SUMMED,
    "ddp_static_graph": SUMMED,
    "deepspeed": SHARDED,
    "do_predict": "there is nothing to predict",
    "do_train": "a run always trains",
    "eval_accumulation_steps": EVALUATES,
    "eval_do_concat_batches": EVALUATES,
    "eval_use_gather_object": EVALUATES,
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "gradient_checkpointing_kwargs": "see activation_checkpointing",
    "hub_always_push": UNPUSHED,
    "hub_model_id": UNPUSHED,
    "hub_private_repo": UNPUSHED,
    "hub_revision": UNPUSHED,
    "hub_strategy": UNPUSHED,
    "include_for_metrics": EVALUATES,
    "include_num_input_tokens_seen": "tokens are always counted",
    "length_column_name": "the lengths of samples are known",
    "local_rank": "torchrun says it",
}

# Fields of which fewer values are possible than their type has.
NARROWED = {
    "metric_for_best_model": Literal["loss", "eval_loss", None],  # all that an evaluation computes
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],  # packed rows are balanced anyway
}
