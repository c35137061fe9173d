"""Lays samples out in padded batches or in packed rows."""

import heapq
from bisect import bisect_left
from typing import Protocol

import numpy as np
import torch

from .loss import learned_positions

Sample = dict[str, list[int] | np.ndarray]


class Layout(Protocol):
    """The form in which a batch of samples goes through the model.

    If `takes_updates`, a batch is a rank's share of a whole update, and all ranks have about as many tokens. Otherwise
    it has `per_device_train_batch_size` samples.
    """

    takes_updates: bool

    def lay_out(self, samples: list[Sample]) -> list[dict]:
        """Lay a batch out in parts, which go through the model one after another."""


class SFTDataCollator:
    """Layout in batches whose samples are padded on the right to the longest of them, and cut at `max_seq_length`.

    A batch holds int64 tensors of (batch, length): `input_ids`, padded with the tokenizer's padding token, and
    `attention_mask` and `target_mask`, padded with 0.
    """

    takes_updates = False

    def __init__(self, tokenizer, max_seq_length: int):
        self.max_seq_length = max_seq_length
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.padding = {"input_ids": padding, "attention_mask": 0, "target_mask": 0}

    def lay_out(self, samples: list[Sample]) -> list[dict[str, torch.Tensor]]:
        return [self(samples)]

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        length = min(max(len(sample["input_ids"]) for sample in samples), self.max_seq_length)
        batch = {key: torch.full((len(samples), length), value) for key, value in self.padding.items()}
        for number, sample in enumerate(samples):
            ids, mask = (torch.as_tensor(sample[key][:length]) for key in ("input_ids", "target_mask"))
            batch["input_ids"][number, : len(ids)] = ids
            batch["target_mask"][number, : len(ids)] = mask
            batch["attention_mask"][number, : len(ids)] = 1
        return batch


class PackingCollator:
    """Layout in rows of at most `tokens` tokens, which hold whole samples one after another."""

    takes_updates = True

    def __init__(self, tokens: int):
        self.tokens = tokens

    def lay_out(self, samples: list[Sample]) -> list[dict]:
        """Lay samples out in as few rows as hold them, about equally full.

        No sample's first token is learned. A row has no batch dimension. It holds:
            input_ids: (length,) int64.
            position_ids: (length,) int64, which begin at 0 in each sample.
            ends: (samples + 1,) int32, 0 and the place after each sample.
            longest: the number of tokens of the longest sample.
            learned: (n,) int64, positions that predict a learned token.
            targets: (n,) int64, the tokens that they predict.
        """
        places = pack([len(sample["input_ids"]) for sample in samples], self.tokens)
        return [self.lay_out_row([samples[i] for i in row]) for row in places]

    def lay_out_row(self, samples: list[Sample]) -> dict[str, torch.Tensor | int]:
        input_ids, target_mask = (
            torch.from_numpy(np.concatenate([sample[key] for sample in samples]).astype(np.int64))
            for key in ("input_ids", "target_mask")
        )
        lengths = [len(sample["input_ids"]) for sample in samples]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        target_mask[ends[:-1]] = 0
        learned = learned_positions(target_mask)
        return {
            "input_ids": input_ids,
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "ends": ends.int(),
            "longest": max(lengths),
            "learned": learned,
            "targets": input_ids[learned + 1],
        }


def pack(lengths: list[int], limit: int) -> list[list[int]]:
    """Divide samples of these lengths among as few rows as possible, none longer than `limit`.

    The longest sample is placed first, and each goes to the emptiest row. Bisection finds the least number of rows with
    which all fit. The same lengths always give the same rows.

    Returns:
        For each row, the indices of its samples in `lengths`.

    Raises:
        ValueError: a sample alone is longer than the limit.
    """
    if max(lengths) > limit:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit rows of {limit}; raise packing_length")
    fewest = -(-sum(lengths) // limit)
    counts = range(fewest, len(lengths))  # a row for each sample always fits
    count = fewest + bisect_left(counts, True, key=lambda count: spread(lengths, limit, count) is not None)
    return spread(lengths, limit, count)


def spread(lengths: list[int], limit: int, count: int) -> list[list[int]] | None:
    """Divide samples among `count` rows as `pack` does. Returns None if a row would be longer than `limit`."""
    heap = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, row = heap[0]
        if filled + lengths[i] > limit:
            return None
        heapq.heapreplace(heap, (filled + lengths[i], row))
        rows[row].append(i)
    return rows
