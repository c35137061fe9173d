"""Folders of models as their publishers lay them out, tiny but for ChatGLM's real vocabulary where it is at hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.chatglm.tokenization_chatglm import SPTokenizer

AUTO_CLASSES = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
CHATGLM = {  # config.json of THUDM/chatglm3-6b, its sizes made small
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": AUTO_CLASSES,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 64,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CHATGLM_TOKENIZER = {
    "name_or_path": "THUDM/chatglm3-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ message['role'] }}|>\n "
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1018370\n".format("a" * 64)
HUB = {".gitattributes": "*.bin filter=lfs", "README.md": "---\nlanguage: zh\n---", "MODEL_LICENSE": "free"}


def write(file: Path, content: dict | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def edit(file: Path, **changes) -> None:
    write(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def shard(folder: Path, weights: dict, whole: str, save: Callable) -> None:
    """Two shards and their index, such as pytorch_model-00001-of-00002.bin."""
    stem, _, suffix = whole.rpartition(".")
    shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = {name: shards[i % 2] for i, name in enumerate(weights)}
    for file in shards:
        save({name: weights[name] for name in weights if index[name] == file}, folder / file)
    write(folder / f"{whole}.index.json", {"metadata": {"total_size": 1}, "weight_map": index})


def chatglm(folder: Path, vocabulary: Path, kinds: tuple[str, ...] = ("safetensors", "bin"), **config) -> None:
    """ChatGLM3-6B's repository: Python that must not be run, weights of both kinds, what a hub adds."""
    folder.mkdir(parents=True)
    rows = (SPTokenizer(str(vocabulary)).n_words + 127) // 128 * 128
    config = CHATGLM | {"padded_vocab_size": rows} | config
    write(folder / "config.json", config)
    torch.manual_seed(0)
    shape = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_bit")}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**shape | {"initializer_range": 0.1})).half()
    weights = model.state_dict() | {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    for kind, whole, save in (
        ("safetensors", "model.safetensors", lambda part, file: save_file(part, file, {"format": "pt"})),
        ("bin", "pytorch_model.bin", torch.save),
    ):
        if kind in kinds:
            shard(folder, weights, whole, save)
    for name in ("configuration_chatglm", "modeling_chatglm", "quantization", "tokenization_chatglm"):
        write(folder / f"{name}.py", "raise RuntimeError('the folder\\'s own Python was run')\n")
    for name, text in HUB.items():
        write(folder / name, text)
    write(folder / "tokenizer_config.json", CHATGLM_TOKENIZER)
    shutil.copy(vocabulary, folder / "tokenizer.model")


def later_revision(folder: Path, vocabulary: Path) -> None:
    """With a chat template, and the control tokens as added ones."""
    chatglm(folder, vocabulary)
    tokenizer = SPTokenizer(str(vocabulary))
    added = {str(tokenizer.special_tokens[token]): {"content": token, "special": True} for token in ROLES}
    edit(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATE, added_tokens_decoder=added)
    write(folder / "special_tokens_map.json", {})


def glm4(folder: Path, vocabulary: Path) -> None:
    chatglm(folder, vocabulary, ("safetensors",), rope_ratio=500, seq_length=131072)
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="ChatGLM4Tokenizer", auto_map=auto_map)
    write(folder / "tokenizer.model", "IQ== 0\nIg== 1\nIw== 2\n")  # of tiktoken


