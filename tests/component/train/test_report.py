from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import AdamW
from loguru import logger
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from component.data.formats import parse_chatglm3
from component.data.render import render_chatglm3
from component.run.log import CHATTER, configure_logging, redact
from component.train.adamw import FusedAdamW
from component.train.report import (
    SCHEDULES,
    describe_schedule,
    describe_ways,
    parameter_table,
    plot_loss,
    render_sample,
)


def test_parameters_are_counted_by_dtype_and_trainability():
    model = nn.ModuleList([nn.Linear(30, 10, bias=False), nn.Linear(10, 10, bias=False).to(torch.bfloat16)])
    model[1].requires_grad_(False)
    lines = parameter_table(model).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["float32", "yes", "300", "75.00%"],
        ["bfloat16", "no", "100", "25.00%"],
        ["total", "400"],
    ]


def test_4_bit_parameters_count_as_weights():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    assert parameter_table(layer).splitlines()[1].split() == ["4-bit", "nf4", "no", "2,048", "100.00%"]


def test_a_sample_shows_its_learned_stretches(tiny_tokenizer):
    turns = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "b"},
    ]
    sample = render_chatglm3(parse_chatglm3({"conversations": turns}), tiny_tokenizer)
    row = {"input_ids": sample.input_ids, "target_mask": sample.target_mask}
    assert render_sample(row, tiny_tokenizer) == "[gMASK]sop<|user|> \n 你好<|assistant|>⟦ \n 好<|user|>⟧ \n b</s>"


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]])
def test_the_loss_is_drawn(tmp_path, history):
    plot_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_secrets_are_replaced_and_what_only_looks_like_them_is_not(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false_and_long")
    shown = redact("a 0123456789 b true false_and_long https://me:pw@host/x https://host/a@b hf_" + "a" * 30)
    assert shown == "a <SOME_API_KEY> b true false_and_long https://<credentials>@host/x https://host/a@b <token>"


def test_other_ranks_say_what_is_theirs_alone(capsys):
    configure_logging(rank=1)
    logger.warning("of all")
    logger.bind(any_rank=True).warning("of this rank")
    shown = capsys.readouterr().err
    assert "of this rank" in shown
    assert "of all" not in shown


def test_a_logged_traceback_shows_no_values(capsys):
    password = "hush-hush"
    configure_logging(rank=0)
    try:
        int("x" + password[:0])
    except ValueError:
        logger.exception("failed")
    shown = capsys.readouterr().err
    assert "failed" in shown
    assert "password[:0]" in shown
    assert "hush-hush" not in shown.replace('password = "hush-hush"', "")


@pytest.mark.parametrize(
    ("settings", "rows", "told"),
    [
        (
            {"num_train_epochs": 1.5, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"},
            1000,
            "1.5 epochs of 1,000 samples: 188 updates; the learning rate rises to 5e-05 over 19 updates of warm-up, "
            "then falls along a cosine to 0 (cosine)",
        ),
        (
            {"max_steps": 4, "warmup_steps": 10, "lr_scheduler_type": "constant"},
            16,
            "4 updates (max_steps), 2 epochs of 16 samples; the learning rate begins at 5e-05 without a warm-up and "
            "stays (constant)",
        ),
        (
            {"max_steps": 4, "warmup_steps": 10, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1},
            None,
            "4 updates (max_steps) from a stream; the learning rate only rises, to 0.4 of 1, as warmup_steps=10 covers "
            "the run (constant_with_warmup)",
        ),
        (
            {"num_train_epochs": 1},
            1,
            "1 epoch of 1 sample: 1 update; the learning rate begins at 5e-05 without a warm-up and falls in a "
            "straight line to 0 (linear)",
        ),
    ],
)
def test_length_and_learning_rate_are_told_in_words(settings, rows, told):
    assert describe_schedule(rows, TrainingArguments("x", use_cpu=True, **settings)) == told


def test_every_schedule_has_words():
    assert {schedule.value for schedule in SchedulerType} == SCHEDULES.keys()


def test_what_libraries_tell_their_developers_is_silent_and_nothing_else_is(monkeypatch):
    import logging

    configure_logging(rank=0)
    for name, beginning in CHATTER.items():
        said, speaker = [], logging.getLogger(name)
        monkeypatch.setattr(speaker, "callHandlers", lambda record, said=said: said.append(record.getMessage()))
        speaker.warning(f"{beginning} %s", "…")
        speaker.warning("a warning of %s", name)
        assert said == [f"a warning of {name}"]


@pytest.mark.parametrize(
    ("graphs", "optimizer", "said"),
    [
        (object(), FusedAdamW, "attention cuDNN, rows as CUDA graphs, AdamW in one launch"),
        (None, AdamW, "attention cuDNN, rows launched kernel by kernel, optimizer AdamW"),
        (None, torch.optim.SGD, "attention cuDNN, rows launched kernel by kernel, optimizer SGD"),
    ],
)
def test_one_line_says_by_which_ways_a_run_computes(graphs, optimizer, said):
    layer = SimpleNamespace(attention=SimpleNamespace(name="cuDNN"))
    assert describe_ways(SimpleNamespace(layers=[layer], graphs=graphs), optimizer) == said
