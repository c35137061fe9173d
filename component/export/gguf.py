"""A ChatGLM2/3 model, or an adapter of one, as GGUF: the file of llama.cpp, Ollama and LM Studio.

The tensors' names and shapes are those of llama.cpp's architecture `chatglm`. Its tokenizer is told SentencePiece's
scores and gives the ids of ours.
"""

import math
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFType, GGUFWriter, Keys, LlamaFileType, TokenType
from gguf.quants import quantize
from loguru import logger
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor

from ..chatglm import ChatGLMConfig, ChatGLMTokenizer
from ..run.errors import ArgumentError
from ..run.files import replacing
from ..trust import read_adapter
from .glm import check_layout
from .merge import base_name
from .tokenizer import NAMES, export_template
from .weights import ChatGLMWeights

ARCHITECTURE = "chatglm"
KINDS = {  # the type of every matrix, and llama.cpp's name for a file of them
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LARGEST = {GGMLQuantizationType.F16: 65504, GGMLQuantizationType.Q8_0: 127 * 65504}  # its scales are float16
MODULES = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
# llama.cpp finds a control token wherever its text stands in a chat. These are words of other languages, HTML too.
RENAMED = NAMES | {"<s>": "<bos>", "</s>": "<eos>"}
MODELFILE = '''# For Ollama: ollama create NAME --file Modelfile
# The template gives a chat the tokens of training. It offers no functions: Ollama cannot write them, and their calls,
# token for token. Serve those with llama-server or script/serve.py.
FROM ./{model}
TEMPLATE """{template}"""
'''
OLLAMA = {  # ChatGLM2 counts its rounds: `$rounds` has a character for each
    2: '[gMASK]<sop>{{ $rounds := "" }}{{ range .Messages }}'
    '{{ if eq .Role "user" }}{{ $rounds = printf "%s." $rounds }}'
    "[Round {{ len $rounds }}]\n\n问：{{ .Content }}\n\n答："
    '{{ else if eq .Role "assistant" }}{{ if .Content }} {{ .Content }}{{ end }}<eos>{{ end }}{{ end }}',
    3: '[gMASK]<sop>{{ range .Messages }}<|{{ if eq .Role "tool" }}observation{{ else }}{{ .Role }}{{ end }}|>\n'
    "{{ if .Content }} {{ .Content }}{{ end }}{{ end }}<|assistant|>",
}
STOPS = {2: (), 3: ("<|user|>", "<|observation|>")}  # beside EOS


def write_gguf(weights: ChatGLMWeights, tokenizer: ChatGLMTokenizer, file: Path, kind: str) -> None:
    """Write a model as one GGUF file, whole or not at all. One weight at a time is in memory.

    Args:
        weights: opened in float32, so that every value is rounded once, and of a layout that check_shape takes.
        kind: of the matrices, one of KINDS; vectors are always float32. A matrix whose rows are no multiple of 32 is
            float16 in a file of q8_0, as llama.cpp writes it.

    Raises:
        ArgumentError: llama.cpp lacks the model's tokenizer, there is no such kind, or a value is too large.
    """
    matrices, file_type = find_kind(kind)
    config = weights.config
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(base_name(weights.base))
    writer.add_file_type(file_type)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer, config.padded_vocab_size)
    types = {name: type_of(shape, matrices) for name, shape in weights.shapes.items()}
    if odd := [name for name, of_it in types.items() if len(weights.shapes[name]) > 1 and of_it != matrices]:
        logger.warning(
            f"--type {kind}: rows of {len(odd)} matrices are no multiple of 32, so they stay float16: {odd[0]} …"
        )
    shapes = {tensor_name(name): (shape, types[name]) for name, shape in weights.shapes.items()}
    tensors = (encode(arrange(weights.read(name), config, name), types[name], name, kind) for name in weights.shapes)
    write(writer, file, shapes, tensors)


def write_gguf_adapter(adapter: Path, settings: dict, config: ChatGLMConfig, file: Path) -> None:
    """Write an adapter as GGUF, in float32, for `llama-server --lora` on the base's own GGUF.

    Args:
        adapter: its folder.
        settings: its own, as check_adapter returns them.
        config: its base's.

    Raises:
        ArgumentError: it is DoRA, which llama.cpp lacks, or llama.cpp lacks its base's layout.
    """
    if settings["use_dora"]:
        raise ArgumentError(
            f"{adapter / 'adapter_config.json'}: use_dora is true, and llama.cpp has no DoRA; merge it into its base "
            "with --to gguf"
        )
    check_shape(config)
    alpha = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings["use_rslora"] else 1)
    parts = {name.removeprefix("base_model.model."): part for name, part in read_adapter(adapter).items()}
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)  # llama.cpp divides it by the rank
    shapes, tensors = {}, []
    for name, part in parts.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".lora_")
        if matrix == "B":
            part = arrange(part, config, f"{layer}.weight")
        elif matrix == "embedding_A":  # llama.cpp takes a row of it for each token
            part = part.T
        written = f"{tensor_name(f'{layer}.weight')}.lora_{matrix.removeprefix('embedding_').lower()}"
        shapes[written] = part.shape, GGMLQuantizationType.F32
        tensors.append(encode(part, GGMLQuantizationType.F32, name, "f32"))
    write(writer, file, shapes, tensors)


