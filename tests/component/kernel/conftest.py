"""Tiny models of every fused family, in 4 or 16 bits, with adapters that change what they say."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from component.chatglm import ChatGLMConfig
from component.model import find_linear_names

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
CONFIGS = {
    "chatglm": ChatGLMConfig(
        padded_vocab_size=VOCAB,
        hidden_size=64,
        ffn_hidden_size=96,
        num_layers=2,
        num_attention_heads=4,
        kv_channels=16,
        initializer_range=0.2,
    ),
    "glm": GlmConfig(**SHAPE, attention_bias=True),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE),
    "qwen2": Qwen2Config(**{key: size for key, size in SHAPE.items() if key != "head_dim"}),  # as published ones are
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
}


def quantize(model: nn.Module, dtype: torch.dtype) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                four_bit = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype
                )
                four_bit.weight = bnb.nn.Params4bit(
                    layer.weight.data.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                four_bit.bias = layer.bias
                four_bit.support_avx512bf16_for_cpu = False
                setattr(parent, name, four_bit)


def make_model(family, rank=4, dropout=0.0, device="cpu", dtype=torch.float32, targets=None, bits=4, **changes):
    """A model with an adapter whose both halves are random, in training mode. 16 bits are a plain base of `dtype`."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**(CONFIGS[family].to_dict() | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weight.bfloat16())  # so that 4 bits are made of the same values in every dtype
            if "norm" in name:
                weight.copy_(torch.randn_like(weight, dtype=torch.float32).mul_(0.3).add_(1).bfloat16())
            elif "bias" in name:
                weight.copy_(torch.randn_like(weight, dtype=torch.float32).mul_(0.3).bfloat16())
    names = targets or find_linear_names(model)
    model.to(dtype)
    if bits == 4:
        quantize(model, dtype)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, lora_dropout=dropout, target_modules=names)
    model = get_peft_model(model, config).to(device)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.2)
    return model.train()


def make_samples(lengths=(7, 1, 12, 5), learned: float = 0.6):
    draw = torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        mask = (torch.rand(length, generator=draw) < learned).int()
        ids = torch.randint(1, VOCAB, (length,), generator=draw)
        samples.append({"input_ids": ids.tolist(), "attention_mask": [1] * length, "target_mask": mask.tolist()})
    samples[0]["target_mask"][1] = 1
    return samples


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return grads


@pytest.fixture(params=[4, 16], ids=["4 bits", "16 bits"])
def bits(request) -> int:
    return request.param


@pytest.fixture(params=CONFIGS)
def family(request) -> str:
    return request.param
