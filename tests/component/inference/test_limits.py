"""Answers that must begin with a call, or have none, whatever the model would rather write."""

import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from component.data.conversation import Turn
from component.inference.calls import Call
from component.inference.engine import Engine
from component.inference.sampling import GREEDY, Generation, Sampling, Unwritten, choose
from component.inference.session import Session
from component.inference.token_bytes import TokenBytes
from component.run.errors import ArgumentError, DataError
from tests.component.inference.conftest import make_prompts
from tests.component.inference.test_engine import make_unfused
from tests.component.inference.test_session import CLOCK, HELLO, WEATHER, called, learned_of
from tests.component.inference.test_syntax import LEARNED, TOKENIZERS
from tests.component.kernel.conftest import make_model

FORECAST = WEATHER | {"name": "get_weather_forecast"}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, FORECAST, CLOCK)]
FAMILIES = ["chatglm3", *LEARNED]


@pytest.fixture
def open_session(tiny_tokenizer):
    return lambda family: (
        Session(tiny_tokenizer, "chatglm3")
        if family == "chatglm3"
        else Session(TOKENIZERS[family], "chat_template")
    )  # fmt: skip


def taught(session, name: str, arguments: str = '{"city": "北京"}') -> list[int]:
    """What training teaches to write for a call, its end too."""
    return learned_of(session, [HELLO, called(("call00001", name, arguments))], TOOLS)[1]


def written(session, sampling: Sampling, wishes: list[list[int]], draw=None, length=80) -> tuple[list[int], str]:
    """The tokens of an answer, and how it ended, by a model that would follow the first of its wishes that it can, and
    which is else at a loss."""
    generation, vocab = Generation([1], sampling), len(session.reader.bytes)
    noise = torch.Generator().manual_seed(draw.randrange(1 << 30) if draw else 0)
    while len(generation.tokens) < length:
        logits = torch.randn(1, vocab, generator=noise)
        done = len(generation.tokens)
        wish = next((wish for wish in wishes if wish[:done] == generation.tokens and len(wish) > done), None)
        if wish:
            logits[0, wish[done]] += 9 if draw else 99
        ((token, _),) = choose(logits, [generation])
        if token in session.stop_ids:
            return generation.tokens, "stop"
        generation.tokens.append(token)
    return generation.tokens, "length"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["get_weather", "get_weather_forecast", "clock"])
