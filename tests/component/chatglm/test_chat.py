import pickle
import random
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.chatglm.chat import parse_reply
from component.chatglm.prompt import parse_tool_call
from component.chatglm.text import GrowingText
from tests.conftest import read_jsonl

GREEDY = {"do_sample": False, "max_new_tokens": 12}
ANSWERED = {"role": "assistant", "metadata": "", "content": "noon"}
TOOLS = [{"role": "system", "content": "Tools:", "tools": [{"name": "now"}]}]


def test_greedy_chats_are_the_official_ones_and_stream_to_the_same_end(reference, real_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(reference / "modeling/chatglm3_chat", dtype=torch.float32).eval()
    rows = read_jsonl(reference / "golden/chatglm3_chat.jsonl")
    assert len(rows) == 5
    for row in rows:
        asked = {"history": row["history"], "role": row["role"]}
        prompt = real_tokenizer.build_chat_input(row["query"], **asked)
        assert prompt["input_ids"].tolist() == [row["input_ids"]]
        assert prompt["position_ids"].tolist() == [row["position_ids"]]
        settings = {**asked, "do_sample": False, "max_length": len(row["input_ids"]) + 24}
        expected = (row["response"], row["new_history"])
        assert model.chat(real_tokenizer, row["query"], **settings) == expected
        *_, last = model.stream_chat(real_tokenizer, row["query"], **settings)
        assert last == expected


def test_replies_are_read_as_officially(reference, make_model):
    model = make_model()
    rows = read_jsonl(reference / "golden/chatglm3_process_response.jsonl")
    assert len(rows) == 7
    for row in rows:
        assert model.process_response(row["output"], row["history"]) == (row["content"], row["new_history"])


def test_literals_of_every_kind_are_read():
    call = "tool_call(a=-1.5, b='北京\\n', c=None, d=True, e={'x': [1, (2,)]}, f=[])"
    assert parse_tool_call(call) == {"a": -1.5, "b": "北京\n", "c": None, "d": True, "e": {"x": [1, (2,)]}, "f": []}


@pytest.mark.parametrize(
    "call",
    [
        "tool_call(x=__import__('os').system('touch CANARY'))",
        "tool_call(x=open('CANARY', 'w'))",
        "tool_call(**{'x': 1})",
        "tool_call('x')",
        "tool_call(x=lambda: 1)",
        "tool_call(x=f'{1 + 1}')",
        "tool_call(x=[i for i in range(9)])",
        "tool_call(x=(y := 1))",
        "tool_call(x=().__class__)",
        "tool_call(x=9 ** 9 ** 9)",
        "tool_call(x=" + "(" * 100_000 + ")" * 100_000 + ")",
        "tool_call(x=" + "-" * 100_000 + "1)",
        "tool_call(x=" + "9" * 100_000 + ")",
        "tool_call(x=1); open('CANARY', 'w')",
        "exec('1')",
        "",
    ],
)
def test_anything_but_plain_literals_is_handed_back_as_text_and_runs_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f" ```python\n{call}\n```"
    content, history = parse_reply([f"now\n{text}"], TOOLS)
    assert content == {"name": "now", "content": text}
    assert history[-1]["content"] == text
    assert not list(tmp_path.iterdir())


def test_the_callers_history_is_left_as_it_was(make_model, tiny_tokenizer):
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "metadata": "", "content": "b"}]
    before = [dict(message) for message in history]
    _, after = make_model().chat(tiny_tokenizer, "c", history=history, **GREEDY)
    assert history == before
    assert after[:3] == [*before, {"role": "user", "content": "c"}]


def test_chatglm2_speaks_in_pairs(make_model, tiny_tokenizer):
    model = make_model(chatglm_version=2)
    answer, history = model.chat(tiny_tokenizer, "天气", history=[], **GREEDY)
    assert history == [("天气", answer)]
    answer2, history2 = model.chat(tiny_tokenizer, "好", history=history, **GREEDY)
    assert history2 == [("天气", answer), ("好", answer2)]
    *_, (streamed, _) = model.stream_chat(tiny_tokenizer, "好", history=history, **GREEDY)
    assert streamed == answer2
    assert model.process_response(" [[训练时间]] ") == "2023年"


