"""Merges an adapter into its base model, in memory or to a folder, and rounds weights as those do who quantise a merge.

An adapter is trained beside a base that is rounded to 4 bits (setting `base_bits`), and learns to make good for the
rounding, too. So two merges can be meant: into the rounded values, as trained, or into those of the full-precision
base. docs/quality.md compares them.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from loguru import logger
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..card.card import write_card
from ..chatglm import ChatGLMTokenizer
from ..model import (
    DTYPES,
    adopt_conversation,
    check_same_base,
    find_linear_layers,
    from_pretrained,
    load_adapter,
    read_training,
)
from ..pickles import open_pickle
from ..run.errors import ArgumentError
from ..run.files import fingerprint
from ..run.manifest import MANIFEST, versions
from ..trust import (
    check_adapter,
    check_model,
    find_adapter_weights,
    find_base,
    find_model_file,
    find_weights,
    identify_base,
    read_model_json,
    read_run,
)
from .tokenizer import write_tokenizer_json

INTO = ("trained", "full")
DEFAULT_INTO = "trained"  # for an adapter that records how its base was rounded; docs/quality.md has the evidence
FILE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names
RECORD = "merge.json"
Q8_BLOCK = 32  # values of GGUF's Q8_0 that share a scale


@dataclass(frozen=True)
class Sources:
    """A base and its adapter, found and checked by `find_sources`. No weight has been read.

    Attributes:
        config: the base's config.json.
        adapter: None for the base alone.
        settings: the adapter's, with peft's defaults; empty without one.
    """

    base: str
    config: Path
    adapter: Path | None
    settings: dict


@dataclass(frozen=True)
class MergePlan:
    """What is merged into what. `plan_merge` makes it before a weight is read.

    Attributes:
        settings: the adapter's, checked, with peft's defaults.
        into: "trained" or "full".
        dtype: type of the result.
        bits: those of the base in training, 4 or 16; None where nothing records it.
        compute_dtype: the type that the base was loaded in for training, in which it was rounded. The base's own where
            nothing records it.
        saved_in_4_bits: whether the base's files hold 4-bit weights, so that there is no other base to round.
    """

    base: str
    adapter: Path
    settings: dict
    into: str
    dtype: torch.dtype
    bits: int | None
    compute_dtype: torch.dtype
    values_dtype: torch.dtype  # that the base is loaded in for the merge
    saved_in_4_bits: bool

    @property
    def rounds(self) -> bool:
        """Whether training rounded the base to 4 bits, as is assumed where nothing records it."""
        return self.bits != 16 and not self.saved_in_4_bits

    def record(self) -> dict:
        """How the result is made, as JSON."""
        return {
            "into": self.into,
            "base": base_name(self.base) if os.path.isdir(self.base) else self.base,
            "base_model": identify_base(self.base),
            "base_bits": self.bits,
            "compute_dtype": name_of(self.compute_dtype),
            "adapter": fingerprint([find_adapter_weights(self.adapter)]),
            "dtype": name_of(self.dtype),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Rounding:
    """How large the rounding of a base is beside the update of its adapter.

    Attributes:
        layers: by name of an adapted layer, the Frobenius norms of (base - rounded base) and of the update, which is
            scaling * B @ A for plain LoRA. Empty where the base was not rounded.
    """

    layers: dict[str, tuple[float, float]]

    @property
    def total(self) -> float:
        """Norm of the rounding of all layers over that of their update."""
        rounded, updates = zip(*self.layers.values(), strict=True)
        return ratio(math.hypot(*rounded), math.hypot(*updates))

    def by_layer(self) -> dict[str, float]:
        """The same of each layer, from the smallest to the largest."""
        ratios = {name: ratio(*norms) for name, norms in self.layers.items()}
        return dict(sorted(ratios.items(), key=lambda item: item[1]))


def ratio(rounded: float, update: float) -> float:
    return rounded / update if update else math.inf if rounded else 0.0


def plan_merge(adapter: Path, base: str | None = None, into: str | None = None, dtype: str | None = None) -> MergePlan:
    """Decide what is merged into what, before a weight is read.

    Args:
        base: folder or hub name; by default the folder that the adapter names.
        into: "trained" or "full"; by default DEFAULT_INTO, and "full" for an adapter that does not record how its base
            was rounded.
        dtype: the result's, one of DTYPES; by default the base's own.

    Raises:
        ArgumentError: adapter or base are refused, do not belong together, or cannot be merged so.
    """
    return plan_from(find_sources(base, adapter), into, dtype)


def find_sources(base: str | None, adapter: Path | None) -> Sources:
    """Find a base and its adapter, and check that the base is the one of training where that is recorded.

    Args:
        base: folder or hub name; None for the folder that the adapter names.

    Raises:
        ArgumentError: base or adapter are refused, or do not belong together.
    """
    settings = check_adapter(adapter) if adapter else {}
    named = "--base" if base else f"{adapter / 'adapter_config.json'}: base_model_name_or_path"
    base = base or find_base(adapter, settings)
    config = find_config(base, named)
    if adapter and (run := read_run(adapter)):
        check_same_base(adapter, settings["base_model_name_or_path"], base, identify_base(base), run)
    return Sources(base, config, adapter, settings)


def plan_from(sources: Sources, into: str | None, dtype: str | None) -> MergePlan:
    """`plan_merge` for a base and an adapter that are found."""
    base, file, adapter = sources.base, sources.config, sources.adapter
    bits, compute_dtype = read_training(adapter)
    into = into or (DEFAULT_INTO if bits else "full")
    quantised = read_model_json(file).get("quantization_config")
    if quantised and not (into == "trained" and quantised.get("load_in_4bit")):
        raise ArgumentError(
            f"{file}: the base is quantised, and a merge into rounded weights is not the model that full precision "
            "gives; give that with --base, or set --into trained if it is bitsandbytes' 4 bits and you want them"
        )
    own = read_dtype(base, file)
    compute_dtype = compute_dtype or own
    result = DTYPES[dtype] if dtype else own
    values = compute_dtype if into == "trained" else torch.float32 if result == torch.float32 else own
    return MergePlan(base, adapter, sources.settings, into, result, bits, compute_dtype, values, bool(quantised))


def find_config(base: str, named: str) -> Path:
    """The config.json of the base to merge into. Raises ArgumentError, which says where the base is named."""
    try:
        check_model(base, "--base")
        config = find_model_file(base, "config.json")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{named} {base}: {error}") from error
    if not config:
        raise ArgumentError(
            f"{named} {base}: no config.json is to be had; give a folder with the model's files, or its hub name where "
            "the hub can be reached"
        )
    return config


def read_dtype(base: str, file: Path) -> torch.dtype:
    """A base's own type of numbers: that of its config.json, else the one that most of its weights have.

    Raises:
        ArgumentError: it is another than those of DTYPES.
    """
    config = read_model_json(file)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if named := part.get("dtype") or part.get("torch_dtype"):
            break
    else:
        named = count_dtypes(find_weights(base))
    found = DTYPES.get(str(named).removeprefix("torch."))
    if not found:
        raise ArgumentError(f"{file}: the base's dtype is {named!r}; expected one of {', '.join(DTYPES)}")
    return found


def count_dtypes(files: list[Path]) -> str | None:
    """Name of the type that most numbers of some files of weights have. Of safetensors, only the head is read."""
    numbers: dict[str, int] = {}
    for name, shape in (entry for file in files for entry in dtypes_and_shapes(file)):
        numbers[name] = numbers.get(name, 0) + math.prod(shape)
    return max(numbers, key=numbers.get, default=None)


def dtypes_and_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    if file.suffix == ".bin":
        yield from ((name_of(tensor.dtype), list(tensor.shape)) for tensor in open_pickle(file).values())
        return
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            part = tensors.get_slice(name)
            yield FILE_DTYPES.get(part.get_dtype(), part.get_dtype()), part.get_shape()


def base_name(base: str) -> str:
    """What a base is called, without the folders or the owner that stand before it."""
    return Path(os.path.abspath(base)).name


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def merged_model(
    base: str,
    adapter: Path,
    into: str = DEFAULT_INTO,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A base model with its adapter merged into it, in memory. Arguments and errors are those of `plan_merge`."""
    return merge(plan_merge(adapter, base, into, dtype), device)[0]


