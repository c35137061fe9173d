"""The order in which samples are drawn."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Sampler


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell the sampler under all that skips and shares its batches, which libraries do not reach."""
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    if hasattr(getattr(sampler, "sampler", None), "set_epoch"):
        sampler.sampler.set_epoch(epoch)


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then sorts stretches of 50 batches by length, the longest sample first of all, so that batches are of
    like samples and memory runs out at once or never. The order follows from seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(len(self)), len(self))
        stretch = 50 * self.batch
        groups = [sorted(order[i : i + stretch], key=lambda i: -self.lengths[i]) for i in range(0, len(order), stretch)]
        batches = [group[i : i + self.batch] for group in groups for i in range(0, len(group), self.batch)]
        last = batches.pop() if len(batches[-1]) < self.batch and len(batches) > 1 else []  # the short one stays last
        draw.shuffle(batches)
        first = max(range(len(batches)), key=lambda i: max(self.lengths[j] for j in batches[i]))
        batches[0], batches[first] = batches[first], batches[0]
        return iter([i for batch in batches for i in batch] + last)
