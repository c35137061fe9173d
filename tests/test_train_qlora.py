"""The whole job on a model of a few thousand parameters, through its own command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_qlora
from component.kernel import memory
from component.kernel.model import PackedForward

from .runs import ROWS, adapter, largest_difference, losses, write_rows

ROOT = Path(__file__).parents[1]


def test_a_run_leaves_an_adapter_a_tokenizer_and_a_picture_and_no_pickle(job):
    folder = job(max_steps=12, report_to="tensorboard")
    assert losses(folder)[-1] < losses(folder)[0] / 2
    final = {path.name for path in (folder / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.model"} <= final
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "runs").rglob("events.out.tfevents*"))
    assert all("lora_" in name for name in adapter(folder / "final"))
    assert all(weight.dtype == torch.float32 for weight in adapter(folder / "final").values())


def test_the_official_snippet_chats_with_the_adapter(job, checkpoint):
    from peft import PeftModel

    rows = [
        {"conversations": [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "word word"}]}
    ] * 4
    folder = job(rows=rows, max_steps=60, logging_steps=20)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    model = PeftModel.from_pretrained(model, folder / "final").eval()
    response, history = model.chat(tokenizer, "Say 3", history=[], do_sample=False, max_new_tokens=20)
    assert response == "word word"
    assert history[-1] == {"role": "assistant", "metadata": "", "content": "word word"}


def test_every_linear_layer_of_the_body_is_adapted_and_the_head_is_not(job):
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter(job() / "final")}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_four_accumulated_batches_of_one_equal_one_batch_of_four(job):
    whole = job("whole", per_device_train_batch_size=4, optim="sgd")
    parts = job("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, optim="sgd")
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-6)
    assert largest_difference(whole, parts) <= 1e-6
    assert max(weight.abs().max() for name, weight in adapter(whole / "final").items() if "lora_B" in name) > 1e-4


@pytest.mark.parametrize("bits", [4, 16])
def test_packed_rows_equal_padded_batches(job, bits):
    settings = {"optim": "sgd", "max_seq_length": 64, "base_bits": bits}
    padded = job("padded", **settings, packing=False, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    packed = job("packed", **settings, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    rows = job("rows", **settings, packing_length=64)
    for other in (packed, rows):
        assert losses(padded) == pytest.approx(losses(other), abs=1e-5)
        assert largest_difference(padded, other) <= 1e-5


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["padded", "packed"])
def test_checkpointing_changes_no_weight(job, packing):
    settings = {"packing": packing, "lora_dropout": 0.0}
    kept = job("kept", **settings)
    for name in ("selective", "full", "offload"):
        again = job(name, **settings, activation_checkpointing=name)
        assert largest_difference(kept, again) <= 1e-6
    old = job("old", **settings, gradient_checkpointing=True)
    assert largest_difference(kept, old) <= 1e-6


def test_length_grouping_is_exact_on_resume(job):
    settings = {"max_steps": 6, "group_by_length": True, "packing": False, "save_strategy": "steps", "save_steps": 2}
    settings |= {"per_device_train_batch_size": 3, "lora_dropout": 0.1}
    whole = job("whole", **settings)
    resumed = job("resumed", **settings)
    for name in ("checkpoint-4", "checkpoint-6", "final"):
        (resumed / name).rename(resumed / f"old-{name}")
    job("resumed", **settings, resume_from_checkpoint=True)
    assert largest_difference(whole, resumed) == 0


def run_on_two_ranks(
    tmp_path: Path, settings: dict, program: str = "train_qlora.py", *options: str
) -> subprocess.CompletedProcess:
    """The command under torchrun; its output folder is tmp_path / "ranks"."""
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(settings | {"output_dir": str(tmp_path / "ranks")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    done = subprocess.run(
        [*command, "--train_args_file", str(file), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("bits", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process_with_the_same_global_batch(job, tmp_path, bits):
    whole = job("whole", per_device_train_batch_size=4, optim="sgd", base_bits=bits)
    settings = json.loads((tmp_path / "whole.json").read_text())
    settings |= {"per_device_train_batch_size": 2, "eval_file": settings["train_file"]}
    done = run_on_two_ranks(tmp_path, settings)
    assert losses(whole) == pytest.approx(losses(tmp_path / "ranks"), abs=1e-5)
    assert largest_difference(whole, tmp_path / "ranks") <= 1e-5
    assert done.stderr.count("training from the base model") == 1  # rank 0 alone speaks
    assert done.stderr.count("an update is 4 samples: 2 processes x 2 x 1 (per_device_train_batch_size x") == 1


@pytest.mark.slow
def test_two_ranks_begin_from_an_adapter_as_one_process_does(job, tmp_path):
    first = job("first", learning_rate=0.05)
    settings = {"adapter_name_or_path": str(first / "final"), "optim": "sgd"}
    whole = job("whole", per_device_train_batch_size=4, **settings)
    run_on_two_ranks(tmp_path, json.loads((tmp_path / "whole.json").read_text()) | {"per_device_train_batch_size": 2})
    assert losses(whole) == pytest.approx(losses(tmp_path / "ranks"), abs=1e-5)
    assert largest_difference(whole, tmp_path / "ranks") <= 1e-5


def test_the_short_update_at_an_epochs_end_is_that_of_padded_batches(job, tmp_path):
    settings = {"optim": "sgd", "max_seq_length": 64, "per_device_train_batch_size": 1, "max_steps": 3}
    settings |= {"gradient_accumulation_steps": 8, "rows": ROWS[:11]}
    for drop_last in (False, True):
        padded = job(f"padded-{drop_last}", **settings, packing=False, dataloader_drop_last=drop_last)
        packed = job(f"packed-{drop_last}", **settings, dataloader_drop_last=drop_last)
        assert losses(padded) == pytest.approx(losses(packed), abs=1e-5)
        assert largest_difference(padded, packed) <= 1e-5


@pytest.mark.slow
def test_ranks_may_have_different_numbers_of_rows(job, tmp_path):
    settings = {"max_seq_length": 24, "packing_length": 24, "optim": "sgd"}
    whole = job("whole", per_device_train_batch_size=4, **settings)
    written = json.loads((tmp_path / "whole.json").read_text())
    run_on_two_ranks(tmp_path, written | {"per_device_train_batch_size": 2})
    assert losses(whole) == pytest.approx(losses(tmp_path / "ranks"), abs=1e-5)
    assert largest_difference(whole, tmp_path / "ranks") <= 1e-5


SLOW_RENDERING = """if True:
    import sys, time
    import component.data.prepare as prepare, train_qlora
    fit = prepare.RowRenderer.fit_to_length
    prepare.RowRenderer.fit_to_length = lambda *args: (time.sleep(1), fit(*args))[1]
    train_qlora.main()
