"""Fused layers on a CUDA card: Triton, flash attention and half precision against the plain path."""

import pytest
import torch

from component.kernel import attention, cudnn, plain
from component.kernel.attention import Bounds
from component.kernel.graph import Recorder
from component.kernel.head import HeadLoss
from component.kernel.layer import CHECKPOINTING
from component.kernel.memory import choose_plan
from component.kernel.model import PackedForward
from component.train.batch import PackingCollator

from .conftest import gradients, make_model, make_samples

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def run(model, samples):
    (row,) = PackingCollator(512).lay_out(samples)
    loss = model(**{key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in row.items()})
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_fused_equals_the_models_own_layers(family, dtype, tolerance, checkpointing):
    samples = make_samples((70, 1, 129, 35))
    plain = make_model(family, device=DEVICE, rank=16)
    PackedForward(plain, 512, fuses=False)
    expected = run(plain, samples)
    fused = make_model(family, device=DEVICE, rank=16, dtype=dtype)
    PackedForward(fused, 512).use(checkpointing)
    loss, grads = run(fused, samples)
    assert loss == pytest.approx(expected[0], rel=tolerance)
    for name, grad in expected[1].items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - grad).norm() <= tolerance * 2 * grad.norm(), name


def attend(way, states, grad, bounds, room=0):
    context, saved = way.forward(*states, bounds, 0.125, room)
    return context, way.backward(grad, *states, context, saved, bounds, 0.125)


