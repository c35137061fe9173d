"""A session's prompts are the text of training, and its answers what the model wrote."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file

from component.chatglm.prompt import TOOLS_PROMPT
from component.data.conversation import choose_learned
from component.data.formats import parse_chatglm3, parse_firefly, parse_row
from component.data.render import render_chatglm2, render_chatglm3
from component.inference.calls import Answer, Call, to_message
from component.inference.session import Session, choose_bits, choose_dtype, choose_format
from component.inference.stream import Piece
from component.model import open_tokenizer
from component.run.errors import ArgumentError, DataError, Fault
from tests.component.data.test_chat_template import FAMILIES, make_tokenizer
from tests.component.inference.test_syntax import LEARNED, TOKENIZERS
from tests.conftest import read_jsonl


@pytest.mark.parametrize(
    ("name", "answers", "parse", "render"),
    [("chatglm3", 203, parse_chatglm3, render_chatglm3), ("chatglm2", 159, parse_firefly, render_chatglm2)],
)
def test_the_prompt_of_every_learned_answer_is_the_golden_row_before_it(
    reference, real_tokenizer, name, answers, parse, render
):
    session, seen = Session(real_tokenizer, name), 0
    for row in read_jsonl(reference / f"golden/{name}_sft.jsonl"):
        conversation = parse(row["sample"])
        for i, turn in enumerate(conversation.turns):
            if turn.learned:
                alone = (replace(other, learned=i == at) for at, other in enumerate(conversation.turns))
                learned = render(replace(conversation, turns=tuple(alone)), real_tokenizer).target_mask
                before = replace(conversation, turns=conversation.turns[:i])
                assert session.prompt(before) == row["input_ids"][: learned.index(1)], row["name"]
                seen += 1
    assert seen == answers


WEATHER = {
    "name": "get_weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "clock", "description": "d", "parameters": {"type": "object", "properties": {}}}
HELLO = {"role": "user", "content": "q1"}


def called(*calls: tuple[str, str, str], **others) -> dict:
    """OpenAI's message of calls, each with its id, name and arguments as JSON."""
    made = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": None, "tool_calls": made} | others


def test_openais_messages_and_chatglm3s_turns_are_one_conversation(tiny_tokenizer):
    session = Session(tiny_tokenizer, "chatglm3")
    openai = [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        HELLO,
        called(("a", "get_weather", '{"city": "北京"}'), ("b", "clock", "{}")),
        {"role": "tool", "tool_call_id": "b", "content": "12"},
        {"role": "tool", "tool_call_id": "a", "content": "24"},
    ]
    own = [
        {"role": "system", "content": "be brief"},
        HELLO,
        {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": "24"},
        {"role": "tool", "name": "clock", "parameters": {}, "observation": "12", "joined": True},
    ]
    wrapped = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]
    prompt = session.prompt(session.conversation(openai, wrapped))
    assert prompt == session.prompt(session.conversation(own, [WEATHER, CLOCK]))
    assert prompt[-1] == tiny_tokenizer.get_command("<|assistant|>")
    history = [
        {"role": "system", "content": TOOLS_PROMPT, "tools": [WEATHER, CLOCK]},
        {"role": "system", "content": "be brief"},
        HELLO,
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
        {"role": "observation", "content": "24"},
        {"role": "assistant", "metadata": "clock", "content": "```python\ntool_call()\n```"},
    ]
    assert prompt == tiny_tokenizer.build_chat_input("12", history, "observation").input_ids[0].tolist()


@pytest.mark.parametrize(
    ("messages", "tools", "fault"),
    [
        ([], None, "messages: there is none; give a question"),
        ("q1", None, 'messages must be a list, got "q1" (str)'),
        ([{"role": "usr", "content": "q"}], None, r"messages\[0\].role is 'usr'"),
        ([HELLO, {"role": "user"}], None, r"messages\[1\].content: missing; expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            None,
            r"messages\[0\].content: holds a part that is no",
        ),
        ([HELLO], "no tools", "tools: column 1: not JSON"),
        ([HELLO], {"name": "f"}, "tools must be a list of functions"),
        ([HELLO, {"role": "tool", "content": "1"}], None, r"messages\[1\]: answers no call of the message before"),
        (
            [HELLO, called(("a", "f", "{"))],
            None,
            r"messages\[1\].tool_calls\[0\].function.arguments: column 2: not JSON",
        ),
        ([HELLO, called(("a", "f", "{}"))], None, "messages: end on a call of 'f' without its result; add that"),
        (
            [HELLO, called(("a", "f", "{}"), ("b", "g", "{}")), {"role": "tool", "tool_call_id": "b", "content": ""}],
            None,
            "messages: end on a call of 'f' without its result",
        ),
        ([HELLO, {"role": "assistant", "content": "a1"}], None, "messages: end on an answer"),
    ],
)
def test_messages_that_training_refuses_or_that_ask_nothing_are_refused(tiny_tokenizer, messages, tools, fault):
    with pytest.raises(DataError, match=fault.replace("(", r"\(").replace(")", r"\)")):
        Session(tiny_tokenizer, "chatglm3").conversation(messages, tools)


