"""Answers many conversations at once: a token each at every step, new ones joining as others end."""

from collections import deque
from collections.abc import Sequence

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel

from ..kernel.model import Unfused, base_of
from ..run.errors import ArgumentError, DataError
from .batches import Batches
from .sampling import GREEDY, Generation, Logprobs, Sampling, choose
from .slots import Slots


class Engine:
    """Continues prompts, greedily or by sampling.

    A model with fused layers answers conversations in any mixture. Each reads only what no other conversation in memory
    has in common with its beginning, and joins the others at the next step. Other models answer a batch after another.

    A token of `stop_ids` ends an answer. It is not in the answer's tokens; `Generation.stop_id` is the one that came.
    An answer also ends, with "length", at its `max_new_tokens` and where prompt and answer together have `room` tokens.

    Args:
        model: a causal LM, with or without a peft adapter. One without fused layers is put in eval mode.
        stop_ids: tokens that end an answer.
        adapted: False to leave the adapter out; `submit` can decide otherwise for one conversation.
        max_batch: conversations that are answered at once; fewer if the memory has no room for more.
        max_tokens: of a conversation, prompt and answer together; None: as many as the model was made for, if the
            memory holds them.
        vocab: tokens from this id on are never chosen, such as rows of the head that no token of the tokenizer has.

    Raises:
        ArgumentError: an argument is too small, or the memory does not hold one conversation.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        stop_ids: Sequence[int] | frozenset[int],
        *,
        adapted: bool = True,
        max_batch: int = 64,
        max_tokens: int | None = None,
        vocab: int | None = None,
    ):
        bounds = {"max_batch": (max_batch, 1), "max_tokens": (max_tokens, 2), "vocab": (vocab, 1)}
        for name, (value, least) in bounds.items():
            if value is not None and value < least:
                raise ArgumentError(f"{name} is {value}; expected at least {least}")
        self.stop_ids, self.adapted = frozenset(stop_ids), adapted
        self.rows = len(model.get_input_embeddings().weight)
        self.choices = min(self.rows, vocab or self.rows)
        self.waiting: deque[Generation] = deque()
        try:
            self.running: Slots | Batches = Slots(base_of(model), max_batch, max_tokens, vocab)
        except Unfused as reason:
            logger.warning(f"the model's own layers, which are slower: {reason}")
            self.running = Batches(model, max_batch, max_tokens, vocab)

    @property
    def room(self) -> int:
        """Tokens of a conversation, prompt and answer together, at most."""
        return self.running.room

    @property
    def is_busy(self) -> bool:
        """Whether a conversation waits or runs, so that there is something to do for `step`."""
        return bool(self.waiting) or self.running.is_busy

    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY, adapted: bool | None = None) -> Generation:
        """Ask for the continuation of a prompt, which `step` writes into the result.

        Args:
            adapted: whether the adapter is used, if not as the engine was made.

        Raises:
            DataError: the prompt is empty, has a token that the model does not have, or leaves no room; or
                the answer should begin with a token that ends it or is never chosen.
        """
        if not prompt:
            raise DataError("prompt: it has no tokens; give at least one")
        if strays := [token for token in prompt if not 0 <= token < self.rows]:
            raise DataError(f"prompt: the token {strays[0]} is none of the model's {self.rows}; use its own tokenizer")
        if len(prompt) >= self.room:
            raise DataError(
                f"prompt: it has {len(prompt)} tokens, and a conversation has room for {self.room} with its answer; "
                "shorten it, or raise max_tokens"
            )
        begun = {token for begin in sampling.begins for token in begin}
        if strays := sorted(token for token in begun if not 0 <= token < self.choices):
            raise DataError(f"begins: the token {strays[0]} is none of the {self.choices} that can be chosen")
        if ends := sorted(self.stop_ids & begun):
            raise DataError(f"begins: the token {ends[0]} ends an answer; an answer cannot begin with it")
        generation = Generation(list(prompt), sampling, self.adapted if adapted is None else adapted)
        self.waiting.append(generation)
        return generation

    def step(self) -> list[Generation]:
        """Compute a token for each running conversation whose prompt is read; return those that got one or ended by it.

        Prompts are read in chunks, so that a step may read part of one and return nothing.
        """
        advanced = []
        with torch.inference_mode():
            for generations, logits in self.running.advance(self.waiting):
                if generations:
                    for generation, choice in zip(generations, choose(logits, generations), strict=True):
                        self.take(generation, *choice)
                advanced += generations
        self.running.release()
        return advanced

    def take(self, generation: Generation, token: int, logprobs: Logprobs | None) -> None:
        if token in self.stop_ids:
            generation.stop_id, generation.finish_reason = token, "stop"
            return
        generation.tokens.append(token)
        if logprobs:
            generation.logprobs.append(logprobs)
        limit = min(generation.sampling.max_new_tokens, self.room - len(generation.prompt))
        if len(generation.tokens) >= limit:
            generation.finish_reason = "length"

    def run(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[Generation]:
        """Answer all prompts to their ends, and return the answers in the prompts' order."""
        generations = [self.submit(prompt, sampling) for prompt in prompts]
        while self.is_busy:
            self.step()
        return generations

    def cancel(self, generation: Generation) -> None:
        """End an answer where it is, with the reason "cancelled"; one that has ended stays as it is."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"
        if generation in self.waiting:
            self.waiting.remove(generation)
        self.running.release()
