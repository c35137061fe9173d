"""The tokenizer, the 4-bit base model and its LoRA adapter."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from loguru import logger
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .chat_templates import set_chat_template
from .chatglm.versions import warn_if_untested
from .run.errors import ArgumentError, unusable
from .settings.schema import QLoRAArguments
from .trust import check_adapter, check_model, check_weights, find_model_file, find_weights, read_adapter_shapes

DRIVER = "/proc/driver/nvidia/version"  # exists where NVIDIA's driver is loaded
# Raised by libraries for values, shapes and files of a model that they do not expect, and for want of memory.
UNLOADABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
UNLOADABLE += (SafetensorError,)


def load_tokenizer(args: QLoRAArguments) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, with `chat_template` if that is given, and set its `embedding_rows` to the number
    of rows in the model's embedding.

    If it names no padding token, or one without a row in the embedding, EOS pads: padding is never learned or attended.

    Raises:
        ArgumentError: there is no such model, or it needs Python of its own.
    """
    tokenizer = from_pretrained(AutoTokenizer, args.model_name_or_path)
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template)
    tokenizer.embedding_rows = math.inf
    if find_model_file(args.model_name_or_path, "config.json"):  # the inspector takes a tokenizer's folder too
        tokenizer.embedding_rows = from_pretrained(AutoConfig, args.model_name_or_path).get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= tokenizer.embedding_rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: QLoRAArguments, training_args: TrainingArguments) -> PreTrainedModel:
    """Load the base model, quantised while it loads: NF4 with double quantisation, on this process's device.

    Embeddings, norms and the output head stay in `compute_dtype`.
    """
    compute_dtype = getattr(torch, args.compute_dtype)
    model = from_pretrained(
        AutoModelForCausalLM,
        args.model_name_or_path,
        quantization_config=four_bit(compute_dtype),
        dtype=compute_dtype,
        device_map={"": training_args.device},
    )
    model.config.use_cache = False  # training does not use the cache of generation
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # In eval mode on some CPUs, bitsandbytes repacks a weight into a form that has no gradient (0.50.2), so
            # that training after the first evaluation fails or, in layers without a bias, silently learns nothing.
            layer.support_avx512bf16_for_cpu = False
    return model


def sketch_model(args: QLoRAArguments) -> PeftModel:
    """The model with its adapter on the meta device: every shape, no weights. In half precision, as on a card."""
    base = sketch_base(args.model_name_or_path)
    with torch.device("meta"):
        return attach_lora(base, args)


def sketch_base(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A base model on the meta device."""
    config = from_pretrained(AutoConfig, name_or_path)
    with faults_of(name_or_path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


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
        )


def cuda_fault() -> str:
    """First sentence of torch's reason for not using CUDA."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return re.split(r"(?<=\))\. |\. |\n", str(error))[0]
    return "it finds no device"


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
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
    except UNLOADABLE as error:
        fault = f"model {name_or_path!r}: {error}"
        if "trust_remote_code" in str(error):
            fault = f"{Path(name_or_path, 'tokenizer_config.json')}: the class that auto_map names is not known"
        remedy = (
            "Give a folder with all of the model's files, or the hub name of a model that "
            "transformers knows; a model's own Python is never run"
        )
        raise unusable(f"{fault}\n{remedy}", error, ArgumentError) from error


def find_linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers, such as `query_key_value`, without the output head."""
    head = model.get_output_embeddings()
    linear = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def attach_lora(model: PreTrainedModel, args: QLoRAArguments) -> PeftModel:
    """Freeze the base and add the adapter. Its weights are float32, whatever the base computes in.

    Raises:
        ArgumentError: `target_modules` names a layer that the model does not have.
    """
    available = find_linear_names(model)
    targets = args.target_modules or available
    if not targets:
        raise ArgumentError(f"{args.model_name_or_path}: no linear layer to adapt; look at its config.json")
    if unknown := [name for name in targets if name not in available]:
        raise ArgumentError(
            f"target_modules: no linear layer is called {unknown[0]!r}; there are {', '.join(available)}"
        )
    logger.info(f"LoRA of rank {args.lora_rank} on {', '.join(targets)}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Add a trained adapter to the model, and see that each of its tensors found a layer.

    Raises:
        ArgumentError: `check_adapter` refuses the adapter, or it belongs to another model.
    """
    check_adapter(Path(folder))
    _, saved = read_adapter_shapes(Path(folder))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(f"{folder}: not an adapter of {model.name_or_path!r} ({error}); give its base") from error
    if strays := saved.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys():
        raise ArgumentError(f"{folder}: {min(strays)} has no place in {model.name_or_path!r}; give the adapter's base")
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and isinstance(head, BaseTunerLayer):
        raise ArgumentError(
            f"{folder}: it adapts the output head, which {model.name_or_path!r} shares with its embedding; leave the "
            "head out of target_modules"
        )
    return adapted
