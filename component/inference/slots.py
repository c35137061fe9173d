"""Conversations in the cache of a model with fused layers: who gets a place, and what is computed at each step."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..data.chat_text import common_prefix
from ..kernel.decoder import Decoder, Part
from .sampling import Generation

CHUNK = {"cuda": 4096, "cpu": 512}  # tokens of prompts that a step reads at most: others wait for it, and its memory
WORTH_WAITING = 32  # tokens that a prompt must save by waiting until another, with the same beginning, is read


@dataclass(eq=False)
class Slot:
    """One conversation's part of the cache: the tokens whose keys and values are there, also after its end."""

    number: int
    tokens: list[int] = field(default_factory=list)
    generation: Generation | None = None  # while it runs
    adapted: bool = True
    used: int = 0  # the step at which it was last needed

    @property
    def missing(self) -> list[int]:
        """Tokens of the conversation that are still to be computed."""
        prompt, tokens, done = self.generation.prompt, self.generation.tokens, len(self.tokens)
        return prompt[done:] + tokens if done < len(prompt) else tokens[done - len(prompt) :]

    def shared(self, generation: Generation) -> int:
        """How many tokens of a prompt are here; never all of them, since the last one's logits are needed."""
        if self.adapted != generation.adapted:
            return 0
        return min(common_prefix(self.tokens, generation.prompt), len(generation.prompt) - 1)


class Slots:
    """The running conversations of a model with fused layers.

    Raises:
        Unfused, ArgumentError: as Decoder raises them.
    """

    def __init__(self, model: PreTrainedModel, max_batch: int, max_tokens: int | None, vocab: int | None):
        self.decoder = Decoder(model, max_batch, max_tokens, vocab)
        self.slots = [Slot(number) for number in range(self.decoder.slots)]
        self.busy: list[Slot] = []  # those of running conversations, in the order in which they came
        self.chunk = CHUNK[model.device.type]
        self.steps = 0

    @property
    def room(self) -> int:
        return self.decoder.capacity

    @property
    def is_busy(self) -> bool:
        return any(slot.generation.finish_reason is None for slot in self.busy)

    def advance(self, waiting: deque[Generation]) -> Iterator[tuple[list[Generation], torch.Tensor]]:
        """Take conversations from `waiting`, and compute one step: conversations, with the logits of their next tokens.

        A step reads one chunk of prompts, and one token of each conversation whose prompt is read.
        """
        self.steps += 1
        for slot in self.busy:
            slot.used = self.steps
        self.release()
        if waiting:
            self.admit(waiting)
        left, reading, writing = self.chunk, [], []
        for slot in self.busy:
            ids = slot.missing
            if len(ids) == 1:
                writing.append((slot, ids))
            elif left:
                reading.append((slot, ids[:left]))
                left -= len(reading[-1][1])
        for adapted in (True, False):
            for new in (reading, writing):
                mine = [(slot, ids) for slot, ids in new if slot.generation.adapted == adapted]
                if mine:
                    yield self.compute(mine, adapted)

    def release(self) -> None:
        """Let go of the conversations that have ended. Their keys and values stay."""
        for slot in self.busy:
            if slot.generation.finish_reason is not None:
                slot.generation = None
        self.busy = [slot for slot in self.busy if slot.generation]

    def compute(self, new: list[tuple[Slot, list[int]]], adapted: bool) -> tuple[list[Generation], torch.Tensor]:
        """Compute tokens of some conversations. Those that lack others before their next token give no logits."""
        logits = self.decoder([Part(slot.number, len(slot.tokens), ids) for slot, ids in new], adapted)
        for slot, ids in new:
            slot.tokens += ids
        ready = [row for row, (slot, _) in enumerate(new) if not slot.missing]
        return [new[row][0].generation for row in ready], logits if len(ready) == len(new) else logits[ready]

    def admit(self, waiting: deque[Generation]) -> None:
        """Give slots to waiting conversations, in their order.

        One that shares more with a prompt that is still being read than with what is there waits for it, so that a
        beginning that many have is computed once.
        """
        free = sorted((slot for slot in self.slots if slot not in self.busy), key=lambda slot: slot.used)
        read_now = [slot.generation for slot in self.busy if len(slot.missing) > 1]
        held: list[Generation] = []
        while waiting and len(held) < len(free):
            generation = waiting.popleft()
            source = max(self.slots, key=lambda slot: slot.shared(generation))
            shared = source.shared(generation)
            alike = (other.prompt for other in read_now if other.adapted == generation.adapted)
            if any(common_prefix(prompt, generation.prompt) >= shared + WORTH_WAITING for prompt in alike):
                held.append(generation)
                continue
            # A conversation that goes on stays where it is. Else what was used longest ago is overwritten.
            goes_on = source in free and shared == len(source.tokens)
            slot = source if goes_on else free[0]
            free.remove(slot)
            if slot is not source:
                self.decoder.copy(source.number, slot.number, shared)
            slot.tokens, slot.generation, generation.cached = generation.prompt[:shared], generation, shared
            slot.adapted = generation.adapted
            self.busy.append(slot)
            read_now.append(generation)
        waiting.extendleft(reversed(held))