def make_row(lengths, heads, groups, head_dim, dtype, spare=0):
    torch.manual_seed(0)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    states = torch.randn(sum(lengths), heads + 2 * groups, head_dim, device=DEVICE).to(dtype)
    grad = torch.randn(sum(lengths), heads * head_dim + spare, device=DEVICE).to(dtype)[:, : heads * head_dim]
    return states.split((heads, groups, groups), 1), grad, Bounds(ends, max(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_equals_attention_sample_by_sample(dtype):
    torch.manual_seed(0)
    bounds = Bounds(torch.tensor([0, 100, 101, 300], dtype=torch.int32, device=DEVICE), 199)
    query, key, value = (torch.randn(300, heads, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2))
    grad = torch.randn_like(query).flatten(1)
    results = []
    for way in (attention.FLASH, attention.SAMPLE_BY_SAMPLE):
        context, grads = attend(way, (query, key, value), grad, bounds)
        results.append((context, *grads.split((8, 2, 2), 1)))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()


def needs_cudnn(dtype, head_dim):
    if attention.choose_attention(torch.device(DEVICE), dtype, head_dim) is not attention.CUDNN:
        pytest.skip("cuDNN's attention needs Hopper or newer and the package nvidia-cudnn-frontend")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim", "room"),
    [
        ([100, 1, 199, 77, 1], 32, 2, 128, 0),
        ([100, 1, 199, 77, 1], 32, 8, 128, 64),
        ([511], 9, 3, 64, 16),
        ([1], 1, 1, 64, 0),
        ([1 + 7 * at % 90 for at in range(33)], 14, 2, 64, 4),
        ([130, 33, 260], 4, 2, 80, 0),
        ([3000, 1, 9], 2, 1, 16, 0),
    ],
)
def test_cudnn_equals_attention_sample_by_sample(dtype, lengths, heads, groups, head_dim, room):
    needs_cudnn(dtype, head_dim)
    states, grad, bounds = make_row(lengths, heads, groups, head_dim, dtype, spare=room)
    context, grads = attend(attention.CUDNN, states, grad, bounds, room)
    exact = attend(attention.SAMPLE_BY_SAMPLE, [x.float() for x in states], grad.float(), bounds)
    sizes = heads, groups, groups
    for one, other in zip((context, *grads.split(sizes, 1)), (exact[0], *exact[1].split(sizes, 1)), strict=True):
        # A sample of one token has no gradient of queries and keys, but for the rounding of its terms.
        assert (one.float() - other).norm() <= 1e-2 * other.norm() + 1e-2 * (other.norm() < 1e-3)


def test_cudnn_in_a_recorded_graph_takes_the_samples_of_each_replay():
    needs_cudnn(torch.bfloat16, 128)
    states, grad, bounds = make_row([300, 1, 57, 200, 466], 32, 2, 128, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(attention.CUDNN, states, grad, bounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = attend(attention.CUDNN, states, grad, bounds)
    for ends in ([0, 511, 512, 700, 701, 1024], [0, 300, 301, 358, 558, 1024]):
        bounds.ends.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        for one, other in zip(
            recorded, attend(attention.FLASH, states, grad, bounds._replace(longest=512)), strict=True
        ):
            assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()


def test_two_runs_are_one_bit_for_bit():
    model = make_model("chatglm", device=DEVICE, rank=16, dropout=0.1, dtype=torch.bfloat16)
    PackedForward(model, 512)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(run(model, make_samples((70, 1, 129, 35))))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_a_plan_is_proven_and_leaves_nothing_behind():
    model = make_model("llama", device=DEVICE, dtype=torch.bfloat16)
    forward = PackedForward(model, 512)
    state = torch.get_rng_state()
    plan = choose_plan(forward, None, "auto", 512, 0)
    assert (plan.tokens, plan.checkpointing, plan.keeps_weights) == (32768, "none", True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_loss_scale_of_float16_is_applied_before_the_gradient_is_rounded():
    """65,536 does not exist in float16: as a factor of that type it makes every gradient of a first update infinite."""
    hidden = torch.full((4, 8), 0.01, dtype=torch.float16, device=DEVICE, requires_grad=True)
    learned, targets = torch.tensor([1, 3], device=DEVICE), torch.tensor([0, 5], device=DEVICE)
    head = torch.eye(8, dtype=torch.float16, device=DEVICE)
    loss = HeadLoss.apply(hidden, learned, targets, None, 0.0, head, plain, True)
    (loss * 65536).backward()
    assert hidden.grad[1].tolist() == pytest.approx([-57344.0, *[8192.0] * 7], rel=1e-3)
    assert hidden.grad[[0, 2]].abs().max() == 0


def test_a_mask_of_dropout_is_the_same_on_a_card():
    shape = 5000, 4096  # more than the card makes at a time
    masks = [plain.dropout_mask(*shape, 0.05, 2**32 - 5, torch.device(device)) for device in ("cpu", DEVICE)]
    assert torch.equal(masks[0], masks[1].cpu())


ROWS = (70, 1, 129, 35), (40, 40, 40), (20, 3), (150, 60, 20)  # the first and the last are of one size


def updates(model, rows=ROWS, tokens=512):
    """(loss, gradients) of three updates: with fresh weights, with changed ones, with moved ones. An evaluation comes
    between each row's forward and its backward."""
    parts = [PackingCollator(tokens).lay_out(make_samples(lengths))[0] for lengths in rows]
    parts = [{key: x.to(DEVICE) if torch.is_tensor(x) else x for key, x in part.items()} for part in parts]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(4)
    results = []
    for number in range(3):
        total = 0.0
        for part in parts:
            loss = model(**part)
            model.eval()
            with torch.no_grad():
                model(**parts[0])
            model.train()
            loss.backward()
            total += loss.item()
        results.append((total, [weight.grad.clone() for weight in weights]))
        with torch.no_grad():
            for weight in weights:
                if number:
                    weight.data = weight.data.clone()
                weight.sub_(weight.grad, alpha=0.1 / weight.grad.norm())
        model.zero_grad()
    return results


def assert_close(one, other, tolerance):
    for (loss, grads), (expected, others) in zip(one, other, strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
        for grad, wanted in zip(grads, others, strict=True):
            assert (grad - wanted).norm() <= tolerance * 2 * wanted.norm()


def results_by_recorder(family, checkpointing="none", keeps_weights=False):
    """What `updates` returns, of rows that go the eager way, that are padded alone, and that are recorded."""
    results = []
    for record in (None, lambda *steps: steps, Recorder(torch.device(DEVICE))):
        model = make_model(family, device=DEVICE, rank=16, dropout=0.1, dtype=torch.bfloat16)
        forward = PackedForward(model, 512)
        forward.use(checkpointing, keeps_weights)
        if record:
            forward.replay_rows(512, record)
        results.append(updates(model))
        assert (forward.graphs is not None) == (record is not None), "a recording failed"
    assert [size.tokens for size in forward.graphs.replays] == [128, 64, 256], "the last used last"
    return results


@pytest.mark.parametrize("keeps_weights", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_recorded_rows_equal_others_whatever_is_kept(checkpointing, keeps_weights):
    eager, padded, recorded = results_by_recorder("llama", checkpointing, keeps_weights)
    assert_close(recorded, padded, 1e-4)
    assert_close(recorded, eager, 4e-2)


def test_recorded_rows_equal_others_in_every_family(family):
    eager, padded, recorded = results_by_recorder(family)
    assert_close(recorded, padded, 1e-4)
    assert_close(recorded, eager, 4e-2)


def test_recorded_rows_whose_attention_has_different_plans_equal_others_in_turn():
    """Plans of cuDNN are made while rows are recorded, and used while others, recorded before, are replayed."""
    needs_cudnn(torch.bfloat16, 16)
    results = []
    for record in (lambda *steps: steps, Recorder(torch.device(DEVICE))):
        model = make_model("llama", device=DEVICE, rank=16, dtype=torch.bfloat16)
        forward = PackedForward(model, 1024)
        cudnn.make_forward.cache_clear()
        cudnn.make_backward.cache_clear()
        forward.replay_rows(16384, record)
        results.append(updates(model, [(900,) * count for count in (3, 6, 12)] * 2, 16384))
        assert forward.graphs is not None, "a recording failed"
    assert cudnn.make_backward.cache_info().currsize == 3
    assert_close(results[1], results[0], 1e-4)


def test_weights_that_were_kept_make_room_for_those_that_will_be():
    model, samples = make_model("llama", device=DEVICE, rank=16, dtype=torch.bfloat16), make_samples((70, 1, 129, 35))
    forward = PackedForward(model, 512)
    forward.use("none", keeps_weights=True)
    loss, grads = run(model, samples)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward.use("none", keeps_weights=True)
    assert torch.cuda.max_memory_allocated() <= before
    again, others = run(model, samples)
    assert again == loss
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


def test_of_recorded_rows_nothing_stays_where_a_model_is_left():
    model, samples = make_model("qwen2", device=DEVICE, rank=16, dtype=torch.bfloat16), make_samples((70, 1, 129, 35))
    forward = PackedForward(model, 512)
    forward.use("none", keeps_weights=True, tokens=512)
    run(model, samples)
    pool = forward.graphs.record.pool.id

    def segments():
        return [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == tuple(pool)]

    assert segments()
    forward.leave()
    assert not segments()


def leave_the_card(ids):
    return ids.sum().item()


def fail(ids):
    raise ValueError("not on this card")


@pytest.mark.parametrize("spoil", [leave_the_card, fail])
def test_what_cannot_be_recorded_goes_the_eager_way_and_leaves_the_stream(log, spoil):
    model = make_model("llama", device=DEVICE, rank=16, dtype=torch.bfloat16)
    forward = PackedForward(model, 512)
    expected = updates(model)
    model = make_model("llama", device=DEVICE, rank=16, dtype=torch.bfloat16)
    forward = PackedForward(model, 512)
    forward.replay_rows(512, Recorder(torch.device(DEVICE)))
    embed = forward.graphs.embed
    forward.graphs.embed = lambda ids: embed(ids + (spoil(ids) if torch.cuda.is_current_stream_capturing() else 0))
    assert_close(updates(model), expected, 1e-4)
    assert forward.graphs is None
    assert "".join(log).count("no CUDA graphs") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device=DEVICE).isfinite().all(), "the card's generator does not wait for the recording's end"
    torch.cuda.empty_cache()  # which is refused as long as the allocator waits for that


def test_a_plan_is_proven_with_its_longest_row_recorded():
    model = make_model("llama", device=DEVICE, dtype=torch.bfloat16)
    forward = PackedForward(model, 512)
    plan = choose_plan(forward, None, "auto", 512, 0)
    (size,) = forward.graphs.replays
    assert (size.tokens, size.longest) == (plan.tokens, 512)
