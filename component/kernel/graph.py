"""A row's layers as two CUDA graphs, forward and backward: recorded once for each size of row, then replayed.

Python needs 20 to 65 microseconds to launch a kernel, a small model's kernel less to run. A graph is launched whole.
What it records is not Python but kernels, with the addresses and numbers that they were given. From this follows all
that is done here:

- Numbers stay as they were. So rows are padded to few sizes (`fit_size`), and the seeds of dropout lie on the card.
- Addresses stay as they were. So whatever differs between rows is copied to buffers that never move (`load`),
  gradients are added up in a buffer of their own (`claim_gradients`), and where an adapter's weight has moved, all
  graphs are recorded anew (`recorded`).
- Nothing may be compiled, and no library may take its workspace, during a recording. So all runs once before it.
- Memory that recorded kernels use belongs to the graphs as long as these live. All share one pool and overwrite each
  other in it: what a row's forward has left there lasts until the next row, and its backward must come before. Nothing
  that is made during a recording and used later, as a cache is, may lie there.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from . import plain
from .attention import SAMPLE_BY_SAMPLE, Bounds
from .layer import OFFLOAD, PROJECTIONS, Layer, RowContext, backward_layers, forward_layers

WORK = 5e11  # weights of a layer times tokens of a row, up to which launching may take longer than computing
SIZES = 64  # that are kept; each takes some megabytes beside the pool
STEP, SAMPLES, LONGEST = 64, 64, 1024  # tokens between two sizes, samples, and tokens of the longest, at least

Replay = Callable[[], None]


class NotRecorded(RuntimeError):
    """Raised where a row cannot be recorded; the text says why."""


class Size(NamedTuple):
    """What rows have in common that one recording can serve."""

    tokens: int
    samples: int  # of which some may be empty
    longest: int  # a bound


def fit_size(tokens: int, samples: int, longest: int, most: int, max_length: int) -> Size:
    """Find the size to which a row is padded. It follows from the row alone, so that a resumed run finds the same.

    Rows of at most `most` tokens have at most 48 sizes. The padding is at most a sixteenth of a row of most / 4 tokens
    or more.

    Args:
        most: tokens of any row, at most.
        max_length: tokens of any sample, at most.
    """
    step = max(plain.power_of_two(tokens) // 32, plain.power_of_two(most) // 64, STEP)
    padded = -(-tokens // step) * step
    longest = min(plain.power_of_two(max(longest, LONGEST, max_length // 8)), max_length)
    samples += -(-(padded - tokens) // longest)
    return Size(padded, plain.power_of_two(max(samples, SAMPLES)), longest)


def suits(layers: list[Layer], checkpointing: str, tokens: int) -> bool:
    """Whether rows of at most `tokens` tokens can be recorded here, and it pays. Attention sample by sample reads the
    bounds on the host."""
    layer = layers[0]
    recordable = layer.ops is not plain and layer.attention is not SAMPLE_BY_SAMPLE
    return recordable and any(layer.adapters for layer in layers) and pays(layer, checkpointing, tokens)


def pays(layer: Layer, checkpointing: str, tokens: int) -> bool:
    """Whether launching rows of at most `tokens` tokens may take longer than computing them, and graphs may help.

    An H100 computes a layer of WORK in about 3 ms, forward and backward; its launches take 1 to 2.5 ms. Memory of the
    host is not reached from a graph.
    """
    weights = sum(projection.width * projection.in_features for projection in layer.projections)
    return checkpointing != OFFLOAD and weights * tokens <= WORK


class RowGraphs:
    """The recordings of a model's layers, and the buffers that they read and write.

    Calling it with a row returns what the layers make of it, (padded tokens, hidden_size). The result lasts until the
    next row. Its backward adds the gradients of the layers' adapters to their `grad`, and must come before the next
    row. The tokens of the padding are no sample's, and have a gradient of zero.

    Args:
        layers: some of which have adapters.
        embed: the model's embedding, frozen.
        angles: cosine and sine of every position that a token may have, float32 (positions, angles).
        tokens: of a row at most.
        record: runs functions once, in order, and returns a replay of each, as Recorder does.
    """

    def __init__(
        self,
        layers: list[Layer],
        embed: nn.Embedding,
        angles: tuple[torch.Tensor, torch.Tensor],
        tokens: int,
        record: Callable[..., tuple[Replay, ...]],
    ):
        self.layers, self.embed, self.record = layers, embed, record
        self.cos, self.sin = angles
        self.weights = [weight for layer in layers for weight in layer.adapters]
        self.addresses: list[int] = []
        self.replays: dict[Size, tuple[Replay, ...]] = {}  # the last used last
        self.turn = 0  # number of the row whose activations are in the pool

        device, self.most = embed.weight.device, tokens
        tokens = self.fit(tokens, 1, 1).tokens
        self.ids, self.positions = torch.zeros(2, tokens, dtype=torch.long, device=device)
        self.ends = torch.zeros(plain.power_of_two(max(tokens, SAMPLES)) + 1, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(len(PROJECTIONS) * len(layers), dtype=torch.long, device=device)
        self.hidden, self.grad = torch.zeros(2, tokens, layers[0].out.width, dtype=embed.weight.dtype, device=device)
        sizes = [weight.numel() for weight in self.weights]
        parts = torch.zeros(sum(sizes), device=device).split(sizes)
        self.gradients = [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]
        self.anchor = torch.zeros(0, device=device, requires_grad=True)  # makes autograd call the backward

    def takes(self, tokens: int, longest: int) -> bool:
        return tokens <= self.most and longest <= len(self.cos)

    def fit(self, tokens: int, samples: int, longest: int) -> Size:
        return fit_size(tokens, samples, longest, self.most, len(self.cos))

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        seeds: torch.Tensor,
    ) -> torch.Tensor:
        """Run a row's forward. `takes` must hold.

        Raises:
            NotRecorded: for lack of memory, for instance. No more rows may be recorded then.
        """
        size = self.fit(len(input_ids), len(ends) - 1, longest)
        self.turn += 1
        self.load(size, input_ids, position_ids, ends)
        self.seeds.copy_(seeds)
        return ReplayFunction.apply(self.anchor, self, size, *self.recorded(size))

    def load(self, size: Size, input_ids: torch.Tensor, position_ids: torch.Tensor, ends: torch.Tensor) -> None:
        """Copy a row to the buffers, and pad it.

        The padding repeats the row's first token, at position 0. Each of these sees only its like, and becomes what the
        first token becomes: finite, if the row is, so that a gradient of zero leaves zeros.
        """
        tokens = len(input_ids)
        self.ids[:tokens].copy_(input_ids)
        self.ids[tokens : size.tokens] = input_ids[0]
        self.positions[:tokens].copy_(position_ids)
        self.positions[tokens : size.tokens].zero_()
        self.ends[: len(ends)].copy_(ends)
        places = self.ends[len(ends) : size.samples + 1].fill_(size.tokens)  # empty samples, but for
        if full := range(tokens + size.longest, size.tokens, size.longest):  # those of the greatest length before them
            torch.arange(full.start, full.stop, full.step, out=places[: len(full)])

    @torch.no_grad()
    def recorded(self, size: Size) -> tuple[Replay, ...]:
        """The replays of forward and backward of a size, which are recorded unless they are there."""
        addresses = list(map(torch.Tensor.data_ptr, self.weights))
        if addresses != self.addresses:
            self.addresses, self.replays = addresses, {}
        if size not in self.replays:
            while len(self.replays) >= SIZES:
                del self.replays[next(iter(self.replays))]
            self.claim_gradients()
            self.grad.zero_()  # the run before the recording adds nothing
            try:
                self.replays[size] = self.record(partial(self.forward, size), partial(self.backward, size))
            except Exception as error:  # a card's, Triton's or cuDNN's own
                raise NotRecorded(root_of(error)) from error
        self.replays[size] = self.replays.pop(size)
        return self.replays[size]

    def forward(self, size: Size) -> None:
        """Compute `hidden` from the buffers: the first half of what is recorded."""
        positions = self.positions[: size.tokens]
        bounds = Bounds(self.ends[: size.samples + 1], size.longest)
        row = RowContext(bounds, self.cos[positions], self.sin[positions], self.seeds)
        hidden, kept = forward_layers(self.layers, self.embed(self.ids[: size.tokens]), row, None, True)
        self.hidden[: size.tokens].copy_(hidden)
        self.between = row, kept

    def backward(self, size: Size) -> None:
        """Add the adapters' gradients to `gradients`, from the buffer `grad`: the second half."""
        row, kept = self.between
        del self.between  # so that its memory is free for the next recording
        backward_layers(self.layers, self.grad[: size.tokens], kept, row, None)

    def claim_gradients(self) -> None:
        """Make the buffer's parts the weights' gradients. What other rows have added up elsewhere is copied to them."""
        others = [
            (weight, place)
            for weight, place in zip(self.weights, self.gradients, strict=True)
            if weight.grad is not place
        ]
        if others:
            torch._foreach_zero_([place for _, place in others])
        for weight, place in others:
            if weight.grad is not None:
                place.copy_(weight.grad)
            weight.grad = place


