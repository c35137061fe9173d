import itertools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from component.run.errors import ArgumentError, DataError
from component.train.batch import PackingCollator, SFTDataCollator
from component.train.updates import FileUpdates, StreamUpdates, count_steps, grouped_by_length, share

PADDED = SFTDataCollator(SimpleNamespace(pad_token_id=0), 64)


def arguments(rank: int = 0, ranks: int = 1, batch: int = 4, accumulation: int = 1, **others) -> SimpleNamespace:
    settings = {
        "process_index": rank,
        "world_size": ranks,
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "random",
        "seed": 1,
        "data_seed": None,
        "max_steps": -1,
        "num_train_epochs": 1,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
    }
    return SimpleNamespace(**settings | others)


class Rows(list):
    """Samples that are known by their first token."""

    def __init__(self, count: int):
        lengths = [random.Random(number).randint(2, 40) for number in range(count)]
        super().__init__({"input_ids": [i] * n, "target_mask": [0] + [1] * (n - 1)} for i, n in enumerate(lengths))
        self.lengths = lengths


class Stream(IterableDataset):
    """Rows without end, one token each, which is the row's number. The row `bad` cannot be taken."""

    def __init__(self, bad: int | None = None):
        self.place, self.bad = 0, bad

    def __iter__(self):
        for number in itertools.count(self.place):
            yield SimpleNamespace(number=number, sample={"input_ids": [number], "target_mask": [0]})

    def take(self, rows):
        for row in rows:
            if row.number == self.bad:
                raise DataError("a bad row")
            self.place = row.number + 1

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def numbers(update) -> list[int]:
    return [int(sample["input_ids"][0]) for sample in update.samples]


def drawn(rows: Rows, layout, epoch: int = 0, first: int = 0, **settings) -> list[list[int]]:
    """The samples of each update, of one rank."""
    updates = FileUpdates(rows, layout, arguments(**settings)).of_epoch(epoch, first)
    return [numbers(update) for update in updates]


def test_an_update_that_comes_later_is_drawn_without_those_before_it():
    whole = drawn(Rows(22), PADDED, epoch=3)
    assert list(map(len, whole)) == [4, 4, 4, 4, 4, 2]
    assert drawn(Rows(22), PADDED, epoch=3, first=4) == whole[4:]
    assert drawn(Rows(22), PADDED, epoch=4) != whole


def test_an_update_that_is_fetched_ahead_moves_the_place_when_it_is_due():
    updates = StreamUpdates(Stream(), PADDED, arguments(max_steps=2))
    rest = updates.rest_of_epoch(0, 0)
    assert updates.state_dict() == {"place": 0}
    assert numbers(next(rest)) == [0, 1, 2, 3]
    updates.fetch()
    assert updates.state_dict() == {"place": 4}
    assert numbers(next(rest)) == [4, 5, 6, 7]
    assert updates.state_dict() == {"place": 8}
    updates.fetch()
    assert updates.state_dict() == {"place": 8}
    assert list(rest) == []


def test_a_fault_of_an_update_that_is_fetched_ahead_is_raised_when_it_is_due():
    updates = StreamUpdates(Stream(bad=5), PADDED, arguments(max_steps=2))
    rest = updates.rest_of_epoch(0, 0)
    next(rest)
    updates.fetch()
    assert updates.state_dict() == {"place": 4}
    with pytest.raises(DataError, match="a bad row"):
        next(rest)


def test_an_update_that_was_fetched_ahead_in_an_epoch_that_ended_early_comes_next():
    updates = StreamUpdates(Stream(), PADDED, arguments(max_steps=3))
    next(updates.rest_of_epoch(0, 0))
    updates.fetch()
    assert numbers(next(updates.rest_of_epoch(1, 0))) == [4, 5, 6, 7]


def test_an_update_that_was_fetched_ahead_is_given_back_once():
    stream = Stream()
    updates = StreamUpdates(stream, PADDED, arguments(max_steps=3))
    next(updates.rest_of_epoch(0, 0))
    updates.give_back()
    assert stream.state_dict() == {"place": 4}
    updates.fetch()
    assert stream.state_dict() == {"place": 8}
    updates.give_back()
    assert stream.state_dict() == {"place": 4}
    stream.load_state_dict({"place": 20})  # as another run's updates may
    updates.give_back()
    assert stream.state_dict() == {"place": 20}


