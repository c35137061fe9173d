import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from component.chatglm.prompt import TOOLS_PROMPT, call_message
from component.data.conversation import Conversation, Turn
from component.data.formats import parse_chatglm3, parse_firefly
from component.data.render import chatglm3_messages, render_chatglm2, render_chatglm3, render_firefly
from tests.conftest import read_jsonl


class ByteTokenizer:
    """Bytes as ids from 0, and the two tokens that Firefly's format needs."""

    bos_token_id, eos_token_id, pad_token_id = 300, 301, 301

    def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        assert split_special_tokens and not add_special_tokens
        return list(text.encode())


BOS, EOS = ByteTokenizer.bos_token_id, ByteTokenizer.eos_token_id


def labels(sample) -> list[int]:
    return [token if learned else -100 for token, learned in zip(sample.input_ids, sample.target_mask, strict=True)]


@pytest.mark.parametrize(
    ("name", "rows", "parse", "render"),
    [("chatglm3", 59, parse_chatglm3, render_chatglm3), ("chatglm2", 38, parse_firefly, render_chatglm2)],
)
def test_every_golden_row_is_reproduced(reference, real_tokenizer, name, rows, parse, render):
    golden = read_jsonl(reference / f"golden/{name}_sft.jsonl")
    assert len(golden) == rows
    for row in golden:
        before = json.dumps(row["sample"])
        sample = render(parse(row["sample"]), real_tokenizer)
        assert sample.input_ids == row["input_ids"], row["name"]
        assert labels(sample) == row["labels"], row["name"]
        assert json.dumps(row["sample"]) == before


def test_firefly_scores_only_answers_and_their_eos():
    sample = render_firefly(Conversation((Turn("user", "a"), Turn("assistant", "b", learned=True))), ByteTokenizer())
    assert sample.input_ids == [BOS, ord("a"), EOS, ord("b"), EOS]
    assert sample.target_mask == [0, 0, 0, 1, 1]


