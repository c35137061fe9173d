"""Packed rows through fused layers equal padded batches through the model's own, in loss and every gradient."""

import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, OPTConfig

import component.kernel
from component.kernel import attention, plain
from component.kernel.attention import Bounds, choose_attention
from component.kernel.layer import CHECKPOINTING
from component.kernel.memory import choose_plan
from component.kernel.model import PackedForward, choose_ops
from component.kernel.projection import Projection
from component.model import find_linear_names
from component.train.batch import PackingCollator, SFTDataCollator
from component.train.loss import TargetLMLoss

from .conftest import gradients, make_model, make_samples


def padded(model, samples):
    """(summed loss, gradients) of a padded batch by the model's own forward, peft's layers and the plain loss."""

    class Padding:
        pad_token_id = 0

    batch = SFTDataCollator(Padding, 1024)(samples)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = TargetLMLoss()(logits, batch["input_ids"], batch["target_mask"])
    loss.backward()
    return loss.item(), gradients(model)


def packed(model, samples, tokens=64):
    total = 0.0
    for row in PackingCollator(tokens).lay_out(samples):
        loss = model(**row)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_equal(one, other, tolerance=1e-5):
    """Of losses and gradients, relative to the largest of each."""
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, grad in other[1].items():
        assert (one[1][name] - grad).abs().max() <= tolerance * max(grad.abs().max(), 1), name


