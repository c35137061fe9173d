"""A model's answer as text, reasoning and calls of functions, read from what it wrote. Standard library only.

Nothing that a model wrote is evaluated. Whatever it wrote, reading takes time in proportion to its length.
"""

import ast
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

FAULTS = ("unparsable", "truncated")  # what Answer.fault may be, beside ""
DEPTH = 100  # of arguments, so that whoever takes them can walk through them
SPACE = re.compile(r"\s*")
PIECE = re.compile(r"<[^<>\s]*>?|\[/?\w+\]|\[|[^\s<\[]+")
NAME = re.compile(r"[\w.:/-]{1,200}")  # of a function, where nothing but the name shows that a call comes
SCALAR = re.compile(r"[^\s,:{}\[\]]+")
PYTHON = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Call(NamedTuple):
    """A call of a function, as the model asks for it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: what the user reads, without calls and reasoning.
        calls: the functions that are called, in order; none if one of them cannot be read.
        reasoning: the model's thoughts before its text and calls.
        fault: one of FAULTS if something begins like a call and is none that can be read; it is then part of `text`.
        finish_reason: `stop`, `tool_calls`, or `length` where the answer was cut short.
        raw: what was generated, control tokens shown.
    """

    text: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    fault: str = ""
    finish_reason: str = "stop"
    raw: str = ""


class Unreadable(ValueError):
    """Raised for a text that should be a call, and is not."""


def finished(answer: Answer, cut: bool, raw: str) -> Answer:
    """The answer with its finish_reason; `cut`: the model was stopped before its end."""
    reason = "length" if cut else "tool_calls" if answer.calls else "stop"
    return replace(answer, finish_reason=reason, raw=raw)


def to_message(answer: Answer) -> dict[str, Any]:
    """The answer as OpenAI's message of the assistant, for the messages of the next question. Calls get new ids, of
    nine letters and digits, which every chat template accepts."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {
                "id": uuid.uuid4().hex[:9],
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in answer.calls
        ]
    return message


@dataclass(frozen=True)
class Thought:
    """How a model's reasoning is written: between `open` and `close`, before its text and calls.

    Attributes:
        open: empty where the prompt, or nothing, opens it.
        asked: whether every answer begins within a thought, which the prompt has opened.
    """

    open: str = "<think>"
    close: str = "</think>"
    asked: bool = False

    def split(self, text: str) -> tuple[str, str]:
        """(reasoning, what follows it) of an answer. A thought that was opened and has no end is reasoning."""
        thoughts: list[str] = []
        at, within = 0, not self.open
        while within or text.startswith(self.open, skip_space(text, at)):
            start = at if within else skip_space(text, at) + len(self.open)
            stop = text.find(self.close, start)
            if stop < 0:
                if self.open or self.asked:
                    thoughts.append(text[start:].strip())
                    at = len(text)
                break
            thoughts.append(text[start:stop].strip())
            at, within = stop + len(self.close), False
            if not self.open:
                break
        return "\n".join(filter(None, thoughts)), text[at:]


def pieces(literal: str) -> tuple[str, ...]:
    """The tags and words of what a template writes, without the white space between them."""
    return tuple(PIECE.findall(literal))


def skip_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()


def skip(text: str, at: int, expected: Sequence[str]) -> int:
    """Where `text` goes on behind the pieces that stand at `at`. Raises Unreadable if others stand there."""
    for piece in expected:
        at = skip_space(text, at)
        if not text.startswith(piece, at):
            raise Unreadable(f"{piece!r} is missing")
        at += len(piece)
    return at


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant)


def read_object(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The JSON object at a place, and where it ends. Raises Unreadable."""
    at = skip_space(text, at)
    if not text.startswith("{", at):
        raise Unreadable("there is no JSON object")
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None


