"""The tokenizer, the base model in 4 or 16 bits, and its LoRA adapter."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import StrictDataclassError
from loguru import logger
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .chat_templates import control_tokens, set_chat_template
from .chatglm import ChatGLMTokenizer
from .chatglm.versions import warn_if_untested
from .run.errors import ArgumentError, DoesNotFit, unusable
from .run.manifest import MANIFEST
from .run.resume import is_digest
from .settings.schema import QLoRAArguments
from .trust import (
    check_adapter,
    check_model,
    check_weights,
    find_adapter,
    find_model_file,
    find_weights,
    lasting_name,
    read_adapter,
    read_adapter_shapes,
    read_conversation,
    read_model_json,
    read_run,
)

BITS = (4, 16)  # that a base may have
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DRIVER = "/proc/driver/nvidia/version"  # exists where NVIDIA's driver is loaded
# Raised by libraries for values, shapes and files of a model that they do not expect, and for want of memory.
UNLOADABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
UNLOADABLE += (SafetensorError, StrictDataclassError)


def load_tokenizer(args: QLoRAArguments) -> PreTrainedTokenizerBase:
    """`open_tokenizer` for the settings of a run."""
    return open_tokenizer(args.model_name_or_path, args.chat_template)


def open_tokenizer(name_or_path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, with `chat_template` if that is given. Its `embedding_rows` is the number of rows
    in the model's embedding, its `stops` the ids at which transformers' generate stops.

    If it names no padding token, or one without a row in the embedding, EOS pads: padding is never learned or attended.

    Raises:
        ArgumentError: there is no such model, or it needs Python of its own.
    """
    tokenizer = from_pretrained(AutoTokenizer, name_or_path)
    if chat_template:
        set_chat_template(tokenizer, chat_template)
    tokenizer.embedding_rows, tokenizer.stops = math.inf, set()
    if find_model_file(name_or_path, "config.json"):  # the inspector takes a tokenizer's folder too
        config = from_pretrained(AutoConfig, name_or_path).get_text_config()
        tokenizer.embedding_rows = config.vocab_size
        tokenizer.stops = find_stops(name_or_path, config)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= tokenizer.embedding_rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_stops(name_or_path: str, config) -> set[int]:
    """Ids at which transformers' generate stops for a model: those of generation_config.json, else of config.json."""
    file = find_model_file(name_or_path, "generation_config.json")
    eos = read_model_json(file).get("eos_token_id") if file else config.eos_token_id
    return {token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)}


def load_model(args: QLoRAArguments, training_args: TrainingArguments) -> PreTrainedModel:
    """Load a run's base model on this process's device, as `load_base` does."""
    dtype = getattr(torch, args.compute_dtype)
    model = load_base(args.model_name_or_path, args.base_bits, dtype, training_args.device)
    model.config.use_cache = False  # training does not use the cache of generation
    warn_of_length(model, args)
    return model


