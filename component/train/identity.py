"""The identity of a run: everything that decides its numbers, as JSON. Runs of the same identity are the same run."""

import dataclasses
import json
from pathlib import Path

from ..data.chat_template import control_changes_text
from ..data.reader import find_files
from ..run.files import fingerprint
from ..settings.legacy import rows_of_pack_to
from ..settings.optimization import FOLLOWING_EVALUATIONS
from ..trust import find_adapter, find_adapter_weights, identify_base

# Settings on which no trained number depends, besides those whose names start with one of BEGINNINGS.
WITHOUT_EFFECT = {
    "batch_eval_metrics",
    "cache_dir",
    "cache_size_limit",
    "dataloader_num_workers",
    "dataloader_multiprocessing_context",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "debug",
    "disable_tqdm",
    "greater_is_better",
    "include_for_metrics",
    "accelerator_config",
    "local_rank",
    "max_bad_share",
    "max_skipped_updates",
    "metric_for_best_model",
    "on_bad_row",
    "output_dir",
    "overwrite_output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "preprocessing_workers",
    "project",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_despite_changes",
    "resume_from_checkpoint",
    "run_name",
    "score_at_end",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
}
BEGINNINGS = ("ddp_", "logging_", "log_", "eval_", "save_", "hub_", "trackio_", "do_")
# Settings that describe_run describes by content.
ELSEWHERE = {"train_file", "model_name_or_path", "adapter_name_or_path", "data_format", "chat_template"}

# How data_format chat_template encodes control tokens that are written in a text. Earlier versions knew one way.
APART, WITHIN = "encoded apart", "encoded with the text around them"


def describe_run(args, training_args, data_format: str, tokenizer) -> dict:
    """The identity of a run: its settings, and digests of data, format, base model and adapter.

    Args:
        args: QLoRAArguments.
        training_args: transformers.TrainingArguments.
    """
    settings = training_args.to_dict() | dataclasses.asdict(args)
    settings["fused_layers"] = args.packing and args.fused_layers  # padded batches have no fused layers
    settings["stream_order"] = "blocks" if args.streaming else None
    skipped, beginnings = WITHOUT_EFFECT | ELSEWHERE, BEGINNINGS
    follows = training_args.lr_scheduler_type in FOLLOWING_EVALUATIONS or training_args.load_best_model_at_end
    if args.eval_file and follows:
        skipped -= {"metric_for_best_model", "greater_is_better"}
        beginnings = tuple(beginning for beginning in BEGINNINGS if beginning != "eval_")
        settings["eval_file"] = describe_data(args.eval_file, streaming=False)
    decisive = {key: value for key, value in settings.items() if key not in skipped and not key.startswith(beginnings)}
    return {
        "settings": json.loads(json.dumps(decisive, default=str)),
        "world_size": training_args.world_size,
        "data": describe_data(args.train_file, args.streaming),
        "format": describe_format(data_format, tokenizer),
        "base_model": identify_base(args.model_name_or_path),
        "adapter": describe_adapter(args),
    }


def describe_machine(args, training_args, tokenizer) -> dict:
    """What must be the same on all machines of a run. Arguments are as for `describe_run`."""
    # transformers sets these by the machine.
    settings = training_args.to_dict() | dataclasses.asdict(args) | {"local_rank": None, "disable_tqdm": None}
    model = {
        "weights or config.json": identify_base(args.model_name_or_path),
        "tokenizer": describe_tokenizer(tokenizer),
    }
    data = {"train_file": describe_data(args.train_file, streaming=True)} if args.streaming else {}
    adapter = {"weights of adapter_name_or_path": describe_adapter(args)}
    return settings | {f"{part} of model_name_or_path": digest for part, digest in model.items()} | adapter | data


def renew_identity(identity: dict) -> dict:
    """Translate an identity that an earlier version wrote to the names that settings have now."""
    settings = dict(identity["settings"])
    if "pack_to" in settings:
        settings |= rows_of_pack_to(settings.pop("pack_to"))
        settings["fused_layers"] = settings["packing"]
    settings.setdefault("base_bits", 4)
    settings.setdefault("stream_order", "a buffer" if settings.get("streaming") else None)
    renewed = identity | {"settings": settings, "adapter": identity.get("adapter")}
    described = identity.get("format", {})
    if described.get("name") == "chat_template":
        renewed["format"] = {"control_tokens_in_texts": APART} | described
    return renewed


def describe_data(source: str | list[str] | dict[str, float], streaming: bool) -> list | str:
    """Digest of the files' contents. Of a stream, which may be too large to read twice, only names and sizes count. A
    mixture becomes a list of [digest, weight]."""
    if isinstance(source, dict):
        return [[describe_data(part, streaming), weight] for part, weight in source.items()]
    files = find_files(source)
    return fingerprint([f"{file.name} {file.stat().st_size}" for file in files] if streaming else files)


def describe_format(data_format: str, tokenizer) -> dict[str, str]:
    described = {"name": data_format, "tokenizer": describe_tokenizer(tokenizer)}
    if data_format == "chat_template":
        described["control_tokens_in_texts"] = APART if control_changes_text(tokenizer) else WITHIN
    return described


def describe_tokenizer(tokenizer) -> str:
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str()
    else:
        named = [getattr(tokenizer, name, None) for name in tokenizer.vocab_files_names]
        model = fingerprint([Path(name) for name in named if name and Path(name).is_file()])
        model += json.dumps(sorted(tokenizer.get_vocab().items()))
    return fingerprint([model, json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], default=str)])


def describe_adapter(args) -> str | None:
    """Digest of the weights that the run's adapter begins with; None for a new adapter."""
    name = args.adapter_name_or_path
    return name and fingerprint([find_adapter_weights(find_adapter(name))])
