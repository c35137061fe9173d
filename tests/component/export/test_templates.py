"""An exported chat template writes the text that training renders, for texts, tools, calls and results."""

import json
import random
import time
from contextlib import suppress
from dataclasses import replace

import jinja2
import pytest

from component.chatglm import ChatGLMTokenizer
from component.data.chat_template import render_chat_template
from component.data.conversation import Conversation, Turn, choose_learned
from component.data.formats import parse_row
from component.data.messages import to_openai
from component.data.render import TokenizedSample, render_chatglm2, render_chatglm3
from component.export.tokenizer import export_template
from component.inference.answers import TemplateReader
from component.inference.calls import Call
from component.inference.stream import AnswerStream
from component.inference.syntax import describe_calls
from tests.component.inference.test_stream import compare
from tests.conftest import read_jsonl

from .texts import pieces_of, random_chat

QUESTION = {"role": "user", "content": "q"}
RENDER = {2: render_chatglm2, 3: render_chatglm3}


@pytest.fixture(scope="module", params=[2, 3])
def version(request) -> int:
    return request.param


def by_template(tokenizer, messages: list[dict], tools: list | None = None) -> TokenizedSample:
    """What transformers makes of a conversation, all of whose answers are learned."""
    written = tokenizer.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
    return TokenizedSample(written["input_ids"], written["assistant_masks"])


def all_learned(conversation: Conversation) -> Conversation:
    learned = ("assistant", "tool")
    return replace(
        conversation, turns=tuple(replace(turn, learned=turn.role in learned) for turn in conversation.turns)
    )


def differing(version: int, write, reference, flagged: bool) -> set[str]:
    """Names of the golden rows whose tokens or mask `write(conversation)` gives otherwise than training."""
    names = set()
    ours = ChatGLMTokenizer.from_pretrained(reference / f"chatglm{version}-6b")
    for row in read_jsonl(reference / f"golden/chatglm{version}_sft.jsonl"):
        conversation = choose_learned(parse_row(row["sample"]), "flagged")
        conversation = conversation if flagged else all_learned(conversation)
        if write(conversation) != RENDER[version](conversation, ours):
            names.add(row["name"])
    return names


NOT_WRITTEN = {
    2: set(),
    3: {
        "ends with a tool call",  # training ends it with </s>, behind its result
        "observation missing",  # training gives the call a result of null
    },
}


def test_the_golden_rows_have_the_tokens_and_the_mask_of_training(version, export, reference):
    def write(conversation: Conversation) -> TokenizedSample:
        messages, tools = to_openai(conversation)
        return by_template(export(version), messages, tools)

    markers = {3: {"role markers written as text stay text"}, 2: set()}[version]  # which no template can bring about
    assert differing(version, write, reference, flagged=False) == NOT_WRITTEN[version] | markers


def test_an_exported_tokenizer_trains_here_on_the_same_tokens(version, export, reference):
    """data_format chat_template, also where the row says which answers are learned."""
    others = {3: {"assistant speaks first"}, 2: set()}[version]  # an answer without a question is not learned whole

    def write(conversation: Conversation) -> TokenizedSample:
        return render_chat_template(conversation, export(version))

    assert differing(version, write, reference, flagged=True) == NOT_WRITTEN[version] | others


