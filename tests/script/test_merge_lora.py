"""A merged model is its base with the adapter, whole or absent."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from component.chatglm import ChatGLMTokenizer
from component.export.tokenizer import export_template
from component.model import four_bit, load_adapter
from component.run.errors import ArgumentError
from component.run.manifest import seal
from component.trust import identify_base
from script import merge_lora

ROOT = Path(__file__).parents[2]
IDS = torch.arange(3, 43).reshape(2, 20)


def merge(*options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merge_lora.py", *map(str, options)])
        merge_lora.main()


def refusal(capsys, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        merge(*options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def logits(folder: Path, adapter: Path | None = None, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model = load_adapter(model, adapter) if adapter else model
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # as in training: where it is on, it computes in bfloat16
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    ("family", "tied"), [("chatglm", False), ("llama", False), ("llama", True)], ids=["chatglm", "llama", "tied"]
)
def test_a_merge_in_float32_gives_the_logits_of_base_and_adapter(model_folder, adapter_folder, tmp_path, family, tied):
    """Case 33 of the reliability scorecard."""
    base = model_folder(family, tie_word_embeddings=tied)
    adapter = adapter_folder(base)
    merge("--adapter", adapter, "--output", tmp_path / "merged", "--dtype", "float32")
    merged, expected = logits(tmp_path / "merged"), logits(base, adapter)
    assert difference(merged, expected) <= 1e-5
    assert difference(merged, logits(base)) > 0.1
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged/model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py")) or name.startswith("adapter")]
    assert not list(tmp_path.glob(".tmp-*"))


def test_both_merges_give_the_logits_of_their_base_and_say_what_they_are(
    model_folder, adapter_folder, tmp_path, capsys
):
    base = model_folder()
    adapter = adapter_folder(base)
    options = ("--adapter", adapter, "--dtype", "float32")
    merge(*options, "--output", tmp_path / "full", "--into", "full")
    assert "has no manifest.json, so nothing tells which base it was trained beside" in capsys.readouterr().out
    merge(*options, "--output", tmp_path / "trained", "--into", "trained")
    told = capsys.readouterr().out
    assert re.search(r"^rounding the base to 4 bits changes the adapted layers by 0\.\d+ times the adapter's", told)
    assert "has learned beside the rounded weights, and this merge keeps them. If you round it to 4 bits" in told
    trained = logits(base, adapter, quantization_config=four_bit(torch.float32))
    assert difference(logits(tmp_path / "trained"), trained) <= 1e-5
    assert difference(logits(tmp_path / "full"), logits(base, adapter)) <= 1e-5
    assert difference(logits(tmp_path / "full"), trained) > 0.01
    assert "quantization_config" not in json.loads((tmp_path / "trained/config.json").read_text())


def test_the_older_name_of_a_merge_into_what_was_trained(model_folder, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(model_folder())
    merge("--adapter", adapter, "--output", tmp_path / "new", "--into", "trained")
    capsys.readouterr()
    merge("--adapter", adapter, "--output", tmp_path / "old", "--from_4bit")
    assert capsys.readouterr().err.count("--from_4bit is called --into trained now") == 1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new")]
    assert weights[0] == weights[1]
    told = refusal(capsys, "--adapter", adapter, "--output", tmp_path / "x", "--from_4bit", "--into", "full")
    assert "--into is full; give one of them" in told


def test_an_adapter_of_a_run_is_merged_into_what_was_trained_and_tells_how(job, checkpoint, tmp_path, capsys):
    final = job() / "final"
    merge("--adapter", final, "--output", tmp_path / "merged")
    assert "this merge keeps them" in capsys.readouterr().out
    text = (tmp_path / "merged/merge.json").read_text()
    assert text.endswith("}\n")
    record = json.loads(text)
    assert record.pop("versions").keys() >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert re.fullmatch("[0-9a-f]{32}", record.pop("adapter"))
    assert record == {
        "into": "trained",
        "base": checkpoint.name,
        "base_model": identify_base(str(checkpoint)),
        "base_bits": 4,
        "compute_dtype": "float32",
        "dtype": "float32",
    }
    trained = logits(checkpoint, final, quantization_config=four_bit(torch.float32))
    assert difference(logits(tmp_path / "merged"), trained) <= 1e-5
    card = (tmp_path / "merged/README.md").read_text()
    assert "`chatglm3-nano` with a LoRA adapter merged into it, in `float32`." in card
    assert "| `train.jsonl` | 12 | 12 | " in card
    assert str(checkpoint.parent) not in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_has_the_bases_own_type(model_folder, adapter_folder, tmp_path, dtype):
    base = model_folder("llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    merge("--adapter", adapter_folder(base), "--output", tmp_path / "merged")
    weights = load_file(tmp_path / "merged/model.safetensors").values()
    assert {str(weight.dtype) for weight in weights} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_saved_in_shards_of_the_size_asked_for(model_folder, adapter_folder, tmp_path, dtype):
    adapter = adapter_folder(base := model_folder("llama"))
    merge("--adapter", adapter, "--output", tmp_path / "merged", "--dtype", dtype, "--max_shard_size", "50KB")
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {str(w.dtype) for shard in shards for w in load_file(shard).values()} == {f"torch.{dtype}"}
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # and not the owner's alone
    expected = logits(base, adapter)
    assert difference(logits(tmp_path / "merged"), expected) < 0.03 * expected.abs().max()


def test_a_merged_chatglm_chats(model_folder, adapter_folder, tmp_path):
    merge("--adapter", adapter_folder(model_folder()), "--output", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    response, history = model.chat(tokenizer, "Hello", history=[], do_sample=False, max_new_tokens=3)
    assert isinstance(response, str)
    assert [turn["role"] for turn in history] == ["user", "assistant"]


def test_a_merged_chatglm_has_what_other_programs_look_for(model_folder, adapter_folder, tmp_path, capsys):
    """transformers reads the right ids from tokenizer.json, where else it would make a tokenizer with wrong ones. Here,
    neither that file nor the template is used, also where the base had them, and from someone else."""
    base = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(base)
    adapter = adapter_folder(base)
    merge("--adapter", adapter, "--output", tmp_path / "merged")
    merged = tmp_path / "merged"
    config = json.loads((merged / "config.json").read_text())
    assert (config["architectures"], config["original_rope"]) == (["ChatGLMModel"], True)
    ids = Tokenizer.from_file(str(merged / "tokenizer.json")).encode("Hello, <think>world!").ids
    assert ids == tokenizer("Hello, <think>world!")["input_ids"]
    assert (merged / "chat_template.jinja").read_text() == export_template(3)

    shutil.copy(merged / "tokenizer.json", base)
    (base / "chat_template.jinja").write_text("{{ raise_exception('it was run') }}")
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(written | {"x": 1}))
    merge("--adapter", adapter, "--output", tmp_path / "again")
    assert capsys.readouterr().err.count("the base's chat template is not copied: ChatGLM's own takes its place") == 1
    assert json.loads((tmp_path / "again/config.json").read_text()) == config | {"x": 1}
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (merged / "tokenizer.json").read_bytes()
    text = "Hello, <think>world! <|user|> sop</s>"
    for folder in (merged, tmp_path / "again"):
        again = AutoTokenizer.from_pretrained(folder)
        assert isinstance(again, ChatGLMTokenizer)
        assert again(text) == tokenizer(text)
        assert (len(again), again.get_vocab()) == (len(tokenizer), tokenizer.get_vocab())
        chat = [{"role": "user", "content": text}]
        assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


def test_a_tokenizer_that_tokenizer_json_cannot_hold_is_merged_with_a_warning(
    model_folder, adapter_folder, tmp_path, capsys, monkeypatch
):
    def refuse(*_):
        raise ArgumentError("it has other settings")

    monkeypatch.setattr("component.export.tokenizer.prove", refuse)
    merge("--adapter", adapter_folder(model_folder()), "--output", tmp_path / "merged")
    told = "no tokenizer.json is written, and only this program reads the tokenizer rightly: it has other settings"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "merged/tokenizer.json").exists()
    AutoTokenizer.from_pretrained(tmp_path / "merged")


@pytest.fixture
def llama(model_folder) -> Path:
    """A base model whose tokenizer has ChatML's control tokens and no chat template."""
    folder = model_folder("llama", vocab_size=260, eos_token_id=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def generation_ends(folder: Path) -> int | list[int]:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_merged_model_writes_and_ends_answers_as_its_adapter_was_taught(llama, job, tmp_path, capsys):
    turns = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "word"}]
    taught = {"rows": [{"messages": turns}] * 4, "chat_template": "chatml", "max_steps": 40}
    final = job("chat", **taught, model_name_or_path=str(llama)) / "final"
    capsys.readouterr()
    merge("--adapter", final, "--output", tmp_path / "merged", "--into", "trained")
    told = f"chat_template and eos_token: taken over from {final}; answers end at <|im_end|>"
    assert capsys.readouterr().err.count(told) == 1
    assert generation_ends(tmp_path / "merged") == [1, 259]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, do_sample=False, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "word<|im_end|>"


