import json
import os

import pytest

from component.run.errors import ArgumentError
from component.settings import foreign, legacy
from component.settings.load import known_settings

TABLES = {
    "renamed": foreign.RENAMED,
    "converted": foreign.CONVERTED,
    "always": foreign.ALWAYS,
    "elsewhere": foreign.ELSEWHERE,
    "without effect": foreign.WITHOUT_EFFECT,
    "older": legacy.RENAMED_KEYS,
}
OURS_TOO = {"target_modules", "eval_file", "bf16", "fp16"}  # keys of which other programs have more values

# What a file of a program says, and what that is here.
FILES = {
    "Firefly": (
        """{"template_name": "chatglm3", "train_mode": "qlora", "task_type": "sft", "use_unsloth": false,
"eval_file": "", "tokenize_num_workers": 4, "max_seq_length": 512, "peft_type": "lora", "beta": null}""",
        """{"data_format": "chatglm3", "eval_file": null, "preprocessing_workers": 4, "max_seq_length": 512}""",
    ),
    "LLaMA-Factory": (
        """{"stage": "sft", "do_train": true, "finetuning_type": "lora", "quantization_bit": 4, "lora_target": "all",
"template": "qwen", "cutoff_len": 2048, "overwrite_cache": true, "preprocessing_num_workers": 16,
"plot_loss": true, "val_size": 0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "flash_attn": "auto",
"trust_remote_code": true, "quantization_method": "bnb", "double_quantization": true, "lora_rank": 8,
"resume_from_checkpoint": null, "ddp_timeout": 180000000, "neat_packing": true, "packing": true}""",
        """{"target_modules": null, "data_format": "chat_template", "max_seq_length": 2048, "packing": true,
"preprocessing_workers": 16, "lora_rank": 8, "warmup_steps": 0.1}""",
    ),
    "ms-swift": (
        """{"tuner_type": "lora", "quant_method": "bnb", "quant_bits": 4, "torch_dtype": "bfloat16", "max_length": 600,
"target_modules": "all-linear", "lora_rank": 8, "lora_dropout_p": 0.1, "bnb_4bit_quant_type": "nf4",
"truncation_strategy": "delete", "dataset_num_proc": 2, "split_dataset_ratio": 0, "system": null,
"task_type": "causal_lm", "attn_impl": "flash_attn", "load_from_cache_file": true, "use_hf": true}""",
        """{"target_modules": null, "lora_dropout": 0.1, "max_seq_length": 600, "on_too_long": "drop",
"preprocessing_workers": 2}""",
    ),
    "axolotl": (
        """{"sequence_len": 256, "sample_packing": false, "micro_batch_size": 2, "num_epochs": 4, "lora_r": 32,
"adapter": "qlora", "load_in_4bit": true, "load_in_8bit": false, "lora_target_linear": true,
"lora_target_modules": null, "val_set_size": 0.0, "optimizer": "sgd", "lr_scheduler": "cosine",
"train_on_inputs": false, "bf16": "auto", "tf32": false, "special_tokens": null, "wandb_project": null,
"flash_attention": true, "pad_to_sequence_len": true, "fsdp": [], "deepspeed": null, "model_type": "x",
"gradient_checkpointing": true, "group_by_length": false, "early_stopping_patience": null,
"lora_model_dir": "someone/adapter"}""",
        """{"max_seq_length": 256, "packing": false, "per_device_train_batch_size": 2, "num_train_epochs": 4,
"lora_rank": 32, "target_modules": null, "optim": "sgd", "lr_scheduler_type": "cosine",
"train_sampling_strategy": "random", "adapter_name_or_path": "someone/adapter"}""",
    ),
    "TRL": (
        """{"max_length": 300, "packing": true, "load_in_4bit": true, "use_peft": true, "lora_r": 16, "dtype": "auto",
"lora_target_modules": ["dense"], "completion_only_loss": true, "assistant_only_loss": true,
"use_bnb_nested_quant": true, "activation_offloading": true, "eos_token": null, "loss_type": "nll",
"dataset_num_proc": 3, "packing_strategy": "bfd", "attn_implementation": "flash_attention_2"}""",
        """{"max_seq_length": 300, "packing": true, "lora_rank": 16, "target_modules": ["dense"],
"compute_dtype": "float32", "activation_checkpointing": "offload", "preprocessing_workers": 3}""",
    ),
}


def test_a_foreign_key_stands_in_one_table_and_is_no_key_of_ours():
    known = known_settings().keys() | legacy.fields.WITHOUT_EFFECT.keys()
    keys = {key for table in TABLES.values() for key in table}
    places = {key: [name for name, table in TABLES.items() if key in table] for key in keys}
    assert {key: found for key, found in places.items() if len(found) > 1} == {}
    foreign_keys = keys - legacy.RENAMED_KEYS.keys()
    assert foreign_keys & known == OURS_TOO


