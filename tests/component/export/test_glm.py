"""An export as GlmForCausalLM computes what ChatGLM computes."""

import json
import random
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmForCausalLM

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.export.glm import check_layout, generation_config, glm_config, write_glm
from component.export.weights import ChatGLMWeights
from component.run.errors import ArgumentError


@pytest.fixture
def exported(tmp_path):
    """Writes a base as GLM, in files of 30 KB."""

    def write(base, dtype: torch.dtype = torch.float32):
        folder = tmp_path / "glm"
        folder.mkdir()
        write_glm(ChatGLMWeights(str(base), dtype), folder, [2, 7], "30KB")
        return folder

    return write


def load_both(base, folder, attention: str = "eager", dtype: torch.dtype = torch.float32):
    both = [
        AutoModelForCausalLM.from_pretrained(place, attn_implementation=attention, dtype=dtype).eval()
        for place in (base, folder)
    ]
    assert [type(model) for model in both] == [ChatGLMForConditionalGeneration, GlmForCausalLM]
    return both


def inputs_of(vocab: int) -> dict[str, torch.Tensor]:
    """Three rows of 23 tokens, the second of which begins with 7 of padding."""
    ids = torch.randint(3, vocab, (3, 23), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    """Those of all tokens but padding."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=positions).logits[mask.bool()].float()


def check_equal(base, folder, attention: str) -> None:
    ours, theirs = load_both(base, folder, attention)
    inputs = inputs_of(ours.config.vocab_size)
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **greedy), theirs.generate(**inputs, **greedy))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("version", [2, 3])
def test_official_checkpoints_have_equal_logits_and_answers(reference, exported, version, attention):
    base = reference / f"modeling/chatglm{version}"
    check_equal(base, exported(base), attention)


def odd_shape(seed: int) -> dict:
    choose = random.Random(seed)
    groups = choose.choice([1, 2, 3])
    return {
        "padded_vocab_size": choose.randint(50, 300),
        "hidden_size": choose.randint(5, 60),
        "ffn_hidden_size": choose.randint(5, 90),
        "num_layers": choose.randint(1, 3),
        "num_attention_heads": groups * choose.choice([1, 2, 4]),
        "multi_query_group_num": groups,
        "multi_query_attention": seed % 2 == 0,
        "kv_channels": 4 * choose.randint(1, 9),
        "rope_ratio": choose.choice([1, 1.5, 4, 50]),
        "add_qkv_bias": choose.random() < 0.6,
        "layernorm_epsilon": choose.choice([1e-5, 1e-6]),
    }


def odd_base(tmp_path, seed: int):
    """A model of an odd shape, all of whose weights matter, norms and biases too."""
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**odd_shape(seed)))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.3)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("seed", range(8))
def test_odd_shapes_have_equal_logits_and_answers(tmp_path, exported, seed):
    base = odd_base(tmp_path, seed)
    check_equal(base, exported(base), ["eager", "sdpa"][seed // 2 % 2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 180))
def test_many_odd_shapes_have_equal_logits_and_answers(tmp_path, exported, seed):
    base = odd_base(tmp_path, seed)
    check_equal(base, exported(base), ["eager", "sdpa"][seed // 2 % 2])


def test_in_bfloat16_an_export_is_as_near_to_float32_as_the_original(make_model, exported, tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path / "base")
    folder = exported(tmp_path / "base", torch.bfloat16)
    wide, _ = load_both(tmp_path / "base", folder)
    halves = load_both(tmp_path / "base", folder, dtype=torch.bfloat16)
    inputs = inputs_of(wide.config.vocab_size)
    exact = logits(wide, inputs)
    ours, theirs = ((logits(model, inputs) - exact).norm() / exact.norm() for model in halves)
    assert 0 < theirs < 1.25 * ours < 0.05


def test_the_configuration_is_that_of_the_6b_in_glms_words():
    config = ChatGLMConfig(seq_length=131072, rope_ratio=50, layernorm_epsilon=1.5e-5, attention_dropout=0.1)
    assert glm_config(config, [2, 64795, 64797]) == {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": 65024,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.1,
        "rms_norm_eps": 1.5e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": [2, 64795, 64797],
        "pad_token_id": 0,
    }
    plain = glm_config(ChatGLMConfig(multi_query_attention=False, add_qkv_bias=False), [2])
    assert (plain["num_key_value_heads"], plain["attention_bias"], plain["rope_theta"]) == (32, False, 10000.0)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rmsnorm", "false", "true"),
        ("post_layer_norm", "false", "true"),
        ("add_bias_linear", "true", "false"),
        ("apply_residual_connection_post_layernorm", "true", "false"),
    ],
)
def test_a_layout_that_glm_has_not_is_refused(make_model, tmp_path, key, value, wanted):
    make_model(**{key: value == "true"}).save_pretrained(tmp_path / "base")
    weights = ChatGLMWeights(str(tmp_path / "base"), torch.float32)
    told = (
        f"base/config.json: {key} is {value}, and other programs know {wanted} alone; merge it with script/merge_lora"
    )
    with pytest.raises(ArgumentError, match=told):
        check_layout(weights.config)


@pytest.mark.parametrize("width", range(1, 18))
def test_heads_whose_half_is_no_whole_pairs_are_refused(width):
    config = ChatGLMConfig(hidden_size=4 * width, num_attention_heads=4, kv_channels=width)
    if width in (4, 8, 12, 16):
        return check_layout(config)
    with pytest.raises(ArgumentError, match=f"config.json: kv_channels is {width}, .* a multiple of 4.*merge_lora"):
        check_layout(config)


def test_files_are_named_and_indexed_as_transformers_does_it(model_folder, exported):
    folder = exported(model_folder())
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert [shard.name for shard in shards] == [f"model-{number:05}-of-00010.safetensors" for number in range(1, 11)]
    found = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(w.nbytes for shard in shards for w in load_file(shard).values())
    halves = {found[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"}
    assert len(halves) > 1  # a file may end within query_key_value
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    (folder / "plain").touch()
    assert modes == {(folder / "plain").stat().st_mode}  # and not the owner's alone


def test_a_small_model_is_one_file_without_an_index(model_folder, tmp_path):
    folder = tmp_path / "glm"
    folder.mkdir()
    write_glm(ChatGLMWeights(str(model_folder()), torch.bfloat16), folder, [2])
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_generation_keeps_what_the_base_says_of_sampling_and_ends_at_the_stops(model_folder, exported):
    base = model_folder()
    own = {"_from_model_config": True, "temperature": 0.8, "top_p": 0.8, "do_sample": True, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(own))
    assert json.loads((exported(base) / "generation_config.json").read_text()) == {
        "temperature": 0.8,
        "top_p": 0.8,
        "do_sample": True,
        "bos_token_id": None,
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
    }


def test_what_else_a_foreign_base_says_of_generation_is_left_out_and_told(model_folder, tmp_path, log):
    base = model_folder()
    odd = {"do_sample": True, "top_k": "5", "secret": 1, "custom_generate": "evil", "max_length": None, "top_h": 0.5}
    (base / "generation_config.json").write_text(
        json.dumps({"temperature": 0.8, "eos_token_id": 2, "use_cache": True} | odd)
    )
    assert generation_config(str(base)) == {"do_sample": True, "temperature": 0.8}
    told = "only numbers of sampling are taken over, and not 'custom_generate', 'secret', 'top_h', 'top_k'"
    assert [told in line for line in log] == [True]


def test_a_link_out_of_a_foreign_base_is_not_followed_and_one_within_a_hubs_cache_is(model_folder, tmp_path, log):
    base, own = model_folder(), tmp_path / "private.json"
    own.write_text('{"temperature": 0.3}')
    (base / "generation_config.json").unlink(missing_ok=True)
    (base / "generation_config.json").symlink_to(own)
    assert generation_config(str(base)) == {}
    assert ["a link that leads out of its folder" in line for line in log] == [True]
    cached = tmp_path / "models--me--chat/snapshots/0a"
    shutil.copytree(base, cached, ignore=shutil.ignore_patterns("generation_config.json"))
    (cached.parents[1] / "blobs").mkdir()
    shutil.copy(own, cached.parents[1] / "blobs/0b")
    (cached / "generation_config.json").symlink_to("../../blobs/0b")
    assert generation_config(str(cached)) == {"temperature": 0.3}


def test_no_more_than_one_weight_is_in_memory(model_folder, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = ChatGLMWeights.read

    def watched(weights, name):
        most.append(len(alive))
        weight = read(weights, name)
        alive.add(weight)
        return weight

    monkeypatch.setattr(ChatGLMWeights, "read", watched)
    write_glm(ChatGLMWeights(str(model_folder()), torch.float32), tmp_path, [2])
    assert len(most) == 17 and max(most) <= 1