def test_what_is_taken_over_from_an_adapter_of_others_is_read_and_not_run(llama, adapter_folder, tmp_path):
    adapter = adapter_folder(llama)
    template = "{{ raise_exception('it was run') }}"
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    auto_map = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    values = {"chat_template": template, "eos_token": eos, "tokenizer_class": "Unknown", "auto_map": auto_map}
    (adapter / "tokenizer_config.json").write_text(json.dumps(values))
    merge("--adapter", adapter, "--output", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (template, "<|im_end|>")
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(llama))


def test_without_a_conversation_of_the_adapter_that_of_the_base_stays(llama, adapter_folder, tmp_path):
    adapter = adapter_folder(llama)
    (adapter / "tokenizer_config.json").write_text('{"eos_token": null}')
    (adapter / "chat_template.jinja").write_text("one of several, which are those of the base")
    (adapter / "additional_chat_templates").mkdir()
    merge("--adapter", adapter, "--output", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "</s>")
    assert generation_ends(tmp_path / "merged") == 1


def test_a_merged_chatglm_keeps_its_own_conversation(model_folder, adapter_folder, tmp_path):
    adapter = adapter_folder(model_folder())
    merge("--adapter", adapter, "--output", tmp_path / "merged")
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<|user|>", "chat_template": "no"}')
    merge("--adapter", adapter, "--output", tmp_path / "again")
    for file in (tmp_path / "merged").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert generation_ends(tmp_path / "merged") == 2


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokenizer_config.json", b'{"eos_token": "word"}', "eos_token is 'word', which is no control token of the"),
        ("tokenizer_config.json", b"[", "cannot be read"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_a_conversation_that_the_base_cannot_have_is_refused(
    llama, adapter_folder, tmp_path, capsys, monkeypatch, file, content, fault
):
    adapter = adapter_folder(llama)
    (adapter / file).write_bytes(content)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    told = refusal(capsys, "--adapter", adapter, "--output", tmp_path / "merged")
    assert f"{adapter / file}: {fault}" in told


def test_the_command_of_the_readme_merges(model_folder, adapter_folder, tmp_path):
    base = model_folder()
    adapter = adapter_folder(base)
    (command,) = re.findall(r"^python script/merge_lora.py (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    paths = {"output/chatglm3-6b/final": adapter, "models/chatglm3-6b": base, "models/merged": tmp_path / "merged"}
    merge(*(paths.get(word, word) for word in command.split()))
    assert (tmp_path / "merged/model.safetensors").exists()


def test_bad_input_is_refused_before_anything_loads(model_folder, adapter_folder, tmp_path, capsys, monkeypatch):
    for room in ("model", "export.merge"):
        monkeypatch.setattr(f"component.{room}.from_pretrained", lambda *_, **__: pytest.fail("something was loaded"))
    base = model_folder()
    adapter, output = adapter_folder(base), tmp_path / "merged"
    usual = ("--adapter", adapter, "--output", output)
    assert "no adapter_config.json there" in refusal(capsys, "--adapter", base, "--output", output)
    assert "this is an adapter" in refusal(capsys, *usual, "--base", adapter)
    assert "--max_shard_size 'big'" in refusal(capsys, *usual, "--max_shard_size", "big")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (base, tmp_path / "link"):
        assert f"{taken}: exists; choose another name" in refusal(capsys, "--adapter", adapter, "--output", taken)
    config = json.loads((base / "config.json").read_text())
    for quantization in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        assert "the base is quantised" in refusal(capsys, *usual)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        merge(*usual, "--dtype", "int8")
    assert not output.exists()


def test_an_adapter_of_another_model_and_one_with_nan_are_refused(model_folder, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(model_folder("llama"))
    usual = ("--adapter", adapter, "--output", tmp_path / "merged")
    assert "not an adapter of" in refusal(capsys, *usual, "--base", model_folder("chatglm"))
    weights = load_file(adapter / "adapter_model.safetensors")
    spoiled = {name: weight * float("nan") if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(spoiled, adapter / "adapter_model.safetensors")
    assert "lora_B.default.weight is not finite" in refusal(capsys, *usual)
    stray = {"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.ones(4, 64)}
    save_file(weights | stray, adapter / "adapter_model.safetensors")
    assert "layers.9.q_proj.lora_A.weight has no place" in refusal(capsys, *usual)
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    assert "has no place" in refusal(capsys, *usual)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("fault", [OSError("not a repository, or no network"), ValueError("no name for the hub"), None])
def test_a_wrong_base_is_a_fault_of_what_was_given(model_folder, adapter_folder, tmp_path, capsys, monkeypatch, fault):
    def ask_the_hub(*_, **__):
        if fault:
            raise fault

    monkeypatch.setattr("component.trust.cached_file", ask_the_hub)
    monkeypatch.setattr("component.trust.require_hub_or_cache", lambda *_: None)
    usual = ("--adapter", adapter_folder(model_folder()), "--output", tmp_path / "merged")
    said = str(fault or "no config.json is to be had; give a folder")
    assert f"--base someone/nothing: {said}" in refusal(capsys, *usual, "--base", "someone/nothing")
    (tmp_path / "empty").mkdir()
    assert f"--base {tmp_path}/empty: no config.json" in refusal(capsys, *usual, "--base", tmp_path / "empty")
    assert f"--base {tmp_path}/none: no folder" in refusal(capsys, *usual, "--base", tmp_path / "none")


def test_a_damaged_adapter_is_refused(model_folder, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(model_folder())
    usual = ("--adapter", adapter, "--output", tmp_path / "merged")
    seal(adapter, {})
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged, message in {
        whole[:-1] + bytes([whole[-1] ^ 1]): "adapter_model.safetensors has other contents than were written",
        whole[:-1]: f"adapter_model.safetensors has {len(whole) - 1:,} bytes, not {len(whole):,}",
    }.items():
        weights.write_bytes(damaged)
        assert f"{adapter}: {message}; copy it again" in refusal(capsys, *usual)
    weights.unlink()
    assert "adapter_model.safetensors is missing" in refusal(capsys, *usual)
    assert not (tmp_path / "merged").exists()
    weights.write_bytes(whole)
    merge(*usual)
    assert (tmp_path / "merged/model.safetensors").exists()


def test_an_adapter_of_a_tied_head_is_refused(model_folder, adapter_folder, tmp_path, capsys):
    adapter = adapter_folder(
        model_folder("llama", tie_word_embeddings=True), task_type="CAUSAL_LM", target_modules=["lm_head"]
    )
    assert "shares with its embedding" in refusal(capsys, "--adapter", adapter, "--output", tmp_path / "merged")


# The program, sent a signal at a moment such as "rename 1", before the first renaming, or "rename 2", after it.
KILLED = """if True:
    import collections, os, signal, sys
    import component.model, safetensors.torch, transformers.modeling_utils, transformers
    from script import merge_lora
    counts, deadly, signum = collections.Counter(), sys.argv.pop(1), int(sys.argv.pop(1))
    def watch(owner, name):
        call = getattr(owner, name)
        def pass_moment():
            counts[name] += 1
            print(f"moment {name} {counts[name]}", flush=True)
            if deadly == f"{name} {counts[name]}":
                os.kill(os.getpid(), signum)
        def watched(*args, **kwargs):
            pass_moment()
            result = call(*args, **kwargs)
            pass_moment()
            return result
        setattr(owner, name, watched)
    watch(component.model, "from_pretrained")
    watch(os, "fsync"), watch(os, "rename")
    watch(transformers.PreTrainedModel, "save_pretrained")
    watch(transformers.PreTrainedTokenizerBase, "save_pretrained")
    watch(transformers.modeling_utils, "safe_save_file")
    merge_lora.main()
"""


def run_killed(moment: str, options: tuple, signum: int = signal.SIGKILL) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, moment, *map(str, (int(signum), *options))]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def slowly(*values) -> list:
    """Parameters that `make test` leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def is_whole(folder: Path, expected: torch.Tensor) -> bool:
    AutoTokenizer.from_pretrained(folder)
    return difference(logits(folder), expected) <= 1e-5


@pytest.fixture
def chatglm_merge(model_folder, adapter_folder, tmp_path):
    base = model_folder()
    adapter = adapter_folder(base)
    options = ("--adapter", adapter, "--output", tmp_path / "merged", "--dtype", "float32")
    return options, tmp_path / "merged", logits(base, adapter)


@pytest.mark.parametrize(
    "moment", ["safe_save_file 2", *slowly("save_pretrained 3", "fsync 3", "rename 1", "rename 2")]
)
def test_a_killed_merge_leaves_all_or_nothing(chatglm_merge, moment):
    options, output, expected = chatglm_merge
    assert run_killed(moment, options).returncode == -signal.SIGKILL
    assert output.exists() == (moment == "rename 2")
    if not output.exists():
        merge(*options)
    assert is_whole(output, expected)
    assert not list(output.parent.glob(".tmp-*"))


@pytest.mark.parametrize("signum", [signal.SIGINT, *slowly(signal.SIGTERM)])
@pytest.mark.parametrize(
    "moment", [*slowly("from_pretrained 1"), "from_pretrained 4", *slowly("safe_save_file 2", "rename 2")]
)
def test_an_interrupted_merge_says_so_in_one_line_and_leaves_all_or_nothing(chatglm_merge, moment, signum):
    options, output, expected = chatglm_merge
    done = run_killed(moment, options, signum)
    assert done.returncode == 128 + signum
    state = "is there" if moment == "rename 2" else "was not made"
    assert done.stderr.splitlines()[-1] == f"{signal.Signals(signum).name}: stopped; {output} {state}"
    assert "Traceback" not in done.stderr
    assert is_whole(output, expected) if moment == "rename 2" else not output.exists()
    assert not list(output.parent.glob(".tmp-*"))


@pytest.mark.slow
def test_a_merge_killed_at_every_moment_leaves_all_or_nothing(chatglm_merge):
    """Case 8 of the reliability scorecard, for merging: before and after every call that touches the disk."""
    options, output, expected = chatglm_merge
    moments = re.findall("moment (.*)", run_killed("never", options).stdout)
    assert len(moments) > 20
    left = []
    for moment in moments:
        shutil.rmtree(output, ignore_errors=True)
        assert run_killed(moment, options).returncode == -signal.SIGKILL
        if output.exists():
            assert is_whole(output, expected), moment
            left.append(moment)
    assert left == moments[moments.index("rename 2") :]


def test_a_full_disk_is_said_with_exit_code_4(chatglm_merge, capsys, monkeypatch):
    options, output, _ = chatglm_merge

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as stop:
        merge(*options)
    assert stop.value.code == 4
    assert "No space left on device" in capsys.readouterr().err
    assert not output.exists()


def test_a_merge_looks_at_its_output_before_it_loads(chatglm_merge, tmp_path, capsys, monkeypatch):
    options, _, _ = chatglm_merge
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    for folder, message in (
        (tmp_path / "file/merged", f"nothing can be written in {tmp_path}/file"),
        (tmp_path / "new/merged", "what is written needs 0."),
    ):
        with pytest.raises(SystemExit) as stop:
            merge(*options[:2], "--output", folder, "--dtype", "float32")
        assert stop.value.code == 4
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
        monkeypatch.setattr("shutil.disk_usage", lambda _: free)
