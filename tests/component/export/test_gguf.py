"""A GGUF file holds the weights, the tokenizer and the template of the model, as gguf's own reader finds them."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from component.chatglm import ChatGLMConfig, ChatGLMTokenizer
from component.export.gguf import (
    KINDS,
    check_shape,
    converter_command,
    tokens,
    write_gguf,
    write_gguf_adapter,
    write_modelfile,
)
from component.export.merge import merged_model, plan_merge, round_to_q8
from component.export.tokenizer import export_template
from component.export.weights import ChatGLMWeights
from component.run.errors import ArgumentError
from component.trust import check_adapter

LAYER = "transformer.encoder.layers.1."
TENSORS = {  # of one layer, and beside the layers
    "token_embd.weight": "transformer.embedding.word_embeddings.weight",
    "output_norm.weight": "transformer.encoder.final_layernorm.weight",
    "output.weight": "transformer.output_layer.weight",
    "blk.1.attn_norm.weight": f"{LAYER}input_layernorm.weight",
    "blk.1.attn_qkv.weight": f"{LAYER}self_attention.query_key_value.weight",
    "blk.1.attn_qkv.bias": f"{LAYER}self_attention.query_key_value.bias",
    "blk.1.attn_output.weight": f"{LAYER}self_attention.dense.weight",
    "blk.1.ffn_norm.weight": f"{LAYER}post_attention_layernorm.weight",
    "blk.1.ffn_up.weight": f"{LAYER}mlp.dense_h_to_4h.weight",
    "blk.1.ffn_down.weight": f"{LAYER}mlp.dense_4h_to_h.weight",
}


@pytest.fixture
def base(tmp_path, make_model, tiny_tokenizer):
    """Makes a model's folder; keywords change its configuration."""

    def make(**changes):
        model = make_model(**changes)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean="norm" in name, std=0.1)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