def load_base(name_or_path: str, bits: int, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load a base model on a device.

    Args:
        bits: 4 to quantise its linear layers while it loads, to NF4 with double quantisation; 16 to leave them.
        dtype: of the arithmetic, and of all weights that are not quantised: embedding, norms and output head, with 16
            bits the linear layers too (see `bits_in_memory`).

    Raises:
        ArgumentError: there is no such model, it needs Python of its own, or `check_bits` refuses it.
    """
    check_bits(name_or_path, bits)
    quantization = {"quantization_config": four_bit(dtype)} if bits == 4 else {}
    model = from_pretrained(AutoModelForCausalLM, name_or_path, dtype=dtype, device_map={"": device}, **quantization)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # In eval mode on some CPUs, bitsandbytes repacks a weight into a form that has no gradient (0.50.2), so
            # that training after the first evaluation fails or, in layers without a bias, silently learns nothing.
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight, "quant_state", None) is None:
                raise ArgumentError(
                    f"model {name_or_path!r}: its config.json says that it is quantised, and its weights are not; "
                    "remove quantization_config from config.json"
                )
    return model


def bits_in_memory(bits: int, dtype: torch.dtype) -> int:
    """Bits that each weight of a base's linear layers has once `load_base` has loaded it."""
    return 32 if bits == 16 and dtype == torch.float32 else bits


def check_bits(name_or_path: str, bits: int) -> None:
    """Raise ArgumentError for a base that is wanted in 16 bits and saved in fewer."""
    file = find_model_file(name_or_path, "config.json")
    if bits == 16 and file and read_model_json(file).get("quantization_config"):
        raise ArgumentError(
            f"{file}: the base is saved quantised, and its 16 bits are lost; set base_bits to 4, or take the full "
            "checkpoint"
        )


def sketch_model(args: QLoRAArguments) -> PeftModel:
    """The model with its adapter on the meta device: every shape, no weights. In half precision, as on a card."""
    base = sketch_base(args.model_name_or_path)
    with torch.device("meta"):
        if args.base_bits == 4:
            for name, layer in find_linear_layers(base).items():
                four_bits = Linear4bit(layer.in_features, layer.out_features, bias=False)
                four_bits.bias = layer.bias
                base.set_submodule(name, four_bits)
        warn_of_length(base, args)
        return attach_lora(base, args)


def sketch_base(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A base model on the meta device."""
    config = from_pretrained(AutoConfig, name_or_path)
    with faults_of(name_or_path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def warn_of_length(base: PreTrainedModel, args: QLoRAArguments) -> None:
    """Warn of samples that may be longer than any text that the base was made for."""
    config = base.config.get_text_config()
    positions = longest_text(config)
    if args.max_seq_length > positions:
        is_short = config.model_type == "chatglm" and positions < 32_768
        longer = "chatglm3-6b-32k" if is_short else "a base for longer texts"
        logger.warning(
            f"max_seq_length is {args.max_seq_length:,}, and {args.model_name_or_path} was made for {positions:,} "
            f"tokens: beyond them it has learned nothing; lower max_seq_length, or take {longer}"
        )


def longest_text(config) -> float:
    """Tokens of the longest text that a base was made for, by its positions and how these are stretched."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "yarn"):
        return positions
    return max(positions, int((rope.get("original_max_position_embeddings") or positions) * (rope.get("factor") or 1)))


def warn_of_cpu(args: QLoRAArguments) -> None:
    """Warn of a card that torch cannot use, and of a model that is large for a processor."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda and Path(DRIVER).exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        logger.warning(
            f"there is an NVIDIA card, but torch {torch.__version__} cannot use it ({cuda_fault()}), so this runs on "
            f"the processor: install a driver for CUDA {torch.version.cuda} or newer, or a torch for the driver's CUDA"
        )
    billions = sketch_base(args.model_name_or_path).num_parameters() / 1e9
    if billions > 1:
        logger.warning(
            f"{args.model_name_or_path} has {billions:.1f} billion parameters and there is no CUDA here: an update "
            "takes minutes to hours; after the first one, the run says how long it will take"
            + f"; in float32, a base of 16 bits takes {4 * billions:.0f} GB"
            * (args.base_bits == 16)
        )


def cuda_fault() -> str:
    """First sentence of torch's reason for not using CUDA."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return re.split(r"(?<=\))\. |\. |\n", str(error))[0]
    return "it finds no device"


def four_bit(compute_dtype: torch.dtype | str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def from_pretrained(auto_class: type, name_or_path: str, **kwargs):
    """Call `auto_class.from_pretrained` after `check_model`, without running Python of the model's own.

    Weights are loaded from the files that were checked: safetensors, or torch's archives by
    torch.load(weights_only=True, mmap=True).

    Raises:
        ArgumentError: there is no such model, or it needs more than that.
    """
    warn_if_untested()
    # Else transformers may load safetensors that the hub's robot converted, instead of the checked weights.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with faults_of(name_or_path):
        check_model(name_or_path)
        pickled = auto_class is AutoModelForCausalLM and check_weights(find_weights(name_or_path))
        return auto_class.from_pretrained(name_or_path, trust_remote_code=False, use_safetensors=not pickled, **kwargs)


@contextmanager
def faults_of(name_or_path: str) -> Iterator[None]:
    """Turn whatever libraries raise over a model's files, within the block, into a Fault."""
    try:
        yield
    except ArgumentError:
        raise
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise DoesNotFit(
            f"model {name_or_path!r} does not fit the card ({reason}): free the card of other programs, set base_bits "
            "to 4 if it is 16, or take a smaller model"
        ) from error
    except UNLOADABLE as error:
        fault = f"model {name_or_path!r}: {error}"
        if "trust_remote_code" in str(error):
            fault = f"{Path(name_or_path, 'tokenizer_config.json')}: the class that auto_map names is not known"
        remedy = (
            "Give a folder with all of the model's files, or the hub name of a model that "
            "transformers knows; a model's own Python is never run"
        )
        raise unusable(f"{fault}\n{remedy}", error, ArgumentError) from error


def find_linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers by name, without the output head: those that are quantised, and adapted by default."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def find_linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers, such as `query_key_value`, without the output head."""
    return sorted({name.rpartition(".")[2] for name in find_linear_layers(model)})


def attach_lora(model: PreTrainedModel, args: QLoRAArguments) -> PeftModel:
    """Freeze the base and add a new adapter. Its weights are float32, whatever the base computes in.

    Raises:
        ArgumentError: `target_modules` names a layer that the model does not have.
    """
    config = lora_config(model, args)
    logger.info(f"LoRA of rank {config.r} on {', '.join(sorted(config.target_modules))}")
    adapted = get_peft_model(model, config)
    adapted.active_peft_config.base_model_name_or_path = lasting_name(model.name_or_path)  # saved with the adapter
    return adapted


def lora_config(model: PreTrainedModel, args: QLoRAArguments) -> LoraConfig:
    """peft's settings of the adapter. Raises ArgumentError as `attach_lora` does."""
    available = find_linear_names(model)
    targets = args.target_modules or available
    if not targets:
        raise ArgumentError(f"{args.model_name_or_path}: no linear layer to adapt; look at its config.json")
    if unknown := [name for name in targets if name not in available]:
        raise ArgumentError(
            f"target_modules: no linear layer is called {unknown[0]!r}; there are {', '.join(available)}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )


def check_beginning(args: QLoRAArguments, base: str, prompts: dict[str, str]) -> None:
    """Check that the run can begin from `adapter_name_or_path`: that this adapter has the run's shape, scale and base.

    No tensor of the adapter is read, and no weight of the base.

    Args:
        base: the base's identity (component.trust.identify_base), which an adapter's manifest records.
        prompts: that of the prompt format (describe_format), which may differ, with a warning.

    Raises:
        ArgumentError: `check_adapter` refuses the adapter, or it differs. The text lists what differs.
    """
    folder, model = find_adapter(args.adapter_name_or_path), sketch_base(args.model_name_or_path)
    config, shapes = check_adapter(folder), read_adapter_shapes(folder)
    if config["use_dora"]:
        raise ArgumentError(
            f"{folder / 'adapter_config.json'}: use_dora is true, and DoRA is not trained here; merge the adapter into "
            "its base (script/merge_lora.py), and train a new one on the result"
        )
    adapted, available = layers_of(shapes), find_linear_names(model)
    if strays := [name for name in adapted if name not in available]:
        raise ArgumentError(
            f"{folder}: it adapts {strays[0]}, and in {args.model_name_or_path} only {', '.join(available)} are "
            f"adapted; its base is {config['base_model_name_or_path']!r}"
        )
    with torch.device("meta"):
        sketch = get_peft_model_state_dict(get_peft_model(model, lora_config(model, args)), save_embedding_layers=False)
    wanted = {name: list(weight.shape) for name, weight in sketch.items()}
    # use_rslora divides alpha by the root of the rank, which is plain LoRA with another alpha.
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config["use_rslora"] else 1)
    in_adapter = {"lora_rank": config["r"], "lora_alpha": alpha, "target_modules": adapted}
    in_run = {"lora_rank": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": layers_of(wanted)}
    if others := [key for key in in_run if in_adapter[key] != in_run[key]]:
        wants, has = ({key: json.dumps(values[key]) for key in others} for values in (in_adapter, in_run))
        settings = ", ".join(f"{key}={wants[key]}" for key in others)
        lines = [f"{key}: {wants[key]} in the adapter, {has[key]} in this run" for key in others]
        raise ArgumentError("\n  ".join([f"{folder} is not of this run's shape; set {settings}:", *lines]))
    if shapes != wanted:
        name = min(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ArgumentError(
            f"{folder}: {name} has the shape {shapes.get(name)} in the adapter, and {wanted.get(name)} beside "
            f"{args.model_name_or_path}; give the adapter's base, which is {config['base_model_name_or_path']!r}"
        )
    recorded = read_run(folder)
    check_same_base(folder, config["base_model_name_or_path"], args.model_name_or_path, base, recorded)
    warn_of_format(folder, prompts, recorded)
    theirs, _ = read_training(folder)
    if theirs not in (None, args.base_bits):
        logger.warning(
            f"{folder} was trained beside a base in {theirs} bits, and this run's base_bits is {args.base_bits}: it "
            "has learned to make good for the rounding of its own base, and has to learn anew what this one's is; to "
            f"go on as it was trained, set base_bits to {theirs}"
        )
    if config["lora_dropout"] != args.lora_dropout:
        logger.info(f"lora_dropout: {config['lora_dropout']:g} in the adapter, {args.lora_dropout:g} in this run")


def layers_of(shapes: dict[str, list[int]]) -> list[str]:
    """Last parts of the names of the layers that an adapter's tensors adapt."""
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in shapes})


def read_training(adapter: Path) -> tuple[int | None, torch.dtype | None]:
    """Read from an adapter's manifest how its base was loaded for training: (bits, dtype of the arithmetic). Each is
    None where nothing records it; earlier versions, whose bases all had 4 bits, do not record the bits.

    Raises:
        ArgumentError: one of them is a value that there is not.
    """
    settings = read_run(adapter).get("settings")
    if not isinstance(settings, dict):
        return None, None
    bits, dtype = settings.get("base_bits", 4), settings.get("compute_dtype")
    if bits not in BITS or dtype not in (None, *DTYPES):
        raise ArgumentError(
            f"{adapter / MANIFEST}: base_bits is {bits!r} and compute_dtype {dtype!r}; expected 4 or 16, and one of "
            f"{', '.join(DTYPES)}; take the adapter from its run again"
        )
    return bits, DTYPES.get(dtype)


def check_same_base(folder: Path, its_base: str | None, name_or_path: str, base: str, run: dict) -> None:
    """Refuse a base with other contents than the run of an adapter of ours records. Without such a record, warn of a
    base with another name: a folder may have been moved or renamed."""
    recorded = run.get("base_model")
    if recorded == base:
        return
    if is_digest(recorded) and is_digest(base) and find_weights(name_or_path):  # a dry run needs no weights
        raise ArgumentError(
            f"{folder}: it was trained on a base with other weights or another config.json than {name_or_path}; give "
            f"that base, {its_base!r} (if they are the same model in other files, remove {MANIFEST} from a copy of the "
            "adapter)"
        )
    if its_base and Path(its_base).name != Path(name_or_path).name:
        logger.warning(
            f"{folder} was trained on {its_base}, and this run's base is {name_or_path}: the shapes fit, but make sure "
            "that it is the same model"
        )


def warn_of_format(folder: Path, prompts: dict[str, str], run: dict) -> None:
    """Warn if an adapter's own run wrote its prompts otherwise, as far as it records how."""
    theirs = run.get("format")
    if not isinstance(theirs, dict) or theirs == {key: prompts.get(key) for key in theirs}:
        return
    differs = f"data_format {theirs.get('name')!r}, and this run has {prompts['name']!r}"
    if theirs.get("name") == prompts["name"]:
        differs = f"data_format {prompts['name']!r} as this run, but another chat template or tokenizer"
    logger.warning(
        f"{folder} was trained with {differs}: the adapter has to learn its prompts anew; to go on as it was trained, "
        "set data_format and chat_template as its run had them"
    )


def begin_from_adapter(model: PeftModel, name_or_path: str) -> None:
    """Give a new adapter the weights of a trained one, which `check_beginning` has found to fit. Raises ArgumentError
    as `read_finite_adapter` does."""
    set_peft_model_state_dict(model, read_finite_adapter(find_adapter(name_or_path)))


def read_finite_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by name.

    Raises:
        ArgumentError: one of them is not finite, or of a type that adapters are not trained in.
    """
    weights = read_adapter(folder)
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ArgumentError(
                f"{folder}: {name} is of type {weight.dtype}; give an adapter in float32 or half precision"
            )
    if bad := [name for name, weight in weights.items() if not weight.float().isfinite().all()]:
        raise ArgumentError(f"{folder}: {bad[0]} and {len(bad) - 1} others are not finite; take an earlier checkpoint")
    return weights


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Add a trained adapter to the model, and see that each of its tensors found a layer.

    Raises:
        ArgumentError: `check_adapter` refuses the adapter, or it belongs to another model.
    """
    check_adapter(Path(folder))
    saved = read_adapter_shapes(Path(folder))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(f"{folder}: not an adapter of {model.name_or_path!r} ({error}); give its base") from error
    if strays := saved.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys():
        raise ArgumentError(f"{folder}: {min(strays)} has no place in {model.name_or_path!r}; give the adapter's base")
    bad = [name for name, weight in adapted.named_parameters() if ".lora_" in name and not weight.isfinite().all()]
    if bad:
        raise ArgumentError(f"{folder}: {bad[0]} is not finite; take an earlier checkpoint of its training")
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and isinstance(head, BaseTunerLayer):
        raise ArgumentError(
            f"{folder}: it adapts the output head, which {model.name_or_path!r} shares with its embedding; leave the "
            "head out of target_modules"
        )
    return adapted


def check_fits(folder: Path, base: PreTrainedModel) -> None:
    """Raise ArgumentError unless an adapter's tensors are those that its settings ask for beside a base, each of its
    shape. No weight is read.

    Args:
        base: as `sketch_base` makes it; it stays as it is.
    """
    wanted, config = {}, LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = None  # else peft warns of another name
    with torch.device("meta"), suppress(ValueError):  # peft raises it where the base has none of the layers
        adapted = get_peft_model(deepcopy(base), config)
        sketch = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        wanted = {name: list(weight.shape) for name, weight in sketch.items()}
    shapes = read_adapter_shapes(folder)
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            raise ArgumentError(
                f"{folder}: {name} of shape {shape} has no place in {base.name_or_path!r}; give its base"
            )
    if missing := wanted.keys() - shapes.keys():
        raise ArgumentError(
            f"{folder}: {min(missing)} is missing, and target_modules in adapter_config.json asks for it; fetch or "
            "train the adapter again"
        )


def adopt_conversation(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give a base's tokenizer the chat template and the EOS that its adapter was trained with, where `folder`, the
    adapter's, has them. The template is copied, not run. ChatGLM's tokenizer has its own conversation, and keeps it.

    Raises:
        ArgumentError: the files cannot be read, or the EOS is no control token of the base.
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        return
    new = {name: value for name, value in read_conversation(folder).items() if value != getattr(tokenizer, name)}
    if "eos_token" in new and new["eos_token"] not in control_tokens(tokenizer):
        raise ArgumentError(
            f"{folder / 'tokenizer_config.json'}: eos_token is {new['eos_token']!r}, which is no control token of the "
            "base; give the base that the adapter was trained on, or remove the key"
        )
    for name, value in new.items():
        setattr(tokenizer, name, value)
    if new:
        logger.info(f"{' and '.join(new)}: taken over from {folder}; answers end at {tokenizer.eos_token}")
