"""Plans of memory, on a pretended card."""

import re
from dataclasses import asdict

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from component.chatglm import ChatGLMConfig
from component.kernel import memory
from component.kernel.layer import CHECKPOINTING
from component.kernel.memory import (
    Plan,
    choose_plan,
    estimate,
    fixed_bytes,
    host_memory,
    list_plans,
    optimizer_bytes,
    pinned_bytes,
    possible_plans,
)
from component.kernel.model import PackedForward
from component.model import attach_lora, load_base, sketch_model
from component.run.errors import DoesNotFit
from component.settings.schema import QLoRAArguments

from .conftest import make_model


@pytest.fixture
def card(monkeypatch):
    """A CUDA card of `gib` free GiB on which rows above `longest` tokens run out of memory, and what `use` was told: a
    `+` stands for kept weights."""

    def pretend(gib: float, longest: int = 10**9, bits: int = 4) -> tuple[PackedForward, list]:
        probed, device = [], torch.device("cuda")
        forward = PackedForward(make_model("llama", bits=bits), 64)
        monkeypatch.setattr(type(forward.model), "device", property(lambda self: device))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * 2**30), 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(forward, "use", lambda kept, keeps=False, tokens=0: probed.append(kept + "+" * keeps))
        monkeypatch.setattr(forward, "probe", lambda tokens, beside: tokens <= longest)
        return forward, probed

    return pretend


def test_auto_takes_the_fastest_that_fits(card):
    forward, _ = card(80)
    assert choose_plan(forward, None, "auto", 64, 0) == Plan(32768, "none", keeps_weights=True)
    small = estimate(forward.layers, forward.vocab, 0, Plan(8192, "full"))
    forward, _ = card(small / 2**30 / memory.SPARE * 1.01)
    assert choose_plan(forward, None, "auto", 64, 0).checkpointing in ("none", "selective", "full")
    assert choose_plan(forward, 8192, "offload", 64, 0) == Plan(8192, "offload")


def test_a_plan_that_fails_its_probe_gives_way_to_the_next(card, log):
    forward, probed = card(80, longest=4096)
    assert choose_plan(forward, None, "auto", 64, 0) == Plan(4096, "none")
    assert probed == ["none+", "none"] * 2 + ["none"] + ["none+", "none"] + ["none"] * 2, "what was kept is freed"
    assert "rows of 8,192 tokens, activation_checkpointing none: out of memory on the longest row" in "".join(log)


def test_no_row_is_longer_than_the_samples_of_an_update(card):
    forward, _ = card(80)
    for samples, tokens in ((1, 1000), (4, 4000), (16, 16_000), (64, 32_768)):
        assert choose_plan(forward, None, "auto", 1000, 0, samples=samples) == Plan(tokens, "none", keeps_weights=True)
    assert choose_plan(forward, 8192, "auto", 1000, 0, samples=1).tokens == 8192


def test_plans_that_differ_in_nothing_are_one():
    long = [Plan(131_072, "none", True), *(Plan(131_072, kept) for kept in CHECKPOINTING)]
    assert possible_plans(None, "auto", longest=131_072, samples=16) == long
    assert possible_plans(None, "auto", longest=131_072) == long
    assert possible_plans(4096, "auto", longest=1024) == [Plan(4096, kept) for kept in CHECKPOINTING]
    assert possible_plans(None, "full", longest=1024) == [Plan(tokens, "full") for tokens in (32768, 8192, 4096)]
    assert possible_plans(8192, "none", longest=1024, keeps_weights=False) == [Plan(8192, "none")]


def test_who_sets_the_length_of_rows_limits_the_memory_and_weights_are_not_kept(card):
    forward, probed = card(80)
    assert choose_plan(forward, 8192, "auto", 64, 0) == Plan(8192, "none", keeps_weights=False)
    assert probed == ["none"]


