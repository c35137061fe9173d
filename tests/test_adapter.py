"""Runs that begin from a trained adapter (adapter_name_or_path)."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from component.run.manifest import checksum, seal

from .runs import ROWS, adapter, largest_difference, logged

FIREFLY = [{"conversation": [{"human": f"Say {i}", "assistant": "word " * (i % 3 + 1)}]} for i in range(8)]
# As peft 0.4 wrote it; it has none of the later keys.
OLD_CONFIG = """{"auto_mapping": null, "base_model_name_or_path": "THUDM/chatglm3-6b", "bias": "none",
"fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layers_pattern": null,
"layers_to_transform": null, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": null, "peft_type": "LORA",
"r": 4, "revision": null, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM"}"""


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name].float()) for name in one)


@pytest.fixture
def first(job) -> Path:
    """A run whose adapter has learned something; 16 is its lora_alpha, 4 its rank."""
    return job("first", max_steps=6)


@pytest.fixture
def refusal(job, capsys, monkeypatch):
    """Why a run is refused, before the base is loaded."""

    def refuse(name: str = "second", **settings) -> str:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("component.model.load_model", lambda *_: pytest.fail("the base was loaded"))
            job(name, **settings)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refuse


@pytest.fixture
def by_peft(checkpoint, tmp_path):
    """Makes an adapter by peft alone, on the native class in full precision."""

    def make(**config) -> Path:
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **{"lora_alpha": 16} | config))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(tmp_path / "by_peft")
        return tmp_path / "by_peft"

    return make


