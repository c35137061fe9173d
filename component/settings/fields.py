"""Fields of TrainingArguments that are fixed, refused, ignored or narrowed here. Standard library only.

Every field outside these tables and those of `legacy` takes effect. tests/component/settings/test_fields.py shows the
effect of each, and fails for a field that a new release adds.
"""

from typing import Literal

# Values that the dataset, the loss, the trainer and an exact continuation rely on.
FIXED = {
    "average_tokens_across_devices": True,  # the loss is the mean over the learned tokens of all processes
    "dataloader_in_order": True,
    "dataloader_persistent_workers": False,  # every epoch has its own order
    "label_names": ["target_mask"],
    "label_smoothing_factor": 0.0,
    "logging_nan_inf_filter": False,  # the filter hides losses that are not finite, which stop a run
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": False,  # other files of the checkpoint hold these states
    "skip_memory_metrics": True,
    "use_cache": False,
}

SHARDED = "every process holds the whole base; start one for each card with torchrun"
COMPILED = "the fused layers do its work, and it cannot trace them or 4-bit weights; remove it"
EVALUATED = "evaluation computes in compute_dtype, as training does; remove it"
PUBLISHED = "nothing is uploaded; publish final/ yourself when the run is done, by `hf upload`"

# Fields that are refused, and why. A value that asks for nothing (false, null, empty) is accepted.
REFUSED = {
    "accelerator_config": "the order of samples and the loss rely on accelerate's defaults; remove it",
    "auto_find_batch_size": "the layout of rows is fitted to the card's memory without it; remove it",
    "bf16_full_eval": EVALUATED,
    "debug": "a loss or gradient that is not finite ends the run and names its rows without it; remove it",
    "enable_jit_checkpoint": "SIGTERM and SIGINT write a checkpoint without it; remove it",
    "fp16_full_eval": EVALUATED,
    "liger_kernel_config": "packed rows go through fused layers of our own; see fused_layers",
    "neftune_noise_alpha": "packed rows do not pass the embedding that it adds noise to; remove it",
    "optim_target_modules": "only optimizers of full weights use it; target_modules names the layers to adapt",
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

# Fields that are ignored because they change nothing here, and why.
WITHOUT_EFFECT = {
    "activation_checkpointing_kwargs": "see activation_checkpointing",
    "batch_eval_metrics": EVALUATES,
    "dataloader_pin_memory": "an update's token ids are a few hundred KB, which reach the card at once",
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
    "local_rank": "torchrun sets it",
}

# Fields that take fewer values here than their type allows.
NARROWED = {
    "metric_for_best_model": Literal["loss", "eval_loss", None],  # all that an evaluation computes
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],  # packed rows are balanced anyway
}
