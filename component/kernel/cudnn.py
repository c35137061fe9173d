"""Causal attention of packed rows by cuDNN, through NVIDIA's package nvidia-cudnn-frontend.

cuDNN computes by plans, which it takes a while to make. A plan serves every row within its sizes, which are rounded up,
so that a run needs few. Samples that a row has fewer than its plan have no tokens.

A plan outlives the rows that it was made for, so it holds nothing on the card: made while a row is recorded as a CUDA
graph, that would lie in the graphs' memory, which their replays overwrite.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from . import plain

OLDEST = 90600  # the first cuDNN whose backward takes packed samples with grouped queries
TOKENS = 4096  # plans are for a multiple of so many tokens in a row; only their workspace depends on it
LONGEST = 128  # plans are for samples of at least so many tokens
ALIGNMENT = 8  # elements of half precision in the 16 bytes that begin every row of a tensor


class Sizes(NamedTuple):
    """What a plan is made for.

    strides: elements from token to token of query, key, value, context and, in a backward, the context's gradient.
    tokens: of a row, for which a backward's workspace has room; a forward needs none.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    head_dim: int
    samples: int
    longest: int
    scale: float
    strides: tuple[int, ...]
    tokens: int = 0

    @classmethod
    def of(cls, states: tuple[torch.Tensor, ...], bounds, scale: float) -> "Sizes":
        query, key, *_ = states
        return cls(
            query.device,
            query.dtype,
            query.shape[1],
            *key.shape[1:],
            plain.power_of_two(len(bounds.ends) - 1),
            plain.power_of_two(max(bounds.longest, LONGEST)),
            scale,
            tuple(x.stride(0) for x in states),
        )


class Plan:
    """A graph of cuDNN for some sizes. Its tensors have a name; `run` takes one of torch's for each."""

    def __init__(self, sizes: Sizes):
        frontend = load_frontend()
        self.sizes, self.types = sizes, frontend.data_type
        self.half = self.types.BFLOAT16 if sizes.dtype == torch.bfloat16 else self.types.HALF
        self.handle = make_handle(sizes.device)
        self.graph = frontend.pygraph(
            io_data_type=self.half,
            intermediate_data_type=self.types.FLOAT,
            compute_data_type=self.types.FLOAT,
            handle=self.handle,
        )
        self.packed = {}  # name: (tensor, where its samples begin, elements from token to token)
        self.lengths = [self.column(name, sizes.samples, self.types.INT32) for name in ("queries", "keys")]
        self.settings = {
            "attn_scale": sizes.scale,
            "use_padding_mask": True,
            "seq_len_q": self.lengths[0],
            "seq_len_kv": self.lengths[1],
            "diagonal_alignment": frontend.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }
        self.declare()
        self.graph.build([frontend.heur_mode.A, frontend.heur_mode.FALLBACK])
        self.workspace = self.graph.get_workspace_size()

    def declare(self) -> None:
        """Describe the inputs, the operation and the outputs; a plan for each direction does so."""
        raise NotImplementedError

    def column(self, name: str, count: int, kind):
        return self.graph.tensor(name=name, dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)

    def pack(self, tensor, name: str, kind, heads: int, width: int, stride: int):
        """Describe a tensor that holds sample after sample, token after token."""
        tensor.set_dim((self.sizes.samples, heads, self.sizes.longest, width))
        tensor.set_stride((self.sizes.longest * stride, width, stride, 1))
        tensor.set_data_type(kind)
        begins = self.column(f"{name} begins", self.sizes.samples + 1, self.types.INT64)
        tensor.set_ragged_offset(begins)
        self.packed[name] = tensor, begins, stride
        return tensor

    def inputs(self, *names: str) -> list:
        """Declare the first of query, key, value, context and the context's gradient."""
        sizes = self.sizes
        heads = (sizes.heads, sizes.groups, sizes.groups, sizes.heads, sizes.heads)
        return [
            self.pack(self.column(name, 1, self.half), name, self.half, count, sizes.head_dim, stride)
            for name, count, stride in zip(names, heads, sizes.strides, strict=False)
        ]

    def run(self, ends: torch.Tensor, lengths: torch.Tensor, **tensors: torch.Tensor) -> None:
        """Compute on the current stream. ends, lengths: of `pad_samples`."""
        strides = [stride for *_, stride in self.packed.values()]
        begins = torch._foreach_mul([ends.long()] * len(strides), strides)  # long rows have more than 2**31 elements
        pointers = {length: lengths.data_ptr() for length in self.lengths}
        for begin, (name, (tensor, at, _)) in zip(begins, self.packed.items(), strict=True):
            pointers |= {tensor: tensors[name].data_ptr(), at: begin.data_ptr()}
        workspace = ends.new_empty(max(self.workspace, 1), dtype=torch.uint8)
        load_frontend().set_stream(handle=self.handle, stream=torch.cuda.current_stream(ends.device).cuda_stream)
        self.graph.execute(pointers, workspace.data_ptr(), handle=self.handle)