@pytest.fixture
def written(tmp_path, tiny_tokenizer):
    """Writes a model's folder as GGUF, and opens the file."""

    def write(folder, kind="f32", plan=None, tokenizer=tiny_tokenizer):
        file = tmp_path / "model.gguf"
        write_gguf(ChatGLMWeights(str(folder), torch.float32, plan), tokenizer, file, kind)
        return gguf.GGUFReader(file)

    return write


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tensors_of(reader) -> dict[str, torch.Tensor]:
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def values_of(reader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_the_weights_are_the_official_ones_under_llama_cpps_names(base, written):
    folder = base()
    found, weights = tensors_of(written(folder)), weights_of(folder)
    assert len(found) == len(weights) == 3 + 2 * 7
    assert all(torch.equal(found[name], weights[official]) for name, official in TENSORS.items())


def test_the_head_of_a_file_tells_llama_cpp_the_models_shape(base, written):
    shape = {"num_attention_heads": 4, "kv_channels": 16, "multi_query_group_num": 2, "ffn_hidden_size": 96}
    values = values_of(written(base(**shape, rope_ratio=50.0, seq_length=32768, layernorm_epsilon=1e-6)))
    assert values["general.architecture"] == "chatglm"
    assert values["general.type"] == "model"
    assert values["general.name"] == "base"
    assert values["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert {name: value for name, value in values.items() if name.startswith("chatglm.")} == {
        "chatglm.context_length": 32768,
        "chatglm.embedding_length": 64,
        "chatglm.feed_forward_length": 96,
        "chatglm.block_count": 2,
        "chatglm.attention.head_count": 4,
        "chatglm.attention.head_count_kv": 2,
        "chatglm.attention.key_length": 16,
        "chatglm.attention.value_length": 16,
        "chatglm.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "chatglm.rope.dimension_count": 8,
        "chatglm.rope.freq_base": 500_000,
        "chatglm.vocab_size": 448,
    }


@pytest.mark.parametrize("version", [2, 3])
def test_every_id_of_the_published_vocabularies_has_its_text_score_and_type(reference, version):
    tokenizer = ChatGLMTokenizer.from_pretrained(reference / f"chatglm{version}-6b")
    tokenizer.add_tokens(["<think>"])
    found = list(tokens(tokenizer, 65024))
    assert len(found) == 65024
    assert {i: found[i] for i in (0, 1, 2, 13, 260, 54591, 64788, 64790, 64792, 64795, 64798, 65023)} == {
        0: ("<unk>", 0, gguf.TokenType.UNKNOWN),
        1: ("<bos>", 0, gguf.TokenType.CONTROL),
        2: ("<eos>", 0, gguf.TokenType.CONTROL),
        13: ("<0x0A>", 0, gguf.TokenType.BYTE),
        260: ("▁a", -1, gguf.TokenType.NORMAL),
        54591: ("好", -54709, gguf.TokenType.NORMAL),
        64788: ("▁attr", -64906, gguf.TokenType.NORMAL),
        64790: ("[gMASK]", 0, gguf.TokenType.CONTROL),
        64792: ("<sop>", 0, gguf.TokenType.CONTROL),
        64795: ("<|user|>", 0, gguf.TokenType.CONTROL),
        64798: ("<think>", 0, gguf.TokenType.USER_DEFINED),
        65023: ("[PAD65023]", 0, gguf.TokenType.UNUSED),
    }


def test_every_piece_has_the_type_that_its_model_gives_it(tmp_path, tiny_tokenizer):
    model = ModelProto.FromString(tiny_tokenizer.tokenizer.sp_model.serialized_model_proto())
    unused, own = range(len(model.pieces) - 2, len(model.pieces))
    model.pieces[unused].type = ModelProto.SentencePiece.UNUSED
    model.pieces[own].type = ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    found = list(tokens(ChatGLMTokenizer(tmp_path / "tokenizer.model"), 448))
    assert found[unused] == (model.pieces[unused].piece, model.pieces[unused].score, gguf.TokenType.UNUSED)
    assert found[own] == (model.pieces[own].piece, model.pieces[own].score, gguf.TokenType.USER_DEFINED)


@pytest.mark.parametrize("version", [2, 3])
def test_the_head_of_a_file_tells_llama_cpp_the_tokenizer(base, written, tiny_tokenizer, monkeypatch, version):
    monkeypatch.setattr(tiny_tokenizer, "chatglm_version", version)
    values = values_of(written(base()))
    values = {name.removeprefix("tokenizer."): value for name, value in values.items() if name.startswith("tokenizer.")}
    texts, scores, types = (values.pop(f"ggml.{name}") for name in ("tokens", "scores", "token_type"))
    expected = list(tokens(tiny_tokenizer, 448))
    assert list(zip(texts, types, strict=True)) == [(text, kind) for text, _, kind in expected]
    assert scores == pytest.approx([score for _, score, _ in expected])
    user, observation = map(tiny_tokenizer.get_command, ("<|user|>", "<|observation|>"))
    ends = {"ggml.eot_token_id": user, "ggml.eom_token_id": observation} if version == 3 else {}
    assert values == {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": True,
        "ggml.remove_extra_whitespaces": False,
        "chat_template": export_template(version).replace("</s>", "<eos>"),
        **ends,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_have_the_type_that_was_asked_for_and_vectors_are_float32(base, written, kind):
    folder = base()
    reader, weights = written(folder, kind), weights_of(folder)
    found, types = tensors_of(reader), {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    rounded = {
        "f32": lambda weight: weight,
        "f16": lambda weight: weight.half().float(),
        "bf16": lambda weight: weight.bfloat16().float(),
        "q8_0": round_to_q8,
    }[kind]
    for name, official in TENSORS.items():
        weight = weights[official]
        assert types[name] == (gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else KINDS[kind][0])
        assert torch.equal(found[name], weight if weight.dim() == 1 else rounded(weight))


def test_rows_that_are_no_multiple_of_32_stay_float16_and_are_named(base, written, log):
    folder = base(ffn_hidden_size=72)
    reader = written(folder, "q8_0")
    kept = [tensor.name for tensor in reader.tensors if tensor.tensor_type == gguf.GGMLQuantizationType.F16]
    assert kept == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert torch.equal(
        tensors_of(reader)[kept[1]], weights_of(folder)[f"{LAYER}mlp.dense_4h_to_h.weight"].half().float()
    )
    warned = [line for line in log if "no multiple of 32" in line]
    assert len(warned) == 1
    assert "layers.0.mlp.dense_4h_to_h.weight" in warned[0]


def test_without_multi_query_attention_all_queries_come_before_all_keys_and_values(base, written):
    folder = base(multi_query_attention=False, num_attention_heads=2, kv_channels=32)
    reader, weights = written(folder), weights_of(folder)
    assert values_of(reader)["chatglm.attention.head_count_kv"] == 2
    rows = [*range(0, 32), *range(96, 128), *range(32, 64), *range(128, 160), *range(64, 96), *range(160, 192)]
    for part in ("weight", "bias"):
        official = weights[f"{LAYER}self_attention.query_key_value.{part}"]
        assert torch.equal(tensors_of(reader)[f"blk.1.attn_qkv.{part}"], official[rows])


def test_a_merged_model_has_the_weights_of_the_merge(base, written, adapter_folder):
    folder = base()
    adapter = adapter_folder(folder)
    found = tensors_of(written(folder, plan=plan_merge(adapter, str(folder), "full", "float32")))
    merged = merged_model(str(folder), adapter, "full", "float32").state_dict()
    assert not torch.equal(
        merged[TENSORS["blk.1.attn_qkv.weight"]], weights_of(folder)[TENSORS["blk.1.attn_qkv.weight"]]
    )
    assert all(torch.equal(found[name], merged[official]) for name, official in TENSORS.items())


@pytest.mark.parametrize(("kind", "value"), [("f16", 70_000.0), ("q8_0", 9e6)])
def test_a_value_that_is_too_large_is_named_and_no_file_is_left(base, written, tmp_path, kind, value):
    folder = base()
    weights = weights_of(folder)
    weights[f"{LAYER}mlp.dense_h_to_4h.weight"][3, 5] = -value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = rf"^--type {kind}: .*layers\.1\.mlp\.dense_h_to_4h\.weight .* {value:,.0f}.*--type bf16"
    with pytest.raises(ArgumentError, match=told):
        written(folder, kind)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_channels": 32}, r"4 heads .* of 32 .* hidden_size, 64.*--to glm"),
        ({"hidden_size": 40, "kv_channels": 10}, r"kv_channels is 10.*multiple of 4.*merge_lora"),
        ({"rmsnorm": False}, "rmsnorm is false"),
        ({"add_bias_linear": True}, "add_bias_linear is true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layout_that_llama_cpp_has_not_is_refused_by_name(changes, said):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}
    with pytest.raises(ArgumentError, match=said):
        check_shape(ChatGLMConfig(**shape | changes))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_by_name(base, written, tmp_path):
    with pytest.raises(ArgumentError, match="padded_vocab_size is 128"):
        written(base(padded_vocab_size=128))
    assert not (tmp_path / "model.gguf").exists()


def test_another_kind_is_refused(base, written):
    folder = base()
    with pytest.raises(ArgumentError, match="--type q4_0: expected one of f32, f16, bf16, q8_0"):
        written(folder, "q4_0")
    with pytest.raises(ArgumentError, match="--type q4_0"):
        converter_command("merged", "model.gguf", "q4_0")


@pytest.mark.parametrize(("changes", "alpha"), [({"lora_alpha": 16}, 16), ({"lora_alpha": 16, "use_rslora": True}, 32)])
def test_an_adapter_keeps_its_tensors_and_its_scale(base, adapter_folder, tmp_path, changes, alpha):
    modules = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    folder = base()
    adapter = adapter_folder(folder, task_type="CAUSAL_LM", target_modules=modules, **changes)  # of rank 4
    write_gguf_adapter(adapter, check_adapter(adapter), ChatGLMConfig.from_pretrained(folder), tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    values, found = values_of(reader), tensors_of(reader)
    assert values == {
        "general.architecture": "chatglm",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(found) == len(weights) == 2 * 2 * 4
    for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        official = TENSORS[f"blk.1.{name}.weight"].removesuffix("weight")
        for part in "AB":
            weight = weights[f"base_model.model.{official}lora_{part}.weight"]
            assert torch.equal(found[f"blk.1.{name}.weight.lora_{part.lower()}"], weight)


def test_an_adapters_update_is_arranged_as_its_weight(base, adapter_folder, tmp_path):
    folder = base(multi_query_attention=False)
    adapter = adapter_folder(folder, task_type="CAUSAL_LM", target_modules=["query_key_value"], lora_alpha=4)
    write_gguf_adapter(adapter, check_adapter(adapter), ChatGLMConfig.from_pretrained(folder), tmp_path / "lora.gguf")
    found = tensors_of(gguf.GGUFReader(tmp_path / "lora.gguf"))
    official = load_file(adapter / "adapter_model.safetensors")
    rows = np.arange(192).reshape(4, 3, 16).transpose(1, 0, 2).ravel()
    name = f"base_model.model.{LAYER}self_attention.query_key_value.lora_B.weight"
    assert torch.equal(found["blk.1.attn_qkv.weight.lora_b"], official[name][rows])


def test_an_adapter_of_the_embedding_has_a_row_for_each_token(base, adapter_folder, tmp_path):
    folder = base()
    adapter = adapter_folder(folder, task_type="CAUSAL_LM", target_modules=["word_embeddings", "output_layer"])
    write_gguf_adapter(adapter, check_adapter(adapter), ChatGLMConfig.from_pretrained(folder), tmp_path / "lora.gguf")
    found = tensors_of(gguf.GGUFReader(tmp_path / "lora.gguf"))
    official = load_file(adapter / "adapter_model.safetensors")
    embedding = "base_model.model.transformer.embedding.word_embeddings.lora_embedding_"
    head = "base_model.model.transformer.output_layer.lora_"
    assert found.keys() == {f"{name}.weight.lora_{part}" for name in ("token_embd", "output") for part in "ab"}
    assert torch.equal(found["token_embd.weight.lora_a"], official[f"{embedding}A"].T)
    assert torch.equal(found["token_embd.weight.lora_b"], official[f"{embedding}B"])
    assert torch.equal(found["output.weight.lora_a"], official[f"{head}A.weight"])
    assert torch.equal(found["output.weight.lora_b"], official[f"{head}B.weight"])


def test_a_dora_is_refused_by_name(base, adapter_folder, tmp_path):
    folder = base()
    adapter = adapter_folder(folder, task_type="CAUSAL_LM", target_modules=["dense"], use_dora=True)
    with pytest.raises(ArgumentError, match=r"adapter_config\.json: use_dora is true.*--to gguf"):
        write_gguf_adapter(
            adapter, check_adapter(adapter), ChatGLMConfig.from_pretrained(folder), tmp_path / "lora.gguf"
        )
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    ("version", "template", "stops"),
    [
        (
            3,
            '[gMASK]<sop>{{ range .Messages }}<|{{ if eq .Role "tool" }}observation{{ else }}{{ .Role }}{{ end }}|>\n'
            "{{ if .Content }} {{ .Content }}{{ end }}{{ end }}<|assistant|>",
            ["<|user|>", "<|observation|>"],
        ),
        (
            2,
            '[gMASK]<sop>{{ $rounds := "" }}{{ range .Messages }}{{ if eq .Role "user" }}'
            '{{ $rounds = printf "%s." $rounds }}[Round {{ len $rounds }}]\n\n问：{{ .Content }}\n\n答：'
            '{{ else if eq .Role "assistant" }}{{ if .Content }} {{ .Content }}{{ end }}<eos>{{ end }}{{ end }}',
            [],
        ),
    ],
)
def test_a_modelfile_names_the_model_its_template_and_its_ends(
    tmp_path, tiny_tokenizer, monkeypatch, version, template, stops
):
    monkeypatch.setattr(tiny_tokenizer, "chatglm_version", version)
    write_modelfile(tmp_path, "weather.gguf", tiny_tokenizer)
    comment, _, rest = (tmp_path / "Modelfile").read_text(encoding="utf-8").partition("FROM ")
    assert all(line.startswith("# ") for line in comment.splitlines())
    assert "functions" in comment
    assert rest == f'./weather.gguf\nTEMPLATE """{template}"""\n' + "".join(f'PARAMETER stop "{s}"\n' for s in stops)


def test_the_converters_command_can_be_pasted_into_a_shell():
    assert converter_command("my models/merged", "qwen.gguf", "q8_0") == (
        "python convert_hf_to_gguf.py 'my models/merged' --outfile qwen.gguf --outtype q8_0"
    )
