"""Attention by cuDNN: what its plans are told, by an imitation of NVIDIA's package that computes on the processor."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from component.kernel import attention, cudnn
from component.kernel.attention import CUDNN, FLASH, SAMPLE_BY_SAMPLE, Bounds, choose_attention

TYPES = SimpleNamespace(
    FLOAT=torch.float32, BFLOAT16=torch.bfloat16, HALF=torch.float16, INT32=torch.int32, INT64=torch.int64
)


def at_address(address: int, dtype: torch.dtype, begin: int, shape, strides) -> torch.Tensor:
    """A view of memory, `begin` elements after an address."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address + begin * dtype.itemsize)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


class Described:
    """A tensor of a graph, as NVIDIA's package describes it."""

    def __init__(self, name="", dim=None, stride=None, data_type=None):
        self.name, self.dim, self.stride, self.kind, self.begins, self.is_output = (
            name,
            dim,
            stride,
            data_type,
            None,
            False,
        )

    def set_dim(self, dim):
        self.dim = dim

    def set_stride(self, stride):
        self.stride = stride

    def set_data_type(self, kind):
        self.kind = kind

    def set_ragged_offset(self, begins):
        self.begins = begins

    def set_output(self, value):
        self.is_output = value


class Graph:
    """Computes samples one by one from the memory that a plan points to."""

    made = []

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type is compute_data_type is torch.float32
        self.made.append(self)

    def tensor(self, **description):
        return Described(**description)

    def sdpa(self, q, k, v, **settings):
        assert settings.pop("generate_stats")
        self.inputs, self.outputs, self.settings = (q, k, v), (Described("context"), Described("log_sums")), settings
        return self.outputs

    def sdpa_backward(self, q, k, v, o, dO, stats, max_total_seq_len_q, max_total_seq_len_kv, **settings):
        assert max_total_seq_len_q == max_total_seq_len_kv
        self.inputs, self.settings, self.tokens = (q, k, v, o, dO, stats), settings, max_total_seq_len_q
        self.outputs = tuple(Described(name) for name in ("dq", "dk", "dv"))
        return self.outputs

    def build(self, modes):
        assert all(output.is_output for output in self.outputs)
        assert self.settings["use_padding_mask"] and self.settings["diagonal_alignment"] == "top left"
        assert self.settings["diagonal_band_right_bound"] == 0

    def get_workspace_size(self):
        return 0

    def execute(self, pointers, workspace, handle):
        samples = self.inputs[0].dim[0]

        def read(tensor, count):
            assert tensor.stride == (1, 1, 1, 1) and tensor.dim == (count, 1, 1, 1) and pointers[tensor] % 16 == 0
            return at_address(pointers[tensor], tensor.kind, 0, (count,), (1,)).tolist()

        lengths = read(self.settings["seq_len_q"], samples)
        assert lengths == read(self.settings["seq_len_kv"], samples)
        for number, length in enumerate(lengths):
            views = []
            for tensor in (*self.inputs, *self.outputs):
                assert tensor.dim[0] == samples and tensor.dim[2] >= length
                assert tensor.stride[0] == tensor.dim[2] * tensor.stride[2]
                assert tensor.kind == torch.float32 or tensor.stride[2] % 8 == 0  # 16 bytes
                begin = read(tensor.begins, samples + 1)[number]
                shape, strides = (tensor.dim[1], length, tensor.dim[3]), tensor.stride[1:]
                views.append(at_address(pointers[tensor], tensor.kind, begin, shape, strides) if length else None)
            if length:
                self.compute(*views)

    def compute(self, query, key, value, *rest):
        inputs = [x.float().requires_grad_() for x in (query, key, value)]
        query, key, value = inputs
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = self.settings["attn_scale"] * query @ key.mT
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        found, log_sums = scores.softmax(-1) @ value, scores.logsumexp(-1, keepdim=True)
        if len(rest) == 2:
            for output, result in zip(rest, (found, log_sums), strict=True):
                output.copy_(result.detach())
            return
        context, grad, kept, *outputs = rest
        assert torch.allclose(context.float(), found, atol=1e-2) and torch.allclose(kept, log_sums, atol=1e-5)
        for output, result in zip(outputs, torch.autograd.grad(found, inputs, grad.float()), strict=True):
            output.copy_(result)


@pytest.fixture
def frontend(monkeypatch):
    """An imitation of the package, which attention by cuDNN uses without a card."""
    package = SimpleNamespace(
        data_type=TYPES,
        diagonal_alignment=SimpleNamespace(TOP_LEFT="top left"),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        pygraph=Graph,
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cudnn, "make_handle", lambda device: 0)
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setitem(sys.modules, "cudnn", package)
    caches = cudnn.load_frontend, cudnn.make_forward, cudnn.make_backward, attention.cudnn_serves
    for cached in caches:
        cached.cache_clear()
    yield package
    for cached in caches:
        cached.cache_clear()


def make_row(lengths, heads, groups, head_dim, dtype=torch.bfloat16, spare=0):
    """A row's queries, keys and values, views of one tensor; the context's gradient with spare columns; its bounds."""
    draw = torch.Generator().manual_seed(1)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    states = torch.randn(sum(lengths), heads + 2 * groups, head_dim, generator=draw).to(dtype)
    grad = torch.randn(sum(lengths), heads * head_dim + spare, generator=draw).to(dtype)[:, : heads * head_dim]
    return states.split((heads, groups, groups), 1), grad, Bounds(ends, max(lengths))


