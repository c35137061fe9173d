"""The program as a user runs it, on a tiny model that was trained by the real command."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train_qlora
from component.export.merge import merged_model, plan_merge
from component.inference.calls import Answer, Call
from component.inference.engine import Engine
from component.score.comparison import CLASSES
from component.score.measure import Progress
from script import score

from ..runs import at_call, send, write_rows

ROOT = Path(__file__).parents[2]
TOOLS = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


def row(i: int, city: str) -> dict:
    turns = [
        {"role": "user", "content": f"Weather {i}"},
        {"role": "tool", "name": "weather", "parameters": {"city": city}, "observation": "sunny"},
        {"role": "assistant", "content": f"Sunny in {city}."},
    ]
    return {"tools": TOOLS, "conversations": turns}


ROWS = [row(i, city) for i, city in enumerate(["Rome", "Oslo", "Paris", "Quito"])]


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A run's output folder, and the file with the rows that it has learned."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(checkpoint),
        "train_file": str(write_rows(folder / "train.jsonl", ROWS)),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "save_strategy": "no",
    }
    (folder / "args.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_qlora.py", "--train_args_file", str(folder / "args.json")])
        train_qlora.main()
    return folder / "run", folder / "train.jsonl"


def run(*options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["score.py", *map(str, options)])
        score.main()


@pytest.fixture
def refusal(capsys, monkeypatch):
    """The one message with which the program ends, and exit code 2. No weight may have been loaded."""

    def refuse(*options) -> str:
        def load(*_, **__):
            raise AssertionError("weights were loaded")

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("component.inference.session.load_base", load)
            patch.setattr("component.run.process.leave", sys.exit)
            run(*options)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refuse


def test_base_and_tuned_stand_side_by_side_and_the_files_agree_with_the_table(
    trained, checkpoint, tmp_path, capsys, monkeypatch
):
    output, data = trained
    monkeypatch.setattr("component.score.measure.MANY", 4)
    files = {"--json": tmp_path / "score.json", "--html": tmp_path / "score.html"}
    run(
        "--adapter",
        output / "final",
        "--data",
        data,
        "--max_new_tokens",
        8,
        *(word for pair in files.items() for word in pair),
    )
    shown, told = capsys.readouterr()
    assert re.search(r"train\.jsonl: 4 rows, 8 questions, of which 4 want a call and 4 a text$", shown, re.MULTILINE)
    assert f"\nadapter {output / 'final'}, base {checkpoint} in 4 bits, float32 arithmetic\n" in shown
    assert "rendering 4 rows" in told
    assert re.search(r"max_new_tokens is 8, and the longest right answer has \d\d tokens: ", told)
    assert re.search(r" scored in \d+ s\n", told)
    assert "recall: these rows were learned" in shown
    assert re.search(r"^ +n +base +tuned +tuned - base$", shown, re.MULTILINE)
    facts = json.loads(files["--json"].read_text())
    about = facts["about"]
    assert about["adapter"].pop("digest") == plan_merge(output / "final").record()["adapter"]
    assert about["versions"].keys() >= {"torch", "transformers", "peft"}
    assert abs(datetime.now(UTC) - datetime.fromisoformat(about.pop("date"))) < timedelta(minutes=10)
    assert {key: value for key, value in about.items() if key != "versions"} == {
        "adapter": {"path": str(output / "final")},
        "base": str(checkpoint),
        "base_bits": 4,
        "dtype": "float32",
        "data_format": "chatglm3",
        "max_new_tokens": 8,
        "batch": 64,
    }
    figures = {figure["name"]: figure for figure in facts["figures"]}
    assert figures["call exact"]["n"] == figures["text exact"]["n"] == 4
    for model in ("base", "tuned"):
        given = [answer["given"][model] for answer in facts["answers"]]
        exact = np.mean(
            [not one["fault"] for one, asked in zip(given, facts["answers"], strict=True) if asked["expected"]["calls"]]
        )
        assert figures["call exact"]["values"][model]["value"] == exact
    assert figures["loss per token"]["values"]["tuned"]["value"] < figures["loss per token"]["values"]["base"]["value"]
    assert {figure["name"] for figure in facts["unrelated_text"]} == {
        "loss per token, Chinese",
        "loss per token, English",
    }
    page = files["--html"].read_text()
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["figures"] == facts["figures"]


def test_hand_written_answers_give_hand_counted_figures(trained, tmp_path, capsys, monkeypatch):
    """The base gives no call, the tuned model the right one but for Quito, and no right text."""

    def ask(session, model, columns, task, *_):
        given = {name: [] for name in columns}
        for question in task.questions:
            city = question.calls[0].parameters["city"] if question.calls else ""
            call = Call("weather", {"city": "Lima" if city == "Quito" else city})
            for name, adapted in columns.items():
                given[name].append(Answer(calls=(call,)) if adapted and city else Answer("Sunny."))
        return given

    monkeypatch.setattr("component.score.measure.ask", ask)
    output, data = trained
    run("--adapter", output / "final", "--data", data, "--json", tmp_path / "a.json", "--train_file", data)
    figures = {one["name"]: one for one in json.loads((tmp_path / "a.json").read_text())["figures"]}
    found = {name: [figures[name]["values"][model]["value"] for model in ("base", "tuned")] for name in figures}
    del found["loss per token"]
    assert found == {
        "decision right": [0.5, 1],
        "needless calls": [0, 0],
        "missed calls": [1, 0],
        "function right": [0, 1],
        "call exact": [0, 0.75],
        "call nearly exact": [0, 0.75],
        "text exact": [0, 0],
        "text nearly exact": [0, 0],
        "argument precision": [None, 0.75],
        "argument recall": [0, 0.75],
        "argument F1": [0, 0.75],
    }
    shown = capsys.readouterr().out
    assert re.search(r"^weather  city +4 +0 \(0 given\) +3 \(4 given\)$", shown, re.MULTILINE)
    assert "\n--train_file is not used: every function of these rows was seen in training\n" in shown


@pytest.mark.slow
def test_variants_have_a_column_each(trained, tmp_path):
    output, data = trained
    variants = "trained,merged,full,requantised"
    options = ("--adapter", output / "final", "--data", data, "--limit", 1, "--max_new_tokens", 2)
    run(*options, "--variants", variants, "--json", tmp_path / "a.json", "--keep", data)
    facts = json.loads((tmp_path / "a.json").read_text())
    models = [
        "base",
        "tuned",
        "merged",
        "full",
        "merged to 8 bits",
        "merged to 4 bits",
        "full to 8 bits",
        "full to 4 bits",
    ]
    assert facts["models"] == models
    assert facts["references"] == {"tuned": "base"} | dict.fromkeys(models[2:], "tuned")
    (loss,) = [one for one in facts["figures"] if one["name"] == "loss per token"]
    values = {model: loss["values"][model]["value"] for model in models}
    assert values["merged"] == pytest.approx(values["tuned"], rel=1e-4)
    assert len({round(value, 5) for value in values.values()}) >= 6
    assert [one["name"] for one in facts["unrelated_text"]] == ["loss per token, train.jsonl"]


def test_a_model_without_an_adapter_is_scored_alone(trained, checkpoint, capsys):
    _, data = trained
    run("--model", checkpoint, "--data", data, "--limit", 2, "--max_new_tokens", 4)
    shown = capsys.readouterr().out
    assert re.search(r"^ +n +base$", shown, re.MULTILINE)
    assert "recall:" not in shown


def test_a_signal_ends_the_program_at_once_and_says_that_nothing_was_written(trained, tmp_path, monkeypatch, capsys):
    output, data = trained
    monkeypatch.setattr("component.run.process.leave", sys.exit)
    with at_call(3, Engine, "step", send(signal.SIGINT)), pytest.raises(SystemExit) as stop:
        run("--adapter", output / "final", "--data", data, "--json", tmp_path / "score.json")
    assert stop.value.code == 130
    assert "SIGINT: stopped; nothing was written; --limit scores fewer rows\n" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_each_models_answers_and_losses_have_a_progress_of_their_own(trained, monkeypatch, capsys):
    """Ten seconds go by at every look at the clock."""
    output, data = trained
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr("component.score.measure.time", clock)
    run("--adapter", output / "final", "--data", data, "--keep", data, "--max_new_tokens", 4, "--batch", 2)
    told = capsys.readouterr().err
    for model in ("base", "tuned"):
        assert f"{model}: 0 of 8 answers\n" in told, "no forecast before anything is known"
        assert f"{model}: 8 of 8 answers, 0 s left\n" in told
        assert f"{model}: 4 of 8 rows for the loss, " in told
        assert f"{model}: 8 of 8 rows for the loss, 0 s left\n" in told


def test_a_forecast_waits_for_as_many_as_are_at_work_at_once(monkeypatch, log):
    seconds = iter([0, 0, 20, 40])
    monkeypatch.setattr("component.score.measure.time", SimpleNamespace(monotonic=seconds.__next__))
    progress = Progress("base", 100, "answers", together=10)
    progress.add(9)
    progress.add(11)
    assert log[0].endswith("base: 9 of 100 answers\n")
    assert log[1].endswith("base: 20 of 100 answers, 160 s left\n")


def test_openai_rows_are_asked_by_a_chat_template(model_folder, capsys):
    base = model_folder("llama", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(base)
    options = ("--chat_template", "chatml", "--max_new_tokens", 1)
    run("--model", base, "--data", ROOT / "data/functions_openai.jsonl", *options)
    assert "12 rows, 20 questions, of which 8 want a call and 12 a text" in capsys.readouterr().out


def test_questions_that_do_not_fit_the_context_are_counted(checkpoint, tmp_path, capsys):
    base = shutil.copytree(checkpoint, tmp_path / "chatglm3-short")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"seq_length": 500}))
    question = {"role": "user", "content": "so " * 300}
    long = ROWS[0] | {"conversations": [question, *ROWS[0]["conversations"][1:]]}
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[0], long])
    run("--model", base, "--data", data, "--max_new_tokens", 4)
    shown = capsys.readouterr().out
    assert "\n2 of the questions left out: longer than the model's context of 500 tokens\n" in shown
    assert "\n1 of the rows left out of the loss: longer than the model's context of 500 tokens\n" in shown
    assert re.search(r"^decision right +2 ", shown, re.MULTILINE)


def test_bad_input_gets_one_message_before_weights_are_loaded(trained, refusal, model_folder, tmp_path):
    output, data = trained
    final = output / "final"
    unanswered, no_tools = tmp_path / "unanswered.jsonl", tmp_path / "no_tools.jsonl"
    write_rows(unanswered, [{"conversations": [{"role": "user", "content": "?"}]}])
    write_rows(no_tools, [ROWS[0] | {"tools": "a hammer"}])
    for options, fault in (
        (("--data", unanswered), "unanswered.jsonl:1: nothing to learn: no answer or call"),
        (("--data", no_tools), "no_tools.jsonl:1: tools: is no list of functions with names"),
        (("--data", tmp_path / "gone.jsonl"), "gone.jsonl: no such file"),
        (("--data", data, "--keep", tmp_path / "gone.jsonl"), "gone.jsonl: no such file"),
        (("--data", data, "--base", model_folder("llama")), "llama3-nano"),
        (("--data", data, "--json", tmp_path / "no/such.json"), "nothing can be written in"),
        (("--data", data, "--html", tmp_path), "a link or no file"),
        (("--data", data, "--json", data), "holds rows that are read, and would be written over"),
        (("--data", data, "--keep", no_tools, "--html", no_tools), "holds rows that are read"),
        (("--data", data, "--data_format", "firefly"), "train.jsonl:1: firefly has no place for tool and tools; score"),
    ):
        message = refusal("--adapter", final, *options)
        assert fault in message, message
        assert "Traceback" not in message
    broken = shutil.copytree(final, tmp_path / "broken")
    with open(broken / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "adapter_model.safetensors" in refusal("--adapter", broken, "--data", data)
    assert "no adapter_config.json there" in refusal("--adapter", tmp_path, "--data", data)


def test_weights_that_are_not_finite_are_told_and_not_scored(trained, checkpoint, capsys, monkeypatch, tmp_path):
    _, data = trained
    base = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (file,) = base.glob("*.safetensors")
    weights = load_file(file)
    weights["transformer.encoder.final_layernorm.weight"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    monkeypatch.setattr("component.run.process.leave", sys.exit)
    with pytest.raises(SystemExit) as stop:
        run("--model", base, "--data", data)
    assert stop.value.code == 3
    assert "base: the loss of a row is not finite" in capsys.readouterr().err


def test_a_merge_that_is_refused_is_told_before_weights_are_loaded(trained, refusal, checkpoint, tmp_path):
    output, data = trained
    adapter, base = shutil.copytree(output / "final", tmp_path / "adapter"), tmp_path / checkpoint.name
    (adapter / "manifest.json").unlink()  # it tells the digest of the base, which changes here
    shutil.copytree(checkpoint, base)
    config = json.loads((base / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | quantised))
    options = ("--adapter", adapter, "--base", base, "--base_bits", "4", "--data", data)
    assert "the base is quantised" in refusal(*options, "--variants", "trained,full")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ((), "give either --adapter or --model"),
        (("--adapter", "a", "--model", "b"), "give either --adapter or --model"),
        (("--model", "b", "--variants", "full"), "--variants needs --adapter"),
        (("--adapter", "a", "--variants", "fool"), "'fool' is none of trained, merged, full, requantised"),
        (("--adapter", "a", "--limit", "0"), "0 is not positive"),
        (("--adapter", "a", "--json", "b", "--html", "./b"), "--json and --html name the same file"),
    ],
)
def test_options_that_make_no_sense_are_refused(refusal, options, fault):
    assert fault in refusal("--data", "rows.jsonl", *options)


def test_the_page_of_the_score_shows_commands_that_parse_and_names_every_option(monkeypatch):
    page = (ROOT / "docs/score.md").read_text()
    commands = re.findall(r"^python (script/score\.py .*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.split())
        options = vars(score.parse_command_line())
    assert not [name for name in options if f"`--{name}`" not in page]
    assert not [name for name in CLASSES if name not in page]


@pytest.mark.slow
def test_the_command_itself_ends_with_0_and_a_table_and_with_2_and_a_message(trained):
    output, data = trained

    def start(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "script/score.py", "--data", data, *words]
        return subprocess.run(command, capture_output=True, text=True)

    done = start("--adapter", output / "final", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "loss per token" in done.stdout
    refused = start("--adapter", output / "none")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_base_and_tuned_share_an_engine_and_one_merge_is_in_memory_at_a_time(trained, monkeypatch):
    output, data = trained
    engines, merges, models = [], [], []

    def make_engine(model, *rest, **options):
        engines.append(type(model).__name__)
        models.append(weakref.ref(model))
        return Engine(model, *rest, **options)

    def merge(*names, **options):
        assert [gone() for gone in models + merges] == [None] * (len(models) + len(merges))
        merges.append(weakref.ref(model := merged_model(*names, **options)))
        return model

    monkeypatch.setattr("component.score.measure.Engine", make_engine)
    monkeypatch.setattr("component.score.measure.merged_model", merge)
    options = ("--adapter", output / "final", "--data", data, "--limit", 1, "--max_new_tokens", 2, "--keep", data)
    run(*options, "--variants", "trained,merged,full")
    assert len(merges) == 2
    assert engines == ["PeftModelForCausalLM", *["ChatGLMForConditionalGeneration"] * 2]
