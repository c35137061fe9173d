"""The training forward of a causal LM over packed rows: fused where the family is known, plain elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from types import ModuleType

import torch
from loguru import logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..chatglm.modeling_chatglm import rotary_embedding
from . import plain
from .attention import SAMPLE_BY_SAMPLE, Bounds, choose_attention
from .graph import NotRecorded, Recorder, RowGraphs, suits
from .head import HeadLoss
from .layer import NONE, OFFLOAD, PROJECTIONS, HostMemory, Layer, LayersFunction, RowContext
from .projection import Projection

ROPES = ("default", "linear", "llama3", "yarn")  # rotary embeddings whose angles do not depend on the batch


class Unfused(ValueError):
    """Raised where a model has no fused layers; the text says why."""


class PackedForward:
    """Replaces a model's forward for packed rows; a call without `targets` goes to the model's own forward.

    A call returns the summed cross-entropy of a row's learned tokens, a float64 scalar, and takes what
    component.train.batch.PackingCollator makes: input_ids, position_ids (tokens,), ends (samples + 1,), longest,
    learned and targets (n,).

    Args:
        model: with its adapter, or without one. Its causal LM's `forward` is replaced on the instance.
        max_length: tokens of the longest sample.
        fuses: False to use the model's own layers, for comparison.
        adapted: False to compute the base's own losses, without its adapter.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, max_length: int, fuses: bool = True, adapted: bool = True):
        self.model: PreTrainedModel = base_of(model)
        self.without_adapter = nullcontext if adapted or model is self.model else model.disable_adapter
        self.max_length = max_length
        self.own_forward = self.model.forward
        self.host: HostMemory | None = None
        try:
            if not fuses:
                raise Unfused("asked for by packing or fused_layers")
            self.layers = find_layers(self.model, max_length, adapted)
        except Unfused as reason:
            self.layers = []
            logger.warning(f"plain layers, which are slower: {reason}")
        self.model.forward = self
        self.use(NONE)

    @property
    def vocab(self) -> int:
        return len(self.model.get_output_embeddings().weight)

    def use(self, checkpointing: str, keeps_weights: bool = False, tokens: int = 0) -> None:
        """Set what layers keep, one of layer.CHECKPOINTING; a model's own layers keep all, or their input alone.

        Args:
            keeps_weights: whether weights stay in the type that they are multiplied in, from row to row.
            tokens: of a row at most, if rows that train may be recorded as CUDA graphs.
        """
        # Before memory is taken, what holds some is dropped.
        self.graphs: RowGraphs | None = None
        self.copy_adapter: Callable[[], None] = lambda: None
        if not self.layers and checkpointing != NONE:
            name = "activation_checkpointing_enable"  # its name from transformers 5.2x on
            enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        projections = [projection for layer in self.layers for projection in layer.projections]
        for projection in projections:
            projection.kept = None
        for layer in self.layers:
            layer.checkpointing = checkpointing
        if keeps_weights:
            for projection in projections:
                projection.keep()
        copies = [copy for projection in projections for copy in projection.copies()]
        if copies:
            self.copy_adapter = self.layers[0].ops.copier(copies)
        self.host = HostMemory(self.model.device) if checkpointing == OFFLOAD and self.on_cuda else None
        if tokens and self.layers and suits(self.layers, checkpointing, tokens):
            self.replay_rows(tokens, Recorder(self.model.device))

    def leave(self) -> None:
        """Give the model its own forward back, and free all memory that was taken beside the model."""
        self.use(NONE)
        self.model.forward = self.own_forward
        torch.cuda.empty_cache()

    def replay_rows(self, tokens: int, record) -> None:
        """Let graph.RowGraphs run rows that train, as far as they have at most `tokens` tokens."""
        angles = rotary_angles(self.model, torch.arange(self.max_length, device=self.model.device))
        self.graphs = RowGraphs(self.layers, self.model.get_input_embeddings(), angles, tokens, record)

    @property
    def on_cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def probe(self, tokens: int, beside: int = 0) -> bool:
        """Whether a row of `tokens`, in samples of the greatest length, goes forward and backward within the memory,
        while `beside` bytes are reserved for what is still to come."""
        device, training = self.model.device, self.model.training
        places = torch.arange(tokens, device=device)
        ids, longest = places % self.vocab, min(tokens, self.max_length)
        ends = torch.tensor([*range(0, tokens, longest), tokens], dtype=torch.int32, device=device)
        row = {"input_ids": ids, "position_ids": places % longest, "ends": ends, "longest": longest}
        try:
            reserved = torch.empty(beside, dtype=torch.uint8, device=device)
            self.model.train()
            with torch.random.fork_rng(devices=[]):
                self(**row, learned=places[:-1], targets=ids[1:]).backward()
            del reserved
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            for weight in self.model.parameters():
                weight.grad = None
            self.model.train(training)
            torch.cuda.empty_cache()

    @torch.no_grad()
    def isolates(self) -> bool:
        """Whether samples of a row do not see each other in the model's own layers.

        Some models ignore that positions restart (Bloom, Falcon and OPT of transformers 5). So two rows with different
        first samples are compared: the logits of the same second sample must be equal.
        """
        device, training = self.model.device, self.model.training
        places = torch.arange(8, device=device)
        ids = torch.stack([torch.cat((places * factor + 8, places + 8)) for factor in (1, 3)]) % self.vocab
        self.model.eval()
        one, other = (
            self.own_forward(input_ids=row[None], position_ids=places.repeat(2)[None], use_cache=False).logits[0, 8:]
            for row in ids
        )
        self.model.train(training)
        return ((one - other).abs().max() <= 1e-2 * one.abs().max()).item()

    def __call__(self, *args, targets: torch.Tensor | None = None, **row):
        if targets is None:
            return self.own_forward(*args, **row)
        if not self.layers:
            return self.plain(targets, **row)
        with torch.autocast(self.model.device.type, enabled=False):
            return self.fused(targets, **row)

    def fused(self, targets, *, learned, **row) -> torch.Tensor:
        return self.head_loss(self.states(**row), learned, targets)

    def states(self, *, input_ids, position_ids, ends, longest, **_) -> torch.Tensor:
        """(tokens, hidden size) what the fused layers make of a row, before the final norm. Padding may follow."""
        seeds = self.draw_seeds() if self.model.training else None
        trains = torch.is_grad_enabled()
        self.copy_adapter()
        if trains and seeds is not None and self.graphs is not None and self.graphs.takes(len(input_ids), longest):
            try:
                return self.graphs(input_ids, position_ids, ends, longest, seeds)
            except NotRecorded as reason:
                self.graphs = None
                logger.warning(f"no CUDA graphs, without which small models, or short rows, are slower: {reason}")
        hidden = self.model.get_input_embeddings()(input_ids)
        cos, sin = rotary_angles(self.model, position_ids)
        row = RowContext(Bounds(ends, longest), cos, sin, seeds)
        host = self.host if trains else None  # an evaluation has no backward to keep anything for
        if trains and not hidden.requires_grad:
            hidden.requires_grad_()
        return LayersFunction.apply(hidden, self.layers, row, host, trains)

    def draw_seeds(self) -> torch.Tensor:
        """A seed for the dropout mask of each projection, all from one random number of the host."""
        number = int(torch.randint(1 << 31, ()))
        step, count = 0x9E3779B9, len(PROJECTIONS) * len(self.layers)
        seeds = torch.arange(number, number + step * count, step, device=self.model.device)
        return seeds.bitwise_and_(0xFFFFFFFF)

    def head_loss(self, hidden, learned, targets) -> torch.Tensor:
        norm, eps = norm_of(final_norm(self.model))
        head, ops = self.model.get_output_embeddings().weight, self.layers[0].ops
        return HeadLoss.apply(hidden, learned, targets, norm, eps, head, ops, torch.is_grad_enabled())

    def plain(self, targets, *, input_ids, position_ids, learned, **_) -> torch.Tensor:
        """Compute the loss by the model's own modules, whose attention tells samples apart by restarting positions."""
        with self.without_adapter():
            logits = self.own_forward(
                input_ids=input_ids[None], position_ids=position_ids[None], logits_to_keep=learned, use_cache=False
            ).logits[0]
        return cross_entropy(logits.float(), targets, reduction="none").sum(dtype=torch.float64)

    @torch.no_grad()
    def losses_by_sample(self, targets, *, learned, ends, **row) -> torch.Tensor:
        """(samples,) the summed cross-entropy of the learned tokens of each sample of a row, in float64. The model has
        fused layers."""
        bounds = torch.searchsorted(learned, ends.to(learned.dtype)).tolist()
        with torch.autocast(self.model.device.type, enabled=False):
            hidden = self.states(ends=ends, **row)
            sums = [self.head_loss(hidden, learned[a:b], targets[a:b]) for a, b in pairwise(bounds) if a < b]
        found = torch.zeros(len(ends) - 1, dtype=torch.float64, device=hidden.device)
        found[torch.tensor([a < b for a, b in pairwise(bounds)], device=hidden.device)] = torch.stack(sums)
        return found


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_layers(model: PreTrainedModel, max_length: int, adapted: bool = True) -> list[Layer]:
    """Build the fused layers of a model, with its adapter or, where `adapted` is False, of the base alone.

    Raises:
        Unfused: its family is not known, or it uses something that fused layers do not have.
    """
    config, name = model.config, type(model).__name__
    if name not in FAMILIES:
        raise Unfused(f"{name} is not one of {', '.join(FAMILIES)}")
    check_fusable(config, max_length)
    if adapted:
        check_adapter(model, FAMILIES[name](model))
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # Qwen2 has none
    attention, ops = choose_attention(device, dtype, head_dim), choose_ops(device)
    if device.type == "cuda" and attention is SAMPLE_BY_SAMPLE:
        logger.warning(
            f"attention {attention.name}: flash attention needs Ampere or newer, half precision, and a head_dim of at "
            f"most 256 that 8 divides, not {head_dim}"
        )
    layers = []
    for number, parts in enumerate(FAMILIES[name](model)):
        norm, eps = norm_of(parts.pop("norm"))
        second_norm, _ = norm_of(parts.pop("second_norm"))
        head_norms = parts.pop("head_norms", None)
        projections = {
            key: Projection(parts.pop(key), dtype, ops, len(PROJECTIONS) * number + at, adapted)
            for at, key in enumerate(PROJECTIONS)
        }
        layers.append(
            Layer(
                number=number,
                norm=norm,
                second_norm=second_norm,
                eps=eps,
                **projections,
                heads=config.num_attention_heads,
                groups=config.num_key_value_heads,
                head_dim=head_dim,
                scaling=head_dim**-0.5,
                interleaved=name in INTERLEAVED,
                attention=attention,
                ops=ops,
                head_norms=head_norms and tuple(norm_of(part)[0] for part in head_norms),
            )
        )
    return layers


