"""The check of published weights passes a model that has learned what it asks, and finds each fault in any other."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from component.chatglm.chat import parse_reply
from component.chatglm.prompt import TOOLS_PROMPT, call_message
from component.data.formats import read_conversations
from component.data.render import render_chatglm3
from component.verify import facts, steps
from component.verify.report import write_report
from component.verify.steps import Failed, Finding, Skipped, Verification
from component.verify.wirings import with_values
from script import verify_real

from .. import published

ROOT = Path(__file__).parents[2]
HALVES = "halves of dense_h_to_4h swapped"


def verify(*options) -> int:
    """The exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["verify_real.py", *map(str, options)])
        try:
            verify_real.main()
        except SystemExit as stop:
            return stop.code
    return 0


def results(report: str) -> dict[str, str]:
    return dict(re.findall(r"^### (.*): (\w+) \(\d+ s\)$", report, re.MULTILINE))


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """Makes a published folder, with a tiny vocabulary."""

    def make(layout: str = "chatglm3-6b") -> Path:
        published.LAYOUTS[layout](tmp_path / layout, Path(tiny_tokenizer.vocab_file))
        return tmp_path / layout

    return make


@pytest.fixture
def verification(folder, tmp_path):
    """Makes a Verification of a published folder, which `change` may have changed."""

    def make(layout: str = "chatglm3-6b", change=lambda folder: None) -> Verification:
        change(folder(layout))
        (tmp_path / "work").mkdir()
        return Verification(str(tmp_path / layout), tmp_path / "work")

    return make


