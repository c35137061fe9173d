"""Triton's kernels compiled for cards that need not be here: each must fit its card's shared memory and registers.

What is compiled is what a step launches, in the shapes of published models, whose tensors have no memory.
"""

import contextlib
import importlib.util
import io
import os
import re
from dataclasses import dataclass

import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from component.chatglm import ChatGLMConfig
from component.kernel import model as kernel_model
from component.kernel.attention import Attention
from component.kernel.model import PackedForward
from component.model import find_linear_names

if importlib.util.find_spec("triton") is None or "TRITON_INTERPRET" in os.environ:
    pytest.skip("needs Triton's compiler: make test-slow", allow_module_level=True)
import triton
from triton.backends.compiler import GPUTarget

from component.kernel import triton_kernels, triton_low_rank, triton_mlp, triton_norm

pytestmark = pytest.mark.slow
# KiB of shared memory that a block may have, by compute capability (NVIDIA's CUDA programming guide).
SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
REGISTERS = 65536  # for all threads of a block
SPILLED = 16  # bytes of a thread that may go from registers to memory, so that a loop does not
RANKS = (8, 64)  # beside their multiples, where layers are joined; 8 leaves no spare columns in the input


def llama_like(family: type, width: int, mlp: int, heads: int, groups: int, **others) -> PretrainedConfig:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": 2}
    return family(hidden_size=width, intermediate_size=mlp, **sizes, **others)


SHAPES = {
    "ChatGLM3-6B": ChatGLMConfig(num_layers=2, multi_query_attention=True, multi_query_group_num=2),
    "Llama-3.2-1B": llama_like(LlamaConfig, 2048, 8192, 32, 8, vocab_size=128256),  # heads of 64
    "Llama-3.1-70B": llama_like(LlamaConfig, 8192, 28672, 64, 8, vocab_size=128256),
    "Qwen2.5-7B": llama_like(Qwen2Config, 3584, 18944, 28, 4, vocab_size=152064),  # biases
    "Qwen3-8B": llama_like(Qwen3Config, 4096, 12288, 32, 8, vocab_size=151936, head_dim=128),  # norms of heads
    "heads of 256": llama_like(Qwen3Config, 2048, 8192, 8, 1, vocab_size=151936, head_dim=256),
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a card."""

    name: str
    threads: int  # of a block
    shared: int  # bytes of a block
    registers: int  # of a thread
    spilled: int  # bytes of a thread

    def fits(self, capability: tuple[int, int]) -> bool:
        registers = self.registers <= 255 and self.registers * self.threads <= REGISTERS and self.spilled <= SPILLED
        return registers and self.shared <= SHARED[capability] * 1024


def four_bit(linear: nn.Linear, dtype: torch.dtype) -> Linear4bit:
    """The layer as load_model makes it: NF4 in groups of 64, whose scales are quantised in groups of 256."""
    values, shape = linear.weight.numel(), linear.weight.shape
    layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None)
    layer.bias = linear.bias
    layer.weight = Params4bit(torch.empty(values // 2, 1, dtype=torch.uint8), requires_grad=False)
    scales = QuantState(torch.empty(values // 64 // 256), code=torch.empty(256), blocksize=256)
    steps, code = torch.empty(values // 64, dtype=torch.uint8), torch.empty(16)
    layer.weight.quant_state = QuantState(steps, shape, code, 64, "nf4", dtype, torch.empty(()), scales)
    return layer


def step(config: PretrainedConfig, dtype: torch.dtype, rank: int, keeps_weights: bool) -> None:
    """Forward and backward of a packed row of two samples, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        names = find_linear_names(model)
        for parent in list(model.modules()):
            for name, layer in parent.named_children():
                if name in names:
                    setattr(parent, name, four_bit(layer, dtype))
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_dropout=0.05, target_modules=names)
        ).train()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        places = torch.arange(2048)
    row = {"input_ids": places, "position_ids": places, "ends": places[:3], "longest": 1024, "learned": places[:64]}
    forward = PackedForward(model, 1024)
    forward.use("none", keeps_weights=keeps_weights)
    forward.fused(places[:64], **row).backward()


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Compiles whatever the steps of all shapes launch on a card of a compute capability."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    without_triton = Attention(
        "flash",
        lambda query, *_: (torch.empty_like(query).flatten(1), ()),
        lambda grad, query, key, value, *_: torch.cat([torch.empty_like(x) for x in (query, key, value)], 1),
    )
    monkeypatch.setattr(kernel_model, "choose_attention", lambda *_: without_triton)
    monkeypatch.setattr(kernel_model, "choose_ops", lambda device: triton_kernels)
    run, found = triton.JITFunction.run, set()

    def compile_only(kernel, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            made = run(kernel, *args, grid=grid, warmup=True, **options)
        if said := log.getvalue():  # otherwise it was compiled before
            registers, *spilled = (
                int(re.search(rf"(\d+) {what}", said)[1])
                for what in ("registers", "bytes spill stores", "bytes spill loads")
            )
            made = made.metadata
            found.add(Compiled(made.name, 32 * made.num_warps, made.shared, registers, max(spilled)))

    def compile_all(capability: tuple[int, int]) -> set[Compiled]:
        number = 10 * capability[0] + capability[1]

        class Driver:
            get_current_target = staticmethod(lambda: GPUTarget("cuda", number, 32))
            get_current_device = staticmethod(lambda: number)
            get_current_stream = staticmethod(lambda device: 0)

        monkeypatch.setattr(type(triton.runtime.driver), "active", Driver)
        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        halves = [torch.float16] if capability < (8, 0) else [torch.float16, torch.bfloat16]
        for dtype in (torch.float32, *halves):
            for config in SHAPES.values():
                for rank in RANKS:
                    step(config, dtype, rank, keeps_weights=rank == RANKS[-1])
        return found

    return compile_all


@pytest.mark.parametrize("capability", SHARED, ids="sm_{0[0]}{0[1]}".format)
def test_every_kernel_that_a_step_launches_fits_the_card(compile_for, capability):
    found = compile_for(capability)
    shared, registers, spilled = (
        max(getattr(kernel, what) for kernel in found) for what in ("shared", "registers", "spilled")
    )
    print(f"{len(found)} kernels, at most {shared} bytes shared, {registers} registers, {spilled} bytes spilled")
    assert not [kernel for kernel in found if not kernel.fits(capability)]
    of_tensor_cores = {"lora_down_kernel", "lora_down_grad_kernel", "lora_input_grad_kernel"}
    of_tensor_cores |= {"swiglu_low_kernel", "swiglu_backward_kernel"}
    modules = triton_kernels, triton_low_rank, triton_mlp, triton_norm
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {kernel.name for kernel in found} == (kernels - of_tensor_cores if capability < (8, 0) else kernels)
