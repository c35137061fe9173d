"""Loading of one JSON file and key=value overrides. transformers is imported only when arguments are loaded."""

import difflib
import glob
import importlib.util
import json
import math
import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..run.errors import ArgumentError
from .fields import NARROWED
from .legacy import decide_base_bits, hint_of, translate
from .machine import adapt_to_machine
from .optimization import check_optimization
from .schema import QLoRAArguments, check_setting, is_a

COMMAND_LINE = "command line"


def load_arguments(
    train_args_file: str | Path | None,
    overrides: typing.Sequence[str] = (),
    together: Callable[[Callable[[], Any]], Any] = lambda read: read(),
) -> tuple[QLoRAArguments, Any]:
    """Read, translate, check and adapt the settings of a run.

    Args:
        train_args_file: a JSON object of TrainingArguments and QLoRAArguments; None if all settings are overrides.
        overrides: `key=value` each, the value JSON or else plain text; they win over the file.
        together: calls what reads and checks the settings, of which a fault on one of several processes must end all:
            TrainingArguments, which are made then, wait for the other processes (component.run.ranks.on_every_rank).

    Returns:
        (QLoRAArguments, transformers.TrainingArguments). What was translated or adapted to this machine is logged.

    Raises:
        ArgumentError: for the first fault, naming file and key.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from transformers import TrainingArguments

    source = str(train_args_file or COMMAND_LINE)
    args, asked, adapted = together(lambda: read_settings(train_args_file, overrides))
    with faults_of(source):
        training_args = TrainingArguments(**adapted)
        check_optimization(training_args, asked)
    training_args._n_gpu = min(training_args.n_gpu, 1)  # one process, one GPU; more of them through torchrun
    if training_args.use_cpu and dist.is_initialized():  # transformers gives its group the timeout on cards alone
        _set_pg_timeout(training_args.ddp_timeout_delta)
    return args, training_args


def read_settings(
    train_args_file: str | Path | None, arguments: typing.Sequence[str]
) -> tuple[QLoRAArguments, dict[str, Any], dict[str, Any]]:
    """(our own settings, TrainingArguments' as asked for, the same adapted to this machine)."""
    source, known = str(train_args_file or COMMAND_LINE), known_settings()
    overrides = parse_overrides(arguments, known)
    written = read_json_object(source) if train_args_file else {}
    overriding, environment = translate(overrides, known, COMMAND_LINE)
    values, of_file = translate(written, known, source)
    if overriding.get("packing") is False:
        values.pop("packing_length", None)
    if overriding.get("packing_length"):
        values.pop("packing", None)
    values |= overriding
    decide_base_bits(values, written | overrides)
    os.environ |= of_file | environment
    for key, value in values.items():
        check_setting(key, value, known, COMMAND_LINE if key in overriding else source)

    own = {key: values.pop(key) for key in list(values) if key in QLoRAArguments.__dataclass_fields__}
    with faults_of(source):
        args = QLoRAArguments(**own)
        check_paths(args, values)
        return args, values, adapt_to_machine(args, values)


@contextmanager
def faults_of(source: str) -> Iterator[None]:
    """Within it, what is wrong with a value is a fault of the file."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(f"{source}: {error}") from error


def known_settings() -> dict[str, Any]:
    """Type hints of all settings by name; a list of choices becomes a Literal."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = {item.name: hints[item.name] for item in fields(TrainingArguments) if item.init}
    for item in fields(TrainingArguments):
        if choices := item.metadata.get("choices"):
            known[item.name] = typing.Literal[(*choices, *[None] * (item.default is None))]
    own = typing.get_type_hints(QLoRAArguments)
    return known | NARROWED | own | {"resume_from_checkpoint": str | bool | None}


def read_json_object(source: str) -> dict:
    """Read a file's one JSON object. Raises ArgumentError for anything else, and for what `load_json` refuses."""
    try:
        values = load_json(Path(source).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        remedy = "; write the keys of this YAML as one JSON object" if Path(source).suffix in (".yaml", ".yml") else ""
        raise ArgumentError(f"{source}:{error.lineno}:{error.colno}: not JSON ({error.msg}){remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{source}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{source}: {error}") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{source}: must hold one JSON object, got {type(values).__name__}")
    return values


def load_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for a key that is given twice, and for a number that is not finite."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        if duplicates := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{', '.join(map(repr, duplicates))} is given twice; keep one")
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no JSON number, or too large a one")
        return value

    return json.loads(text, object_pairs_hook=without_duplicates, parse_constant=finite, parse_float=finite)


def parse_overrides(overrides: typing.Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Parse `key=value` texts to values of the keys' types, as strictly as a file. Raises ArgumentError for a fault."""
    values = {}
    for override in overrides:
        written, equals, text = override.partition("=")
        key = written.lstrip("-")
        if not equals:
            raise ArgumentError(f"{override!r}: an override is key=value")
        if key in values:
            raise ArgumentError(f"{COMMAND_LINE}: {key!r} is given twice; keep one")
        try:
            values[key] = parse_value(text, hint_of(key, known))
        except ValueError as error:
            raise ArgumentError(f"{COMMAND_LINE}: {key}: {error}") from None
    return values


def parse_value(text: str, hint: Any) -> Any:
    """Parse an override's value: as JSON if that fits the type, else as plain text, such as `2024` for a folder's name.

    Raises:
        ValueError: the text is JSON that `load_json` refuses, and as plain text it does not fit the type.
    """
    has_parts = text.startswith(("[", "{")) and (is_a([], hint) or is_a({}, hint))  # not plain text
    fits = is_a(text, hint) and not has_parts
    try:
        value = load_json(text)
    except json.JSONDecodeError:
        return text
    except ValueError:
        if fits:
            return text
        raise
    return text if fits and not is_a(value, hint) else value


def check_paths(args: QLoRAArguments, values: dict[str, Any]) -> None:
    """Raise ValueError for a missing or unsuitable file or folder, and for a setting that lacks another it needs."""
    if not values.get("output_dir"):
        raise ValueError("output_dir must be given: the folder for checkpoints and the final adapter")
    data = [(key, path) for key in ("train_file", "eval_file") for path in as_list(getattr(args, key))]
    reads = args.streaming or os.environ.get("RANK", "0") == "0"  # other ranks take what rank 0 has prepared
    for key, path in data:
        if reads and not Path(path).exists() and not glob.glob(path, recursive=True):
            raise ValueError(f"{key}: no file {path!r} in {Path.cwd()}")
        for written, folder in (("output_dir", values["output_dir"]), ("cache_dir", args.cache_dir)):
            if folder and Path(path).is_dir() and lies_in(folder, path):
                raise ValueError(
                    f"{written}: {folder} lies in {key} {path}, where every file is data, also those that a run "
                    f"writes; choose another {written}, or name the files, such as {Path(path, '*.jsonl')}"
                )
    if args.overwrite_output_dir:
        for key, path in [("model_name_or_path", args.model_name_or_path), *data]:
            if lies_in(path, values["output_dir"]):
                raise ValueError(f"{key}: {path} lies in output_dir, which overwrite_output_dir may move away")
    if args.streaming and values.get("max_steps", -1) <= 0:
        raise ValueError("streaming: the number of rows is not known beforehand; give max_steps")
    check_trackers(as_list(values.get("report_to")))
    model = args.model_name_or_path
    if fault := missing_folder(model):
        raise ValueError(f"model_name_or_path: {fault}")
    if Path(model, "adapter_config.json").is_file():
        raise ValueError(
            f"model_name_or_path: {model!r} is an adapter; give its base model. To train the adapter further, give it "
            "as adapter_name_or_path; to continue the run that made it, start the command of that run again"
        )
    if adapter := args.adapter_name_or_path:
        if fault := missing_folder(adapter):
            raise ValueError(
                f"adapter_name_or_path: {fault}; to continue a run that began from it, leave this key out and set "
                "resume_despite_changes to true"
            )
        if os.path.isdir(adapter) and lies_in(adapter, values["output_dir"]):
            raise ValueError(
                f"adapter_name_or_path: {adapter} lies in output_dir, where a run moves and deletes what was there; "
                "choose another output_dir"
            )
    if values.get("load_best_model_at_end") and args.eval_file is None:
        raise ValueError("load_best_model_at_end needs eval_file, to tell which model is the best")
    if args.score_at_end and args.eval_file is None:
        raise ValueError("score_at_end needs eval_file, whose answers are asked for")
    if args.early_stopping_patience and args.eval_file is None:
        raise ValueError("early_stopping_patience needs eval_file, to tell when a run gets no better")
    if values.get("save_strategy") == "best" and args.eval_file is None:
        raise ValueError("save_strategy 'best' needs eval_file, to tell which model is the best")
    evaluates = values.get("eval_strategy", "no") != "no" or values.get("do_eval") or values.get("eval_on_start")
    if evaluates and args.eval_file is None:
        raise ValueError("eval_strategy asks for evaluation; give eval_file, or set eval_strategy to 'no'")


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a name of `report_to` that is no tracker of transformers, or one that is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in set(names) - {"none", "all"}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to: no tracker is called {name!r}; there are {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; install it, or set report_to to 'none'")


def missing_folder(name: str) -> str | None:
    """Error text for a model's name that means a folder which does not exist; None for a folder or a hub's name.

    Otherwise the hub would be asked for such a name, which takes minutes without a network.
    """
    parent, last = os.path.split(name.rstrip("/"))
    if "\0" in name or len(os.fsencode(last)) > 255:
        return f"no folder or model can be called {name[:40]!r}{'…' * (len(name) > 40)}"
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
    return fault if means_folder else f"{fault}; if you mean the hub, start from a folder without {parent!r}"


def as_list(paths: str | list[str] | dict[str, float] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or ())


def lies_in(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it, once links and `~` are resolved."""
    inner, outer = (Path(os.path.expanduser(name)).resolve() for name in (path, folder))
    return inner.is_relative_to(outer)