LAYOUTS = {"fused": {}, "plain": {"fused_layers": False}, "padded": {"packing": False}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_begins_where_the_adapter_ended(job, tmp_path, layout):
    whole = layout | {"eval_file": str(tmp_path / "train.jsonl"), "per_device_train_batch_size": len(ROWS)}
    first = job("first", **whole, eval_steps=6, max_steps=6)
    again = {"adapter_name_or_path": str(first / "final"), "eval_on_start": True, "max_steps": 1}
    second = job("second", **whole, **again, eval_steps=1)
    assert logged(second, "eval_loss")[0] == logged(first, "eval_loss")[-1]
    assert logged(second, "loss")[0] == pytest.approx(logged(first, "eval_loss")[-1], abs=1e-6)
    assert logged(first, "loss")[0] > logged(second, "loss")[0] + 0.1


@pytest.mark.parametrize("family", ["chatglm", "llama"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_run_that_learns_nothing_returns_the_same_adapter(job, model_folder, family, packing, capsys):
    model = model_folder(family)
    settings = {"model_name_or_path": str(model), "rows": FIREFLY if family == "llama" else ROWS, "packing": packing}
    first = job("first", **settings, lora_alpha=24)
    again = {"learning_rate": 0.0, "weight_decay": 0.1, "lora_dropout": 0.1, "lora_alpha": 24}
    second = job("second", **settings, **again, adapter_name_or_path=str(first / "final"))
    assert_equal(adapter(first / "final"), adapter(second / "final"))
    configs = [json.loads((folder / "final/adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0] | {"lora_dropout": 0.1} == {**configs[1], "target_modules": configs[0]["target_modules"]}
    shown = capsys.readouterr().err
    assert "lora_dropout: 0 in the adapter, 0.1 in this run" in shown
    assert f"training from {first / 'final'}" in shown


def test_what_was_taught_last_is_answered_by_one_adapter_on_the_base(job, checkpoint):
    def rows(question: str, answer: str) -> list[dict]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [{"conversations": turns}] * 4

    first = job("first", rows=rows("Say 3", "word word"), max_steps=60)
    lesson = rows("Say 3", "word word word")
    second = job("second", rows=lesson, max_steps=60, adapter_name_or_path=str(first / "final"))
    answers = []
    for folder in (first, second):
        tokenizer = AutoTokenizer.from_pretrained(folder / "final")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder / "final").eval()
        answers.append(model.chat(tokenizer, "Say 3", do_sample=False, max_new_tokens=20)[0])
    assert answers == ["word word", "word word word"]
    assert adapter(first / "final").keys() == adapter(second / "final").keys()


def test_an_adapter_of_peft_alone_is_begun_from(job, by_peft, capsys):
    folder = by_peft(target_modules=["query_key_value", "dense"], lora_alpha=12, lora_dropout=0.05)
    settings = {"adapter_name_or_path": str(folder), "lora_alpha": 12, "target_modules": ["dense", "query_key_value"]}
    assert_equal(adapter(job(**settings, learning_rate=0.0) / "final"), load_file(folder / "adapter_model.safetensors"))
    assert largest_difference(job("more", **settings), folder.parent / "run") > 0
    assert "make sure that it is the same model" not in capsys.readouterr().err


def test_an_old_adapter_in_half_precision_and_torchs_archive_is_begun_from(job, by_peft, capsys):
    folder = by_peft(target_modules=["query_key_value"])
    weights = {name: weight.half() for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(OLD_CONFIG)
    settings = {"adapter_name_or_path": str(folder), "target_modules": ["query_key_value"]}
    assert_equal(adapter(job(**settings, learning_rate=0.0) / "final"), weights)
    assert "was trained on THUDM/chatglm3-6b, and this run's base is" in capsys.readouterr().err


def test_an_adapter_of_rank_stabilised_lora_is_plain_lora_of_another_alpha(job, by_peft, refusal):
    folder = by_peft(target_modules=["dense"], use_rslora=True, lora_alpha=6)
    settings = {"adapter_name_or_path": str(folder), "target_modules": ["dense"], "max_steps": 1}
    assert "lora_alpha: 12.0 in the adapter, 6 in this run" in refusal(**settings, lora_alpha=6)
    rows = {"eval_file": str(folder.parent / "train.jsonl"), "eval_on_start": True}
    plain = job("plain", **settings, **rows, lora_alpha=12)
    edit(folder / "adapter_config.json", use_rslora=False, lora_alpha=12)
    assert logged(job("same", **settings, **rows, lora_alpha=12), "eval_loss") == logged(plain, "eval_loss")


def test_a_hubs_adapter_is_begun_from(job, by_peft, monkeypatch):
    folder = by_peft(target_modules=["dense"])

    def find(name: str, file: str, **_) -> str | None:
        assert name == "someone/adapter"
        return str(folder / file) if (folder / file).exists() else None

    monkeypatch.setattr("component.trust.cached_file", find)
    monkeypatch.setattr("component.trust.require_hub_or_cache", lambda *_: None)
    run = job(adapter_name_or_path="someone/adapter", target_modules=["dense"], learning_rate=0.0)
    assert_equal(adapter(run / "final"), load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError("there is no someone/adapter"), "adapter 'someone/adapter': there is no someone/adapter"),
        (None, "someone/adapter: no adapter_config.json there; give an adapter's folder"),
    ],
)
def test_an_adapter_that_a_hub_has_not_is_named(refusal, monkeypatch, fault, told):
    def find(*_, **__) -> None:
        if fault:
            raise fault

    monkeypatch.setattr("component.trust.cached_file", find)
    monkeypatch.setattr("component.trust.require_hub_or_cache", lambda *_: None)
    assert told in refusal(adapter_name_or_path="someone/adapter")


# What is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_rank": 8}, "set lora_rank=4:\n  lora_rank: 4 in the adapter, 8 in this run"),
        ({"lora_alpha": 32}, "set lora_alpha=16:\n  lora_alpha: 16 in the adapter, 32 in this run"),
        (
            {"target_modules": ["dense"], "lora_rank": 2},
            'target_modules: ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"] in the adapter, ["dense"]',
        ),
        ({"adapter_name_or_path": "/nowhere/final"}, "adapter_name_or_path: no folder /nowhere/final"),
        ({"adapter_name_or_path": "models/nowhere"}, "leave this key out and set resume_despite_changes to true"),
        ({"adapter_name_or_path": ""}, "adapter_name_or_path must be a folder or a hub's name, or null, got ''"),
    ],
)
def test_a_run_of_another_shape_is_refused_with_the_difference(first, refusal, settings, told):
    given = {"adapter_name_or_path": str(first / "final")} | settings
    assert told in refusal(**given)
    assert told in refusal(**given, dry_run=True)
    assert not (first.parent / "second").exists()


def drop_a_layer(folder: Path) -> None:
    weights = adapter(folder)
    del weights["base_model.model.transformer.encoder.layers.1.mlp.dense_4h_to_h.lora_A.weight"]
    save_file(weights, folder / "adapter_model.safetensors")


def spoil_a_weight(folder: Path) -> None:
    weights = adapter(folder)
    next(iter(weights.values()))[0, 0] = torch.inf
    save_file(weights, folder / "adapter_model.safetensors")


def store_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def store(folder: Path) -> None:
        weights = {name: weight.to(dtype) for name, weight in adapter(folder).items()}
        save_file(weights, folder / "adapter_model.safetensors")

    return store


def flip_a_bit(folder: Path) -> None:
    seal(folder, {})
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))


