import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.chatglm.modeling_chatglm import rotary_embedding, rotate

VERSIONS = ("chatglm2", "chatglm3")
IDS = torch.tensor([[5, 17, 40, 9, 301, 77, 8, 12], [6, 3, 250, 33, 21, 4, 18, 99]])


def load(reference: Path, version: str, attention: str = "sdpa"):
    folder = reference / "modeling" / version
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval(), load_file(folder / "expected.safetensors")


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_logits_are_the_official_ones(reference, version, attention):
    model, expected = load(reference, version, attention)
    assert difference(model(expected["input_ids"]).logits, expected["logits"]) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_left_padded_logits_are_the_official_ones(reference, version, attention):
    model, expected = load(reference, version, attention)
    mask = expected["left_attention_mask"]
    logits = model(expected["left_input_ids"], mask, expected["left_position_ids"]).logits
    assert difference(logits * mask[..., None], expected["left_logits"]) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_right_padded_logits_loss_and_every_gradient_are_the_official_ones(reference, version, attention):
    model, expected = load(reference, version, attention)
    mask = expected["right_attention_mask"]
    outputs = model(expected["right_input_ids"], mask, labels=expected["right_labels"])
    assert difference(outputs.logits * mask[..., None], expected["right_logits"]) <= 1e-5
    assert difference(outputs.loss, expected["right_loss"]) <= 1e-5
    outputs.loss.backward()
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == {name for name in expected if name.startswith("grad.")}
    assert max(difference(gradient, expected[name]) for name, gradient in gradients.items()) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_24_greedy_steps_with_the_cache_are_the_official_ones(reference, version):
    model, expected = load(reference, version)
    ids = expected["greedy_ids"]
    settings = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(ids[:, :8], max_new_tokens=24, **settings)
    assert torch.equal(generated.sequences, ids)
    assert difference(torch.cat(generated.logits), expected["greedy_logits"]) <= 1e-5


def test_every_tensor_of_the_published_checkpoint_has_a_place(reference):
    published = json.loads((reference / "chatglm3-6b/pytorch_model.bin.index.json").read_text())["weight_map"]
    config = AutoConfig.from_pretrained(reference / "chatglm3-6b")
    with torch.device("meta"):
        ours = ChatGLMForConditionalGeneration(config).state_dict().keys()
    assert set(ours) == set(published) - {"transformer.rotary_pos_emb.inv_freq"}


@torch.no_grad()
def test_heads_with_their_own_keys_are_read_head_by_head(make_model):
    model = make_model(multi_query_attention=False, num_layers=1)
    attention = model.transformer.encoder.layers[0].self_attention
    hidden = torch.randn(1, 5, 64)
    positions = torch.arange(5)[None]
    cos, sin = rotary_embedding(model.config, positions, torch.float32)
    heads = []
    for part in attention.query_key_value(hidden)[0].split(48, dim=-1):  # 16 each of query, key and value
        query, key, value = part.split(16, dim=-1)
        query, key = (rotate(states[None, None], cos, sin)[0, 0] for states in (query, key))
        scores = (query @ key.T / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    expected = attention.dense(torch.cat(heads, dim=-1))
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    assert difference(attention(hidden, mask, (cos, sin))[0][0], expected) <= 1e-5


def test_rotation_turns_pairs_of_the_first_half_by_position_times_frequency():
    config = ChatGLMConfig(kv_channels=8, rope_ratio=50)
    cos, sin = rotary_embedding(config, torch.tensor([[3]]), torch.float32)
    angles = torch.tensor([3.0, 3 / (10000 * 50) ** 0.5])  # frequencies base**0 and base**-(2/4)
    assert difference(cos[0, 0, 0], angles.cos()) <= 1e-6
    states = torch.arange(8.0).view(1, 1, 1, 8)
    turned = rotate(states, cos, sin)[0, 0, 0]
    assert turned[0].item() == pytest.approx(-torch.sin(angles[0]).item(), abs=1e-6)  # 0 cos - 1 sin
    assert turned[3].item() == pytest.approx((3 * angles[1].cos() + 2 * angles[1].sin()).item(), abs=1e-6)
    assert torch.equal(turned[4:], states[0, 0, 0, 4:])


@pytest.mark.parametrize(
    "change",
    [
        {"rmsnorm": False},
        {"post_layer_norm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"rope_ratio": 50.0},
        {"add_bias_linear": True, "initializer_range": 0.5},
    ],
)
@torch.no_grad()
def test_each_setting_of_the_architecture_changes_the_result(make_model, change):
    plain, changed = make_model(initializer_range=change.get("initializer_range", 0.2)), make_model(**change)
    weights = {**changed.state_dict(), **{k: v for k, v in plain.state_dict().items() if k in changed.state_dict()}}
    if "add_bias_linear" in change:
        weights = {name: weight + 0.1 if name.endswith("dense.bias") else weight for name, weight in weights.items()}
    changed.load_state_dict(weights)
    assert difference(plain(IDS).logits, changed(IDS).logits) > 1e-3


def test_gradient_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_row_does_alone(make_model):
    model = make_model()
    padded = IDS.clone()
    padded[0, :3] = 0
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(IDS[row : row + 1, start:], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, start:], alone[0])


@torch.no_grad()
def test_beams_find_a_likelier_answer_than_greed_and_sampling_follows_its_seed(make_model):
    model = make_model()
    settings = {"max_new_tokens": 6, "eos_token_id": None}

    def likelihood(ids):
        logits = model(ids).logits[:, 7:-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 8:, None]).sum().item()

    greedy = model.generate(IDS[:1], do_sample=False, **settings)
    assert likelihood(model.generate(IDS[:1], do_sample=False, num_beams=4, **settings)) >= likelihood(greedy)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(model.generate(IDS, do_sample=True, top_k=0, temperature=2.0, **settings))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@torch.no_grad()
