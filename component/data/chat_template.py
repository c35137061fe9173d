"""data_format chat_template: the tokenizer's own template, by the conventions of transformers' apply_chat_template."""

import functools
import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from ..chat_templates import control_tokens
from ..run.errors import DataError
from .chat_text import SHIELD, Chat
from .conversation import Conversation
from .render import TokenizedSample

SHIELDED = "[\U00100000-\U0010ffff]+"
# Texts that show whether a control token changes what stands beside it.
BESIDE = ("a", " a ", "\na\n")


def render_chat_template(conversation: Conversation, tokenizer) -> TokenizedSample:
    """Render the text of the tokenizer's chat template.

    A learned message teaches what the model writes of it: from the end of the generation prompt to the control token
    that stops inference. That token is the last of those that follow the message's words whether the conversation
    ends there or goes on, else the first that follows (GLM-4), else the tokenizer's EOS, which is added. Control tokens
    written in a text are text.

    Raises:
        DataError: the template refuses the conversation, leaves out a part of it, or writes nothing that can end an
            answer.
    """
    pattern, control_ids = control_of(tokenizer)
    chat = open_chat(conversation, tokenizer, pattern)
    ids, spans = encode_shielded(chat.text, tokenizer)
    starts = [start for start, _ in spans]
    mask = [0] * len(ids)
    controls = [at for at, token in enumerate(ids) if token in control_ids]
    for i in [i for i, is_learned in enumerate(chat.learned) if is_learned]:
        stop = chat.words[i].stop
        after = chat.words[i + 1].start if i + 1 < len(chat.words) else len(chat.text)
        if after < stop:
            raise DataError(
                "the tokenizer's chat template writes a part of an answer behind the next message, or an answer "
                "otherwise for another text in the next message; change the row or it"
            )
        ending = stop + len(chat.ending(i))
        following = [at for at in controls if stop <= spans[at][0] < after]
        ends = [at for at in following if spans[at][1] <= ending] or following[:1]
        if not ends:
            if i + 1 < len(chat.words):
                raise DataError("the tokenizer's chat template writes no control token that could end an answer")
            ends = [len(ids)]
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 0]
        end = next((at for at in ends if ids[at] == tokenizer.eos_token_id), ends[-1])
        # Of a token that begins in the prompt, such as a space and a word, the message has a part: it is learned.
        first = bisect_right([end for _, end in spans], chat.beginning(i, starts))
        mask[first : end + 1] = [1] * (end + 1 - first)
    return TokenizedSample(ids, mask)


def open_chat(conversation: Conversation, tokenizer, control: re.Pattern) -> Chat:
    """The conversation as the template writes it: with one call in a message, if it writes the same for those that were
    made together. (ChatGLM3's does, whose results stand between them.)"""
    chat = Chat(conversation, tokenizer, control)
    apart = replace(conversation, turns=tuple(replace(turn, joined=False) for turn in conversation.turns))
    if apart != conversation:
        with suppress(DataError):
            other = Chat(apart, tokenizer, control)
            return other if other.text == chat.text else chat
    return chat


@functools.lru_cache(maxsize=8)
def control_of(tokenizer) -> tuple[re.Pattern, frozenset[int]]:
    """A pattern of all control tokens' texts, and their ids."""
    tokens = control_tokens(tokenizer)
    texts = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)"), frozenset(tokens.values())


@functools.lru_cache(maxsize=8)
def control_changes_text(tokenizer) -> bool:
    """Whether text beside a control token is encoded otherwise than alone, as beside Phi-3's, which take the white
    space that follows them."""
    tokens = control_tokens(tokenizer)
    texts = [f"{token}{text}{token}" for token in tokens for text in BESIDE]
    alone = tokenizer(list(BESIDE), add_special_tokens=False)["input_ids"]
    expected = [[i, *ids, i] for i in tokens.values() for ids in alone]
    return bool(texts) and tokenizer(texts, add_special_tokens=False)["input_ids"] != expected


def encode_shielded(text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and where each begins and ends in `text`. Shielded characters are encoded as the plain text that they
    stand for, with the text around them up to the next control tokens; apart, if those change the text beside them."""
    ids, spans, at = [], [], 0
    border = SHIELDED if control_changes_text(tokenizer) else control_of(tokenizer)[0].pattern
    parts = re.split(f"({border})", text)
    for hidden, stretch in groupby(filter(None, parts), lambda part: max(part) >= chr(SHIELD)):
        shielded = "".join(stretch)
        plain = "".join(chr(ord(letter) - SHIELD) if ord(letter) >= SHIELD else letter for letter in shielded)
        encoded = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=hidden)
        ids += encoded["input_ids"]
        spans += [(at + start, at + end) for start, end in encoded["offset_mapping"]]
        at += len(shielded)
    return ids, spans
