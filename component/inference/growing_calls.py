"""Reads the calls of an answer while it grows, in each Form of `calls.py`: names and arguments are told early."""

import re
from contextlib import suppress
from typing import Any

from .calls import (
    DECODER,
    BraceForm,
    Call,
    KeywordForm,
    NamedForm,
    ObjectForm,
    PythonForm,
    Syntax,
    TaggedForm,
    Unreadable,
    find_name,
    plain_value,
    require_json,
    types_of,
)
from .growing import Reading, Waiting

FUNCTION = re.compile(r"\s*([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\(", re.ASCII)


def follow_syntax(reading: Reading, syntax: Syntax, tools: Any) -> Waiting:
    """Tell the text and the calls of an answer, as `Syntax.read` finds them."""
    marker = (syntax.opens if syntax.is_marked else syntax.joint)[:1]
    if syntax.is_marked or not (yield from begins_with_call(reading, syntax)):
        yield from reading.speak("text", *marker)
    while reading.text:
        yield from (follow_list if isinstance(syntax.form, PythonForm) else follow_group)(reading, syntax, tools)
        reading.told.parts["text"].end()
        yield from reading.speak("text", *marker)


def begins_with_call(reading: Reading, syntax: Syntax) -> Waiting:
    """Whether an answer begins with a call that has no marker."""
    try:
        at = yield from reading.skip(0, syntax.opens)
        yield from reading.letter(at)
    except Unreadable:
        return False
    while not syntax.form.begins(reading.text, at, False):
        if reading.ended or not syntax.form.begins(reading.text, at, True):
            return False
        yield
    return True


def begin_group(reading: Reading, syntax: Syntax) -> Waiting:
    """The place of the first of the calls that stand together."""
    is_joined = syntax.joint and reading.text.startswith(syntax.joint[0])
    at = yield from reading.skip(0, syntax.joint if is_joined else ())
    return (yield from reading.skip(at, syntax.opens))


def follow_group(reading: Reading, syntax: Syntax, tools: Any) -> Waiting:
    """Tell the calls that stand together."""
    at = yield from begin_group(reading, syntax)
    while True:
        call, end = yield from FOLLOW[type(syntax.form)](reading, syntax.form, at, tools)
        require_json([call])
        try:
            closed = yield from reading.skip(end, syntax.closes)
            reading.told.end_call(call)
            reading.untold = closed
        except Unreadable:
            closed = None
        try:
            at = yield from reading.skip(end, syntax.between or ("\0",))
        except Unreadable:
            if closed is None:
                raise
            reading.drop(closed)
            return
        if closed is None:
            reading.told.end_call(call)
            reading.untold = end


def follow_list(reading: Reading, syntax: Syntax, tools: Any) -> Waiting:
    """Tell the calls of a list in Python."""
    start = at = yield from begin_group(reading, syntax)
    before, scan = reading.told.complete, scan_list(reading, start)
    marker = syntax.closes[0]
    while (end := reading.text.find(marker, at)) < 0:
        at = max(start, len(reading.text) - len(marker) + 1)
        if not reading.ended:
            next(scan, None)
        yield from reading.more()
    calls = syntax.form.read_all(reading.text[start:end])
    require_json(calls)
    end = yield from reading.skip(end, syntax.closes)
    for call in calls[reading.told.complete - before :]:
        reading.told.end_call(call)
    reading.drop(end)


def scan_list(reading: Reading, at: int) -> Waiting:
    """Tell what is certain of a list of Python calls before it is whole."""

    def read(code: str) -> Call:
        return PythonForm().read_all(f"[{code}]")[0]

    at = yield from reading.skip(at, ("[",))
    while True:
        opened = yield from reading.find("(", at=at)
        function = FUNCTION.match(reading.text, at)
        if not function or function.end() != opened + 1:
            return
        reading.name(function[1], opened)
        stop = yield from reading.keywords(opened + 1, read)
        if stop is None:
            return
        at = yield from reading.letter(stop + 1)
        if reading.text[at] not in ",]":
            return
        reading.told.end_call(Call(function[1], {}))
        reading.untold = at
        if reading.text[at] == "]":
            return
        at += 1