@torch.no_grad()
def merge(plan: MergePlan, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Rounding]:
    """Merge an adapter into its base. Each layer is computed in float32, one at a time, and rounded once to the
    result's dtype.

    Raises:
        ArgumentError: adapter and base do not fit, the adapter is not finite, or a value is too large for `dtype`.
    """
    model = from_pretrained(AutoModelForCausalLM, plan.base, dtype=plan.values_dtype, device_map={"": device})
    if plan.saved_in_4_bits:
        model = model.dequantize()
    rounded = round_base(model, plan) if plan.rounds else {}
    adapted = load_adapter(model, plan.adapter)
    updates = {}
    for name, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer):
            updates[name.removeprefix("base_model.model.")] = add_update(layer, plan)
    model = adapted.unload()
    convert(model, plan.values_dtype, plan.dtype)
    return model, Rounding({name: (rounded[name], update) for name, update in updates.items() if name in rounded})


def round_base(model: PreTrainedModel, plan: MergePlan) -> dict[str, float]:
    """Round the layers as `round_weight` does, and return the norms by layer."""
    norms = {}
    for name, layer in quantised_layers(model).items():
        layer.weight.data, norms[name] = round_weight(layer.weight.data, plan)
    return norms


def round_weight(weight: Tensor, plan: MergePlan) -> tuple[Tensor, float]:
    """The matrix of the base that an adapter is merged into, rounded for a merge into the values of training, and the
    Frobenius norm of what rounding to 4 bits changes."""
    rounded = round_to_nf4(weight.to(plan.compute_dtype))
    norm = torch.linalg.vector_norm(weight - rounded.float()).item()
    return (rounded if plan.into == "trained" else weight), norm


