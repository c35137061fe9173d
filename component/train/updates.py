"""Decides which samples each update has, and which of them a rank learns from.

The seed, the epoch and the step alone decide it. So any number of ranks learns from the same samples, and a run that
goes on takes the next ones without reading those before.
"""

import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..data.stream import StreamedRow
from ..run.errors import ArgumentError, DataError
from ..run.process import outlive_signals
from ..run.ranks import gather, known_to_all, on_every_rank
from .batch import Layout, Sample, spread

STRETCH = 50  # number of updates whose samples are sorted by length together


class Update(NamedTuple):
    """A rank's share of an update: its samples, and the batches in which they are laid out. A batch is a list of parts
    (component.train.batch), which go through the model one after another."""

    samples: list[Sample]
    batches: list[list[dict]]


def make_updates(dataset, layout: Layout, args) -> "FileUpdates | StreamUpdates":
    """Make the updates of a dataset: StreamUpdates of a stream, FileUpdates of any other.

    Args:
        args: transformers.TrainingArguments.
    """
    return (StreamUpdates if isinstance(dataset, IterableDataset) else FileUpdates)(dataset, layout, args)


class Updates:
    """Updates of a dataset, in order. The next one can be fetched before it is due.

    What fetching changes in the state, or an error of it, shows no earlier than the update itself.
    """

    per_epoch: int
    fetched: tuple[Update | None, Exception | None] | None = None  # the next update; (None, None) after the last

    def rest_of_epoch(self, epoch: int, first: int) -> Iterator[Update]:
        """This rank's share of an epoch's updates, from number `first` on, to the epoch's end."""
        self.give_back()
        self.coming = islice(self.of_epoch(epoch, first), self.per_epoch - first)
        return iter(self.next_update, None)

    def give_back(self) -> None:
        """Put back an update that was fetched and not used, as a callback or a signal ended its epoch or the run."""
        if self.fetched is not None:
            self.load_state_dict(self.place)
            self.fetched = None

    def fetch(self) -> None:
        """Fetch the next update, if there is one."""
        self.place = self.state()
        try:
            self.fetched = next(self.coming, None), None
        except Exception as error:
            self.fetched = None, error

    def next_update(self) -> Update | None:
        if self.fetched is None:
            self.fetch()
        (update, error), self.fetched = self.fetched, None
        if error is not None:
            raise error
        return update

    def state_dict(self) -> dict:
        """The place behind the last update that was due, as values for JSON."""
        return self.state() if self.fetched is None else self.place


class FileUpdates(Updates):
    """Updates of a dataset whose samples can be counted and read in any order.

    Args:
        dataset: has a length. If it has `lengths`, the tokens of each sample, samples need not be read to be measured.
        args: transformers.TrainingArguments.
    """

    def __init__(self, dataset, layout: Layout, args):
        self.dataset, self.layout, self.args = dataset, layout, args
        self.batches = count_batches(len(dataset), args)
        self.per_epoch, self.steps = count_updates(len(dataset), args), count_steps(len(dataset), args)
        self.size = size_of_update(args)

    def of_epoch(self, epoch: int, first: int) -> Iterator[Update]:
        """This rank's share of an epoch's updates, from number `first` on."""
        # An iterator draws its seed from the run's random numbers. A run that goes on within an epoch drew it before.
        with torch.random.fork_rng(devices=[], enabled=first > 0):
            samples = loaded(self.loader(epoch, first))
        return (make_update(self.layout, self.args.train_batch_size, share) for share in samples)

    def loader(self, epoch: int = 0, first: int = 0) -> DataLoader:
        """Loads the samples of this rank's share of each update, as arrays."""
        shares = self.shares(epoch, first)
        return DataLoader(self.dataset, batch_sampler=shares, collate_fn=as_arrays, **loader_settings(self.args))

    def shares(self, epoch: int, first: int) -> Iterator[list[int]]:
        """This rank's share of each update, by number in the dataset."""
        order = self.order(epoch)[: self.batches * self.args.train_batch_size * self.args.world_size]
        for start in range(first * self.size, len(order), self.size):
            samples = order[start : start + self.size]
            lengths = self.lengths(samples) if self.layout.takes_updates and self.args.world_size > 1 else None
            yield [samples[place] for place in share(len(samples), lengths, self.args)]

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch in their order, by number in the dataset."""
        count, strategy = len(self.dataset), self.args.train_sampling_strategy
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if strategy == "sequential":
            return list(range(count))
        if strategy == "group_by_length":
            return grouped_by_length(self.lengths(np.arange(count)), self.size, seed, epoch)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()

    def lengths(self, samples: Sequence[int]) -> list[int]:
        if self.all_lengths is not None:
            return self.all_lengths[samples].tolist()
        return [len(self.dataset[number]["input_ids"]) for number in samples]

    @cached_property
    def all_lengths(self) -> np.ndarray | None:
        """The dataset's `lengths`, which it measures anew each time."""
        lengths = getattr(self.dataset, "lengths", None)
        return None if lengths is None else np.asarray(lengths)

    def state(self) -> dict:
        return {}  # the step alone decides what comes next

    def load_state_dict(self, state: dict) -> None:
        pass


