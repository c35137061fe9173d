"""Exports: a ChatGLM with its adapter as folders that run where this project is not installed (docs/deploy.md)."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loguru import logger
from transformers import AutoConfig

from ..card.card import write_card
from ..chatglm import ChatGLMConfig, ChatGLMTokenizer
from ..model import DTYPES, check_fits, check_same_base, from_pretrained, open_tokenizer, read_training
from ..run.errors import ArgumentError
from ..trust import check_adapter, find_adapter_weights, find_base, identify_base, read_run
from .adapter import write_glm_adapter
from .gguf import bytes_of, converter_command, write_gguf, write_gguf_adapter, write_modelfile
from .glm import check_layout, write_glm
from .merge import RECORD, describe_rounding, find_config, into_words, name_of, plan_merge, read_dtype
from .tokenizer import require_same_ids, stop_ids, write_tokenizer
from .tool_parser import write_tool_parser
from .weights import ChatGLMWeights

TARGETS = ("glm", "gguf", "adapter")
KIND = "f16"  # of a GGUF file
ADAPTER_GGUF = "adapter.gguf"
NOT_AS_TRAINED = (
    "beside a full-precision base this adapter is not the model that was trained: it has learned beside the base's "
    "weights rounded to 4 bits. On the small model of docs/quality.md, 28.3% of the calls were exact as trained, and "
    "6.7% beside full precision. Export the merge (--to glm, gguf), or load the base in NF4 with double quantisation, "
    "which is near to training, but not the same: GLM's queries, keys and values are rounded apart"
)


@dataclass(frozen=True)
class Export:
    """What is exported, as `plan_export` found it. Nothing but configuration has been read yet.

    Attributes:
        to: one of TARGETS.
        size: bytes that the folder takes, about.
        write: fills an empty folder, and returns what the user should know of the result.
    """

    to: str
    size: int
    write: Callable[[Path], list[str]]


def plan_export(
    to: str,
    base: str | None,
    adapter: Path | None = None,
    *,
    into: str | None = None,
    dtype: str | None = None,
    kind: str | None = None,
    name: str = "model",
    max_shard_size: str = "2GB",
) -> Export:
    """Decide what is exported, and refuse what can be refused before a weight is read.

    Args:
        to: "glm" for transformers' GlmForCausalLM, "gguf" for llama.cpp, "adapter" for the adapter alone, for both.
        base: folder or hub name; None for the folder that the adapter names.
        into, dtype: as of `plan_merge`; `dtype` with "glm" alone.
        kind: of numbers in a GGUF file, one of `gguf.KINDS`; KIND by default.
        name: of a GGUF file, before its kind.

    Raises:
        ArgumentError: base or adapter are refused, do not belong together, or are of another family than ChatGLM2/3.
    """
    for option, given, target in (("--dtype", dtype, "glm"), ("--type", kind, "gguf")):
        if given and to != target:
            raise ArgumentError(f"{option} {given}: goes with --to {target}, and --to is {to}; leave it out")
    if into and (to == "adapter" or not adapter):
        raise ArgumentError(f"--into {into}: nothing is merged here; leave it out")
    if not adapter and (to == "adapter" or not base):
        raise ArgumentError("--adapter: give the folder of a trained adapter, such as output/x/final")
    settings = check_adapter(adapter) if adapter else {}
    named = "--base" if base else f"{adapter / 'adapter_config.json'}: base_model_name_or_path"
    base = base or find_base(adapter, settings)
    file = find_config(base, named)
    config = from_pretrained(AutoConfig, base)
    if not isinstance(config, ChatGLMConfig):
        raise ArgumentError(other_family(to, base, config.model_type, adapter, kind or KIND))
    check_layout(config)
    if to == "adapter":
        return plan_adapter(base, adapter, settings, config)
    dtype = dtype if to == "glm" else "float32"  # a GGUF's numbers are rounded once, when they are written
    plan = plan_merge(adapter, base, into, dtype) if adapter else None
    weights = ChatGLMWeights(base, plan.dtype if plan else DTYPES[dtype] if dtype else read_dtype(base, file), plan)
    tokenizer = open_tokenizer(base)
    require_same_ids(tokenizer)
    if to == "gguf":
        return plan_gguf(weights, tokenizer, name, kind or KIND)
    return plan_glm(weights, tokenizer, max_shard_size)


def other_family(to: str, base: str, model_type: str, adapter: Path | None, kind: str) -> str:
    """Why another family is not exported here, and what its user does instead."""
    merged = f"merge it (script/merge_lora.py --adapter {adapter} --output MERGED)" if adapter else "take it as it is"
    instead = {
        "glm": f"transformers has a class of its own for it: {merged}",
        "gguf": f"{merged}; then llama.cpp's own converter: "
        + converter_command("MERGED" if adapter else base, "MODEL.gguf", kind),
        "adapter": "PEFT, vLLM and SGLang take its adapter as it is; llama.cpp has convert_lora_to_gguf.py",
    }
    return (
        f"--to {to}: {base} is of the type {model_type!r}, and only ChatGLM2 and ChatGLM3 are exported; {instead[to]}"
    )


def plan_glm(weights: ChatGLMWeights, tokenizer: ChatGLMTokenizer, max_shard_size: str) -> Export:
    def write(folder: Path) -> list[str]:
        log_beginning(weights, "GlmForCausalLM")
        write_glm(weights, folder, stop_ids(tokenizer), max_shard_size)
        write_tokenizer(tokenizer, folder)
        if tokenizer.chatglm_version == 3:
            write_tool_parser(folder)
        return finish(folder, "glm", weights, name_of(weights.dtype))

    return Export("glm", count(weights) * weights.dtype.itemsize, write)


def plan_gguf(weights: ChatGLMWeights, tokenizer: ChatGLMTokenizer, name: str, kind: str) -> Export:
    file = f"{name}-{kind}.gguf"

    def write(folder: Path) -> list[str]:
        log_beginning(weights, f"GGUF ({kind})")
        write_gguf(weights, tokenizer, folder / file, kind)
        write_modelfile(folder, file, tokenizer)
        return finish(folder, "gguf", weights, kind)

    return Export("gguf", round(count(weights) * bytes_of(kind)), write)


def log_beginning(weights: ChatGLMWeights, what: str) -> None:
    plan = weights.plan
    merged = f", with {plan.adapter} merged into {into_words(plan)}" if plan else ""
    logger.info(f"exporting {weights.base}{merged}, as {what}")


def finish(folder: Path, to: str, weights: ChatGLMWeights, dtype: str) -> list[str]:
    """Write how an export of weights was made, and its card. Returns what the user should know."""
    plan = weights.plan
    if not plan:
        write_card(folder, to, weights.base, made={"dtype": dtype})
        return []
    made = plan.record() | {"dtype": dtype}
    (folder / RECORD).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    write_card(folder, to, weights.base, plan.adapter, made)
    return [describe_rounding(plan, weights.rounding)]


def count(weights: ChatGLMWeights) -> int:
    return sum(map(math.prod, weights.shapes.values()))


def plan_adapter(base: str, adapter: Path, settings: dict, config: ChatGLMConfig) -> Export:
    check_fits(adapter, base)
    if run := read_run(adapter):
        check_same_base(adapter, settings["base_model_name_or_path"], base, identify_base(base), run)
    bits, _ = read_training(adapter)

    def write(folder: Path) -> list[str]:
        logger.info(f"exporting {adapter} under GLM's names, and as GGUF")
        write_glm_adapter(adapter, config, folder)
        notes = []
        if settings["use_dora"]:
            notes.append(f"no {ADAPTER_GGUF}: llama.cpp knows no DoRA; export the merge (--to gguf)")
        else:
            write_gguf_adapter(adapter, config, folder / ADAPTER_GGUF)
        write_card(folder, "glm-adapter", base, adapter)
        return [*notes, NOT_AS_TRAINED] if bits != 16 else notes

    return Export("adapter", 2 * find_adapter_weights(adapter).stat().st_size, write)