def test_official_chats_have_the_official_ids(export, reference):
    for row in read_jsonl(reference / "golden/chatglm3_chat.jsonl"):
        messages = [*(row["history"] or []), {"role": row["role"], "content": row["query"]}]
        if "<|" not in json.dumps(messages):
            written = export(3).apply_chat_template(messages, add_generation_prompt=True)
            assert written["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_random_conversations_have_the_tokens_of_training(export, real_tokenizer, count):
    rng = random.Random(count)
    pieces = pieces_of(real_tokenizer)
    for i in range(count):
        row = random_chat(rng, pieces)
        conversation = all_learned(parse_row(json.loads(json.dumps(row))))
        expected = render_chatglm3(conversation, real_tokenizer)
        assert by_template(export(3), **row) == expected, row
        asked = export(3).apply_chat_template(row["messages"], row["tools"], add_generation_prompt=True)["input_ids"]
        assert asked == [*expected.input_ids[:-1], real_tokenizer.get_command("<|assistant|>")]
        if i % 10 == 0:
            assert render_chat_template(conversation, export(3)) == expected, row


def test_chatglm3s_own_messages(export, real_tokenizer):
    """Tools in the system message, calls by their metadata, role observation."""
    tools = [{"type": "function", "function": {"name": "f", "description": "天气"}}, {"name": "g"}]
    for offered in (tools, {"any": "JSON"}, []):
        messages = [
            {"role": "system", "content": "Use these:", "tools": offered},
            {"role": "user", "content": [{"type": "text", "text": "北京"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "metadata": "f", "content": " ```python\ntool_call()\n```"},
            {"role": "observation", "content": "晴"},
            {"role": "assistant", "metadata": "", "content": ""},
        ]
        ours = real_tokenizer.apply_chat_template(messages, return_dict=False)
        written = by_template(export(3), messages)
        assert written.input_ids == [*ours, 2]
        assert real_tokenizer.decode(learned_of(written)) == "f\n  ```python\ntool_call()\n```<|observation|> \n"


def learned_of(sample: TokenizedSample) -> list[int]:
    return [i for i, flag in zip(sample.input_ids, sample.target_mask, strict=True) if flag]


def test_results_without_ids_follow_their_calls_by_name_and_order(export, real_tokenizer):
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "name": "g", "content": "2"}, {"role": "tool", "content": "1"}]
    results.append({"role": "tool", "name": "f", "content": "3"})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}, *results]
    ours = real_tokenizer.apply_chat_template(messages, return_dict=False)
    assert export(3).apply_chat_template(messages)["input_ids"] == ours


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (None, ""),
        ("", ""),
        ("{}", ""),
        (' {"a" : 1 , "b": [true, null, {"c": "true, null: {"}] }\n', "a=1, b=[True, None, {'c': 'true, null: {'}]"),
        (
            '{"a": "\\u5317\\u4eac \\ud83d\\ude42 \\\\u5317 \\"q\\" it\'s \\/ \\n"}',
            "a='北京 🙂 \\\\u5317 \"q\" it\\'s / \\n'",
        ),
        ('{"a": "\\ud83d\\ud83d\\ude42\\ud83dx\\ude42"}', "a='\\ud83d🙂\\ud83dx\\ude42'"),
        (
            '{"a": 1E5, "b": -1.50, "c": -0, "d": 12345678901234567890123, "e": [1e-7]}',
            "a=100000.0, b=-1.5, c=0, d=12345678901234567890123, e=[1e-07]",
        ),
        ('{"a":{"b":{},"c":[[]]}}', "a={'b': {}, 'c': [[]]}"),
    ],
)
def test_arguments_as_json_become_keywords(export, arguments, written):
    messages = [QUESTION, calling(arguments)]
    text = export(3).apply_chat_template(messages, tokenize=False)
    assert text.endswith(f"<|assistant|>f\n ```python\ntool_call({written})\n```<|observation|>")


FAULTY = """null|5|[1]|"x"|not json|{"a":1|{"a":"x|{"a":1}}|{"a":1}x|{"a":1},{"b":2}|{"a":1}{"b":2}|{'a': 1}|{"a"}
{"a":}|{,}|{"a":1,}|{"a":1 "b":2}|{"a" "b"}|{1:2}|{"a":"b":1}|{"a":[1}]|{"a":["b":1]}|{"a":[1,]}|{"a":x}|{"a":-}
{"a":1_0}|{"a":1 0}|{"a":NaN}|{"a":True}|{"a":1,"a":2}"""