@pytest.mark.parametrize("tokens", [64, 13], ids=["one row", "two rows"])
def test_packed_and_fused_equals_padded_and_plain(family, tokens):
    model, samples = make_model(family), make_samples()
    expected = padded(model, samples)
    assert len(expected[1]) == sum(2 for name, _ in model.named_modules() if name.endswith("lora_A.default"))
    forward = PackedForward(model, 64)
    assert len(forward.layers) == 2
    assert_equal(packed(model, samples, tokens), expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_what_layers_keep_changes_no_gradient(family, checkpointing):
    model, samples = make_model(family, dropout=0.3, rank=16), make_samples()
    forward = PackedForward(model, 64)
    torch.manual_seed(3)
    expected = packed(model, samples)
    forward.use(checkpointing)
    torch.manual_seed(3)
    assert_equal(packed(model, samples), expected, 1e-6)


@pytest.mark.parametrize("rank", [8, 16], ids=["beside the weights", "in spare columns"])
def test_weights_that_are_kept_change_no_gradient_and_follow_the_adapter(family, rank, bits):
    model, samples = make_model(family, dropout=0.3, rank=rank, bits=bits), make_samples()
    forward = PackedForward(model, 64)
    forward.use("none", keeps_weights=True)
    for factor in (1, 3):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data * factor
        torch.manual_seed(3)
        kept = packed(model, samples, 13)
        forward.use("none")
        torch.manual_seed(3)
        assert_equal(kept, packed(model, samples, 13), 1e-6)
        forward.use("full", keeps_weights=True)


def test_weights_that_were_kept_are_freed_before_others_are_and_change_no_gradient(monkeypatch):
    model, samples = make_model("llama", dropout=0.3, rank=16), make_samples()
    forward = PackedForward(model, 64)
    torch.manual_seed(3)
    expected = packed(model, samples)
    forward.use("none", keeps_weights=True)
    earlier = [weakref.ref(x) for layer in forward.layers for part in layer.projections for x in part.kept]
    assert all(x() is not None for x in earlier)
    keep, left = Projection.keep, []
    monkeypatch.setattr(Projection, "keep", lambda part: left.extend(x() for x in earlier) or keep(part))
    forward.use("none", keeps_weights=True)
    assert left and not any(x is not None for x in left)
    torch.manual_seed(3)
    assert_equal(packed(model, samples), expected, 1e-6)


def test_a_model_that_is_left_has_its_own_forward_and_nothing_beside_it():
    model, samples = make_model("llama", rank=16), make_samples()
    forward = PackedForward(model, 64)
    forward.use("none", keeps_weights=True)
    forward.replay_rows(64, lambda *steps: steps)
    expected = packed(model, samples)
    expected[1].update((name, grad.clone()) for name, grad in expected[1].items())
    kept = [weakref.ref(x) for layer in forward.layers for part in layer.projections for x in part.kept]
    ids = torch.tensor([[1, 2, 3]])
    forward.leave()
    assert forward.graphs is None
    assert not [x for x in kept if x() is not None]
    assert model.get_base_model().forward == forward.own_forward
    assert model(input_ids=ids, labels=ids).loss > 0
    assert_equal(padded(model, samples), expected)


def test_inputs_go_to_the_hosts_memory_and_come_back_but_not_in_evaluation():
    class Host(dict):
        def put(self, number, hidden):
            self[number] = hidden.clone()

        take = dict.pop

    model, samples = make_model("llama"), make_samples()
    expected = padded(model, samples)
    forward = PackedForward(model, 64)
    forward.use("offload")
    forward.host = Host()
    (row,) = PackingCollator(64).lay_out(samples)
    with torch.no_grad():
        model(**row)
    assert not forward.host
    loss = model(**row)
    assert list(forward.host) == [0, 1]
    loss.backward()
    assert not forward.host
    assert_equal((loss.item(), gradients(model)), expected)


def test_packed_and_plain_equals_padded(family):
    """The path of models that have no fused layers."""
    model, samples = make_model(family), make_samples()
    expected = padded(model, samples)
    assert PackedForward(model, 64, fuses=False).layers == []
    assert_equal(packed(model, samples), expected)


def test_a_rank_that_fits_the_wide_product_equals_one_that_does_not(family):
    model, samples = make_model(family, rank=16), make_samples()
    expected = padded(model, samples)
    assert PackedForward(model, 64).layers[0].down.room == 16
    assert_equal(packed(model, samples), expected)


def test_a_base_of_16_bits_is_fused_as_one_of_4_whatever_layers_keep(family):
    model, samples = make_model(family, rank=16, bits=16), make_samples()
    expected = padded(model, samples)
    forward = PackedForward(model, 64)
    assert len(forward.layers) == 2
    for checkpointing in CHECKPOINTING:
        forward.use(checkpointing)
        assert_equal(packed(model, samples), expected)


def test_some_layers_may_have_no_adapter(bits):
    model, samples = make_model("llama", targets=["q_proj", "down_proj"], bits=bits), make_samples()
    expected = padded(model, samples)
    PackedForward(model, 64)
    assert_equal(packed(model, samples), expected)


@pytest.mark.parametrize("fuses", [True, False])
def test_without_its_adapter_a_model_has_the_losses_of_its_base(fuses):
    model, samples = make_model("llama", rank=16).eval(), make_samples()
    (row,) = PackingCollator(64).lay_out(samples)
    with torch.no_grad():
        with model.disable_adapter():
            batch = SFTDataCollator(SimpleNamespace(pad_token_id=0), 1024)(samples)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            expected = TargetLMLoss()(logits, batch["input_ids"], batch["target_mask"]).item()
        tuned, base = (PackedForward(model, 64, fuses, adapted)(**row).item() for adapted in (True, False))
        alone = PackedForward(model.unload(), 64, fuses)(**row).item()
    assert base == pytest.approx(expected, rel=1e-5)
    assert alone == pytest.approx(expected, rel=1e-5), "a model without an adapter"
    assert tuned != pytest.approx(expected, rel=1e-2)


def test_no_sample_sees_another():
    model = make_model("chatglm")
    PackedForward(model, 64)
    first, second, _, third = make_samples()
    alone = packed(model, [first])[0] + packed(model, [third])[0]
    assert packed(model, [first, third])[0] == pytest.approx(alone, rel=1e-6)
    changed = {**third, "input_ids": [1] * len(third["input_ids"]), "target_mask": [0] * len(third["input_ids"])}
    assert packed(model, [first, changed])[0] == pytest.approx(packed(model, [first])[0], rel=1e-6)
    assert second["target_mask"][1:] == []


def test_dropout_is_peft_s_in_distribution_and_off_in_evaluation():
    model, samples = make_model("llama", dropout=0.5), make_samples()
    PackedForward(model, 64)
    assert packed(model, samples)[0] != packed(model, samples)[0]
    model.eval()
    with torch.no_grad():
        losses = {model(**PackingCollator(64).lay_out(samples)[0]).item() for _ in range(2)}
    expected = padded(model, samples)[0]
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(expected, rel=1e-5)


def test_gradients_under_dropout_are_those_of_the_loss(bits):
    """The same masks at two points of a line through the weights: the slope between them is the gradient's."""
    model, samples = make_model("chatglm", dropout=0.4, bits=bits), make_samples()
    PackedForward(model, 64)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    directions = [torch.randn_like(weight) for weight in weights]
    (row,) = PackingCollator(64).lay_out(samples)

    def loss_at(step: float) -> torch.Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
        return model(**row)

    loss_at(0).backward()
    slope = sum((weight.grad * direction).sum() for weight, direction in zip(weights, directions, strict=True))
    step = 2e-4
    with torch.no_grad():
        measured = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    assert measured.item() == pytest.approx(slope.item(), rel=2e-2)


def test_logits_come_in_chunks(monkeypatch):
    model, samples = make_model("llama"), make_samples()
    expected = padded(model, samples)
    sizes = []
    cross_entropy = plain.cross_entropy_
    monkeypatch.setattr(
        plain, "cross_entropy_", lambda logits, wanted: sizes.append(len(logits)) or cross_entropy(logits, wanted)
    )
    monkeypatch.setattr("component.kernel.head.LOGITS", 97 * 4)
    PackedForward(model, 64)
    assert_equal(packed(model, samples), expected)
    assert max(sizes) == 4
    assert len(sizes) > 2


def test_without_targets_a_model_is_itself():
    model = make_model("chatglm").eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    PackedForward(model, 64)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("mistral", {"sliding_window": 8}, "sliding_window=8 is shorter than max_seq_length=64"),
        ("chatglm", {"multi_query_attention": False, "num_key_value_heads": 4}, "multi_query_attention is false"),
        ("chatglm", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_what_fused_layers_do_not_have_goes_the_plain_way_and_is_said(family, changes, reason, log):
    model = make_model(family, **changes).eval()
    samples = make_samples()
    expected = padded(model, samples)
    assert PackedForward(model, 64).layers == []
    assert reason in "".join(log)
    assert_equal(packed(model, samples), expected)


@pytest.mark.parametrize("tokens", [None, 64])
@pytest.mark.parametrize(("config", "packs"), [(BloomConfig, False), (OPTConfig, False), (GPTNeoXConfig, True)])
def test_a_model_whose_samples_would_see_each_other_is_padded_and_that_is_said(config, packs, tokens, log):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=97, ffn_dim=96, word_embed_proj_dim=64, **sizes))
    targets = find_linear_names(model)
    forward = PackedForward(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets)), 64)
    plan = choose_plan(forward, tokens, "auto", 64, 0)
    assert bool(plan.tokens) is packs
    assert ("padded batches, which are slower: in rows, this model's samples" in "".join(log)) is not packs
    assert forward.model.training


