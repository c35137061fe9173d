"""One JSON file, and key=value overrides, to checked arguments. transformers is imported only when they are loaded."""

import difflib
import enum
import glob
import importlib.util
import json
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loguru import logger


class ArgumentError(ValueError):
    """A fault in the user's settings. Its text names the file, the key, the value and the remedy."""


def setting(default: Any, help: str, check: Callable[[Any], bool] | None = None, expected: str = "") -> Any:
    return field(default=default, metadata={"help": help, "check": check, "expected": expected})


def one_of(*values: str | None) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in values), f"one of {', '.join(filter(None, values))}"


def is_positive(value: float) -> bool:
    return value > 0


def is_not_negative(value: float) -> bool:
    return value >= 0


@dataclass
class QLoRAArguments:
    """Settings of our own, beside those of Hugging Face TrainingArguments, in the same JSON file."""

    model_name_or_path: str = setting("", "Folder or hub name of the model. Required.", bool, "given")
    train_file: str | list[str] | dict[str, float] = setting(
        "",
        "Data to train on: a file, a folder, a glob, a list of these, or an object of these to their weights in the "
        "mixture. Required.",
        lambda value: bool(value) and (not isinstance(value, dict) or all(map(is_positive, value.values()))),
        "given, and every weight positive",
    )
    eval_file: str | list[str] | None = setting(
        None, "Data to evaluate on during training, after each epoch by default."
    )
    data_format: str | None = setting(
        None,
        "How conversations become tokens: chatglm2, chatglm3, firefly, or chat_template for the tokenizer's own "
        "template. Default: read off model_name_or_path.",
        *one_of(None, "chatglm2", "chatglm3", "firefly", "chat_template"),
    )
    max_seq_length: int = setting(1024, "Longest sample, in tokens.", lambda value: value > 1, "an integer above 1")
    on_too_long: str = setting(
        "truncate",
        "What is done with a longer one: truncate (cut its end), truncate_left_turns (leave out early rounds, never "
        "the system prompt and tools, and cut only the last), or drop.",
        *one_of("truncate", "truncate_left_turns", "drop"),
    )
    loss_on: str = setting(
        "flagged",
        "Which answers and calls are learned: flagged (all but those with loss=false), all, or last.",
        *one_of("flagged", "all", "last"),
    )
    on_bad_row: str = setting(
        "stop",
        "stop: list the first 20 bad rows and exit. skip: write them to rejected.jsonl in output_dir and go on.",
        *one_of("stop", "skip"),
    )
    max_bad_share: float = setting(
        0.1,
        "The run stops where more than this share of the rows is bad or too long to learn from.",
        lambda value: 0 <= value <= 1,
        "a number from 0 to 1",
    )
    strict_roles: bool = setting(
        False, "Unusual rows, such as one that ends on a user turn, count as bad and not only as a warning."
    )
    streaming: bool = setting(
        False, "Read and render rows while training instead of beforehand; needs max_steps. For data above disk size."
    )
    cache_dir: str | None = setting(
        None, "Folder of rendered data. Default: $XDG_CACHE_HOME/luciole or ~/.cache/luciole."
    )
    preprocessing_workers: int | None = setting(
        None,
        "Processes that render the data. Default: one for each core.",
        lambda value: value is None or value > 0,
        "a positive integer",
    )
    pack_to: int | None = setting(
        None,
        "Tokens of a packed row: whole samples one after another, none of which sees another. 0: pad batches instead. "
        "Default: 8192, or less where the card's memory asks for it.",
        lambda value: value is None or value >= 0,
        "0 or a positive integer",
    )
    activation_checkpointing: str = setting(
        "auto",
        "What layers keep for their backward: none (all that is dear to make anew), selective (not the MLP's wide "
        "activations), full (their input alone), offload (that in the host's memory). auto: the fastest that fits.",
        *one_of("auto", "none", "selective", "full", "offload"),
    )
    lora_rank: int = setting(64, "Rank of the low-rank update.", is_positive, "a positive integer")
    lora_alpha: float = setting(
        16, "Scale of the update, which is multiplied by lora_alpha / lora_rank.", is_positive, "a positive number"
    )
    lora_dropout: float = setting(
        0.05, "Dropout on the input of the update.", lambda value: 0 <= value < 1, "at least 0 and below 1"
    )
    target_modules: list[str] | None = setting(
        None,
        "Names of the linear layers to adapt. Default: every linear layer but the output head.",
        lambda value: value is None or value,
        "a list of names, or null for every linear layer",
    )
    compute_dtype: str = setting(
        "auto",
        "Type of the 4-bit layers' arithmetic: auto, bfloat16, float16 or float32. auto: bfloat16 where the card has "
        "it, else float16; float32 without CUDA.",
        *one_of("auto", "bfloat16", "float16", "float32"),
    )
    overwrite_output_dir: bool = setting(
        False,
        "Start anew in an output_dir that holds another run, or this one, done; what is there is moved aside. This "
        "run unfinished is continued, unless resume_from_checkpoint is false.",
    )
    resume_despite_changes: bool = setting(
        False,
        "Continue a run whose settings, data, format, base model or number of processes are not those that it began "
        "with, or from a damaged checkpoint that resume_from_checkpoint names.",
    )
    max_skipped_updates: int = setting(
        0,
        "Updates with a loss or gradient that is not finite that are left out before the run stops.",
        is_not_negative,
        "0 or a positive integer",
    )

    def __post_init__(self):
        for item in fields(self):
            check, value = item.metadata["check"], getattr(self, item.name)
            if check and not check(value):
                raise ValueError(f"{item.name} must be {item.metadata['expected']}, got {show(value)}")
        if self.pack_to and self.pack_to < self.max_seq_length:
            raise ValueError(
                f"pack_to must be 0 or at least max_seq_length={self.max_seq_length}, so that every sample fits a row, "
                f"got {show(self.pack_to)}"
            )


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
COMMAND_LINE = "command line"
CHECKPOINTING_KEYS = ("activation_checkpointing", "gradient_checkpointing")
RENAMED_OPTIMIZERS = {"adamw_hf": "adamw_torch"}

