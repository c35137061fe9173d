"""An adapter under GLM's names computes what it computes under ChatGLM's, and our programs take it as one of theirs."""

import itertools
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.export.adapter import count_under_glm, run_under_glm, write_glm_adapter
from component.export.glm import write_glm
from component.export.merge import merged_model
from component.export.weights import ChatGLMWeights
from component.inference.session import Session
from component.model import check_beginning, read_training
from component.run.manifest import seal
from component.settings.schema import QLoRAArguments
from component.trust import check_adapter, identify_base, read_run

IDS = torch.arange(3, 43).reshape(2, 20)
KINDS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
SUBSETS = [list(kinds) for size in range(1, 5) for kinds in itertools.combinations(KINDS, size)]


@pytest.fixture
def export(tmp_path):
    """Writes a base and its adapter as GLM; returns both folders."""

    def write(base, adapter):
        folders = tmp_path / "glm", tmp_path / "glm-adapter"
        for folder in folders:
            folder.mkdir()
        weights = ChatGLMWeights(str(base), torch.float32)
        write_glm(weights, folders[0], [2])
        write_glm_adapter(adapter, weights.config, folders[1])
        seal(folders[1], {"run": run_under_glm(adapter)})
        return folders

    return write


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def adapted(base, adapter) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def check_equal(base, adapter, export) -> dict:
    """Check that logits are equal; returns the exported adapter's settings."""
    file = adapter / "adapter_model.safetensors"
    torch.manual_seed(2)
    weights = {name: weight + 0.05 * torch.randn(weight.shape) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    glm, moved = export(base, adapter)
    ours = adapted(base, adapter)
    assert torch.equal(ours, adapted(glm, moved))
    assert (ours - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    return check_adapter(moved)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_the_logits_are_equal(model_folder, adapter_folder, export, changes):
    base = model_folder()
    adapter = adapter_folder(base, target_modules=[*KINDS], lora_alpha=6, task_type="CAUSAL_LM", **changes)
    settings = check_equal(base, adapter, export)
    assert settings["target_modules"] == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    before = check_adapter(adapter)
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "task_type")
    assert {key: settings[key] for key in kept} == {key: before[key] for key in kept}


def test_layers_that_are_adapted_here_and_there_have_whole_names(model_folder, adapter_folder, export):
    base = model_folder()
    targets = ["layers.0.self_attention.query_key_value", "layers.1.self_attention.dense", "output_layer"]
    targets += ["word_embeddings", "dense_4h_to_h"]
    settings = check_equal(base, adapter_folder(base, target_modules=targets, task_type="CAUSAL_LM"), export)
    attention = [f"model.layers.{place}_proj" for place in ("0.self_attn.k", "0.self_attn.q", "0.self_attn.v")]
    attention.append("model.layers.1.self_attn.o_proj")
    assert settings["target_modules"] == ["down_proj", "embed_tokens", "lm_head", *attention]


@pytest.mark.slow
@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
@pytest.mark.parametrize(
    "shape",
    [
        {"multi_query_attention": False, "add_qkv_bias": False},
        {"num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 20, "hidden_size": 37},
    ],
    ids=["without groups", "odd"],
)
@pytest.mark.parametrize("dora", [False, True])
def test_the_logits_are_equal_for_every_choice_of_layers(tmp_path, adapter_folder, export, targets, shape, dora):
    torch.manual_seed(0)
    sizes = {"padded_vocab_size": 301, "hidden_size": 64, "ffn_hidden_size": 47, "num_layers": 2, "kv_channels": 16}
    sizes |= {"num_attention_heads": 4, "initializer_range": 0.3} | shape
    ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes)).save_pretrained(tmp_path / "base")
    changes = {"target_modules": targets, "task_type": "CAUSAL_LM", "use_dora": dora}
    check_equal(tmp_path / "base", adapter_folder(tmp_path / "base", **changes), export)


RUN = {"settings": {"base_bits": 4, "compute_dtype": "float32"}, "data": "d", "world_size": 1}


def trained(adapter, base):
    described = {"format": {"name": "chatglm3", "tokenizer": "t"}, "base_model": identify_base(str(base))}
    seal(adapter, {"run": RUN | described})
    return adapter


def test_our_programs_know_how_its_base_was_loaded(model_folder, adapter_folder, export, log):
    base = model_folder()
    adapter = trained(adapter_folder(base), base)
    glm, moved = export(base, adapter)
    assert read_run(moved) == RUN | {"format": {"name": "chat_template"}}
    assert read_training(moved) == (4, torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder("llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(glm)
    session = Session.open(str(glm), moved, dtype=torch.float32)
    assert (session.base_bits, session.data_format) == (4, "chat_template")
    merged = logits(merged_model(str(glm), moved, "full"))
    assert (merged - adapted(base, adapter)).abs().max() < 1e-5
    args = QLoRAArguments(str(glm), train_file="x", adapter_name_or_path=str(moved), lora_rank=4)
    settings = check_adapter(moved)
    args.lora_alpha, args.target_modules = settings["lora_alpha"], settings["target_modules"]
    args.lora_dropout = settings["lora_dropout"]
    log.clear()
    check_beginning(args, identify_base(str(glm)), {"name": "chat_template", "tokenizer": "another"})
    assert log == []


def test_it_names_nothing_of_its_former_base(model_folder, adapter_folder, export):
    base = model_folder()
    adapter = adapter_folder(base)
    own = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(own | {"revision": "v1.0"}))
    _, moved = export(base, adapter)
    settings = json.loads((moved / "adapter_config.json").read_text())
    assert [settings[key] for key in ("base_model_name_or_path", "revision")] == [None] * 2
    (moved / "plain").touch()
    assert {path.stat().st_mode for path in moved.iterdir()} == {(moved / "plain").stat().st_mode}


def test_an_adapter_of_another_tool_has_no_run(model_folder, adapter_folder, export):
    base = model_folder()
    _, moved = export(base, adapter_folder(base))
    assert (check_adapter(moved)["r"], read_run(moved), read_training(moved)) == (4, {}, (None, None))


def test_its_numbers_are_counted_before_it_is_written(model_folder, adapter_folder, export):
    base = model_folder()
    adapter = adapter_folder(base, target_modules=["word_embeddings", "query_key_value"], task_type="CAUSAL_LM")
    _, moved = export(base, adapter)
    numbers = sum(weight.numel() for weight in load_file(moved / "adapter_model.safetensors").values())
    assert count_under_glm(adapter, AutoConfig.from_pretrained(base)) == numbers
