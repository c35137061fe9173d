"""A talk with a model: questions, calls and their results, answers, and what is offered. Knows nothing of terminals."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..data.conversation import Conversation
from ..data.fields import parse_tools
from ..data.formats import parse_row
from ..data.reader import SUFFIXES, load_json, read_lines, read_rows
from ..data.tools import wrap_tools
from ..inference.calls import Answer, to_message
from ..inference.sampling import GREEDY, Generation, Sampling
from ..inference.session import Reply, Session
from ..inference.stream import Piece
from ..run.errors import DataError, Fault, unusable

Message = dict[str, Any]
QUESTION: Message = {"role": "user", "content": "?"}  # to try whether one could be asked
TOOLS_LIMIT = 4 << 20  # bytes of JSON, more than the functions of any prompt


@dataclass
class Talk:
    """A talk with a model, in rounds: a question, calls with their results, and the answer.

    A round becomes part of the talk with its answer. Until then, whatever goes wrong leaves the talk as it was before
    the question.

    Attributes:
        compares: whether the base answers, too, before the tuned model.
        rounds: messages of OpenAI's shape, by round.
        question: the last one, which `retry` asks again.
        before: the rounds before it.
        current: messages of the round that has no answer yet.
        waiting: its calls that have no result yet.
        reply: the last answer, also while it is being written.
        stopped: whether the last answer was asked to end.
    """

    session: Session
    sampling: Sampling = GREEDY
    system: str = ""
    tools: list[dict] = field(default_factory=list)
    compares: bool = False
    rounds: list[list[Message]] = field(default_factory=list)
    question: str = ""
    before: list[list[Message]] = field(default_factory=list)
    current: list[Message] = field(default_factory=list)
    waiting: list[dict] = field(default_factory=list)
    reply: Reply | None = None
    stopped: bool = False

    # What is offered

    def offer(self, tools: list[dict]) -> None:
        """Offer other functions. Raises DataError, and changes nothing, where the model or the talk has no place."""
        if tools:
            self.session.require_calls()
        self.require_prompt([*messages_of(self.rounds, self.system), QUESTION], tools)
        self.tools = tools

    def instruct(self, system: str) -> None:
        """Have another system message. Raises DataError, and changes nothing, where the model has no place for it."""
        require_utf8(system)
        self.require_prompt([*messages_of(self.rounds, system), QUESTION], self.tools)
        self.system = system

    def require_prompt(self, messages: list[Message], tools: list[dict]) -> Conversation:
        """Read messages as the next prompt has them. Raises DataError where they cannot be asked."""
        conversation = self.session.conversation(messages, tools or None)
        self.session.prompt(conversation)
        return conversation

    # Questions and answers

    @property
    def is_due(self) -> bool:
        """Whether the model is to write next: an answer, or what it makes of the results of its calls."""
        return bool(self.current) and not self.waiting

    def ask(self, question: str) -> None:
        self.before, self.question = self.rounds, question
        self.retry()

    def retry(self) -> None:
        """Ask the last question again; its answer takes the place of the last one."""
        if not self.question:
            raise DataError("there is no question to ask again; write one")
        self.current, self.waiting = [{"role": "user", "content": self.question}], []

    def answer(self, adapted: bool = True) -> Iterator[Piece]:
        """Write what is due, piece by piece. It becomes part of the talk, unless it is the base's (`adapted` False).

        Raises:
            Fault: the question cannot be asked, or its answer cannot stay. The talk is as it was before the question.
        """
        written: list[Piece] = []
        self.reply, self.stopped = None, False
        try:
            messages = [*messages_of(self.before, self.system), *self.current]
            reply = self.session.reply(messages, self.tools or None, self.sampling, adapted)
            if self.stopped:  # while the prompt was written
                raise DataError(f"stopped before the answer began; {self.way_back}")
            self.reply = reply
            for piece in self.reply:
                if self.reply.generation.finish_reason == "cancelled":
                    break
                written.append(piece)
                yield piece
            if adapted:
                self.take(written)
        except Fault:
            self.drop()
            raise

    def stop(self) -> None:
        """End the answer that is being written. A signal's handler may call this at any moment, and so it leaves the
        engine alone, which then drops the answer at its next step."""
        self.stopped = True
        generation = self.reply and self.reply.generation
        if generation and generation.finish_reason is None:
            generation.finish_reason = "cancelled"

    def take(self, written: list[Piece]) -> None:
        """Make an answer part of the talk. One that was cut short stays as far as it was written, and training is told
        to pass over it. Raises DataError where it cannot stay."""
        cut = cut_reason(self.reply.generation)
        is_stopped = self.reply.generation.finish_reason == "cancelled"
        answer = stopped_answer(written) if is_stopped else self.reply.answer
        if cut and (answer.calls or answer.fault):
            raise DataError(f"the answer ends within a call, {cut}; {self.way_back}")
        if cut and not answer.text:
            raise DataError(f"the answer ends before its text begins, {cut}; {self.way_back}")
        if answer.fault:
            raise DataError(f"the answer has a call that cannot be read; {self.way_back}")
        self.current.append(to_message(answer) | ({"loss": False} if cut else {}))
        self.waiting = list(self.current[-1].get("tool_calls", ()))
        try:
            self.require_readable()
        except DataError as error:
            raise DataError(f"the answer cannot stay ({error}); {self.way_back}") from None
        if not self.waiting:
            self.rounds, self.current = [*self.before, self.current], []

    def require_readable(self) -> None:
        """Raise DataError where the talk could not go on after its last answer, or would have it as another one."""
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "?"} for call in self.waiting]
        messages = [*messages_of([*self.before, self.current], self.system), *(results or [QUESTION])]
        conversation = self.require_prompt(messages, self.tools)
        if not results and conversation.turns[-2].role == "tool":
            raise DataError("it is a text that is read as a call")

    @property
    def way_back(self) -> str:
        """What becomes of a question whose new answer cannot stay."""
        is_answered = len(self.before) < len(self.rounds)
        return (
            f"{'its earlier answer stays' if is_answered else 'the question is taken back out'}; /retry asks it again"
        )

    def give(self, result: str) -> None:
        """Give the first waiting call its result."""
        if not result.strip():
            raise DataError(f"{self.waiting[0]['function']['name']} has an empty result; write one, or /skip the call")
        self.current.append({"role": "tool", "tool_call_id": self.waiting.pop(0)["id"], "content": result})

    def drop(self) -> None:
        """Go back to before the question that has no answer yet."""
        self.current, self.waiting = [], []

    def undo(self) -> str:
        """Take the last question back out, with its answer if it has one. Returns it."""
        if not self.current and not self.rounds:
            raise DataError("there is no question to take back")
        question = self.question if self.current else self.rounds[-1][0]["content"]
        self.rounds = self.before if self.current else self.rounds[:-1]
        self.drop()
        self.before = self.rounds[:-1]
        self.question = self.rounds[-1][0]["content"] if self.rounds else ""
        return question

    def clear(self) -> None:
        """Forget all rounds. The system message and the functions stay."""
        self.drop()
        self.rounds, self.before, self.question = [], [], ""

    # Rows of training

    def row(self) -> dict:
        """The talk as a row of training, in OpenAI's shape."""
        return ({"tools": self.tools} if self.tools else {}) | {"messages": messages_of(self.rounds, self.system)}

    def save(self, file: Path) -> int:
        """Add the talk to a file of rows. Returns how many it then has. Raises DataError, and adds nothing, where that
        is no such file or training would refuse the row."""
        if self.current:
            raise DataError(f"nothing is added to {file}: the last question has no answer yet; /skip takes it back out")
        if not self.rounds:
            raise DataError(f"nothing is added to {file}: there is no question with an answer yet")
        if file.suffix != ".jsonl":
            raise DataError(f"{file}: rows are added to files of lines alone; let the name end with .jsonl")
        row = self.row()
        parse_row(row)
        try:
            require_regular(file)
            if not file.parent.is_dir():
                raise DataError(f"{file}: there is no folder {file.parent}; make it, or choose another")
            before = sum(1 for _ in read_lines(file)) if file.exists() else 0
            add_line(file, json.dumps(row, ensure_ascii=False))
        except OSError as error:
            raise unusable(f"{file}: could not be written ({error}); choose another name", error) from None
        return before + 1


