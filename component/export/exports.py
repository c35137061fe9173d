"""Exports: a ChatGLM with its adapter as folders that run where this project is not installed (docs/deploy.md)."""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loguru import logger
from transformers import AutoConfig

from ..card.card import write_card
from ..card.facts import EXACT_AS_TRAINED, EXACT_BESIDE_FULL, carry, read_record
from ..chatglm import ChatGLMConfig, ChatGLMTokenizer
from ..model import DTYPES, check_fits, from_pretrained, open_tokenizer, read_training, sketch_base
from ..run.errors import ArgumentError
from ..run.manifest import seal
from ..trust import find_adapter_weights
from .adapter import count_under_glm, run_under_glm, write_glm_adapter
from .gguf import bytes_of, check_shape, converter_command, write_gguf, write_gguf_adapter, write_modelfile
from .glm import check_layout, write_glm
from .merge import (
    RECORD,
    Sources,
    base_name,
    describe_rounding,
    find_sources,
    into_words,
    name_of,
    plan_from,
    read_dtype,
)
from .tokenizer import require_same_ids, stop_ids, write_tokenizer
from .tool_parser import write_tool_parser
from .weights import ChatGLMWeights

KIND = "f16"  # of a GGUF file
SHARD = "2GB"  # size of a file of GLM's weights, at most
ADAPTER_GGUF = "adapter.gguf"
UNKNOWN_TRAINING = "nothing records how this adapter's base was loaded in training. If it was trained in 4 bits, then "
NOT_AS_TRAINED = (
    "beside a full-precision base this adapter is not the model that was trained: it has learned beside the base's "
    f"weights rounded to 4 bits. On the small model of docs/quality.md, {EXACT_AS_TRAINED} of the calls were exact as "
    f"trained, and {EXACT_BESIDE_FULL} beside full precision. Export the merge (--to glm, gguf), or load the base in "
    "NF4 with double quantisation, which is near to training, but not the same: GLM's queries, keys and values are "
    "rounded apart"
)


@dataclass(frozen=True)
class Export:
    """What is exported, as `plan_export` found it. No weight of the base has been read yet.

    Attributes:
        size: bytes that the folder takes, about.
        write: fills an empty folder, and returns what the user should know of the result.
    """

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
    max_shard_size: str | None = None,
    name: str = "",
) -> Export:
    """Decide what is exported, and refuse what can be refused before a weight is read.

    Args:
        to: "glm" for transformers' GlmForCausalLM, "gguf" for llama.cpp, "adapter" for the adapter alone, for both.
        base: folder or hub name; None for the folder that the adapter names.
        into, dtype: as of `plan_merge`; `dtype` with "glm" alone.
        kind: of numbers in a GGUF file, one of `gguf.KINDS`; KIND by default.
        max_shard_size: of GLM's files, SHARD by default.
        name: of the folder, for which a GGUF file is named.

    Raises:
        ArgumentError: base or adapter are refused, do not belong together, or are of another family than ChatGLM2/3.
    """
    of_one_target = (("--dtype", dtype, "glm"), ("--max_shard_size", max_shard_size, "glm"), ("--type", kind, "gguf"))
    for option, given, target in of_one_target:
        if given and to != target:
            raise ArgumentError(f"{option} {given}: goes with --to {target}, and --to is {to}; leave it out")
    if into and (to == "adapter" or not adapter):
        raise ArgumentError(f"--into {into}: nothing is merged here; leave it out")
    if not adapter and (to == "adapter" or not base):
        raise ArgumentError("--adapter: give the folder of a trained adapter, such as output/x/final")
    sources = find_sources(base, adapter)
    config = from_pretrained(AutoConfig, sources.base)
    if not isinstance(config, ChatGLMConfig):
        raise ArgumentError(other_family(to, sources, config.model_type, bool(base), kind or KIND))
    if config.hidden_dropout:
        logger.warning(
            f"{sources.config}: hidden_dropout {config.hidden_dropout:g} is left out: it acts in training alone, and "
            "other programs have none"
        )
    if to == "adapter":
        return plan_adapter(sources, config)
    (check_shape if to == "gguf" else check_layout)(config)
    weights = open_weights(sources, into, dtype if to == "glm" else "float32")  # a GGUF's are rounded as it is written
    tokenizer = open_tokenizer(sources.base)
    require_same_ids(tokenizer)
    if to == "gguf":
        return plan_gguf(weights, tokenizer, name, kind or KIND)
    return plan_glm(weights, tokenizer, max_shard_size or SHARD)


def open_weights(sources: Sources, into: str | None, dtype: str | None) -> ChatGLMWeights:
    if sources.adapter:
        plan = plan_from(sources, into, dtype)
        return ChatGLMWeights(plan.base, plan.dtype, plan)
    return ChatGLMWeights(sources.base, DTYPES[dtype] if dtype else read_dtype(sources.base, sources.config))