class StreamUpdates(Updates):
    """Updates of a component.data.stream.StreamingSFTDataset. All updates of the run are one epoch.

    Each rank renders its part of the next rows, and ranks exchange what they have rendered. As bad and too long rows
    give no sample, they repeat this until an update has all its samples. Then they share these among themselves.
    """

    def __init__(self, dataset, layout: Layout, args):
        self.dataset, self.layout, self.args = dataset, layout, args
        self.per_epoch = self.steps = args.max_steps
        self.batches = args.max_steps * args.gradient_accumulation_steps
        dataset.rank, dataset.ranks = args.process_index, args.world_size

    def loader(self) -> DataLoader:
        """Loads this rank's part of the stream's rows."""
        return DataLoader(self.dataset, batch_size=None, **loader_settings(self.args))

    def of_epoch(self, epoch: int, first: int) -> Iterator[Update]:
        """This rank's share of all further updates, from the dataset's place on."""
        with torch.random.fork_rng(devices=[]):  # an iterator draws a seed, which no row uses
            rows = loaded(self.loader())
        taken = 0
        while True:
            samples: list[Sample] = []
            while missing := size_of_update(self.args) - len(samples):
                next_rows = self.render(rows, range(taken, taken + missing))
                self.take(next_rows)
                samples += [row.sample for row in next_rows if row.sample]
                taken += missing
            lengths = [len(sample["input_ids"]) for sample in samples] if self.layout.takes_updates else None
            places = share(len(samples), lengths, self.args)
            yield make_update(self.layout, self.args.train_batch_size, as_arrays([samples[place] for place in places]))

    def render(self, rows: Iterator[StreamedRow], numbers: range) -> list[StreamedRow]:
        """The rows with these numbers, of which each rank renders its own. Numbers count from where `rows` began."""
        rank, ranks = self.args.process_index, self.args.world_size
        own = sum(number % ranks == rank for number in numbers)
        by_rank = [iter(part) for part in gather(on_every_rank(lambda: list(islice(rows, own))))]
        return [next(by_rank[number % ranks]) for number in numbers]

    def take(self, rows: list[StreamedRow]) -> None:
        """Move the dataset's place on. A fault in the rows is raised on all ranks, which have the same rows."""
        try:
            self.dataset.take(rows)
        except DataError as error:
            raise known_to_all(error) from None

    def state(self) -> dict:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.dataset.load_state_dict(state)


def as_arrays(samples: list[Sample]) -> list[Sample]:
    """Samples whose tokens are arrays, which a loader's processes pass on faster than lists, and without the open
    files that tensors need."""
    keys = ("input_ids", "target_mask")
    return [sample | {key: np.asarray(sample[key], np.int32) for key in keys} for sample in samples]


def make_update(layout: Layout, batch: int, samples: list[Sample]) -> Update:
    """Lay samples out: all together if the layout takes whole updates, otherwise `batch` at a time."""
    size = max(len(samples), 1) if layout.takes_updates else batch
    starts = range(0, len(samples), size)
    return Update(samples, [layout.lay_out(samples[start : start + size]) for start in starts])


def loaded(loader: DataLoader) -> Iterator:
    """The items of a loader, which begins to load at once. Raises DataError if one of its processes was killed."""
    items = iter(loader)

    def give() -> Iterator:
        try:
            yield from items
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that loads the data was killed, perhaps for want of memory; lower dataloader_num_workers, "
                "and start the same command again"
            ) from None

    return give()


def loader_settings(args) -> dict:
    """Arguments of a DataLoader, taken from TrainingArguments. Its workers leave signals to this process."""
    context = getattr(args, "dataloader_multiprocessing_context", None)
    return {
        "num_workers": args.dataloader_num_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": context if args.dataloader_num_workers else None,
        "worker_init_fn": begin_worker,
    }


def begin_worker(worker: int) -> None:
    outlive_signals()


def size_of_update(args) -> int:
    """Number of samples in an update, over all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def count_batches(rows: int, args) -> int:
    """Number of batches that each rank has in an epoch. Raises ArgumentError if there is none."""
    batch = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    if not batches:
        raise ArgumentError(
            f"dataloader_drop_last: no batch is left, as there are {rows} samples to learn from and a batch takes "
            f"{batch}; lower per_device_train_batch_size, or set dataloader_drop_last to false"
        )
    return batches


def count_updates(rows: int, args) -> int:
    """Number of updates in an epoch."""
    return math.ceil(count_batches(rows, args) / args.gradient_accumulation_steps)


def count_steps(rows: int | None, args) -> int:
    """Number of updates in the whole run. `rows` is the number of samples, None for a stream."""
    updates = rows and count_updates(rows, args)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)


def share(count: int, lengths: Sequence[int] | None, args) -> list[int]:
    """Choose this rank's samples among the `count` samples of an update, by index.

    Batches are dealt to the ranks in turn. With `lengths`, the tokens of each sample, each rank gets about as many
    tokens instead, since ranks wait for the slowest. A rank may get no sample.
    """
    batch, ranks, rank = args.train_batch_size, args.world_size, args.process_index
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    dealt = [list(chain.from_iterable(batches[number::ranks])) for number in range(ranks)]
    if lengths is None or ranks == 1:
        return dealt[rank]
    places = list(chain.from_iterable(dealt))
    tokens = [lengths[place] for place in places]
    return [places[i] for i in sorted(spread(tokens, sum(tokens), ranks)[rank])]


def grouped_by_length(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[int]:
    """Order samples at random, but so that the samples of an update have similar lengths.

    A random order is cut into stretches of STRETCH updates. Each stretch is sorted by length, and then all updates are
    shuffled. The update with the longest sample comes first, so that memory runs out at once or never. An incomplete
    update comes last.

    Args:
        size: samples of an update.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(lengths)), len(lengths))
    stretches = [order[start : start + STRETCH * size] for start in range(0, len(order), STRETCH * size)]
    groups = [sorted(stretch, key=lambda i: -lengths[i]) for stretch in stretches]
    updates = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    last = updates.pop() if len(updates[-1]) < size and len(updates) > 1 else []
    draw.shuffle(updates)
    first = max(range(len(updates)), key=lambda i: max(lengths[j] for j in updates[i]))
    updates[0], updates[first] = updates[first], updates[0]
    return [*chain.from_iterable(updates), *last]
