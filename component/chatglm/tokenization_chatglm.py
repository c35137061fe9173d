"""The ChatGLM2/3 tokenizer: SentencePiece pieces, then the control tokens, which no text can produce.

Same ids, methods and results as the official `tokenization_chatglm.py` (see docs/chatglm_port.md).
"""

import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import BatchEncoding, PreTrainedTokenizer

from .prompt import round_prompt, tools_message

ROLES = ("system", "user", "assistant", "observation")
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))


class SPTokenizer:
    """SentencePiece and the control tokens that follow its pieces; `tokenizer.tokenizer` in official code."""

    def __init__(self, model_path: str):
        self.sp_model = SentencePieceProcessor(model_file=str(model_path))
        pieces = self.sp_model.get_piece_size()
        self.special_tokens = {token: pieces + i for i, token in enumerate(CONTROL_TOKENS)}
        self.index_special_tokens = {i: token for token, i in self.special_tokens.items()}
        self.n_words = pieces + len(CONTROL_TOKENS)
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.unk_id()

    def tokenize(self, text: str) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self.sp_model.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.decode_tokens([self.convert_id_to_token(i) for i in ids])

    def decode_tokens(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(tokens)

    def convert_token_to_id(self, token: str) -> int:
        return self.special_tokens.get(token, self.sp_model.piece_to_id(token))

    def convert_id_to_token(self, index: int) -> str:
        if index in self.index_special_tokens:
            return self.index_special_tokens[index]
        if index in (self.bos_id, self.eos_id, self.pad_id) or not 0 <= index < self.sp_model.get_piece_size():
            return ""
        return self.sp_model.id_to_piece(index)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of ChatGLM2 and ChatGLM3.

    Control tokens written in text (`<|user|>`, `[gMASK]`, `</s>`) are encoded as plain text, so no user input can
    open a turn. A sequence opens with `[gMASK] sop`; padding is on the left with `<unk>` (id 0).
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(
        self, vocab_file: str, padding_side: str = "left", clean_up_tokenization_spaces: bool = False, **kwargs
    ):
        self.vocab_file = vocab_file
        self.tokenizer = SPTokenizer(vocab_file)
        kwargs |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        kwargs.pop("auto_map", None)  # it names the official remote code, which a saved copy must not ask for
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_words

    def get_vocab(self) -> dict[str, int]:
        pieces = self.tokenizer.sp_model
        vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
        return vocab | self.tokenizer.special_tokens

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model")
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # Text to ids and back. No added-token splitting happens: control tokens in text are text.

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self.tokenizer.tokenize(text)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self.tokenizer.convert_token_to_id(token)

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        if isinstance(ids, int):
            return self.tokenizer.convert_id_to_token(ids)
        return [self.tokenizer.convert_id_to_token(int(i)) for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.tokenizer.decode_tokens(tokens)

    def get_command(self, token: str) -> int:
        """Id of a control token such as `<|user|>`, which `encode` never returns. Raises KeyError for any other."""
        return self.tokenizer.special_tokens[token]

    def get_prefix_tokens(self) -> list[int]:
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        second = [] if token_ids_1 is None else [*token_ids_1, self.tokenizer.eos_id]
        return self.get_prefix_tokens() + token_ids_0 + second

    def _pad(self, encoded_inputs, *args, **kwargs) -> dict:
        length = len(encoded_inputs["input_ids"])
        positions = encoded_inputs.pop("position_ids", None) or list(range(length))
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        padding = [0] * (len(padded["input_ids"]) - length)
        on_left = (kwargs.get("padding_side") or self.padding_side) == "left"
        padded["position_ids"] = padding + positions if on_left else positions + padding
        return padded

    # Conversations

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """One ChatGLM3 message: the role token, then `encode(metadata + newline)`, then `encode(message)`."""
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; expected one of {', '.join(ROLES)}")
        return [
            self.get_command(f"<|{role}|>"),
            *self.tokenizer.encode(f"{metadata}\n"),
            *self.tokenizer.encode(message),
        ]

    def build_chat_input(self, query: str, history: list[dict] | None = None, role: str = "user") -> BatchEncoding:
        """ChatGLM3 prompt of one conversation, up to and including the `<|assistant|>` that asks for the answer.

        Args:
            query: the newest message, spoken by `role` (`observation` for the result of a function).
            history: earlier messages, `{"role", "content"}` with optional `metadata`, or `tools` on a system message.

        Returns:
            tensors `input_ids`, `attention_mask` and `position_ids`, each (1, length).
        """
        ids = []
        for message in history or []:
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content = tools_message(message["tools"], content)
            ids += self.build_single_message(message["role"], message.get("metadata", ""), content)
        ids += [*self.build_single_message(role, "", query), self.get_command("<|assistant|>")]
        return self._prompt(self.get_prefix_tokens() + ids)

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """ChatGLM2 prompt as text: every earlier round with its answer, then the newest question."""
        rounds = [f"{round_prompt(i, asked)}{answer}\n\n" for i, (asked, answer) in enumerate(history or [], 1)]
        return "".join(rounds) + round_prompt(len(rounds) + 1, query)

    def _prompt(self, ids: list[int]) -> BatchEncoding:
        batch = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "position_ids": [list(range(len(ids)))]}
        return BatchEncoding(batch, tensor_type="pt")