def find_name(text: str, at: int, ends: Sequence[str]) -> tuple[str, int]:
    """A function's name, and where it ends: at a newline or the first of `ends`. Raises Unreadable."""
    at = skip_space(text, at)
    end = re.compile("|".join(map(re.escape, ("\n", *ends)))).search(text, at)
    name = text[at : end.start()].strip() if end else ""
    if not name:
        raise Unreadable("the function's name is missing")
    return name, end.start()


def require_json(calls: Sequence[Call]) -> None:
    """Raise ValueError or RecursionError for calls that cannot be written as JSON: nested deeper than DEPTH, with
    infinity or half a surrogate pair."""
    json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()
    level: list[Any] = [call.arguments for call in calls]
    for _ in range(DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")


def types_of(tools: Any, function: str, argument: str) -> set[str]:
    """Types that the descriptions of the functions allow for an argument; none if they do not say."""
    for tool in tools if isinstance(tools, list) else ():
        try:
            described = tool.get("function", tool)
            if described["name"] == function:
                kind = described["parameters"]["properties"][argument]["type"]
                return {kind} if isinstance(kind, str) else set(kind)
        except (AttributeError, LookupError, TypeError):
            continue
    return set()


# Ways to write a call. `read` returns the call that stands at a place, and where it ends, or raises Unreadable.
# `begins` tells whether a text without a marker before its call begins like one, or is the beginning of one.


@dataclass(frozen=True)
class ObjectForm:
    """A JSON object with the name and the arguments under the keys `name` and `arguments`, in any order."""

    name: str
    arguments: str
    others: frozenset[str] = frozenset()  # further keys that it may have
    as_text: bool = False  # the arguments are JSON within a string

    def begins(self, text: str, at: int, cut: bool) -> bool:
        keys = "|".join(map(re.escape, (self.name, self.arguments)))
        rest = text[skip_space(text, at) :]
        return bool(re.match(rf'\{{\s*"(?:{keys})"', rest) or (cut and re.fullmatch(r'\{\s*("\w{0,40})?', rest)))

    def read(self, text: str, at: int, tools: Any = None) -> tuple[Call, int]:
        value, end = read_object(text, at)
        name, arguments = value.get(self.name), value.get(self.arguments)
        if self.as_text and isinstance(arguments, str):
            arguments, _ = read_object(arguments, 0)
        if value.keys() - self.others != {self.name, self.arguments} or not isinstance(name, str) or not name.strip():
            raise Unreadable("it has other keys than a call")
        if not isinstance(arguments, dict):
            raise Unreadable("its arguments are no object")
        return Call(name, arguments), end


@dataclass(frozen=True)
class NamedForm:
    """The name, then a JSON object of the arguments."""

    between: tuple[str, ...]

    def begins(self, text: str, at: int, cut: bool) -> bool:
        return begins_with_name(text[at:], self.between, cut)

    def read(self, text: str, at: int, tools: Any = None) -> tuple[Call, int]:
        name, at = find_name(text, at, self.between[:1] or ("{",))
        arguments, end = read_object(text, skip(text, at, self.between))
        return Call(name, arguments), end


@dataclass(frozen=True)
class TaggedForm:
    """The name, then every argument with tags around its key and its value, which is plain text if it is a string.

    Attributes:
        head: pieces between the name and the first argument.
        opens, middle, closes: pieces before the key, between key and value, and after the value.
        before, after: white space around a value that is not part of it.
    """

    head: tuple[str, ...]
    opens: tuple[str, ...]
    middle: tuple[str, ...]
    closes: tuple[str, ...]
    before: str
    after: str
    ends: tuple[str, ...]  # the first piece after a call's last argument

    def read(self, text: str, at: int, tools: Any = None) -> tuple[Call, int]:
        name, at = find_name(text, at, self.head[:1] or self.opens[:1] + self.ends)
        at = skip(text, at, self.head)
        arguments: dict[str, Any] = {}
        while text.startswith(self.opens[0], skip_space(text, at)):
            at = skip(text, at, self.opens)
            stop = text.find(self.middle[0], at)
            key = text[at:stop].strip()
            if stop < 0 or not key or key in arguments:
                raise Unreadable("an argument's name is missing or stands twice")
            at = skip(text, stop, self.middle)
            stop = text.find(self.closes[0], at)
            if stop < 0:
                raise Unreadable("an argument has no end")
            written = text[at:stop].removeprefix(self.before).removesuffix(self.after)
            arguments[key] = plain_value(written, types_of(tools, name, key))
            at = skip(text, stop, self.closes)
        return Call(name, arguments), at


def plain_value(written: str, types: set[str]) -> Any:
    """A value as JSON or a constant of Python's; a string, if that is its only type or it is neither."""
    if types == {"string"}:
        return written
    if written in PYTHON:
        return PYTHON[written]
    try:
        value, end = DECODER.raw_decode(written, skip_space(written, 0))
    except (ValueError, RecursionError):
        return written
    return value if skip_space(written, end) == len(written) else written


def begins_with_name(text: str, between: Sequence[str], cut: bool) -> bool:
    """Whether a text is a name in its first line and then what stands between a name and its arguments."""
    name = NAME.match(text, re.match(r"[^\S\n]*", text).end())
    if not name:
        return False
    space = SPACE.match(text, name.end())
    if not between and "\n" not in space[0]:
        return cut and space.end() == len(text)
    following = between[0] if between else "{"
    return text.startswith(following, space.end()) or (cut and following.startswith(text[space.end() :]))


@dataclass(frozen=True)
class KeywordForm:
    """The name, then the keyword arguments of a Python call in parentheses, which end with their line."""

    between: tuple[str, ...]

    def begins(self, text: str, at: int, cut: bool) -> bool:
        return begins_with_name(text[at:], self.between, cut)

    def read(self, text: str, at: int, tools: Any = None) -> tuple[Call, int]:
        name, at = find_name(text, at, self.between[:1] or ("(",))
        at = skip(text, at, self.between)
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        (call,) = PythonForm().read_all(f"[call{text[at:end].strip()}]")
        return Call(name, call.arguments), end


@dataclass(frozen=True)
class PythonForm:
    """A list of Python calls with keyword arguments, `[one(a='x'), two()]`, whose values are literals."""

    def read_all(self, text: str) -> list[Call]:
        try:
            listed = ast.parse(text.strip(), mode="eval").body
            if not isinstance(listed, ast.List) or not listed.elts:
                raise Unreadable("there is no list of calls")
            return [self.call_of(node) for node in listed.elts]
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise Unreadable(str(error)) from None

    def call_of(self, node: ast.expr) -> Call:
        before = ""
        if is_minus(node):  # a name may have hyphens
            before, node = hyphenated_name(node.left) + "-", node.right
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise Unreadable("there is something else than a call")
        arguments = [(keyword.arg, literal_value(keyword.value)) for keyword in node.keywords]
        return Call(before + dotted_name(node.func), unique(arguments))


def is_minus(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)


def hyphenated_name(node: ast.expr) -> str:
    """A name whose hyphens Python takes for minus signs. Raises Unreadable for any other code."""
    if is_minus(node):
        return f"{hyphenated_name(node.left)}-{dotted_name(node.right)}"
    return dotted_name(node)


def dotted_name(node: ast.expr) -> str:
    """A function's name in Python. Raises Unreadable for any other code."""
    inner = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    if not isinstance(inner, ast.Name):
        raise Unreadable("the function's name is missing")
    return ast.unparse(node)


def literal_value(node: ast.expr) -> Any:
    """The value of a Python or JSON literal that JSON can hold. Raises Unreadable for any other code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in PYTHON:
        return PYTHON[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal_value(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.List):
        return [literal_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return unique(list(zip(keys, map(literal_value, node.values), strict=True)))
    raise Unreadable("a value is no literal")


@dataclass(frozen=True)
class BraceForm:
    """The name, then `{key:value,…}` with bare keys and strings between two quotes, which no string holds."""

    quote: str

    def read(self, text: str, at: int, tools: Any = None) -> tuple[Call, int]:
        name, at = find_name(text, at, ("{",))
        try:
            arguments, end = self.value(text, at)
        except RecursionError:
            raise Unreadable("it is nested too deep") from None
        if not isinstance(arguments, dict):
            raise Unreadable("its arguments are no object")
        return Call(name, arguments), end

    def value(self, text: str, at: int) -> tuple[Any, int]:
        at = skip_space(text, at)
        if text.startswith(self.quote, at):
            start = at + len(self.quote)
            stop = text.find(self.quote, start)
            if stop < 0:
                raise Unreadable("a string has no end")
            return text[start:stop], stop + len(self.quote)
        if text.startswith("{", at):
            listed, at = self.items(text, at + 1, "}")
            return unique(listed), at
        if text.startswith("[", at):
            return self.items(text, at + 1, "]")
        word = SCALAR.match(text, at)
        value = plain_value(word[0], set()) if word else ""
        if isinstance(value, str):
            raise Unreadable("a value is neither quoted nor a number")
        return value, word.end()

    def items(self, text: str, at: int, end: str) -> tuple[list, int]:
        found: list = []
        while not text.startswith(end, at := skip_space(text, at)):
            at = skip(text, at, (",",) if found else ())
            if end == "}":
                key, at = self.key(text, at)
                value, at = self.value(text, skip(text, at, (":",)))
                found.append((key, value))
            else:
                value, at = self.value(text, at)
                found.append(value)
        return found, at + 1

    def key(self, text: str, at: int) -> tuple[str, int]:
        at = skip_space(text, at)
        if text.startswith(self.quote, at):
            return self.value(text, at)
        if not (word := SCALAR.match(text, at)):
            raise Unreadable("a key is missing")
        return word[0], word.end()


Form = ObjectForm | NamedForm | KeywordForm | TaggedForm | PythonForm | BraceForm


@dataclass(frozen=True)
class Syntax:
    """How a chat template writes the calls of an answer: pieces, in which white space does not count, around a Form.

    Attributes:
        between: what stands between two calls; empty if there is one call at most.
        joint: what stands between a text and its calls, where `opens` is no marker; empty if there is either of them.
    """

    form: Form
    opens: tuple[str, ...]
    between: tuple[str, ...]
    closes: tuple[str, ...]
    joint: tuple[str, ...] = ()

    @property
    def is_marked(self) -> bool:
        """Whether the first piece before a call shows that one comes, wherever it stands."""
        return bool(self.opens) and bool(re.search(r"\w", self.opens[0]))

    def find(self, text: str, at: int, cut: bool) -> int:
        """Where the next calls begin, or -1. Without a marker, they begin the answer or stand behind `joint`."""
        if self.is_marked:
            return text.find(self.opens[0], at)
        try:
            if at == 0 and self.form.begins(text, skip(text, 0, self.opens), cut):
                return 0
        except Unreadable:
            pass
        return text.find(self.joint[0], at) if self.joint else -1

    def read_group(self, text: str, at: int, tools: Any) -> tuple[list[Call], int]:
        """The calls that stand at a place, and where they end. Raises Unreadable."""
        if self.joint and text.startswith(self.joint[0], at):
            at = skip(text, at, self.joint)
        at = skip(text, at, self.opens)
        if isinstance(self.form, PythonForm):
            end = text.find(self.closes[0], at)
            if end < 0:
                raise Unreadable(f"{self.closes[0]!r} is missing")
            return self.form.read_all(text[at:end]), skip(text, end, self.closes)
        calls: list[Call] = []
        while True:
            call, at = self.form.read(text, at, tools)
            calls.append(call)
            try:
                if not self.between:
                    return calls, skip(text, at, self.closes)
                at = skip(text, at, self.between)
            except Unreadable:
                return calls, skip(text, at, self.closes)

    def read(self, text: str, tools: Any = None, cut: bool = False) -> Answer:
        """An answer's text and calls. What begins like a call and is none becomes text and a fault."""
        calls: list[Call] = []
        spoken, at = [], 0
        try:
            while (start := self.find(text, at, cut)) >= 0:
                spoken.append(text[at:start].strip())
                group, at = self.read_group(text, start, tools)
                calls += group
            if cut and self.is_marked and overlap(text[at:], self.opens[0]) > 1:
                raise Unreadable("a call begins at the end")
            require_json(calls)
        except (Unreadable, ValueError, RecursionError):
            return Answer(text.strip(), fault="truncated" if cut else "unparsable")
        spoken.append(text[at:].strip())
        return Answer("\n".join(filter(None, spoken)), tuple(calls))


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)


