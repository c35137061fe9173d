"""Learns from a chat template how it writes reasoning and calls, and proves by a round trip that they can be read."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from ..data.chat_text import common_prefix
from ..run.errors import DataError
from .calls import (
    DECODER,
    BraceForm,
    Call,
    Form,
    KeywordForm,
    NamedForm,
    ObjectForm,
    PythonForm,
    Syntax,
    TaggedForm,
    Thought,
    Unreadable,
    pieces,
    skip_space,
)

# Words that no template has a reason to change.
TEXT, REASONING, NAME, OTHER, KEY, KEY2, VALUE = "Ttttt", "Rrrrr", "nnnnn", "mmmmm", "kkkkk", "jjjjj", "Vvvvv"
ONE = Call(NAME, {KEY: VALUE})
# Calls that must come back as they were written.
PROOFS = (
    (Call("get_weather", {"city": "北京 🙂", "days": 3, "exact": True, "step": -0.5, "until": None, "old": False}),),
    (Call("save", {"text": 'a "quoted" word, it\'s\n  a \\ second line', "empty": "", "number": "3"}),),
    (Call("plot", {"points": [1, 2.5, "x y", None, [True]], "style": {"color": {"name": "dark red"}, "more": {}}}),),
    (Call("now", {}),),
    (Call("get_weather", {"city": "x", "days": 1}), Call("now", {}), Call("save", {"text": "y"})),
)
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# write(calls=(), text="", reasoning=""): what the model learns to write. Raises DataError where the template refuses.
Write = Callable[..., str]
Found = tuple[Form, int, str]  # the form of calls, where one begins in an answer that is a call, and what follows it


def describe_calls(calls: tuple[Call, ...]) -> list[dict]:
    """Descriptions of functions that the calls fit."""
    tools = []
    for name, arguments in dict(calls).items():
        types = {key: {"type": JSON_TYPES.get(type(value), "null")} for key, value in arguments.items()}
        parameters = {"type": "object", "properties": types}
        tools.append({"name": name, "description": "A function.", "parameters": parameters})
    return tools


def learn_thought(write: Write) -> Thought:
    """Find how reasoning is written; up to `</think>` where the template does not show it."""
    found: dict[str, tuple[str, str]] = {}  # what stands before and after it
    for kind, calls, text in (("text", (), TEXT), ("call", (ONE,), "")):
        with suppress(DataError):
            before, shown, after = write(calls, text, REASONING).partition(REASONING)
            if shown and VALUE not in before and TEXT not in before:
                found[kind] = before.strip(), after.partition(NAME)[0].partition(TEXT)[0]
    opens, close = found.get("text") or found.get("call") or ("", "")
    if len(found) == 2:
        close = close[: common_prefix(close, found["call"][1])]
    elif "call" in found:  # whose own beginning is no part of it
        plain = write((ONE,)).partition(NAME)[0]
        close = close[: len(close) - common_prefix(close[::-1], plain[::-1])]
    close = close.strip()
    if not close:
        return Thought(open="")
    opens = opens.rpartition(close)[2].strip()  # Qwen3's template may write an empty thought before it
    return Thought(opens, close, asked=not opens and close in write((), TEXT))


def learn_lead(write: Write, thought: Thought) -> tuple[str, ...]:
    """The pieces that are written before every text without calls, such as the name of a channel."""
    return pieces(thought.split(write((), TEXT))[1].partition(TEXT)[0])


def learn_syntax(write: Write, thought: Thought) -> Syntax:
    """Find how calls are written, and prove it. Raises Unreadable, which says what is in the way, or DataError where
    the template refuses calls."""

    def body(*calls: Call, text: str = "") -> str:
        return thought.split(write(calls, text))[1]

    one = body(ONE)
    if NAME not in one or VALUE not in one:
        raise Unreadable("the template does not write a call's name and value as they are")
    for learn in (learn_object, learn_named, learn_python, learn_keywords, learn_tagged, learn_braces):
        if found := learn(one, body):
            form, start, tail = found
            break
    else:
        raise Unreadable(f"the template writes calls in an unknown way: {one!r}")
    opens, between, joint = one[:start], "", ""
    with suppress(DataError):
        spoken = body(ONE, text=TEXT)
        beside = spoken[: len(spoken) - len(one[start:])]
        if TEXT in beside:
            opens = opens[len(opens) - common_prefix(opens[::-1], beside[::-1]) :]
            joint = beside.partition(TEXT)[2].removesuffix(opens)
    if not isinstance(form, PythonForm):
        with suppress(DataError):
            between = learn_between(body(ONE, Call(OTHER, {KEY: VALUE})), opens, form)
    syntax = Syntax(form, pieces(opens), pieces(between), pieces(tail))
    if not syntax.is_marked:
        syntax = replace(syntax, joint=pieces(joint))
    if not syntax.is_marked and not hasattr(form, "begins"):
        raise Unreadable("no marker shows where a call begins")
    prove(syntax, thought, write)
    return syntax


# Each tells whether calls are of its form, by the call ONE within `one`; body(…) writes others.


def learn_object(one: str, body: Callable) -> Found | None:
    """Whether a call is a JSON object that holds its name and its arguments."""
    for start in [i for i, letter in enumerate(one) if letter == "{"]:
        with suppress(ValueError):
            value, end = DECODER.raw_decode(one, start)
            keys = {
                json.dumps(item) if isinstance(item, dict) else item: key
                for key, item in value.items()
                if isinstance(item, str | dict)
            }
            arguments = json.dumps(ONE.arguments)
            if NAME in keys and arguments in keys:
                name, key = keys[NAME], keys[arguments]
                form = ObjectForm(name, key, frozenset(value) - {name, key}, isinstance(value[key], str))
                return form, start, one[end:]
    return None


def learn_named(one: str, body: Callable) -> Found | None:
    """Whether a call is its name and then a JSON object of the arguments."""
    start = one.find(NAME)
    brace = one.find("{", start)
    with suppress(ValueError):
        value, end = DECODER.raw_decode(one, brace) if brace >= 0 else (None, 0)
        if value == ONE.arguments:
            return NamedForm(pieces(one[start + len(NAME) : brace])), start, one[end:]
    return None


def learn_python(one: str, body: Callable) -> Found | None:
    """Whether calls are a list of Python's calls."""
    start = one.find("[" + NAME)
    end = one.find(")]", start) + len(")]")
    if start < 0 or end < start or not one[end:].strip():
        return None
    with suppress(Unreadable):
        if PythonForm().read_all(one[start:end]) == [ONE]:
            return PythonForm(), start, one[end:]
    return None


