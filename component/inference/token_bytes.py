"""The bytes of a tokenizer's tokens, some of which are parts of a character."""

from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..chatglm.text import BYTE


class TokenBytes:
    """What each token of a tokenizer adds to a text, in bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        """One more than the largest id of a token."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def letters(self) -> dict[str, int]:
        """The byte of each letter, where pieces are written in letters for bytes; else empty."""
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        return {letter: byte for byte, letter in bytes_to_unicode().items()} if "ByteLevel" in str(decoder) else {}

    @cached_property
    def whole(self) -> frozenset[str]:
        """Pieces that are written as they are, such as control tokens."""
        return frozenset(self.tokenizer.get_added_vocab())

    def bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        if piece in self.whole:
            return piece.encode()
        if BYTE(piece):
            return bytes([int(piece[3:5], 16)])
        if self.letters and all(letter in self.letters for letter in piece):
            return bytes(self.letters[letter] for letter in piece)
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def every(self) -> list[bytes]:
        """The bytes of every token, by its id."""
        return [self.bytes_of(token) for token in range(len(self))]