def test_a_run_that_goes_on_keeps_its_plan(card):
    forward, probed = card(80)
    plan = choose_plan(forward, None, "auto", 64, 0)
    assert choose_plan(forward, longest=64, optimizer_bytes=0, samples=1, **asdict(plan)) == plan
    of_earlier_versions = {"tokens": 8192, "checkpointing": "none"}
    assert choose_plan(forward, longest=64, optimizer_bytes=0, **of_earlier_versions) == Plan(8192, "none")
    assert probed == ["none+", "none+", "none"]


def test_a_run_that_was_begun_with_kept_weights_goes_on_without_them_where_they_have_no_room(card):
    forward, probed = card(80)
    large, small = (estimate(forward.layers, forward.vocab, 0, Plan(8192, "none", keeps)) for keeps in (True, False))
    fixed = fixed_bytes(forward, 0)
    forward, probed = card((fixed + (large + small) / 2) / 2**30 / memory.SPARE)
    begun = asdict(Plan(8192, "none", keeps_weights=True))
    assert choose_plan(forward, longest=64, optimizer_bytes=0, goes_on=True, **begun) == Plan(8192, "none")
    assert probed == ["none"]


def test_a_run_that_goes_on_and_does_not_fit_is_told_which_rows_to_take(card):
    forward, _ = card(80, longest=10)
    for tokens, longest, advised in ((32_768, 64, 8192), (16_384, 9000, 9000), (8192, 64, 4096)):
        begun = asdict(Plan(tokens, "none"))
        with pytest.raises(DoesNotFit) as refused:
            choose_plan(forward, longest=longest, optimizer_bytes=0, goes_on=True, **begun)
        assert str(refused.value).endswith(
            "another program may have taken them: this run was begun with such rows; go on, not exactly, with "
            f"packing_length={advised} resume_despite_changes=true, or free the card of other programs"
        )


def test_memory_that_ends_while_weights_are_unpacked_is_a_plan_that_does_not_fit(card, monkeypatch, log):
    forward, _ = card(80)
    told, freed = [], []

    def use(kept, keeps=False, tokens=0):
        told.append(keeps)
        if keeps:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "use", use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(told)))
    assert choose_plan(forward, None, "auto", 64, 0) == Plan(16384, "none")
    assert told == [True, False, True, False, False]
    assert freed == [2, 4], "after the weights were let go"
    said = (
        "rows of 32,768 tokens, activation_checkpointing none, weights kept unpacked: out of memory on the longest row"
    )
    assert said in "".join(log)


def test_inputs_that_the_host_cannot_hold_are_a_plan_that_does_not_fit(card, monkeypatch):
    forward, probed = card(80)
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 << 20)
    with pytest.raises(DoesNotFit) as refused:
        choose_plan(forward, 16384, "offload", 64, 0)
    assert str(refused.value) == (
        "rows of 16,384 tokens, activation_checkpointing offload needs 0.0 GiB of the host's memory, of which it may "
        "take 0.0: lower packing_length, max_seq_length or lora_rank, set activation_checkpointing to auto, or free "
        "the host's memory or raise the container's limit"
    )
    assert probed == []
    assert choose_plan(forward, 8192, "offload", 64, 0) == Plan(8192, "offload"), (
        "2 layers x 8,192 x 64 values x 4 bytes"
    )


def test_the_hosts_memory_is_divided_among_its_ranks(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 64)
    assert host_memory() == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert host_memory() == 8


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
    assert (seen[0], seen[2:]) == (80 * 2**30, [1])
    assert probed == ["offload"]


def test_a_rank_frees_kept_weights_if_the_plan_failed_on_another(card, monkeypatch):
    forward, probed = card(80)
    answers = iter([0, 1])  # of the least of all ranks, the first time a plan is tried and the second
    monkeypatch.setattr(memory, "least", lambda number, device: next(answers) if number in (0, 1) else number)
    assert choose_plan(forward, 8192, "none", 64, 0, keeps_weights=True) == Plan(8192, "none")
    assert probed == ["none+", "none", "none"]


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
    with pytest.raises(DoesNotFit) as refused:
        choose_plan(forward, 8192, "none", 64, 0)
    assert re.fullmatch(
        r"rows of 8,192 tokens, activation_checkpointing none ran out of memory, although by estimate it needs "
        r"0\.\d GiB, and 80\.0 were free; another program may have taken them: lower "
        r"packing_length, max_seq_length or lora_rank, set activation_checkpointing to auto, or free the card of other "
        r"programs",
        str(refused.value),
    )
    with pytest.raises(DoesNotFit, match="may have taken them: lower max_seq_length or lora_rank, or free the card"):
        choose_plan(forward, None, "auto", 64, 0)
    forward, _ = card(0.001, longest=10)
    with pytest.raises(DoesNotFit, match=r"needs about 0\.\d GiB, of which 0\.0 are free: lower packing_length, "):
        choose_plan(forward, 8192, "auto", 64, 0)