def write_modelfile(folder: Path, gguf_name: str, tokenizer: ChatGLMTokenizer) -> None:
    """Write the Modelfile with which Ollama runs a GGUF file beside it."""
    version = tokenizer.chatglm_version
    stops = "".join(f'PARAMETER stop "{stop}"\n' for stop in STOPS[version])
    text = MODELFILE.format(model=gguf_name, template=OLLAMA[version]) + stops
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def converter_command(folder: str | Path, file: str | Path, kind: str) -> str:
    """The command of llama.cpp's converter for the merged model of another family."""
    find_kind(kind)
    return shlex.join(["python", "convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype", kind])


def find_kind(kind: str) -> tuple[GGMLQuantizationType, LlamaFileType]:
    if kind not in KINDS:
        raise ArgumentError(f"--type {kind}: expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def bytes_of(kind: str) -> float:
    """Bytes that each number of a matrix takes."""
    block, size = GGML_QUANT_SIZES[find_kind(kind)[0]]
    return size / block


def check_shape(config: ChatGLMConfig) -> None:
    """Refuse a layout that llama.cpp's `chatglm` does not have."""
    check_layout(config)
    file = Path(config.name_or_path, "config.json")
    heads, width = config.num_attention_heads, config.kv_channels
    if heads * width != config.hidden_size:
        raise ArgumentError(
            f"{file}: {heads} heads (num_attention_heads) of {width} (kv_channels) are not as wide as hidden_size, "
            f"{config.hidden_size}, which llama.cpp's chatglm needs; use --to glm"
        )


def add_shape(writer: GGUFWriter, config: ChatGLMConfig) -> None:
    """Tell llama.cpp the sizes of a model, in its own terms."""
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    writer.add_rope_freq_base(10000 * config.rope_ratio)
    writer.add_vocab_size(config.padded_vocab_size)


def add_tokenizer(writer: GGUFWriter, tokenizer: ChatGLMTokenizer, rows: int) -> None:
    """Tell llama.cpp the tokenizer of a model whose embedding has `rows` rows."""
    pieces = tokenizer.tokenizer
    last = max(pieces.index_special_tokens)
    if last >= rows:
        raise ArgumentError(
            f"the tokenizer's token {pieces.index_special_tokens[last]!r} has the id {last}, and config.json's "
            f"padded_vocab_size is {rows}; give the tokenizer of this model"
        )
    texts, scores, types = zip(*tokens(tokenizer, rows), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(pieces.bos_id)
    writer.add_eos_token_id(pieces.eos_id)
    writer.add_unk_token_id(pieces.sp_model.unk_id())
    writer.add_pad_token_id(pieces.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)
    if tokenizer.chatglm_version == 3:
        writer.add_eot_token_id(tokenizer.get_command("<|user|>"))
        writer.add_eom_token_id(tokenizer.get_command("<|observation|>"))
    writer.add_chat_template(export_template(tokenizer.chatglm_version).replace("</s>", RENAMED["</s>"]))


def tokens(tokenizer: ChatGLMTokenizer, rows: int) -> Iterator[tuple[str, float, TokenType]]:
    """Text, score and type of every id below `rows`."""
    pieces = ModelProto.FromString(tokenizer.tokenizer.sp_model.serialized_model_proto()).pieces
    for piece in pieces:
        token_type = TokenType(piece.type)  # SentencePiece's numbers
        text = RENAMED.get(piece.piece, piece.piece) if token_type == TokenType.CONTROL else piece.piece
        yield text, piece.score, token_type
    for i in range(len(pieces), rows):
        token = tokenizer.tokenizer.index_special_tokens.get(i)
        if token is None:
            yield f"[PAD{i}]", 0.0, TokenType.UNUSED
        elif i < tokenizer.vocab_size:
            yield RENAMED.get(token, token), 0.0, TokenType.CONTROL
        else:
            yield token, 0.0, TokenType.USER_DEFINED


def tensor_name(name: str) -> str:
    """llama.cpp's name of an official weight or bias."""
    block, module, part = re.fullmatch(r"(?:transformer\.encoder\.layers\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()
    return f"{f'blk.{block}.' if block else ''}{MODULES[module]}.{part}"


def arrange(rows: Tensor, config: ChatGLMConfig, name: str) -> Tensor:
    """The rows of a weight or bias as llama.cpp has them: all queries, all keys, all values. Without multi-query
    attention, the official ones are query, key and value of one head after another."""
    if config.multi_query_attention or ".query_key_value." not in name:
        return rows
    return rows.unflatten(0, (config.num_attention_heads, 3, config.kv_channels)).transpose(0, 1).flatten(0, 2)


def type_of(shape: tuple[int, ...], matrices: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[matrices]
    return GGMLQuantizationType.F16 if shape[-1] % block else matrices


def encode(tensor: Tensor, tensor_type: GGMLQuantizationType, name: str, kind: str) -> np.ndarray:
    """The bytes of a tensor in a file of `kind`. Raises ArgumentError for a value that is too large for its type."""
    values = tensor.float()
    largest, most = max(map(abs, torch.aminmax(values))), LARGEST.get(tensor_type, math.inf)
    if largest > most:
        raise ArgumentError(
            f"--type {kind}: {name} has a value of {largest:,.0f}, and the largest of {tensor_type.name} is {most:,}; "
            "give --type bf16 or f32"
        )
    return quantize(values.contiguous().numpy(), tensor_type)


def write(
    writer: GGUFWriter,
    file: Path,
    shapes: dict[str, tuple[tuple[int, ...], GGMLQuantizationType]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Write a file's head, then its tensors in the order of `shapes`, one at a time."""
    for name, (shape, tensor_type) in shapes.items():
        block, size = GGML_QUANT_SIZES[tensor_type]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, tensor_type)
    with replacing(file) as whole:
        writer.write_header_to_file(Path(whole.name))
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor)
        finally:
            writer.close()
