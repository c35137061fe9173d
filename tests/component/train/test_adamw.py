"""FusedAdamW beside bitsandbytes' and torch's AdamW: in plain torch without a card, by its kernel on one."""

from copy import deepcopy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from component.run.errors import ArgumentError
from component.train import adamw
from component.train.adamw import FusedAdamW, fused_if_possible
from component.train.trainer import LoRATrainer

from . import plain_adamw

SHAPES = [(64, 100), (7, 3), (33,), (50, 41)]
RATE, STEPS = 1e-3, 20


@pytest.fixture
def in_torch(monkeypatch):
    """Steps of FusedAdamW without a card."""
    monkeypatch.setattr(adamw, "prepare_launch", plain_adamw.prepare_adamw)


def make_weights(device="cpu", scale=1) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn([scale * n for n in shape], generator=draw).to(device)) for shape in SHAPES]


def make_optimizer(cls, weights, decay=0.1, **settings):
    """Two groups with settings of their own, as LoRA+ has."""
    groups = [
        {"params": weights[:2], "weight_decay": decay},
        {"params": weights[2:], "lr": 3 * RATE, "betas": (0.8, 0.95), "eps": 1e-6},
    ]
    return cls(groups, lr=RATE, weight_decay=0.0, **settings)


def go(optimizer, steps: range) -> None:
    """Steps with the same gradients for every optimizer; the second weight has none in the first five."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for number, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=draw).to(weight.device)
            weight.grad = None if number == 1 and step < 5 else grad
        optimizer.step()


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter], rate: float = RATE) -> None:
    """Equal but for rounding: within a hundredth of one step, after many."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-2 * rate


def test_a_first_step_is_as_long_as_the_rate_and_then_decays(in_torch):
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    weight.grad = torch.tensor([0.5, -4.0])
    optimizer = FusedAdamW([weight], lr=0.1, betas=(0.9, 0.999), eps=0.0, weight_decay=0.1)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.9 * 0.99, 1.1 * 0.99], rel=1e-6)
    state = optimizer.state[weight]
    assert state["step"] == 1
    assert state["state1"].tolist() == pytest.approx([0.05, -0.4], rel=1e-6)
    assert state["state2"].tolist() == pytest.approx([0.00025, 0.016], rel=2e-5)  # 1 - 0.999 in float32


def test_eps_is_added_to_the_corrected_root(in_torch):
    weight = nn.Parameter(torch.tensor([1.0]))
    weight.grad = torch.tensor([0.5])
    FusedAdamW([weight], lr=0.1, eps=0.5, weight_decay=0.0).step()
    assert weight.item() == pytest.approx(1 - 0.1 * 0.5 / (0.5 + 0.5), rel=1e-6)


@pytest.mark.parametrize("other", [bnb.optim.AdamW, torch.optim.AdamW])
def test_steps_are_those_of_other_programs(in_torch, other):
    ours, theirs = make_weights(), make_weights()
    one, two = make_optimizer(FusedAdamW, ours), make_optimizer(other, theirs)
    go(one, range(STEPS))
    go(two, range(STEPS))
    assert_same(ours, theirs)
    assert [one.state[weight]["step"] for weight in ours] == [STEPS, STEPS - 5, STEPS, STEPS]


def test_a_run_may_change_the_program_in_both_directions(in_torch):
    ours, theirs, alone = make_weights(), make_weights(), make_weights()
    one, two = make_optimizer(FusedAdamW, ours), make_optimizer(bnb.optim.AdamW, theirs)
    go(one, range(10))
    go(two, range(10))
    states = deepcopy(one.state_dict()), deepcopy(two.state_dict())
    for ids in range(2):
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for number, state in states[ids]["state"].items():
            assert state.keys() == states[1 - ids]["state"][number].keys()
    one, two = make_optimizer(FusedAdamW, ours), make_optimizer(bnb.optim.AdamW, theirs)
    one.load_state_dict(states[1])
    two.load_state_dict(states[0])
    go(one, range(10, STEPS))
    go(two, range(10, STEPS))
    whole = make_optimizer(bnb.optim.AdamW, alone)
    go(whole, range(STEPS))
    assert_same(ours, alone)
    assert_same(theirs, alone)


def test_a_saved_file_goes_on_with_no_difference(in_torch, tmp_path):
    whole, parts = make_weights(), make_weights()
    go(make_optimizer(FusedAdamW, whole), range(STEPS))
    first = make_optimizer(FusedAdamW, parts)
    go(first, range(3))  # the second weight has no state yet
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = make_optimizer(FusedAdamW, parts)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    go(second, range(3, STEPS))
    assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))


def test_strided_gradients_and_views_as_weights(in_torch):
    buffer = torch.zeros(10)
    weight = nn.Parameter(buffer[2:8].view(2, 3))
    weight.grad = torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, 0.0]]).t()
    FusedAdamW([weight], lr=0.5, eps=1e-8, weight_decay=0.0).step()
    assert buffer.tolist() == pytest.approx([0, 0, -0.5, 0, 0.5, 0.5, -0.5, 0, 0, 0], rel=1e-6)


def test_a_step_that_was_prepared_is_the_same(in_torch):
    """The rate and the gradients' values are those at the step. Gradients that are new by then are prepared anew, and
    a step that was left out changes nothing."""
    ours, theirs = make_weights(), make_weights()
    one, two = make_optimizer(FusedAdamW, ours), make_optimizer(FusedAdamW, theirs)
    for number in range(6):
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = RATE
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad, other.grad = torch.full_like(weight, 1 + number), torch.full_like(weight, 1 + number)
        one.prepare()
        if number == 3:  # left out
            continue
        if number == 4:
            ours[2].grad, theirs[2].grad = torch.ones_like(ours[2]), torch.ones_like(theirs[2])
        if number == 5:
            ours[1].grad = theirs[1].grad = None
        for weights, optimizer in ((ours, one), (theirs, two)):
            optimizer.param_groups[0]["lr"] = 3 * RATE
            weights[0].grad.mul_(0.1)
            optimizer.step()
    assert all(torch.equal(weight, other) for weight, other in zip(ours, theirs, strict=True))
    assert [one.state[weight]["step"] for weight in ours] == [5, 4, 5, 5]


