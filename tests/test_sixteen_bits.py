"""Whole runs beside a base that is not rounded: base_bits 16."""

import json
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.kernel.model import PackedForward
from component.model import load_adapter, read_training
from component.run.errors import ArgumentError
from script import merge_lora

from .runs import ROWS, adapter, assert_same_run, at_call, largest_difference, logged, send, write_rows

SETTINGS = {"base_bits": 16, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}


def test_a_run_that_was_stopped_goes_on_with_difference_0_and_in_the_bits_it_began_with(job, stopped, tmp_path, capsys):
    settings = {**SETTINGS, "eval_file": str(write_rows(tmp_path / "eval.jsonl", ROWS)), "eval_steps": 2}
    whole = job("whole", **settings)
    with at_call(4, PackedForward, "__call__", send(signal.SIGTERM)):
        assert stopped("stopped", **settings) == 143
    capsys.readouterr()
    assert stopped("stopped", **settings | {"base_bits": 4}) == 2
    assert "base_bits: 16 then, 4 now" in capsys.readouterr().err
    job("stopped", **settings)
    assert_same_run(whole, tmp_path / "stopped")


def test_an_adapter_is_merged_exactly_into_the_base_that_it_was_trained_beside(job, checkpoint, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "eval.jsonl", ROWS)
    folder = job(base_bits=16, max_steps=8, eval_file=str(file), eval_steps=8)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(3, 43).reshape(2, 20)
    untuned = base.eval()(ids).logits
    tuned = load_adapter(base, folder / "final").eval()(ids).logits
    arguments = ["--adapter", folder / "final", "--output", tmp_path / "merged", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, arguments)])
    merge_lora.main()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(ids).logits
    assert (merged - tuned).abs().max() <= 1e-5 < 0.1 < (tuned - untuned).abs().max()

    again = {"model_name_or_path": str(tmp_path / "merged"), "data_format": "chatglm3", "eval_file": str(file)}
    of_merged = job("again", base_bits=16, learning_rate=0.0, max_steps=1, eval_steps=1, **again)
    assert logged(of_merged, "eval_loss")[-1] == pytest.approx(logged(folder, "eval_loss")[-1], abs=1e-5)


def test_what_is_printed_says_how_the_base_is_kept(job, capsys):
    sixteen = job("sixteen", base_bits=16, compute_dtype="bfloat16", max_steps=1)
    told = capsys.readouterr().err
    assert " in 16 bits on cpu, bfloat16 arithmetic" in told
    assert [line.split()[:2] for line in told.splitlines() if " yes " in line or " no " in line] == [
        ["bfloat16", "no"],
        ["float32", "yes"],
    ]
    assert {weight.dtype for weight in adapter(sixteen / "final").values()} == {torch.float32}
    job("wide", base_bits=16, max_steps=1)
    assert " in 32 bits on cpu, float32 arithmetic" in capsys.readouterr().err


def test_an_adapter_of_a_base_of_other_bits_is_warned_of_and_trained(job, capsys):
    begun = job("first", base_bits=16, max_steps=1)
    again = {"adapter_name_or_path": str(begun / "final"), "learning_rate": 0.0, "max_steps": 1}
    for bits in (4, 16):
        capsys.readouterr()
        assert largest_difference(begun, job(f"then{bits}", base_bits=bits, **again)) == 0
        warning = f"was trained beside a base in 16 bits, and this run's base_bits is {bits}: it has learned to make"
        assert capsys.readouterr().err.count(warning) == (bits == 4)


def test_a_manifest_tells_how_the_base_was_loaded(tmp_path):
    def read(run):
        (tmp_path / "manifest.json").write_text(json.dumps({"run": run}))
        return read_training(tmp_path)

    assert read_training(tmp_path) == (None, None)
    assert read({"settings": {"base_bits": 16, "compute_dtype": "float16"}}) == (16, torch.float16)
    assert read({"settings": {"lora_rank": 4}}) == (4, None)  # of a version that had no other bits
    assert read({}) == read({"settings": "x"}) == (None, None)
    with pytest.raises(ArgumentError, match=r"manifest\.json: base_bits is 8 and compute_dtype None; expected 4 or 16"):
        read({"settings": {"base_bits": 8}})


def test_a_dry_run_shows_the_bits(job, capsys):
    job(dry_run=True, base_bits=16)
    assert "  base_bits                     16\n" in capsys.readouterr().out