def quantised_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that transformers quantises, by name: not the output head, and not subclasses, such as routers of
    experts."""
    return {name: layer for name, layer in find_linear_layers(model).items() if type(layer) is nn.Linear}


def add_update(layer: BaseTunerLayer, plan: MergePlan) -> float:
    """Merge the adapter of one layer in float32, round the sum to the result's dtype, and return the norm of the
    update. Raises ArgumentError where the sum is not finite."""
    weight = layer.get_base_layer().weight
    weight.data = before = weight.data.float()
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise ArgumentError(f"--adapter {plan.adapter}: {error}") from error
    update = torch.linalg.vector_norm(weight - before).item()
    weight.data = weight.to(plan.dtype)
    return update


def convert(model: PreTrainedModel, before: torch.dtype, dtype: torch.dtype) -> None:
    """Convert the weights that have the type `before` to `dtype`. Buffers that are not saved, such as frequencies of
    positions, keep theirs. Raises ArgumentError where a value is too large."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype == before:
            tensor.data = tensor.to(dtype)
        if tensor.dtype == dtype:
            require_finite(name, tensor)


def require_finite(name: str, weight: Tensor) -> None:
    """Raise ArgumentError for a weight of the result that is not finite."""
    if all(end.isfinite() for end in weight.aminmax()):  # a value that is no number is both ends
        return
    if weight.dtype == torch.float16:
        raise ArgumentError(
            f"--dtype float16: {name} has a value that is not finite in it (the largest is "
            f"{torch.finfo(weight.dtype).max:,.0f}); give --dtype bfloat16"
        )
    raise ArgumentError(f"{name}: the base has a value there that is not finite; fetch it again")


def round_to_nf4(weight: Tensor) -> Tensor:
    """Round a matrix to NF4 with double quantisation, and widen it to its dtype again, as QLoRA computes with it.

    A card does this where there is one: it did so in training, and sums the scales in another order than a processor.
    """
    place = torch.device("cuda") if torch.cuda.is_available() else weight.device
    packed, state = quantize_4bit(weight.to(place), compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.device)


