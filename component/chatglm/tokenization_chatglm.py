"""The ChatGLM2/3 tokenizer: SentencePiece pieces, then the control tokens, which no text can produce, then added ones.

Same ids, methods and results as the official `tokenization_chatglm.py` (see docs/chatglm_port.md).
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from loguru import logger
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import get_json_schema

from .configuration_chatglm import find_version
from .messages import to_chatglm3
from .prompt import Message, round_prompt

ROLES = ("system", "user", "assistant", "observation")
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))
OWN_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>"}  # which no setting changes


class SPTokenizer:
    """SentencePiece, the control tokens that follow its pieces, and added tokens.

    `tokenizer.tokenizer` in official code. What stands before and after an added token is encoded as a text of its own.
    """

    def __init__(self, model_path: str):
        self.sp_model = SentencePieceProcessor(model_file=str(model_path))
        pieces = self.sp_model.get_piece_size()
        self.special_tokens = {token: pieces + i for i, token in enumerate(CONTROL_TOKENS)}
        self.index_special_tokens = {i: token for token, i in self.special_tokens.items()}
        self.n_words = pieces + len(CONTROL_TOKENS)
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.unk_id()
        self.added_tokens: dict[str, int] = {}

    def add(self, tokens: dict[str, int]) -> None:
        self.added_tokens |= tokens
        self.index_special_tokens |= {i: token for token, i in tokens.items()}

    def split(self, text: str) -> list[str]:
        """Cut a text before and after every added token; of two that begin at one place, the longer counts."""
        tokens = map(re.escape, sorted(self.added_tokens, key=len, reverse=True))
        return re.split(f"({'|'.join(tokens)})", text) if self.added_tokens else [text]

    def _encode(self, text: str, out_type: type) -> Iterator:
        for part in self.split(text):
            if part in self.added_tokens:
                yield part if out_type is str else self.added_tokens[part]
            else:
                yield from self.sp_model.encode(part, out_type=out_type)

    def tokenize(self, text: str) -> list[str]:
        return list(self._encode(text, str))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + list(self._encode(text, int)) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.decode_tokens([self.convert_id_to_token(i) for i in ids])

    def decode_tokens(self, tokens: list[str]) -> str:
        parts = groupby(tokens, self.added_tokens.__contains__)
        return "".join("".join(part) if added else self.sp_model.decode_pieces(list(part)) for added, part in parts)

    def convert_token_to_id(self, token: str) -> int:
        added = self.added_tokens.get(token, self.sp_model.piece_to_id(token))
        return self.special_tokens.get(token, added)

    def convert_id_to_token(self, index: int) -> str:
        if index in self.index_special_tokens:
            return self.index_special_tokens[index]
        if index in (self.bos_id, self.eos_id, self.pad_id) or not 0 <= index < self.sp_model.get_piece_size():
            return ""
        return self.sp_model.id_to_piece(index)


def refuse_other_token(name: str, token: str | AddedToken) -> None:
    if str(token) != OWN_TOKENS[name]:
        raise ValueError(f"{name} is {str(token)!r}, but ChatGLM's is {OWN_TOKENS[name]!r}; leave it as it is")


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of ChatGLM2 and ChatGLM3.

    Control tokens written in text (`<|user|>`, `[gMASK]`, `</s>`) are encoded as plain text, so no user input can
    open a turn. A sequence opens with `[gMASK] sop`; padding is on the left with `<unk>` (id 0), if no other token is
    set. Tokens that are added get the ids after the last and are encoded wherever they are written; the published
    models have 226 rows of embedding to spare for them.

    Args:
        chatglm_version: 2 or 3, the format of `apply_chat_template`. Where it is absent, the config.json beside
            `vocab_file` decides as for the model, else the folder's name, else it is 3.

    Raises:
        ValueError: for another `eos_token` or `unk_token`, which are the model's own.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        chatglm_version: int | None = None,
        **kwargs,
    ):
        self.vocab_file = vocab_file
        self.tokenizer = SPTokenizer(vocab_file)
        for name, token in OWN_TOKENS.items():
            kwargs[name] = kwargs.get(name) or token
            refuse_other_token(name, kwargs[name])
        kwargs["pad_token"] = kwargs.get("pad_token") or "<unk>"
        # A tokenizer.json beside it, which transformers reads for added tokens, has control tokens and `<sop>` as such.
        added = kwargs.get("added_tokens_decoder", {}).items()
        kwargs["added_tokens_decoder"] = {i: token for i, token in added if i >= self.tokenizer.n_words}
        kwargs.pop("auto_map", None)  # it names the official remote code, which a saved copy must not ask for
        config = Path(vocab_file).with_name("config.json")
        recorded = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        names = kwargs.get("name_or_path"), recorded.get("_name_or_path")
        self.chatglm_version = find_version(chatglm_version or recorded.get("chatglm_version"), *names)
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            chatglm_version=self.chatglm_version,
            **kwargs,
        )
        self.carried_template = self.chat_template  # saved again with the tokenizer, and never applied

    def __setattr__(self, name: str, value) -> None:
        own = name.removesuffix("_id")
        if own in OWN_TOKENS and own != name and value == getattr(self, name):
            return
        if own in OWN_TOKENS:
            refuse_other_token(own, value)
        super().__setattr__(name, value)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_words

    @property
    def all_special_ids(self) -> list[int]:
        return [*super().all_special_ids, *self.tokenizer.special_tokens.values()]

    def get_vocab(self) -> dict[str, int]:
        pieces = self.tokenizer.sp_model
        vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
        return vocab | self.tokenizer.special_tokens | self.added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model")
        target.write_bytes(self.tokenizer.sp_model.serialized_model_proto())
        return (str(target),)

    # Text to ids and back. Only tokens beyond the vocabulary are found in text: control tokens in text are text.

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        loaded = [token for i, token in self._added_tokens_decoder.items() if i >= self.vocab_size]
        for token in (*new_tokens, *loaded):
            if isinstance(token, AddedToken) and (token.lstrip or token.rstrip or token.single_word):
                raise ValueError(f"{token.content!r}: ChatGLM's added tokens have no lstrip, rstrip and single_word")
        count = super()._add_tokens(new_tokens, special_tokens)
        self.tokenizer.add({token: i for token, i in self.added_tokens_encoder.items() if i >= self.vocab_size})
        return count

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self.tokenizer.tokenize(text)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self.tokenizer.convert_token_to_id(token)

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        if isinstance(ids, int):
            return self.tokenizer.convert_id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.tokenizer.convert_id_to_token(i) for i in map(int, ids) if i not in skipped]

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

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        texts = [None if ids is None else [None] * len(ids) for ids in (token_ids_0, token_ids_1)]
        return [int(i is not None) for i in self.build_inputs_with_special_tokens(*texts)]

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
            history: earlier messages, as `messages.to_chatglm3` takes them.

        Returns:
            tensors `input_ids`, `attention_mask` and `position_ids`, each (1, length).
        """
        messages = to_chatglm3([*(history or []), {"role": role, "content": query}])
        return self([self._message_ids(messages, ask=True)], add_special_tokens=False, return_tensors="pt")

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """ChatGLM2 prompt as text: every earlier round with its answer, then the newest question."""
        rounds = [f"{round_prompt(i, asked)}{answer}\n\n" for i, (asked, answer) in enumerate(history or [], 1)]
        return "".join(rounds) + round_prompt(len(rounds) + 1, query)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        tools: list[dict | Callable] | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        **others,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """Encode a conversation, or a list of them, as `build_chat_input` (ChatGLM3) or `build_prompt` (ChatGLM2) does.

        No template is read, neither the one that the tokenizer's folder carries nor another. Control tokens in texts
        are always text, as with `sanitize_control_tokens`. An answer's end is not written, so that a final message can
        be continued as it is.

        Args:
            conversation: messages as `messages.to_chatglm3` takes them; for ChatGLM2 questions and answers in turn.
            tools: functions that are offered (ChatGLM3): OpenAI's descriptions, bare ones, or Python functions with
                types and a docstring. They make a system message before the conversation.
            add_generation_prompt: whether `<|assistant|>` follows. ChatGLM2 asks for the answer with each question.
            tokenize: False for the text, which is to be read: no text encodes to the control tokens.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, or the ids alone without `return_dict`.

        Raises:
            ValueError: something was asked for that ChatGLM's format does not have, such as another template.
        """
        self._refuse_foreign(documents, chat_template, add_generation_prompt, continue_final_message, others)
        conversation = list(conversation)
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        batch = conversation if is_batch else [conversation]
        if not all(batch):
            raise ValueError("the conversation is empty; give at least one message")
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools or ()]
        encode = self._round_ids if self.chatglm_version == 2 else self._message_ids
        ids = [encode(to_chatglm3(messages, tools), bool(add_generation_prompt)) for messages in batch]
        if not tokenize:
            warn_of_text()
            texts = [self.decode(row) for row in ids]
            return texts if is_batch else texts[0]
        encoded = self(
            ids if is_batch else ids[0],
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **tokenizer_kwargs or {},
        )
        return encoded if return_dict else encoded["input_ids"]

    def _refuse_foreign(self, documents, chat_template, add_generation_prompt, continue_final_message, others) -> None:
        """Refuse what was asked of `apply_chat_template` and ChatGLM's format does not have."""
        if self.chat_template != self.carried_template:
            chat_template = chat_template or self.chat_template
        asked = others | {"documents": documents, "chat_template": chat_template}
        if foreign := [name for name, value in asked.items() if value]:
            raise ValueError(f"ChatGLM's format has no {foreign[0]}; leave it out")
        if continue_final_message not in (False, True, "content"):
            raise ValueError(f"continue_final_message is {continue_final_message!r}; only content can be continued")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; give one of them")

    def _message_ids(self, messages: list[Message], ask: bool) -> list[int]:
        ids = [i for message in messages for i in self.build_single_message(*message)]
        return self.get_prefix_tokens() + ids + [self.get_command("<|assistant|>")] * ask

    def _round_ids(self, messages: list[Message], ask: bool) -> list[int]:
        expected = [(("user", "assistant")[i % 2], "") for i in range(len(messages))]
        if [message[:2] for message in messages] != expected:
            raise ValueError("ChatGLM2 has questions and answers in turn, and nothing else; leave the rest out")
        if ask != len(messages) % 2:
            raise ValueError("ChatGLM2 asks with each question: give add_generation_prompt after one, and only there")
        *earlier, question = [text for *_, text in messages[::2]]
        answers = [text for *_, text in messages[1::2]]
        prompt = self.encode(self.build_prompt(question, list(zip(earlier, answers, strict=False))))
        return prompt + [i for answer in answers[len(earlier) :] for i in self.tokenizer.encode(answer)]


@cache
def warn_of_text() -> None:
    logger.warning(
        "apply_chat_template(tokenize=False) gives ChatGLM's prompt to be read. If it is encoded again, its control "
        "tokens become plain text: take the ids of tokenize=True"
    )
