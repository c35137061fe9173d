"""script/export.py makes whole folders that run elsewhere, or refuses in a line."""

import json
import re
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from component.export.exports import gguf_name, plan_export
from component.export.merge import merged_model
from component.inference.sampling import Sampling
from component.inference.session import Session
from component.model import open_tokenizer
from component.run.manifest import seal, verify
from script import export, merge_lora

IDS = torch.arange(3, 43).reshape(2, 20)
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def run(*options, program=export) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *map(str, options)])
        program.main()


def refusal(capsys, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def base(model_folder) -> Path:
    folder = model_folder()
    (folder / "MODEL_LICENSE").write_text("Terms.")
    return folder


def test_glm_computes_what_the_trained_model_computes_and_says_how_it_was_made(base, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(base)
    seal(adapter, {"run": {"settings": {"base_bits": 4, "compute_dtype": "float32"}}})
    run("--to", "glm", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "this merge keeps them" in said
    assert said.endswith(f"glm: {tmp_path / 'out'}\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(logits(model), logits(merged_model(str(base), adapter, "trained")))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "chatglm3_tool_parser.py", "merge.json", "README.md", "MODEL_LICENSE"),
    }
    made = json.loads((tmp_path / "out/merge.json").read_text())
    assert (made["into"], made["dtype"], made["base"]) == ("trained", "float32", "chatglm3-nano")
    assert "type" not in made
    for file in ("README.md", "merge.json", "config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()


def test_an_exported_model_answers_here_too_as_it_did_before(base, tmp_path):
    """By its chat template, whose way of writing calls is read from it."""
    run("--to", "glm", "--base", base, "--output", tmp_path / "out")
    messages = [{"role": "user", "content": "北京天气"}]
    told = []
    for folder in (base, tmp_path / "out"):
        session = Session.open(str(folder), base_bits=16)
        reply = session.reply(messages, [WEATHER], Sampling(max_new_tokens=24))
        list(reply)
        call = session.must_call(Sampling(), ["get_weather"], [WEATHER]).begins
        told.append((reply.generation.prompt, reply.generation.tokens, call))
    assert session.data_format == "chat_template"
    assert told[0] == told[1]
    assert "get_weather" in session.tokenizer.decode(call[0])


def test_a_base_alone_and_half_precision(base, tmp_path):
    run("--to", "glm", "--base", base, "--output", tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", "60KB")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "out/merge.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_merged_folder_is_exported_as_its_parts_would_be(base, adapter_folder, tmp_path):
    adapter = adapter_folder(base)
    options = ("--adapter", adapter, "--base", base, "--into", "full")
    run(*options, "--output", tmp_path / "merged", program=merge_lora)
    run("--to", "glm", "--base", tmp_path / "merged", "--output", tmp_path / "one")
    run("--to", "glm", *options, "--output", tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_gguf_is_named_by_its_folder_and_type(base, adapter_folder, tmp_path):
    options = ("--base", base, "--adapter", adapter_folder(base), "--into", "trained")
    run("--to", "gguf", *options, "--output", tmp_path / "weather-gguf", "--type", "q8_0")
    names = {path.name for path in (tmp_path / "weather-gguf").iterdir()}
    assert names == {
        "weather-q8_0.gguf",
        "Modelfile",
        "chatglm3_tool_parser.py",
        "README.md",
        "merge.json",
        "MODEL_LICENSE",
    }
    assert "FROM ./weather-q8_0.gguf\n" in (tmp_path / "weather-gguf/Modelfile").read_text()
    reader = gguf.GGUFReader(tmp_path / "weather-gguf/weather-q8_0.gguf")
    merged = merged_model(str(base), tmp_path / "adapter", "trained").transformer.encoder.layers[0].mlp.dense_h_to_4h
    (found,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    made = json.loads((tmp_path / "weather-gguf/merge.json").read_text())
    assert (made["dtype"], made["type"]) == ("float32", "q8_0")
    assert "in `q8_0`" in (tmp_path / "weather-gguf/README.md").read_text()
    values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    assert torch.allclose(values, merged.weight, atol=merged.weight.abs().max().item() / 127)


@pytest.mark.parametrize(
    ("folder", "base", "name"),
    [
        ("weather-gguf", "models/chatglm3-6b", "weather"),
        ("weather.gguf", "models/chatglm3-6b", "weather"),
        ("weathergguf", "models/chatglm3-6b", "weathergguf"),
        ("gguf", "THUDM/chatglm3-6b", "chatglm3-6b"),
        ("gguf", "models/chatglm3-6b/", "chatglm3-6b"),
        ("gguf", ".", Path.cwd().name),
    ],
)
def test_a_gguf_has_a_name_where_its_folder_or_base_has_none(folder, base, name):
    assert gguf_name(folder, base) == name


def test_an_adapter_is_the_same_beside_an_exported_base(base, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(base)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    run("--to", "glm", "--base", base, "--output", tmp_path / "base")
    capsys.readouterr()
    run("--to", "adapter", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert "28.3% of the calls were exact as trained, and 6.7% beside full precision" in capsys.readouterr().out
    sealed = {"adapter_config.json", "adapter_model.safetensors", "adapter.gguf", "MODEL_LICENSE"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == sealed | {"manifest.json", "README.md"}
    assert verify(tmp_path / "out")["files"].keys() == sealed
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(theirs), logits(ours))
    assert str(tmp_path) not in (tmp_path / "out/adapter_config.json").read_text()


def test_room_for_an_adapter_in_half_precision_is_enough_for_its_gguf_in_float32(base, adapter_folder):
    adapter = adapter_folder(base)
    file = adapter / "adapter_model.safetensors"
    halves = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    own = sum(weight.nbytes for weight in halves.values())
    repeated = sum(2 * weight.nbytes for name, weight in halves.items() if "query_key_value.lora_A" in name)
    assert own + repeated + 2 * own <= plan_export("adapter", str(base), adapter).size < 2 * (own + repeated + 2 * own)


@pytest.mark.parametrize(
    ("bits", "told"), [(16, ""), (4, "beside a full-precision base this"), (None, "nothing records how this")]
)
def test_an_adapter_of_4_bits_is_not_the_model_that_was_trained(base, adapter_folder, tmp_path, capsys, bits, told):
    adapter = adapter_folder(base)
    if bits:
        seal(adapter, {"run": {"settings": {"base_bits": bits, "compute_dtype": "float32"}}})
    run("--to", "adapter", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert said.startswith(told)
    assert ("is not the model that was trained" in said) == (bits != 16)
    assert ("If it was trained in 4 bits" in said) == (bits is None)


def test_an_adapter_of_another_base_is_refused(base, adapter_folder, model_folder, tmp_path, capsys):
    adapter = adapter_folder(model_folder("llama"))
    told = refusal(capsys, "--to", "adapter", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert f"has no place in '{base}'; give its base" in told


def test_dora_has_no_gguf_and_says_so(base, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(base, target_modules=["dense"], use_dora=True, task_type="CAUSAL_LM")
    run("--to", "adapter", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    told = r"^no adapter\.gguf: .*use_dora is true, and llama\.cpp has no DoRA; merge it into its base with --to gguf\n"
    assert re.search(told, capsys.readouterr().out)
    assert not (tmp_path / "out/adapter.gguf").exists()


def test_transformers_reads_texts_as_ours(base, tmp_path):
    run("--to", "glm", "--base", base, "--output", tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), open_tokenizer(str(base))
    for text in ("你好", "  a\n\tb ", "people of philosophy"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "adapter"], "--adapter: give the folder of a trained adapter"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype float16: goes with --to glm, and --to is gguf; leave it out"),
        (["--to", "glm", "--type", "q8_0"], "--type q8_0: goes with --to gguf"),
        (["--to", "glm", "--into", "full"], "--into full: nothing is merged here; leave it out"),
        (["--to", "gguf", "--max_shard_size", "1GB"], "--max_shard_size 1GB: goes with --to glm, and --to is gguf"),
        (["--to", "glm", "--max_shard_size", "2 GB"], "--max_shard_size '2 GB': expected a size such as"),
        (["--to", "glm", "--adapter", "nowhere"], "nowhere: no adapter_config.json there"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(base, tmp_path, capsys, options, told):
    assert told in refusal(capsys, "--base", base, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_base_must_be_named_or_be_that_of_an_adapter(tmp_path, capsys):
    assert "--adapter: give the folder" in refusal(capsys, "--to", "glm", "--output", tmp_path / "out")
    told = refusal(capsys, "--to", "glm", "--base", tmp_path / "none", "--output", tmp_path / "out")
    assert re.search(r"--base .*none: ", told)


def test_a_hub_that_cannot_be_reached_is_told_with_the_option_that_names_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("component.run.hub.silence_of", lambda _: "no route")
    told = refusal(capsys, "--to", "glm", "--base", "someone/chatglm3", "--output", tmp_path / "out")
    assert "a folder: --base=/path/to/chatglm3, with" in told


def test_a_folder_that_another_process_makes_meanwhile_is_left_alone(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("component.export.output.check_output", lambda *_: None)
    (tmp_path / "out").mkdir()
    told = refusal(capsys, "--to", "glm", "--base", base, "--output", tmp_path / "out")
    assert f"--output {tmp_path / 'out'}: another process has made it meanwhile; choose another name" in told
    assert not list((tmp_path / "out").iterdir())


def test_a_dropout_that_other_programs_lack_is_told_once(base, adapter_folder, tmp_path, capsys):
    config = json.loads((base / "config.json").read_text()) | {"hidden_dropout": 0.1}
    (base / "config.json").write_text(json.dumps(config))
    options = ("--base", base, "--adapter", adapter_folder(base), "--output", tmp_path / "out")
    capsys.readouterr()
    run("--to", "adapter", *options)
    assert capsys.readouterr().err.count("hidden_dropout 0.1 is left out") == 1


def test_an_output_that_exists_is_left_alone(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "exists; choose another name" in refusal(capsys, "--to", "glm", "--base", base, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("glm", "transformers has a class of its own for it: merge it"),
        ("gguf", "convert_hf_to_gguf.py MERGED --outfile MODEL.gguf --outtype f16"),
        ("adapter", "take its adapter as it is"),
    ],
)
def test_other_families_are_told_their_way(model_folder, adapter_folder, tmp_path, capsys, to, told):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    for given in ((), ("--base", base)):
        error = refusal(capsys, "--to", to, "--adapter", adapter, "--output", tmp_path / "out", *given)
        assert "is of the type 'llama', and only ChatGLM2 and ChatGLM3 are exported" in error
        assert told in error
        merge = " ".join(map(str, ("script/merge_lora.py --adapter", adapter, *given, "--output MERGED")))
        assert (merge in error) == (to != "adapter")


def test_an_exported_folder_is_no_way_to_a_gguf(base, tmp_path, capsys):
    """llama.cpp's converter ends on its tokenizer."""
    run("--to", "glm", "--base", base, "--output", tmp_path / "glm")
    told = refusal(capsys, "--to", "gguf", "--base", tmp_path / "glm", "--output", tmp_path / "out")
    assert "export the ChatGLM that it was made of, with --base and --adapter" in told


def test_a_layout_that_others_lack_is_refused(base, tmp_path, capsys):
    config = json.loads((base / "config.json").read_text()) | {"rmsnorm": False}
    (base / "config.json").write_text(json.dumps(config))
    told = refusal(capsys, "--to", "gguf", "--base", base, "--output", tmp_path / "out")
    assert "rmsnorm is false" in told
    assert not list(tmp_path.glob("*out"))


def test_a_disk_that_fills_leaves_nothing(base, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("component.export.glm.write_shard", full)
    with pytest.raises(SystemExit) as stop:
        run("--to", "glm", "--base", base, "--output", tmp_path / "out")
    assert stop.value.code == 4
    assert (
        "could not be written ([Errno 28] No space left on device); nothing was left there" in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*out"))