# Each waits until a call of its form is whole, tells what is certain before, and returns what `Form.read` does.


def follow_object(reading: Reading, form: ObjectForm, at: int, tools: Any) -> Waiting:
    start = yield from reading.letter(at)
    if reading.text[start] != "{":
        raise Unreadable("there is no JSON object")
    if not form.as_text:
        yield from follow_keys(reading, form, start + 1)
    yield from reading.json_nest(start)
    return form.read(reading.text, start)


def follow_keys(reading: Reading, form: ObjectForm, at: int) -> Waiting:
    """Tell the arguments of a call that has its name before them."""
    name = None
    while True:
        at = yield from reading.letter(at)
        if reading.text[at] != '"':
            return
        end = yield from reading.string('"', at + 1)
        key, _ = DECODER.raw_decode(reading.text, at)
        at = yield from reading.skip(end, (":",))
        at = yield from reading.letter(at)
        if key == form.arguments and name and reading.text[at] == "{":
            reading.name(name, at)
            yield from reading.json_nest(at, told=True)
        if key == form.arguments or key not in {form.name, *form.others}:
            return
        end = yield from reading.json_value(at)
        if key == form.name:
            name, _ = DECODER.raw_decode(reading.text, at)
            if not isinstance(name, str) or not name.strip():
                return
        at = yield from reading.skip(end, (",",))


def follow_name(reading: Reading, at: int, ends: tuple[str, ...]) -> Waiting:
    """A function's name and where it ends, as `find_name` finds them."""
    start = yield from reading.letter(at)
    yield from reading.find("\n", *ends, at=start)
    return find_name(reading.text, start, ends)


def follow_named(reading: Reading, form: NamedForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.between[:1] or ("{",))
    brace = yield from reading.skip(end, (*form.between, "{"))
    reading.name(name, brace - 1)
    yield from reading.json_nest(brace - 1, told=True)
    return form.read(reading.text, at)


def follow_keywords(reading: Reading, form: KeywordForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.between[:1] or ("(",))
    line = yield from reading.skip(end, form.between)
    opened = yield from reading.letter(line)
    if reading.text[opened] == "(" and "\n" not in reading.text[line:opened]:
        reading.name(name, end)
        yield from reading.keywords(opened + 1, lambda code: PythonForm().read_all(f"[{code}]")[0])
    with suppress(Unreadable):  # the last line may have no end
        yield from reading.find("\n", at=line)
    return form.read(reading.text, at)


def follow_tagged(reading: Reading, form: TaggedForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.head[:1] or form.opens[:1] + form.ends)
    place, first = (yield from reading.skip(end, form.head)), True
    while True:
        place = yield from reading.letter(place)
        if not (yield from reading.stands(place, form.opens[0])):
            return form.read(reading.text, at, tools)
        if first:
            reading.name(name, end)
            first = False
        place = yield from reading.skip(place, form.opens)
        stop = yield from reading.find(form.middle[0], at=place)
        key = reading.text[place:stop].strip()
        place = yield from reading.skip(stop, form.middle)
        stop = yield from reading.find(form.closes[0], at=place)
        written = reading.text[place:stop].removeprefix(form.before).removesuffix(form.after)
        arguments = {key: plain_value(written, types_of(tools, name, key))}
        place = yield from reading.skip(stop, form.closes)
        require_json([Call(name, arguments)])
        reading.told.argue(arguments)
        reading.untold = place


def follow_braces(reading: Reading, form: BraceForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, ("{",))
    place = yield from reading.skip(end, ("{",))
    reading.name(name, place - 1)
    mark, depth = re.compile(rf"{re.escape(form.quote)}|[{{}}\[\]]"), 1
    while depth:
        found = yield from reading.search(mark, place, len(form.quote))
        place = found.end()
        if found[0] == form.quote:
            place = (yield from reading.find(form.quote, at=place)) + len(form.quote)
        else:
            depth += 1 if found[0] in "{[" else -1
    return form.read(reading.text, at)


FOLLOW = {
    ObjectForm: follow_object,
    NamedForm: follow_named,
    KeywordForm: follow_keywords,
    TaggedForm: follow_tagged,
    BraceForm: follow_braces,
}
