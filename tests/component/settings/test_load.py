import json
import os
from pathlib import Path

import pytest
import torch

from component.data.dataset import select_format
from component.run.errors import ArgumentError
from component.settings.load import load_arguments, missing_folder
from component.settings.machine import check_card, choose_compute_dtype

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "train_args/qlora").glob("*.json"))


def test_fireflys_published_files_load_unchanged(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("dummy_data.jsonl", "dummy_data_chatglm3.jsonl"):
        (tmp_path / "data" / name).touch()
    files = sorted((shared / "data/firefly_train_args").glob("*sft*.json"))
    assert len(files) == 17
    for file in files:
        args, training_args = load_arguments(file)
        published = json.loads(file.read_text())
        assert args.max_seq_length == published["max_seq_length"]
        assert args.lora_rank == published.get("lora_rank", 64)
        for key in ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"):
            assert getattr(training_args, key) == published[key]
        assert args.activation_checkpointing == ("full" if published["gradient_checkpointing"] else "none")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_file_parses_and_routes(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("component.settings.load.missing_folder", lambda name: None)  # of the demo, if it has not run
    args, training_args = load_arguments(file)
    expected = next((name for name in ("chatglm2", "chatglm3") if name in file.name), "firefly")
    assert select_format(args.model_name_or_path)[0] == expected
    assert "chatglm3" in args.train_file or expected != "chatglm3"
    assert training_args.output_dir.startswith("output/")
    assert args.lora_rank == 64


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora_rnk": 8}, "unknown key 'lora_rnk'; did you mean 'lora_rank'?"),
        ({"qqqqqq": 8}, "unknown key 'qqqqqq'; see docs/configuration.md"),
        ({"lora_rank": "8"}, "lora_rank must be an integer, got '8' (str)"),
        ({"lora_rank": True}, "lora_rank must be an integer, got True (bool)"),
        ({"lora_rank": 0}, "lora_rank must be a positive integer, got 0 (int)"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0 (float)"),
        ({"target_modules": []}, "target_modules must be a list of names, or null"),
        ({"target_modules": "dense"}, "target_modules must be a list of text or null, got 'dense' (str)"),
        ({"train_file": {"a.jsonl": "3"}}, "train_file must be text or a list of text or an object of numbers, got"),
        ({"compute_dtype": "bf16"}, "compute_dtype must be one of auto, bfloat16, float16, float32, got 'bf16' (str)"),
        ({"data_format": "glm"}, "data_format must be one of chatglm2, chatglm3, firefly"),
        ({"learning_rate": "2e-4"}, "learning_rate must be a number, got '2e-4' (str)"),
        ({"learning_rate": -1}, "learning_rate must be at least 0 and below 1e30, got -1 (int)"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be above 0, got 0 (int)"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be above 0, got 0 (int)"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0 and below a million, got 0 (int)"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type must be one of linear, cosine"),
        ({"fp16": 1}, "fp16 must be true or false, got 1 (int)"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 are both true; keep one"),
        ({"train_file": "nowhere.jsonl"}, "train_file: no file 'nowhere.jsonl'"),
        ({"eval_file": "nowhere.jsonl"}, "eval_file: no file 'nowhere.jsonl'"),
        ({"train_file": None}, "train_file must be given"),
        ({"model_name_or_path": None}, "model_name_or_path must be given"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path: no folder ./nowhere in /"),
        ({"output_dir": None}, "output_dir must be given"),
        ({"eval_strategy": "epoch"}, "give eval_file, or set eval_strategy to 'no'"),
        ({"load_best_model_at_end": True}, "needs eval_file, to tell which model is the best"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "needs eval_file, to tell which model"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio and warmup_steps are one setting; keep one"),
        ({"torch_compile": True}, "torch_compile is not supported: the fused layers"),
        ({"log_level": "loud"}, "log_level must be one of detail, debug, info,"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be one of random, sequential, group_by_length, got"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model must be one of loss, eval_loss, got 'accuracy'"),
        ({"dataloader_multiprocessing_context": "thread"}, "must be one of fork, spawn, forkserver, got 'thread'"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be at least 0 and below 1, got 1.5 (float)"),
        (
            {"max_steps": 0},
            "max_steps must be from 1 to a billion, or -1 for as many as num_train_epochs make",
        ),
        ({"seed": 2**40}, "seed must be from 0 to 4294967295"),
        ({"report_to": "json"}, "report_to: no tracker is called 'json'; there are azure_ml,"),
        ({"save_strategy": "best"}, "save_strategy 'best' needs eval_file"),
        ({"eval_on_start": True}, "give eval_file, or set eval_strategy to 'no'"),
        ({"text": '{"seed": 1,\n "seed": 2}'}, "'seed' is given twice; keep one"),
        ({"text": '{"seed": 1,\n "seed" 2}'}, "args.json:2:9: not JSON"),
        ({"text": '{"learning_rate": NaN}'}, "NaN is no JSON number"),
        ({"text": '{"learning_rate": 1e999}'}, "1e999 is no JSON number, or too large a one"),
        ({"text": '{"train_file": {"a": 1, "a": 2}}'}, "'a' is given twice; keep one"),
        ({"text": "[]"}, "must hold one JSON object"),
    ],
)
def test_each_fault_is_one_error_that_names_file_and_key(load, changes, fault):
    with pytest.raises(ArgumentError) as error:
        load(**changes)
    assert "args.json" in str(error.value)
    assert fault in str(error.value)


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_file_of_yaml_is_told_to_be_written_as_json(tmp_path, suffix):
    file = (tmp_path / "lf").with_suffix(suffix)
    file.write_text("### model\nmodel_name_or_path: a\n")
    with pytest.raises(ArgumentError) as error:
        load_arguments(file)
    fault = "1:1: not JSON (Expecting value); write the keys of this YAML as one JSON object"
    assert str(error.value) == f"{file}:{fault}"


@pytest.mark.parametrize("wrap", [str, lambda path: [path], lambda path: {path: 1.0}], ids=["text", "list", "mixture"])
@pytest.mark.parametrize("written", ["output_dir", "cache_dir"])
def test_what_a_run_writes_does_not_lie_in_a_folder_of_data(load, tmp_path, monkeypatch, written, wrap):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(data / "deep")
    for inside in (data, data / "new/run", tmp_path / "link/run", "~/data/run"):
        with pytest.raises(ArgumentError, match=rf"args\.json: {written}: {inside} lies in train_file {data}, where"):
            load(train_file=wrap(str(data)), **{written: str(inside)})
    load(train_file=wrap(str(data / "*.jsonl")), **{written: str(data / "run")})
    load(train_file=wrap(str(data)), **{written: str(tmp_path / "data2")})
    if wrap is str:
        with pytest.raises(ArgumentError, match=f"{written}: {data}/x lies in eval_file {data}"):
            load(eval_file=str(data), **{written: f"{data}/x"})


def test_data_in_an_output_folder_that_may_be_moved_is_refused_by_whatever_name(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path), "~", "~/../" + tmp_path.name):
        with pytest.raises(ArgumentError, match=r"rows\.jsonl lies in output_dir, which overwrite_output_dir may move"):
            load(output_dir=name, overwrite_output_dir=True)
    assert load(output_dir="~/out")[1].output_dir == str(tmp_path / "out")


def test_a_folder_of_models_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chatglm3-tiny", "b", "a"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models/weights.safetensors").touch()
    (tmp_path / "THUDM/chatglm2-6b").mkdir(parents=True)
    there, hub = "(in models: a, b, chatglm3-tiny)", "; if you mean the hub, start from a folder without 'THUDM'"
    for name, fault in {
        "models/chatglm3-tyni": f" in {tmp_path}; did you mean models/chatglm3-tiny? {there}",
        "models/chatglm3-tyni/": f" in {tmp_path}; did you mean models/chatglm3-tiny? {there}",
        "models/weights.safetensors": f" in {tmp_path} {there}",
        f"{tmp_path}/models/qwen": f" (in {tmp_path}/models: a, b, chatglm3-tiny)",
        "./models/aa": f" in {tmp_path}; did you mean ./models/a? (in ./models: a, b, chatglm3-tiny)",
        "THUDM/chatglm3-6b": f" in {tmp_path}; did you mean THUDM/chatglm2-6b? (in THUDM: chatglm2-6b){hub}",
        "modles/some/thing": f" in {tmp_path}",
        "/nowhere/a": "",
        "~/models/a": f" in {tmp_path}; write the home folder out",
    }.items():
        assert missing_folder(name) == f"no folder {name}{fault}"
    for name in ("models/a", str(tmp_path), ".", "Qwen/Qwen3-8B", "modles/a", "gpt2"):
        assert missing_folder(name) is None
    for i in range(20):
        (tmp_path / "models" / f"m{i:02}").mkdir()
    assert "chatglm3-tiny, m00, m01, m02, m03, m04, m05, m06 …)" in missing_folder("models/x")
    monkeypatch.chdir("/")
    assert missing_folder("models/chatglm3-tiny").startswith("no folder models/chatglm3-tiny in /"), "from anywhere"


def test_an_adapter_is_no_base_model(load, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ArgumentError, match="is an adapter; give its base model"):
        load(model_name_or_path=str(tmp_path))


def test_a_missing_file_and_a_malformed_override_are_errors(load, tmp_path):
    with pytest.raises(ArgumentError, match=r"nowhere\.json: cannot be read"):
        load_arguments(tmp_path / "nowhere.json")
    with pytest.raises(ArgumentError, match="'lora_rank': an override is key=value"):
        load("lora_rank")


def test_old_keys_are_translated(load, tmp_path, monkeypatch, log):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    args, training_args = load(
        evaluation_strategy="steps",
        eval_file=str(tmp_path / "rows.jsonl"),
        eval_steps=7,
        warmup_ratio=0.25,
        no_cuda=True,
        group_by_length=True,
        overwrite_output_dir=True,
        save_safetensors=True,
        per_gpu_train_batch_size=3,
        optim="adamw_hf",
        logging_dir="somewhere",
        deepspeed="ds.json",
    )
    assert training_args.eval_strategy == "steps"
    assert training_args.get_warmup_steps(100) == 25
    assert training_args.train_sampling_strategy == "group_by_length"
    assert training_args.per_device_train_batch_size == 3
    assert training_args.optim == "adamw_torch"
    assert args.overwrite_output_dir
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "somewhere"
    assert any("evaluation_strategy is now called eval_strategy" in line for line in log)
    assert any("deepspeed has no effect here and is ignored: every process holds" in line for line in log)


def test_overrides_win_over_the_file_also_under_an_old_name(load):
    args, training_args = load(
        "lora_rank=8", "warmup_ratio=0.1", "output_dir=x", 'target_modules=["dense"]', warmup_steps=9
    )
    assert (args.lora_rank, training_args.warmup_steps, training_args.output_dir) == (8, 0.1, "x")
    assert args.target_modules == ["dense"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_half_precision_and_paged_optimizers_fall_back_and_say_so(load, log):
    args, training_args = load(fp16=True, optim="paged_adamw_32bit")
    assert (args.compute_dtype, training_args.fp16, training_args.optim) == ("float32", False, "adamw_torch")
    assert any("half precision needs CUDA; computing in float32" in line for line in log)
    assert any("optim=paged_adamw_32bit needs CUDA; using adamw_torch" in line for line in log)


@pytest.mark.parametrize(
    ("requested", "values", "has_bf16", "chosen"),
    [
        ("auto", {}, True, "bfloat16"),
        ("auto", {}, False, "float16"),
        ("auto", {"fp16": True}, True, "bfloat16"),
        ("float16", {"fp16": True}, True, "float16"),
        ("float32", {}, True, "float32"),
        ("auto", {"bf16": True}, True, "bfloat16"),
        ("auto", {"bf16": True}, False, None),
        ("bfloat16", {}, False, None),
    ],
)
def test_the_card_decides_the_compute_dtype(monkeypatch, requested, values, has_bf16, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if chosen is None:
        with pytest.raises(ValueError, match="Tesla T4 has no bfloat16; set compute_dtype to float16"):
            choose_compute_dtype(requested, values, has_cuda=True)
    else:
        assert choose_compute_dtype(requested, values, has_cuda=True) == chosen


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of which torch 2.13's own build is


@pytest.mark.parametrize(
    ("capability", "built", "remedy"),
    [
        ((7, 0), CUDA_13, "torch's build for CUDA 12.6"),  # V100
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], None),
        ((7, 5), CUDA_13, None),
        ((8, 9), CUDA_13, None),  # by the code for sm_86
        ((8, 0), ["sm_86"], "a newer torch"),
        ((9, 0), ["sm_90a"], None),
        ((12, 0), ["sm_80", "sm_90"], "a newer torch"),
        ((12, 0), ["sm_80", "compute_90"], None),
        ((9, 4), ["gfx942"], None),  # not NVIDIA's
    ],
)
def test_a_card_that_torch_is_not_built_for_is_refused_with_the_remedy(load, monkeypatch, capability, built, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the card")
    if remedy is None:
        check_card()
    else:
        number = ".".join(map(str, capability))
        with pytest.raises(
            ArgumentError, match=f"the card has compute capability {number}, but torch .*install {remedy}"
        ):
            load()


def test_an_eval_file_turns_evaluation_on(load, tmp_path):
    file = str(tmp_path / "rows.jsonl")
    assert load(eval_file=file)[1].eval_strategy == "epoch"
    assert load(eval_file=file, eval_steps=5)[1].eval_strategy == "steps"
    assert load()[1].eval_strategy == "no"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("steps", 500)),
        ({"save_steps": 30}, ("steps", 30)),
        ({"save_steps": 0.3, "eval_steps": 0.1}, ("steps", 0.1)),
        ({"eval_strategy": "steps", "logging_steps": 7}, ("steps", 500)),
        ({"eval_steps": 100}, ("steps", 100)),
        ({"save_strategy": "epoch"}, ("epoch", None)),
        ({"save_strategy": "best"}, ("epoch", None)),
        ({"save_strategy": "best", "eval_steps": 7}, ("steps", 7)),
    ],
)
def test_the_best_model_is_looked_for_among_the_checkpoints(load, tmp_path, changes, expected):
    _, training_args = load(eval_file=str(tmp_path / "rows.jsonl"), load_best_model_at_end=True, **changes)
    assert (training_args.eval_strategy, training_args.eval_steps) == expected


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch' and save_strategy 'steps'; set both to"),
        ({"eval_steps": 50, "save_strategy": "epoch"}, "eval_strategy is 'steps' and save_strategy 'epoch'"),
        ({"save_strategy": "no"}, "and save_strategy 'no'"),
        ({"save_strategy": "no", "eval_strategy": "no"}, "eval_strategy is 'no' and save_strategy 'no'"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "eval_strategy is 'no' and save_strategy 'best'"),
        ({"eval_steps": 7}, "eval_steps is 7 and save_steps 500, which is no multiple of it"),
        ({"eval_steps": 7, "save_steps": 3}, "eval_steps is 7 and save_steps 3,"),
        ({"eval_steps": 0.1, "save_steps": 3}, "eval_steps is 0.1 and save_steps 3,"),
    ],
)
def test_checkpoints_that_nothing_evaluates_are_refused_where_the_best_is_asked_for(load, tmp_path, changes, fault):
    with pytest.raises(ArgumentError, match=r"args\.json: load_best_model_at_end needs") as error:
        load(eval_file=str(tmp_path / "rows.jsonl"), load_best_model_at_end=True, **changes)
    assert fault in str(error.value)