# Bounds that TrainingArguments itself does not check.
POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed")
# They would replace parts that are ours, know nothing of packed rows, or leave what cannot be continued exactly.
UNSUPPORTED = (
    "fsdp",
    "parallelism_config",
    "use_liger_kernel",
    "accelerator_config",
    "auto_find_batch_size",
    "neftune_noise_alpha",
    "enable_jit_checkpoint",
    "save_only_model",
    "push_to_hub",
)

# What the dataset, the loss and the trainer rely on.
FIXED = {
    "remove_unused_columns": False,
    "label_names": ["target_mask"],
    "label_smoothing_factor": 0.0,
    "dataloader_persistent_workers": False,  # they would go through other random numbers than those of a resumed run
    "logging_nan_inf_filter": False,  # it hides what stops a run here
}


def load_arguments(
    train_args_file: str | Path | None, overrides: typing.Sequence[str] = ()
) -> tuple[QLoRAArguments, Any]:
    """Read, translate, check and adapt the settings of a run.

    Args:
        train_args_file: a JSON object of TrainingArguments and QLoRAArguments; None: there are overrides alone.
        overrides: `key=value` each, the value JSON or else plain text; they win over the file.

    Returns:
        (QLoRAArguments, transformers.TrainingArguments). What was translated or adapted to this machine is logged.

    Raises:
        ArgumentError: for the first fault, naming file and key.
    """
    from transformers import TrainingArguments

    source = str(train_args_file or COMMAND_LINE)
    hints = typing.get_type_hints(TrainingArguments)
    known = {item.name: hints[item.name] for item in fields(TrainingArguments) if item.init}
    known |= typing.get_type_hints(QLoRAArguments)
    known["resume_from_checkpoint"] = str | bool | None

    overriding = translate(parse_overrides(overrides), known, COMMAND_LINE)
    values = translate(read_json_object(source) if train_args_file else {}, known, source) | overriding
    for key, value in values.items():
        check_setting(key, value, known, COMMAND_LINE if key in overriding else source)

    own = {key: values.pop(key) for key in list(values) if key in QLoRAArguments.__dataclass_fields__}
    try:
        args = QLoRAArguments(**own)
        check_paths(args, values)
        values = adapt_to_machine(args, values)
        training_args = TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise ArgumentError(f"{source}: {error}") from error
    training_args._n_gpu = min(training_args.n_gpu, 1)  # one process, one GPU; more of them through torchrun
    return args, training_args


