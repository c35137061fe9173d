"""Runs that earlier versions began go on here, and adapters that they made load.

tests/fixtures/COMMIT holds a model, rows, settings, the checkpoint of step 4 of a run of 8 updates, and what that
commit made of the rest of it: `final/`, and `trainer_state.json` with its losses.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_qlora
from component.model import load_adapter
from component.run.manifest import verify
from component.train.identity import renew_identity
from script import merge_lora

from .runs import largest_difference, losses

FIXTURES = Path(__file__).parent / "fixtures"
COMMITS = sorted(path.name for path in FIXTURES.iterdir())


@pytest.fixture(params=COMMITS)
def earlier(request, tmp_path, monkeypatch) -> Path:
    """A copy of what a commit left, in which the test runs, since paths in it are relative."""
    shutil.copytree(FIXTURES / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(monkeypatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--train_args_file", "settings.json", *overrides])
    train_qlora.main()


def test_a_run_that_an_earlier_version_began_ends_as_it_would_have_there(earlier, monkeypatch, capsys):
    train(monkeypatch)
    told = capsys.readouterr().err
    assert "continuing from" in told
    assert not list(earlier.glob("run/aside"))
    # To the last bit on the processor that made it; on another, as far as float32 sums in another order differ.
    same_processor = torch.backends.cpu.get_cpu_capability() == "AVX512" and "is not exact" not in told
    limit = 0 if same_processor else 1e-4
    assert largest_difference(earlier, earlier / "run") <= limit
    assert losses(earlier / "run") == pytest.approx(losses(earlier), abs=limit, rel=0)


def test_a_changed_setting_of_a_run_of_an_earlier_version_is_noticed(earlier, monkeypatch, capsys):
    for override, told in (
        ("packing_length=256", "packing_length: 512 then, 256 now"),
        ("pack_to=0", "packing: true then, false now"),
        ("fused_layers=false", "fused_layers: true then, false now"),
        ("learning_rate=0.02", "learning_rate: 0.01 then, 0.02 now"),
        ("base_bits=16", "base_bits: 4 then, 16 now"),
        ("adapter_name_or_path=final", "adapter_name_or_path: null then, "),
    ):
        with pytest.raises(SystemExit) as stop:
            train(monkeypatch, override)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_an_adapter_of_an_earlier_version_loads_and_merges(earlier, monkeypatch):
    assert verify(earlier / "final", "final")["step"] == 8
    model = AutoModelForCausalLM.from_pretrained("chatglm3-nano", dtype=torch.float32)
    ids = torch.arange(3, 43).reshape(2, 20)
    tuned = load_adapter(model, "final").eval()(ids).logits
    arguments = [
        "--adapter",
        "final",
        "--base",
        "chatglm3-nano",
        "--output",
        "merged",
        "--into",
        "full",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *arguments])
    merge_lora.main()
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()(ids).logits
    assert (merged - tuned).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("pack_to", "now"),
    [
        (None, {"packing": True, "packing_length": None, "fused_layers": True}),
        (0, {"packing": False, "packing_length": None, "fused_layers": False}),
        (2048, {"packing": True, "packing_length": 2048, "fused_layers": True}),
    ],
)
def test_an_earlier_pack_to_is_compared_as_what_it_is_called_now(pack_to, now):
    was = {"settings": {"seed": 1, "pack_to": pack_to}, "data": "abc"}
    now = now | {"stream_order": None, "base_bits": 4}
    assert renew_identity(was) == {"settings": {"seed": 1} | now, "data": "abc", "adapter": None}
    assert was["settings"] == {"seed": 1, "pack_to": pack_to}
    current = {"settings": {"seed": 1} | now, "data": "abc", "adapter": "def"}
    assert renew_identity(json.loads(json.dumps(current))) == current