@pytest.mark.parametrize("ahead", [False, True])
def test_the_updates_of_an_epoch_are_the_same_fetched_ahead_or_not(ahead):
    updates, found = FileUpdates(Rows(22), PADDED, arguments()), []
    for update in updates.rest_of_epoch(3, 2):
        found.append(numbers(update))
        if ahead:
            updates.fetch()
    assert found == drawn(Rows(22), PADDED, epoch=3)[2:]


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    ranks=st.integers(1, 5),
    packed=st.booleans(),
    strategy=st.sampled_from(["random", "sequential", "group_by_length"]),
)
def test_the_ranks_of_an_update_have_its_samples_once_and_together_those_of_one_process(
    rows, batch, accumulation, ranks, packed, strategy
):
    layout, rows = PackingCollator(64) if packed else PADDED, Rows(rows)
    settings = {"batch": batch, "accumulation": accumulation, "train_sampling_strategy": strategy}
    shares = [drawn(rows, layout, rank=rank, ranks=ranks, **settings) for rank in range(ranks)]
    together = [sorted(itertools.chain(*update)) for update in zip(*shares, strict=True)]
    alone = drawn(rows, layout, **settings | {"batch": batch * ranks})
    assert together == [sorted(update) for update in alone]
    assert sorted(itertools.chain(*together)) == list(range(len(rows)))


def test_batches_of_an_update_go_round_the_ranks():
    ranks = [share(7, None, arguments(rank, ranks=3, batch=2)) for rank in range(3)]
    assert ranks == [[0, 1, 6], [2, 3], [4, 5]]


def test_ranks_share_the_tokens_of_an_update_evenly():
    draw = random.Random(0)
    lengths = [draw.randint(1, 900) for _ in range(256)]
    shares = [share(256, lengths, arguments(rank, ranks=4, batch=64)) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(256))
    tokens = [sum(lengths[place] for place in part) for part in shares]
    assert max(tokens) / min(tokens) < 1.01
    by_samples = [share(256, None, arguments(rank, ranks=4, batch=64)) for rank in range(4)]
    tokens = [sum(lengths[place] for place in part) for part in by_samples]
    assert max(tokens) / min(tokens) > 1.05


@pytest.mark.parametrize("settings", [{"ranks": 2}, {"train_sampling_strategy": "group_by_length"}])
def test_the_lengths_of_a_dataset_are_measured_once(settings):
    measured = []

    class Measured(Rows):
        @property
        def lengths(self):
            measured.append(None)
            return [len(sample["input_ids"]) for sample in self]

        @lengths.setter
        def lengths(self, lengths):
            pass

    drawn(Measured(40), PackingCollator(64), **settings)
    assert len(measured) == 1


def test_grouping_puts_the_longest_sample_first_and_changes_with_the_epoch():
    lengths = [random.Random(number).randint(1, 500) for number in range(41)]
    first, second = (grouped_by_length(lengths, 4, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(41))
    assert first != second
    assert max(lengths) in [lengths[i] for i in first[:4]]


def test_a_last_batch_that_is_dropped_is_dropped_on_all_ranks():
    settings = {"dataloader_drop_last": True}
    assert drawn(Rows(11), PADDED, **settings) == drawn(Rows(11), PADDED)[:2]
    one, other = (drawn(Rows(11), PADDED, rank=rank, ranks=2, batch=2, **settings) for rank in (0, 1))
    assert [mine + theirs for mine, theirs in zip(one, other, strict=True)] == drawn(Rows(11), PADDED)[:2]
    with pytest.raises(ArgumentError, match="dataloader_drop_last: no batch is left, as there are 3 samples"):
        count_steps(3, arguments(dataloader_drop_last=True))


def test_steps_are_those_of_the_epochs_rounded_up():
    assert count_steps(13, arguments(num_train_epochs=2.5)) == 10
    assert count_steps(13, arguments(num_train_epochs=2.5, max_steps=3)) == 3
    assert count_steps(None, arguments(max_steps=3)) == 3
