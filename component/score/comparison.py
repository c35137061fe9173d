"""Comparison of an answer with the right one: the decision to call, the calls, their arguments, and the fault."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..data.tools import LACKS, UNKNOWN, WRONG_TYPE, misfits, names_of
from ..inference.calls import Answer, Call
from .questions import Question

# Classes of wrong answers. The first that fits is an answer's class; it has no other.
TRUNCATED, UNPARSABLE = "truncated", "unparsable"
MISSED, NEEDLESS = "missed call", "needless call"
UNKNOWN_FUNCTION, OTHER_FUNCTION, OTHER_NUMBER = "unknown function", "other function", "other number of calls"
MISSING_ARGUMENT, UNKNOWN_ARGUMENT = "missing required argument", "unknown argument"
TYPE, VALUE, OTHER_TEXT = "wrong type", "wrong value", "other text"
CLASSES = (TRUNCATED, UNPARSABLE, MISSED, NEEDLESS, UNKNOWN_FUNCTION, OTHER_FUNCTION, OTHER_NUMBER)
CLASSES += (MISSING_ARGUMENT, UNKNOWN_ARGUMENT, TYPE, VALUE, OTHER_TEXT)


@dataclass(frozen=True)
class Pair:
    """An expected call beside the given one that is compared with it. One of them may be lacking."""

    expected: Call | None
    given: Call | None

    @property
    def has_right_name(self) -> bool:
        return bool(self.expected and self.given) and self.expected.name == self.given.name

    @property
    def is_exact(self) -> bool:
        return self.has_right_name and is_same(self.expected.arguments, self.given.arguments)

    @property
    def is_nearly_exact(self) -> bool:
        """Whether the calls are the same after NFKC and with white space as single spaces."""
        return self.has_right_name and is_same(plain(self.expected.arguments), plain(self.given.arguments))

    @property
    def right_arguments(self) -> set[str]:
        """Names of the arguments that both calls have with the same value."""
        if not self.has_right_name:
            return set()
        expected, given = self.expected.arguments, self.given.arguments
        return {name for name in expected.keys() & given.keys() if is_same(expected[name], given[name])}


@dataclass(frozen=True)
class Verdict:
    """What became of a question: the class of its fault ("" if the answer is right), and its calls in pairs."""

    fault: str
    expects_call: bool
    gives_call: bool  # also for what looks like a call and cannot be read: it is no refusal to call
    is_nearly_exact: bool  # right after NFKC and with white space as single spaces
    pairs: tuple[Pair, ...]

    @property
    def is_exact(self) -> bool:
        return not self.fault

    @property
    def has_right_names(self) -> bool:
        return self.expects_call and all(pair.has_right_name for pair in self.pairs)


def compare(question: Question, answer: Answer) -> Verdict:
    """Judge an answer. Calls may come in any order, but not more or fewer of them. Text beside calls does not count."""
    expected = [Call(turn.name, turn.parameters) for turn in question.calls]
    pairs = tuple(pair_up(expected, list(answer.calls)))
    fault = find_fault(question, answer, pairs)
    same_text = plain(answer.text) == plain(question.text) and not answer.calls
    return Verdict(
        fault=fault,
        expects_call=bool(expected),
        gives_call=bool(answer.calls or answer.fault),
        is_nearly_exact=not fault
        or (
            answer.finish_reason != "length"
            and not answer.fault
            and (all(pair.is_nearly_exact for pair in pairs) if expected else same_text)
        ),
        pairs=pairs,
    )


def find_fault(question: Question, answer: Answer, pairs: tuple[Pair, ...]) -> str:
    """The first of CLASSES that an answer belongs to; "" if it is right."""
    if answer.finish_reason == "length":
        return TRUNCATED
    if answer.fault:
        return UNPARSABLE
    if question.calls and not answer.calls:
        return MISSED
    if not question.calls:
        return NEEDLESS if answer.calls else OTHER_TEXT if answer.text.strip() != question.text.strip() else ""
    offered = names_of(question.history.tools) or {turn.name for turn in question.calls}
    if any(call.name not in offered for call in answer.calls):
        return UNKNOWN_FUNCTION
    if len(answer.calls) != len(question.calls):
        return OTHER_NUMBER
    if not all(pair.has_right_name for pair in pairs):
        return OTHER_FUNCTION
    found = {fault for pair in pairs if not pair.is_exact for fault in faults_of(pair, question.history.tools)}
    return next((fault for fault in CLASSES if fault in found), "")


def faults_of(pair: Pair, tools: Any) -> Iterable[str]:
    """Classes of what is wrong in the arguments of a call that has the right name: by the function's schema, and where
    there is none, by the expected call."""
    expected, given = pair.expected.arguments, pair.given.arguments
    yield VALUE  # whatever else is wrong
    kinds = {LACKS: MISSING_ARGUMENT, UNKNOWN: UNKNOWN_ARGUMENT, WRONG_TYPE: TYPE}
    yield from (kinds.get(misfit.kind, VALUE) for misfit in misfits(pair.given.name, given, tools))
    if not has_schema(pair.given.name, tools):
        yield from [MISSING_ARGUMENT] * bool(expected.keys() - given.keys())
        yield from [UNKNOWN_ARGUMENT] * bool(given.keys() - expected.keys())
    if any(type_of(expected[name]) != type_of(given[name]) for name in expected.keys() & given.keys()):
        yield TYPE


def has_schema(name: str, tools: Any) -> bool:
    """Whether `tools` says which arguments a function has: then no call with an argument of another name fits it."""
    return any(misfit.kind == UNKNOWN for misfit in misfits(name, {"": None}, tools))


def pair_up(expected: list[Call], given: list[Call]) -> Iterable[Pair]:
    """Pair each expected call with a given one: those that are equal, then those of one name with the most equal
    arguments, then the rest in order. Calls that are left have no partner."""

    def likeness(i: int, j: int) -> tuple:
        pair = Pair(expected[i], given[j])
        return pair.is_exact, pair.has_right_name, len(pair.right_arguments), -i, -j

    places = [(i, j) for i in range(len(expected)) for j in range(len(given))]
    partners: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in sorted(places, key=lambda place: likeness(*place), reverse=True):
        if i not in partners and j not in taken:
            partners[i] = j
            taken.add(j)
    for i, call in enumerate(expected):
        yield Pair(call, given[partners[i]] if i in partners else None)
    yield from (Pair(None, call) for j, call in enumerate(given) if j not in taken)


def is_same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, with their types. Of numbers the value counts: 2 is 2.0; true is not 1."""
    if type_of(one) != type_of(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def type_of(value: Any) -> type:
    return float if type(value) is int else type(value)


def plain(value: Any) -> Any:
    """A JSON value whose texts are normalised by NFKC, without space at either end and with single spaces within."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).split())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def count_arguments(pairs: Iterable[Pair]) -> tuple[int, int, int]:
    """(right, given, expected) arguments of calls."""
    right = given = expected = 0
    for pair in pairs:
        right += len(pair.right_arguments)
        given += len(pair.given.arguments) if pair.given else 0
        expected += len(pair.expected.arguments) if pair.expected else 0
    return right, given, expected


def count_faults(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many answers each class has, the most first. Other texts come last: a text may be good and not the same."""
    counts = Counter(verdict.fault for verdict in verdicts if verdict.fault)
    return dict(sorted(counts.items(), key=lambda item: (item[0] == OTHER_TEXT, -item[1], CLASSES.index(item[0]))))