def test_what_keys_are_renamed_to_is_there():
    for name in (foreign.RENAMED | legacy.RENAMED_KEYS).values():
        assert name in known_settings() or name in ("HF_TOKEN", "TENSORBOARD_LOGGING_DIR")


@pytest.mark.parametrize("program", FILES)
def test_a_file_of_another_program_is_translated_and_every_line_said(load, log, program):
    written, expected = map(json.loads, FILES[program])
    args, training_args = load(**written)
    for key, value in expected.items():
        assert getattr(args if hasattr(args, key) else training_args, key) == value, key
    silent = {"eval_file", "lora_rank", "packing", "lr_scheduler_type", "max_seq_length", "tf32", "fsdp"}
    for key, value in written.items():
        if value and key not in silent and key not in known_settings():
            assert sum(f"args.json: {key}" in line for line in log) == 1, key


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("template_name", "chatglm2", 'template_name="chatglm2" is data_format="chatglm2" here'),
        ("template", "chatml", 'template="chatml" is chat_template="chatml" here'),
        ("chat_template_path", "t.jinja", "chat_template_path is called chat_template here"),
        ("template_name", "qwen", 'template_name="qwen" is data_format="chat_template" here'),
        ("lora_target", "all", 'lora_target="all" is target_modules=null here'),
        ("lora_target", "q_proj, v_proj", 'is target_modules=["q_proj", "v_proj"] here'),
        ("target_modules", ["all-linear"], 'target_modules=["all-linear"] is target_modules=null here'),
        ("mask_history", True, 'mask_history=true is loss_on="last" here'),
        ("shuffle_dataset", False, 'shuffle_dataset=false is train_sampling_strategy="sequential" here'),
        ("lora_model_dir", "someone/adapter", "lora_model_dir is called adapter_name_or_path here"),
        ("adapters", ["a/b"], 'adapters=["a/b"] is adapter_name_or_path="a/b" here'),
        ("adapters", "a/b", 'adapters="a/b" is adapter_name_or_path="a/b" here'),
        ("adapters", [], "adapters=[] has no effect here"),
        ("cutoff_len", 300, "cutoff_len is called max_seq_length here"),
        ("load_in_4bit", True, "load_in_4bit=true is base_bits=4 here"),
        ("load_in_4bit", False, "load_in_4bit=false is base_bits=16 here"),
        ("use_qlora", False, "use_qlora=false is base_bits=16 here"),
        ("q_lora", True, "q_lora=true is base_bits=4 here"),
        ("quantization", "nf4", 'quantization="nf4" is base_bits=4 here'),
        ("quantization_bit", "none", 'quantization_bit="none" is base_bits=16 here'),
        ("quant_bits", 0, "quant_bits=0 is base_bits=16 here"),
        ("quant_bits", 4, "quant_bits=4 is base_bits=4 here"),
        ("load_in_8bit", False, "load_in_8bit=false is always so here: a base has 4 bits here, or the 16"),
        ("bnb_4bit_quant_type", "nf4", 'bnb_4bit_quant_type="nf4" is always so here: 4 bits are always those of bits'),
        ("finetuning_type", "lora", 'finetuning_type="lora" is always so here: what is trained is a LoRA adapter'),
        ("use_unsloth", True, "use_unsloth has no effect here and is ignored: fused layers of our own"),
        ("per_gpu_train_batch_size", 3, "per_gpu_train_batch_size is now called per_device_train_batch_size"),
        ("group_by_length", True, 'group_by_length=true is train_sampling_strategy="group_by_length" here'),
    ],
)
def test_what_a_key_is_here_is_said_in_one_line(load, log, key, value, line):
    load(**{key: value})
    assert [entry for entry in log if f"args.json: {key}" in entry and line in entry]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"template_name": "default"},
            "a template 'default' does not exist here; set data_format to firefly or chat_template",
        ),
        ({"adapters": ["a", "b"]}, "a, b: a run begins from one adapter; merge the others into the base"),
        ({"adapters": 5}, "adapters must be text or a list, got 5 (int)"),
        ({"create_new_adapter": True}, "create_new_adapter is not supported: an adapter is trained further itself"),
        (
            {"resume_only_model": True},
            "resume_only_model is not supported: give the checkpoint's folder as adapter_name",
        ),
        ({"template": ""}, "a template '' does not exist here; set data_format to firefly or chat_template"),
        (
            {"truncation_strategy": "left"},
            "'left' is not done with long rows; set on_too_long to truncate, truncate_left",
        ),
        ({"train_mode": "full"}, 'train_mode="full" is not supported: what is trained is a LoRA adapter'),
        ({"finetuning_type": "freeze"}, 'finetuning_type="freeze" is not supported: what is trained is a LoRA'),
        ({"task_type": "dpo"}, 'task_type="dpo" is not supported: only supervised fine-tuning on conversations'),
        ({"stage": "pt"}, 'stage="pt" is not supported'),
        ({"load_in_8bit": True}, "load_in_8bit=true is not supported: a base has 4 bits here, or the 16 that it came"),
        ({"quantization_bit": 8}, "quantization_bit=8 is not supported: a base has 4 bits here, or the 16 that it"),
        ({"quant_bits": 1}, "quant_bits=1 is not supported"),
        ({"load_in_4bit": "yes"}, "load_in_4bit must be true or false, got 'yes' (str)"),
        ({"quant_method": "hqq"}, 'quant_method="hqq" is not supported: 4 bits are always those of bitsandbytes'),
        ({"load_in_4bit": True, "base_bits": 16}, "load_in_4bit and base_bits are one setting; keep one"),
        ({"train_on_prompt": True}, "train_on_prompt=true is not supported: only answers and calls are learned"),
        ({"dataset": "alpaca_en"}, "dataset is not supported: give the data's files in train_file"),
        ({"datasets": [{"path": "x"}]}, "datasets is not supported: give the data's files in train_file"),
        (
            {"val_size": 0.1},
            "val_size is not supported: give the rows to evaluate on as a file of their own",
        ),
        ({"system": "Be kind."}, "system is not supported: write it as a system turn"),
        ({"eos_token": "<|im_end|>"}, "eos_token is not supported: the tokenizer's own tokens are used"),
        ({"use_dora": True}, "use_dora is not supported: the adapter is plain LoRA"),
        ({"torchdynamo": "inductor"}, "torchdynamo is not supported"),
        ({"lora_target": 5}, "lora_target must be text or a list, got 5 (int)"),
        (
            {"lora_target": "all", "target_modules": ["dense"]},
            "lora_target and target_modules are one setting",
        ),
        ({"cutoff_len": 8, "max_seq_length": 9}, "cutoff_len and max_seq_length are one setting; keep one"),
        ({"cutoff_len": "8"}, "max_seq_length must be an integer, got '8' (str)"),
        ({"hf_hub_token": ["canary"]}, "hf_hub_token must be text or null, got list"),
        ({"lora_targt": "all"}, "unknown key 'lora_targt'; see docs/configuration.md"),  # not lora_dropout
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"train_fil": 5}, "unknown key 'train_fil'; see docs/configuration.md"),  # which is no number
    ],
)
def test_what_is_not_here_is_named_with_what_there_is_instead(load, settings, fault):
    with pytest.raises(ArgumentError) as error:
        load(**settings)
    assert f"args.json: {fault}" in str(error.value)
    assert "canary" not in str(error.value)