@pytest.mark.parametrize("arguments", [" ", [1], *FAULTY.replace("\n", "|").split("|")], ids=str)
def test_arguments_that_are_no_json_object_are_refused(export, arguments):
    with pytest.raises(jinja2.TemplateError, match="a call's arguments are no JSON object: "):
        export(3).apply_chat_template([QUESTION, calling(arguments)], tokenize=False)


NAMES = ["class", "北京", "_x1", "é", "a-b", "a b", "a.b", "", "1a", "a\n", "a$", "a'", "a€", "a)b", "f(x", "a=b", "٣"]


def test_argument_names_are_those_of_training(export):
    """Engines other than Python's look at ASCII's signs and digits alone."""
    accepted = []
    for template in (export_template(3), elsewhere()):
        names = []
        for name in NAMES:
            with suppress(jinja2.TemplateError):
                export(3).apply_chat_template([QUESTION, calling({name: 1})], chat_template=template, tokenize=False)
                names.append(name)
        accepted.append(names)
    assert accepted == [["class", "北京", "_x1", "é"], ["class", "北京", "_x1", "é", "a€", "٣"]]


def test_a_row_that_ends_on_a_call_teaches_what_training_teaches(export, real_tokenizer):
    """The call, and that a result comes, of which training adds an empty one."""
    conversation = Conversation((Turn("user", "q"), Turn("tool", name="f", parameters={"a": 1}, learned=True)), None)
    written = by_template(export(3), *to_openai(conversation))
    assert learned_of(written) == learned_of(render_chatglm3(conversation, real_tokenizer))
    assert learned_of(written) == learned_of(render_chat_template(conversation, export(3)))
    assert written.input_ids[-1] == real_tokenizer.get_command("<|observation|>")
    own = [QUESTION, {"role": "assistant", "metadata": "f", "content": "x"}]
    assert export(3).apply_chat_template(own, tokenize=False).endswith("f\n x<|observation|>")


def test_reasoning_is_stripped_as_in_training(export):
    def thinking(thought: str) -> str:
        message = {"role": "assistant", "content": "a", "reasoning_content": thought}
        return export(3).apply_chat_template([QUESTION, message], tokenize=False)

    assert thinking(" \nhm\n ").endswith("<|assistant|>\n <think>\nhm\n</think>\n\na</s>")
    assert thinking(" \n").endswith("<|assistant|>\n a</s>")


RESULT = {"role": "tool", "tool_call_id": "c0", "content": "1"}


@pytest.mark.parametrize(
    "results",
    [
        [RESULT | {"tool_call_id": "other"}],
        [RESULT, RESULT],
        [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}],
        [QUESTION, RESULT],
    ],
    ids=["another id", "twice", "one too many", "too late"],
)
def test_a_result_that_answers_no_call_is_refused(export, real_tokenizer, results):
    messages = [QUESTION, calling({}), *results]
    with pytest.raises(jinja2.TemplateError, match="a result answers no call of the message before; give"):
        export(3).apply_chat_template(messages)
    with pytest.raises(ValueError, match="answers no call of the message before it"):
        real_tokenizer.apply_chat_template(messages)


def test_the_cost_is_about_linear_in_the_calls(export):
    def seconds(count: int) -> float:
        calls = [calling({}, f"c{i}")["tool_calls"][0] for i in range(count)]
        results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "r"} for i in range(count)]
        start = time.process_time()
        text = export(3).apply_chat_template(
            [QUESTION, {"role": "assistant", "tool_calls": calls}, *results], tokenize=False
        )
        assert text.count("<|observation|>\n r") == count
        return time.process_time() - start

    seconds(1)
    assert seconds(400) < 8 * seconds(100)


