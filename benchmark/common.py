"""Shapes, random models made in place, samples and a clock: what the measurements of the training step share."""

import math
import platform
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, pairwise
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainerCallback,
)
from transformers.quantizers import AutoHfQuantizer

from benchmark.kernels import Recorder, summarise
from component.chatglm import ChatGLMConfig
from component.model import four_bit

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "liger-kernel", "trl", "unsloth")

BATCH, ACCUMULATION = 8, 8
SAMPLES = BATCH * ACCUMULATION  # of an update
MEDIAN_LENGTH, LENGTH_SPREAD = 0.38, 0.7  # of the log-normal, the median as a share of the longest: a mean of 456
LEARNED_SHARE = 0.6
LORA_RANK, LORA_ALPHA = 64, 16
AUTO = "auto"  # rows as long as a run would choose them
INITIAL_STD = 0.02

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def glm_config(**changes) -> GlmConfig:
    """transformers' GLM in ChatGLM3-6B's dimensions."""
    sizes = {"vocab_size": 65024, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return GlmConfig(**(sizes | heads | tokens | changes))


def llama_config(**changes) -> LlamaConfig:
    """Llama-3.1-8B with 16 of its 32 layers."""
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": LLAMA_3_ROPE}
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 131_072}
    return LlamaConfig(**(sizes | heads | tokens | {"rms_norm_eps": 1e-5} | changes))


def qwen_config(**changes) -> Qwen2Config:
    """Qwen2.5-0.5B, whose head is its embedding; queries, keys and values have biases."""
    sizes = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "max_position_embeddings": 32_768}
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "tie_word_embeddings": True}
    return Qwen2Config(**(sizes | heads | rope | tokens | {"rms_norm_eps": 1e-6} | changes))


def smollm2_config() -> LlamaConfig:
    """SmolLM2-135M, whose head is its embedding."""
    sizes = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "max_position_embeddings": 8192}
    return llama_config(**sizes, **heads, **rope)


