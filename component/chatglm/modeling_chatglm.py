"""ChatGLM2 and ChatGLM3 on transformers' own parts, under the official tensor names.

The arithmetic is that of the official `modeling_chatglm.py`; tests/component/chatglm compares logits, loss, every
gradient and greedy steps with vectors computed by it. Shapes: `batch`, `length` (positions of this call), `heads`
(query heads), `groups` (key/value heads), `head_dim` (`kv_channels`).
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chat import ChatMixin
from .configuration_chatglm import ChatGLMConfig
from .versions import CACHE, check_generation

# Keywords that forward takes beside its own parameters, by who passes or reads them.
KEYWORDS = {
    *("output_attentions", "output_hidden_states", "return_dict"),  # transformers' decorators
    *("num_items_in_batch", "shift_labels"),  # its loss functions
    *("is_causal", "cache_position", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"),  # generate and attention functions
    *("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k"),
    *("cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),  # generate_batch
}


class RMSNorm(nn.Module):
    """Root mean square norm; variance and scaling in float32, result in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normed = hidden_states * torch.rsqrt(variance + self.eps)
        return (self.weight * normed).to(hidden_states.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    return (RMSNorm if config.rmsnorm else nn.LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


def rotary_embedding(config: ChatGLMConfig, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosine and sine of the rotary angles, each (batch, 1, length, head_dim // 4).

    Half of a head is rotated, in pairs, so there are head_dim // 4 angles. They are computed in float32 from the
    configuration, not kept in a buffer that a cast or a lazy load could spoil.
    """
    rotary_dim = config.kv_channels // 2
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32) / rotary_dim
    inverse_frequencies = 1.0 / (10000 * config.rope_ratio) ** exponents
    angles = position_ids[:, None, :, None].float() * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs of the first half of each head; the second half passes through.

    Args:
        states: (batch, heads, length, head_dim).
        cos, sin: (batch, 1, length, head_dim // 4).
    """
    rotated, passed = states.chunk(2, dim=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), passed), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups  # query heads for each key/value head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        width = self.num_heads * self.head_dim
        qkv_width = width + 2 * self.num_groups * self.head_dim
        qkv_bias = config.add_qkv_bias or config.add_bias_linear
        self.query_key_value = nn.Linear(config.hidden_size, qkv_width, bias=qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, mixed: torch.Tensor) -> list[torch.Tensor]:
        """(batch, length, qkv_width) to query, key and value, each (batch, heads or groups, length, head_dim)."""
        if self.config.multi_query_attention:  # all queries, all keys, all values
            mixed = mixed.unflatten(-1, (-1, self.head_dim))
            parts = mixed.split((self.num_heads, self.num_groups, self.num_groups), dim=2)
        else:  # for each head its query, key and value
            parts = mixed.unflatten(-1, (self.num_heads, 3 * self.head_dim)).chunk(3, dim=-1)
        return [part.transpose(1, 2) for part in parts]

    def forward(self, hidden_states, attention_mask, rotary, **kwargs):
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if (cache := kwargs.pop(CACHE, None)) is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # context: (batch, length, heads, head_dim)
        return self.dense(context.flatten(-2)), weights


class MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class GLMBlock(GradientCheckpointingLayer):
    """One layer: norm, attention, residual; norm, MLP, residual."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.residual_is_normed = config.apply_residual_connection_post_layernorm
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(normed, **kwargs)
        hidden_states = self.add(normed if self.residual_is_normed else hidden_states, attended)

        normed = self.post_attention_layernorm(hidden_states)
        return self.add(normed if self.residual_is_normed else hidden_states, self.mlp(normed))

    def add(self, residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return residual + nn.functional.dropout(update, self.hidden_dropout, self.training)


class Embedding(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = make_norm(config)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # a buffer in old checkpoints

    def get_encoder(self, modality: str | None = None) -> PreTrainedModel:
        """The model itself, as of every decoder: `encoder` is only the official name of its layers."""
        return self if modality is None else super().get_encoder(modality)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm. It also owns `output_layer`, as the official tensor names have it."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embedding.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (batch, length, hidden_size) after the final norm, from ids (batch, length) or embeddings.

        Raises:
            TypeError: for an unknown keyword, on which the result might depend.
        """
        cache = past_key_values
        # Until transformers 5.23, `cache` can also be a paged cache, which is left to the attention function.
        if CACHE == "cache" or isinstance(kwargs.get("cache"), Cache):
            cache = kwargs.pop("cache", past_key_values)
        if unknown := kwargs.keys() - KEYWORDS:
            raise TypeError(f"ChatGLM's forward() got an unexpected keyword argument {min(unknown)!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)

        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        rotary = rotary_embedding(self.config, position_ids, inputs_embeds.dtype)

        hidden_states = nn.functional.dropout(inputs_embeds, self.config.hidden_dropout, self.training)
        for layer in self.encoder.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                rotary=rotary,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        if self.config.post_layer_norm:
            hidden_states = self.encoder.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(hidden_states, cache)


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2/3 with its language-model head, generation, and the official `chat` methods."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear):
        self.transformer.output_layer = value

    def generate(self, *args, **kwargs):
        """Generate as GenerationMixin does, after `check_generation`."""
        check_generation(ChatGLMForConditionalGeneration)
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocab), or those of the last `logits_to_keep` positions; with `labels`, the loss too.

        Args:
            attention_mask: (batch, length), 1 for real tokens, 0 for padding on either side.
            labels: (batch, length), -100 where nothing is learned; the shift by one happens inside.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