def test_steps_of_the_same_gradients_are_counted(in_torch):
    ours, theirs = make_weights(), make_weights()
    for cls, weights in ((FusedAdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = make_optimizer(cls, weights)
        go(optimizer, range(6))
        optimizer.step()
        optimizer.step()
    assert_same(ours, theirs)


def test_what_was_prepared_before_a_state_is_loaded_is_forgotten(in_torch):
    weights = make_weights()
    optimizer = make_optimizer(FusedAdamW, weights)
    go(optimizer, range(6))
    saved = deepcopy(optimizer.state_dict())
    optimizer.prepare()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert [optimizer.state[weight]["step"] for weight in weights] == [7, 2, 7, 7]


def test_a_step_without_gradients_changes_nothing(in_torch):
    weight = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([weight], lr=0.5)
    optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    assert optimizer.state_dict()["state"] == {}


def test_moments_of_8_bits_are_refused(in_torch):
    weight = nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    eight = FusedAdamW([weight])
    eight.step()
    state = eight.state_dict()
    saved = state["state"][0]["__bnb_optimizer_quant_state__"]
    saved["state1"] = saved["state1"].to(torch.uint8)
    with pytest.raises(ArgumentError, match="8 bits; set optim to what it was"):
        FusedAdamW([weight]).load_state_dict(state)


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizers_state_is_refused(other, in_torch):
    weight = nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    earlier = other([weight], **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    earlier.step()
    with pytest.raises(ArgumentError, match="by another optimizer; set optim to what it was"):
        FusedAdamW([weight]).load_state_dict(earlier.state_dict())


def test_the_optimizer_is_fused_where_its_kernel_runs(monkeypatch):
    wide, narrow = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert fused_if_possible(bnb.optim.AdamW, {"optim_bits": 32}, [wide]) is bnb.optim.AdamW  # no card
    monkeypatch.setattr(adamw, "choose_ops", lambda device: None)
    assert fused_if_possible(bnb.optim.AdamW, {"optim_bits": 32}, [wide]) is FusedAdamW
    for optimizer, bits, weights in (
        (bnb.optim.AdamW, 8, [wide]),
        (bnb.optim.AdamW, 32, [narrow]),
        (bnb.optim.AdamW, 32, [wide, wide.to("meta")]),
        (bnb.optim.AdamW, 32, []),
        (bnb.optim.Lion, 32, [wide]),
        (torch.optim.AdamW, 32, [wide]),
    ):
        assert fused_if_possible(optimizer, {"optim_bits": bits}, weights) is optimizer


@pytest.mark.parametrize(
    ("optim", "paged"), [("paged_adamw_32bit", True), ("adamw_bnb_8bit", False), ("adamw_torch", None)]
)
def test_the_trainer_takes_it_for_bitsandbytes_adamw_alone(monkeypatch, tmp_path, optim, paged):
    monkeypatch.setattr(adamw, "choose_ops", lambda device: None)
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, adam_beta2=0.95)
    cls, settings = LoRATrainer.get_optimizer_cls_and_kwargs(args, nn.Linear(2, 2))
    assert (cls is FusedAdamW) is (optim == "paged_adamw_32bit")
    assert (settings.get("is_paged"), settings["betas"]) == (paged, (0.9, 0.95))


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_kernel_makes_bitsandbytes_steps(paged, decay):
    """Its bias corrections are computed by fast, inexact functions, hence the bound."""
    ours, theirs = make_weights("cuda", 20), make_weights("cuda", 20)
    one = make_optimizer(FusedAdamW, ours, decay, is_paged=paged)
    two = make_optimizer(bnb.optim.AdamW, theirs, decay, is_paged=paged)
    go(one, range(10))
    go(two, range(10))
    states = deepcopy(one.state_dict()), deepcopy(two.state_dict())
    one = make_optimizer(FusedAdamW, ours, decay, is_paged=paged)
    two = make_optimizer(bnb.optim.AdamW, theirs, decay, is_paged=paged)
    one.load_state_dict(states[1])
    two.load_state_dict(states[0])
    go(one, range(10, STEPS))
    go(two, range(10, STEPS))
    assert_same(ours, theirs)
    assert bool(one.paged) is paged
    for mine, other in zip(one.state_dict()["state"].values(), two.state_dict()["state"].values(), strict=True):
        assert mine["step"] == other["step"]
        for name, moment in mine["__bnb_optimizer_quant_state__"].items():
            torch.testing.assert_close(
                moment.cuda(), other["__bnb_optimizer_quant_state__"][name].cuda(), rtol=1e-5, atol=1e-7
            )


@pytest.mark.gpu
def test_the_kernel_reaches_unaligned_weights_and_elements_beyond_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    buffer = torch.zeros(2**31 + 70, device="cuda")
    weight = nn.Parameter(buffer[1:])
    weight.grad = torch.ones_like(weight)
    FusedAdamW([weight], lr=0.5, eps=0.0, weight_decay=0.0).step()
    assert buffer[0] == 0
    assert buffer[[1, 2**31, -1]].tolist() == pytest.approx([-0.5] * 3, rel=1e-6)