def test_an_answer_that_must_call_a_function_calls_it(open_session, family, name, monkeypatch):
    session = open_session(family)
    arguments = "{}" if name == "clock" else '{"city": "北京"}'
    others = [taught(session, other) for other in ("get_weather", "get_weather_forecast") if other != name]
    text = session.limits.learned((Turn("user", "q1"), Turn("assistant", "a1", learned=True)), TOOLS)
    wishes = [text, *others, taught(session, name, arguments)]
    sampling = session.must_call(GREEDY, [name], TOOLS)
    answer = session.read(*written(session, sampling, wishes, length=999), TOOLS)
    assert answer.calls == (Call(name, {} if name == "clock" else {"city": "北京"}),)
    assert session.read(*written(session, GREEDY, wishes, length=999), TOOLS).text == "a1"
    either = session.must_call(GREEDY, ["clock", "get_weather"], TOOLS)
    allowed = {"clock", "get_weather"}
    wishes.append(taught(session, "clock", "{}"))
    assert session.read(*written(session, either, wishes, length=999), TOOLS).calls[0].name in allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_must_call_tells_the_name_at_any_temperature(open_session, family):
    session, draw = open_session(family), random.Random(0)
    sampling = replace(session.must_call(GREEDY, ["get_weather"], TOOLS), temperature=5.0)
    names = set()
    for _ in range(8):
        tokens, _ = written(session, sampling, [taught(session, "get_weather_forecast")], draw)
        growing = session.answer_stream(TOOLS)
        pieces = [piece for token in tokens for piece in growing.add(token)] + growing.end()
        names |= {piece.text for piece in pieces if piece.kind == "name" and piece.call == 0}
        assert session.tokenizer.decode(tokens).count("get_weather") >= 1
        assert any(tokens[: len(begin)] == list(begin) for begin in sampling.begins)
    assert names <= {"get_weather"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_must_not_call_never_does(open_session, family):
    session, draw = open_session(family), random.Random(1)
    calls = [taught(session, "get_weather"), taught(session, "clock", "{}")]
    thought = session.tokenizer.encode("<think>why</think>", add_special_tokens=False)
    wishes = [*calls, [*thought, *calls[0]], [*thought, 5, *calls[0]]]
    assert session.read(*written(session, GREEDY, wishes, length=999), TOOLS).calls
    free = session.must_not_call(GREEDY, TOOLS)
    assert not session.read(*written(session, free, wishes), TOOLS).calls
    for seed in range(8):
        draw.shuffle(wishes)
        tokens, reason = written(session, replace(free, temperature=3.0, seed=seed), wishes, draw)
        growing = session.answer_stream(TOOLS)
        pieces = [piece for token in tokens for piece in growing.add(token)] + growing.end()
        assert not {piece.kind for piece in pieces} & {"name", "arguments"}
        assert not session.read(tokens, reason, TOOLS).calls


def test_a_marker_is_not_written_whatever_its_tokens_are(open_session):
    """A model that writes little else than the characters of the marker."""
    session, draw = open_session("qwen2.5"), random.Random(2)
    (unwritten,) = session.must_not_call(GREEDY, TOOLS).unwritten
    text, marker = "", "<tool_call>"
    tokens = []
    for _ in range(3000):
        size = next(size for size in range(len(marker) - 1, -1, -1) if text.endswith(marker[:size]))
        wished = marker[size] if draw.random() < 0.9 else draw.choice(marker)
        token = session.tokenizer.convert_tokens_to_ids(wished)
        if token not in unwritten.next_to(tokens):
            tokens.append(token)
            text += wished
    assert text.count("<tool_call") > 20
    assert marker not in text


def test_tokens_that_hold_complete_or_continue_a_text_are_told():
    texts = [b"<to", b"ol>", b"x<tool>y", b"l>", b"o", b"", b"tool>!", b"ool>"]
    unwritten = Unwritten(texts, "<tool>")
    assert unwritten.next_to([]) == {2}
    assert unwritten.next_to([0]) == {2, 1}
    assert unwritten.next_to([0, 5]) == {2, 1}, "a token without text"
    assert unwritten.next_to([0, 4]) == {2, 3}
    assert unwritten.next_to([0, 4, 4]) == {2}


def test_only_the_end_of_an_answer_is_looked_at_for_a_text_that_it_must_not_have():
    class Seen(list):
        count = 0

        def __getitem__(self, place):
            self.count += 1
            return super().__getitem__(place)

    unwritten = Unwritten(seen := Seen([b"a", b"<tool", b">"]), "<tool>")
    assert unwritten.next_to([0] * 500 + [1]) == {2}
    assert seen.count == 2


def test_without_a_marker_before_calls_the_joint_and_a_thought_are_not_written(open_session):
    texts = {
        family: [one.text for one in open_session(family).must_not_call(GREEDY, TOOLS).unwritten]
        for family in ("ready chatglm3", "llama3.1", "qwen3")
    }
    assert texts == {
        "ready chatglm3": [b"<|assistant|>", b"<think>"],
        "llama3.1": [b"<think>"],
        "qwen3": [b"<tool_call>"],
    }


def test_a_marker_is_not_written_from_parts_of_its_characters():
    letters = bytes_to_unicode()
    model = models.BPE({letters[byte]: byte for byte in range(256)}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<｜a▁b｜>"])
    every, marker = TokenBytes(tokenizer).every, "<｜a▁b｜>"
    unwritten, ids = Unwritten(every, marker), list(marker.encode())
    assert [set(unwritten.next_to(ids[:k])) for k in (0, 5, len(ids) - 1)] == [{256}, {256}, {256, ord(">")}]


def test_what_cannot_be_called_is_refused(open_session):
    session = open_session("chatglm3")
    with pytest.raises(
        DataError, match="the function 'no' is not offered; tools has clock, get_weather, get_weather_f"
    ):
        session.must_call(GREEDY, ["clock", "no"], TOOLS)
    with pytest.raises(DataError, match="the function 'no' is not offered; tools has none"):
        session.must_call(GREEDY, ["no"], None)
    with pytest.raises(DataError, match="there is no function to call"):
        session.must_call(GREEDY, [], TOOLS)
    plain = Session(session.tokenizer, "chatglm2")
    with pytest.raises(DataError, match=r"^data_format chatglm2: the format has no calls"):
        plain.must_call(GREEDY, ["clock"], TOOLS)
    assert plain.must_not_call(GREEDY, TOOLS) == GREEDY


@pytest.mark.parametrize("family", ["chatglm3", "glm4", "ready chatglm3"])
@pytest.mark.parametrize("name", ["f'(`", "$f", "🙂", "two words", "天气", "get-weather", "a" * 64])
def test_a_function_is_called_by_a_name_that_is_read_back_and_any_other_is_refused(open_session, family, name):
    session, tools = open_session(family), [{"name": name, "parameters": {}}]
    if name in ("天气", "get-weather", "a" * 64):
        (begin,) = session.must_call(GREEDY, [name], tools).begins
        assert session.tokenizer.decode(begin).count(name) == 1
    else:
        with pytest.raises(
            DataError, match=r"cannot be made to call .*: this model's format cannot call a function of"
        ):
            session.must_call(GREEDY, [name], tools)


def test_a_beginning_goes_as_far_as_all_calls_are_alike(open_session):
    session = open_session("chatglm3")
    (begin,) = session.must_call(GREEDY, ["get_weather"], TOOLS).begins
    assert session.tokenizer.decode(begin) == "get_weather\n ```python\ntool_call("
    session = open_session("qwen3.5")  # where training refuses this name without arguments, but not with them
    (begin,) = session.must_call(GREEDY, ["get_weather"], TOOLS).begins
    assert session.tokenizer.decode(begin).endswith("<function=get_weather>")


def test_what_functions_need_is_found_once_and_without_the_others(open_session, monkeypatch):
    session, tools = open_session("qwen2.5"), [WEATHER | {"name": f"function_{i}"} for i in range(32)]
    names, asked, learned = [tool["name"] for tool in tools], [], session.limits.learned
    monkeypatch.setattr(session.limits, "learned", lambda *args: asked.append(len(args[1])) or learned(*args))
    begins = session.must_call(GREEDY, names, tools).begins
    assert len(begins) == 32
    assert sorted(asked)[-2:] == [1, 32]
    assert len(asked) <= 2 + 4 * 32
    assert session.must_call(GREEDY, names, tools).begins == begins
    session.must_call(GREEDY, names[:2], tools[1::-1])
    assert sorted(asked)[-3:] == [1, 2, 32], "other functions, which change nothing"
    first = session.must_not_call(GREEDY, tools)
    assert session.must_not_call(Sampling(9), None).unwritten[0] is first.unwritten[0]


# The choice of tokens


def chosen(logits, sampling, tokens=()):
    generation = Generation([1], sampling, tokens=list(tokens))
    return choose(torch.tensor([logits]), [generation])[0]


def test_an_answer_begins_as_it_must_and_is_then_free():
    logits, begins = [9.0, 5.0, 3.0, 1.0], ((2, 1), (2, 3, 1), (3,))
    for temperature in (0.0, 0.01):
        sampling = Sampling(begins=begins, temperature=temperature)
        assert chosen(logits, sampling)[0] == 2
        assert chosen(logits, sampling, [2])[0] == 1
        assert chosen(logits, sampling, [2, 1])[0] == 0
        assert chosen(logits, sampling, [3])[0] == 0
        assert chosen(logits, sampling, [2, 3])[0] == 1
        assert chosen(logits, replace(sampling, begins=((2,), (2, 3))), [2])[0] == 0
        assert chosen(logits, Sampling(banned=frozenset({0}), temperature=temperature), [2])[0] == 1
        assert chosen(logits, Sampling(not_first=frozenset({0}), temperature=temperature))[0] == 1
        assert chosen(logits, Sampling(not_first=frozenset({0}), temperature=temperature), [1])[0] == 0


def test_probabilities_of_a_limited_answer_are_those_of_the_model():
    _, logprobs = chosen([9.0, 5.0, 3.0], Sampling(begins=((2,),), logprobs=1))
    expected = torch.tensor([9.0, 5.0, 3.0]).log_softmax(-1)
    assert logprobs.chosen == pytest.approx(expected[2].item())
    assert logprobs.top == ((0, pytest.approx(expected[0].item())),)


def test_an_answer_without_a_call_has_one_message_and_begins_with_no_space_before_a_brace(open_session):
    session = open_session("chatglm3")
    assert session.must_not_call(GREEDY, TOOLS).banned == {session.reader.parting}
    session = open_session("llama3.1")
    refused, every = session.must_not_call(GREEDY, TOOLS).not_first, session.reader.bytes.every
    blank, brace, letter = ({i for i, one in enumerate(every) if one.strip() == text} for text in (b"", b"{", b"a"))
    assert blank | brace <= refused
    assert blank and letter and not letter & refused


def test_a_limit_may_name_tokens_that_the_model_does_not_have():
    assert chosen([9.0, 5.0, 3.0], Sampling(banned=frozenset({0, 3})))[0] == 1
    assert chosen([9.0, 5.0, 3.0], Sampling(begins=((3,), (2,))))[0] == 2


def test_a_choice_without_limits_copies_no_logits(monkeypatch):
    monkeypatch.setattr("component.inference.sampling.limit", lambda *_: pytest.fail("logits were limited"))
    choose(torch.randn(2, 5), [Generation([1]), Generation([1], Sampling(temperature=1.0))])


def test_beginnings_of_nothing_and_of_the_end_are_refused():
    with pytest.raises(ArgumentError, match="begins must be token sequences that are not empty"):
        Sampling(begins=((),))
    engine = Engine(make_model("llama").eval(), (5, 6), max_tokens=32)
    with pytest.raises(DataError, match="begins: the token 6 ends an answer"):
        engine.submit([9], Sampling(begins=((8, 6),)))
    with pytest.raises(DataError, match="begins: the token 97 is none of the 97 that can"):
        engine.submit([9], Sampling(begins=((8, 97),)))


@pytest.mark.parametrize("fused", [True, False])
def test_limits_of_one_conversation_are_not_those_of_another(fused):
    model = make_model("llama").eval() if fused else make_unfused(GPTNeoXConfig)
    prompts = make_prompts((9, 9, 9, 4))
    stops = frozenset(range(40))
    ways = [Sampling(8, begins=((50, 51, 52),)), Sampling(8), Sampling(8, 2.0, seed=3), Sampling(8, 2.0, seed=4,
            begins=((60,), (61, 62)), banned=frozenset({70}))]  # fmt: skip

    def run(numbers):
        engine = Engine(model, stops, max_batch=4, max_tokens=48)
        generations = [engine.submit(prompts[number], ways[number]) for number in numbers]
        while engine.is_busy:
            engine.step()
        return [(one.tokens, one.stop_id) for one in generations]

    together = run([0, 1, 2, 3])
    assert together == [run([number])[0] for number in range(4)]
    assert together[0][0][:3] == [50, 51, 52]
    assert together[3][0][0] == 60 or together[3][0][:2] == [61, 62]