def messages_of(rounds: list[list[Message]], system: str) -> list[Message]:
    """All messages of these rounds, after the system message, if there is one."""
    beginning = [{"role": "system", "content": system}] if system else []
    return beginning + [message for messages in rounds for message in messages]


def require_utf8(text: str) -> None:
    """Raise DataError for a text with bytes that the terminal, the pipe or the command line could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start + 1} of the text is not UTF-8; nothing of it is used") from None


def cut_reason(generation: Generation) -> str:
    """Why an answer was cut short, and what to do; empty where it has its end."""
    limit = generation.sampling.max_new_tokens
    reasons = {"stop": "", "cancelled": "stopped", "length": "cut short as the context is full: /clear empties it"}
    if generation.finish_reason == "length" and len(generation.tokens) >= limit:
        return f"cut short by max_new_tokens {limit}: /set max_new_tokens {2 * limit} raises it"
    return reasons[generation.finish_reason]


def stopped_answer(written: list[Piece]) -> Answer:
    """What an answer is by the pieces of it that were written. A call that was begun is a fault."""
    text, reasoning = ("".join(p.text for p in written if p.kind == kind) for kind in ("text", "reasoning"))
    has_call = any(piece.kind == "name" for piece in written)
    return Answer(text, reasoning=reasoning, fault="truncated" if has_call else "")


def add_line(file: Path, line: str) -> None:
    """Write a line at the end of a file, whole or not at all."""
    with open(file, "a+b", buffering=0) as out:
        end = out.seek(0, os.SEEK_END)
        if end:
            out.seek(end - 1)
            line = line if out.read(1) == b"\n" else f"\n{line}"
        data = f"{line}\n".encode()
        try:
            if out.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(out.fileno())
        except BaseException:  # Ctrl-C, too
            out.truncate(end)
            raise


def read_tools(file: Path) -> list[dict]:
    """Read functions, as OpenAI wraps them, from a list of them, bare or wrapped, from one function, from a row of data
    or, in .jsonl, .parquet and their like, from the first row that has some. Raises DataError where there is none."""
    require_regular(file)
    try:
        with open(file, "rb") as stream:
            has_rows = file.suffix != ".json" and file.name.endswith(SUFFIXES)
            value = first_with_tools(file) if has_rows else read_json(stream)
        if isinstance(value, dict):
            value = value.get("tools", [value])
        if tools := wrap_tools(parse_tools(value, "tools")):
            return tools
    except OSError as error:
        raise DataError(f"{file}: could not be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    raise DataError(f"{file}: no functions with names; give a list of them, one function, or a row with tools")


def require_regular(file: Path) -> None:
    """Raise DataError for a folder, and for a pipe or a device, which may keep its reader for ever."""
    if file.exists() and not file.is_file():
        raise DataError(f"{file}: is no file but a folder, a pipe or a device; give a file")


def read_json(stream: BinaryIO) -> Any:
    data = stream.read(TOOLS_LIMIT + 1)
    if len(data) > TOOLS_LIMIT:
        raise DataError(f"is longer than {TOOLS_LIMIT >> 20} MiB; give functions alone, or rows as .jsonl")
    return load_json(data.decode())


def first_with_tools(file: Path) -> dict | None:
    for _, row in read_rows(file):
        if isinstance(row, DataError):
            raise row
        if row.get("tools"):
            return row
    return None
