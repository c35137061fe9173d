"""Our own settings, and the check that a value fits its key. Standard library only."""

import difflib
import enum
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..run.errors import ArgumentError


def setting(default: Any, help: str, holds: Callable[[Any], bool] | None = None, expected: str = "") -> Any:
    return field(default=default, metadata={"help": help, "holds": holds, "expected": expected})


def one_of(*values: str | None) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in values), f"one of {', '.join(filter(None, values))}"


def is_positive(value: float) -> bool:
    return value > 0


def is_not_negative(value: float) -> bool:
    return value >= 0


@dataclass
class QLoRAArguments:
    """Settings that the JSON file may hold beside those of Hugging Face's TrainingArguments."""

    model_name_or_path: str = setting("", "Folder or hub name of the model. Required.", bool, "given")
    train_file: str | list[str] | dict[str, float] = setting(
        "",
        "Data to train on: a file, a folder, a glob, a list of these, or an object that gives each its weight in the "
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
        "template. Default: chatglm2 or chatglm3 where the model's name contains it, else firefly.",
        *one_of(None, "chatglm2", "chatglm3", "firefly", "chat_template"),
    )
    chat_template: str | None = setting(
        None,
        "Chat template instead of the tokenizer's own, for data_format chat_template: chatml (with functions and calls "
        "as Hermes has them), chatglm3, or a file with a Jinja template. It is saved beside the adapter.",
        lambda value: value != "",
        "a name or file, or null",
    )
    max_seq_length: int = setting(1024, "Longest sample, in tokens.", lambda value: value > 1, "an integer above 1")
    on_too_long: str = setting(
        "truncate",
        "What to do with a sample longer than max_seq_length: truncate (cut its end), truncate_left_turns (leave out "
        "early rounds, never the system prompt and tools; cut the last round if it alone is too long), or drop.",
        *one_of("truncate", "truncate_left_turns", "drop"),
    )
    loss_on: str = setting(
        "flagged",
        "Which answers and calls are learned: flagged (all but those with loss=false), all, or last.",
        *one_of("flagged", "all", "last"),
    )
    on_bad_row: str = setting(
        "stop",
        "What to do about bad rows: stop (list them by kind and exit), or skip (write them to rejected.jsonl in "
        "output_dir and go on).",
        *one_of("stop", "skip"),
    )
    max_bad_share: float = setting(
        0.1,
        "Largest share of the rows that may be bad or too long to learn from. With more, the run stops.",
        lambda value: 0 <= value <= 1,
        "a number from 0 to 1",
    )
    strict_roles: bool = setting(
        False, "Count unusual rows, such as one that ends on a user turn, as bad instead of only warning of them."
    )
    streaming: bool = setting(
        False, "Read and render rows while training, for data too large to render beforehand; needs max_steps."
    )
    cache_dir: str | None = setting(
        None, "Folder to keep rendered data in. Default: $XDG_CACHE_HOME/luciole or ~/.cache/luciole."
    )
    cache_size_limit: float | None = setting(
        50.0,
        "GiB that rendered data may take in cache_dir. What was used longest ago is removed, unless a run has it open. "
        "null: no limit.",
        lambda value: value is None or value > 0,
        "a positive number, or null",
    )
    preprocessing_workers: int | None = setting(
        None,
        "Number of processes that render the data. Default: one for each core.",
        lambda value: value is None or value > 0,
        "a positive integer",
    )
    packing: bool = setting(
        True,
        "Put whole samples one after another into rows; no sample sees another. false: pad the batches instead, and "
        "use the model's own layers.",
    )
    packing_length: int | None = setting(
        None,
        "Length of a packed row in tokens, at least max_seq_length. Default: up to 32768, by the card's memory and the "
        "samples of an update, with 4-bit weights kept unpacked if there is much room; 8192 without a card, 2048 "
        "without fused layers.",
        lambda value: value is None or value > 0,
        "a positive integer",
    )
    fused_layers: bool = setting(
        True,
        "Use fused layers for packed rows if the model's family has them. false: use the model's own layers, which are "
        "slower, for comparison.",
    )
    activation_checkpointing: str = setting(
        "auto",
        "What to recompute in the backward pass, to save memory: none (only what is cheap), selective (also the MLP's "
        "wide activations), full (all but each layer's input), offload (as full, with the inputs in the host's "
        "memory), or auto (the fastest of these that fits).",
        *one_of("auto", "none", "selective", "full", "offload"),
    )
    adapter_name_or_path: str | None = setting(
        None,
        "Folder or hub name of a trained LoRA adapter to begin from. It must have the lora_rank, lora_alpha, "
        "target_modules and base model of the run. Default: begin with a new adapter.",
        lambda value: value != "",
        "a folder or a hub's name, or null",
    )
    lora_rank: int = setting(64, "Rank of the low-rank update.", is_positive, "a positive integer")
    lora_alpha: float = setting(
        16, "Scale of the update, which is multiplied by lora_alpha / lora_rank.", is_positive, "a positive number"
    )
    lora_dropout: float = setting(
        0.05, "Dropout on the low-rank update's input.", lambda value: 0 <= value < 1, "at least 0 and below 1"
    )
    target_modules: list[str] | None = setting(
        None,
        "Names of the linear layers to adapt. Default: every linear layer but the output head.",
        lambda value: value is None or value,
        "a list of names, or null for every linear layer",
    )
    base_bits: int = setting(
        4,
        "Bits of the base's linear layers: 4 (rounded to NF4 with double quantisation, as QLoRA does) or 16 (not "
        "rounded: kept in compute_dtype, which takes about four times the memory).",
        lambda value: value in (4, 16),
        "4 or 16 (there are no 8 bits here: take 16 where it fits the card, else 4)",
    )
    compute_dtype: str = setting(
        "auto",
        "Type of the numbers that layers compute with, and in which everything but 4-bit weights is kept: auto, "
        "bfloat16, float16 or float32. auto: bfloat16 where the card has it, else float16; float32 without CUDA.",
        *one_of("auto", "bfloat16", "float16", "float32"),
    )
    overwrite_output_dir: bool = setting(
        False,
        "Start anew in an output_dir that holds another run or this run finished; what is there is moved aside. If "
        "this run is there unfinished, it is continued, unless resume_from_checkpoint is false.",
    )
    resume_despite_changes: bool = setting(
        False,
        "Continue a run although its settings, data, format, base model or number of processes have changed, or "
        "although the checkpoint that resume_from_checkpoint names is damaged.",
    )
    early_stopping_patience: int | None = setting(
        None,
        "Number of evaluations in a row without a better loss after which the run stops; the best checkpoint becomes "
        "final. Default: train to the end.",
        lambda value: value is None or value > 0,
        "a positive integer",
    )
    early_stopping_threshold: float = setting(
        0.0,
        "Smallest amount by which an evaluation's loss must fall below the lowest before it, to count as better.",
        is_not_negative,
        "0 or a positive number",
    )
    max_skipped_updates: int = setting(
        0,
        "Number of updates that may be skipped because a loss or gradient is not finite. One more stops the run.",
        is_not_negative,
        "0 or a positive integer",
    )
    score_at_end: bool = setting(
        False,
        "Score the final adapter beside its base on eval_file: print the table, and write score.json and score.html to "
        "output_dir.",
    )

    def __post_init__(self):
        for item in fields(self):
            holds, value = item.metadata["holds"], getattr(self, item.name)
            if holds and not holds(value):
                raise ValueError(f"{item.name} must be {item.metadata['expected']}, got {show(value)}")
        if self.chat_template and self.data_format not in (None, "chat_template"):
            raise ValueError(
                f"chat_template needs data_format chat_template, which is {self.data_format!r}; remove one"
            )
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ValueError("early_stopping_threshold has no effect without early_stopping_patience; give both")
        if self.packing_length and not self.packing:
            raise ValueError("packing_length needs packing, which is false; remove one of them")
        if self.packing_length and self.packing_length < self.max_seq_length:
            raise ValueError(
                f"packing_length must be at least max_seq_length={self.max_seq_length}, so that every sample fits a "
                f"row, got {show(self.packing_length)}"
            )


