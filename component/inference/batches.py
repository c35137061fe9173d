"""Conversations of a model without fused layers: batch after batch, through the model's own forward and cache."""

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from ..chatglm.versions import CACHE
from ..kernel.decoder import longest_conversation
from ..kernel.model import base_of
from .sampling import Generation


class Batches:
    """The running conversations of any causal LM. A batch is padded on the left, and ends with its longest answer."""

    def __init__(self, model: PeftModel | PreTrainedModel, max_batch: int, max_tokens: int | None, vocab: int | None):
        self.model, self.own = model.eval(), base_of(model)
        self.max_batch, self.vocab = max_batch, vocab
        limit = longest_conversation(self.own.config)
        self.room = min(max_tokens or limit, limit)
        self.takes_positions = "position_ids" in inspect.signature(self.own.forward).parameters
        self.batch: list[Generation] = []

    @property
    def is_busy(self) -> bool:
        return any(generation.finish_reason is None for generation in self.batch)

    def advance(self, waiting: deque[Generation]) -> Iterator[tuple[list[Generation], torch.Tensor]]:
        """Take the next batch from `waiting` if the last one has ended, and compute one step of it."""
        kept = [row for row, generation in enumerate(self.batch) if generation.finish_reason is None]
        if kept and len(kept) < len(self.batch):
            self.mask = self.mask[kept]
            self.cache.batch_select_indices(torch.tensor(kept, device=self.own.device))
        self.batch = [self.batch[row] for row in kept]
        if self.batch:
            ids = self.tensor([[generation.tokens[-1]] for generation in self.batch])
            self.mask = torch.cat((self.mask, torch.ones_like(ids)), 1)
        elif waiting:
            adapted = waiting[0].adapted
            while waiting and waiting[0].adapted == adapted and len(self.batch) < self.max_batch:
                self.batch.append(waiting.popleft())
            prompts = [generation.prompt for generation in self.batch]
            longest = max(map(len, prompts))
            ids = self.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            self.mask = self.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            self.cache = DynamicCache(config=self.own.config)
        else:
            return
        yield self.batch, self.forward(ids)

    def release(self) -> None:
        """Let go of the batch, once all its conversations have ended."""
        if not self.is_busy:
            self.batch, self.cache, self.mask = [], None, None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, vocab), of what comes after ids (batch, length)."""
        inputs = {"input_ids": ids, "attention_mask": self.mask, CACHE: self.cache, "use_cache": True}
        if self.takes_positions:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        leaves_out = isinstance(self.model, PeftModel) and not self.batch[0].adapted
        with self.model.disable_adapter() if leaves_out else nullcontext():
            return self.own(**inputs, logits_to_keep=1).logits[:, -1, : self.vocab]

    def tensor(self, values: list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, device=self.own.device)
