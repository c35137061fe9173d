"""Fused layers with a cache of keys and values: reads prompts and continues them, many conversations in one forward."""

import math
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from loguru import logger
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedModel

from ..run.errors import ArgumentError
from ..run.log import counted
from .attention import SAMPLE_BY_SAMPLE
from .layer import PROJECTIONS, Layer, RowContext
from .model import final_norm, find_layers, norm_of, rotary_angles
from .projection import Projection

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may take
SHARE = 0.85  # of the free memory, which weights and cache may take; the rest is a forward's
ROWS = 64  # of the head: a card multiplies by a number of rows that is no multiple of 8 up to three times slower
UNLIMITED = 8192  # tokens of a conversation where a model does not limit them
SHORTEST = 2048  # tokens of a conversation, below which there are rather fewer conversations at once


class Part(NamedTuple):
    """What a forward adds to one conversation."""

    slot: int
    position: int  # of the first of the tokens, and so the number of tokens that are cached already
    ids: Sequence[int]


class Places(NamedTuple):
    """Where the tokens of a forward, several conversations one after another, stand in the cache."""

    rows: torch.Tensor  # (tokens,) int64: the cache's row of each token
    ends: torch.Tensor  # (conversations + 1,) int32: the bounds of each conversation's tokens, 0 first
    starts: torch.Tensor  # (conversations + 1,) int32: the first row of each conversation; the last is not used
    lengths: torch.Tensor  # (conversations,) int32: tokens of each conversation, those of this forward included
    longest: int  # tokens that this forward adds to a conversation at most
    reach: int  # tokens of a conversation at most
    spans: list[tuple[int, int, int]]  # (tokens of this forward, start, length) of each conversation, on the host


