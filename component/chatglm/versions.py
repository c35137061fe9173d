"""Tested versions of transformers, what differs between them, and a check that generation works on any version."""

from functools import cache

import torch
import transformers
from loguru import logger
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..run.errors import ArgumentError

# `make test-versions` reads this line, too.
TESTED = ("5.17.0", "5.23.0", "5.24.0")

# Name of the cache in arguments and outputs of transformers: the first until 5.23, the second since.
CACHE = next(name for name in ("past_key_values", "cache") if name in BaseModelOutputWithPast.__dataclass_fields__)

SHAPE = {"padded_vocab_size": 16, "hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1, "num_attention_heads": 2}
SHAPE |= {"kv_channels": 4, "multi_query_group_num": 1}


def describe_versions() -> str:
    return f"transformers {transformers.__version__} is installed; tested are {', '.join(TESTED)}"


@cache
def warn_if_untested() -> None:
    if transformers.__version__ not in TESTED:
        logger.warning(f"{describe_versions()}. If something fails or looks wrong, install one of these")


@cache
def check_generation(model_class: type[PreTrainedModel]) -> None:
    """Compare two greedy steps with and without a cache, on a model of a few hundred weights, once a process.

    Raises:
        ArgumentError: they differ or fail, so this version of transformers passes the cache in an unknown way.
    """
    warn_if_untested()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            model = model_class(model_class.config_class(**SHAPE)).float().eval()
            for weight in model.parameters():
                weight.data = torch.arange(weight.numel()).view_as(weight).float().sin()
            with_cache, without = (greedy_logits(model, use_cache) for use_cache in (True, False))
        difference = (with_cache - without).abs().max().item()
    except Exception as error:
        raise ArgumentError(refusal(f"generation fails ({type(error).__name__}: {error})")) from error
    if not difference <= 1e-3:
        raise ArgumentError(refusal(f"with its cache, generation is off by {difference:.1e}"))


def greedy_logits(model: PreTrainedModel, use_cache: bool) -> torch.Tensor:
    """Logits (2, vocab) of two greedy steps, from the inputs that `chat` would give."""
    places = torch.arange(5)[None]
    inputs = {"inputs": places + 3, "attention_mask": torch.ones_like(places), "position_ids": places}
    settings = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2, "use_cache": use_cache}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    return torch.cat(GenerationMixin.generate(model, **inputs, **settings, **wanted).logits)


def refusal(what: str) -> str:
    return f"{describe_versions()}. With it {what}, so no answer can be trusted. Install one of the tested versions"