def round_to_q8(weight: Tensor) -> Tensor:
    """Round a matrix to 8 bits, and widen it to its dtype again: GGUF's Q8_0, by the format's definition.

    Each 32 values of a row share a scale, the largest magnitude over 127, which is stored as float16. Halves are
    rounded away from zero. A matrix whose rows are no multiple of 32 stays, as llama.cpp leaves it.
    """
    if weight.shape[-1] % Q8_BLOCK:
        return weight
    blocks = weight.float().reshape(-1, Q8_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scales == 0, 0, 1 / scales)
    scaled = blocks * inverse
    steps = (scaled.abs() + 0.5).floor().copysign(scaled)
    return (steps * scales.half().float()).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def requantise(model: PreTrainedModel, bits: int) -> None:
    """Round every linear layer but the output head to 8 bits (GGUF's Q8_0) or 4 bits (NF4) and back, in place: what is
    left of a merged model once somebody has quantised it.

    The values come back in the model's dtype. To see the rounding alone, give a model in float32.
    """
    round_weight = {4: round_to_nf4, 8: round_to_q8}[bits]
    for layer in quantised_layers(model).values():
        layer.weight.data = round_weight(layer.weight)


def describe_rounding(plan: MergePlan, rounding: Rounding) -> str:
    """Say in one sentence how large the rounding of the base is beside the update, and what it means for a merge."""
    if not plan.rounds:
        if plan.saved_in_4_bits:
            return "the base is saved in 4 bits: how much its rounding changed is not known"
        return "the base had 16 bits in training: nothing was rounded, and the merge is the model that was trained"
    if not rounding.layers:
        return "no rounded layer is adapted: the base's rounding is no concern of the adapter"
    ratios = list(rounding.by_layer().items())
    (least, smallest), (most, largest) = ratios[0], ratios[-1]
    said = (
        f"rounding the base to 4 bits changes the adapted layers by {rounding.total:.3g} times the adapter's update "
        f"(from {smallest:.3g} times in {least} to {largest:.3g} in {most})"
    )
    if plan.bits is None and plan.into == "full":
        return (
            f"{plan.adapter} has no {MANIFEST}, so nothing tells which base it was trained beside; merged into the "
            f"full-precision one. If it was trained in 4 bits, try --into trained: {said}"
        )
    means = "this merge puts it on others (docs/quality.md)"
    if plan.into == "trained":
        means = "this merge keeps them. If you round it to 4 bits again, its update is lost: for that, use --into full"
    return f"{said}: the adapter has learned beside the rounded weights, and {means}"


def save_merged(plan: MergePlan, folder: Path, max_shard_size: str) -> Rounding:
    """Merge into an empty folder: weights, configuration, tokenizer, and how it was made. Raises as `merge` does."""
    logger.info(f"loading {plan.base}, to merge into {into_words(plan)}, in {name_of(plan.dtype)}")
    tokenizer = from_pretrained(AutoTokenizer, plan.base)
    adopt_conversation(tokenizer, plan.adapter)
    model, rounding = merge(plan)
    vars(model.config).pop("auto_map", None)  # the base's Python is not copied, and must not be asked for
    end_at_eos(model, tokenizer)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if isinstance(tokenizer, ChatGLMTokenizer):
        save_for_others(tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)
    record = plan.record()
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(folder, "merged", plan.base, plan.adapter, record)
    for file in folder.glob("*.safetensors"):  # which safetensors lets only the owner read
        file.chmod((folder / RECORD).stat().st_mode)
    return rounding


def save_for_others(tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Save a merged ChatGLM's tokenizer so that programs without this one read the same ids, and its configuration with
    what vLLM and SGLang look for. Here, tokenizer.json and the chat template beside it are not used.

    transformers 5 makes a tokenizer of its own from tokenizer.model, with other ids, unless there is a tokenizer.json.
    """
    if tokenizer.chat_template:
        logger.info("the base's chat template is not copied: ChatGLM's own takes its place")
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    try:
        write_tokenizer_json(tokenizer, folder)
    except ArgumentError as error:
        logger.warning(f"no tokenizer.json is written, and only this program reads the tokenizer rightly: {error}")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {"original_rope": True} | config | {"architectures": ["ChatGLMModel"]}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def into_words(plan: MergePlan) -> str:
    if plan.into == "full":
        return "its full-precision values"
    bits = "16-bit" if plan.bits == 16 else "4-bit"
    return f"the {bits} values of training" + (" (4 bits are assumed)" if plan.bits is None else "")


def end_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a model's generation stop at the tokenizer's EOS, too, where its answers end."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    if tokenizer.eos_token_id not in (None, *ends):
        model.generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]