def learn_keywords(one: str, body: Callable) -> Found | None:
    """Whether a call is its name and then keyword arguments in parentheses."""
    start = one.find(NAME)
    at = one.find(f"({KEY}=", start)
    form = KeywordForm(pieces(one[start + len(NAME) : at]))
    with suppress(Unreadable):
        call, end = form.read(one, start)
        if at > start and call == ONE:
            return form, start, one[end:]
    return None


def learn_tagged(one: str, body: Callable) -> Found | None:
    """Whether each argument of a call stands between tags, such as Qwen3-Coder's `<parameter=x>`."""
    start = one.rfind(NAME)
    key, value = one.find(KEY, start), one.find(VALUE, start)
    two, none = body(Call(NAME, {KEY: VALUE, KEY2: VALUE})), body(Call(NAME, {}))
    if not start < key < value:
        return None
    first, last = pieces(one[start + len(NAME) : key]), one[value + len(VALUE) :]
    rest = pieces(none[none.rfind(NAME) + len(NAME) :])
    head = next((i for i, pair in enumerate(zip(first, rest, strict=False)) if pair[0] != pair[1]), len(first))
    opens, middle = first[head:], one[key + len(KEY) : value]
    next_key = two.find(KEY2, start)
    again = pieces(two[two.find(VALUE, start) + len(VALUE) : next_key])
    closes = again[: len(again) - len(opens)]
    if not opens or not closes or not pieces(middle) or again != closes + opens or not rest[head:]:
        return None
    if pieces(last) != closes + rest[head:]:
        return None
    before, after = middle[len(middle.rstrip()) :], last[: skip_space(last, 0)]
    form = TaggedForm(first[:head], opens, pieces(middle), closes, before, after, rest[head : head + 1])
    return form, start, " ".join(rest[head:])


def learn_braces(one: str, body: Callable) -> Found | None:
    """Whether a call is its name and then arguments in braces, their strings between Gemma's quotes."""
    start = one.find(NAME)
    before, _, after = one[start + len(NAME) :].partition(VALUE)
    quote = after.partition("}")[0]
    if before != f"{{{KEY}:{quote}" or not quote:
        return None
    return BraceForm(quote), start, after.partition("}")[2]


def learn_between(two: str, opens: str, form: Form) -> str:
    """What stands between two calls; Unreadable where the second does not follow the first."""
    at = two.find(opens) + len(opens)
    _, end = form.read(two, at)
    start = two.find(OTHER, end)
    if isinstance(form, ObjectForm):
        starts = [i for i in range(end, len(two)) if two[i] == "{"]
        start = next((i for i in starts if reads(form, two, i)), -1)
    if start < 0:
        raise Unreadable("of two calls, the second is not found behind the first")
    return two[end:start]


def reads(form: ObjectForm, text: str, at: int) -> bool:
    with suppress(Unreadable):
        return form.read(text, at)[0].name == OTHER
    return False


def prove(syntax: Syntax, thought: Thought, write: Write) -> None:
    """Raise Unreadable unless every call that the template writes is read as it was given. Text beside a call may be
    written as reasoning (gpt-oss)."""
    for calls, text in proofs():
        try:
            written = write(calls, text)
        except DataError as error:
            if len(calls) == 1 and not text:
                raise Unreadable(str(error)) from None
            continue  # the template has no place for parallel calls, or for text beside them
        thoughts, body = thought.split(written)
        answer = syntax.read(body, describe_calls(calls))
        spoken = "\n".join(filter(None, (thoughts, answer.text)))
        if (spoken, answer.fault) != (text, "") or not same(answer.calls, calls):
            shown = " and ".join(call.name for call in calls)
            raise Unreadable(
                f"a call of {shown} with {calls[0].arguments} is written as {written!r}, and not read as that"
            )


def same(found: tuple[Call, ...], given: tuple[Call, ...]) -> bool:
    """Whether calls are the same, with values of the same types; the template may sort the arguments."""
    return [json.dumps(call, sort_keys=True) for call in found] == [json.dumps(call, sort_keys=True) for call in given]


def proofs() -> Iterator[tuple[tuple[Call, ...], str]]:
    for calls in PROOFS:
        yield calls, ""
    yield PROOFS[0], "One moment, please."
    yield PROOFS[-1], "Two lines\nbefore it."
