"""Texts of tokens that come one by one, by tokenizers that are not ours. ChatGLM's is in test_chat.py."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from component.chatglm.text import GrowingText

WORDS = ["ab", "Ġab", "Ġ", "ĠĠ", "<s>", "</s>"]


def by_bytes() -> PreTrainedTokenizerFast:
    """As of Llama 3 and Qwen: tokens are bytes, or several."""
    pieces = [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def by_pieces() -> PreTrainedTokenizerFast:
    """As of Llama 2 and Mistral: a space is ▁, the first one is taken away, and unknown characters are bytes."""
    pieces = [*(word.replace("Ġ", "▁") for word in WORDS), *(f"<0x{byte:02X}>" for byte in range(256)), "中", "<unk>"]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("make", [by_bytes, by_pieces])
def test_a_growing_text_is_what_decoding_all_its_tokens_gives(make, skips):
    tokenizer, draw = make(), random.Random(0)
    names = tokenizer.get_vocab()
    pieces = [f"<0x{byte:02X}>" for byte in "😀".encode()]
    if make is by_bytes:
        pieces = next(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("😀"))
    smile = [names[piece] for piece in pieces]
    assert tokenizer.decode(smile) == "😀"
    for _ in range(200):
        ids = []
        for _ in range(draw.randint(1, 25)):
            ids += draw.choice([smile, smile[: draw.randint(1, 3)], [draw.randrange(6)], [draw.randrange(len(names))]])
        text = GrowingText(tokenizer, skip_special_tokens=skips)
        for count, token in enumerate(ids, 1):
            text.add(token)
            whole = tokenizer.decode(ids[:count], skip_special_tokens=skips, clean_up_tokenization_spaces=False)
            assert text.text == whole, ids[:count]


@pytest.mark.parametrize("make", [by_bytes, by_pieces])
def test_a_token_is_decoded_with_a_few_others_however_long_the_text_is(make):
    tokenizer = make()
    text, lengths = GrowingText(tokenizer, skip_special_tokens=True), []
    decode = text.decode
    text.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    for token in [1, 1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2] * 30:
        text.add(token)
    assert max(lengths) <= 12
