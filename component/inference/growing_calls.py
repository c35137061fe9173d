"""Reads the calls of an answer while it grows, in each Form of `calls.py`. The name is told early, and JSON as it is
written; what else can be told before a call is whole is ChatGLM3's, whose arguments are told one by one."""

from contextlib import suppress
from typing import Any

from .calls import (
    DECODER,
    BraceForm,
    KeywordForm,
    NamedForm,
    ObjectForm,
    PythonForm,
    Syntax,
    TaggedForm,
    Unreadable,
    find_name,
    require_json,
)
from .growing import DOUBTS, Reading, Waiting


def follow_syntax(reading: Reading, syntax: Syntax, tools: Any) -> Waiting:
    """Tell the text and the calls of an answer, as `Syntax.read` finds them."""
    marker = (syntax.opens if syntax.is_marked else syntax.joint)[:1]
    if syntax.is_marked or not (yield from begins_with_call(reading, syntax)):
        yield from reading.speak("text", *marker)
    while reading.text:
        is_joined = syntax.joint and reading.text.startswith(syntax.joint[0])
        at = yield from reading.require(0, (*(syntax.joint if is_joined else ()), *syntax.opens))
        yield from (follow_list if isinstance(syntax.form, PythonForm) else follow_group)(reading, syntax, at, tools)
        reading.told.parts["text"].end()
        yield from reading.speak("text", *marker)


def begins_with_call(reading: Reading, syntax: Syntax) -> Waiting:
    """Whether an answer begins with a call that has no marker."""
    try:
        at = yield from reading.require(0, syntax.opens)
        yield from reading.letter(at)
    except Unreadable:
        return False
    while not syntax.form.begins(reading.text, at, False):
        if reading.ended or not syntax.form.begins(reading.text, at, True):
            return False
        yield
    return True


def follow_group(reading: Reading, syntax: Syntax, at: int, tools: Any) -> Waiting:
    """Tell the calls that stand together. One is complete where they may end behind it, or where the next one comes."""
    while at is not None:
        call, end = yield from FOLLOW[type(syntax.form)](reading, syntax.form, at, tools)
        require_json([call])
        closed = yield from reading.skip(end, syntax.closes)
        if closed is not None:
            reading.told.end_call(call)
            reading.untold = closed
        at = (yield from reading.skip(end, syntax.between)) if syntax.between else None
        if closed is None:
            if at is None:
                raise Unreadable("it has no end")
            reading.told.end_call(call)
            reading.untold = end
    reading.drop(closed)


def follow_list(reading: Reading, syntax: Syntax, at: int, tools: Any) -> Waiting:
    """Tell the calls of a list in Python, none of which is one before the whole list can be read."""
    end = yield from reading.find(syntax.closes[0], at=at)
    calls = syntax.form.read_all(reading.text[at:end])
    require_json(calls)
    end = yield from reading.require(end, syntax.closes)
    for call in calls:
        reading.told.end_call(call)
    reading.drop(end)


# Each waits until a call of its form is whole, tells what is certain before, and returns what `Form.read` does.


def follow_object(reading: Reading, form: ObjectForm, at: int, tools: Any) -> Waiting:
    start = yield from reading.letter(at)
    if reading.text[start] != "{":
        raise Unreadable("there is no JSON object")
    if not form.as_text:
        _, end = yield from reading.bracket(start + 1)
        if name := name_before(reading.text[start:end], form):
            reading.begin_call(name, end - 1)
            yield from reading.json_arguments(end - 1)
    yield from reading.nest_end(start)
    return form.read(reading.text, start)


def name_before(begun: str, form: ObjectForm) -> str:
    """The name in a JSON object of which all is there up to the brace of its arguments; else empty."""
    with suppress(*DOUBTS):
        value, _ = DECODER.raw_decode(begun + "}}")
        if value.pop(form.arguments, None) == {} and isinstance(name := value.pop(form.name, None), str):
            return name if name.strip() and value.keys() <= form.others else ""
    return ""


def follow_name(reading: Reading, at: int, ends: tuple[str, ...]) -> Waiting:
    """A function's name and where it ends, as `find_name` finds them."""
    start = yield from reading.letter(at)
    yield from reading.find("\n", *ends, at=start)
    return find_name(reading.text, start, ends)


def follow_named(reading: Reading, form: NamedForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.between[:1] or ("{",))
    brace = yield from reading.require(end, (*form.between, "{"))
    reading.begin_call(name, brace - 1)
    yield from reading.json_arguments(brace - 1)
    return form.read(reading.text, at)


def follow_keywords(reading: Reading, form: KeywordForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.between[:1] or ("(",))
    line = yield from reading.require(end, form.between)
    reading.begin_call(name, end)
    if opened := (yield from reading.skip(line, ("(",))):
        yield from reading.keywords(opened, lambda code: PythonForm().read_all(f"[{code}]")[0])
    with suppress(Unreadable):  # the last line may have no end
        yield from reading.find("\n", at=line)
    return form.read(reading.text, at)


def follow_tagged(reading: Reading, form: TaggedForm, at: int, tools: Any) -> Waiting:
    name, end = yield from follow_name(reading, at, form.head[:1] or form.opens[:1] + form.ends)
    place = yield from reading.require(end, form.head)
    reading.begin_call(name, end)
    while (yield from reading.stands((yield from reading.letter(place)), form.opens[0])):
        place = yield from reading.require(place, form.opens)
        stop = yield from reading.find(form.middle[0], at=place)
        place = yield from reading.require(stop, form.middle)
        stop = yield from reading.find(form.closes[0], at=place)
        place = yield from reading.require(stop, form.closes)
    return form.read(reading.text, at, tools)


def follow_braces(reading: Reading, form: BraceForm, at: int, tools: Any) -> Waiting:
    name, brace = yield from follow_name(reading, at, ("{",))
    yield from reading.require(brace, ("{",))
    reading.begin_call(name, brace)
    yield from reading.nest_end(brace, form.quote)
    return form.read(reading.text, at)


FOLLOW = {
    ObjectForm: follow_object,
    NamedForm: follow_named,
    KeywordForm: follow_keywords,
    TaggedForm: follow_tagged,
    BraceForm: follow_braces,
}