def test_logits_to_keep_computes_the_last_positions_alone(make_model):
    model = make_model()
    assert difference(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:]) <= 1e-6


@torch.no_grad()
def test_half_precision_stays_close_to_single(make_model):
    expected = make_model()(IDS).logits
    for dtype in (torch.bfloat16, torch.float16):
        logits = make_model().to(dtype)(IDS).logits
        assert logits.dtype == dtype
        assert difference(logits.float(), expected) < 0.05 * expected.abs().max()


@torch.no_grad()
def test_saved_weights_load_again_by_every_way(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    for kwargs in ({"dtype": torch.float32}, {"torch_dtype": torch.float32}, {"device_map": "auto"}):
        for auto_class in (AutoModel, AutoModelForCausalLM):
            loaded = auto_class.from_pretrained(tmp_path, low_cpu_mem_usage=True, **kwargs)
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_official_bin_shards_load_and_the_old_rotary_buffer_is_ignored(make_model, tmp_path, recwarn):
    model = make_model()
    model.config.save_pretrained(tmp_path)
    weights = {**model.state_dict(), "transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for shard, held in shards.items():
        torch.save({name: weights[name] for name in held}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@torch.no_grad()
def test_4_bits_cover_the_body_and_leave_embedding_and_head(make_model, tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = make_model(initializer_range=0.02)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    quantised = {name.rpartition(".")[2] for name, layer in small.named_modules() if isinstance(layer, Linear4bit)}
    assert quantised == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert type(small.get_output_embeddings()) is nn.Linear
    assert difference(small(IDS).logits, model(IDS).logits) < 0.3 * model(IDS).logits.abs().max()


@pytest.mark.parametrize("trust", [True, False])
def test_python_in_the_checkpoint_folder_never_runs(make_model, tiny_tokenizer, tmp_path, trust):
    from transformers import AutoTokenizer

    folder, canary = tmp_path / "chatglm3-hostile", tmp_path / "canary"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    maps = {
        "config.json": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    for file, auto_map in maps.items():
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"auto_map": auto_map}))
    for module in ("configuration", "modeling", "tokenization"):
        (folder / f"{module}_chatglm.py").write_text(f"open({str(canary)!r}, 'w')\nraise RuntimeError('it ran')\n")
    classes = [
        type(auto_class.from_pretrained(folder, trust_remote_code=trust)).__module__
        for auto_class in (AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM)
    ]
    assert all(module.startswith("component.chatglm") for module in classes)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("pre_seq_len", 128, "tune with LoRA instead"),
        ("quantization_bit", 4, "Use the full checkpoint"),
        ("position_encoding_2d", True, "only ChatGLM2 and ChatGLM3"),
        ("tie_word_embeddings", True, "Remove the key, or make it false"),
        ("num_key_value_heads", 4, "set multi_query_attention and multi_query_group_num instead, which say 2"),
    ],
)
def test_unsupported_checkpoints_are_refused_with_a_remedy(tmp_path, key, value, remedy):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", key: value}))
    with pytest.raises(ValueError, match=remedy):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("folder", "recorded", "version"),
    [
        ("ChatGLM2-mine", None, 2),
        ("chatglm3-6b", "THUDM/chatglm2-6b", 3),
        ("mine", "THUDM/chatglm2-6b", 2),
        ("mine", None, 3),
    ],
)
def test_the_version_follows_the_folder_then_the_recorded_name_and_is_saved(tmp_path, folder, recorded, version):
    path = tmp_path / folder
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "chatglm", "_name_or_path": recorded}))
    config = AutoConfig.from_pretrained(path)
    assert config.chatglm_version == version
    config.save_pretrained(tmp_path / "elsewhere")
    assert AutoConfig.from_pretrained(tmp_path / "elsewhere").chatglm_version == version


def test_weights_are_never_tied_however_it_is_asked(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ChatGLM's output head has weights of its own"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ChatGLM's output head has weights of its own"):
        model.config.tie_word_embeddings = True


@pytest.mark.parametrize(("grouped", "heads"), [(True, 2), (False, 4)])
def test_the_configuration_as_a_dict_names_the_key_value_heads(make_model, tmp_path, grouped, heads):
    config = make_model(multi_query_attention=grouped).config
    assert config.to_dict()["num_key_value_heads"] == config.num_key_value_heads == heads
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == heads
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    loaded.multi_query_group_num = 1
    assert loaded.to_dict()["num_key_value_heads"] == (1 if grouped else heads)


def test_a_decoder_has_no_encoder(make_model):
    model = make_model()
    assert model.get_encoder() is model
    assert model.transformer.get_encoder() is model.transformer
    assert model.get_encoder("image") is model
    assert model.get_decoder() is model.transformer