class ReplayFunction(torch.autograd.Function):
    """A row's replays as one function for autograd: (anchor, graphs, size, replay forward, replay backward) to hidden.

    Raises:
        RuntimeError: in the backward, if another row's forward has overwritten this row's activations.
    """

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, graphs: RowGraphs, size: Size, forward: Replay, backward: Replay):
        ctx.graphs, ctx.turn, ctx.size, ctx.replay = graphs, graphs.turn, size, backward
        forward()
        return graphs.hidden[: size.tokens].detach()  # no view for autograd, of which other rows would be, too

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        graphs = ctx.graphs
        if ctx.turn != graphs.turn:
            raise RuntimeError("a row's backward must come before the next row's forward")
        graphs.grad[: ctx.size.tokens].copy_(grad)
        graphs.claim_gradients()
        ctx.replay()
        return (None,) * 5


class Recorder:
    """Records functions as CUDA graphs, in one pool of memory and on one stream.

    Each recording finds the memory that the run before it, and earlier recordings, have left to the pool. So the pool
    is no larger than the largest of them needs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.MemPool()
            with torch.cuda.stream(self.stream):  # for which torch keeps cuBLAS's workspaces: not in the pool
                zeros = torch.zeros(16, 16, dtype=torch.float16, device=device)
                torch.addmm(zeros[0], zeros, zeros @ zeros)

    def __call__(self, *steps: Callable[[], None]) -> tuple[Replay, ...]:
        torch.cuda.empty_cache()  # a pool that grows does not ask for what others have cached
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self.stream):  # whose end restores the stream even where a recording fails
                    with torch.cuda.use_mem_pool(self.pool):
                        for step in steps:
                            step()
                    return tuple(map(self.record, steps))
            finally:  # a run that fails may still be adding to gradients, which an eager row reads
                torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        state = generator.clone_state()
        try:
            # In this mode, threads that talk to the card meanwhile, as NCCL's do, are no error.
            with torch.cuda.graph(graph, self.pool.id, self.stream, capture_error_mode="thread_local"):
                step()
        except BaseException:  # after which generator and allocator would still wait for the recording's end
            generator.graphsafe_set_state(state)
            with suppress(RuntimeError):  # it has ended if the card did not refuse what was recorded
                torch._C._cuda_endAllocateToPool(index, self.pool.id)
                torch._C._cuda_releasePool(index, self.pool.id)
            raise
        return graph.replay


def root_of(error: BaseException) -> str:
    """Name of the first of a chain of errors, and its first line. A recording that fails fails once more as it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