@pytest.fixture
def write(tiny_tokenizer):
    """Settings that have a model write these tokens, whatever it computes."""

    def write(tokens: list[int]) -> dict:
        script = iter(tokens)

        def write_next(ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(script)]), 0.0)

        return {"do_sample": False, "max_new_tokens": len(tokens), "logits_processor": [write_next]}

    return write


@pytest.fixture
def bytes_of(tokenizer):
    """The tokens of a text's bytes."""
    piece_to_id = tokenizer.tokenizer.sp_model.piece_to_id
    return lambda text: [piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("ends_whole", [True, False])
@pytest.mark.parametrize("tokenizer", ["tiny"], indirect=True)
def test_streaming_holds_half_characters_back_and_ends_as_chat_does(make_model, tokenizer, bytes_of, write, ends_whole):
    script = bytes_of("😀") + [2] * ends_whole  # without the end, the limit cuts the character
    model = make_model()
    *earlier, last = (history[-1]["content"] for _, history in model.stream_chat(tokenizer, "a", **write(script)))
    assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in earlier)
    assert last == model.chat(tokenizer, "a", **write(script))[1][-1]["content"]
    assert (last == "😀") is ends_whole


def test_an_answer_is_split_at_the_control_token_and_not_at_its_text(make_model, tiny_tokenizer, write):
    encode = tiny_tokenizer.tokenizer.encode
    call = encode("now\n```python\ntool_call(text='<|assistant|>')\n```")
    script = [*encode("\nlook <|assistant|>, you"), tiny_tokenizer.get_command("<|assistant|>"), *call, 2]
    model = make_model()
    answer, history = model.chat(tiny_tokenizer, "a", history=TOOLS, **write(script))
    assert answer == {"name": "now", "parameters": {"text": "<|assistant|>"}}
    assert [message["content"] for message in history[2:]] == [
        "look <|assistant|>, you",
        "```python\ntool_call(text='<|assistant|>')\n```",
    ]
    assert history[-1]["metadata"] == " now", "with the space that decoding the whole answer gives"
    yields = list(model.stream_chat(tiny_tokenizer, "a", history=TOOLS, **write(script)))
    assert yields[-1] == (answer, history)
    assert [len(after) for _, after in yields] == [3] * (len(script) - len(call) - 1) + [4] * (len(call) + 1)


def test_a_growing_text_is_what_decoding_all_its_tokens_gives(tokenizer, bytes_of):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.add_tokens(["<x>", "<xy>"])
    draw = random.Random(0)
    whole = [bytes_of(character) for character in ("😀", "é", "中", "\ufffd", "\n", " ")]
    odd = [0, 1, 2, *tokenizer.tokenizer.special_tokens.values(), *tokenizer.tokenizer.added_tokens.values()]
    odd += [*tokenizer.convert_tokens_to_ids(["▁", "▁▁▁"]), len(tokenizer), len(tokenizer) + 200]
    for _ in range(300):
        ids = []
        for _ in range(draw.randint(1, 30)):
            character = draw.choice(whole)
            stray = bytes_of("\x00")[0] + draw.randrange(256)
            word = draw.randrange(3, tokenizer.vocab_size)
            odd_ones = [draw.choice(odd)] * draw.randint(1, 4)
            ids += draw.choice([character, character[: draw.randint(1, 4)], [stray], odd_ones, [word]])
        text = GrowingText(tokenizer)
        for count, token in enumerate(ids, 1):
            text.add(token)
            assert text.text == tokenizer.decode(ids[:count]), ids[:count]


@pytest.mark.parametrize(
    "kind",
    [
        "words",
        "halves of characters",
        "the replacement character",
        "spaces",
        "<unk>",
        "ids past the vocabulary",
        "halves of characters and <unk>",
        "spaces and <unk>",
    ],
)
def test_a_token_is_decoded_with_a_few_others_however_long_the_text_is(tokenizer, bytes_of, kind):
    kinds = {
        "words": tokenizer.encode("你好, a b 😀\n", add_special_tokens=False),
        "halves of characters": bytes_of("😀")[:2],
        "the replacement character": bytes_of("\ufffd"),
        "spaces": [tokenizer.convert_tokens_to_ids("▁")],
        "<unk>": [0],
        "ids past the vocabulary": [len(tokenizer), len(tokenizer) + 200],
    }
    for one in ("halves of characters", "spaces"):
        kinds[f"{one} and <unk>"] = [*kinds[one], 0, 0]
    text, lengths = GrowingText(tokenizer), []
    decode = text.decode
    text.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    ids = (kinds[kind] * 500)[:500]
    for token in ids:
        text.add(token)
    assert text.text == tokenizer.decode(ids)
    assert max(lengths) <= 12
    assert len(lengths) <= 8 * len(ids)