class FlashCache:
    """Attention of one layer's queries to all tokens of their conversation, whose keys and values it keeps.

    keys, values: (rows, groups, head_dim). A query sees the keys up to its own position.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def forward(self, query, key, value, places: Places, scale: float, room: int = 0) -> tuple[torch.Tensor, tuple]:
        self.keys.index_copy_(0, places.rows, key)
        self.values.index_copy_(0, places.rows, value)
        return self.attend(query, places, scale).flatten(1), ()

    def attend(self, query: torch.Tensor, places: Places, scale: float) -> torch.Tensor:
        # Causal from the last query back. One query for each conversation takes the kernel that splits the keys.
        return torch.ops.aten._flash_attention_forward(
            query, self.keys, self.values, places.ends, places.starts, places.longest, places.reach, 0.0, True, False,
            scale=scale, seqused_k=places.lengths,
        )[0]  # fmt: skip


class PlainCache(FlashCache):
    """The same, conversation by conversation."""

    def attend(self, query: torch.Tensor, places: Places, scale: float) -> torch.Tensor:
        contexts = []
        for part, (new, start, length) in zip(
            query.split([span[0] for span in places.spans]), places.spans, strict=True
        ):
            keys, values = (states[start : start + length].transpose(0, 1)[None] for states in (self.keys, self.values))
            mask = None
            if 1 < new < length:
                mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
            context = scaled_dot_product_attention(
                part.transpose(0, 1)[None], keys, values, mask, is_causal=new == length, scale=scale, enable_gqa=True
            )
            contexts.append(context[0].transpose(0, 1))
        return torch.cat(contexts)


class FrozenProjection:
    """A Projection whose weights do not change: everything that it rounds, joins or dequantises is made once.

    Plain weights are not kept twice: the modules' parameters become views of the joined matrix.

    Args:
        wide: whether inputs have `room` spare columns, as those of norms and of SwiGLU have.
    """

    def __init__(self, projection: Projection, wide: bool):
        self.in_features, self.bias, self.rank = projection.in_features, projection.bias, projection.rank
        self.ops = projection.ops
        self.room = self.spare_columns(projection, wide)
        self.weight = projection.weight_beside_ups() if self.room else projection.weight()
        parts = self.weight[:, : self.in_features].split([base.out_features for base in projection.bases])
        for base, part in zip(projection.bases, parts, strict=True):
            # 4-bit weights have another shape, and stay, as do those that would be rounded.
            if base.weight.shape == part.shape and base.weight.dtype == part.dtype:
                base.weight.data = part
        self.downs = projection.down().t() if projection.paths else None  # (in_features, rank)
        self.ups = projection.ups() if projection.paths and not self.room else None  # (width, rank)

    @staticmethod
    def spare_columns(projection: Projection, wide: bool) -> int:
        """As Projection.room, and beside plain bases, too."""
        return projection.rank if wide and projection.rank % 16 == 0 else 0

    def without_adapter(self) -> "FrozenProjection":
        """The same bases alone, in the same memory."""
        base = copy(self)
        base.weight = self.weight[:, : self.in_features]
        base.room, base.downs, base.ups = 0, None, None
        return base

    def swiglu(self, gate_up: torch.Tensor, seeds: None) -> tuple[torch.Tensor, None]:
        return self.ops.swiglu(gate_up, self.room), None

    def forward(self, x: torch.Tensor, seeds: None, low: None = None) -> tuple[torch.Tensor, None]:
        """(output (tokens, width), None), rounded as Projection.forward rounds."""
        if self.room:
            wide = x.as_strided((len(x), self.weight.shape[1]), (x.stride(0), 1))
            torch.mm(x, self.downs, out=wide[:, self.in_features :])
            return self.product(wide, self.weight), None
        if self.ups is None:
            return self.product(x, self.weight), None
        return self.product(x @ self.downs, self.ups).addmm_(x, self.weight.t()), None

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() if self.bias is None else torch.addmm(self.bias, x, weight.t())


class Decoder:
    """A model's fused layers, with and without its adapter, and a cache of `slots` conversations of `capacity` tokens.

    Calling it with Parts computes their keys and values and returns the logits, (parts, vocab), of what comes after the
    last token of each. On a card, single tokens go through a CUDA graph, whose logits last until the next call.

    Args:
        model: a causal LM, whose linear layers may be peft's.
        slots: conversations at most; there are fewer if the memory has no room for them.
        capacity: tokens of a conversation at most; None: as many as the model was made for, if the memory holds them.
        vocab: tokens from this id on have no logits; None: those without a row in the output head.

    Raises:
        Unfused: the model has no fused layers, or not for conversations of `capacity` tokens.
        ArgumentError: the memory does not hold one conversation.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, slots: int, capacity: int | None = None, vocab: int | None = None):
        self.device, limit = model.device, longest_conversation(model.config)
        if capacity:
            capacity = min(capacity, limit)
        limit = min(limit, getattr(model.config, "sliding_window", None) or limit)  # beyond it a model forgets
        tuned, base = (find_layers(model, capacity or limit, adapted) for adapted in (True, False))
        self.layers = {True: tuned, False: base}  # by whether the adapter is in them
        self.embed, head = model.get_input_embeddings(), model.get_output_embeddings().weight
        self.vocab = min(vocab or len(head), len(head))
        self.head = head[: -(-self.vocab // ROWS) * ROWS]
        self.norm, self.eps = norm_of(final_norm(model))
        free, frozen, size = SHARE * free_memory(self.device), frozen_bytes(tuned), self.head.element_size()
        freezes, four_bits = frozen < free / 2, has_4_bits(tuned[0].qkv)
        if freezes:
            free -= frozen
            freeze(tuned, base)
        one = tuned[0]
        tokens = int(free / (2 * len(tuned) * one.groups * one.head_dim * size))
        self.slots, self.capacity = fit_cache(tokens, slots, capacity, limit)
        # The last row takes what the unused places of a graph write.
        shape = (len(tuned), 2, self.slots * self.capacity + 1, one.groups, one.head_dim)
        self.is_flash = one.attention is not SAMPLE_BY_SAMPLE
        make = torch.zeros if self.is_flash else torch.empty  # an empty one takes its memory as it fills
        self.cache = make(shape, dtype=self.head.dtype, device=self.device)
        for *layers, states in zip(tuned, base, self.cache, strict=True):
            for layer in layers:
                layer.attention = (FlashCache if self.is_flash else PlainCache)(*states)
        self.cos, self.sin = rotary_angles(model, torch.arange(self.capacity, device=self.device))
        self.graphs: dict[tuple[int, bool], Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.is_flash else None
        bits = f"4-bit weights dequantised {'once' if freezes else 'at every step'}, " * four_bits
        logger.info(
            f"decoding: {bits}{counted(self.slots, 'conversation')} of at most {self.capacity:,} tokens at once, whose "
            f"cache takes {math.ceil(self.cache.nbytes / 2**20):,} MiB"
        )

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Part], adapted: bool = True) -> torch.Tensor:
        if self.is_flash and all(len(part.ids) == 1 for part in parts):
            return self.replay(parts, adapted)
        ids, positions, rows, ends, spans = [], [], [], [0], []
        for slot, position, new in parts:
            start, length = slot * self.capacity, position + len(new)
            ids += new
            positions += range(position, length)
            rows += range(start + position, start + length)
            ends.append(len(ids))
            spans.append((len(new), start, length))
        tokens = upload(torch.tensor([ids, positions, rows]), self.device)
        starts, lengths = [*(start for _, start, _ in spans), 0], [length for *_, length in spans]
        bounds = (upload(torch.tensor(x, dtype=torch.int32), self.device) for x in (ends, starts, lengths))
        places = Places(tokens[2], *bounds, max(new for new, *_ in spans), self.capacity, spans)
        return self.run(*tokens[:2], places, adapted)

    def run(self, ids: torch.Tensor, positions: torch.Tensor, places: Places, adapted: bool) -> torch.Tensor:
        hidden = self.embed(ids)
        row = RowContext(places, self.cos[positions], self.sin[positions], None)
        for layer in self.layers[adapted]:
            hidden, _ = layer.forward(hidden, row)
        last = hidden[places.ends[1:] - 1]
        if self.norm is not None:
            last, _ = self.layers[adapted][0].ops.rms_norm(last, self.norm, self.eps)
        return (last @ self.head.t())[:, : self.vocab]

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give one slot the first tokens of another."""
        source, target = source * self.capacity, target * self.capacity
        self.cache[:, :, target : target + tokens] = self.cache[:, :, source : source + tokens]

    def replay(self, parts: Sequence[Part], adapted: bool) -> torch.Tensor:
        size = min(1 << (len(parts) - 1).bit_length(), self.slots)
        key = size, adapted
        if key not in self.graphs:
            self.graphs[key] = Graph(self, size, adapted)
        unused = [(0, self.slots * self.capacity, 0)] * (size - len(parts))
        values = [(ids[0], slot * self.capacity, position) for slot, position, ids in parts] + unused
        return self.graphs[key].replay(torch.tensor(values).t())[: len(parts)]


class Graph:
    """One forward of `size` conversations by a token each, recorded once and replayed with other values."""

    def __init__(self, decoder: Decoder, size: int, adapted: bool):
        # A proxy, since the decoder has its graphs: a circle would keep the cache on the card until Python finds it.
        self.decoder, self.adapted = weakref.proxy(decoder), adapted
        # Ids, first rows and positions. The last row of the cache is nobody's.
        self.values = torch.zeros(3, size, dtype=torch.long, device=decoder.device)
        self.values[1] = decoder.slots * decoder.capacity
        self.ends = torch.arange(size + 1, dtype=torch.int32, device=decoder.device)
        self.record()

    def record(self) -> None:
        stream = torch.cuda.Stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Triton compiles and cuBLAS takes its memory before the recording
            self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.decoder.pool, capture_error_mode="thread_local"):
            self.logits = self.forward()

    def forward(self) -> torch.Tensor:
        ids, starts, positions = self.values
        bounds = self.ends, pad(starts.int(), (0, 1)), (positions + 1).int()
        places = Places(starts + positions, *bounds, 1, self.decoder.capacity, [])
        return self.decoder.run(ids, positions, places, self.adapted)

    def replay(self, values: torch.Tensor) -> torch.Tensor:
        self.values.copy_(upload(values, self.values.device))
        self.graph.replay()
        return self.logits


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the host's values to a device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def longest_conversation(config) -> int:
    """Tokens for which a model has positions; UNLIMITED where it has any number of them, as Bloom has."""
    return getattr(config.get_text_config(), "max_position_embeddings", UNLIMITED)


def free_memory(device: torch.device) -> int:
    """Bytes for weights and a cache: what is free on a card; else half of the machine's or container's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # "max" is no limit
        limits.append(int(CONTAINER.read_text()))
    return min(limits) // 2


def frozen_bytes(layers: list[Layer]) -> int:
    """Bytes that freezing takes: 4-bit weights in the type that they are multiplied in, and spare columns."""
    total = 0
    for layer in layers:
        for name, part in zip(PROJECTIONS, layer.projections, strict=True):
            columns = FrozenProjection.spare_columns(part, name != "out")
            columns += part.in_features if has_4_bits(part) else 0
            total += part.width * columns * part.dtype.itemsize
    return total


def has_4_bits(projection: Projection) -> bool:
    return any(isinstance(base, Linear4bit) for base in projection.bases)


def freeze(tuned: list[Layer], base: list[Layer]) -> None:
    """Replace the projections of layers with an adapter, and of the same without it, by ones that share their bases."""
    for layer, alone in zip(tuned, base, strict=True):
        for name in PROJECTIONS:
            frozen = FrozenProjection(getattr(layer, name), wide=name != "out")
            setattr(layer, name, frozen)
            setattr(alone, name, frozen.without_adapter())


def fit_cache(tokens: int, slots: int, capacity: int | None, limit: int) -> tuple[int, int]:
    """(slots, tokens of each) of a cache of at most `tokens` tokens.

    Where `capacity` is None, conversations are at least SHORTEST tokens long before there are fewer of them.
    """
    if capacity is None:
        capacity = min(max(tokens // slots, min(SHORTEST, tokens)), limit)
    if not 0 < capacity <= tokens:
        raise ArgumentError(
            f"a conversation of {capacity} tokens: the free memory holds the keys and values of {max(tokens, 0)}; ask "
            "for shorter prompts or answers, or free memory"
        )
    return min(slots, tokens // capacity), capacity
