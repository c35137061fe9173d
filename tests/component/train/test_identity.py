"""Which changes make another run."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from component.data.dataset import select_format
from component.model import load_tokenizer
from component.run.resume import differences
from component.settings.load import load_arguments
from component.train.identity import describe_format, describe_machine, describe_run, renew_identity
from component.trust import WHOLE, digest_of
from tests.component.data.test_chat_template import QWEN25, make_tokenizer
from tests.runs import ROWS, write_rows


@pytest.fixture
def identify(checkpoint, tmp_path):
    """The identity of a run with these settings."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def identity(**changes) -> dict:
        settings = {"output_dir": str(tmp_path), "model_name_or_path": str(checkpoint), "train_file": str(data)}
        args, training_args = load_arguments(None, [f"{k}={json.dumps(v)}" for k, v in (settings | changes).items()])
        data_format, _ = select_format(args.model_name_or_path, args.data_format, args.chat_template)
        return describe_run(args, training_args, data_format, load_tokenizer(args))

    return identity


@pytest.fixture
def describe_on_this_machine(checkpoint, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def describe(**changes) -> dict:
        settings = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(checkpoint), "train_file": str(data)}
        args, training_args = load_arguments(None, [f"{k}={json.dumps(v)}" for k, v in (settings | changes).items()])
        return describe_machine(args, training_args, load_tokenizer(args))

    return describe


def test_an_identity_is_json_and_the_same_each_time(identify):
    assert differences(identify(), json.loads(json.dumps(identify()))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "elsewhere"},
        {"logging_steps": 7, "save_steps": 9, "save_total_limit": 3, "report_to": "tensorboard"},
        {"dataloader_num_workers": 2, "preprocessing_workers": 1, "cache_size_limit": 1.5},
        {"on_bad_row": "skip", "disable_tqdm": True, "run_name": "x"},
    ],
)
def test_what_decides_no_number_may_change(identify, change):
    assert identify(**change) == identify()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"learning_rate": 1e-3},
        {"lora_rank": 8},
        {"lora_dropout": 0.2},
        {"base_bits": 16},
        {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 2},
        {"num_train_epochs": 5},
        {"max_seq_length": 77},
        {"packing_length": 2048},
        {"lr_scheduler_type": "cosine"},
        {"loss_on": "last"},
        {"max_grad_norm": 0.5},
        {"optim": "sgd"},
        {"data_format": "chatglm2"},
        {"adam_beta2": 0.98},
    ],
    ids=str,
)
def test_what_decides_a_number_is_another_run(identify, change):
    (line,) = differences(identify(), identify(**change))
    assert next(iter(change)).removeprefix("data_") in line


def test_keywords_of_the_schedule_decide_numbers(identify):
    cosine = {"lr_scheduler_type": "cosine"}
    (line,) = differences(identify(**cosine), identify(**cosine, lr_scheduler_kwargs={"num_cycles": 3}))
    assert "lr_scheduler_kwargs" in line


def test_evaluations_count_where_they_decide_which_model_is_the_best(identify, tmp_path):
    every = {"eval_file": str(tmp_path / "rows.jsonl"), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}
    best = every | {"save_strategy": "steps", "load_best_model_at_end": True}
    assert differences(identify(**every), identify(**every | {"eval_steps": 4})) == []
    assert differences(identify(**every), identify(**best)) == ["load_best_model_at_end: false then, true now"]
    assert differences(identify(**best), identify(**best | {"eval_steps": 4})) == ["eval_steps: 2 then, 4 now"]


def test_data_and_base_model_count_by_content_and_not_by_place(identify, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "moved" / checkpoint.name)
    moved = shutil.copy(tmp_path / "rows.jsonl", tmp_path / "moved" / "other.jsonl")
    assert identify(model_name_or_path=str(copy), train_file=str(moved)) == identify()
    with open(moved, "a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    (line,) = differences(identify(), identify(train_file=str(moved)))
    assert line.startswith("train_file: ")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    (line,) = differences(identify(), identify(model_name_or_path=str(copy)))
    assert line.startswith("model_name_or_path, weights or config.json: ")


def test_a_run_that_encoded_typed_control_tokens_otherwise_is_another_run():
    """An earlier version encoded them apart with every tokenizer, and recorded nothing of it."""
    plain = make_tokenizer(QWEN25, "<s>", "<|im_end|>", control=["<|im_start|>"])
    taking = make_tokenizer(QWEN25, "<s>", "<|im_end|>", control=[AddedToken("<|im_start|>", rstrip=True)])
    for tokenizer, changes in (
        (plain, ['control_tokens_in_texts: "encoded apart" then, "encoded with the text around them" now']),
        (taking, []),
    ):
        now = {"settings": {}, "format": describe_format("chat_template", tokenizer)}
        earlier = {"settings": {}, "format": {key: now["format"][key] for key in ("name", "tokenizer")}}
        found = differences(renew_identity(earlier), renew_identity(now))
        assert [line.removeprefix("format.") for line in found] == changes
        assert differences(renew_identity(now), now) == []


def test_other_formats_are_described_as_ever(tiny_tokenizer):
    described = describe_format("chatglm3", tiny_tokenizer)
    assert described.keys() == {"name", "tokenizer"}
    assert renew_identity({"settings": {}, "format": described})["format"] == described


def test_machines_must_have_the_same_adapter(describe_on_this_machine, checkpoint, adapter_folder):
    adapter = adapter_folder(checkpoint)
    here = describe_on_this_machine(adapter_name_or_path=str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    there = describe_on_this_machine(adapter_name_or_path=str(adapter))
    assert [key for key in here if here[key] != there[key]] == ["weights of adapter_name_or_path"]


def test_a_slow_tokenizer_counts_by_the_contents_of_its_file(identify, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "other" / checkpoint.name)
    with open(copy / "tokenizer.model", "ab") as file:
        file.write(b"\x1a\x00")  # an empty field of the format: the same pieces, another file
    assert differences(identify(), identify(model_name_or_path=str(copy))) == [
        "model_name_or_path, tokenizer: contents have changed"
    ]


@pytest.mark.parametrize("place", [0, 2 * WHOLE], ids=["head", "end"])
def test_a_change_in_a_large_file_of_weights_is_seen_at_its_head_and_end(tmp_path, place):
    path = tmp_path / "weights"
    path.touch()
    os.truncate(path, 2 * WHOLE + 1)
    before = digest_of(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert digest_of(path) != before
