import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AddedToken, AutoTokenizer, DataCollatorForLanguageModeling

from component.chatglm import ChatGLMTokenizer
from component.chatglm.tokenization_chatglm import CONTROL_TOKENS
from component.export.tokenizer import write_tokenizer_json
from tests.conftest import read_jsonl


@pytest.fixture
def own_tokenizer(tiny_tokenizer, tmp_path) -> ChatGLMTokenizer:
    """A tokenizer that a test may change; its folder is `tmp_path / "base"`."""
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return AutoTokenizer.from_pretrained(tmp_path / "base")


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


def test_the_special_tokens_mask_marks_what_the_tokenizer_put_around_the_text(tiny_tokenizer):
    one, two = (len(tiny_tokenizer.encode(text, add_special_tokens=False)) for text in ("a bc", "d"))
    ask = {"return_special_tokens_mask": True}
    assert tiny_tokenizer("a bc", **ask)["special_tokens_mask"] == [1, 1] + [0] * one
    assert tiny_tokenizer("a bc", "d", **ask)["special_tokens_mask"] == [1, 1] + [0] * (one + two) + [1]
    assert tiny_tokenizer("a bc", add_special_tokens=False, **ask)["special_tokens_mask"] == [0] * one
    ids = [*tiny_tokenizer.build_chat_input("a bc")["input_ids"][0].tolist(), 2, 0]
    newline = len(tiny_tokenizer.encode("\n", add_special_tokens=False))
    mask = [1, 1, 1] + [0] * (newline + one) + [1, 1, 1]  # [gMASK] sop <|user|> … <|assistant|> </s> <unk>
    assert tiny_tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask


def test_words_are_masked_and_control_tokens_are_not(own_tokenizer):
    own_tokenizer.mask_token = "[MASK]"
    ids = own_tokenizer.build_chat_input("a bc")["input_ids"][0]
    labels = DataCollatorForLanguageModeling(own_tokenizer, mlm_probability=1.0)([{"input_ids": ids}])["labels"][0]
    control = [i in own_tokenizer.tokenizer.special_tokens.values() for i in ids.tolist()]
    assert sum(control) == 4
    assert (labels == -100).tolist() == control


def test_decoding_without_special_tokens_leaves_the_text(tiny_tokenizer):
    ids = [*tiny_tokenizer.build_chat_input("a bc")["input_ids"][0].tolist(), 2]
    assert tiny_tokenizer.decode(ids) == "[gMASK]sop<|user|> \n a bc<|assistant|>"
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "\n a bc"


def test_a_tokenizer_is_saved_whole_when_its_folder_is_gone(tiny_tokenizer, own_tokenizer, tmp_path):
    model = (tmp_path / "base/tokenizer.model").read_bytes()
    shutil.rmtree(tmp_path / "base")
    own_tokenizer.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base/tokenizer.model").read_bytes() == model
    pickle.loads(pickle.dumps(own_tokenizer)).save_pretrained(tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").encode("你好") == tiny_tokenizer.encode("你好")


# Added tokens, and other tokens for padding and ends


def test_added_tokens_follow_the_last_id_and_are_encoded_wherever_they_are_written(own_tokenizer):
    size = own_tokenizer.vocab_size
    a, b, newline = (own_tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b", "\n"))
    user = own_tokenizer.get_command("<|user|>")
    assert own_tokenizer.add_tokens(["<x>", "<x>y", "<|user|>", "</s>"]) == 2
    assert own_tokenizer.add_special_tokens({"additional_special_tokens": ["<z>"]}) == 1
    assert own_tokenizer.convert_tokens_to_ids(["<x>", "<x>y", "<z>"]) == [size, size + 1, size + 2]
    assert len(own_tokenizer) == size + 3
    assert own_tokenizer.encode("a<x>yb<x>", add_special_tokens=False) == [*a, size + 1, *b, size]
    assert own_tokenizer.tokenize("a<z>") == [*own_tokenizer.convert_ids_to_tokens(a), "<z>"]
    assert own_tokenizer.build_single_message("user", "", "a<z>b") == [user, *newline, *a, size + 2, *b]
    assert not {user, 2} & set(own_tokenizer.encode("<|user|></s>", add_special_tokens=False)), "they are still text"


@pytest.mark.parametrize("text", ["<x>", "a<x>b", "<x> a  <z> ", "你好<x><z>😀", "a", " <x>\n<x>y"])
def test_added_tokens_come_back_from_their_ids_with_the_text_around_them(own_tokenizer, text):
    own_tokenizer.add_tokens(["<x>", "<x>y"])
    own_tokenizer.add_tokens(["<z>"], special_tokens=True)
    ids = own_tokenizer.encode(text)
    assert own_tokenizer.decode(ids[2:]) == text
    assert own_tokenizer.convert_tokens_to_ids(own_tokenizer.convert_ids_to_tokens(ids)) == ids
    special = own_tokenizer.convert_tokens_to_ids("<z>")
    plain = [i for i in ids[2:] if i != special]
    assert own_tokenizer.decode(ids, skip_special_tokens=True) == own_tokenizer.decode(plain)


def test_added_tokens_and_the_padding_token_are_saved_and_loaded_again(own_tokenizer, tmp_path):
    assert own_tokenizer.pad_token_id == 0
    own_tokenizer.add_tokens(["<x>"])
    own_tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<z>"]})
    size = own_tokenizer.vocab_size
    own_tokenizer.save_pretrained(tmp_path / "saved")
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "saved"), pickle.loads(pickle.dumps(own_tokenizer))):
        assert tokenizer.encode("a<x><pad><z>") == own_tokenizer.encode("a<x><pad><z>")
        assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", size + 1, size + 3)
        assert tokenizer(["a", "a<x>"], padding=True)["input_ids"][0][0] == size + 1
        assert {size + 1, size + 2} < set(tokenizer.all_special_ids)
        assert tokenizer.add_tokens(["<w>"]) == 1
        assert tokenizer.convert_tokens_to_ids("<w>") == size + 3
    own_tokenizer.pad_token = "</s>"
    own_tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token_id == 2