def test_a_token_in_the_file_goes_to_the_environment_and_into_no_settings(load, monkeypatch, log):
    monkeypatch.setenv("HF_TOKEN", "earlier")
    _, training_args = load(hub_token="canary")
    assert os.environ["HF_TOKEN"] == "canary"
    assert training_args.hub_token is None
    assert "hub_token is now the environment variable HF_TOKEN" in "".join(log)
    assert "canary" not in "".join(log)
    with pytest.raises(ArgumentError, match=r"hub_token must be text or null, got list$"):
        load(hub_token=["canary"])


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ({}, [], (True, None, True)),
        ({"pack_to": 0}, [], (False, None, True)),
        ({"pack_to": 4096}, [], (True, 4096, True)),
        ({"pack_to": 4096}, ["pack_to=0"], (False, None, True)),
        ({"pack_to": 0}, ["packing_length=4096"], (True, 4096, True)),
        ({"packing_length": 4096}, ["packing=false"], (False, None, True)),
        ({"packing_length": 4096}, ["fused_layers=false"], (True, 4096, False)),
        ({"packing_length": 4096, "packing": False}, [], "packing_length needs packing, which is false"),
        ({"packing": False, "pack_to": 4096}, [], "packing and pack_to are one setting"),
        ({"packing_length": 512}, [], "packing_length must be at least max_seq_length=1024"),
        ({"packing_length": 0}, [], "packing_length must be a positive integer, got 0"),
        ({"pack_to": 0.0}, [], "pack_to must be an integer, got 0.0"),
    ],
)
def test_rows_are_laid_out_as_file_and_overrides_say_also_under_the_older_name(load, file, overrides, expected):
    if isinstance(expected, str):
        with pytest.raises(ArgumentError, match=expected):
            load(*overrides, **file)
    else:
        args, _ = load(*overrides, **file)
        assert (args.packing, args.packing_length, args.fused_layers) == expected