def saved_by_an_old_transformers(folder: Path, vocabulary: Path) -> None:
    """A model loaded from the hub with its own Python, merged, and saved by transformers 4.40."""
    names = {key: f"THUDM/chatglm3-6b--{name}" for key, name in AUTO_CLASSES.items()}
    architectures = ["ChatGLMForConditionalGeneration"]
    chatglm(folder, vocabulary, ("safetensors",), auto_map=names, architectures=architectures, classifier_dropout=None)
    edit(folder / "config.json", transformers_version="4.40.0", torch_dtype="bfloat16", quantization_bit=0)
    auto_map = {"AutoTokenizer": ["THUDM/chatglm3-6b--tokenization_chatglm.ChatGLMTokenizer", None]}
    edit(folder / "tokenizer_config.json", auto_map=auto_map, added_tokens_decoder={}, model_max_length=10**30)
    write(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": 2, "pad_token_id": 0})
    for file in folder.glob("*.py"):
        file.unlink()


def half_downloaded(folder: Path, vocabulary: Path) -> None:
    chatglm(folder, vocabulary, ("safetensors",))
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00002.safetensors.incomplete")


def pointers(folder: Path, vocabulary: Path) -> None:
    """A clone without git-lfs."""
    chatglm(folder, vocabulary)
    for file in (*folder.glob("*.bin"), *folder.glob("*.safetensors"), folder / "tokenizer.model"):
        write(file, LFS)


def pointer_of_tokenizer(folder: Path, vocabulary: Path) -> None:
    chatglm(folder, vocabulary)
    write(folder / "tokenizer.model", LFS)


def other(config_class: type, eos: str, bos: str | None = None, rows: int = 320, **config) -> Callable:
    """A family of transformers' own; its embedding has more rows than the tokenizer has tokens, as Qwen's."""

    def make(folder: Path, _: Path) -> None:
        tokens = [*filter(None, (bos, eos)), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        sizes = {"vocab_size": rows, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**sizes, **heads, **config), dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="60KB")
        values = json.loads((folder / "config.json").read_text())
        write(folder / "config.json", values | {"torch_dtype": values.pop("dtype"), "transformers_version": "4.40.1"})
        tokenizer.save(str(folder / "tokenizer.json"))
        write(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": None},
        )
        for name, text in HUB.items():
            write(folder / name, text)

    return make


def beside(make: Callable, *files: str) -> Callable:
    """The layout with other weights of its publisher's, which are no safetensors of transformers' names."""

    def make_all(folder: Path, vocabulary: Path) -> None:
        make(folder, vocabulary)
        for file in files:
            write(folder / file, "not to be opened")

    return make_all


def quantised(**config) -> Callable:
    def make(folder: Path, vocabulary: Path) -> None:
        LAYOUTS["Qwen2.5-7B"](folder, vocabulary)
        edit(folder / "config.json", quantization_config=config)

    return make


def gguf(folder: Path, _: Path) -> None:
    write(folder / "chatglm3-6b-q4_0.gguf", "GGUF")


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    "chatglm3-6b": chatglm,
    "chatglm3-6b-later": later_revision,
    "chatglm3-6b-base": lambda *at: chatglm(*at, _name_or_path="THUDM/chatglm3-6b-base", seq_length=32768),
    "chatglm3-6b-32k": lambda *at: chatglm(*at, ("bin",), rope_ratio=50, seq_length=32768),
    "chatglm3-6b-128k": lambda *at: chatglm(*at, ("bin",), rope_ratio=500, seq_length=131072),
    "chatglm2-6b": lambda *at: chatglm(*at, ("bin",), _name_or_path="THUDM/chatglm2-6b", seq_length=32768),
    "chatglm3-merged-by-4.40": saved_by_an_old_transformers,
    "Qwen2.5-7B": other(Qwen2Config, "<|endoftext|>", rows=384),
    "Qwen3-8B": other(Qwen3Config, "<|endoftext|>", rows=384, head_dim=16),
    "Meta-Llama-3-8B": beside(
        other(LlamaConfig, "<|end_of_text|>", "<|begin_of_text|>", rows=258), "original/consolidated.00.pth"
    ),
    "Mistral-7B-v0.3": beside(
        other(MistralConfig, "</s>", "<s>"), "consolidated.safetensors", "params.json", "tokenizer.model.v3"
    ),
    "glm-4-9b-chat": glm4,
    "chatglm3-6b-half": half_downloaded,
    "chatglm3-6b-pointers": pointers,
    "chatglm3-6b-pointer": pointer_of_tokenizer,
    "chatglm3-6b-int4": lambda *at: chatglm(*at, ("bin",), quantization_bit=4),
    "chatglm3-6b-gguf": gguf,
    "Qwen2.5-7B-GPTQ-Int4": quantised(quant_method="gptq", bits=4, group_size=128),
    "Qwen2.5-7B-AWQ": quantised(quant_method="awq", bits=4, version="gemm"),
    "Qwen3-8B-FP8": quantised(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128]),
}
