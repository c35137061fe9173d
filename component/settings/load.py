"""One JSON file, and key=value overrides, to checked arguments. transformers is imported only when they are loaded."""

import difflib
import glob
import importlib.util
import json
import os
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..run.errors import ArgumentError
from .legacy import translate
from .machine import adapt_to_machine
from .schema import QLoRAArguments, check_setting

COMMAND_LINE = "command line"


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

    overriding, environment = translate(parse_overrides(overrides), known, COMMAND_LINE)
    values, of_file = translate(read_json_object(source) if train_args_file else {}, known, source)
    if overriding.get("packing") is False:
        values.pop("packing_length", None)
    if overriding.get("packing_length"):
        values.pop("packing", None)
    values |= overriding
    os.environ |= of_file | environment
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


def read_json_object(source: str) -> dict:
    """A file's one JSON object. Raises ArgumentError for anything else, a key that stands twice, NaN and Infinity."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        if duplicates := {key for key in keys if keys.count(key) > 1}:
            raise ArgumentError(f"{source}: {', '.join(map(repr, duplicates))} stands there twice; keep one")
        return dict(pairs)

    def refuse_constant(constant: str) -> None:
        raise ArgumentError(f"{source}: {constant} is no JSON number")

    try:
        text = Path(source).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=refuse_constant)
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
    means_folder = name.startswith((".", "/", "~", "models/")) or "/" in parent
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