def test_flash_is_for_ampere_and_half_precision_and_others_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    device = torch.device("cuda")
    for capability, dtype, width, expected in (
        ((9, 0), torch.bfloat16, 128, attention.FLASH),
        ((8, 0), torch.float16, 128, attention.FLASH),
        ((7, 5), torch.float16, 128, attention.SAMPLE_BY_SAMPLE),
        ((9, 0), torch.float32, 128, attention.SAMPLE_BY_SAMPLE),
        ((9, 0), torch.bfloat16, 288, attention.SAMPLE_BY_SAMPLE),
        ((9, 0), torch.bfloat16, 100, attention.SAMPLE_BY_SAMPLE),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_attention(device, dtype, width) is expected


def test_without_triton_the_plain_operations_are_used_and_said(monkeypatch, log):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert choose_ops(torch.device("cuda")) is plain
    assert "plain operations, which are slower: ImportError: Triton needs a Turing card" in "".join(log)
    assert choose_ops(torch.device("cpu")) is plain


def test_a_triton_that_cannot_build_kernels_is_replaced_and_said(monkeypatch, log):
    def fail(gate_up):
        raise RuntimeError("Failed to find C compiler")

    kernels = SimpleNamespace(swiglu=fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setitem(sys.modules, "component.kernel.triton_kernels", kernels)
    monkeypatch.setattr(component.kernel, "triton_kernels", kernels, raising=False)
    assert choose_ops(torch.device("cuda")) is plain
    assert "plain operations, which are slower: RuntimeError: Failed to find C compiler" in "".join(log)


def test_attention_sample_by_sample_is_causal_attention_of_each():
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    context, _ = attention.SAMPLE_BY_SAMPLE.forward(query, key, value, Bounds(torch.tensor([0, 4, 9]), 5), 0.5)
    for head in range(4):
        for at in range(9):
            seen = slice(0 if at < 4 else 4, at + 1)
            weights = (0.5 * key[seen, head // 2] @ query[at, head]).softmax(0)
            assert torch.allclose(context.view(9, 4, 8)[at, head], weights @ value[seen, head // 2], atol=1e-6)