def check_setting(key: str, value: Any, known: dict[str, Any], source: str) -> None:
    if key not in known:
        raise ArgumentError(f"{source}: unknown key {key!r}{suggest(key, known)}")
    if not is_a(value, known[key]):
        shown = type(value).__name__ if key.endswith("_token") else show(value)
        raise ArgumentError(f"{source}: {key} must be {name_type(known[key])}, got {shown}")
    for keys, holds, bound in ((POSITIVE, is_positive, "above 0"), (NOT_NEGATIVE, is_not_negative, "at least 0")):
        if key in keys and value is not None and not holds(value):
            raise ArgumentError(f"{source}: {key} must be {bound}, got {show(value)}")
    if key in UNSUPPORTED and value:
        raise ArgumentError(f"{source}: {key} is not supported; remove it")


def read_json_object(source: str) -> dict:
    """A file's one JSON object. Raises ArgumentError for anything else, a key that stands twice, NaN and Infinity."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        if duplicates := {key for key in keys if keys.count(key) > 1}:
            raise ArgumentError(f"{source}: {', '.join(map(repr, duplicates))} stands there twice; keep one")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ArgumentError(f"{source}: {constant} is no JSON number")

    try:
        text = Path(source).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{source}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{source}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{source}: must hold one JSON object, got {type(values).__name__}")
    return values


def parse_overrides(overrides: typing.Sequence[str]) -> dict[str, Any]:
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ArgumentError(f"{override!r}: an override is key=value")
        try:
            values[key.lstrip("-")] = json.loads(text)
        except json.JSONDecodeError:
            values[key.lstrip("-")] = text
    return values


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


def check_paths(args: QLoRAArguments, values: dict[str, Any]) -> None:
    """Raise ValueError for a file or folder that is missing, or is not what its key asks for."""
    if not values.get("output_dir"):
        raise ValueError("output_dir must be given: the folder for checkpoints and the final adapter")
    data = [(key, path) for key in ("train_file", "eval_file") for path in as_list(getattr(args, key))]
    for key, path in data:
        if not Path(path).exists() and not glob.glob(path, recursive=True):
            raise ValueError(f"{key}: no file {path!r} in {Path.cwd()}")
        for written, folder in (("output_dir", values["output_dir"]), ("cache_dir", args.cache_dir)):
            if folder and Path(path).is_dir() and lies_in(folder, path):
                raise ValueError(
                    f"{written}: {folder} lies in {key} {path}, all files below which are data, also those that a run "
                    f"writes; choose another {written}, or name the files, such as {Path(path, '*.jsonl')}"
                )
    if args.overwrite_output_dir:
        for key, path in [("model_name_or_path", args.model_name_or_path), *data]:
            if lies_in(path, values["output_dir"]):
                raise ValueError(f"{key}: {path} lies in output_dir, which overwrite_output_dir may move away")
    if args.streaming and values.get("max_steps", -1) <= 0:
        raise ValueError("streaming: the number of rows is not known beforehand; give max_steps")
    for name in as_list(values.get("report_to")):
        if name not in ("none", "all") and importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; install it, or set report_to to 'none'")
    model = args.model_name_or_path
    if fault := missing_folder(model):
        raise ValueError(f"model_name_or_path: {fault}")
    if Path(model, "adapter_config.json").is_file():
        raise ValueError(
            f"model_name_or_path: {model!r} is an adapter; give its base model, and to continue the run that made it "
            "set resume_from_checkpoint"
        )
    if values.get("load_best_model_at_end") and args.eval_file is None:
        raise ValueError("load_best_model_at_end needs eval_file, to tell which model is the best")
    evaluates = values.get("eval_strategy", "no") != "no" or values.get("do_eval")
    if evaluates and args.eval_file is None:
        raise ValueError("eval_strategy asks for evaluation; give eval_file, or set eval_strategy to 'no'")


def missing_folder(name: str) -> str | None:
    """What is wrong with a model's name that means a folder which is not there; None for a folder or a hub's name.

    The hub, which is asked for what is no folder, would be tried for minutes where there is no network.
    """
    parent, last = os.path.split(name.rstrip("/"))
    means_folder = name.startswith((".", "/", "~")) or "/" in parent
    if os.path.isdir(name) or not (means_folder or (parent and os.path.isdir(parent))):
        return None
    fault = f"no folder {name}" if os.path.isabs(name) else f"no folder {name} in {os.getcwd()}"
    if name.startswith("~"):
        return f"{fault}; write the home folder out"
    folders = sorted(folder.rstrip("/") for folder in glob.glob("*/", root_dir=parent or "."))
    if close := difflib.get_close_matches(last, folders, n=1):
        fault += f"; did you mean {os.path.join(parent, close[0])}?"
    if folders:
        fault += f" (in {parent or os.getcwd()}: {', '.join(folders[:10])}{' …' * (len(folders) > 10)})"
    return fault if means_folder else f"{fault}; if you mean the hub's, start from a folder without {parent!r}"


def as_list(paths: str | list[str] | dict[str, float] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or ())


def lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or below it, by whatever links and `~` each is named."""
    inner, outer = (Path(os.path.expanduser(name)).resolve() for name in (path, folder))
    return inner.is_relative_to(outer)