"""


@pytest.mark.slow
def test_ranks_wait_for_slow_data_longer_than_a_collective_may_take(job, tmp_path):
    """Case 39 of the reliability scorecard, with its numbers made small: 12 s of rendering, 10 s of timeout."""
    job("written", dry_run=True)
    settings = json.loads((tmp_path / "written.json").read_text())
    settings |= {"ddp_timeout": 10, "max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "slow.py").write_text(SLOW_RENDERING)
    run_on_two_ranks(tmp_path, settings, str(tmp_path / "slow.py"))
    assert (tmp_path / "ranks/final/adapter_model.safetensors").exists()


def test_a_stream_trains_on_one_process_and_on_two(job, tmp_path):
    """One update of all rows, of which each rank has every other."""
    settings = {"streaming": True, "max_steps": 3, "per_device_train_batch_size": len(ROWS), "optim": "sgd"}
    whole = job("whole", **settings)
    assert len(losses(whole)) == 3
    written = json.loads((tmp_path / "whole.json").read_text())
    run_on_two_ranks(tmp_path, written | {"per_device_train_batch_size": len(ROWS) // 2})
    assert losses(whole) == pytest.approx(losses(tmp_path / "ranks"), abs=1e-5)


def test_rejected_rows_are_written_beside_the_run(job):
    folder = job(rows=[*ROWS, {"conversations": []}], on_bad_row="skip", max_steps=1)
    (entry,) = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert entry["line"] == 13
    assert entry["reason"].startswith("nothing to learn")
    assert entry["row"] == '{"conversations": []}'


def test_a_rank_that_should_not_save_writes_nothing(tmp_path):
    from types import SimpleNamespace
    from unittest.mock import Mock

    from component.train.trainer import LoRATrainer

    for should_save in (False, True):
        rank = Mock(args=SimpleNamespace(should_save=should_save))
        LoRATrainer.save_model(rank, str(tmp_path))
        assert rank.model.save_pretrained.called is rank.processing_class.save_pretrained.called is should_save


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(job):
    settings = {"max_steps": 6, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 3}
    whole = job("whole", **settings)
    resumed = job("resumed", **settings)
    (resumed / "checkpoint-6").rename(resumed / "lost")
    (resumed / "final").rename(resumed / "old_final")
    job("resumed", **settings, resume_from_checkpoint=True)
    assert largest_difference(whole, resumed) == 0
    job("resumed", **settings, resume_from_checkpoint=str(resumed / "checkpoint-3"))
    assert largest_difference(whole, resumed) == 0


@pytest.mark.parametrize("bits", [4, 16])
def test_evaluation_weighs_every_learned_token_alike(job, tmp_path, checkpoint, bits):
    from component.data.dataset import ChatGLM3SFTDataset

    file = write_rows(tmp_path / "eval.jsonl", ROWS[:7])
    settings = {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 0.0, "per_device_eval_batch_size": 2}
    folder = job(eval_file=str(file), base_bits=bits, **settings)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    reported = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)

    quantization = four_bit() if bits == 4 else None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization).eval()
    total = count = 0
    for sample in ChatGLM3SFTDataset(file, AutoTokenizer.from_pretrained(checkpoint), 1024):
        logits = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        learned = [i for i, target in enumerate(sample["target_mask"]) if target]
        total -= sum(logits[i - 1, sample["input_ids"][i]].item() for i in learned)
        count += len(learned)
    assert reported == pytest.approx(total / count, abs=1e-4)


def test_evaluation_in_the_middle_of_a_run_changes_nothing(job, tmp_path):
    whole = job("whole")
    evaluated = job("evaluated", eval_file=str(tmp_path / "train.jsonl"), eval_strategy="steps", eval_steps=1)
    assert losses(evaluated) == losses(whole)
    assert largest_difference(evaluated, whole) == 0


def four_bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def test_a_dry_run_shows_the_sample_and_the_steps_and_loads_no_weights(job, checkpoint, capsys):
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "hidden")
    try:
        folder = job(dry_run=True, max_steps=-1, num_train_epochs=2)
    finally:
        (checkpoint / "hidden").rename(weights)
    shown = capsys.readouterr().out
    assert "[gMASK]sop<|user|> \n Say 1<|assistant|>⟦ \n word </s>⟧" in shown
    update = "an update is 4 samples: 1 process x 4 x 1 (per_device_train_batch_size x gradient_accumulation_steps)"
    length = "2 epochs of 12 samples: 6 updates; the learning rate begins at 0.01 without a warm-up and falls in a"
    assert f"{update}\n{length} straight line to 0 (linear)\n6 steps. No weights were loaded." in shown
    assert re.search(
        r"\nA run takes .*\n +0\.\d  rows of [\d,]+ tokens, activation_checkpointing none, weights kept", shown
    )
    assert shown.count("by estimate") == 1
    settings = re.search(r"Settings; .*:\n((?:  .*\n)+)", shown)[1].splitlines()
    given = ["model_name_or_path", "train_file", "output_dir"]
    given += ["disable_tqdm", "learning_rate", "logging_steps", "lora_dropout", "lora_rank", "num_train_epochs"]
    given += ["per_device_train_batch_size", "save_strategy"]
    assert [line.split()[0] for line in settings] == given, "those that were given, and no others"
    assert re.search(r"lora_rank +4", shown)
    assert not folder.exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_rows_too_few_for_a_batch_end_before_the_model_loads(job, capsys, monkeypatch, dry_run):
    monkeypatch.setattr(train_qlora, "make_model", None)
    for settings in ({"max_steps": -1}, {"max_steps": 4, "gradient_accumulation_steps": 2}):
        with pytest.raises(SystemExit) as end:
            job(rows=ROWS[:3], dry_run=dry_run, dataloader_drop_last=True, **settings)
        assert end.value.code == 2
        fault = (
            "dataloader_drop_last: no batch is left, as there are 3 samples to learn from and a batch takes 4; lower"
        )
        assert fault in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_two_ranks_is_shown_once(job, tmp_path):
    job(dry_run=True, gradient_accumulation_steps=3)
    shown = run_on_two_ranks(tmp_path, json.loads((tmp_path / "run.json").read_text()), "train_qlora.py", "--dry_run")
    for line in ("lora_rank ", "One sample", "steps. No weights", "an update is 24 samples: 2 processes x 4 x 3 "):
        assert shown.stdout.count(line) == 1, line
    assert not (tmp_path / "ranks").exists()


def test_a_dry_run_says_what_a_run_would_do_in_the_output_folder(job, capsys):
    folder = job(dry_run=True)
    assert f"a run would begin in {folder}" in capsys.readouterr().err
    job(max_steps=1)
    before = sorted(folder.rglob("*"))
    job(dry_run=True, max_steps=1)
    assert "a run would do nothing: it is done" in capsys.readouterr().err
    job(dry_run=True, max_steps=2)
    assert "a run would be refused: " in (told := capsys.readouterr().err)
    assert "max_steps: 1 then, 2 now" in told
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_is_refused_for_its_rows_leaves_nothing_behind(job, tmp_path):
    with pytest.raises(SystemExit):
        job(rows=[{"conversations": []}], output_dir=str(tmp_path / "deep/run"))
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "settings", [{"num_train_epochs": 3}, {"num_train_epochs": 1.5}, {"gradient_accumulation_steps": 2}]
)
def test_the_dry_run_counts_the_steps_that_the_trainer_makes(job, capsys, settings):
    settings |= {"max_steps": -1, "per_device_train_batch_size": 5}
    job("dry", dry_run=True, **settings)
    announced = int(re.search(r"(\d+) steps\. No weights", capsys.readouterr().out)[1])
    state = json.loads((job("wet", **settings) / "trainer_state.json").read_text())
    assert state["global_step"] == announced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rows": [*ROWS, {"conversations": [{"role": "usr", "content": ""}]}]},
            "train.jsonl:13: conversations[0].role is 'usr'",
        ),
        ({"max_seq_length": 4}, "no learned token survives max_seq_length=4"),
        ({"model_name_or_path": "/nowhere/chatglm3"}, "model_name_or_path: no folder /nowhere/chatglm3"),
        (
            {"data_format": "chatglm2", "rows": [{"conversations": ROWS[0]["conversations"][1:]}]},
            "train.jsonl:1: chatglm2",
        ),
        ({"streaming": True, "max_steps": -1}, "streaming: the number of rows is not known beforehand; give max_steps"),
        ({"train_file": {}}, "train_file must be given"),
        ({"train_file": "*.parquet"}, "train_file: no file '*.parquet'"),
        ({"resume_from_checkpoint": True}, "holds no checkpoint"),
        (
            {"rows": ROWS[:3], "dataloader_drop_last": True},
            "dataloader_drop_last: no batch is left, as there are 3 samples to learn from and a batch takes 4",
        ),
        ({"data_format": "chat_template"}, "ChatGLM's tokenizer writes its prompts itself"),
        ({"target_modules": ["q_proj"]}, "no linear layer is called 'q_proj'; there are dense, dense_4h_to_h"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_line_that_names_it(job, capsys, change, message):
    with pytest.raises(SystemExit) as stop:
        job(**change)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_lines_and_no_lines_stop_before_the_model_loads(job, tmp_path, capsys, monkeypatch):
    """Cases 19 and 24 of the reliability scorecard."""
    monkeypatch.setattr("component.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    lines, file = [json.dumps(row) for row in ROWS], tmp_path / "bad.jsonl"
    faults = {
        f"{file}:{k}: column 22: not JSON": [*lines[: k - 1], lines[k - 1][:20] + "}", *lines[k:]] for k in (1, 6, 12)
    }
    faults |= {
        f"{file}:12: column 37: not JSON": [*lines[:11], lines[11][:40]],
        "the file has no rows": ["", " \r", ""],
    }
    for message, text in faults.items():
        file.write_text("\n".join(text), encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            job(train_file=str(file))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_card_that_is_too_small_ends_with_exit_code_2_and_the_remedies(job, capsys, monkeypatch):
    def refuse(*args, samples, **kwargs):
        assert samples == 4 * 3, "of an update on one rank, as no row is longer than they are"
        raise memory.DoesNotFit("rows of 8,192 tokens need about 9.0 GiB: lower packing_length")

    monkeypatch.setattr(memory, "choose_plan", refuse)
    with pytest.raises(SystemExit) as stop:
        job(gradient_accumulation_steps=3)
    assert stop.value.code == 2
    assert "need about 9.0 GiB: lower packing_length" in capsys.readouterr().err


def test_a_dry_run_lists_rows_of_the_length_that_was_set(job, capsys):
    job(dry_run=True, packing_length=2000, activation_checkpointing="full")
    listed = re.findall(r"\n +\d+\.\d  (rows .*)", capsys.readouterr().out)
    assert listed == ["rows of 2,000 tokens, activation_checkpointing full"]


def test_a_trained_model_has_its_own_forward_again_and_keeps_nothing_of_the_packed_one(job, monkeypatch, capsys):
    left = []

    def leave(self):
        left.append(self)
        own_leave(self)

    own_leave = PackedForward.leave
    monkeypatch.setattr(PackedForward, "leave", leave)
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(left)))
    folder = job()
    (forward,) = left
    assert (folder / "final").exists()
    assert forward.model.forward == forward.own_forward != forward
    assert freed[-1] == 1, "after it was left"
    ways = "attention sample by sample, rows launched kernel by kernel, optimizer AdamW"
    assert ways in "".join(capsys.readouterr())


def test_a_dry_run_of_padded_batches_estimates_no_rows(job, capsys):
    job(dry_run=True, packing=False)
    shown = capsys.readouterr().out
    assert "No weights were loaded" in shown
    assert "by estimate" not in shown


def test_an_earlier_run_is_refused_and_on_request_moved_aside(job, capsys):
    folder = job()
    before = adapter(folder / "final")
    with pytest.raises(SystemExit):
        job(resume_from_checkpoint=False)
    assert "holds a run already (final)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job(learning_rate=1e-3)
    assert "learning_rate: 0.01 then, 0.001 now" in capsys.readouterr().err
    job(overwrite_output_dir=True, learning_rate=1e-3)
    (aside,) = folder.parent.glob("run.2*")
    kept = adapter(aside / "final")
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_a_run_that_is_done_trains_longer_by_the_schedule_of_its_new_length(job, capsys):
    settings = {"lr_scheduler_type": "linear", "save_strategy": "steps", "learning_rate": 0.8}
    job(**settings, max_steps=4)
    folder = job(**settings, max_steps=8, resume_despite_changes=True)
    assert "max_steps: 4 then, 8 now" in capsys.readouterr().err
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.4, 0.3, 0.2, 0.1])
    assert [path.name.partition(".")[0] for path in (folder / "aside").iterdir()] == ["final"]


def test_any_other_model_trains_in_fireflys_format(job, tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "tiny-llama"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), **shape)).save_pretrained(folder)

    rows = [{"conversation": [{"human": "hi", "assistant": "hello"}]}] * 4
    output = job(rows=rows, model_name_or_path=str(folder))
    assert "data format firefly: the name 'tiny-llama' contains neither" in capsys.readouterr().err
    assert {"q_proj", "down_proj"} <= {name.split(".lora_")[0].rpartition(".")[2] for name in adapter(output / "final")}
    job("dry", rows=rows, model_name_or_path=str(folder), dry_run=True)
    assert "<s>hi</s>⟦hello</s>⟧" in capsys.readouterr().out


def test_calls_are_trained_by_a_ready_template_which_is_kept_beside_the_adapter(job, model_folder, tmp_path, capsys):
    """On a base model as Qwen's: it has ChatML's tokens, no template, and an EOS at which no answer ends."""
    base = model_folder("llama", vocab_size=260)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(base)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x"}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    run = {"model_name_or_path": str(base), "rows": [{"messages": messages, "tools": [{"name": "weather"}]}] * 4}

    def refused(**settings) -> str:
        with pytest.raises(SystemExit) as done:
            job(**run, **settings)
        assert done.value.code == 2
        return capsys.readouterr().err

    assert "and the tokenizer has none; set chat_template to chatml or to a file" in refused(
        data_format="chat_template"
    )
    assert "chat_template needs data_format chat_template, which is 'firefly'" in refused(
        data_format="firefly", chat_template="chatml"
    )
    final = job(**run, chat_template="chatml") / "final"
    said = capsys.readouterr().err
    assert "data format chat_template: chat_template asks for it" in said
    assert "answers end on <|im_end|>, at which generate does not stop" in said
    assert "give it eos_token_id=259 when you chat" in said
    kept = AutoTokenizer.from_pretrained(final)
    assert kept.eos_token == "<|im_end|>"
    assert kept.apply_chat_template(messages, tokenize=False).endswith("}\n</tool_call><|im_end|>\n")
    copy = tmp_path / "moved.jinja"
    copy.write_text(kept.chat_template)
    job(**run, chat_template=str(copy), dry_run=True)
    assert "would continue" not in capsys.readouterr().err
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 259]}')
    job(**run, chat_template=str(copy), dry_run=True)
    assert "generate does not stop" not in capsys.readouterr().err
    copy.write_text(kept.chat_template + "{# another #}")
    assert "format" in refused(chat_template=str(copy))


def test_help_comes_without_importing_torch():
    code = "import sys, train_qlora; train_qlora.describe_settings(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_option_is_named_without_the_token_that_it_holds(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-wandb")
    options = ["--hub_token=hf_CanaryOfHuggingFace0000000000000000", "--key=canary-of-wandb"]
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--train_args_file", "x.json", *options])
    with pytest.raises(SystemExit) as stop:
        train_qlora.main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "unrecognized arguments: --hub_token=<token> --key=<WANDB_API_KEY>" in shown
    assert "anary" not in shown
