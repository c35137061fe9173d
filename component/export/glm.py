"""ChatGLM2/3 as transformers' own `GlmForCausalLM`: the same arithmetic under other names.

Logits in float32 are equal. In half precision they are close: GLM rounds before it multiplies by a norm's weight, and
ChatGLM after it.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from loguru import logger
from torch import Tensor
from transformers import GenerationConfig

from ..chatglm import ChatGLMConfig
from ..run.errors import ArgumentError
from ..trust import find_model_file, is_at_home, is_number, read_model_json
from .merge import FILE_DTYPES, name_of
from .weights import ChatGLMWeights

INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {dtype: name for name, dtype in FILE_DTYPES.items()}
LAYOUT = {  # values of config.json that no published ChatGLM2/3 lacks
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}
SAMPLING = (  # keys of generation_config.json
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "num_beams", "max_length", "max_new_tokens", "min_new_tokens"),
)
NOT_SAMPLING = ("bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config", "transformers_version")
PARTS = {  # of official names: GLM's. The norms of layers have the same in both
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = "self_attention.query_key_value"
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def check_layout(config: ChatGLMConfig) -> None:
    """Raise ArgumentError for a layout that neither transformers' GLM nor llama.cpp has."""
    file = Path(config.name_or_path, "config.json")
    for key, value in LAYOUT.items():
        if getattr(config, key) != value:
            raise ArgumentError(
                f"{file}: {key} is {json.dumps(getattr(config, key))}, and other programs know {json.dumps(value)} "
                "alone; merge it with script/merge_lora.py, whose folder keeps it"
            )
    if config.kv_channels % 4:
        raise ArgumentError(
            f"{file}: kv_channels is {config.kv_channels}, and other programs need a multiple of 4, since they turn "
            "half of a head in pairs; merge it with script/merge_lora.py, whose folder keeps it"
        )


def glm_config(config: ChatGLMConfig, stops: list[int]) -> dict:
    """The config.json of `GlmForCausalLM`, in the words of transformers 4 and 5.

    Args:
        stops: ids at which generation ends.
    """
    rope = {"rope_theta": 10000.0 * config.rope_ratio, "partial_rotary_factor": 0.5}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": config.seq_length,
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,  # where transformers 4 looks for them
        "initializer_range": config.initializer_range,
        "use_cache": config.use_cache,
        "tie_word_embeddings": False,
        **special_tokens(config, stops),
    }


def special_tokens(config: ChatGLMConfig, stops: list[int]) -> dict:
    return {"bos_token_id": None, "eos_token_id": stops, "pad_token_id": config.pad_token_id or 0}


def write_glm(weights: ChatGLMWeights, folder: Path, stops: list[int], max_shard_size: str = "2GB") -> None:
    """Write weights and configuration as a folder of `GlmForCausalLM` into an empty folder, one weight at a time.

    Args:
        weights: of a layout that GLM has (check_layout).
        stops: ids at which generation ends.
        max_shard_size: of one file of weights, at most, such as "2GB".

    Raises:
        ArgumentError: a weight is refused (ChatGLMWeights.read).
    """
    config = weights.config
    dtype = name_of(weights.dtype)
    write_json(folder / "config.json", glm_config(config, stops) | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", generation_config(weights.base) | special_tokens(config, stops))

    sketch: dict[str, Tensor] = {}
    sources: dict[str, str] = {}  # the official names of GLM's weights
    for name, shape in weights.shapes.items():
        parts = to_glm(name, torch.empty(shape, dtype=weights.dtype, device="meta"), config)
        sketch |= {part: tensor.clone() for part, tensor in parts.items()}  # each with storage of its own size
        sources |= dict.fromkeys(parts, name)
    plan = split_torch_state_dict_into_shards(
        sketch, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        write_shard(folder / file, {name: sketch[name] for name in names}, read_parts(weights, names, sources))
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def read_parts(weights: ChatGLMWeights, names: list[str], sources: dict[str, str]) -> Iterator[Tensor]:
    """Read the weights of some of GLM's names, in their order."""
    for source, group in groupby(names, sources.get):
        parts = to_glm(source, weights.read(source), weights.config)
        yield from (parts[name] for name in group)


def write_shard(file: Path, sketch: dict[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format) whose tensors are never in memory
    together, as safetensors' own writer needs them.

    Args:
        sketch: tensors on the meta device, by name.
        tensors: the same with their values, in this order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sketch.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[name_of(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the values are aligned
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            out.write(tensor.contiguous().view(torch.uint8).numpy())


def to_glm(name: str, tensor: Tensor, config: ChatGLMConfig) -> dict[str, Tensor]:
    """A tensor of ChatGLM under GLM's names: a weight, or a part of an adapter.

    GLM has projections of their own for queries, keys and values. Each of them gets its rows, and the whole of an
    adapter's A, which they share.
    """
    for official, part in PARTS.items():
        name = name.replace(official, part)
    before, fused, after = name.partition(FUSED)
    if not fused:
        return {name: tensor}
    rows = [tensor] * 3 if after.startswith(".lora_A") else split_rows(tensor, config)
    return {f"{before}{part}{after}": tensor for part, tensor in zip(QUERY_KEY_VALUE, rows, strict=True)}


def split_rows(tensor: Tensor, config: ChatGLMConfig) -> list[Tensor]:
    """Rows of queries, keys and values of a tensor of query_key_value, whose first dimension has all of them."""
    if config.multi_query_attention:  # all queries, all keys, all values
        groups = config.multi_query_group_num
        heads = tensor.unflatten(0, (-1, config.kv_channels)).split((config.num_attention_heads, groups, groups))
    else:  # for each head its query, key and value
        heads = tensor.unflatten(0, (config.num_attention_heads, 3, config.kv_channels)).unbind(1)
    return [part.flatten(0, 1) for part in heads]


def generation_config(base: str) -> dict:
    """What a base's generation_config.json says of sampling in plain values. A warning tells what else it has."""
    file = find_model_file(base, "generation_config.json")
    if not file:
        return {}
    if not is_at_home(file):
        logger.warning(f"{file}: a link that leads out of its folder; what it says of sampling is left out")
        return {}
    values = read_model_json(file)
    kept = {key: values[key] for key in SAMPLING if isinstance(values.get(key), bool) or is_number(values.get(key))}
    defaults = GenerationConfig().to_dict() | {"use_cache": True}  # which transformers writes of every model
    others = {key: value for key, value in values.items() if value not in (None, False, defaults.get(key))}
    if others := others.keys() - {*kept, *NOT_SAMPLING}:
        logger.warning(
            f"{file}: only numbers of sampling are taken over, and not {', '.join(map(ascii, sorted(others)))}"
        )
    return kept


def write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