POSITIVE = (is_positive, "above 0")
NOT_NEGATIVE = (is_not_negative, "at least 0")
DECAY = (lambda value: 0 <= value < 1), "at least 0 and below 1"
SEED = (lambda value: 0 <= value < 2**32), "from 0 to 4294967295"

# Bounds that TrainingArguments itself does not check.
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), POSITIVE),
    **dict.fromkeys(("gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout"), POSITIVE),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "save_total_limit"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), DECAY),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "max_steps": (
        lambda value: 0 < value <= 10**9 or value == -1,
        "from 1 to a billion, or -1 for as many as num_train_epochs make",
    ),
    "num_train_epochs": (lambda value: 0 < value < 10**6, "above 0 and below a million"),
    "learning_rate": (lambda value: 0 <= value < 1e30, "at least 0 and below 1e30"),
}


def check_setting(key: str, value: Any, known: dict[str, Any], source: str) -> None:
    if key not in known:
        raise ArgumentError(f"{source}: unknown key {key!r}{suggest(key, value, known)}")
    if not is_a(value, known[key]):
        shown = type(value).__name__ if key.endswith("_token") else show(value)
        raise ArgumentError(f"{source}: {key} must be {name_type(known[key])}, got {shown}")
    holds, bound = BOUNDS.get(key, (None, ""))
    if holds and value is not None and not holds(value):
        raise ArgumentError(f"{source}: {key} must be {bound}, got {show(value)}")


def is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits a type hint. An int fits float, true fits bool alone, a member's text fits its enum."""
    if hint is Any:
        return True
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
        return isinstance(value, dict) and all(is_a(item, inner) for item in value.values())
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
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    if choices := [choice for part in literals for choice in typing.get_args(part) if choice]:
        return "one of " + ", ".join(choices)
    inner = {(str,): " of text", (str, float): " of numbers"}
    kinds = [(typing.get_origin(part) or part, typing.get_args(part)) for part in parts]
    return " or ".join(dict.fromkeys(names.get(kind, "text") + inner.get(held, "") for kind, held in kinds))


def is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def suggest(key: str, value: Any, known: dict[str, Any]) -> str:
    """Hint for an unknown key: a known one of close spelling that the value fits, else where the keys are listed."""
    fitting = [name for name, hint in known.items() if is_a(value, hint)]
    close = difflib.get_close_matches(key.lower(), fitting, n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else "; see docs/configuration.md for the keys"


def show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