def other_family(to: str, sources: Sources, model_type: str, base_given: bool, kind: str) -> str:
    """Why another family is not exported here, and what its user does instead."""
    base, merged, model = sources.base, "take it as it is", sources.base
    if sources.adapter:
        named = ["--base", base] if base_given else []
        command = ["script/merge_lora.py", "--adapter", str(sources.adapter), *named, "--output", "MERGED"]
        merged, model = f"merge it ({shlex.join(command)})", "MERGED"
    instead = {
        "glm": f"transformers has a class of its own for it: {merged}",
        "gguf": f"{merged}; then llama.cpp's own converter: {converter_command(model, 'MODEL.gguf', kind)}",
        "adapter": "PEFT, vLLM and SGLang take its adapter as it is; llama.cpp has convert_lora_to_gguf.py",
    }[to]
    if (to, model_type) == ("gguf", "glm"):
        instead += (
            "; but that does not know the tokenizer of a folder that --to glm made: for such a one, export the ChatGLM "
            "that it was made of, with --base and --adapter"
        )
    return f"--to {to}: {base} is of the type {model_type!r}, and only ChatGLM2 and ChatGLM3 are exported; {instead}"


def plan_glm(weights: ChatGLMWeights, tokenizer: ChatGLMTokenizer, max_shard_size: str) -> Export:
    def write(folder: Path) -> list[str]:
        log_beginning(weights, "GlmForCausalLM")
        write_glm(weights, folder, stop_ids(tokenizer), max_shard_size)
        write_tokenizer(tokenizer, folder)
        write_parser(folder, tokenizer)
        return finish(folder, "glm", weights)

    return Export(count(weights) * weights.dtype.itemsize, write)


def plan_gguf(weights: ChatGLMWeights, tokenizer: ChatGLMTokenizer, name: str, kind: str) -> Export:
    file = f"{gguf_name(name, weights.base)}-{kind}.gguf"

    def write(folder: Path) -> list[str]:
        log_beginning(weights, f"GGUF ({kind})")
        write_gguf(weights, tokenizer, folder / file, kind)
        write_modelfile(folder, file, tokenizer)
        write_parser(folder, tokenizer)
        return finish(folder, "gguf", weights, kind)

    return Export(round(count(weights) * bytes_of(kind)), write)


def gguf_name(folder: str, base: str) -> str:
    """The name of a GGUF file, without its kind: its folder's, or its base's where the folder is called gguf alone."""
    return re.sub(r"(^|[-.])gguf$", "", folder) or base_name(base)


def write_parser(folder: Path, tokenizer: ChatGLMTokenizer) -> None:
    """Write the parser of ChatGLM3's calls; ChatGLM2 has none."""
    if tokenizer.chatglm_version == 3:
        write_tool_parser(folder)


def log_beginning(weights: ChatGLMWeights, what: str) -> None:
    plan = weights.plan
    merged = f", with {plan.adapter} merged into {into_words(plan)}" if plan else ""
    logger.info(f"exporting {weights.base}{merged}, as {what}")


def finish(folder: Path, to: str, weights: ChatGLMWeights, kind: str | None = None) -> list[str]:
    """Write how an export of weights was made, and its card. Returns what the user should know.

    Args:
        kind: of a GGUF file.
    """
    plan, made = weights.plan, {"dtype": kind or name_of(weights.dtype)}
    if not plan:
        write_card(folder, to, weights.base, made=made)
        return []
    record = plan.record() | ({"type": kind} if kind else {})
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(folder, to, weights.base, plan.adapter, record | made)
    return [describe_rounding(plan, weights.rounding)]


def count(weights: ChatGLMWeights) -> int:
    return sum(map(math.prod, weights.shapes.values()))


def plan_adapter(sources: Sources, config: ChatGLMConfig) -> Export:
    """The adapter alone. Its manifest is written last, since it has the sums of all other files."""
    adapter = sources.adapter
    check_layout(config)
    check_fits(adapter, sketch_base(sources.base))
    bits, _ = read_training(adapter)

    def write(folder: Path) -> list[str]:
        logger.info(f"exporting {adapter} under GLM's names, and as GGUF")
        write_glm_adapter(adapter, config, folder)
        notes = []
        try:
            write_gguf_adapter(adapter, sources.settings, config, folder / ADAPTER_GGUF)
        except ArgumentError as error:
            notes.append(f"no {ADAPTER_GGUF}: {error}")
        write_card(folder, "glm-adapter", sources.base, adapter)
        seal(folder, carry(read_record(adapter)) | {"run": run_under_glm(adapter)})
        if bits != 16:
            notes.append(NOT_AS_TRAINED if bits else UNKNOWN_TRAINING + NOT_AS_TRAINED)
        return notes

    own = find_adapter_weights(adapter).stat().st_size
    return Export(own + 4 * count_under_glm(adapter, config), write)  # A GGUF in float32, and the As that are repeated