def adapt_to_machine(args: QLoRAArguments, values: dict[str, Any]) -> dict[str, Any]:
    """Settings that follow from the hardware and from our own parts; whatever overrules the file is logged."""
    import torch

    has_cuda = torch.cuda.is_available() and not values.get("use_cpu", False)
    args.compute_dtype = choose_compute_dtype(args.compute_dtype, values, has_cuda)
    adapted = (
        values
        | FIXED
        | {
            "use_cpu": not has_cuda,
            "fp16": args.compute_dtype == "float16",
            "bf16": args.compute_dtype == "bfloat16",
        }
    )
    for key, value in FIXED.items():
        if values.get(key, value) != value:
            logger.warning(f"{key}={values[key]} is not possible here; it is {value}")
    adapted.setdefault("optim", "paged_adamw_32bit")
    if not has_cuda and any(part in adapted["optim"] for part in ("paged", "bnb", "8bit")):
        if "optim" in values:
            logger.warning(f"optim={values['optim']} needs CUDA; using adamw_torch")
        adapted["optim"] = "adamw_torch"
    if values.get("save_total_limit") == 1:
        logger.info("save_total_limit: 1 is raised to 2, since a run keeps a whole checkpoint while it writes another")
        adapted["save_total_limit"] = 2
    if args.eval_file is not None:
        adapted |= choose_evaluation(values)
    adapted.setdefault("report_to", "none")
    adapted.setdefault("ddp_find_unused_parameters", False)
    return adapted


