"""Lines that a person writes in a talk: questions, results of calls, and commands, each with its help."""

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..data.tools import bare
from ..run.errors import ArgumentError, DataError
from ..run.log import counted
from .conversation import Talk, read_tools, require_utf8

SETTINGS: dict[str, Callable] = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}


class Command(NamedTuple):
    run: Callable[[Talk, str], str]  # takes what stands behind the command's name; returns what there is to say
    argument: str
    help: str


def enter(talk: Talk, line: str) -> str:
    """Take a line: a command, else the result that a call waits for, else a question. `//` begins one with a slash.

    Returns:
        What there is to say.

    Raises:
        Fault: the line has no place here. The talk is as it was.
        EOFError: the command is to leave.
    """
    require_utf8(line)
    if is_command(line):
        name = line.split()[0]
        return find_command(name).run(talk, line[len(name) :].strip())
    text = line[1:] if line.startswith("//") else line
    if talk.waiting:
        talk.give(text)
    elif text.strip():
        talk.ask(text)
    return ""


def is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def find_command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    nearest = f"did you mean {close[0]}?" if close else "/help lists them."
    raise ArgumentError(f"{name} is no command; {nearest} A message that begins with a slash is written with two")


def show_help(talk: Talk, argument: str) -> str:
    usages = {f"{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    lines = [f"{usage:{width}}  {text}" for usage, text in usages.items()]
    lines += ["Alt-Enter begins a new line. Ctrl-C stops an answer or a command. Tab completes."]
    return "\n".join([*lines, "A message that begins with a slash is written with two."])


def change_tools(talk: Talk, argument: str) -> str:
    if argument == "off":
        talk.offer([])
    elif argument:
        talk.session.require_calls()
        talk.offer(read_tools(file_named(argument)))
    if not talk.tools:
        talk.session.require_calls()
        return "no functions are offered"
    return "\n".join(["functions on offer:", *map(describe_tool, talk.tools)])


def file_named(name: str) -> Path:
    if "\0" in name:
        raise ArgumentError("a file's name has no zero byte; write it anew")
    return Path(os.path.expanduser(name))  # which leaves the ~name of nobody as it is


def describe_tool(tool: dict) -> str:
    function = bare(tool)
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    names = ", ".join(properties) if isinstance(properties, dict) else ""
    return f"  {function['name']}({names})  {function.get('description') or ''}".rstrip()


def change_system(talk: Talk, argument: str) -> str:
    if argument:
        talk.instruct("" if argument == "off" else argument)
    return f"system message: {talk.system}" if talk.system else "there is no system message"


def retry(talk: Talk, argument: str) -> str:
    talk.retry()
    if not talk.sampling.temperature:
        return "temperature is 0: the same answer, unless something else has changed; /set temperature 0.7 varies it"
    if talk.sampling.seed is not None:
        return "the seed is set: the same answer, unless something else has changed; /set seed none varies it"
    return ""


def undo(talk: Talk, argument: str) -> str:
    return f"taken back out: {talk.undo()}"


def clear(talk: Talk, argument: str) -> str:
    talk.clear()
    return "a new conversation; the system message and the functions stay"


def skip(talk: Talk, argument: str) -> str:
    if not talk.waiting:
        raise DataError("no call waits for a result")
    talk.drop()
    return talk.way_back


def save(talk: Talk, argument: str) -> str:
    if not argument:
        raise ArgumentError("/save FILE: the file's name is missing")
    file = file_named(argument)
    said = f"{file} has now {counted(talk.save(file), 'row')}"
    cut = sum(message.get("loss") is False for messages in talk.rounds for message in messages)
    return f"{said}; {counted(cut, 'answer')} cut short will not be learned (loss: false)" if cut else said


def compare(talk: Talk, argument: str) -> str:
    if not talk.session.adapter:
        raise ArgumentError("/compare: there is no adapter, so the base alone answers; start with --adapter")
    talk.compares = not talk.compares
    return (
        "each question is answered by the base, then by the tuned model, whose answer the conversation goes on with"
        if talk.compares
        else "the tuned model alone answers"
    )


def change_setting(talk: Talk, argument: str) -> str:
    if argument:
        name, _, value = argument.partition(" ")
        if name not in SETTINGS:
            raise ArgumentError(f"{name} is no setting; expected one of {', '.join(SETTINGS)}")
        try:
            chosen = None if (name, value) == ("seed", "none") else SETTINGS[name](value)
        except ValueError:
            raise ArgumentError(f"{name} is {value!r}; expected a number") from None
        talk.sampling = replace(talk.sampling, **{name: chosen})
    values = {name: getattr(talk.sampling, name) for name in SETTINGS}
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in values.items())


def leave(talk: Talk, argument: str) -> str:
    raise EOFError


COMMANDS: dict[str, Command] = {
    "/help": Command(show_help, "", "these lines"),
    "/tools": Command(change_tools, "[FILE | off]", "offer a file's functions, or none; alone: list them"),
    "/system": Command(change_system, "[TEXT | off]", "set or remove the system message; alone: show it"),
    "/set": Command(change_setting, "[NAME VALUE]", f"{', '.join(SETTINGS)}; alone: show them"),
    "/retry": Command(retry, "", "answer the last question anew"),
    "/undo": Command(undo, "", "take the last question and its answer back out"),
    "/skip": Command(skip, "", "give a call no result, and take its question back out"),
    "/clear": Command(clear, "", "begin a new conversation"),
    "/compare": Command(compare, "", "have the base answer, too, or no longer"),
    "/save": Command(save, "FILE.jsonl", "add the conversation to a file, as a row for training"),
    "/quit": Command(leave, "", "leave, as Ctrl-D does"),
}
