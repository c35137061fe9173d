"""The facts about the published models are those of the official files."""

import hashlib

from component.verify import facts

from ...conftest import read_jsonl


def test_the_token_ids_are_the_official_tokenizers(reference, real_tokenizer):
    assert {text: real_tokenizer.encode(text, add_special_tokens=False) for text in facts.IDS} == facts.IDS
    assert real_tokenizer.build_chat_input("你好")["input_ids"].tolist() == [facts.CHAT]
    golden = {row["text"]: row for row in read_jsonl(reference / "golden/chatglm3_tokenizer.jsonl")}
    assert facts.IDS["你好"] == golden["你好"]["input_ids_no_special"]
    assert facts.CHAT[2:-1] == golden["你好"]["user_message"]


def test_the_hash_is_that_of_the_official_tokenizer(reference):
    for model in ("chatglm2-6b", "chatglm3-6b"):
        assert hashlib.sha256((reference / model / "tokenizer.model").read_bytes()).hexdigest() == facts.TOKENIZER


def test_the_texts_have_some_250_tokens_each(real_tokenizer):
    lengths = [len(real_tokenizer.encode(text, add_special_tokens=False)) for text in facts.TEXTS.values()]
    assert lengths == [262, 254]


def test_the_result_of_the_function_fits_its_question():
    assert facts.PLACE in facts.QUESTION
    assert facts.RESULT["city"] == facts.PLACE
    assert str(facts.RESULT["temperature"]) == facts.FIGURE
    assert facts.FUNCTION in [tool["name"] for tool in facts.TOOLS]
