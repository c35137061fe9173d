"""Text of tokens that come one by one, by any tokenizer."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to
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
        cleaning = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self.decode, self.piece = partial(tokenizer.decode, **cleaning), tokenizer.convert_ids_to_tokens
        self.skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self.before, self.newest = list(before), []
        self.settled = self.text = ""

    def add(self, token: int) -> None:
        if self.newest and self.is_silent(token) and self.is_silent(self.newest[-1]):
            return  # a token without text, such as ChatGLM's <unk>, cuts bytes apart; another after it does no more
        self.newest.append(token)
        tail = self.read(self.before, self.newest)
        self.text = self.settled + tail
        done = self.newest[:-UNDECIDED] if tail.endswith(HALF) else self.newest
        rest = self.newest[len(done) :]
        text = self.read(self.before, done)
        if text and text + self.read(done, rest) == tail:  # no character has tokens on both sides
            self.settled += text
            self.before, self.newest = done, rest

    def is_silent(self, token: int) -> bool:
        return token in self.skipped or not self.piece(token)

    def read(self, before: list[int], tokens: list[int]) -> str:
        return self.decode(before + tokens)[len(self.decode(before)) :]