@torch.no_grad()
def test_added_tokens_have_rows_in_the_padded_embedding(own_tokenizer, make_model):
    model = make_model(padded_vocab_size=384)
    own_tokenizer.add_tokens([f"<{i}>" for i in range(384 - len(own_tokenizer))])
    logits = model(**own_tokenizer(f"a<0>{own_tokenizer.convert_ids_to_tokens(383)}", return_tensors="pt")).logits
    assert logits.shape[-1] == len(own_tokenizer) == 384
    own_tokenizer.add_tokens(["one more"])
    model.resize_token_embeddings(len(own_tokenizer))
    assert model(**own_tokenizer("one more", return_tensors="pt")).logits.shape[-1] == 385


def test_what_the_tokenizer_cannot_do_with_tokens_is_refused(own_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'<x>': ChatGLM's added tokens have no lstrip, rstrip and single_word"):
        own_tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])
    assert len(own_tokenizer) == own_tokenizer.vocab_size
    with pytest.raises(ValueError, match="eos_token is '<eos>', but ChatGLM's is '</s>'; leave it as it is"):
        AutoTokenizer.from_pretrained(tmp_path / "base", eos_token="<eos>")
    assert AutoTokenizer.from_pretrained(tmp_path / "base", eos_token=None, pad_token=None).eos_token_id == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|user|>"),
        lambda tokenizer: setattr(tokenizer, "eos_token_id", 5),
        lambda tokenizer: setattr(tokenizer, "unk_token", None),
        lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|user|>"}),
    ],
)
def test_a_token_of_the_models_own_is_not_changed(tiny_tokenizer, change):
    """With another, a saved folder could not be loaded."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with pytest.raises(ValueError, match="; leave it as it is"):
        change(tokenizer)
    assert (tokenizer.eos_token, tokenizer.unk_token) == ("</s>", "<unk>")
    tokenizer.eos_token_id = 2


def test_a_tokenizer_json_beside_it_changes_nothing(tiny_tokenizer, tmp_path):
    """transformers takes the control tokens that it lists for added tokens."""
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    plain = AutoTokenizer.from_pretrained(tmp_path)
    write_tokenizer_json(plain, tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(beside, ChatGLMTokenizer)
    assert (len(beside), beside.get_vocab()) == (len(plain), plain.get_vocab())
    assert beside.added_tokens_encoder == plain.added_tokens_encoder
    assert beside.encode("a <sop> <|user|></s>") == plain.encode("a <sop> <|user|></s>")
    beside.add_tokens(["<think>"])
    assert beside.convert_tokens_to_ids("<think>") == plain.vocab_size