def run(way, states, grad, bounds, room=0):
    context, saved = way.forward(*states, bounds, 0.3, room)
    return context, way.backward(grad, *states, context, saved, bounds, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim"),
    [([7, 1, 129, 20, 3], 4, 2, 16), ([40], 9, 3, 16), ([1], 1, 1, 64), ([1 + at % 5 for at in range(33)], 4, 1, 16)],
)
@pytest.mark.parametrize("room", [0, 8, 4])
def test_plans_describe_every_sample_of_a_row(frontend, lengths, heads, groups, head_dim, dtype, room):
    states, grad, bounds = make_row(lengths, heads, groups, head_dim, dtype, spare=room)
    found = run(CUDNN, states, grad, bounds, room)
    exact = [x.float() for x in states]
    for one, other in zip(found, run(SAMPLE_BY_SAMPLE, exact, grad.float(), bounds), strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert (one.float() - other).norm() < 1e-2 * other.norm()
    # Four columns would put rows at addresses that cuDNN does not read.
    assert found[0].stride(0) == heads * head_dim + (room if room == 8 else 0)


def test_rows_of_similar_sizes_share_plans(frontend):
    for lengths in ([100, 20, 9], [128, 1, 1, 1], [60, 60, 60]):
        run(CUDNN, *make_row(lengths, 2, 1, 16))
    assert len(Graph.made) == 2
    assert Graph.made[0].inputs[0].dim == (4, 2, 128, 16)
    assert Graph.made[1].tokens == 4096
    run(CUDNN, *make_row([129, 20, 9], 2, 1, 16))
    run(CUDNN, *make_row([20] * 5, 2, 1, 16))
    assert [graph.inputs[0].dim for graph in Graph.made[2::2]] == [(4, 2, 256, 16), (8, 2, 128, 16)]


def test_samples_that_a_row_does_not_have_have_no_tokens():
    ends = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
    assert [x.tolist() for x in cudnn.pad_samples(ends, 4)] == [[0, 5, 6, 9, 9], [5, 1, 3, 0]]
    assert [x.tolist() for x in cudnn.pad_samples(ends[:2], 1)] == [[0, 5], [5]]


def test_long_rows_have_places_beyond_32_bits(frontend):
    plan = cudnn.ForwardPlan(cudnn.Sizes(torch.device("cpu"), torch.bfloat16, 32, 2, 128, 1, 262144, 0.1, (4608,) * 4))
    places = {}

    def execute(pointers, workspace, handle):
        for name, (_, begins, _) in plan.packed.items():
            places[name] = at_address(pointers[begins], begins.kind, 0, (2,), (1,)).tolist()

    plan.graph.execute = execute
    ends = torch.tensor([0, 2**20], dtype=torch.int32)
    plan.run(ends, ends.diff(), **dict.fromkeys(plan.packed, torch.empty(0)))
    assert places == {name: [0, 2**25 if name == "log_sums" else 4608 * 2**20] for name in plan.packed}


def test_a_plan_holds_no_memory_of_a_row_that_is_recorded(frontend):
    for make, count in ((cudnn.ForwardPlan, 4), (cudnn.BackwardPlan, 5)):
        plan = make(cudnn.Sizes(torch.device("cpu"), torch.bfloat16, 2, 1, 16, 1, 128, 0.1, (64,) * count))
        assert not [name for name, value in vars(plan).items() if isinstance(value, torch.Tensor)]


def on_a_card(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, CUDNN),
        ((10, 0), torch.float16, 64, CUDNN),
        ((8, 6), torch.bfloat16, 128, FLASH),
        ((9, 0), torch.bfloat16, 256, FLASH),
        ((9, 0), torch.bfloat16, 72, FLASH),
        ((9, 0), torch.float32, 128, SAMPLE_BY_SAMPLE),
    ],
)
def test_cudnn_is_for_hopper_and_the_head_sizes_that_it_has(monkeypatch, capability, dtype, head_dim, expected):
    on_a_card(monkeypatch, capability)
    monkeypatch.setattr(attention, "cudnn_serves", lambda *_: True)
    assert choose_attention(torch.device("cuda"), dtype, head_dim) is expected


def other_version(package):
    package.backend_version = lambda: 92300


def old_version(package):
    package.backend_version = torch.backends.cudnn.version = lambda: 90501


def no_package(package):
    sys.modules["cudnn"] = None


def wrong_results(package):
    class Wrong(Graph):
        def compute(self, *views):
            super().compute(*views)
            if len(views) == 9:  # a backward's, the last of which is the gradient of values
                views[-1].mul_(2)

    package.pygraph = Wrong


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (other_version, "ImportError: it finds cuDNN 92300, and torch has 91900; pip install -r requirements.txt"),
        (old_version, "ImportError: cuDNN 90501 is older than 90600; pip install -r requirements.txt"),
        (no_package, "sys.modules; pip install -r requirements.txt brings the package nvidia-cudnn-frontend"),
        (wrong_results, "ArithmeticError: its results differ from those of flash attention by"),
        (lambda package: None, None),
    ],
)
def test_a_cudnn_that_does_not_serve_is_replaced_and_that_is_said_once(monkeypatch, frontend, log, spoil, reason):
    spoil(frontend)
    on_a_card(monkeypatch, (9, 0))
    monkeypatch.setattr(attention, "FLASH", SAMPLE_BY_SAMPLE)  # torch has no flash attention on the processor
    for _ in range(2):
        assert attention.cudnn_serves(torch.device("cpu"), torch.bfloat16, 64) is (reason is None)
    assert len(log) == (reason is not None)
    assert (reason or "") in "".join(log)
    assert ("pip install" in "".join(log)) == ("WARNING" in "".join(log)) == ("pip install" in (reason or ""))
