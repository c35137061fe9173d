"""Plans of memory, on a pretended card."""

import pytest
import torch

from component.chatglm import ChatGLMConfig
from component.kernel import memory
from component.kernel.memory import Plan, choose_plan, estimate, fixed_bytes, optimizer_bytes, table
from component.kernel.model import PackedForward
from component.run.errors import DoesNotFit

from .conftest import make_model


@pytest.fixture
def card(monkeypatch):
    """A CUDA card of `gib` free GiB on which rows above `longest` tokens run out of memory."""

    forward = PackedForward(make_model("llama"), 64)

    def pretend(gib: float, longest: int = 10**9) -> tuple[PackedForward, list]:
        probed, device = [], torch.device("cuda")
        monkeypatch.setattr(type(forward.model), "device", property(lambda self: device))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * 2**30), 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(forward, "use", lambda kept: probed.append(kept))
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


def test_the_estimates_are_those_that_were_measured():
    """ChatGLM3-6B, r=64 on every linear layer, on an H100 (benchmark/README.md): within 10%."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ChatGLMConfig(), dtype=torch.bfloat16)
        names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        config = LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=names)
        forward = PackedForward(get_peft_model(model, config), 1024)
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


def test_bytes_of_optimizers():
    names = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd")
    assert [optimizer_bytes(name, on_card=True) for name in names] == [8, 2, 0, 0, 0]
    assert [optimizer_bytes(name, on_card=False) for name in names] == [8, 2, 8, 2, 0]