def test_firefly_adds_no_bos_where_the_tokenizer_has_none():
    tokenizer = ByteTokenizer()
    tokenizer.bos_token_id = None
    rounds = [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": ""}]
    sample = render_firefly(parse_firefly({"conversation": rounds}), tokenizer)
    assert sample.input_ids == [ord("a"), EOS, ord("b"), EOS, ord("c"), EOS, EOS]
    assert sample.target_mask == [0, 0, 1, 1, 0, 0, 1]


def test_chatglm3_learns_each_answer_and_the_token_that_ends_it(tiny_tokenizer):
    turns = (
        Turn("system", "s"),
        Turn("user", "u"),
        Turn("tool", learned=True, name="now", observation="12:00"),
        Turn("assistant", "a", learned=False),
        Turn("user", "v"),
        Turn("assistant", "b", learned=True),
    )
    sample = render_chatglm3(Conversation(turns, tools=[]), tiny_tokenizer)
    message = tiny_tokenizer.build_single_message
    parts = [
        (tiny_tokenizer.get_prefix_tokens(), 0, 0),
        (message("system", "", f"{TOOLS_PROMPT}\n[]"), 0, 0),
        (message("system", "", "s"), 0, 0),
        (message("user", "", "u"), 0, 0),
        (message("assistant", "now", "```python\ntool_call()\n```"), 0, 1),
        (message("observation", "", "12:00"), 1, 0),
        (message("assistant", "", "a"), 0, 0),
        (message("user", "", "v"), 0, 0),
        (message("assistant", "", "b"), 0, 1),
        ([2], 1, 1),
    ]
    assert sample.input_ids == [token for ids, _, _ in parts for token in ids]
    assert sample.target_mask == [mask for ids, first, rest in parts for mask in [first, *[rest] * (len(ids) - 1)]]


def test_chatglm2_learns_answers_and_their_ends(tiny_tokenizer):
    row = {"conversation": [{"human": "你好", "assistant": "好"}, {"human": "b", "assistant": "c"}]}
    sample = render_chatglm2(parse_firefly(row), tiny_tokenizer)
    pieces = [("[Round 1]\n\n问：你好\n\n答：", 0), ("好", 1), ("[Round 2]\n\n问：b\n\n答：", 0), ("c", 1)]
    ids, mask = tiny_tokenizer.get_prefix_tokens(), [0, 0]
    for text, learned in pieces:
        encoded = tiny_tokenizer.encode(text, add_special_tokens=False) + [2] * learned
        ids, mask = ids + encoded, mask + [learned] * len(encoded)
    assert (sample.input_ids, sample.target_mask) == (ids, mask)


@pytest.mark.parametrize(
    ("parameters", "call"),
    [
        ({}, "tool_call()"),
        ({"a": "x", "b": 1}, "tool_call(a='x', b=1)"),
        ({"a": None, "b": True, "c": -1.5}, "tool_call(a=None, b=True, c=-1.5)"),
        ({"a": [1, {"b": "it's"}]}, """tool_call(a=[1, {'b': "it's"}])"""),
        ({"a": "北京\n\\"}, r"tool_call(a='北京\n\\')"),
    ],
)
def test_a_call_is_python_keyword_arguments(parameters, call):
    assert call_message("f", parameters) == ("assistant", "f", f"```python\n{call}\n```")


@pytest.mark.parametrize(
    ("observation", "text"), [("", ""), ("null", "null"), (None, "null"), ({"温": 1}, '{"温": 1}')]
)
def test_a_result_is_text_or_json(observation, text):
    _, (result, _) = chatglm3_messages(Conversation((Turn("tool", name="f", observation=observation),)))
    assert result == ("observation", "", text)


texts = st.text(max_size=12) | st.sampled_from(["<|user|>", "</s>", "[gMASK]sop", "<|assistant|>\n 你好", " \n"])
texts = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda v: st.lists(v, max_size=2), max_leaves=3
)
names = st.sampled_from(["now", "get_weather", "<|user|>"])
turns = st.lists(
    st.one_of(
        st.builds(Turn, st.sampled_from(["system", "user"]), texts),
        st.builds(Turn, st.just("assistant"), texts, st.booleans()),
        st.builds(
            Turn,
            st.just("tool"),
            learned=st.booleans(),
            name=names,
            parameters=st.dictionaries(st.sampled_from(["a", "b", "名"]), values, max_size=2),
            observation=values,
        ),
    ),
    min_size=1,
    max_size=5,
)
conversations = st.builds(Conversation, turns.map(tuple), st.none() | st.lists(st.fixed_dictionaries({"name": texts})))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations)
def test_the_training_prefix_of_every_answer_is_the_inference_prompt(tokenizer, conversation):
    sample = render_chatglm3(conversation, tokenizer)
    assert len(sample.input_ids) == len(sample.target_mask)
    messages = chatglm3_messages(conversation)
    history = [message._asdict() for message, _ in messages]
    if conversation.tools is not None:
        history[0] = {"role": "system", "content": TOOLS_PROMPT, "tools": conversation.tools}

    commands = set(tokenizer.tokenizer.special_tokens.values())
    starts = [i for i, token in enumerate(sample.input_ids) if token in commands][2:]
    assert len(starts) == len(messages)  # no text opens a turn
    ends = [*starts[1:], len(sample.input_ids) - 1]
    for i, ((message, learned), start, end) in enumerate(zip(messages, starts, ends, strict=True)):
        assert set(sample.target_mask[start + 1 : end + 1]) == {int(learned)}
        if message.role == "assistant" and i > 0 and not (i == 1 and conversation.tools is not None):
            before = history[i - 1]
            prompt = tokenizer.build_chat_input(before["content"], history=history[: i - 1], role=before["role"])
            if not before.get("metadata"):  # the newest message of a prompt has none
                assert prompt["input_ids"][0].tolist() == sample.input_ids[: start + 1]
    assert sample.target_mask[starts[0]] == 0
