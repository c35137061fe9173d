"""Samples to a padded batch."""

import torch


class SFTDataCollator:
    """Pads on the right to the longest sample of the batch, and cuts at `max_seq_length`.

    Returns `input_ids` (padded with the tokenizer's padding token), `attention_mask` and `target_mask` (padded with
    0), int64 tensors of (batch, length).
    """

    def __init__(self, tokenizer, max_seq_length: int):
        self.max_seq_length = max_seq_length
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.padding = {"input_ids": padding, "attention_mask": 0, "target_mask": 0}

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = min(max(len(sample["input_ids"]) for sample in samples), self.max_seq_length)
        return {
            key: torch.tensor([(sample[key] + [padding] * (length - len(sample[key])))[:length] for sample in samples])
            for key, padding in self.padding.items()
        }