PLAIN_BASE = "is base_bits=16 here, since no key rounds the base; base_bits=4 takes about a quarter of its memory"


@pytest.mark.parametrize(
    ("settings", "overrides", "bits", "told"),
    [
        ({"finetuning_type": "lora"}, [], 16, f'finetuning_type="lora" {PLAIN_BASE}'),
        ({"finetuning_type": "lora"}, ["quantization_bit=null"], 16, ""),
        ({"use_peft": True}, [], 16, f"use_peft=true {PLAIN_BASE}"),
        ({"train_mode": "lora"}, [], 16, f'train_mode="lora" {PLAIN_BASE}'),
        ({"finetuning_type": "lora", "quantization_bit": 4}, [], 4, ""),
        ({"adapter": "lora", "load_in_4bit": True}, [], 4, ""),
        ({"adapter": "lora", "load_in_4bit": False}, [], 16, ""),
        ({"finetuning_type": "lora", "base_bits": 4}, [], 4, ""),
        ({"finetuning_type": "lora"}, ["base_bits=4"], 4, ""),
        ({"quantization_bit": 4}, ["finetuning_type=lora"], 4, ""),
        ({}, ["finetuning_type=lora"], 16, f'finetuning_type="lora" {PLAIN_BASE}'),
        ({"use_lora": True, "q_lora": True}, [], 4, ""),
        ({"train_mode": "qlora"}, [], 4, ""),
        ({"train_mode": "qlora", "use_peft": True}, [], 4, ""),
        ({"train_mode": "qlora"}, ["base_bits=16"], 16, 'train_mode="qlora" rounds the base, but base_bits=16 wins'),
        ({"peft_type": "LORA"}, [], 4, ""),
        ({}, [], 4, ""),
    ],
    ids=str,
)
def test_lora_without_a_word_of_rounding_means_a_base_that_is_not_rounded(load, log, settings, overrides, bits, told):
    assert load(*overrides, **settings)[0].base_bits == bits
    lines = [line for line in log if PLAIN_BASE in line or "wins: it is not rounded" in line]
    assert [told in line for line in lines] == [True] * bool(told)