def test_rows_are_never_shorter_than_a_sample_may_be(card):
    forward, _ = card(80)
    assert choose_plan(forward, None, "auto", 40_000, 0).tokens == 40_000


def sketch_chatglm3(folder, bits: int, config=None) -> PackedForward:
    """ChatGLM3-6B, or another model, with r=64 on every linear layer."""
    (config or ChatGLMConfig()).save_pretrained(folder)
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
        (7309, "none", 22.4),  # from here on 2026-11-27: the longest rows of one update, with limits of 8,192, 16,384
        (14602, "none", 39.7),
        (29199, "full", 14.7),  # and 32,768
        (14602, "none+", 50.4),  # the next two with cuDNN's attention
        (32768, "selective", 37.0),
    ):
        plan = Plan(tokens, kept.rstrip("+"), kept.endswith("+"))
        predicted = estimate(forward.layers, forward.vocab, fixed, plan) / 2**30
        assert predicted == pytest.approx(gib, rel=0.1), kept


QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}


@pytest.mark.parametrize(
    ("config", "gib"),
    [
        (Qwen2Config(**QWEN, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True), 19.9),
        (LlamaConfig(**SMOL, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), 11.3),
    ],
    ids=["Qwen2-0.5B", "SmolLM2-135M"],
)
def test_small_models_take_what_was_measured(config, gib, tmp_path):
    """On an H100, one row of 29,199 tokens: within 5%. Two pieces of logits, 0.5 GiB together, are part of it."""
    forward = sketch_chatglm3(tmp_path, 4, config)
    fixed = fixed_bytes(forward, optimizer_bytes("paged_adamw_32bit", on_card=True))
    assert estimate(forward.layers, forward.vocab, fixed, Plan(29_199, "none")) / 2**30 == pytest.approx(gib, rel=0.05)


def test_kept_weights_take_two_bytes_a_value_and_nothing_is_unpacked_beside_them(tmp_path):
    """A layer of ChatGLM3-6B has 203,948,032 weights in 4 bits, and 4,235,264 values in its adapter."""
    forward = sketch_chatglm3(tmp_path, 4)
    kept, unpacked = (estimate(forward.layers, 65_024, 0, Plan(32_768, "full", keeps)) for keeps in (True, False))
    assert kept - unpacked == 2 * (28 * (203_948_032 + 4_235_264) - 27_392 * 4_096)


def test_what_layers_keep_grows_with_the_length_of_a_row(tmp_path):
    """28 layers keep 64 values of a token between the halves of `down`'s low-rank path, and all but `offload` 4,096 of
    their input; a layer's backward needs 69,632 more, twice its input where that comes from the host, and 5.2 bytes
    for each of a context's 4,096 values."""
    forward = sketch_chatglm3(tmp_path, 4)
    for kept, values in (("offload", 28 * 64 + 2 * 4096 + 74_624), ("full", 28 * (4096 + 64) + 74_624)):
        short, long = (estimate(forward.layers, 65_024, 0, Plan(tokens, kept)) for tokens in (65_536, 131_072))
        assert long - short == 2 * 65_536 * values + int(65_536 * 4096 * 5.2), kept