def check_fusable(config, max_length: int) -> None:
    """Raise Unfused for a setting that the fused layers do not have."""
    if getattr(config, "hidden_act", "silu") != "silu":
        raise Unfused(f"hidden_act is {config.hidden_act}")
    for key in ("attention_dropout", "hidden_dropout", "apply_residual_connection_post_layernorm"):
        if getattr(config, key, None):
            raise Unfused(f"{key} is {getattr(config, key)}")
    for key in ("rmsnorm", "multi_query_attention"):
        if not getattr(config, key, True):
            raise Unfused(f"{key} is false")
    window = getattr(config, "sliding_window", None)
    if window and window < max_length and "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"]):
        raise Unfused(f"sliding_window={window} is shorter than max_seq_length={max_length}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise Unfused(f"rope_type is {rope}")


def check_adapter(model: PreTrainedModel, parts: Iterable[dict]) -> None:
    """Raise Unfused for an adapter that is more than low-rank paths beside the fused layers' projections."""
    fused = {layer for part in parts for key in PROJECTIONS for layer in part[key]}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if layer not in fused:
                raise Unfused(f"the adapter changes {name}")
            if layer.lora_magnitude_vector:
                raise Unfused("the adapter is a DoRA")


def choose_ops(device: torch.device) -> ModuleType:
    """Choose Triton's kernels on CUDA if Triton is there, knows the card and can build one, else plain operations."""
    if device.type == "cuda":
        try:
            if torch.cuda.get_device_capability(device) < (7, 5):
                raise ImportError("Triton needs a Turing card or a newer one")
            from . import triton_kernels

            triton_kernels.swiglu(torch.ones(1, 2, device=device))
            return triton_kernels
        except Exception as error:  # Triton has errors of its own for a missing compiler or header
            logger.warning(f"plain operations, which are slower: {type(error).__name__}: {error}")
    return plain


def chatglm_layers(model: PreTrainedModel) -> Iterator[dict]:
    for layer in model.transformer.encoder.layers:
        yield {
            "norm": layer.input_layernorm,
            "qkv": [layer.self_attention.query_key_value],
            "out": [layer.self_attention.dense],
            "second_norm": layer.post_attention_layernorm,
            "gate_up": [layer.mlp.dense_h_to_4h],
            "down": [layer.mlp.dense_4h_to_h],
        }


def llama_layers(model: PreTrainedModel) -> Iterator[dict]:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "norm": layer.input_layernorm,
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "out": [attention.o_proj],
            "second_norm": layer.post_attention_layernorm,
            "gate_up": [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        yield parts | ({"head_norms": (attention.q_norm, attention.k_norm)} if hasattr(attention, "q_norm") else {})


FAMILIES = {"ChatGLMForConditionalGeneration": chatglm_layers} | dict.fromkeys(
    ("GlmForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), llama_layers
)
INTERLEAVED = ("ChatGLMForConditionalGeneration", "GlmForCausalLM")


def norm_of(norm: nn.Module | None) -> tuple[torch.Tensor | None, float]:
    """(weight, eps) of an RMSNorm."""
    return (None, 0.0) if norm is None else (norm.weight, getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    body = model.base_model
    return getattr(body.encoder, "final_layernorm", None) if hasattr(body, "encoder") else body.norm


def rotary_angles(model: PreTrainedModel, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 (tokens, angles), by the model's own rule."""
    if hasattr(model.base_model, "rotary_emb"):
        wide = torch.empty(0, device=position_ids.device)  # float32 in, float32 out
        cos, sin = model.base_model.rotary_emb(wide, position_ids[None])
        return tuple(part[0, :, : part.shape[-1] // 2].contiguous() for part in (cos, sin))
    cos, sin = rotary_embedding(model.config, position_ids[None], torch.float32)
    return cos[0, 0].contiguous(), sin[0, 0].contiguous()