def test_what_a_format_has_no_place_for_is_refused_as_in_training(tiny_tokenizer):
    session = Session(tiny_tokenizer, "chatglm2")
    with pytest.raises(DataError, match=r"^chatglm2 has no place for system; set data_format to chat_template"):
        session.prompt(session.conversation([{"role": "system", "content": "s"}, HELLO]))


def test_a_token_without_a_row_in_the_embedding_is_refused_as_in_training(tiny_tokenizer, monkeypatch):
    session = Session(tiny_tokenizer, "chatglm3")
    monkeypatch.setattr(tiny_tokenizer, "embedding_rows", 10, raising=False)
    with pytest.raises(DataError, match=r"the embedding has rows up to 9; resize the embedding"):
        session.prompt(session.conversation([HELLO]))


def test_firefly_ends_every_utterance_with_eos(model_folder):
    session = Session(open_tokenizer(str(model_folder("llama"))), "firefly")
    asked = session.conversation([HELLO, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}])
    assert session.tokenizer.decode(session.prompt(asked)) == "<s>q1</s>a1</s>q2</s>"
    assert session.stop_ids == {session.tokenizer.eos_token_id}
    ids = session.tokenizer.encode("<think>why</think> a1 <s>\n", add_special_tokens=False, split_special_tokens=True)
    answer = session.read([*ids, session.tokenizer.eos_token_id])
    assert answer == Answer("a1 <s>", reasoning="why", raw="<think>why</think> a1 <s>\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_by_template_is_the_row_before_the_answer_and_the_templates_own(family):
    session = Session(FAMILIES[family], "chat_template")
    messages = [HELLO, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
    prompt = session.prompt(session.conversation(messages))
    sample = session.render(
        parse_row({"messages": [*messages, {"role": "assistant", "content": "a2", "loss": True}]}), session.tokenizer
    )
    last = len(sample.target_mask) - sample.target_mask[::-1].index(1)
    start = max(i for i in range(last) if not sample.target_mask[i]) + 1
    assert prompt == sample.input_ids[:start]
    assert prompt == session.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_an_answer_by_template_also_ends_at_the_models_own_control_tokens():
    tokenizer = make_tokenizer(FAMILIES["llama3.1"].chat_template, "<|begin_of_text|>", "<|eot_id|>")
    own = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.stops = {own, 5}  # 5 is a byte: such an id comes from a config.json of another vocabulary
    assert Session(tokenizer, "chat_template").stop_ids == {own, tokenizer.eos_token_id}
    assert Session(tokenizer, "firefly").stop_ids == {tokenizer.eos_token_id}


def test_a_token_that_spans_prompt_and_answer_is_left_to_the_answer():
    """The template writes a space before the answer, and training one token of a space and the first letter."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer(template, "<s>", "</s>", merges=[("Ġ", "H"), ("Ġ", "a")])
    session = Session(tokenizer, "chat_template")
    prompt = session.prompt(session.conversation([HELLO]))
    assert tokenizer.decode(prompt) == "user: q1</s>assistant:"
    row = {"messages": [HELLO, {"role": "assistant", "content": "a1"}]}
    assert session.render(parse_row(row), tokenizer).input_ids[: len(prompt) + 1] == [
        *prompt,
        tokenizer.convert_tokens_to_ids("Ġa"),
    ]


def test_early_rounds_are_left_out_where_the_context_is_full_and_it_is_said(tiny_tokenizer, log):
    session = Session(tiny_tokenizer, "chatglm3")
    rounds = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    system, last = {"role": "system", "content": "be brief"}, {"role": "user", "content": "q4"}
    whole = session.conversation([system, *rounds, last], [CLOCK])
    length = len(session.prompt(whole))
    assert session.fit(whole, length) == (whole, 0)
    shorter, gone = session.fit(whole, length - 1)
    assert (gone, shorter) == (1, session.conversation([system, *rounds[2:], last], [CLOCK]))
    alone = session.conversation([system, last], [CLOCK])
    assert session.fit(whole, len(session.prompt(alone))) == (alone, 3)
    assert "the context is full: 3 early rounds left out of the prompt" in log[-1]
    with pytest.raises(DataError, match=r"^the last round has a prompt of [0-9]+ tokens, and there is room for 5;"):
        session.fit(whole, 5)
    with pytest.raises(DataError, match=r"^the last round has a prompt"):
        session.fit(session.conversation([last]), 3)


def chatglm3_ids(tokenizer, *messages: str) -> list[int]:
    ids = []
    for i, message in enumerate(messages):
        ids += [tokenizer.get_command("<|assistant|>")] * (i > 0) + tokenizer.tokenizer.encode(message)
    return ids


@pytest.mark.parametrize(
    ("messages", "cut", "expected"),
    [
        (["\n 晴"], False, Answer("晴")),
        (["晴"], False, Answer("晴")),
        (["f\n ```python\ntool_call(a='x', n=[1, None])\n```"], False,
         Answer(calls=(Call("f", {"a": "x", "n": [1, None]}),))),
        (
            ["\n see", "f\n ```python\ntool_call()\n```", "g\n ```python\ntool_call()\n```\n"],
            False,
            Answer("see", (Call("f", {}), Call("g", {}))),
        ),
        (["\n <think>\nwhy\n</think>\n\nsee"], False, Answer("see", reasoning="why")),
        (["f\n ```python\nprint(1)\n```"], False, Answer("f\n ```python\nprint(1)\n```", fault="unparsable")),
        (["f\n ```python\ntool_call(a={1})\n```"], False,
         Answer("f\n ```python\ntool_call(a={1})\n```", fault="unparsable")),
        (["f\n ```python\ntool_call(a=1"], True, Answer("f\n ```python\ntool_call(a=1", fault="truncated")),
        (["get_wea"], True, Answer("get_wea", fault="truncated")),
        (["\n see", "f\n"], True, Answer("see\nf", fault="truncated")),
        (["\n it is"], True, Answer("it is")),
    ],
)  # fmt: skip
def test_an_answer_of_chatglm3_is_read_message_by_message(tiny_tokenizer, messages, cut, expected):
    session = Session(tiny_tokenizer, "chatglm3")
    found = session.read(chatglm3_ids(tiny_tokenizer, *messages), "length" if cut else "stop")
    reason = "length" if cut else "tool_calls" if expected.calls else "stop"
    assert (found.text, found.calls, found.reasoning, found.fault) == (
        expected.text, expected.calls, expected.reasoning, expected.fault
    )  # fmt: skip
    assert found.finish_reason == reason


def test_hostile_answers_of_chatglm3_are_read_at_once(real_tokenizer):
    session = Session(real_tokenizer, "chatglm3")
    for value in ("[" * 20000, "-" * 20000 + "1", "(" * 20000, "{'a':" * 5000, "1" * 20000, " " * 20000):
        ids = chatglm3_ids(real_tokenizer, f"f\n ```python\ntool_call(a={value})\n```")
        assert session.read(ids).fault == "unparsable"


def test_answers_read_as_the_official_code_reads_them(reference, real_tokenizer):
    """But for code that is no call, and for the date that official code writes into the text."""
    session, seen = Session(real_tokenizer, "chatglm3"), 0
    for row in read_jsonl(reference / "golden/chatglm3_process_response.jsonl"):
        answer = session.read(chatglm3_ids(real_tokenizer, *row["output"].split("<|assistant|>")))
        official = row["content"]
        if isinstance(official, str):
            assert answer.text == official.replace("2023年", "[[训练时间]]")
        elif "parameters" in official:
            assert answer.calls[-1] == (official["name"], official["parameters"])
        else:
            assert answer.fault == "unparsable"
        seen += 1
    assert seen == 7


def test_prompts_are_those_of_the_official_code(reference, real_tokenizer):
    session = Session(real_tokenizer, "chatglm3")
    rows = read_jsonl(reference / "golden/chatglm3_chat.jsonl")
    for row in rows:
        asked = {"role": row["role"], "content": row["query"]}
        ids = session.prompt(session.conversation([*(row["history"] or ()), asked]))
        # The history's call has a second space before it, which a training row has not.
        official = real_tokenizer.decode(row["input_ids"]).replace("  ```python", " ```python")
        assert ids == row["input_ids"] or real_tokenizer.decode(ids) == official
    assert len(rows) == 5


class Script:
    """An engine that writes given tokens, one at each step."""

    def __init__(self, *answers: list[int], room: int = 4000):
        self.answers, self.room, self.prompts, self.cancelled = list(answers), room, [], []

    def submit(self, prompt, sampling, adapted):
        self.prompts.append(prompt)
        self.generation = SimpleNamespace(prompt=prompt, tokens=[], finish_reason=None)
        return self.generation

    def step(self):
        self.generation.tokens.append(self.answers[0].pop(0))
        if not self.answers[0]:
            self.generation.finish_reason = "stop"
            del self.answers[0]
        return [self.generation]

    def cancel(self, generation):
        if generation.finish_reason is None:
            self.cancelled.append(generation)


@pytest.fixture
def engine(monkeypatch):
    """Stands for component.inference.engine, of which `Sampling` alone is used."""
    fake = SimpleNamespace(Sampling=lambda: SimpleNamespace(max_new_tokens=8), Engine=None)
    monkeypatch.setitem(sys.modules, "component.inference.engine", fake)


@pytest.mark.parametrize("speaker", ["chatglm3", *LEARNED])
def test_a_whole_conversation_is_one_training_row(speaker, tiny_tokenizer, engine, monkeypatch):
    """Question, call, result, answer, question: each prompt is the row before it, each answer what the row teaches."""
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="call00001"))  # Mistral's template writes ids
    tokenizer = tiny_tokenizer if speaker == "chatglm3" else TOKENIZERS[speaker]
    session = Session(tokenizer, "chatglm3" if speaker == "chatglm3" else "chat_template")
    messages = [
        HELLO,
        called(("call00001", "get_weather", '{"city": "北京"}')) | {"content": ""},
        {"role": "tool", "tool_call_id": "call00001", "content": "24"},
        {"role": "assistant", "content": "It is 24."},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    tools = [{"type": "function", "function": WEATHER}]
    taught = [learned_of(session, messages[: i + 1], tools) for i in (1, 3, 5)]
    session.engine = Script(*[list(answer) for _, answer in taught])
    said = [HELLO]
    first = session.ask(said, tools)
    assert first.calls == (Call("get_weather", {"city": "北京"}),)
    said.append(to_message(first))
    said.append({"role": "tool", "tool_call_id": said[-1]["tool_calls"][0]["id"], "content": "24"})
    second = session.ask(said, tools)
    assert (second.text, second.finish_reason) == ("It is 24.", "stop")
    said += [to_message(second), {"role": "user", "content": "q2"}]
    assert session.ask(said, tools).text == "a2"
    assert session.engine.prompts == [before for before, _ in taught]


def learned_of(session: Session, messages: list[dict], tools) -> tuple[list[int], list[int]]:
    """Of a training row that ends on an answer, the tokens before that and of it."""
    sample = session.render(
        choose_learned(parse_row({"messages": messages, "tools": tools}), "last"), session.tokenizer
    )
    start = sample.target_mask.index(1)
    return sample.input_ids[:start], [i for i, flag in zip(sample.input_ids, sample.target_mask, strict=True) if flag]


def test_an_answer_is_streamed_without_half_characters_and_half_calls(tiny_tokenizer, engine):
    session = Session(tiny_tokenizer, "chatglm3")
    text = chatglm3_ids(tiny_tokenizer, "\n 晴 👋", "clock\n ```python\ntool_call()\n```")
    session.engine = Script([*text, tiny_tokenizer.eos_token_id])
    reply = session.reply([HELLO], [CLOCK])
    pieces = list(reply)
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == "晴 👋"
    assert [piece for piece in pieces if piece.kind != "text"] == [Piece("name", "clock"), Piece("arguments", "{}")]
    assert (reply.answer.calls, reply.answer.finish_reason) == ((Call("clock", {}),), "tool_calls")
    session.engine = Script([*text])
    next(iter(session.reply([HELLO])))
    assert len(session.engine.cancelled) == 1


def test_a_reply_that_is_not_iterated_asks_nothing_and_one_that_is_too_long_is_refused_at_once(tiny_tokenizer, engine):
    session = Session(tiny_tokenizer, "chatglm3")
    session.engine = Script([1], room=4000)
    assert session.reply([HELLO]).generation is None
    assert session.engine.prompts == []
    session.engine = Script([1], room=4)
    with pytest.raises(DataError, match="the last round has a prompt of"):
        session.reply([HELLO])


def test_an_engine_has_the_places_that_are_asked_for_and_chooses_no_token_without_a_piece():
    session = Session.open(str(BASE))
    engine = session.open_engine(max_batch=2, max_tokens=40)
    assert session.engine is engine
    assert (engine.room, engine.choices) == (40, max(session.tokenizer.get_vocab().values()) + 1)


def test_an_answer_that_has_no_room_leaves_early_rounds_out(tiny_tokenizer, engine, log):
    session = Session(tiny_tokenizer, "chatglm3")
    messages = [HELLO, {"role": "assistant", "content": "a1 " * 20}, HELLO]
    alone = session.prompt(session.conversation([HELLO]))
    whole = session.prompt(session.conversation(messages))
    session.engine = Script(chatglm3_ids(tiny_tokenizer, "\n ok"), room=len(whole) + 4)  # and an answer may have 8
    assert session.ask(messages).text == "ok"
    assert session.engine.prompts == [alone]
    assert "the context is full: 1 early round left out" in log[-1]


# Opening

# A run of an earlier version, which could not choose the bits of its base.
EARLIER = Path(__file__).parents[2] / "fixtures/ab287a9"
BASE, FINAL = EARLIER / "chatglm3-nano", EARLIER / "final"


def test_an_adapter_of_ours_opens_as_it_was_trained():
    session, plain = Session.open(str(BASE), FINAL), Session.open(str(BASE))
    assert (session.data_format, session.base_bits, session.adapter) == ("chatglm3", 4, FINAL)
    layer = session.model.get_submodule("base_model.model.transformer.encoder.layers.0.self_attention.dense")
    assert isinstance(layer.base_layer, Linear4bit)
    assert not session.model.training
    assert (plain.data_format, plain.base_bits, plain.adapter) == ("chatglm3", 16, None)
    assert plain.model.dtype == torch.float32
    ids = torch.tensor([session.prompt(session.conversation([HELLO]))])
    assert not torch.equal(session.model(ids).logits, plain.model(ids).logits)
    assert Session.open(str(BASE), FINAL, base_bits=16).base_bits == 16


def test_an_adapter_of_another_tool_has_a_base_in_16_bits_and_it_is_said(model_folder, adapter_folder, log):
    base = model_folder("llama")
    session = Session.open(adapter=adapter_folder(base))
    assert (session.data_format, session.base_bits) == ("firefly", 16)
    assert sum("does not record how its base was loaded: it is loaded in 16 bits" in line for line in log) == 1
    assert Session.open(adapter=adapter_folder(base), base_bits=4).base_bits == 4


def test_an_adapters_template_and_eos_are_its_own(model_folder, adapter_folder):
    base = model_folder("llama")
    adapter = adapter_folder(base)
    template = "{% for m in messages %}{{ m.content + '<s>' }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    session = Session.open(adapter=adapter)
    assert (session.data_format, session.tokenizer.chat_template) == ("chat_template", template)
    assert session.stop_ids >= {session.tokenizer.bos_token_id}
    assert session.tokenizer.decode(session.prompt(session.conversation([HELLO]))) == "q1<s>"


@pytest.fixture
def unloaded(monkeypatch):
    """Fails a test that loads weights."""
    monkeypatch.setattr("component.inference.session.load_base", lambda *_: pytest.fail("weights were loaded"))


def test_what_cannot_be_opened_is_refused_before_weights_are_loaded(model_folder, tmp_path, unloaded):
    base = str(BASE)
    for arguments, fault in (
        ({}, "there is neither a model nor an adapter to open"),
        ({"model_name_or_path": str(tmp_path / "no/model")}, "no/model"),
        ({"adapter": tmp_path / "no/adapter"}, "no/adapter"),
        ({"adapter": BASE}, "no adapter_config.json there"),
        ({"model_name_or_path": base, "base_bits": 8}, "base_bits is 8; expected 4 or 16"),
        ({"model_name_or_path": base, "data_format": "x"}, "data_format is 'x'"),
        ({"adapter": FINAL, "model_name_or_path": str(FINAL)}, "this is an adapter"),
        (
            {"adapter": FINAL, "model_name_or_path": base, "data_format": "chat_template"},
            "ChatGLM's tokenizer writes its prompts itself",
        ),
    ):
        with pytest.raises(Fault, match=fault):
            Session.open(**arguments)
    other = model_folder()
    with pytest.raises(ArgumentError, match=r"it was trained on a base with other weights or another config.json"):
        Session.open(str(other), FINAL)
    damaged = shutil.copytree(FINAL, tmp_path / "damaged")
    with open(damaged / "adapter_model.safetensors", "r+b") as file:
        file.seek(1000)
        file.write(b"x")
    with pytest.raises(ArgumentError, match=r"adapter_model\.safetensors has other contents than were written"):
        Session.open(base, damaged)
    bare = shutil.copytree(BASE, tmp_path / "chatglm3-bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ArgumentError, match="there are no weights"):
        Session.open(str(bare))


def test_an_adapter_of_another_shape_is_refused_before_weights_are_loaded(
    model_folder, adapter_folder, tmp_path, unloaded
):
    base = model_folder("llama")
    adapter = shutil.move(adapter_folder(base), tmp_path / "kept")
    with pytest.raises(ArgumentError, match="has no place in"):
        Session.open(str(model_folder("llama", intermediate_size=32)), adapter)
    with pytest.raises(ArgumentError, match="has no place in"):
        Session.open(str(model_folder()), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in ("THUDM/chatglm3-6b", "long" * 2000):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ArgumentError, match=f"'{name}', which is no folder here; give the base with --base"):
            Session.open(adapter=adapter)
    flat = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4)}
    save_file(flat, adapter / "adapter_model.safetensors")
    with pytest.raises(ArgumentError, match="of shape \\[4\\] has no place in"):
        Session.open(str(base), adapter)


def test_a_recorded_format_that_is_no_text_is_refused(unloaded, monkeypatch):
    monkeypatch.setattr("component.inference.session.read_run", lambda _: {"format": {"name": ["chatglm3"]}})
    with pytest.raises(Fault, match="data_format is \\['chatglm3'\\]; expected one of"):
        Session.open(str(BASE), FINAL)


def test_a_model_with_a_template_of_its_own_is_asked_by_it_unless_its_adapter_learned_another_format(log):
    chatty, plain = SimpleNamespace(chat_template="x"), SimpleNamespace(chat_template=None)
    assert choose_format("models/qwen", chatty, None, None, {}) == "chat_template"
    assert "data_format chat_template: models/qwen has a chat template of its own" in log[-1]
    assert choose_format("models/qwen", plain, None, None, {}) == "firefly"
    assert choose_format("models/chatglm3-6b", plain, None, None, {}) == "chatglm3"
    trained = {"format": {"name": "firefly"}}
    assert choose_format("models/qwen", chatty, None, None, trained) == "firefly"
    assert choose_format("models/qwen", chatty, None, "chatml", trained) == "chat_template"
    assert len(log) == 1
    assert choose_format("models/qwen", chatty, "chat_template", None, trained) == "chat_template"
    assert "the adapter was trained with data_format firefly, and its prompts are now chat_template's" in log[-1]


@pytest.mark.parametrize(
    ("trained", "asked", "bits"), [(None, None, 16), (4, None, 4), (16, None, 16), (16, 4, 4), (None, 4, 4)]
)
def test_the_bits_are_those_that_are_asked_for_or_those_of_training(trained, asked, bits):
    assert choose_bits(asked, Path("adapter"), trained) == bits


def test_other_bits_than_those_of_training_are_said(log):
    choose_bits(16, Path("adapter"), 4)
    assert "adapter was trained on a base in 4 bits, and this one has 16: another model" in log[-1]


def test_a_processor_computes_as_training_did():
    assert choose_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    assert choose_dtype(torch.device("cpu"), None) == torch.float32
