"""Configuration of ChatGLM2 and ChatGLM3 under the official names (`config.json` of THUDM/chatglm2-6b, chatglm3-6b)."""

from transformers import PreTrainedConfig

from .versions import CACHE


def find_version(recorded: int | None, *names: str | None) -> int:
    """ChatGLM's version, 2 or 3: the recorded one, else by the first name of a folder or model that says it, else 3."""
    named = (version for name in names for version in (2, 3) if f"chatglm{version}" in str(name).lower())
    return recorded or next(named, 3)


class ChatGLMConfig(PreTrainedConfig):
    """Shape of a ChatGLM2/3 decoder, with ChatGLM3-6B's values as defaults.

    Every key of the official `config.json` is accepted; those without effect on the arithmetic
    (`apply_query_key_layer_scaling`, `attention_softmax_in_fp32`, `bias_dropout_fusion`) are kept and ignored.

    Args beyond the official ones:
        chatglm_version: 2 or 3, the format of `model.chat`. Where it is absent, the checkpoint's name decides, else 3.

    Raises:
        ValueError: for `pre_seq_len`, `quantization_bit`, `fp32_residual_connection`, `tie_word_embeddings`, a
            `num_key_value_heads` that contradicts the official keys, and the first ChatGLM-6B.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    kv_channels: int = 128
    seq_length: int = 8192
    rope_ratio: float = 1.0
    rmsnorm: bool = True
    layernorm_epsilon: float = 1e-5
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    pre_seq_len: int | None = None
    quantization_bit: int | None = 0
    fp32_residual_connection: bool = False
    tokenizer_class: str | None = "ChatGLMTokenizer"
    chatglm_version: int | None = None

    def __post_init__(self, **kwargs):
        if self.pre_seq_len:
            raise ValueError(
                f"pre_seq_len={self.pre_seq_len}: P-Tuning prefixes are not supported. Remove the key from config.json "
                "and tune with LoRA instead."
            )
        if self.quantization_bit:
            raise ValueError(
                f"quantization_bit={self.quantization_bit}: the official int4/int8 checkpoints cannot be loaded. Use "
                "the full checkpoint (THUDM/chatglm3-6b); it is quantised to 4 bits while it loads (base_bits)."
            )
        if self.fp32_residual_connection:
            raise ValueError("fp32_residual_connection=true is not supported; no published checkpoint uses it.")
        if "position_encoding_2d" in kwargs or "inner_hidden_size" in kwargs:
            raise ValueError(
                "this is the first ChatGLM-6B, another architecture; only ChatGLM2 and ChatGLM3 are supported."
            )
        groups = kwargs.pop("num_key_value_heads", None)  # to_dict() wrote it
        if groups not in (None, self.num_key_value_heads):
            raise ValueError(
                f"num_key_value_heads={groups}: set multi_query_attention and multi_query_group_num instead, which say "
                f"{self.num_key_value_heads}."
            )
        names = kwargs.get("name_or_path"), kwargs.get("_name_or_path")
        self.chatglm_version = find_version(self.chatglm_version, *names)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """All values, with `num_key_value_heads`, which peft and others read there."""
        return super().to_dict() | {"num_key_value_heads": self.num_key_value_heads}

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads: `multi_query_group_num` with multi-query attention, else one for each query head."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def __setattr__(self, name: str, value):
        if name == "tie_word_embeddings" and value:
            raise ValueError(
                "tie_word_embeddings=true: ChatGLM's output head has weights of its own, beside its embedding. Remove "
                "the key, or make it false."
            )
        super().__setattr__(name, value)