def test_an_order_of_rows_that_a_stream_cannot_have_is_said(load, log):
    load(streaming=True, max_steps=5, group_by_length=True)
    assert "train_sampling_strategy=group_by_length needs rows that are known beforehand" in "".join(log)


def test_a_rank_that_takes_prepared_data_from_rank_0_needs_no_file_of_it(load, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(train_file="nowhere.jsonl")
    with pytest.raises(ArgumentError, match=r"train_file: no file 'nowhere\.jsonl'"):
        load(train_file="nowhere.jsonl", streaming=True, max_steps=1)


def test_settings_are_read_together_before_what_waits_for_other_processes(load, tmp_path, monkeypatch):
    load()
    monkeypatch.setattr("transformers.TrainingArguments.__init__", lambda *args, **values: pytest.fail("made"))

    def refuse(read):
        assert read()[0].lora_rank == 64
        raise ArgumentError("rank 1 on b: a fault")

    with pytest.raises(ArgumentError, match="rank 1 on b: a fault"):
        load_arguments(tmp_path / "args.json", together=refuse)


def test_early_stopping_looks_at_evaluations_and_keeps_the_best(load, tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    args, training_args = load(eval_file=rows, early_stopping_patience=2)
    assert (args.early_stopping_patience, args.early_stopping_threshold) == (2, 0.0)
    assert training_args.load_best_model_at_end
    assert training_args.eval_strategy == training_args.save_strategy == "epoch"
    _, training_args = load(eval_file=rows, early_stopping_patience=2, save_steps=50)
    assert training_args.eval_strategy == training_args.save_strategy == "steps"
    assert training_args.eval_steps == 50
    assert load(eval_file=rows, early_stopping_steps=3)[0].early_stopping_patience == 3  # LLaMA-Factory's name
    for settings, fault in (
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_file"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold has no effect without early_stopping_patience"),
        (
            {"early_stopping_patience": 0, "eval_file": rows},
            "early_stopping_patience must be a positive integer, got 0",
        ),
        (
            {"early_stopping_patience": 1, "eval_file": rows, "load_best_model_at_end": False},
            "load_best_model_at_end is false; remove one of them",
        ),
    ):
        with pytest.raises(ArgumentError, match=fault):
            load(**settings)


def test_epochs_that_a_number_of_steps_overrules_are_named(load, log):
    load(num_train_epochs=3, max_steps=5)
    assert "num_train_epochs=3 has no effect: max_steps=5 decides" in "".join(log)


@pytest.mark.parametrize(
    "settings", [{"num_train_epochs": 1e308}, {"max_steps": 10**18}, {"learning_rate": 1e300}, {"save_total_limit": -3}]
)
def test_numbers_beyond_all_use_are_refused(load, settings):
    with pytest.raises(ArgumentError, match=f"{next(iter(settings))} must be "):
        load(**settings)