def calling(arguments, call_id: str = "c0") -> dict:
    return {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": "f", "arguments": arguments}}]}


def elsewhere() -> str:
    """The template as engines read it whose lists as text are not Python's, such as llama.cpp's."""
    template = export_template(3).replace("(['\\n'] | string)", "'other'")
    assert template != export_template(3)
    return template


def test_what_the_templates_cannot_write_is_refused(export):
    def refusal(version: int, *messages: dict, **settings) -> str:
        with pytest.raises(jinja2.TemplateError) as error:
            export(version).apply_chat_template([*messages], tokenize=False, **settings)
        return str(error.value)

    user = {"role": "user", "content": "q"}
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    assert refusal(3, {"role": "usr", "content": "q"}) == (
        "role is usr; expected system, user, assistant, observation or tool"
    )
    assert refusal(3, image) == "ChatGLM3 reads text alone; leave the rest out"
    call = {"function": {"name": "f", "arguments": {"a b": 1}}}
    assert "'a b' cannot be a keyword argument" in refusal(3, user, {"role": "assistant", "tool_calls": [call]})
    for wrong in ([{"role": "system", "content": "s"}], [user, user], [image], [user, {"role": "assistant"}]):
        assert "questions and answers in turn" in refusal(2, *wrong)
    assert "questions and answers in turn" in refusal(2, user, tools=[{"name": "f"}])


def test_other_engines_write_python_by_the_rules_of_the_template(export):
    arguments = {"a": "it's \\ 北京\n\t", "b": 'it\'s "so"', "c": [1, True, None, 0.5, {"d": '"', "e": [], "f": {}}]}
    rng = random.Random(0)
    arguments["g"] = [0.0, -0.0, 1.0, 0.0001, 9.5e-5, 1e22, 1e16, 2.0**52, 0.1 + 0.2, 1234567.89, 39.904213]
    arguments["g"] += [round(rng.uniform(-1, 1) * 10 ** rng.randint(-4, 9), rng.randint(0, 9)) for _ in range(100)]
    messages = [QUESTION, calling(arguments)]
    assert export(3).apply_chat_template(messages, chat_template=elsewhere()) == export(3).apply_chat_template(messages)


NASTY = [
    {},
    {"text": 'it\'s "quoted" \\ and\nnew ``` lines\r\t', "empty": "", "number": "3"},
    {
        "text": "\\n) <|user|> <|observation|>\n```<|assistant|>g\n ```python\ntool_call(",
        "名": "北京 🙂 \u200b\u2028\x00",
    },
    {
        "points": [1, -2.5, 1e22, None, [True, {}]],
        "style": {"a b": {"c-d": "f(x=1), g()"}},
        "until": None,
        "old": False,
    },
]


@pytest.mark.parametrize("text", ["", "See:\n```python\nprint(1)\n```"])
def test_calls_of_an_exported_model_are_read_as_the_template_writes_them(export, text):
    """Also whole answers that grow token by token, as chat and serve read them."""
    reader = TemplateReader(export(3), render_chat_template)
    assert not reader.no_calls
    for arguments in NASTY:
        calls = (Call("f", arguments), Call("now", {}), Call("f", arguments))
        for given in (calls[:1], calls):
            tools = describe_calls(given)
            spoken = [Turn("assistant", text, learned=True)] if text else []
            made = [Turn("tool", name=name, parameters=values, learned=True, joined=True) for name, values in given]
            made[0] = replace(made[0], joined=bool(text))
            sample = render_chat_template(Conversation((Turn("user", "q"), *spoken, *made), tools), export(3))
            answer = reader.read(learned_of(sample)[:-1], tools, cut=False)
            assert (answer.text, answer.calls, answer.fault) == (text, given, ""), answer
            stream = AnswerStream(reader, tools)
            pieces = [piece for token in learned_of(sample)[:-1] for piece in stream.add(token)] + stream.end()
            compare(pieces, answer, stream, text)
            assert stream.complete == len(given)


def test_chatglm2_has_no_calls(export):
    assert "ChatGLM2 has questions and answers" in TemplateReader(export(2), render_chat_template).no_calls