def test_what_is_counted_for_kept_weights_is_what_is_kept(bits):
    forward = PackedForward(make_model("qwen2", bits=bits, rank=16), 64)
    forward.use("none", keeps_weights=True)
    parts = [part for layer in forward.layers for part in layer.projections]
    storages = {part.data_ptr(): part.untyped_storage().nbytes() for layer in parts for part in layer.kept}
    for part in parts:
        storages.pop(part.kept.ups.data_ptr() if part.room else None, None)  # columns of the weight
        storages.pop(part.plain.data_ptr() if part.plain is not None else None, None)  # the base's own
    one, other = (estimate(forward.layers, forward.vocab, 0, Plan(8192, "none", keeps)) for keeps in (True, False))
    widest = 4 * 2 * 96 * 64 if bits == 4 else 0  # values of 4 bytes, which need not be unpacked any more
    assert one - other == sum(storages.values()) - widest


def test_the_workspace_of_cudnns_attention_is_counted_on_every_machine(monkeypatch, tmp_path):
    forward = sketch_chatglm3(tmp_path, 4)
    whole = estimate(forward.layers, forward.vocab, 0, Plan(65_536, "full"))
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    assert whole - estimate(forward.layers, forward.vocab, 0, Plan(65_536, "full")) == int(65_536 * 4096 * 5.2)


def test_rows_that_are_recorded_share_no_memory_with_the_head(monkeypatch, tmp_path):
    forward = sketch_chatglm3(tmp_path, 4)
    before = estimate(forward.layers, forward.vocab, 0, Plan(8192, "none"))
    monkeypatch.setattr(memory, "pays", lambda layer, checkpointing, tokens: True)
    more = estimate(forward.layers, forward.vocab, 0, Plan(8192, "none")) - before
    assert more == 2 * 2**28 + 8192 * 3 * 4096 * 2, "two pieces of logits, and three tensors of hidden size"


def test_an_input_on_the_host_takes_a_power_of_two(tmp_path):
    layers = sketch_chatglm3(tmp_path, 4).layers
    assert pinned_bytes(layers, Plan(262_144, "offload")) == 28 * 262_144 * 4096 * 2
    assert pinned_bytes(layers, Plan(140_000, "offload")) == 28 * 262_144 * 4096 * 2
    assert pinned_bytes(layers, Plan(262_144, "full")) == 0


def test_plans_are_listed_with_their_memory(tmp_path):
    forward = sketch_chatglm3(tmp_path, 4)
    lines = list_plans(forward, possible_plans(None, "auto", 1024, samples=16), 0).splitlines()
    assert lines == [
        "A run takes the first of these that needs less than 92% of the card's free memory (GiB by estimate) and "
        "passes a trial:",
        "    54.9  rows of 16,384 tokens, activation_checkpointing none, weights kept unpacked",
        "    44.3  rows of 16,384 tokens, activation_checkpointing none",
        "    35.4  rows of 8,192 tokens, activation_checkpointing none, weights kept unpacked",
        "    24.5  rows of 8,192 tokens, activation_checkpointing none",
        "    14.8  rows of 4,096 tokens, activation_checkpointing none",
        "    10.1  rows of 2,048 tokens, activation_checkpointing none",
        "     9.0  rows of 4,096 tokens, activation_checkpointing selective",
        "     7.9  rows of 8,192 tokens, activation_checkpointing full",
        "     6.4  rows of 4,096 tokens, activation_checkpointing full",
        "     6.3  rows of 8,192 tokens, activation_checkpointing offload",
        "     5.6  rows of 4,096 tokens, activation_checkpointing offload",
        "     5.2  rows of 2,048 tokens, activation_checkpointing offload",
    ], "and none that needs no less than one before it"


def test_plans_that_need_no_less_than_one_that_failed_are_not_tried(card):
    forward, probed = card(80, longest=2047)
    with pytest.raises(DoesNotFit):
        choose_plan(forward, None, "auto", 64, 0)
    sizes = [estimate(forward.layers, forward.vocab, 0, plan) for plan in possible_plans(None, "auto", 64)]
    lowest = [size for at, size in enumerate(sizes) if size < min(sizes[:at], default=size + 1)]
    kept = sum(plan.keeps_weights for plan in possible_plans(None, "auto", 64))
    assert len(probed) - kept == len(lowest) < len(sizes), "a plan of kept weights is left once more"


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
