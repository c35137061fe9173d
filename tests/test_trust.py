"""What comes from elsewhere is read and never run, and what is secret is never written: cases of hostile folders.

Every hostile file leaves a canary when it is run; none may sing. Of `.bin` weights plain tensors are taken, by torch's
restricted unpickler alone, or the file is refused by its name; no other pickle is opened. Case 45 of the reliability
scorecard.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_qlora
from script import chat_demo, inspect_data, merge_lora

ROOT = Path(__file__).parents[1]
ROW = {"conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]}


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile ones make; a test fails if it is there at its end, or if anything is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def plant_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(canary)))
    torch.save(Bomb(canary), file.with_suffix(".pt"))


def plant_python(folder: Path, canary: Path) -> None:
    source = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "custom_generate/generate"):
        (folder / f"{name}.py").write_text(source)


def shard(model: Path, canary: Path) -> None:
    """Lay weights as ChatGLM2-6B has them, in .bin shards alone, the second of which is hostile."""
    weights = load_file(model / "model.safetensors")
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save(weights, model / names[0])
    torch.save(weights | {"x": Bomb(canary)}, model / names[1])
    edit(model / "pytorch_model.bin.index.json", weight_map=dict(zip("ab", names, strict=True)))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (model / name).unlink()


def plant_alone(model: Path, canary: Path, **options) -> None:
    torch.save({"x": Bomb(canary)}, model / "pytorch_model.bin", **options)
    (model / "model.safetensors").unlink()


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def call(program, *options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, options)])
        program.main()


def refusal(capsys, program, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        call(program, *options)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def settings(tmp_path):
    """Writes the settings of a short run into tmp_path / "run"; returns the options of the program."""

    def write(model: Path, rows=(ROW,) * 4, **changes) -> tuple:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "output_dir": str(tmp_path / "run"),
            "model_name_or_path": str(model),
            "train_file": str(tmp_path / "data.jsonl"),
            "max_steps": 2,
            "lora_rank": 4,
            "lora_dropout": 0.0,
            "save_strategy": "no",
        }
        (tmp_path / "settings.json").write_text(json.dumps(values | changes))
        return "--train_args_file", tmp_path / "settings.json"

    return write


REMOTE = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
HOSTILE_MODELS = {
    "a bare pickle for weights": (
        lambda model: (model / "model.safetensors").unlink(),
        "pytorch_model.bin: no whole zip archive",
    ),
    "pickles of other names": (
        lambda model: [(model / name).unlink() for name in ("model.safetensors", "pytorch_model.bin")],
        "its weights are a pickle (adapter_model.bin)",
    ),
    "an archive that runs something": (
        lambda model: plant_alone(model, model.parent / "canary"),
        "pytorch_model.bin: it asks for __builtin__.getattr",
    ),
    "an archive in a later protocol": (
        lambda model: plant_alone(model, model.parent / "canary", pickle_protocol=4),
        "pytorch_model.bin: it asks for pathlib.Path.touch",
    ),
    "an archive of the old format": (
        lambda model: plant_alone(model, model.parent / "canary", _use_new_zipfile_serialization=False),
        "pytorch_model.bin: no whole zip archive",
    ),
    "a shard that runs something": (
        lambda model: shard(model, model.parent / "canary"),
        "pytorch_model-00002-of-00002.bin: it asks for __builtin__.getattr",
    ),
    "an index of .bin that leads outside": (
        lambda model: (
            edit(model / "pytorch_model.bin.index.json", weight_map={"x": "../x.bin"})
            or (model / "model.safetensors").unlink()
        ),
        "weight_map names '../x.bin'",
    ),
    "python for the model": (
        lambda model: edit(model / "config.json", model_type="evil", auto_map=REMOTE, trust_remote_code=True),
        "config.json: model_type 'evil' is not known to transformers",
    ),
    "python for the tokenizer": (
        lambda model: edit(
            model / "tokenizer_config.json",
            tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
            trust_remote_code=True,
        ),
        "tokenizer_config.json: the class that auto_map names is not known",
    ),
    "an index of pickles": (
        lambda model: edit(model / "model.safetensors.index.json", weight_map={"x": "pytorch_model.bin"}),
        "weight_map names 'pytorch_model.bin'",
    ),
    "an index that leads outside": (
        lambda model: edit(model / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}),
        "weight_map names '../x.safetensors'",
    ),
    "weights of another name": (
        lambda model: edit(model / "config.json", transformers_weights="adapter_model.bin"),
        "transformers_weights is 'adapter_model.bin'",
    ),
    "a kernel from a hub": (
        lambda model: edit(model / "config.json", text_config={"attn_implementation": "evil/kernel"}),
        "'evil/kernel' is code from a hub",
    ),
    "an adapter in its place": (
        lambda model: edit(model / "adapter_config.json", base_model_name_or_path="someone/else"),
        "is an adapter",
    ),
    "deep nesting": (
        lambda model: (model / "config.json").write_text('{"a":' + "[" * 100_000),
        "config.json: cannot be read",
    ),
    "no object": (lambda model: (model / "config.json").write_text("[]"), "config.json: must hold one JSON object"),
}


@pytest.mark.parametrize("kind", HOSTILE_MODELS)
def test_a_hostile_model_is_refused_by_every_program_and_runs_nothing(
    model_folder, adapter_folder, settings, tmp_path, canary, capsys, kind
):
    model = model_folder()
    adapter = adapter_folder(model)
    plant_python(model, canary)
    plant_pickle(model / "pytorch_model.bin", canary)
    plant_pickle(model / "adapter_model.bin", canary)
    spoil, message = HOSTILE_MODELS[kind]
    spoil(model)
    options = settings(model, data_format="chatglm3")
    for program, arguments in {
        train_qlora: options,
        inspect_data: options,
        chat_demo: ("--model", model, "--adapter", adapter),
        merge_lora: ("--base", model, "--adapter", adapter, "--output", tmp_path / "merged"),
    }.items():
        assert message in refusal(capsys, program, *arguments), program.__name__
        assert not canary.exists(), program.__name__


def test_a_misspelt_folder_is_refused_by_every_program_and_the_hub_is_not_asked(
    model_folder, adapter_folder, settings, tmp_path, capsys, monkeypatch
):
    adapter = adapter_folder(model_folder())
    model, data = f"{tmp_path.name}/chatglm3-nnao", ROOT / "data/dummy_data_chatglm3.jsonl"
    options = settings(model)
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("component.trust.cached_file", lambda *_, **__: pytest.fail("asked the hub"))
    for program, arguments in {
        train_qlora: options,
        inspect_data: options,
        chat_demo: ("--model", model, "--adapter", adapter, "--data", data),
        merge_lora: ("--base", model, "--adapter", adapter, "--output", tmp_path / "merged"),
    }.items():
        assert f"did you mean {tmp_path.name}/chatglm3-nano?" in refusal(capsys, program, *arguments), program.__name__


def test_a_hubs_model_is_checked_as_a_folder_is(model_folder, canary, monkeypatch):
    from component.run.errors import ArgumentError
    from component.trust import check_model

    model = model_folder()
    found = lambda name, file, **_: str(model / file) if name == "someone/model" and (model / file).exists() else None  # noqa: E731
    monkeypatch.setattr("component.trust.cached_file", found)
    monkeypatch.setattr("component.trust.require_hub_or_cache", lambda *_: None)
    check_model("someone/model")
    edit(model / "config.json", model_type="evil", auto_map=REMOTE)
    with pytest.raises(ArgumentError, match="model_type 'evil' is not known"):
        check_model("someone/model")


def test_an_official_folder_loads_in_every_program_and_its_python_and_pickles_do_not(
    model_folder, adapter_folder, settings, tmp_path, canary
):
    model = model_folder()
    adapter = adapter_folder(model)
    plant_python(model, canary)
    for name in ("pytorch_model.bin", "training_args.bin"):
        plant_pickle(model / name, canary)
    plant_pickle(adapter / "adapter_model.bin", canary)
    edit(model / "config.json", auto_map=REMOTE, trust_remote_code=True)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    edit(model / "generation_config.json", auto_map=REMOTE, trust_remote_code=True, custom_generate=str(model))
    call(inspect_data, *settings(model))
    call(train_qlora, *settings(model))
    call(merge_lora, "--adapter", adapter, "--output", tmp_path / "merged")
    with pytest.raises(SystemExit) as stop:
        call(chat_demo, "--model", model, "--adapter", adapter)
    assert stop.value.code == 1  # it chatted, and was not taught by the sample data
    for folder in (tmp_path / "run/final", tmp_path / "merged"):
        assert not [file for file in folder.glob("*.json") if "Evil" in file.read_text()]
        assert not list(folder.rglob("*.py"))


def test_a_vocabulary_outside_of_the_folder_is_not_read(model_folder, tmp_path):
    from transformers import AutoTokenizer

    from component.model import from_pretrained

    model = model_folder()
    own = (model / "tokenizer.model").read_bytes()
    for path in ("../secret", str(tmp_path / "secret"), "/etc/passwd"):
        edit(model / "tokenizer_config.json", vocab_file=path, tokenizer_file=path)
        tokenizer = from_pretrained(AutoTokenizer, str(model))
        tokenizer.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved/tokenizer.model").read_bytes() == own


HOSTILE_ADAPTERS = [
    ({"peft_type": "EVIL"}, "peft_type is 'EVIL'; expected 'LORA'"),
    ({"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"}}, "auto_mapping is {'base_model"),
    ({"megatron_config": {"a": 1}, "megatron_core": "modeling_evil"}, "megatron_config is {'a': 1}"),
    ({"megatron_core": "modeling_evil"}, "megatron_core is 'modeling_evil'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": {"a": []}}, "init_lora_weights is {'a': []}"),
    ({"modules_to_save": ["embedding"]}, "modules_to_save is ['embedding']"),
    ({"r": 10**9}, "is no part of a LoRA of rank 1000000000"),
    ({"r": 8}, "is no part of a LoRA of rank 8"),
    ({"r": "4"}, "r is '4'; expected a positive integer"),
    ({"r": True}, "r is True"),
    ({"r": None}, "r is None"),
    ({"lora_alpha": -1}, "lora_alpha is -1"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_dropout": {}}, "lora_dropout is {}"),
    ({"target_modules": "(a+)+$"}, "target_modules is '(a+)+$'"),
    ({"rank_pattern": {"(a+)+$": 10**9}}, "rank_pattern is {'(a+)+$'"),
    ({"target_parameters": ["weight"]}, "target_parameters is ['weight']"),
    ({"layer_replication": [[0, 10**9]]}, "layer_replication is"),
    ({"key_of_tomorrow": 1}, "key_of_tomorrow is 1"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
]


@pytest.mark.parametrize(
    ("changes", "message"), HOSTILE_ADAPTERS, ids=[str(changes)[:40] for changes, _ in HOSTILE_ADAPTERS]
)
def test_a_hostile_adapter_is_refused_before_anything_loads_and_imports_nothing(
    model_folder, adapter_folder, tmp_path, canary, capsys, monkeypatch, changes, message
):
    model = model_folder()
    adapter = adapter_folder(model)
    plant_python(adapter, canary)
    monkeypatch.syspath_prepend(str(adapter))
    monkeypatch.setattr("component.model.from_pretrained", lambda *_, **__: pytest.fail("something was loaded"))
    monkeypatch.setattr(chat_demo, "from_pretrained", lambda *_, **__: pytest.fail("something was loaded"))
    edit(adapter / "adapter_config.json", **changes)
    file = f"{adapter}/adapter_"
    for program, options in {chat_demo: ("--model", model), merge_lora: ("--output", tmp_path / "merged")}.items():
        shown = refusal(capsys, program, "--adapter", adapter, *options)
        assert message in shown
        assert file in shown


@pytest.mark.parametrize(
    ("changes", "message"), HOSTILE_ADAPTERS, ids=[str(changes)[:40] for changes, _ in HOSTILE_ADAPTERS]
)
def test_no_run_begins_from_a_hostile_adapter(
    model_folder, adapter_folder, settings, canary, capsys, monkeypatch, changes, message
):
    model = model_folder()
    adapter = adapter_folder(model)
    plant_python(adapter, canary)
    monkeypatch.syspath_prepend(str(adapter))
    monkeypatch.setattr("component.model.load_model", lambda *_: pytest.fail("the base was loaded"))
    edit(adapter / "adapter_config.json", **changes)
    shown = refusal(capsys, train_qlora, *settings(model, adapter_name_or_path=str(adapter)))
    assert message in shown
    assert f"{adapter}/adapter_" in shown


@pytest.mark.parametrize("name", ["../../etc", "../chatglm3-nano", "someone/else", "https://a:b@c/d", "", None])
def test_the_base_that_an_adapter_names_is_a_folder_here_or_is_not_taken(
    model_folder, adapter_folder, tmp_path, capsys, monkeypatch, name
):
    model = model_folder()
    adapter = adapter_folder(model)
    edit(adapter / "adapter_config.json", base_model_name_or_path=name)
    monkeypatch.chdir(model)
    monkeypatch.setattr("component.trust.cached_file", lambda *_, **__: pytest.fail("asked the hub"))
    options = ("--adapter", adapter, "--output", tmp_path / "merged")
    assert "give the base with --base" in refusal(capsys, merge_lora, *options)
    call(merge_lora, *options, "--base", model)
    assert (tmp_path / "merged/model.safetensors").exists()


def test_an_adapter_of_anything_but_tensors_is_refused(
    model_folder, adapter_folder, settings, tmp_path, canary, capsys
):
    model = model_folder()
    adapter = adapter_folder(model)
    weights, archive = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    tensors = load_file(weights)
    faults = {
        "adapter_model.bin: no whole zip archive": weights.unlink,
        "adapter_model.bin: it asks for __builtin__.getattr": lambda: torch.save(Bomb(canary), archive),
        "embedding.weight of shape [4, 4]": lambda: torch.save({"embedding.weight": torch.ones(4, 4)}, archive),
        "no safetensors file": lambda: weights.write_bytes(b"\xff" * 100),
        "embedding.weight of shape": lambda: save_file({"embedding.weight": torch.ones(4, 4)}, weights),
        "adapter_model.bin there; the": lambda: [file.unlink() for file in adapter.glob("adapter_model.*")],
    }
    plant_pickle(archive, canary)
    for message, spoil in faults.items():
        spoil()
        for program, options in {chat_demo: ("--model", model), merge_lora: ("--output", tmp_path / "merged")}.items():
            assert message in refusal(capsys, program, "--adapter", adapter, *options)
        assert message in refusal(capsys, train_qlora, *settings(model, adapter_name_or_path=str(adapter)))
    for name, save in (("by_safetensors", lambda: save_file(tensors, weights)), ("by_bin", weights.unlink)):
        torch.save(tensors, archive)
        save()
        call(merge_lora, "--adapter", adapter, "--output", tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("by_safetensors", "by_bin"))
    assert all(torch.equal(one[name], other[name]) for name in one)


ESCAPES = (
    "{{% for c in ().__class__.__mro__[1].__subclasses__() %}}{{{{ c('touch {canary}', shell=True) }}}}{{% endfor %}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
    "{{{{ messages.append.__self__.__class__.__base__.__subclasses__() }}}}",
    "{{{{ messages.append(messages[0]) }}}}",
    "{{% set x = namespace() %}}{{{{ x.__init__.__globals__['os'].system('touch {canary}') }}}}",
    "{{% include '{canary}' %}}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(model_folder, settings, canary, capsys, escape):
    model = model_folder("llama")
    (model / "chat_template.jinja").write_text(escape.format(canary=canary))
    rows = [{"messages": ROW["conversations"]}]
    shown = refusal(capsys, train_qlora, *settings(model, rows, data_format="chat_template"))
    assert "data.jsonl:1:" in shown


@pytest.mark.parametrize("planted", ["rejected.jsonl", "loss.png"])
def test_a_run_follows_no_link_that_lies_in_its_folder(model_folder, settings, tmp_path, planted):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / planted).symlink_to(tmp_path / "victim")
    rows = [*[ROW] * 4, {"conversations": []}]
    call(train_qlora, *settings(model_folder(), rows, on_bad_row="skip", max_bad_share=1.0))
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "run" / planted).is_symlink()


def test_a_page_is_not_written_through_a_link(model_folder, settings, tmp_path, capsys):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for page in (tmp_path / "link", "/dev/stdout"):
        assert f"--html {page}: a link" in refusal(capsys, inspect_data, *settings(model_folder()), "--html", page)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoints_pickles_run_nothing_on_resume(model_folder, settings, tmp_path, canary, file, capsys):
    options = settings(model_folder(), save_strategy="steps", save_steps=1)
    call(train_qlora, *options)
    (tmp_path / "run/final").rename(tmp_path / "final")
    checkpoint = tmp_path / "run/checkpoint-1"
    (checkpoint / file).write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(SystemExit) as stop:
        call(train_qlora, *options, f"resume_from_checkpoint={checkpoint}")
    assert stop.value.code == 4
    assert f"checkpoint-1: {file} has" in capsys.readouterr().err
    with contextlib.suppress(Exception, SystemExit):  # asked for against all advice, it may fail as it will
        call(train_qlora, *options, f"resume_from_checkpoint={checkpoint}", "resume_despite_changes=true")
    assert not canary.exists()


def test_pickled_settings_beside_a_checkpoint_are_not_opened(model_folder, settings, tmp_path, canary):
    options = settings(model_folder(), save_strategy="steps", save_steps=1)
    call(train_qlora, *options)
    (tmp_path / "run/final").rename(tmp_path / "final")
    (tmp_path / "run/checkpoint-1/training_args.bin").write_bytes(pickle.dumps(Bomb(canary)))
    call(train_qlora, *options)
    assert (tmp_path / "run/final").is_dir()
    assert not canary.exists()


SECRETS = {
    "HF_TOKEN": "hf_CanaryOfHuggingFace0000000000000000",
    "HUGGING_FACE_HUB_TOKEN": "canary-of-the-old-variable",
    "WANDB_API_KEY": "canary0of0wandb0000000000000000000000000",
    "HTTPS_PROXY": "http://user:canary-of-a-proxy@127.0.0.1:9/",
    "AWS_SECRET_ACCESS_KEY": "canary/of/a/cloud+key",
}
SAID = ("canary", "Canary")
UNCAUGHT = """if True:
    import os, sys, logging, warnings
    import train_qlora
    def fail(args, training_args):
        password = os.environ["WANDB_API_KEY"]
        secrets = {name: os.environ[name] for name in os.environ if name.isupper()}
        warnings.warn(f"a warning with {password}")
        logging.getLogger("transformers").error(f"an error with {password}")
        logging.getLogger("huggingface_hub").error(f"an error with {password}")
        proxy, token = os.environ["HTTPS_PROXY"], os.environ["HF_TOKEN"]
        raise RuntimeError(f"failed with {password} of {token} at {proxy} {training_args.hub_token}")
    import component.model
    component.model.load_model = fail
    train_qlora.main()