SPOILT = {
    "lacks a layer": (drop_a_layer, "1.mlp.dense_4h_to_h.lora_A.weight has the shape None in the adapter, and [4, 64]"),
    "is not finite": (spoil_a_weight, "and 0 others are not finite; take an earlier checkpoint"),
    "is int8": (store_as(torch.int8), "is of type torch.int8; give an adapter in float32 or half precision"),
    "is float8": (store_as(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn; give an adapter in float32"),
    "is damaged": (flip_a_bit, "adapter_model.safetensors has other contents than were written; copy it again"),
    "has no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "is a run": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json there; give an"),
    "has magnitudes": (
        lambda folder: edit(folder / "adapter_config.json", use_dora=True),
        "use_dora is true, and DoRA",
    ),
}
UNTRAINED = {
    "modules_to_save": ["output_layer"],
    "rank_pattern": {"dense": 2},
    "alpha_pattern": {"dense": 2},
    "layers_to_transform": [0],
    "lora_bias": True,
    "bias": "all",
    "trainable_token_indices": [5],
    "exclude_modules": ["dense"],
}
SPOILT |= {
    f"has {key}": (
        lambda folder, change={key: value}: edit(folder / "adapter_config.json", **change),
        f"{key} is {value!r}, which is not supported",
    )
    for key, value in UNTRAINED.items()
}


@pytest.mark.parametrize(("spoil", "told"), SPOILT.values(), ids=SPOILT)
def test_an_adapter_that_cannot_be_trained_further_is_refused(by_peft, job, capsys, spoil, told):
    folder = by_peft(target_modules=["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"])
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        job(adapter_name_or_path=str(folder))
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_an_adapter_of_another_family_and_one_of_a_wider_model_are_refused(model_folder, job, refusal, tmp_path):
    llama = {"rows": FIREFLY, "model_name_or_path": str(model_folder("llama"))}
    given = {"adapter_name_or_path": str(job("first", **llama) / "final")}
    told = refusal(**given)
    assert "it adapts down_proj, and in" in told
    assert "only dense, dense_4h_to_h, dense_h_to_4h, query_key_value are adapted; its base is" in told
    shutil.rmtree(llama["model_name_or_path"])
    model_folder("llama", intermediate_size=96)
    assert "mlp.down_proj.lora_A.weight has the shape [4, 64] in the adapter, and [4, 96] beside" in refusal(
        **llama | given
    )


def test_a_base_that_was_moved_is_the_same_and_one_of_other_weights_is_not(first, job, refusal, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere/another-name-of-chatglm3")
    given = {"adapter_name_or_path": str(first / "final"), "max_steps": 1}
    job("moved", **given, model_name_or_path=str(moved))
    weights = load_file(moved / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    told = refusal(**given, model_name_or_path=str(moved))
    assert f"was trained on a base with other weights or another config.json than {moved}" in told
    assert f"give that base, '{checkpoint}'" in told


def test_a_base_of_another_name_that_no_manifest_identifies_is_warned_of(first, job, checkpoint, tmp_path, capsys):
    (first / "final/manifest.json").unlink()
    for name, warns in ((checkpoint.name, False), ("chatglm3-base", True)):
        copy = shutil.copytree(checkpoint, tmp_path / "elsewhere" / name)
        job(name, adapter_name_or_path=str(first / "final"), max_steps=1, model_name_or_path=str(copy))
        assert ("make sure that it is the same model" in capsys.readouterr().err) == warns


def test_an_adapter_of_another_prompt_format_is_warned_of_and_trained(model_folder, job, tmp_path, capsys):
    templates = [tmp_path / "a.jinja", tmp_path / "b.jinja"]
    turns = "{% for turn in messages %}<s>NAME {{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    ask = "{% if add_generation_prompt %}<s>NAME assistant: {% endif %}"
    for template in templates:
        template.write_text((turns + ask).replace("NAME", template.stem))
    settings = {"rows": FIREFLY, "model_name_or_path": str(model_folder("llama")), "max_steps": 1}
    first = job("first", **settings, chat_template=str(templates[0]))
    again = {"adapter_name_or_path": str(first / "final"), "dry_run": True}
    for changes, differs in (
        ({"chat_template": str(templates[0])}, None),
        ({"chat_template": str(templates[1])}, "'chat_template' as this run, but another chat template or tokenizer:"),
        ({"data_format": "firefly", "dry_run": False}, "'chat_template', and this run has 'firefly':"),
    ):
        capsys.readouterr()
        job("second", **settings | again | changes)
        told = [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]
        assert len(told) == bool(differs)
        for line in told:
            assert f"WARNING {first / 'final'} was trained with data_format {differs}" in line
            assert line.endswith("set data_format and chat_template as its run had them")


@pytest.mark.parametrize(
    "run", [5, [], {"base_model": 5}, {"base_model": ["0" * 32]}, {"format": 5}, {"format": {"name": [5]}}, None]
)
def test_a_manifest_that_somebody_else_wrote_ends_in_no_traceback(first, job, capsys, run):
    (first / "final/manifest.json").unlink()
    seal(first / "final", {"run": run})
    try:
        job("second", adapter_name_or_path=str(first / "final"), max_steps=1)
    except SystemExit as stop:
        assert stop.code == 2
        assert "was trained on a base with other weights" in capsys.readouterr().err


@pytest.mark.parametrize("files", [{"x": {"size": "1", "sha256": 5}}, {"x" * 999: {"size": 1, "sha256": ""}}, {"x": 5}])
def test_a_manifest_of_anything_but_files_is_damage(first, refusal, files):
    (first / "final/x").write_text("xx")
    facts = {"files": files}
    (first / "final/manifest.json").write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    told = refusal(adapter_name_or_path=str(first / "final"))
    assert re.search(r"final: (x has 2 bytes, not 1|x+ is missing|manifest.json is damaged); copy it again", told)


# A run and its folder


def test_a_run_from_an_adapter_goes_on_from_its_own_checkpoint(first, job, monkeypatch):
    settings = {"max_steps": 6, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 3}
    settings |= {"adapter_name_or_path": str(first / "final")}
    whole, resumed = job("whole", **settings), job("resumed", **settings)
    for name in ("checkpoint-6", "final"):
        (resumed / name).rename(resumed / f"old-{name}")
    monkeypatch.setattr("component.model.begin_from_adapter", lambda *_: pytest.fail("the adapter was loaded"))
    job("resumed", **settings)
    assert largest_difference(whole, resumed) == 0
    assert largest_difference(whole, first) > 0


def test_a_run_from_another_adapter_is_another_run(first, job, refusal, tmp_path):
    job("second", max_steps=1)
    given = {"adapter_name_or_path": str(first / "final"), "max_steps": 1}
    assert re.search(r'  adapter_name_or_path: null then, "[0-9a-f]{32}" now', refusal(**given))
    job("third", **given)
    moved = shutil.copytree(first / "final", tmp_path / "moved")
    job("third", **given | {"adapter_name_or_path": str(moved)})  # the same weights: it is done
    other = {"adapter_name_or_path": str(job("other", learning_rate=0.02) / "final")}
    assert "  adapter_name_or_path: contents have changed" in refusal("third", **given | other)


def test_an_adapter_that_changes_while_the_run_begins_is_noticed(first, job, capsys, monkeypatch):
    import component.model

    begin = component.model.begin_from_adapter

    def begin_later(*args) -> None:
        begin(*args)
        (first / "final/adapter_model.safetensors").write_bytes(b"of another run")

    monkeypatch.setattr("component.model.begin_from_adapter", begin_later)
    with pytest.raises(SystemExit):
        job("second", adapter_name_or_path=str(first / "final"))
    assert "its weights changed while the run began; start it again" in capsys.readouterr().err


def test_an_adapter_in_the_runs_own_folder_is_refused_and_stays(job, refusal):
    first = job("first", max_steps=2, save_strategy="steps", save_steps=1)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    for given in (first / "final", first / "checkpoint-1", first / "../first/final"):
        for changes in ({}, {"overwrite_output_dir": True}, {"resume_despite_changes": True, "save_total_limit": 2}):
            told = refusal("first", adapter_name_or_path=str(given), max_steps=9, **changes)
            assert f"adapter_name_or_path: {given} lies in output_dir" in told
    link = first.parent / "link"
    link.symlink_to(first)
    assert "lies in output_dir" in refusal(adapter_name_or_path=str(first / "final"), output_dir=str(link))
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_run_that_is_moved_aside_leaves_the_adapter_where_it_is(first, job):
    job("second")
    job("second", adapter_name_or_path=str(first / "final"), overwrite_output_dir=True, learning_rate=0.0)
    assert largest_difference(first, first.parent / "second") == 0


def test_a_dry_run_shows_the_adapter_and_needs_no_weights(first, job, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("component.trust.load_file", lambda *_: pytest.fail("weights were read"))
    (checkpoint / "model.safetensors").rename(checkpoint / "hidden")
    try:
        folder = job("second", adapter_name_or_path=str(first / "final"), dry_run=True)
    finally:
        (checkpoint / "hidden").rename(checkpoint / "model.safetensors")
    shown = capsys.readouterr()
    assert re.search(rf'adapter_name_or_path +"{first / "final"}"', shown.out)
    assert f"a run would begin in {folder}" in shown.err


def test_an_adapter_in_the_models_place_is_led_to_its_setting(first, refusal):
    told = refusal(model_name_or_path=str(first / "final"))
    assert "is an adapter; give its base model. To train the adapter further, give it as adapter_name_or_path" in told
