"""A model with or without its adapter, the prompts that it gets, and the reading of its answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat_templates import control_tokens, set_chat_template
from ..data.conversation import Conversation, Turn, first_rounds_to_leave_out, without_first_rounds
from ..data.dataset import DATA_FORMATS, select_format
from ..data.formats import parse_row
from ..data.prepare import check_tokenizer, require_rows
from ..model import (
    BITS,
    adopt_conversation,
    bits_in_memory,
    check_fits,
    check_same_base,
    load_adapter,
    load_base,
    open_tokenizer,
    read_training,
    sketch_base,
)
from ..run.errors import ArgumentError, DataError
from ..run.log import counted
from ..trust import check_adapter, find_adapter, find_base, identify_base, read_run, require_weights
from .answers import ChatGLM3Reader, TemplateReader, TextReader
from .calls import Answer
from .engine import Engine
from .limits import Limits
from .sampling import GREEDY, Generation, Sampling
from .stream import AnswerStream, Piece

# Conversations whose answers end in every way that the model learns: the last one, and those before a question, a
# result and another answer.
ASKED, ANSWERED = Turn("user", "Hello"), Turn("assistant", "Hello.", learned=True)
CALLED = Turn("tool", name="now", learned=True)
ENDINGS = (
    (ASKED, ANSWERED, ASKED, ANSWERED),
    (ASKED, CALLED),
    (ASKED, replace(CALLED, observation="12", observed=True), ANSWERED),
)


@dataclass
class Session:
    """A model that answers as it was trained to.

    Attributes:
        model: None if the session was opened without weights, for prompts and answers alone.
        base_bits: of the base, 4 or 16.
        adapter: folder of the adapter, if there is one.
        base: folder or hub name of the base.
        dtype, device: of the model; None where it was not opened by name.
    """

    tokenizer: PreTrainedTokenizerBase
    data_format: str
    model: PreTrainedModel | None = None
    base_bits: int = 16
    adapter: Path | None = None
    base: str = ""
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    reader: TextReader = field(init=False, repr=False)

    def __post_init__(self):
        self.render = DATA_FORMATS[self.data_format].render
        check_tokenizer(self.tokenizer, self.render)
        if self.data_format == "chat_template":
            self.reader = TemplateReader(self.tokenizer, self.render)
        else:
            self.reader = (ChatGLM3Reader if self.data_format == "chatglm3" else TextReader)(self.tokenizer)

    @classmethod
    def open(cls, *names, **options) -> "Session":
        """Load a model, and its adapter as it was trained. Arguments and errors are those of `prepare`."""
        return cls.prepare(*names, **options).load()

    @classmethod
    def prepare(
        cls,
        model_name_or_path: str | None = None,
        adapter: str | Path | None = None,
        *,
        base_bits: int | None = None,
        data_format: str | None = None,
        chat_template: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Session":
        """Open a model, and its adapter as it was trained: on the same bits of the base, with the same prompts. No
        weight is loaded: `load` does so.

        Args:
            model_name_or_path: the base; by default the folder that the adapter's settings name.
            adapter: an adapter's folder or hub name.
            base_bits: 4 or 16; by default those of the adapter's training, and 16 where nothing records them.
            data_format, chat_template: as in the settings of a run; by default those of the adapter's training.
            dtype: by default bfloat16 on a card (float16 where it has none), and on a CPU that of the training.
            device: by default the card, if there is one.

        Raises:
            ArgumentError, DataError: there is no such model, the adapter is damaged or belongs to another base, or the
                model has no prompts of this format.
        """
        if base_bits not in (None, *BITS):
            raise ArgumentError(f"base_bits is {base_bits!r}; expected 4 or 16")
        if not model_name_or_path and not adapter:
            raise ArgumentError("there is neither a model nor an adapter to open; name one")
        folder = find_adapter(str(adapter)) if adapter else None
        config = check_adapter(folder) if folder else {}
        base = model_name_or_path or find_base(folder, config)
        run = read_run(folder) if folder else {}
        tokenizer = open_tokenizer(base)
        require_weights(base)
        if folder:
            check_same_base(folder, config["base_model_name_or_path"], base, identify_base(base), run)
            check_fits(folder, sketch_base(base))
            adopt_conversation(tokenizer, folder)
        if chat_template:
            set_chat_template(tokenizer, chat_template)
        data_format = choose_format(base, tokenizer, data_format, chat_template, run)
        trained_bits, trained_dtype = read_training(folder) if folder else (None, None)
        bits = choose_bits(base_bits, folder, trained_bits)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or choose_dtype(device, trained_dtype)
        return cls(tokenizer, data_format, None, bits, folder, base, dtype, device)

    def load(self) -> "Session":
        """Load the weights of the model, and those of its adapter. Returns this session."""
        bits = bits_in_memory(self.base_bits, self.dtype)
        logger.info(f"loading {self.base} in {bits} bits on {self.device}")
        model = load_base(self.base, self.base_bits, self.dtype, self.device)
        self.model = (load_adapter(model, self.adapter) if self.adapter else model).eval()
        return self

    # Prompts

    def conversation(self, messages: list[dict], tools: Any = None) -> Conversation:
        """Read messages of OpenAI's shape or of ChatGLM3's rows, as strictly as training reads a row.

        Raises:
            DataError: naming the message and its field, or there is nothing to answer.
        """
        own = isinstance(messages, list) and any(isinstance(message, dict) and is_own(message) for message in messages)
        row = {"conversations" if own else "messages": messages}
        conversation = parse_row(row if tools is None else row | {"tools": tools})
        require_question(conversation)
        return conversation

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids that a training row has before the first token that the model learns of the next answer.

        Raises:
            DataError: training would refuse the conversation.
        """
        turns = [replace(turn, learned=False) for turn in conversation.turns]
        answered = replace(conversation, turns=(*turns, ANSWERED))
        sample = self.render(answered, self.tokenizer)
        ids = sample.input_ids[: sample.target_mask.index(1)]
        require_rows(ids, self.tokenizer)
        return ids

    def fit(self, conversation: Conversation, room: int) -> tuple[Conversation, int]:
        """Leave out as few first rounds as possible for the prompt to have at most `room` tokens. System turns and
        tools stay.

        Returns:
            (what stays, how many rounds were left out).

        Raises:
            DataError: the last round alone is too long.
        """

        def fits(rest: Conversation) -> bool:
            return len(self.prompt(rest)) <= room

        if fits(conversation):
            return conversation, 0
        gone = first_rounds_to_leave_out(conversation, fits)
        rest = without_first_rounds(conversation, gone)
        if not fits(rest):
            raise DataError(
                f"the last round has a prompt of {len(self.prompt(rest)):,} tokens, and there is room for {room:,}; "
                "shorten it, its system message or its tools"
            )
        logger.warning(f"the context is full: {counted(gone, 'early round')} left out of the prompt")
        return rest, gone

    # Answers

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer ends: those that the model learns to end on, EOS, and with a chat template the
        control tokens of its generation_config.json."""
        stops = {self.tokenizer.eos_token_id}
        if self.data_format == "chat_template":
            stops |= {*getattr(self.tokenizer, "stops", ())} & {*control_tokens(self.tokenizer).values()}
        for turns in ENDINGS:
            for tools in ([{"name": "now", "parameters": {"type": "object", "properties": {}}}], None):
                with suppress(DataError):
                    sample = self.render(Conversation(turns, tools), self.tokenizer)
                    mask = [*sample.target_mask, 0]
                    stops |= {token for i, token in enumerate(sample.input_ids) if mask[i] and not mask[i + 1]}
        return frozenset(stops)

    def read(self, ids: Sequence[int], finish_reason: str = "stop", tools: Any = None) -> Answer:
        """Read the tokens of an answer, with or without the one that ended it.

        Args:
            finish_reason: `length` if the answer was cut short.
            tools: those that were offered; they decide whether `3` is text or a number where a template writes both
                alike.
        """
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.reader.read(ids, tools, finish_reason == "length")

    # Conversations

    @cached_property
    def engine(self) -> Engine:
        return self.open_engine()

    def open_engine(self, max_batch: int = 64, max_tokens: int | None = None) -> Engine:
        """Make the engine of this session. Without it, the first answer does so. An engine that is there is given up.

        Args:
            max_batch, max_tokens: as Engine takes them.

        Raises:
            ArgumentError: as Engine does.
        """
        self.__dict__.pop("engine", None)  # else its memory is taken while the other one is made
        vocab = max(len(self.reader.bytes), *(token + 1 for token in self.stop_ids))
        self.engine = Engine(self.model, self.stop_ids, max_batch=max_batch, max_tokens=max_tokens, vocab=vocab)
        return self.engine

    @cached_property
    def limits(self) -> Limits:
        return Limits(partial(learned_tokens, self.render, self.tokenizer), self.reader)

    def must_call(self, sampling: Sampling, names: Sequence[str], tools: Any) -> Sampling:
        """What makes an answer begin with a call of one of these functions, as training would write it.

        Raises:
            DataError: a function is not offered, or answers of this model have no calls.
        """
        self.require_calls()
        return replace(sampling, begins=self.limits.calling(names, tools))

    def must_not_call(self, sampling: Sampling, tools: Any) -> Sampling:
        """What makes an answer have no call.

        Raises:
            DataError: the model's format has no mark by which that could be told.
        """
        limits = self.limits.without_calls
        return replace(
            sampling,
            begins=limits.begins,
            banned=sampling.banned | limits.banned,
            not_first=sampling.not_first | limits.not_first,
            unwritten=sampling.unwritten + limits.unwritten,
        )

    def ask(self, messages: list[dict], tools: Any = None, sampling: Sampling = GREEDY, adapted: bool = True) -> Answer:
        """Answer messages as `conversation` takes them. Early rounds for which the context has no room are left out.

        Args:
            adapted: False to leave the adapter out.

        Raises:
            DataError: training would refuse the messages, or the last round is too long.
        """
        reply = self.reply(messages, tools, sampling, adapted)
        for _ in reply:
            pass
        return reply.answer

    def reply(
        self, messages: list[dict], tools: Any = None, sampling: Sampling = GREEDY, adapted: bool = True
    ) -> "Reply":
        """Answer as `ask` does, piece by piece: the Reply yields what each token adds."""
        room = max(self.engine.room - sampling.max_new_tokens, self.engine.room // 2)
        conversation, left_out = self.fit(self.conversation(messages, tools), room)
        return Reply(self, self.prompt(conversation), sampling, adapted, conversation.tools, left_out)

    def answer_stream(self, tools: Any = None) -> AnswerStream:
        """What turns the tokens of an answer into pieces. `tools`: those that were offered."""
        return AnswerStream(self.reader, tools)

    def require_calls(self) -> None:
        """Raise DataError, which says why, where answers of this model are text alone."""
        if self.reader.no_calls:
            raise DataError(f"data_format {self.data_format}: {self.reader.no_calls}")


class Reply:
    """An answer that is written while it is iterated, once. An iteration that is left cancels the rest.

    Attributes:
        generation: its tokens so far, and how it ended; None before the iteration begins.
        left_out: rounds for which the context had no room.
        answer: the whole answer, once it has ended.
    """

    def __init__(
        self, session: Session, prompt: list[int], sampling: Sampling, adapted: bool, tools: Any, left_out: int
    ):
        self.session, self.asked, self.tools, self.left_out = session, (prompt, sampling, adapted), tools, left_out
        self.generation: Generation | None = None

    def __iter__(self) -> Iterator[Piece]:
        engine, growing, done = self.session.engine, self.session.answer_stream(self.tools), 0
        self.generation = generation = engine.submit(*self.asked)
        try:
            while generation.finish_reason is None:
                engine.step()
                for token in generation.tokens[done:]:
                    yield from growing.add(token)
                done = len(generation.tokens)
            yield from growing.end()
        finally:
            engine.cancel(generation)

    @property
    def answer(self) -> Answer:
        return self.session.read(self.generation.tokens, self.generation.finish_reason or "length", self.tools)


def learned_tokens(render: Callable, tokenizer, turns: Sequence[Turn], tools: Any) -> list[int]:
    """The tokens of a row's answer that training teaches, its end too."""
    sample = render(Conversation(tuple(turns), tools), tokenizer)
    mask = [*sample.target_mask, 0]
    start = mask.index(1)
    return sample.input_ids[start : mask.index(0, start)]