class ForwardPlan(Plan):
    def declare(self) -> None:
        sizes = self.sizes
        query, key, value = self.inputs("query", "key", "value")
        context, log_sums = self.graph.sdpa(q=query, k=key, v=value, generate_stats=True, **self.settings)
        self.pack(context, "context", self.half, sizes.heads, sizes.head_dim, sizes.strides[3]).set_output(True)
        self.pack(log_sums, "log_sums", self.types.FLOAT, sizes.heads, 1, sizes.heads).set_output(True)


class BackwardPlan(Plan):
    def declare(self) -> None:
        sizes, width = self.sizes, self.sizes.groups * self.sizes.head_dim
        query, key, value, context, grad = self.inputs("query", "key", "value", "context", "grad")
        log_sums = self.column("log_sums", 1, self.types.FLOAT)
        self.pack(log_sums, "log_sums", self.types.FLOAT, sizes.heads, 1, sizes.heads)
        grads = self.graph.sdpa_backward(
            q=query, k=key, v=value, o=context, dO=grad, stats=log_sums, **self.settings,
            max_total_seq_len_q=sizes.tokens, max_total_seq_len_kv=sizes.tokens,
        )  # fmt: skip
        joint = sizes.heads * sizes.head_dim + 2 * width
        names, heads = ("query_grad", "key_grad", "value_grad"), (sizes.heads, sizes.groups, sizes.groups)
        for tensor, name, count, stride in zip(grads, names, heads, (joint, width, width), strict=True):
            self.pack(tensor, name, self.half, count, sizes.head_dim, stride).set_output(True)


def forward(query, key, value, bounds, scale: float, room: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """attention.Attention's forward. `saved` is the log-sums of all scores (tokens, heads), and `pad_samples`."""
    tokens, heads, head_dim = query.shape
    context = plain.empty_with_room(tokens, heads * head_dim, 0 if room % ALIGNMENT else room, query)
    log_sums = query.new_empty(tokens, heads, dtype=torch.float32)
    plan = make_forward(Sizes.of((query, key, value, context), bounds, scale))
    ends, lengths = pad_samples(bounds.ends, plan.sizes.samples)
    plan.run(ends, lengths, query=query, key=key, value=value, context=context, log_sums=log_sums)
    return context, (log_sums, ends, lengths)


def backward(grad, query, key, value, context, saved, bounds, scale: float) -> torch.Tensor:
    """attention.Attention's backward. Rows of `query` and of the result must be equally wide: cuDNN 9.19 writes wrong
    gradients otherwise."""
    log_sums, ends, lengths = saved
    if grad.stride(0) % ALIGNMENT:
        grad = grad.clone(memory_format=torch.contiguous_format)
    tokens, heads, head_dim = query.shape
    groups = key.shape[1]
    joint = query.new_empty(tokens, heads + 2 * groups, head_dim)
    # cuDNN sums the heads of a group in a workspace that is larger by the stride of these: not views of `joint`.
    shared = query.new_empty(2, tokens, groups, head_dim)
    states = {"query": query, "key": key, "value": value, "context": context, "grad": grad}
    sizes = Sizes.of(tuple(states.values()), bounds, scale)
    plan = make_backward(sizes._replace(tokens=-(-tokens // TOKENS) * TOKENS))
    grads = {"query_grad": joint, "key_grad": shared[0], "value_grad": shared[1]}
    plan.run(ends, lengths, **states, log_sums=log_sums, **grads)
    joint[:, heads:].unflatten(1, (2, groups)).copy_(shared.transpose(0, 1))
    return joint


def pad_samples(ends: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ends, lengths) of `samples` samples; those that are not there have no tokens."""
    ends = torch.cat((ends, ends[-1:].expand(samples + 1 - len(ends))))
    return ends, ends.diff()


@cache
def load_frontend() -> ModuleType:
    """Import NVIDIA's package.

    Raises:
        ImportError: it is not there, or finds an old cuDNN or another than torch's.
    """
    import cudnn

    if cudnn.backend_version() != torch.backends.cudnn.version():
        raise ImportError(f"it finds cuDNN {cudnn.backend_version()}, and torch has {torch.backends.cudnn.version()}")
    if cudnn.backend_version() < OLDEST:
        raise ImportError(f"cuDNN {cudnn.backend_version()} is older than {OLDEST}")
    return cudnn


@cache
def make_handle(device: torch.device):
    with torch.cuda.device(device):
        return load_frontend().create_handle()


make_forward = cache(ForwardPlan)
make_backward = cache(BackwardPlan)