def test_a_stream_that_is_left_early_stops_generating(make_model, tiny_tokenizer):
    before = threading.active_count()
    stream = make_model().stream_chat(tiny_tokenizer, "a", do_sample=False, max_new_tokens=100_000, eos_token_id=None)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_streaming_reaches_the_caller(make_model, tiny_tokenizer):
    model = make_model()
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(model.stream_chat(tiny_tokenizer, "a", **GREEDY))


@torch.no_grad()
def test_a_second_turn_with_the_cache_reads_only_the_new_message(make_model, tiny_tokenizer):
    model = make_model()
    settings = {"do_sample": False, "max_new_tokens": 6, "return_past_key_values": True}
    *_, (_, history, cache) = model.stream_chat(tiny_tokenizer, "a", **settings)
    prompt = tiny_tokenizer.build_chat_input("a")["input_ids"]
    stops = [2, tiny_tokenizer.get_command("<|user|>"), tiny_tokenizer.get_command("<|observation|>")]
    first = model.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=stops)
    assert cache.get_seq_length() == first.shape[1] - 1  # the last token was never read
    message = [*tiny_tokenizer.build_single_message("user", "", "b"), tiny_tokenizer.get_command("<|assistant|>")]
    whole = torch.cat((first[:, :-1], torch.tensor([message])), dim=1)
    second = model.generate(whole, do_sample=False, max_new_tokens=6, eos_token_id=stops)[0, whole.shape[1] :]
    *_, (_, after, _) = model.stream_chat(tiny_tokenizer, "b", history, past_key_values=cache, **settings)
    asked = [*history, {"role": "user", "content": "b"}]
    assert after == model.process_response(tiny_tokenizer.decode(second[:-1].tolist()), asked)[1]


@pytest.mark.parametrize("role", ["observation", "tool"])
def test_a_call_and_its_result_by_chat_with_and_without_the_cache(make_model, tiny_tokenizer, write, role):
    encode = tiny_tokenizer.tokenizer.encode
    call = [*encode("now\n```python\ntool_call(zone='UTC')\n```"), tiny_tokenizer.get_command("<|observation|>")]
    offer = [{"role": "system", "content": "Tools:", "tools": [{"type": "function", "function": {"name": "now"}}]}]
    model = make_model()
    stream = model.stream_chat(tiny_tokenizer, "a", offer, return_past_key_values=True, **write(call))
    *_, (answer, history, cache) = stream
    assert answer == {"name": "now", "parameters": {"zone": "UTC"}}
    prompts = []
    forward = model.forward
    model.forward = lambda input_ids, **rest: prompts.append(input_ids[0].tolist()) or forward(input_ids, **rest)
    said = [*encode("\nnoon"), 2]
    expected = ("noon", [*history, {"role": role, "content": "12"}, ANSWERED])
    assert model.chat(tiny_tokenizer, "12", history, role, **write(said)) == expected
    *_, last = model.stream_chat(tiny_tokenizer, "12", history, role, past_key_values=cache, **write(said))
    assert last == expected
    message = [
        *tiny_tokenizer.build_single_message("observation", "", "12"),
        tiny_tokenizer.get_command("<|assistant|>"),
    ]
    whole, *_ = prompts
    assert whole == tiny_tokenizer.build_chat_input("12", history, "observation")["input_ids"][0].tolist()
    assert whole[-len(message) :] == message
    assert prompts[len(said)][-len(message) :] == message
    after = [*history, {"role": role, "content": "12"}, ANSWERED]
    official = [{**one, "role": "observation"} if one["role"] == "tool" else one for one in after]
    prompt = tiny_tokenizer.build_chat_input("thanks", after)["input_ids"].tolist()
    assert prompt == tiny_tokenizer.build_chat_input("thanks", official)["input_ids"].tolist()
