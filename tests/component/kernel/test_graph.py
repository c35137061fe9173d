"""Rows that are padded to few sizes and go through buffers that stay: the same losses and gradients, recorded or not.

Here a recording is the function itself, run again at each replay; test_on_card.py has CUDA graphs.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from component.kernel import graph, plain
from component.kernel.attention import FLASH, SAMPLE_BY_SAMPLE
from component.kernel.graph import Recorder, RowGraphs, Size, fit_size, suits
from component.kernel.model import PackedForward
from component.train.batch import PackingCollator

from .conftest import gradients, make_model, make_samples
from .test_model import assert_equal
from .test_model import packed as packed_in_place


class Recordings(list):
    """The numbers of steps of all recordings that were made."""

    def __call__(self, *steps):
        self.append(len(steps))
        return steps


def packed(model, samples, tokens=64):
    """The loss, and copies of the gradients, which the next row overwrites."""
    loss, grads = packed_in_place(model, samples, tokens)
    return loss, {name: grad.clone() for name, grad in grads.items()}


def recorded(model, tokens=64, max_length=64, **kept) -> tuple[PackedForward, Recordings]:
    forward, recordings = PackedForward(model, max_length), Recordings()
    forward.use(**({"checkpointing": "none"} | kept))
    forward.replay_rows(tokens, recordings)
    return forward, recordings


@pytest.fixture
def few_samples(monkeypatch):
    """Rows are padded with fewer empty samples, each of which takes its time on a processor."""
    monkeypatch.setattr(graph, "SAMPLES", 4)


def both(family, tokens=64, rank=4, **kept):
    """(loss, gradients, random number drawn next) of the same samples, without and with recorded rows."""
    model, results = make_model(family, dropout=0.3, rank=rank), []
    PackedForward(model, 64)
    for records in (False, True):
        if records:
            _, recordings = recorded(model, **kept)
        torch.manual_seed(3)
        results.append((*packed(model, make_samples(), tokens), torch.rand(1).item()))
    assert recordings, "a row went the eager way"
    return results


@pytest.mark.parametrize(
    ("tokens", "padded"),
    [(1, 512), (512, 512), (513, 1024), (8193, 8704), (16384, 16384), (16385, 17408), (29200, 29696), (32768, 32768)],
)
def test_a_row_is_padded_to_a_sixteenth_of_the_power_of_two_below_it_or_a_64th_of_the_longest_row(tokens, padded):
    assert fit_size(tokens, 1, 1, 32768, 1024).tokens == padded


@pytest.mark.parametrize("most", [3000, 32768])
def test_rows_have_few_sizes(most):
    sizes = {fit_size(tokens, 64, 1000, most, 1024) for tokens in range(1, most + 1)}
    assert len({size.tokens for size in sizes}) <= 48 <= graph.SIZES
    assert {size[1:] for size in sizes} == {(64, 1024), (128, 1024)}, "without a sample of padding, and with one"
    assert all(fit_size(tokens, 1, 1, most, 1024).tokens <= tokens * 17 / 16 + 64 for tokens in range(most // 4, most))


def test_samples_and_the_longest_are_bounded_by_powers_of_two_and_the_longest_sample_that_there_may_be():
    assert fit_size(64, 64, 64, 64, 1000) == Size(64, 64, 1000)
    assert fit_size(64, 65, 1025, 64, 4000) == Size(64, 128, 2048)
    assert fit_size(64, 65, 100, 64, 16384) == Size(64, 128, 2048), "an eighth"
    assert fit_size(60, 64, 3, 64, 1000) == Size(64, 128, 1000), "a sample of padding"
    assert fit_size(65, 64, 10, 128, 10) == Size(128, 128, 10), "7 samples of padding"


def test_a_row_and_its_padding_lie_in_the_buffers():
    forward, _ = recorded(make_model("llama"), tokens=130, max_length=40)
    graphs = forward.graphs
    ids, positions, ends = torch.arange(5, 70), torch.arange(65) % 33, torch.tensor([0, 33, 65], dtype=torch.int32)
    graphs.ids.fill_(96)  # of an earlier row
    graphs.positions.fill_(39)
    graphs.load(size := fit_size(65, 2, 33, 130, 40), ids, positions, ends)
    assert size == Size(128, 64, 40) == graphs.fit(65, 2, 33)
    assert graphs.ids.tolist() == [*range(5, 70), *[5] * 63, *[96] * 64]
    assert graphs.positions[:128].tolist() == [*range(33), *range(32), *[0] * 63]
    assert graphs.ends[:65].tolist() == [0, 33, 65, 105, *[128] * 61]


def test_many_samples_of_a_long_row_have_bounds_within_32_bits():
    forward, _ = recorded(make_model("llama"), tokens=131072, max_length=131072)
    zeros, ends = torch.zeros(70000, dtype=torch.long), torch.arange(70001, dtype=torch.int32)
    forward.graphs.load(size := forward.graphs.fit(70000, 70000, 99999), zeros, zeros, ends)
    assert size == Size(73728, 131072, 131072)
    assert forward.graphs.ends[70000:131073].tolist() == [70000, *[73728] * 61072]


@pytest.mark.parametrize("tokens", [64, 13], ids=["one row", "two rows"])
def test_recorded_rows_have_the_losses_gradients_and_random_numbers_of_others(family, tokens, few_samples):
    eager, replayed = both(family, tokens)
    assert_equal(replayed, eager)
    assert replayed[2] == eager[2]


@pytest.mark.parametrize("keeps_weights", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_layers_keep_changes_no_recorded_gradient(checkpointing, keeps_weights, few_samples):
    eager, replayed = both("qwen3", 13, 16, checkpointing=checkpointing, keeps_weights=keeps_weights)
    assert_equal(replayed, eager)


def test_a_size_is_recorded_once_and_gradients_are_summed_in_one_place(few_samples):
    model, samples = make_model("llama"), make_samples()
    PackedForward(model, 64)
    expected = packed(model, samples, 13)
    _, recordings = recorded(model)
    for _ in range(2):
        assert_equal(packed(model, samples, 13), expected)
    assert recordings == [2]
    for row in PackingCollator(13).lay_out(samples):  # recorded before
        model(**row).backward()
    storages = {weight.grad.untyped_storage().data_ptr() for weight in model.parameters() if weight.requires_grad}
    assert len(storages) == 1, "a graph finds the gradients where they were"


def test_rows_of_both_ways_add_up_in_one_update(few_samples):
    model, samples = make_model("llama"), make_samples((20, 70, 7, 66))
    PackedForward(model, 70)
    expected = packed(model, samples, 90)
    forward, recordings = recorded(model, tokens=64, max_length=70)
    replayed = forward.graphs.takes
    for takes in ([False, True], [True, False]):
        forward, recordings = recorded(model, tokens=90, max_length=70)
        answers = iter(takes)
        forward.graphs.takes = lambda *_, answers=answers: next(answers)
        assert_equal(packed(model, samples, 90), expected)
        assert len(recordings) == 1
    assert replayed(64, 70)
    assert not replayed(65, 70)
    assert not replayed(64, 71)


def test_weights_that_an_optimizer_changes_are_read_and_those_that_move_are_recorded_anew(few_samples):
    model, samples = make_model("llama"), make_samples()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    forward, recordings = recorded(model)
    packed(model, samples)
    with torch.no_grad():
        torch._foreach_mul_(weights, 1.5)
    changed = packed(model, samples)
    assert recordings == [2]
    for weight in weights:
        weight.data = weight.data / 3
    moved = packed(model, samples)
    assert recordings == [2, 2]
    forward.graphs = None
    assert_equal(moved, packed(model, samples))
    with torch.no_grad():
        torch._foreach_mul_(weights, 3)
    assert_equal(changed, packed(model, samples))


def test_an_evaluation_between_forward_and_backward_changes_nothing_and_is_not_recorded(few_samples):
    model, samples = make_model("llama"), make_samples()
    _, recordings = recorded(model)
    expected = packed(model, samples)
    (row,) = PackingCollator(64).lay_out(samples)
    (other,) = PackingCollator(64).lay_out(make_samples((30, 4)))
    loss = model(**row)
    with torch.no_grad():
        model(**other)
    loss.backward()
    assert_equal((loss.item(), gradients(model)), expected)
    model.eval()(**row).backward()
    assert_equal((loss.item(), gradients(model)), expected)
    assert recordings == [2]


def test_a_backward_after_the_next_rows_forward_is_refused(few_samples):
    model = make_model("llama")
    recorded(model)
    (row,) = PackingCollator(64).lay_out(make_samples())
    first, second = model(**row), model(**row)
    with pytest.raises(RuntimeError, match="a row's backward must come before the next row's forward"):
        (first + second).backward()


def test_of_many_sizes_those_used_last_are_kept(monkeypatch, few_samples):
    monkeypatch.setattr(graph, "SIZES", 2)
    model = make_model("llama")
    forward, recordings = recorded(model, tokens=256, max_length=256)
    for tokens, count in ((60, 1), (100, 2), (60, 2), (150, 3), (60, 3), (100, 4)):
        packed(model, make_samples((tokens,)), 256)
        assert len(recordings) == count, tokens
    assert [size.tokens for size in forward.graphs.replays] == [64, 128]


@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=["a first run", "its backward", "a recording", "its backward's"])
def test_where_a_recording_fails_rows_go_the_eager_way_and_that_is_said_once(at, log, few_samples):
    def record(*steps):
        for number, step in enumerate((*steps, *steps), 1):
            if number == at:
                try:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
                finally:
                    raise RuntimeError("operation failed due to a previous error during capture")
            step()
        return steps

    model, samples = make_model("llama", dropout=0.3), make_samples()
    forward = PackedForward(model, 64)
    torch.manual_seed(3)
    expected = packed(model, samples, 13)
    forward.replay_rows(64, record)
    torch.manual_seed(3)
    assert_equal(packed(model, samples, 13), expected)
    assert forward.graphs is None
    said = "no CUDA graphs, without which small models, or short rows, are slower: OutOfMemoryError: CUDA out"
    assert "".join(log).count(said) == 1


class Card:
    """Notes the order of what a Recorder does with streams; the current one is the last of `streams`."""

    def __init__(self, monkeypatch):
        self.happened, self.streams = [], [Stream("trainer", self)]
        for name in ("device", "use_mem_pool"):
            monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[-1])

    @contextmanager
    def use(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()


class Stream:
    def __init__(self, name, card):
        self.name, self.card = name, card

    def wait_stream(self, other):
        self.card.happened.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_come_next_wait_for_the_run_before_a_recording_even_where_that_failed(monkeypatch, fails):
    card, recorder = Card(monkeypatch), Recorder.__new__(Recorder)
    recorder.device, recorder.pool, recorder.stream = torch.device("cpu"), None, Stream("recorder", card)
    recorder.record = lambda step: card.happened.append("recorded")

    def step():
        card.happened.append(f"a run by {torch.cuda.current_stream().name}")
        if fails:
            raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError) if fails else nullcontext():
        recorder(step)
    between = ["a run by recorder", *["recorded"] * (not fails)]
    assert card.happened == ["recorder waits for trainer", *between, "trainer waits for recorder"]


def test_a_run_before_the_recording_adds_nothing(few_samples):
    model, samples = make_model("llama"), make_samples()
    PackedForward(model, 64)
    expected = packed(model, samples, 13)

    def record(*steps):
        for step in steps:
            step()
        return steps

    forward, _ = recorded(model)
    forward.graphs.record = record
    packed(model, samples, 13)
    forward.graphs.replays.clear()  # and the buffer holds the gradient of an earlier row
    assert_equal(packed(model, samples, 13), expected)


def test_small_work_is_recorded_where_it_can_be():
    """The layer has 64 x (128 + 64 + 192) + 96 x 64 = 30,720 weights."""
    layers = PackedForward(make_model("llama"), 64).layers
    assert not suits(layers, "none", 64), "plain operations"
    for layer in layers:
        layer.ops, layer.attention = object(), FLASH
    most = int(5e11 / 30720)
    assert suits(layers, "full", most)
    assert not suits(layers, "full", most + 1)
    assert not suits(layers, "offload", most)
    layers[0].attention = SAMPLE_BY_SAMPLE
    assert not suits(layers, "full", most)
    bare = PackedForward(make_model("llama", targets=["lm_head"]).unload(), 64).layers
    bare[0].ops, bare[0].attention = object(), FLASH
    assert not suits(bare, "none", 64)
    assert bare[1].ops is plain


def test_nothing_is_recorded_on_a_processor_or_before_the_rows_are_known():
    forward = PackedForward(make_model("llama"), 64)
    assert forward.graphs is None
    forward.use("none", tokens=64)
    assert forward.graphs is None
    forward.replay_rows(64, Recordings())
    assert isinstance(forward.graphs, RowGraphs)
    forward.use("full")
    assert forward.graphs is None
