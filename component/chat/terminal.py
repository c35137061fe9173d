"""A talk on a terminal, or through pipes."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from loguru import logger
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from ..inference.stream import Piece
from ..run.errors import Fault
from ..run.log import counted, harmless
from .commands import COMMANDS, SETTINGS, enter, is_command
from .conversation import Talk, cut_reason

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Front:
    """Writes what a model answers, piece by piece; a call on a line of its own: `→ name {"argument": value}`."""

    kinds: tuple[str, ...] = ("text", "name", "arguments")  # of pieces that are written

    def __init__(self, talk: Talk, out: TextIO):
        self.talk, self.out = talk, out

    def answer(self) -> None:
        """Write what is due; the base's answer first, if the talk compares. Raises Fault as Talk.answer does."""
        for adapted in (False, True) if self.talk.compares else (True,):
            if self.talk.compares:
                self.write_line("tuned:" if adapted else "base:")
            began = time.monotonic()
            self.write(piece for piece in self.talk.answer(adapted) if piece.kind in self.kinds)
            self.remark(time.monotonic() - began, adapted)

    def write(self, pieces: Iterator[Piece]) -> None:
        last = ""
        try:
            for kind, text, _ in pieces:
                if last and kind not in (last, "arguments"):
                    self.out.write("\n")
                shown = harmless(f"→ {text} " if kind == "name" else text)
                self.out.write(f"{DIM}{shown}{PLAIN}" if kind == "reasoning" else shown)
                self.out.flush()
                last = kind
        finally:
            if self.talk.reply:  # the question could be asked
                self.write_line()

    def write_line(self, text: str = "") -> None:
        self.out.write(f"{harmless(text)}\n")
        self.out.flush()

    def remark(self, seconds: float, adapted: bool) -> None:
        """Tell how an answer, of the tuned model or the base, went."""
        if cut := cut_reason(self.talk.reply.generation):
            logger.warning(cut)


class Pipes(Front):
    """A talk of lines, each a question, the result of a call, or a command. Answers alone are written to `out`, without
    reasoning; all else is logged."""

    def __init__(self, talk: Talk, lines: Iterable[bytes], out: TextIO):
        super().__init__(talk, out)
        self.lines = lines

    def run(self) -> None:
        """Answer until there are no more lines, or one of them is to leave.

        Raises:
            Fault: naming the first line that cannot be used, or whose answer cannot; those behind it may build upon it.
        """
        for number, raw in enumerate(self.lines, 1):
            try:
                if said := enter(self.talk, raw.decode(errors="surrogateescape").rstrip("\r\n")):
                    logger.info(said)
                if self.talk.is_due:
                    self.answer()
            except EOFError:
                return
            except Fault as error:
                raise type(error)(f"line {number}: {error}") from None
            if self.talk.waiting:
                logger.info(f"line {number + 1} is the result of {self.talk.waiting[0]['function']['name']}")


class Terminal(Front):
    """A talk of a person, who edits lines, sees answers grow, and stops them by Ctrl-C."""

    kinds = ("reasoning", *Front.kinds)

    def __init__(self, talk: Talk, out: TextIO):
        super().__init__(talk, out)
        self.is_entering = False  # a line is being taken: a command may be at work
        self.knows_skip = False  # the person was told of it
        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self.lines: PromptSession[str] = PromptSession(
            history=open_history(self.is_question),
            completer=LineCompleter(),
            complete_while_typing=False,
            key_bindings=keys,
        )

    def run(self) -> None:
        """Talk until the person leaves. From here on, SIGINT stops an answer or a command, and not the program."""
        signal.signal(signal.SIGINT, self.interrupt)
        with suppress(EOFError):
            while True:
                try:
                    if said := self.enter(self.read()):
                        self.write_line(said)
                    if self.talk.is_due:
                        self.answer()
                except Fault as error:
                    self.write_line(f"error: {error}")
                except KeyboardInterrupt:
                    self.write_line("stopped; the command has changed nothing")

    def interrupt(self, signum: int, frame) -> None:
        """End what is at work: a command at once, as it may be waiting for a disk, and an answer at its next step."""
        if self.is_entering:
            raise KeyboardInterrupt
        self.talk.stop()

    def enter(self, line: str) -> str:
        self.is_entering = True
        try:
            return enter(self.talk, line)
        finally:
            self.is_entering = False

    def is_question(self, line: str) -> bool:
        """Whether a line is a question, and no command or result of a call."""
        return not (self.talk.waiting or is_command(line))

    def read(self) -> str:
        """The next line, or several that were pasted or written with Alt-Enter. Raises EOFError for Ctrl-D."""
        waiting = self.talk.waiting
        prompt = f"result of {harmless(waiting[0]['function']['name'])}" if waiting else ""
        if len(waiting) > 1:
            prompt += f" ({counted(len(waiting) - 1, 'more call')} waiting)"
        if waiting and not self.knows_skip:
            self.knows_skip = True
            self.write_line("the model waits for the result of its call: write it, or /skip to take your question back")
        while True:
            try:
                return self.lines.prompt(f"{prompt}> ")
            except KeyboardInterrupt:
                if not self.lines.default_buffer.text:
                    self.write_line(f"{'/skip leaves the call, ' if waiting else ''}Ctrl-D or /quit leaves the program")

    def remark(self, seconds: float, adapted: bool) -> None:
        generation = self.talk.reply.generation
        count = len(generation.tokens)
        texts = [counted(count, "token"), f"{count / max(seconds, 1e-9):.1f} tokens/s"]
        if cut := cut_reason(generation):
            texts += [cut] + ["what was written stays, and is not learned if it is saved"] * adapted
        self.out.write(f"{DIM}{'; '.join(texts)}{PLAIN}\n")
        self.out.flush()


class LineCompleter(Completer):
    """Completes commands, names of files and names of settings."""

    def get_completions(self, document: Document, event) -> Iterator[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        if name in ("/tools", "/save") and space:
            yield from PathCompleter(expanduser=True).get_completions(Document(argument), event)
            return
        written, known = (argument, SETTINGS) if name == "/set" and space else (name + space, COMMANDS)
        yield from (Completion(one, -len(written)) for one in known if written and one.startswith(written))


class PrivateHistory(FileHistory):
    """Questions of earlier talks, in a file that the user alone can read. A full disk ends no talk. Other lines are
    remembered in this talk alone, since results of calls may be private."""

    def __init__(self, file: Path, is_question: Callable[[str], bool]):
        super().__init__(file)
        self.is_question = is_question

    def store_string(self, string: str) -> None:
        if self.is_question(string):
            with suppress(OSError):
                super().store_string(string)


def open_history(is_question: Callable[[str], bool]) -> History:
    """Questions of earlier talks, for the arrow keys: in $XDG_STATE_HOME/luciole/chat_history, since the same ones are
    asked after each training; in memory alone where that cannot be written."""
    try:
        file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "luciole", "chat_history")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.info(f"lines are remembered until the end of this talk alone: {error}")
        return InMemoryHistory()
    return PrivateHistory(file, is_question)


def talk_through(talk: Talk) -> None:
    """Talk on the terminal, if standard input and output are one, else line by line through pipes."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        logger.info("write a question; /help lists commands, Ctrl-D leaves")
        Terminal(talk, sys.stdout).run()
    else:
        Pipes(talk, sys.stdin.buffer, sys.stdout).run()
