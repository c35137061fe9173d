"""Text of tokens that come one by one, by any tokenizer."""

import re
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to
BYTE = re.compile("<0x[0-9A-F]{2}>").fullmatch  # the piece of a token that is a byte
UNDECIDED = 3  # that many tokens at most are such bytes: a character of UTF-8 has four


class GrowingText:
    """Text of tokens that come one by one: always what decoding all of them at once gives, at a constant cost a token.

    Only the newest tokens are decoded, as the tokenizer does without cleaning up spaces.

    Args:
        before: some of the tokens before them, which decide about a space between.
        skip_special_tokens: True to leave out the tokenizer's special tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), skip_special_tokens: bool = False
    ):
        self.decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.piece, self.is_fast = tokenizer.convert_ids_to_tokens, tokenizer.is_fast
        self.skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self.before, self.newest = list(before), []
        self.settled = self.text = ""

    def add(self, token: int) -> None:
        if token in self.skipped or (self.newest and not self.piece(token) and not self.piece(self.newest[-1])):
            return  # a token without a piece, such as ChatGLM's <unk>, cuts bytes apart; another after it does no more
        self.newest.append(token)
        tail = self.read(self.before, self.newest)
        self.text = self.settled + tail
        done = self.newest[:-UNDECIDED] if tail.endswith(HALF) else self.newest
        while self.is_fast and done and BYTE(self.piece(done[-1]) or ""):
            done = done[:-1]  # tokenizers of Rust decode a run of bytes as a whole, or each byte of it to HALF
        rest = self.newest[len(done) :]
        text = self.read(self.before, done) if rest else tail
        if text and (not rest or text + self.read(done, rest) == tail):  # no character has tokens on both sides
            self.settled += text
            self.before, self.newest = done, rest

    def read(self, before: list[int], tokens: list[int]) -> str:
        return self.decode(before + tokens)[len(self.decode(before)) :]