"""


@pytest.mark.parametrize(
    ("program", "changes", "code"),
    [
        (["train_qlora.py"], {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 1}, 0),
        (["train_qlora.py", "--dry_run"], {}, 0),
        (["train_qlora.py"], {"model_name_or_path": "https://user:canary-of-a-model@host/x"}, 2),
        pytest.param(["train_qlora.py"], {"hub_token": ["canary-of-a-wrong-type"]}, 2, marks=pytest.mark.slow),
        pytest.param(["train_qlora.py", "--dry_run", "hub_token=1234567890"], {}, 0, marks=pytest.mark.slow),  # text
        pytest.param(
            ["script/inspect_data.py"],
            {"model_name_or_path": "https://user:canary-of-a-model@host/x"},
            2,
            marks=pytest.mark.slow,
        ),
        (["-c", UNCAUGHT], {}, 1),
    ],
    ids=["run", "dry run", "credentials in a name", "wrong type", "number", "inspector", "uncaught"],
)
def test_no_secret_reaches_the_terminal_or_a_file(model_folder, settings, tmp_path, program, changes, code):
    options = settings(model_folder(), **{"hub_token": "canary-of-the-settings"} | changes)
    done = subprocess.run(
        [sys.executable, *program, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), "NO_PROXY": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    written = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert len(written) > 10 or "--dry_run" in program or code
    for name, text in {"stdout": done.stdout.encode(), "stderr": done.stderr.encode(), **written}.items():
        assert not [word for word in (*SAID, "1234567890") if word.encode() in text], f"{name}: {text[:2000]}"
    if code == 1:
        assert "failed with <WANDB_API_KEY> of <HF_TOKEN> at http://<credentials>@127.0.0.1:9/" in done.stderr
        assert done.stderr.count("with <WANDB_API_KEY>") == 4


def split(model: Path) -> dict[str, torch.Tensor]:
    """Lay weights as ChatGLM2-6B has them, in two .bin shards alone."""
    weights = load_file(model / "model.safetensors")
    names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in (0, 1)]
    index = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        torch.save({name: weights[name] for name in weights if index[name] == shard}, model / shard)
    edit(model / "pytorch_model.bin.index.json", metadata={}, weight_map=index)
    (model / "model.safetensors").unlink()
    return weights


@pytest.fixture
def opened(monkeypatch) -> list[tuple[str, dict]]:
    """Names and options of all files that torch.load is given, by us, transformers or peft."""
    calls, load = [], torch.load

    def record(file, *args, **options):
        calls.append((Path(file).name, options))
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", record)
    return calls


def test_bin_weights_are_opened_by_the_restricted_unpickler_alone(model_folder, settings, tmp_path, canary, opened):
    """Shards of .bin train and merge to the bytes that their safetensors give, and nothing else is unpickled."""
    model = model_folder()
    plant_pickle(model / "training_args.bin", canary)
    options = settings(model)
    for name in ("safetensors", "bin"):
        if name == "bin":
            assert not opened
            split(model)
        call(train_qlora, *options, f"output_dir={tmp_path / name}")
        call(merge_lora, "--adapter", tmp_path / name / "final", "--output", tmp_path / f"merged_{name}")
    for file in ("{}/final/adapter_model.safetensors", "merged_{}/model.safetensors"):
        one, other = (load_file(tmp_path / file.format(name)) for name in ("safetensors", "bin"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name for name, _ in opened} == {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    assert all((given.get("weights_only"), given.get("mmap")) == (True, True) for _, given in opened)


def test_a_bin_that_changes_makes_another_run(model_folder):
    from component.trust import identify_base

    model = model_folder()
    weights = split(model)
    before = identify_base(str(model))
    shard = model / "pytorch_model-00002-of-00002.bin"
    torch.save({name: weight + 1 for name, weight in torch.load(shard).items()}, shard)
    assert identify_base(str(model)) != before
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with_safetensors = identify_base(str(model))
    shard.unlink()
    assert identify_base(str(model)) == with_safetensors  # what is not loaded does not count


def test_weights_that_are_pickled_are_converted_as_the_docs_say(model_folder, tmp_path):
    import re

    from transformers import AutoModelForCausalLM

    from component.model import from_pretrained

    model = model_folder()
    before = load_file(model / "model.safetensors")
    torch.save(dict(list(before.items())[:5]), model / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(list(before.items())[5:]), model / "pytorch_model-00002-of-00002.bin")
    (model / "model.safetensors").unlink()
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)[1]
    exec(code.replace("/models/chatglm2-6b", str(model)), {})
    after = from_pretrained(AutoModelForCausalLM, str(model)).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