def choose_evaluation(values: dict[str, Any]) -> dict[str, Any]:
    """When a run with an eval_file evaluates: every `eval_steps` where they are given, else after each epoch, or with
    `load_best_model_at_end` wherever it saves.

    Raises:
        ValueError: with `load_best_model_at_end`, checkpoints would be saved that no evaluation tells the worth of.
    """
    saves, every = values.get("save_strategy", "steps"), values.get("eval_steps")
    best = values.get("load_best_model_at_end")
    follows = best and every is None and saves in ("steps", "epoch")
    evaluates = values.get("eval_strategy") or ("steps" if every is not None else saves if follows else "epoch")
    if not best:
        return {"eval_strategy": evaluates}
    if "no" in (saves, evaluates) or saves not in ("best", evaluates):
        raise ValueError(
            "load_best_model_at_end needs an evaluation of every checkpoint, but eval_strategy is "
            f"{evaluates!r} and save_strategy {saves!r}; set both to 'steps' or both to 'epoch'"
        )
    if saves != "steps":
        return {"eval_strategy": evaluates}
    save_steps = values.get("save_steps", 500)  # transformers' own
    every = save_steps if every is None else every
    times = save_steps / every
    if (save_steps < 1) != (every < 1) or abs(times - max(round(times), 1)) > 1e-9:
        raise ValueError(
            f"load_best_model_at_end needs an evaluation of every checkpoint, but eval_steps is {every} and save_steps "
            f"{save_steps}, which is no multiple of it; set one of them so that it is"
        )
    return {"eval_strategy": evaluates, "eval_steps": every}


def choose_compute_dtype(requested: str, values: dict[str, Any], has_cuda: bool) -> str:
    """bfloat16, float16 or float32, from `compute_dtype`, the file's `bf16` and `fp16`, and what the card can do.

    Raises:
        ValueError: bfloat16 is asked of a card without it, or `bf16` and `fp16` are both true.
    """
    import torch

    has_bf16 = has_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if values.get("bf16") and values.get("fp16"):
        raise ValueError("bf16 and fp16 are both true; keep one")
    asked = requested if requested != "auto" else "bfloat16" if values.get("bf16") else "auto"
    if not has_cuda:
        if asked == "bfloat16" and requested == asked:
            return asked
        if values.get("fp16") or asked not in ("auto", "float32"):
            logger.warning("half precision needs CUDA; computing in float32")
        return "float32"
    if asked == "bfloat16" and not has_bf16:
        raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16; set compute_dtype to float16")
    if asked != "auto":
        return asked
    if has_bf16 and values.get("fp16"):
        logger.info("fp16 is true, but this card has bfloat16: using that (compute_dtype=float16 forces fp16)")
    return "bfloat16" if has_bf16 else "float16"


def is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits a type hint. An int fits float; true is no number; enums take their text."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        enums = [part for part in parts if is_enum(part)]  # `SchedulerType | str` means the text of a SchedulerType
        return any(is_a(value, part) for part in (enums if enums and isinstance(value, str) else parts))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if is_enum(hint):
        return value in [member.value for member in hint]
    if origin is list:
        return isinstance(value, list) and all(is_a(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        inner = typing.get_args(hint)[1]
        return isinstance(value, dict) and (inner is Any or all(is_a(item, inner) for item in value.values()))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if hint in (str, bool, list, dict, type(None)) else (str, dict))


def name_type(hint: Any) -> str:
    names = {str: "text", float: "a number", int: "an integer", bool: "true or false", type(None): "null"}
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names |= {list: "a list", dict: "an object"}
    if enums := [part for part in parts if is_enum(part)]:
        return "one of " + ", ".join(member.value for member in enums[0])
    inner = {(str,): " of text", (str, float): " of numbers"}
    kinds = [(typing.get_origin(part) or part, typing.get_args(part)) for part in parts]
    return " or ".join(dict.fromkeys(names.get(kind, "text") + inner.get(held, "") for kind, held in kinds))


def is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def suggest(key: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see docs/configuration.md for the keys"


def show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