TINY = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
TINY_HF = TINY | {"intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
TINY_QWEN = {key: size for key, size in TINY_HF.items() if key != "head_dim"}  # Qwen2 has none
TINY_CHATGLM = {"hidden_size": 64, "ffn_hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}

DEMO = {"hidden_size": 256, "ffn_hidden_size": 704, "num_layers": 4, "num_attention_heads": 8, "kv_channels": 32}

# Name to (configuration, longest sample in tokens).
SHAPES: dict[str, tuple[Callable[[], PreTrainedConfig], int]] = {
    "chatglm3-6b": (ChatGLMConfig, 1024),
    "chatglm3-6b-32k": (lambda: ChatGLMConfig(rope_ratio=50.0, seq_length=32_768), 1024),
    "glm-6b": (glm_config, 1024),
    "llama-16": (llama_config, 1024),
    "qwen-0.5b": (qwen_config, 1024),
    "smollm2-135m": (smollm2_config, 1024),
    "demo": (lambda: ChatGLMConfig(padded_vocab_size=2048, **DEMO), 1024),
    "tiny-chatglm": (lambda: ChatGLMConfig(padded_vocab_size=512, **TINY_CHATGLM), 64),
    "tiny-glm": (lambda: glm_config(**TINY_HF), 64),
    "tiny-llama": (lambda: llama_config(**TINY_HF), 64),
    "tiny-qwen": (lambda: qwen_config(**TINY_QWEN), 64),
}


@dataclass
class Run:
    """What a variant is given.

    Args:
        updates: that are timed.
        folder: for what its program writes; removed after the last variant.
        rows: tokens of this project's packed rows at most, or AUTO; None for what the variant has.
        length: of every sample, in tokens; None for the shape's mixed lengths.
        count: of the samples of that length.
        warm_up: updates before the timed ones, at least 1.
    """

    variant: str
    shape: str
    updates: int
    folder: Path
    rows: int | str | None = None
    length: int | None = None
    count: int = 1
    warm_up: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def longest(self) -> int:
        return self.length or SHAPES[self.shape][1]

    @property
    def is_recorded(self) -> bool:
        """Whether there is an update after the timed ones whose kernels are recorded, so that timing is undisturbed."""
        return self.device.type == "cuda"

    @property
    def steps(self) -> int:
        """All updates."""
        return self.warm_up + self.updates + self.is_recorded

    @property
    def config(self) -> PreTrainedConfig:
        return SHAPES[self.shape][0]()

    def model(self, bits: int = 4) -> PreTrainedModel:
        return build_model(self.shape, self.device, self.dtype, bits=bits)

    def samples(self) -> list[dict[str, list[int]]]:
        """The samples of an update."""
        lengths = [self.length] * self.count if self.length else None
        return make_samples(self.config.vocab_size, longest=self.longest, lengths=lengths)

    def epoch(self) -> list[dict[str, list[int]]]:
        """The samples of all updates, to be taken in order: every update has the same ones, in an order of its own."""
        draw, samples = random.Random(0), self.samples()
        return [sample for _ in range(self.steps) for sample in draw.sample(samples, len(samples))]


def make_samples(
    vocab: int, seed: int = 0, longest: int = 1024, lengths: list[int] | None = None
) -> list[dict[str, list[int]]]:
    """Make samples of random ids, the last 60% of each learned: `input_ids` and `target_mask`, 1 where learned.

    Without `lengths` there are 64, whose lengths are log-normal, at least 16 and at most `longest`; their mean is 456
    where that is 1,024. The first and the last ids of the vocabulary, where special tokens are, do not occur.
    """
    generator = random.Random(seed)
    if lengths is None:
        sizes = [longest * generator.lognormvariate(math.log(MEDIAN_LENGTH), LENGTH_SPREAD) for _ in range(SAMPLES)]
        lengths = [min(max(round(size), 16), longest) for size in sizes]
    samples = []
    for length in lengths:
        learned = round(LEARNED_SHARE * length)
        ids = [generator.randrange(16, vocab - vocab // 16) for _ in range(length)]
        samples.append({"input_ids": ids, "target_mask": [0] * (length - learned) + [1] * learned})
    return samples


def count(samples: list[dict[str, list[int]]]) -> tuple[int, int]:
    """Count the useful tokens of an update, those that are not padding, and the learned ones among them."""
    return sum(len(sample["input_ids"]) for sample in samples), sum(sum(sample["target_mask"]) for sample in samples)


def build_model(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0, bits: int = 4) -> PreTrainedModel:
    """Make a model of `shape` on `device`, of random weights. With 4 bits, its linear layers are NF4 with double
    quantisation; with 16, they are plain ones of `dtype`.

    Weights are normal with deviation 0.02, biases zero, norms one. Embedding, head and norms are in `dtype`, which is
    also the dtype of the 4-bit layers' arithmetic. One layer at a time exists unquantised.
    A tied head is the embedding itself.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape][0](), dtype=dtype)
    head = model.get_output_embeddings()
    generator = torch.Generator(device).manual_seed(seed)

    def normal(size: torch.Size) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator).mul_(INITIAL_STD)

    for name, layer in list(model.named_modules()):
        if bits == 4 and isinstance(layer, nn.Linear) and layer is not head:
            model.set_submodule(name, quantize(layer, normal(layer.weight.shape), dtype))
        elif any(buffer.is_meta for buffer in layer.buffers(recurse=False)):  # the rotary frequencies
            with torch.device(device):
                model.set_submodule(name, type(layer)(config=model.config))
    made = {}  # by the weight on the meta device, of which tied layers have one
    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if weight.is_meta:
                if weight not in made:
                    fill = torch.zeros if name == "bias" else torch.ones
                    data = normal(weight.shape) if weight.dim() > 1 else fill(weight.shape, device=device, dtype=dtype)
                    made[weight] = nn.Parameter(data, requires_grad=False)
                setattr(layer, name, made[weight])

    if bits == 4:  # what from_pretrained would have noted
        model.hf_quantizer = AutoHfQuantizer.from_config(four_bit(dtype), pre_quantized=True)
        model.is_loaded_in_4bit = model.is_quantized = True
        model.quantization_method = model.hf_quantizer.quantization_config.quant_method
        model.config.quantization_config = model.hf_quantizer.quantization_config
    model.hf_device_map = {"": device}
    model.config.use_cache = False
    return model.train()


def quantize(layer: nn.Linear, weight: torch.Tensor, dtype: torch.dtype) -> Linear4bit:
    """Make a 4-bit layer like `layer` of `weight` (out, in). Its bias, if any, stays on the meta device."""
    bias = layer.bias is not None
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    twin = Linear4bit(layer.in_features, layer.out_features, bias, compute_dtype=dtype, device="meta", **settings)
    twin.weight = Params4bit(weight, requires_grad=False, module=twin, **settings).to(weight.device)
    twin.support_avx512bf16_for_cpu = False  # component/model.py says why
    return twin


def save_checkpoint(run: Run, folder: Path) -> None:
    """Write the run's model, quantised, and a tokenizer, for programs that load a folder."""
    model = run.model()
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:  # the file has the embedding alone
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    make_tokenizer(run).save_pretrained(folder)


def make_tokenizer(run: Run) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes, filled up to the size of the vocabulary. The samples are tokenised already."""
    special = ["<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|end_of_text|>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<filler{i}>" for i in range(run.config.vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        pad_token=special[1],
        eos_token=special[2],
        model_max_length=run.config.max_position_embeddings,
    )


def floor_flops(config: PreTrainedConfig, checkpointing: bool) -> float:
    """The fewest FLOPs that a useful token can cost.

    For each weight of the body they are 2 in the forward, twice that where it runs twice, and 2 for the gradient of
    the activations; frozen weights need no gradient. The head counts at learned tokens alone, and its forward never
    runs twice. Attention and the adapter are left out.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    body = weights - head.weight.numel()
    return (6 if checkpointing else 4) * body + 4 * LEARNED_SHARE * head.weight.numel()


def matmul_ceiling(device: torch.device) -> float:
    """Measure the FLOP/s of ten 8192³ products of random bfloat16 matrices; on a CPU, 1024³ in float32."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    started = now(device)
    for _ in range(10):
        left @ right
    return 10 * 2 * size**3 / (now(device) - started)


def now(device: torch.device) -> float:
    """Read the clock, in seconds, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


class Clock(TrainerCallback):
    """Takes the time at the end of each update, by the device's own clock, so that the host need not wait, and records
    the kernels of the last update, if the run wants that. Made when the base model is loaded."""

    def __init__(self, run: Run):
        self.run = run
        self.load_peak = peak_memory(run.device)
        self.forget_memory()
        self.recorder = Recorder(run.folder / "trace.json") if run.is_recorded else None
        self.recorded: dict | None = None
        self.times = [Instant(run.device)]

    def forget_memory(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(Instant(self.run.device))
        if self.recorder and len(self.times) == self.run.steps:
            now(self.run.device)
            self.recorder.start()
        elif self.recorder and len(self.times) == self.run.steps + 1:
            now(self.run.device)
            self.recorded = summarise(self.recorder.stop())

    def figures(self) -> dict:
        """Seconds of the first update and of each timed one, from end to end, so that data is part of them; memory; and
        what kernels.summarise says of the recorded update, or None."""
        now(self.run.device)
        timed = self.times[self.run.warm_up :][: self.run.updates + 1]
        return {
            "warmup_seconds": self.times[1] - self.times[0],
            "update_seconds": [end - begin for begin, end in pairwise(timed)],
            "recorded": self.recorded,
            "load_peak_gib": self.load_peak,
            "peak_gib": peak_memory(self.run.device),
        }


class Instant:
    """A time, which on a card is when all work given to it so far is done. The difference of two is in seconds."""

    def __init__(self, device: torch.device):
        self.time, self.event = time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        if self.event is None:
            return self.time - earlier.time
        return earlier.event.elapsed_time(self.event) / 1000


def count_labels(trainer: Trainer) -> int:
    """Learned tokens of the first update, by the trainer's own batches. No sample's first token is learned."""
    batches = islice(trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps)
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def measure(
    run: Run,
    trainer: Trainer,
    clock: Clock,
    checkpointing: bool,
    count_learned: Callable[[Trainer], int] = count_labels,
) -> dict:
    """Train, and return the figures of a variant.

    Args:
        count_learned: counts the learned tokens of the first update by the trainer's own batches.

    Raises:
        ValueError: a loss is not finite, or the batches hold other learned tokens than the samples.
    """
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    useful_tokens, learned_tokens = count(run.samples())
    if (learned := count_learned(trainer)) != learned_tokens:
        raise ValueError(f"{learned} tokens are learned, not the {learned_tokens} of the samples")
    if len(losses) != run.steps or not all(map(math.isfinite, losses)):
        raise ValueError(f"{run.steps} finite losses are expected, got {losses}")
    return clock.figures() | {
        "useful_tokens": useful_tokens,
        "learned_tokens": learned_tokens,
        "losses": losses,
        "floor_flops": floor_flops(run.config, checkpointing),
    }


def machine() -> dict:
    """Name of the card, or of the processor where there is none, and versions. It takes none of the card's memory."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    processors = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else [*processors, platform.machine()][0]
    return {"device": device, "python": platform.python_version(), "versions": versions}


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown, whose columns are aligned but for the last."""
    widths = [max(map(len, column)) for column in zip(columns, *([*row[:-1], ""] for row in rows), strict=True)]
    rule = ["-" * width for width in widths]
    lines = ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in (columns, rule, *rows)]
    return "\n".join(lines)