def is_own(message: dict) -> bool:
    """Whether a message has the shape of ChatGLM3's rows: a call and its result in one turn."""
    return message.get("role") == "tool" and "parameters" in message


def require_question(conversation: Conversation) -> None:
    """Raise DataError where there is nothing to answer."""
    if not conversation.turns:
        raise DataError("messages: there is none; give a question")
    last = conversation.turns[-1]
    if last.role == "assistant":
        raise DataError("messages: end on an answer; let them end on a question or on the result of a call")
    for turn in reversed(conversation.turns):
        if turn.role == "tool" and not turn.observed:
            raise DataError(f"messages: end on a call of {turn.name!r} without its result; add that")
        if not turn.joined:
            break


def choose_format(base: str, tokenizer, data_format: str | None, chat_template: str | None, run: dict) -> str:
    """The format of the prompts: what is asked for, else that of training, else what the model's files tell."""
    trained = run["format"].get("name") if isinstance(run.get("format"), dict) else None
    if trained and data_format and data_format != trained:
        logger.warning(f"the adapter was trained with data_format {trained}, and its prompts are now {data_format}'s")
    named = data_format or (None if chat_template else trained)
    chosen = select_format(base, named, chat_template)[0]
    if named or chosen != "firefly" or not tokenizer.chat_template:
        return chosen
    logger.info(f"data_format chat_template: {base} has a chat template of its own")
    return "chat_template"


def choose_bits(asked: int | None, folder: Path | None, trained: int | None) -> int:
    """Bits of the base: those that are asked for, else those of training; 16 where nothing tells them."""
    if folder and not trained and not asked:
        logger.info(f"{folder} does not record how its base was loaded: it is loaded in 16 bits (base_bits: 4 or 16)")
    if trained and asked and asked != trained:
        logger.warning(f"{folder} was trained on a base in {trained} bits, and this one has {asked}: another model")
    return asked or trained or 16


def choose_dtype(device: torch.device, trained: torch.dtype | None) -> torch.dtype:
    """bfloat16 on a card, float16 where it has none; on a CPU what training computed in, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return trained or torch.float32