class Parts:
    """Parts of text, each stripped, and joined by newlines: what can be told of them as they come."""

    def __init__(self):
        self.space: list[str] = []  # that is told once something follows it
        self.is_joined = self.is_begun = False  # whether anything was told at all; of this part

    def add(self, text: str) -> str:
        if not self.is_begun:
            text = text.lstrip()
            if not text:
                return ""
        shown = text.rstrip()
        if not shown:
            self.space.append(text)
            return ""
        before = "".join(self.space) if self.is_begun else "\n" * self.is_joined
        self.space, self.is_joined, self.is_begun = [text[len(shown) :]], True, True
        return before + shown

    def end(self) -> None:
        self.space, self.is_begun = [], False


# ChatGLM3's answers have no template to learn from. They are messages, each with a line of metadata before its content,
# which names a function or is blank.


def is_name(text: str) -> bool:
    """Whether the first line of a message of ChatGLM3 can be the name of a function."""
    return NAME.fullmatch(text) is not None


def read_fenced_call(name: str, content: str) -> Call:
    """ChatGLM3's call, whose content is `tool_call(city='北京', days=2)` between two lines of ```` ``` ````.

    The official `chat` takes more (`chatglm.prompt.parse_fenced_call`): it looks at no fence, and at no value's type.

    Raises:
        Unreadable: the content is no call, or its values are such that no JSON can hold them.
    """
    if not is_name(name):
        raise Unreadable("its first line is no name")
    if not (content.startswith("```") and content.endswith("\n```")):
        raise Unreadable("a call stands between two lines of ```")
    try:
        code = ast.parse("\n".join(content.split("\n")[1:-1]).strip(), mode="eval").body
        if not isinstance(code, ast.Call) or code.args or any(keyword.arg is None for keyword in code.keywords):
            raise Unreadable("it is no call with literal arguments")
        dotted_name(code.func)
        arguments = unique([(keyword.arg, ast.literal_eval(keyword.value)) for keyword in code.keywords])
        call = Call(name, json.loads(json.dumps(arguments, allow_nan=False)))
        require_json([call])
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Unreadable(str(error)) from None
    return call


def read_messages(messages: Sequence[str], cut: bool = False, thought: Thought | None = None) -> Answer:
    """ChatGLM3's answer. A message that should be a call and is none becomes text and a fault.

    Args:
        cut: whether the model was stopped before the end of the last message.
        thought: how reasoning is written; None leaves it in the text.
    """
    calls, spoken, thoughts, fault = [], [], [], ""
    for i, message in enumerate(messages):
        is_cut = cut and i == len(messages) - 1
        line, newline, content = message.partition("\n")
        try:
            if newline and line.strip():
                calls.append(read_fenced_call(line.strip(), content.strip()))
                continue
            if is_cut and not newline and line.strip():
                raise Unreadable("it may be the name of a function")
        except Unreadable:
            fault = "truncated" if is_cut else "unparsable"
            spoken.append(message.strip())
            continue
        reasoning, text = thought.split(content) if thought and newline else ("", content if newline else line)
        thoughts.append(reasoning)
        spoken.append(text.strip())
    text, reasoning = ("\n".join(filter(None, parts)) for parts in (spoken, thoughts))
    return Answer(text, () if fault else tuple(calls), reasoning, fault)
