"""A conversation that is being answered, and the choice of its next token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..kernel.decoder import upload
from ..run.errors import ArgumentError


class Unwritten:
    """A text that an answer must not have, whatever tokens would write it.

    Args:
        vocabulary: the bytes of every token, by its id; a token may be a part of a character.
    """

    def __init__(self, vocabulary: Sequence[bytes], text: str):
        self.vocabulary, self.text = vocabulary, (text := text.encode())
        self.always = frozenset(token for token, one in enumerate(vocabulary) if text in one)
        self.after: dict[bytes, frozenset[int]] = {}  # beginnings of it, and the tokens that would then complete it
        for size in range(1, len(text)):
            ends = frozenset(token for token, one in enumerate(vocabulary) if one.startswith(text[size:]))
            if ends:
                self.after[text[:size]] = ends

    def next_to(self, tokens: Sequence[int]) -> frozenset[int]:
        """Tokens that must not come next."""
        tail = b""
        for token in reversed(tokens):
            tail = self.vocabulary[token] + tail
            if len(tail) >= len(self.text):
                break
        return self.always.union(*(ends for begun, ends in self.after.items() if tail.endswith(begun)))


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Args:
        max_new_tokens: of the answer.
        temperature: what logits are divided by; 0 takes the most probable token.
        top_p: only the most probable tokens that together have this probability are drawn from.
        top_k: only so many of the most probable tokens are drawn from; 0 for all.
        seed: of the draws, which then do not depend on the other conversations; None for other ones each time.
        logprobs: how many of the most probable tokens are told with each token's own probability; 0 for neither.
        begins: the answer begins with one of these token sequences; empty for any answer. It is free once one of
            them is complete.
        banned: tokens that are never chosen.
        not_first: tokens with which the answer does not begin.
        unwritten: texts that the answer does not have.

    Raises:
        ArgumentError: a value is out of bounds.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int = 0
    begins: tuple[tuple[int, ...], ...] = ()
    banned: frozenset[int] = frozenset()
    not_first: frozenset[int] = frozenset()
    unwritten: tuple[Unwritten, ...] = ()

    def __post_init__(self):
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "logprobs": (self.logprobs >= 0, "0 or more"),
            "begins": (all(self.begins), "token sequences that are not empty"),
        }
        for name, (holds, wanted) in bounds.items():
            if not holds:
                raise ArgumentError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def is_free(self) -> bool:
        """Whether any token may be chosen anywhere."""
        return not (self.begins or self.banned or self.not_first or self.unwritten)

    def allowed(self, tokens: list[int]) -> frozenset[int]:
        """Tokens that may follow those of an answer; empty for all of them."""
        done = len(tokens)
        if any(tokens[: len(begin)] == list(begin) for begin in self.begins):
            return frozenset()
        return frozenset(begin[done] for begin in self.begins if list(begin[:done]) == tokens)

    def refused(self, tokens: list[int]) -> frozenset[int]:
        """Tokens that must not follow those of an answer."""
        first = frozenset() if tokens else self.not_first
        return self.banned.union(first, *(one.next_to(tokens) for one in self.unwritten))


GREEDY = Sampling()
TINY = torch.finfo(torch.float32).tiny  # a smaller temperature is 0 on a card


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities at one place of an answer, before temperature, top_k, top_p and limits."""

    chosen: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...]  # tokens and their logarithms, the most probable first


@dataclass(eq=False)
class Generation:
    """A conversation that is being answered. `tokens` grows, and `finish_reason` is None until the answer ends.

    Args:
        adapted: whether the adapter is used.
        finish_reason: "stop", "length" or "cancelled".
        stop_id: the token that ended the answer; it is not in `tokens`.
        cached: tokens of the prompt that were not computed, because another conversation begins with them.
        logprobs: one entry for each of `tokens`, if they were asked for.
    """

    prompt: list[int]
    sampling: Sampling = GREEDY
    adapted: bool = True
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_id: int | None = None
    cached: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)

    def __post_init__(self):
        seed = self.sampling.seed
        self.draws = random.Random(None if seed is None else str(seed))  # a number's sign would not count


def choose(logits: torch.Tensor, generations: list[Generation]) -> list[tuple[int, Logprobs | None]]:
    """Choose the next token of each conversation, with its probability where that is asked for.

    Args:
        logits: (conversations, vocab).
    """
    open_to = logits if all(generation.sampling.is_free for generation in generations) else limit(logits, generations)
    tokens = open_to.argmax(-1)
    if any(generation.sampling.temperature for generation in generations):
        tokens = torch.where(*draw(open_to.float(), generations), tokens)
    chosen = tokens.tolist()
    counts = [generation.sampling.logprobs for generation in generations]
    if not any(counts):
        return [(token, None) for token in chosen]
    every = logits.float().log_softmax(-1)
    best, ids = (part.tolist() for part in every.topk(min(max(counts), logits.shape[1])))
    own = every.gather(1, tokens[:, None])[:, 0].tolist()
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids, best, strict=True)]
    told = [
        Logprobs(value, top[:count]) if count else None for value, top, count in zip(own, tops, counts, strict=True)
    ]
    return list(zip(chosen, told, strict=True))


def limit(logits: torch.Tensor, generations: list[Generation]) -> torch.Tensor:
    """Logits (conversations, vocab) of the tokens that may be chosen; -inf for the others."""
    logits, vocab = logits.clone(), logits.shape[1]
    for row, generation in enumerate(generations):
        allowed, refused = (
            [token for token in find(generation.tokens) if token < vocab]
            for find in (generation.sampling.allowed, generation.sampling.refused)
        )
        if allowed:
            ids = upload(torch.tensor(allowed), logits.device)
            kept = logits[row, ids]
            logits[row] = -torch.inf
            logits[row, ids] = kept
        if refused:
            logits[row, upload(torch.tensor(refused), logits.device)] = -torch.inf
    return logits


def draw(logits: torch.Tensor, generations: list[Generation]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows that are drawn, a token for each row), by one uniform number from each conversation's own generator."""
    every, vocab = [generation.sampling for generation in generations], logits.shape[1]
    settings = [
        (one.temperature or 1.0, one.top_p, one.top_k or vocab, one.temperature > 0, generation.draws.random())
        for one, generation in zip(every, generations, strict=True)
    ]
    temperature, top_p, top_k, drawn, uniform = upload(torch.tensor(settings), logits.device).t()[..., None]
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    logits = (logits - logits[:, :1]) / temperature.clamp(min=TINY)  # 0 for the most probable: no infinity above it
    places = torch.arange(vocab, device=logits.device)
    weights = logits.masked_fill(places >= top_k, -torch.inf).softmax(-1)
    before = weights.cumsum(-1) - weights  # the probability of all that is more probable
    weights = weights.masked_fill(before >= top_p, 0.0)
    sums = weights.cumsum(-1)
    last = ((weights > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # where rounding lets a number reach the whole sum
    chosen = torch.minimum((sums <= sums[:, -1:] * uniform).sum(-1, keepdim=True), last)
    return drawn[:, 0] > 0, ids.gather(1, chosen)[:, 0]