def test_null_bits_mean_a_base_that_is_not_rounded(load, log, tmp_path):
    settings = {"output_dir": str(tmp_path), "model_name_or_path": "THUDM/chatglm3-6b", "quantization_bit": None}
    settings["train_file"] = str(tmp_path / "rows.jsonl")
    assert load(text=json.dumps(settings))[0].base_bits == 16
    assert any(f"quantization_bit=null {PLAIN_BASE}" in line for line in log)


@pytest.mark.parametrize("bits", [8, 0, 32])
def test_a_base_of_other_bits_is_refused_with_what_there_is(load, bits):
    remedy = r"base_bits must be 4 or 16 \(there are no 8 bits here: take 16 where it fits the card, else 4\), got"
    with pytest.raises(ArgumentError, match=f"{remedy} {bits}"):
        load(base_bits=bits)


def test_two_names_of_one_setting_may_say_the_same(load):
    assert load(cutoff_len=300, max_length=300)[0].max_seq_length == 300


def test_a_foreign_token_goes_to_the_environment(load, monkeypatch, log):
    monkeypatch.setenv("HF_TOKEN", "earlier")
    load(hf_hub_token="canary")
    assert os.environ["HF_TOKEN"] == "canary"
    assert "canary" not in "".join(log)


def test_a_foreign_key_on_the_command_line_wins_over_ours_in_the_file(load):
    assert load("cutoff_len=300", max_seq_length=200)[0].max_seq_length == 300
    assert load("lora_target=all", target_modules=["dense"])[0].target_modules is None


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run_name=1", "run_name", "1"),
        ("run_name=null", "run_name", None),
        ('run_name="a b"', "run_name", "a b"),
        ("run_name=NaN", "run_name", "NaN"),
        ("run_name=true", "run_name", "true"),
        ("run_name={}", "run_name", "{}"),
        ("run_name=", "run_name", ""),
        ("output_dir=2024", "output_dir", "2024"),
        ("--output_dir=1e3", "output_dir", "1e3"),
        ("base_model=7", "model_name_or_path", "7"),
        ("lora_alpha=32", "lora_alpha", 32),
        ("packing=false", "packing", False),
        ("data_format=null", "data_format", None),
        ("target_modules=null", "target_modules", None),
        ("resume_from_checkpoint=true", "resume_from_checkpoint", True),
        ("resume_from_checkpoint=12", "resume_from_checkpoint", "12"),
        ("lr_scheduler_type=cosine", "lr_scheduler_type", "cosine"),
        ("report_to=none", "report_to", []),
    ],
)
def test_an_override_is_read_by_the_type_of_its_key(load, override, key, value):
    args, training_args = load(override)
    found = getattr(args if hasattr(args, key) else training_args, key)
    assert (type(found), found) == (type(value), value) or found == value == "cosine"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["learning_rate=NaN"], "learning_rate: NaN is no JSON number"),
        (["learning_rate=Infinity"], "learning_rate: Infinity is no JSON number"),
        (["learning_rate=-1e999"], "learning_rate: -1e999 is no JSON number"),
        (["target_modules=[NaN]"], "target_modules: NaN is no JSON number"),
        (['train_file={"a": 1, "a": 2}'], "train_file: 'a' is given twice; keep one"),
        (["train_file=[1]"], "train_file must be text or a list of text or an object of numbers, got [1] (list)"),
        (["seed=1", "seed=2"], "'seed' is given twice; keep one"),
        (["seed=1", "--seed=1"], "'seed' is given twice; keep one"),
        (["packing=yes"], "packing must be true or false, got 'yes' (str)"),
        (["lora_rank=8.0"], "lora_rank must be an integer, got 8.0 (float)"),
        (["learning_rate="], "learning_rate must be a number, got '' (str)"),
        (["output_dir=null"], "output_dir must be given"),
    ],
)
def test_an_override_is_held_to_what_a_file_is_held_to(load, overrides, fault):
    with pytest.raises(ArgumentError) as error:
        load(*overrides)
    assert fault in str(error.value)


def test_a_key_in_capitals_is_no_environment_variable(load, monkeypatch):
    for key in ("LEARNING_RATE", "PYTHONSTARTUP"):
        monkeypatch.delenv(key, raising=False)
        with pytest.raises(ArgumentError, match=f"unknown key '{key}'"):
            load(**{key: 1e-5})
        assert key not in os.environ


def test_all_keys_that_are_not_here_are_named_at_once(load):
    with pytest.raises(ArgumentError) as error:
        load(max_samples=5, val_size=0.1)
    assert ["max_samples" in str(error.value), "val_size" in str(error.value)] == [True, True]
