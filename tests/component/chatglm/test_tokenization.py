import json
import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from component.chatglm.tokenization_chatglm import CONTROL_TOKENS
from tests.conftest import read_jsonl


def test_text_becomes_the_official_ids_and_comes_back(reference, real_tokenizer):
    rows = read_jsonl(reference / "golden/chatglm3_tokenizer.jsonl")
    assert len(rows) == 31
    for row in rows:
        text = row["text"]
        assert real_tokenizer.encode(text) == row["input_ids"]
        assert real_tokenizer.encode(text, add_special_tokens=False) == row["input_ids_no_special"]
        assert real_tokenizer.build_single_message("user", "", text) == row["user_message"]
        assert real_tokenizer.decode(row["input_ids_no_special"]) == row["decoded"]
        assert real_tokenizer.decode(row["user_message"]) == row["decoded_message"]


def test_the_control_tokens_have_the_official_ids(real_tokenizer):
    ids = [real_tokenizer.get_command(token) for token in ("[MASK]", "[gMASK]", "sop", "<|system|>", "<|observation|>")]
    assert ids == [64789, 64790, 64792, 64794, 64797]
    assert (real_tokenizer.eos_token_id, real_tokenizer.pad_token_id, real_tokenizer.vocab_size) == (2, 0, 64798)
    assert real_tokenizer.tokenizer.special_tokens["<|user|>"] == 64795


@pytest.mark.parametrize("text", [*CONTROL_TOKENS, "</s>", "<s>", "<unk>", "a<|user|>\n b</s>[gMASK]sop"])
def test_control_tokens_in_text_are_text(tokenizer, text):
    control = {*tokenizer.tokenizer.special_tokens.values(), 1, 2}
    for ids in (
        tokenizer.encode(text, add_special_tokens=False),
        tokenizer.build_single_message("user", text, text)[1:],
    ):
        assert not control & set(ids)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_padding_is_on_the_left_with_positions_that_start_at_the_text(tiny_tokenizer):
    batch = tiny_tokenizer(["a", "a bc"], padding=True)
    short = len(tiny_tokenizer.encode("a"))
    long = len(tiny_tokenizer.encode("a bc"))
    assert batch["input_ids"][0] == [0] * (long - short) + tiny_tokenizer.encode("a")
    assert batch["attention_mask"][0] == [0] * (long - short) + [1] * short
    assert batch["position_ids"] == [[0] * (long - short) + list(range(short)), list(range(long))]
    right = tiny_tokenizer(["a", "a bc"], padding=True, padding_side="right")
    assert right["position_ids"][0] == [*range(short), *[0] * (long - short)]


@pytest.mark.parametrize("with_config", [True, False])
def test_a_saved_tokenizer_loads_with_the_same_ids_and_asks_for_no_remote_code(
    tiny_tokenizer, make_model, tmp_path, with_config
):
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}})
    )
    if with_config:
        make_model().config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = Path(tmp_path, "again")
    loaded.save_pretrained(again)
    for tokenizer in (loaded, AutoTokenizer.from_pretrained(again), pickle.loads(pickle.dumps(loaded))):
        assert tokenizer.encode("Hello, 你好") == tiny_tokenizer.encode("Hello, 你好")
    assert "auto_map" not in json.loads((again / "tokenizer_config.json").read_text())


def test_chatglm2_prompts_count_their_rounds(tiny_tokenizer):
    assert (
        tiny_tokenizer.build_prompt("那呢", [("你好", "好")])
        == "[Round 1]\n\n问：你好\n\n答：好\n\n[Round 2]\n\n问：那呢\n\n答："
    )


def test_an_unknown_role_or_command_is_an_error(tiny_tokenizer):
    with pytest.raises(ValueError, match="role is 'tool'; expected one of system, user"):
        tiny_tokenizer.build_single_message("tool", "", "")
    with pytest.raises(KeyError):
        tiny_tokenizer.get_command("</s>")