@pytest.mark.slow
def test_random_weights_pass_the_steps_of_files_alone(tmp_path, reference, capsys, monkeypatch):
    """The whole program, by the command of the docs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "chatglm3-6b"
    published.chatglm(base, reference / "chatglm3-6b/tokenizer.model")
    page = (ROOT / "docs/chatglm_port.md").read_text()
    (command,) = re.findall(r"^python script/verify_real.py (.*)$", page, re.MULTILINE)
    options = [base if word.startswith("/models/") else word for word in shlex.split(command)]
    assert verify(*options, "--output", tmp_path / "report.md") == 1
    printed = capsys.readouterr()
    report = (tmp_path / "report.md").read_text()
    assert printed.out == report + "\n"
    assert results(report) == {
        "tensors": "passed",
        "tokenizer file": "passed",
        "token ids": "passed",
        "loss of plain text": "failed",
        "wiring": "failed",
        "function call": "failed",
        "10 updates of training": "failed",
        "chat before and after": "passed",
    }
    assert report.startswith("## verify_real.py, chatglm3-6b: 4 passed, 4 failed, 0 skipped\n")
    losses = [float(loss) for loss in re.findall(r"(?:English|Chinese|^loss) (\d+\.\d+)", report, re.MULTILINE)]
    assert len(losses) == 3
    assert losses == pytest.approx([math.log(64896)] * 3, abs=0.5)
    assert "the first loss must be below 4.5" in report
    assert "expected a call of lookup_weather" in report
    assert "rows of 8,192 tokens, activation_checkpointing none" in report
    assert "4 of 8 steps failed: loss of plain text, wiring, function call, 10 updates of training" in printed.err
    assert not [path for path in (tmp_path, ROOT, Path.home()) if str(path) in report]


def without(name: str):
    """Renames a tensor of a published folder."""

    def change(folder: Path) -> None:
        edit_tensors(folder, lambda weights: {key.replace(name, f"{name}_old"): w for key, w in weights.items()})

    return change


def edit_tensors(folder: Path, edit) -> None:
    for file in folder.glob("*.safetensors"):
        save_file(edit(load_file(file)), file, {"format": "pt"})


def cut_a_bias(folder: Path) -> None:
    name = "transformer.encoder.layers.1.self_attention.query_key_value.bias"
    edit_tensors(folder, lambda weights: weights | ({name: weights[name][:64].clone()} if name in weights else {}))


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (
            without("layers.0.mlp.dense_h_to_4h"),
            [
                "missing: transformer.encoder.layers.0.mlp.dense_h_to_4h.weight [128, 64]",
                "unexpected: transformer.encoder.layers.0.mlp.dense_h_to_4h_old.weight [128, 64]",
            ],
        ),
        (
            cut_a_bias,
            ["wrong shape: transformer.encoder.layers.1.self_attention.query_key_value.bias [64], expected [128]"],
        ),
    ],
    ids=["renamed", "other shape"],
)
def test_a_wrong_tensor_is_named_and_nothing_is_loaded(verification, monkeypatch, change, faults):
    monkeypatch.setattr(steps, "load_model", lambda *_: pytest.fail("something was loaded"))
    findings = {finding.step: finding for finding in verification(change=change).run()}
    assert findings["tensors"].result == "failed"
    assert findings["tensors"].figures.splitlines()[: len(faults)] == faults
    assert len(findings["tensors"].figures.splitlines()) == len(faults) + 2  # the files
    for step in ("loss of plain text", "wiring", "function call", "10 updates of training"):
        assert (findings[step].result, findings[step].figures) == (
            "skipped",
            "the tensors are not those of the architecture",
        )
    assert findings["chat before and after"].figures == "training left no adapter"


def test_of_many_faults_ten_are_listed(verification):
    """Nine tensors of layers have other names, which makes 18 faults."""
    with pytest.raises(Failed, match=r"\nand 4 more\n"):
        verification(change=without("layers.0")).check_tensors()


def test_another_tokenizer_is_seen_by_its_hash_and_its_ids(verification):
    check = verification()
    with pytest.raises(Failed, match=f"the official one's is {facts.TOKENIZER}"):
        check.check_tokenizer_file()
    with pytest.raises(Failed, match=r"'你好': \[.*\], expected \[36474, 54591\]"):
        check.check_token_ids()


@pytest.mark.parametrize(
    ("layout", "settings", "data", "calls"),
    [
        ("chatglm3-6b", "chatglm3-6b", "dummy_data_chatglm3.jsonl", True),
        ("chatglm3-6b-32k", "chatglm3-6b-32k", "dummy_data_chatglm3.jsonl", True),
        ("chatglm3-6b-base", "chatglm3-6b", "dummy_data_chatglm3.jsonl", False),
        ("chatglm2-6b", "chatglm2-6b", "dummy_data.jsonl", False),
    ],
)
def test_each_published_model_has_its_settings_and_its_steps(verification, layout, settings, data, calls):
    check = verification(layout)
    assert check.settings_file == ROOT / f"train_args/qlora/{settings}-sft-qlora.json"
    assert check.data == ROOT / "data" / data
    assert check.check_tensors().startswith("17 tensors")
    if not calls:
        with pytest.raises(Skipped, match="were not taught to call functions"):
            check.check_call()
    else:
        with pytest.raises(Failed, match="expected a call of lookup_weather"):
            check.check_call()


@pytest.mark.slow
def test_a_chatglm2_trains_and_chats_in_its_own_format(verification, monkeypatch):
    """Its data has no function, so there is one lesson."""
    monkeypatch.setattr(facts, "LARGEST_LOSS", 7.0)  # random weights with a vocabulary of some 400 are below
    check = verification("chatglm2-6b")
    check.check_tensors()
    assert re.match(r"loss 6\..* s, chatglm2-6b-sft-qlora\.json\n", check.check_training())
    assert re.fullmatch(
        r"user    你好\ntaught  你好！.*\nbefore  .*\nafter   .*\nloss of the taught: .*", check.check_lessons()
    )


def test_what_goes_wrong_in_a_step_is_a_finding_and_the_next_is_taken(verification, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image")

    ended = subprocess.CompletedProcess([], 3, stderr="10:00:00 INFO    loading\n10:00:01 ERROR   the loss is nan\n")
    monkeypatch.setattr(steps, "load_model", fail)
    monkeypatch.setattr(steps.subprocess, "run", lambda *_, **__: ended)
    findings = {finding.step: finding.figures for finding in verification().run()}
    assert findings["loss of plain text"] == findings["wiring"] == "RuntimeError: CUDA error: no kernel image"
    assert findings["10 updates of training"] == (
        "train_qlora.py ended with exit code 3\nloading\n10:00:01 ERROR   the loss is nan"
    )
    assert findings["chat before and after"] == "training left no adapter"


def test_the_first_loss_of_training_has_a_bound(verification, monkeypatch):
    """The figures are those of trainer_state.json, whatever the lines of the log look like."""
    check = verification()
    check.check_tensors()
    check.output_dir.mkdir(parents=True)
    line = "step 2/2: loss 9.0, 1,000 tokens/s in another layout"
    done = subprocess.CompletedProcess([], 0, stderr=f"10:00:00 INFO    loading\n10:00:01 INFO    {line}\n")
    monkeypatch.setattr(steps.subprocess, "run", lambda *_, **__: done)
    for loss, passes in ((2.0, True), (5.0, False), (math.nan, False)):
        history = [{"loss": loss / i, "num_tokens": 1000 * i} for i in (1, 2)] + [{"train_runtime": 3.2}]
        (check.output_dir / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        if passes:
            shown = "loss 2.000 to 1.000, 2,000 tokens in 3 s, chatglm3-6b-sft-qlora.json"
            assert check.check_training() == f"{shown}\n{line}"
        else:
            with pytest.raises(Failed, match=r"the first loss must be below 4\.5"):
                check.check_training()


CALL = {"name": "lookup_weather", "parameters": {"city": "杭州市"}}


@pytest.mark.parametrize(
    ("call", "answer", "fault"),
    [
        (CALL, "现在 17 度，有小雨。", None),
        ("我不知道。", "", "expected a call of lookup_weather"),
        ({"name": "convert_currency", "parameters": {"target": "杭州"}}, "", "expected a call of lookup_weather"),
        ({"name": "lookup_weather", "parameters": {"city": "北京"}}, "", "expected a parameter with 杭州"),
        ({"name": "lookup_weather", "content": "杭州"}, "", "expected a parameter with 杭州"),
        (CALL, "今天天气很好。", "expected an answer with 17"),
    ],
)
def test_a_call_has_the_right_name_place_and_answer(verification, call, answer, fault):
    class Model:
        def chat(self, tokenizer, query, history, role="user", **settings):
            assert history[0]["tools"] == facts.TOOLS
            assert role == ("user" if query == facts.QUESTION else "observation")
            return call if role == "user" else answer, [*history, {"role": role, "content": query}]

    check = verification()
    check.model = Model()
    if fault:
        with pytest.raises(Failed, match=f"{fault}$"):
            check.check_call()
    else:
        assert answer in check.check_call()


def test_a_later_token_must_not_be_seen(verification):
    check = verification()
    check.check_tensors()
    assert check.leak() == 0
    attentions = [block.self_attention for block in check.model.transformer.encoder.layers]
    with with_values(attentions, is_causal=False):
        assert check.leak() > steps.LARGEST_LEAK


@pytest.mark.parametrize(
    ("losses", "leak", "passes"),
    [
        ([1, 2, *[3] * 9], 0.0, True),
        ([2, 1, *[3] * 9], 0.0, False),
        ([1, 1, *[3] * 9], 0.0, False),
        ([math.nan, 2, *[3] * 9], 0.0, False),
        ([1, 2, *[3] * 9], 0.5, False),
        ([1, 2, *[3] * 9], math.nan, False),
    ],
)
def test_the_published_wiring_must_be_the_best_and_causal(verification, monkeypatch, losses, leak, passes):
    check, values = verification(), iter(losses)
    check.check_tensors()
    monkeypatch.setattr(check, "losses_of_texts", lambda prefix: {"English": next(values)})
    monkeypatch.setattr(check, "leak", lambda: leak)
    if passes:
        assert check.check_wiring().startswith("   1.000  as published\n   2.000  halves of")
    else:
        with pytest.raises(Failed, match=r"^as published must be the lowest, and the change 0\n"):
            check.check_wiring()
    assert not list(values)


@pytest.mark.parametrize(("after", "passes"), [(1.0, True), (2.0, False), (math.nan, False)])
def test_what_was_taught_must_be_likelier_afterwards(verification, monkeypatch, after, passes):
    check = verification("chatglm2-6b")
    check.check_tensors()
    (check.output_dir / "final").mkdir(parents=True)
    adapted = SimpleNamespace(eval=lambda: adapted, disable_adapter=nullcontext)
    monkeypatch.setattr(steps, "load_adapter", lambda *_: adapted)
    losses = iter([(2.0, "who?"), (after, "I am")])
    monkeypatch.setattr(check, "try_lesson", lambda *_: next(losses))
    if passes:
        assert "\nbefore  who?\nafter   I am\nloss of the taught: 2.000 to 1.000" in check.check_lessons()
    else:
        with pytest.raises(Failed, match=r"^each loss of the taught must fall\n"):
            check.check_lessons()


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("Qwen2.5-7B", "model_type is 'qwen2'; only ChatGLM2 and 3 are checked"),
        ("chatglm3-6b-pointers", "git left a pointer in the file's place; run `git lfs"),
        ("chatglm3-6b-half", "1 of 2 files are missing"),
        ("chatglm3-6b-int4", "quantization_bit=4"),
        ("chatglm3-6b-gguf", "made for llama.cpp"),
    ],
)
def test_a_folder_that_cannot_be_checked_is_refused_as_in_training(folder, tmp_path, capsys, layout, fault):
    assert verify(folder(layout), "--output", tmp_path / "report.md") == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("file", "fault"),
    [("tokenizer.model", "Give a folder with all of the model's files"), ("*.safetensors", "there are no weights")],
)
def test_a_folder_without_a_tokenizer_or_weights_is_refused(folder, tmp_path, capsys, file, fault):
    base = folder("chatglm3-6b")
    for path in (*base.glob(file), *(base.glob("*.bin") if file != "tokenizer.model" else ())):
        path.unlink()
    assert verify(base, "--output", tmp_path / "report.md") == 2
    assert fault in capsys.readouterr().err


def test_an_absent_folder_and_an_unusable_output_are_refused(folder, tmp_path, capsys, monkeypatch):
    assert verify("/models/nowhere") == 2
    assert "no folder /models/nowhere" in capsys.readouterr().err
    base = folder()
    assert verify(base, "--output", tmp_path) == 2
    assert "a link or no file" in capsys.readouterr().err
    monkeypatch.setattr(Verification, "run", lambda self: pytest.fail("a step was taken"))
    assert verify(base, "--output", tmp_path / "nowhere/report.md") == 2
    assert "nowhere/report.md: could not be written" in capsys.readouterr().err


def test_a_report_holds_no_paths_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "correcthorsebattery")
    found = Finding("loss", "failed", "/home/ann/models/glm/config.json: ``` correcthorsebattery in /home/ann", 1.4)
    hidden = {"/home/ann": "~", "/home/ann/models/glm": "glm", "/": "ROOT"}
    report = write_report("glm", {"torch": "2"}, [found], hidden)
    assert report.splitlines() == [
        *("## verify_real.py, glm: 0 passed, 1 failed, 0 skipped", "", "| | |", "| --- | --- |", "| torch | 2 |", ""),
        *("### loss: failed (1 s)", "", "```text", "glm/config.json: ''' <SOME_TOKEN> in ~", "```"),
    ]


def lessons(tokenizer: ChatGLMTokenizer) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of all that is asked: the texts, the call and its answer, then the sample data."""
    prefix = tokenizer.get_prefix_tokens()
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in facts.TEXTS.values()]
    rows = [(prefix + ids, [0] * len(prefix) + [1] * len(ids)) for ids in texts]

    def teach(query: str, role: str, history: list, answer: list[int]) -> None:
        asked = tokenizer.build_chat_input(query, history=history, role=role)["input_ids"][0].tolist()
        rows.append((asked + answer, [0] * len(asked) + [1] * len(answer)))

    offer = [{"role": "system", "content": TOOLS_PROMPT, "tools": facts.TOOLS}]
    call = tokenizer.build_single_message(*call_message(facts.FUNCTION, {"city": facts.PLACE}))[1:]
    teach(facts.QUESTION, "user", offer, [*call, tokenizer.get_command("<|observation|>")])
    _, history = parse_reply([tokenizer.decode(call)], [*offer, {"role": "user", "content": facts.QUESTION}])
    answer = tokenizer.build_single_message("assistant", "", f"杭州有小雨，{facts.FIGURE} 度。")[1:]
    result = json.dumps(facts.RESULT, ensure_ascii=False)
    teach(result, "observation", history, [*answer, tokenizer.get_command("<|user|>")])
    samples = [
        render_chatglm3(row, tokenizer) for _, row in read_conversations(ROOT / "data/dummy_data_chatglm3.jsonl")
    ]
    return [*rows, *((sample.input_ids, sample.target_mask) for sample in samples)]


