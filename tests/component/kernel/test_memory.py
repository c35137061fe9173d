"""Plans of memory, on a pretended card."""

import pytest
import torch

from component.chatglm import ChatGLMConfig
from component.kernel import memory
from component.kernel.memory import Plan, choose_plan, estimate, fixed_bytes, optimizer_bytes, table
from component.kernel.model import PackedForward
from component.model import attach_lora, load_base, sketch_model
from component.run.errors import DoesNotFit
from component.settings.schema import QLoRAArguments

from .conftest import make_model


@pytest.fixture
def card(monkeypatch):
    """A CUDA card of `gib` free GiB on which rows above `longest` tokens run out of memory."""

    def pretend(gib: float, longest: int = 10**9, bits: int = 4) -> tuple[PackedForward, list]:
        probed, device = [], torch.device("cuda")
        forward = PackedForward(make_model("llama", bits=bits), 64)
        monkeypatch.setattr(type(forward.model), "device", property(lambda self: device))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * 2**30), 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(forward, "use", lambda kept, tokens: probed.append(kept))
        monkeypatch.setattr(forward, "probe", lambda tokens, beside: tokens <= longest)
        return forward, probed

    return pretend


def test_auto_takes_the_fastest_that_fits(card):
    forward, _ = card(80)
    assert choose_plan(forward, None, "auto", 64, 0) == Plan(8192, "none")
    small = estimate(forward.layers, forward.vocab, 0, Plan(8192, "full"))
    forward, _ = card(small / 2**30 / memory.SPARE * 1.01)
    assert choose_plan(forward, None, "auto", 64, 0).checkpointing in ("none", "selective", "full")
    assert choose_plan(forward, 8192, "offload", 64, 0) == Plan(8192, "offload")


def test_a_plan_that_fails_its_probe_gives_way_to_the_next(card, log):
    forward, probed = card(80, longest=4096)
    assert choose_plan(forward, None, "auto", 64, 0) == Plan(4096, "none")
    assert probed == ["none", "none"]
    assert "rows of 8,192 tokens, activation_checkpointing none: out of memory on the longest row" in "".join(log)


def test_ranks_plan_with_the_fullest_card_and_so_try_the_same_plans(card, monkeypatch):
    forward, probed = card(80)
    seen = []

    def all_reduce(value, operation):
        seen.append(value.item())
        value.fill_(min(value.item(), 2**20))

    monkeypatch.setattr(memory.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(memory.dist, "all_reduce", all_reduce)
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device: tensor(value))
    assert choose_plan(forward, None, "auto", 64, 0).checkpointing == "offload"
    assert seen == [80 * 2**30, 1]
    assert probed == ["offload"]


def test_a_probe_has_samples_as_long_as_may_be_and_room_for_the_optimizer(monkeypatch):
    model = make_model("llama")
    forward, rows, sizes = PackedForward(model, 24), [], []
    fused, empty = forward.fused, torch.empty
    monkeypatch.setattr(forward, "fused", lambda targets, **row: rows.append(row) or fused(targets, **row))
    monkeypatch.setattr(torch, "empty", lambda *size, **more: sizes.append(size) or empty(*size, **more))
    assert forward.probe(64, 1000)
    (row,) = rows
    assert row["ends"].tolist() == [0, 24, 48, 64]
    assert row["longest"] == 24
    assert row["position_ids"].tolist() == [*range(24), *range(24), *range(16)]
    assert sizes[0] == (1000,)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_probe_keeps_room_for_both_moments_of_an_optimizer_on_the_card(card, monkeypatch):
    forward, _ = card(80)
    asked = []
    monkeypatch.setattr(forward, "probe", lambda tokens, beside: asked.append(beside) or True)
    choose_plan(forward, None, "auto", 64, 8)
    assert asked == [8 * sum(weight.numel() for weight in forward.model.parameters() if weight.requires_grad)]


def test_where_nothing_fits_the_remedies_are_named(card):
    forward, _ = card(80, longest=10)
    with pytest.raises(DoesNotFit, match=r"needs about .* GiB, of which 80\.0 are free: lower packing_length"):
        choose_plan(forward, None, "none", 64, 0)


def test_rows_are_never_shorter_than_a_sample_may_be(card):
    forward, _ = card(80)
    assert choose_plan(forward, None, "auto", 20_000, 0).tokens == 20_000


def sketch_chatglm3(folder, bits: int) -> PackedForward:
    """ChatGLM3-6B with r=64 on every linear layer."""
    ChatGLMConfig().save_pretrained(folder)
    args = QLoRAArguments(model_name_or_path=str(folder), train_file="x", base_bits=bits)
    return PackedForward(sketch_model(args), 1024)


def test_the_estimates_are_those_that_were_measured(tmp_path):
    """On an H100 (benchmark/README.md): within 10%."""
    forward = sketch_chatglm3(tmp_path, 4)
    fixed = fixed_bytes(forward, optimizer_bytes("paged_adamw_32bit", on_card=True))
    for tokens, kept, gib in (
        (7456, "none", 22.69),
        (7456, "selective", 12.12),
        (7456, "full", 7.35),
        (7456, "offload", 5.87),
    ):
        predicted = estimate(forward.layers, forward.vocab, fixed, Plan(tokens, kept)) / 2**30
        assert predicted == pytest.approx(gib, rel=0.1), kept
    assert "none 2" in table(forward, 8192, 0)


def test_a_base_of_16_bits_counts_two_bytes_a_value_and_none_to_unpack_it(tmp_path):
    """ChatGLM3-6B has 6,243,584,000 weights, 118,587,392 in the adapter, and 27,392 x 4,096 in its widest layer."""
    four, sixteen = sketch_chatglm3(tmp_path, 4), sketch_chatglm3(tmp_path, 16)
    assert fixed_bytes(sixteen, 0) == 2 * 6_243_584_000 + 8 * 118_587_392
    plan = Plan(8192, "offload")
    difference = estimate(four.layers, four.vocab, 0, plan) - estimate(sixteen.layers, sixteen.vocab, 0, plan)
    assert difference == 2 * 27_392 * 4_096


def test_what_a_sketch_weighs_is_what_a_loaded_model_weighs(model_folder, bits):
    folder = model_folder("llama", attention_bias=True)
    args = QLoRAArguments(model_name_or_path=str(folder), train_file="x", base_bits=bits)
    sketch = PackedForward(sketch_model(args), 64)
    base = load_base(str(folder), bits, torch.bfloat16, "cpu")
    states = [weight.quant_state for weight in base.parameters() if hasattr(weight, "quant_state")]
    assert len(states) == (14 if bits == 4 else 0)
    scales = [scales for state in states for scales in (state.absmax, state.state2.absmax)]
    weighs = sum(part.numel() * part.element_size() for part in [*base.parameters(), *scales])
    model = attach_lora(base, args)
    adapter = 8 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert fixed_bytes(sketch, 0) == pytest.approx(weighs + adapter, abs=4 * len(states))  # a scale is never halved
    if bits == 16:
        assert {weight.dtype for weight in base.parameters() if not weight.requires_grad} == {torch.bfloat16}


def test_where_a_base_of_16_bits_does_not_fit_4_are_named(card):
    forward, _ = card(80, longest=10, bits=16)
    with pytest.raises(DoesNotFit, match="set base_bits to 4, or free the card"):
        choose_plan(forward, None, "none", 64, 0)


def test_bytes_of_optimizers():
    names = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd")
    assert [optimizer_bytes(name, on_card=True) for name in names] == [8, 2, 0, 0, 0]
    assert [optimizer_bytes(name, on_card=False) for name in names] == [8, 2, 8, 2, 0]
