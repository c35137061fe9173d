import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.chatglm.chat import parse_reply
from component.chatglm.prompt import parse_tool_call
from tests.conftest import read_jsonl

GREEDY = {"do_sample": False, "max_new_tokens": 12}
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


def test_replies_are_read_as_officially(reference):
    rows = read_jsonl(reference / "golden/chatglm3_process_response.jsonl")
    assert len(rows) == 7
    for row in rows:
        assert parse_reply(row["output"], row["history"]) == (row["content"], row["new_history"])


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
    content, history = parse_reply(f"now\n{text}", TOOLS)
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


@pytest.mark.parametrize("ends_whole", [True, False])
def test_streaming_holds_half_characters_back_and_ends_as_chat_does(make_model, tiny_tokenizer, ends_whole):
    face = [tiny_tokenizer.tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    script = [*face, 2] if ends_whole else face  # without the end, the limit cuts the character

    def settings() -> dict:
        tokens = iter(script)

        def write_next(ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(tokens)]), 0.0)

        return {"do_sample": False, "max_new_tokens": len(script), "logits_processor": [write_next]}

    model = make_model()
    *earlier, last = (history[-1]["content"] for _, history in model.stream_chat(tiny_tokenizer, "a", **settings()))
    assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in earlier)
    assert last == model.chat(tiny_tokenizer, "a", **settings())[1][-1]["content"]
    assert (last == "😀") is ends_whole


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
    assert after == parse_reply(tiny_tokenizer.decode(second[:-1].tolist()), asked)[1]