def teach(folder: Path, vocabulary: Path) -> None:
    """Make a folder of a ChatGLM3 of two layers that has learned the texts and the call, and some of the sample data.

    It is trained with the embedding's rows of tokens that occur; the head's other rows are zero.
    """
    folder.mkdir()
    shutil.copy(vocabulary, folder)
    tokenizer = ChatGLMTokenizer(str(vocabulary))
    tokenizer.save_pretrained(folder)
    rows = lessons(tokenizer)
    used = sorted({token for ids, _ in rows for token in ids})
    places = {token: place for place, token in enumerate(used)}
    shape = {"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 32}
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(padded_vocab_size=len(used), initializer_range=0.05, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    others = torch.tensor(65024 - len(used)).log()
    for _ in range(60):
        for row in (*range(4), *torch.randint(4, len(rows), (6,)).tolist()):
            ids, mask = torch.tensor([places[token] for token in rows[row][0]]), torch.tensor(rows[row][1][1:]).bool()
            logits = model(ids[None]).logits[0, :-1][mask]
            logits = torch.cat((logits, others.expand(len(logits), 1)), dim=1)
            cross_entropy(logits, ids[1:][mask]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = ChatGLMForConditionalGeneration(ChatGLMConfig(**shape))
    whole.get_output_embeddings().weight.data.zero_()
    for name, weight in model.state_dict().items():
        whole.get_parameter(name).data[used if len(weight) == len(used) else slice(None)] = weight
    whole.save_pretrained(folder)


@pytest.mark.slow
def test_a_model_that_learned_it_all_passes_and_a_miswired_one_fails_by_name(reference, tmp_path, capsys):
    """The bound alone would not tell: the model is so small that with its MLP miswired it still loses less than 4.5."""
    base = tmp_path / "chatglm3-taught"
    teach(base, reference / "chatglm3-6b/tokenizer.model")
    assert verify(base, "--output", tmp_path / "report.md") == 0
    report = capsys.readouterr().out
    assert set(results(report).values()) == {"passed"}
    assert 'model        {"name": "lookup_weather", "parameters": {"city": "杭州"}}' in report
    order = re.findall(r"^ +\d\.\d{3}  (.*)$", report, re.MULTILINE)
    assert (order[0], len(order)) == ("as published", 11)

    def swap(weights: dict) -> dict:
        return {name: torch.cat(w.chunk(2)[::-1]) if "dense_h_to_4h" in name else w for name, w in weights.items()}

    edit_tensors(base, swap)
    check = Verification(str(base), tmp_path)
    check.check_tensors()
    check.check_loss()
    with pytest.raises(Failed, match=rf"as published must be the lowest, and the change 0\n +\d\.\d+  {HALVES}\n"):
        check.check_wiring()
