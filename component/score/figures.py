"""The figures of a score: of base and tuned model side by side, over all, by function and by argument."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..inference.calls import Answer
from .comparison import CLASSES, Pair, Verdict, count_arguments, count_faults
from .questions import Question, Row
from .statistics import Estimate, Ratio, bootstrap, wilson

BASE, TRAINED = "base", "tuned"  # names of the base alone, and of the model as it was trained
ALL_SEEN = "every right call is of a function that training has seen, so there are no others to compare"
NONE_SEEN = "no right call is of a function that training has seen, so there are no others to compare"
UNREADABLE = "call given, cannot be read"


@dataclass(frozen=True)
class Note:
    """What is to be known about figures: a sentence, with values in its {places}, so that a page can translate it."""

    text: str
    values: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text.format(**self.values)


@dataclass(frozen=True)
class Result:
    """What one model made of the rows.

    Args:
        answers: one for each question that was asked, None for one that did not fit the model's context.
        losses: (rows,) the summed loss of each row's learned tokens; NaN for a row that did not fit.
    """

    answers: list[Answer | None]
    verdicts: list[Verdict | None]
    losses: np.ndarray


@dataclass(frozen=True)
class Kept:
    """Losses on text that has nothing to do with the training, by language or by file."""

    name: str
    learned: np.ndarray  # (rows,) learned tokens
    losses: dict[str, np.ndarray]  # of each model, (rows,)


@dataclass(frozen=True)
class Score:
    """Everything that is told about a file of rows.

    Args:
        questions: of all rows, in order.
        learned: (rows,) learned tokens of each row.
        results: of each model by its name, the base first.
        about: what was scored, and how: adapter, base, settings, versions of libraries, date.
        trained: names of the functions that training has seen; None if nobody knows them.
        notes: what is to be known about the figures, such as questions that were left out.
    """

    title: str
    rows: list[Row]
    questions: list[Question]
    learned: np.ndarray
    results: dict[str, Result]
    about: dict[str, Any]
    kept: list[Kept] = field(default_factory=list)
    trained: set[str] | None = None
    notes: list[Note] = field(default_factory=list)

    @cached_property
    def figures(self) -> list["Figure"]:
        """The lines of the main table. They are computed once, since a bootstrap over many rows takes a while."""
        return find_figures(self)

    @cached_property
    def kept_figures(self) -> list["Figure"]:
        """The lines on unrelated text."""
        return find_kept_figures(self)

    @property
    def references(self) -> dict[str, str]:
        """The model that each model but the first is compared with: the base for the tuned one, and that for others."""
        first, *others = self.results
        return {model: TRAINED if TRAINED in others and model != TRAINED else first for model in others}

    def judged(self, model: str) -> list[tuple[Question, Verdict]]:
        """The questions that a model was asked, with what became of them."""
        verdicts = self.results[model].verdicts
        return [(asked, verdict) for asked, verdict in zip(self.questions, verdicts, strict=True) if verdict]


@dataclass(frozen=True)
class Figure:
    """A line of a table: one figure of each model, and its difference to that of the model's reference.

    Args:
        count: how many questions, expected arguments or learned tokens the figure is of.
        form: "%" for a share, "" for a number such as a loss.
    """

    name: str
    count: int
    form: str
    values: dict[str, Estimate]
    differences: dict[str, Estimate]

    def to_json(self) -> dict:
        values, differences = (
            {model: dict(zip(("value", "low", "high"), map(number, estimate), strict=True)) for model, estimate in held}
            for held in (self.values.items(), self.differences.items())
        )
        return {"name": self.name, "n": self.count, "unit": self.form, "values": values, "difference": differences}


def number(value: float) -> float | None:
    """A number of JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


Part = Callable[[Verdict], tuple[float, float]]  # what a question adds above and below a figure's line


def share(holds: Callable[[Verdict], bool], among: Callable[[Verdict], bool]) -> Part:
    return lambda verdict: (float(among(verdict) and holds(verdict)), float(among(verdict)))


def expects_call(verdict: Verdict) -> bool:
    return verdict.expects_call


def expects_text(verdict: Verdict) -> bool:
    return not verdict.expects_call


def arguments(above: Callable[[int, int, int], float], below: Callable[[int, int, int], float]) -> Part:
    """Of the (right, given, expected) arguments of a question's calls, what stands above and below the line."""

    def part(verdict: Verdict) -> tuple[float, float]:
        counts = count_arguments(verdict.pairs)
        return above(*counts), below(*counts)

    return part


RATES: dict[str, Part] = {
    "decision right": share(lambda one: one.gives_call == one.expects_call, lambda one: True),
    "needless calls": share(lambda one: one.gives_call, expects_text),
    "missed calls": share(lambda one: not one.gives_call, expects_call),
    "function right": share(lambda one: one.has_right_names, expects_call),
    "call exact": share(lambda one: one.is_exact, expects_call),
    "call nearly exact": share(lambda one: one.is_nearly_exact, expects_call),
    "text exact": share(lambda one: one.is_exact, expects_text),
    "text nearly exact": share(lambda one: one.is_nearly_exact, expects_text),
}
OF_ARGUMENTS: dict[str, Part] = {
    "argument precision": arguments(lambda right, given, expected: right, lambda right, given, expected: given),
    "argument recall": arguments(lambda right, given, expected: right, lambda right, given, expected: expected),
    "argument F1": arguments(lambda right, given, expected: 2 * right, lambda right, given, expected: given + expected),
}


def find_figures(score: Score) -> list[Figure]:
    """The lines of the main table. Lines of calls are left out where rows have none, and those of texts likewise."""
    found = [rate for name, part in RATES.items() if (rate := figure_of(score, name, part)).count]
    if has_calls(score):
        expected = int(ratio_of(score, next(iter(score.results)), OF_ARGUMENTS["argument recall"]).wholes.sum())
        of_arguments = [figure_of(score, name, part, is_rate=False) for name, part in OF_ARGUMENTS.items()]
        found += [replace(figure, count=expected) for figure in of_arguments if expected]
    if len(kinds_of_calls(score)) == 2:
        for name, is_seen in (("seen", True), ("unseen", False)):
            part = share(lambda one: one.is_exact, lambda one, seen=is_seen: calls_seen(one, score.trained) is seen)
            found.append(figure_of(score, f"exact, {name} functions", part))
    losses = {model: result.losses for model, result in score.results.items()}
    return [*found, loss_figure("loss per token", score.learned, losses, score.references)]


def has_calls(score: Score) -> bool:
    return any(question.calls for question in score.questions)


def kinds_of_calls(score: Score) -> set[bool]:
    """Whether the right calls are of functions that training has seen (True), of others (False), or of both."""
    if score.trained is None:
        return set()
    judged = score.judged(next(iter(score.results)))
    return {calls_seen(verdict, score.trained) for _, verdict in judged if verdict.expects_call}


def find_notes(score: Score) -> list[Note]:
    """The notes of a score, and why it has no lines of functions that training has seen and has not, if it has none."""
    kinds = kinds_of_calls(score)
    return [*score.notes, *([Note(ALL_SEEN if True in kinds else NONE_SEEN)] if len(kinds) == 1 else [])]


def calls_seen(verdict: Verdict, trained: set[str]) -> bool | None:
    """Whether all calls that are right are of functions seen in training; None where no call is right."""
    if not verdict.expects_call:
        return None
    return all(pair.expected.name in trained for pair in verdict.pairs if pair.expected)


def figure_of(score: Score, name: str, part: Part, is_rate: bool = True) -> Figure:
    ratios = {model: ratio_of(score, model, part) for model in score.results}
    return make_figure(name, "%", ratios, score.references, is_rate)


def ratio_of(score: Score, model: str, part: Part) -> Ratio:
    parts, wholes = np.zeros(len(score.rows)), np.zeros(len(score.rows))
    for question, verdict in score.judged(model):
        above, below = part(verdict)
        parts[question.row] += above
        wholes[question.row] += below
    return Ratio(parts, wholes)


def make_figure(name: str, form: str, ratios: dict[str, Ratio], references: dict[str, str], is_rate: bool) -> Figure:
    """A figure with intervals: Wilson's of a rate of questions, a bootstrap's of any other and of differences."""
    values = {
        model: wilson(int(ratio.parts.sum()), int(ratio.wholes.sum())) if is_rate else bootstrap(ratio)
        for model, ratio in ratios.items()
    }
    differences = {model: bootstrap(ratios[model], ratios[reference]) for model, reference in references.items()}
    return Figure(name, int(next(iter(ratios.values())).wholes.sum()), form, values, differences)


def loss_figure(name: str, learned: np.ndarray, losses: dict[str, np.ndarray], references: dict[str, str]) -> Figure:
    """The loss per learned token of the rows that every model could take."""
    fits = ~np.isnan(np.stack(list(losses.values()))).any(axis=0)
    ratios = {model: Ratio(summed[fits], learned[fits]) for model, summed in losses.items()}
    return make_figure(name, "", ratios, references, is_rate=False)


def find_kept_figures(score: Score) -> list[Figure]:
    """The loss per token on unrelated text: what the training cost of what the model could do before."""
    return [
        loss_figure(f"loss per token, {kept.name}", kept.learned, kept.losses, score.references) for kept in score.kept
    ]


def find_decisions(score: Score, model: str) -> dict[str, int]:
    """The two by two table of a model: how many questions want a call or a text, and were given one."""
    counts = {f"{wanted}, {given} given": 0 for wanted in ("call", "text") for given in ("call", "text")}
    for _, verdict in score.judged(model):
        wanted, given = ("call" if one else "text" for one in (verdict.expects_call, verdict.gives_call))
        counts[f"{wanted}, {given} given"] += 1
    return counts


def count_unreadable(score: Score, model: str) -> int:
    """How many of a model's answers look like a call and cannot be read: they count as calls that were given."""
    return sum(bool(answer and answer.fault) for answer in score.results[model].answers)


@dataclass
class Counts:
    """Calls of a function, or one of its arguments, that the rows expect, and what a model made of them."""

    expected: int = 0
    given: int = 0
    right: int = 0  # of a function: exact calls; of an argument: with the right value
    named: int = 0  # of a function: calls with the right name
    right_arguments: int = 0
    arguments: int = 0  # of the calls, expected and given ones together

    @property
    def f1(self) -> float | None:
        return 2 * self.right_arguments / self.arguments if self.arguments else None


def by_function(score: Score, model: str) -> dict[str, Counts]:
    """What a model made of each function's calls, by the function's name."""
    found: dict[str, Counts] = {}
    for pair in pairs_of(score, model):
        right, given, expected = count_arguments([pair])
        named = {call.name for call in (pair.expected, pair.given) if call}
        for name in sorted(named):
            counts = found.setdefault(name, Counts())
            is_expected, is_given = (bool(call) and call.name == name for call in (pair.expected, pair.given))
            counts.expected += is_expected
            counts.given += is_given
            counts.named += is_expected and is_given
            counts.right += is_expected and pair.is_exact
            counts.right_arguments += right
            counts.arguments += (expected if is_expected else 0) + (given if is_given else 0)
    return dict(sorted(found.items()))


def by_argument(score: Score, model: str) -> dict[tuple[str, str], Counts]:
    """What a model made of each argument, by (function, argument)."""
    found: dict[tuple[str, str], Counts] = {}
    for pair in pairs_of(score, model):
        for call, counted in ((pair.expected, "expected"), (pair.given, "given")):
            for name in call.arguments if call else ():
                counts = found.setdefault((call.name, name), Counts())
                setattr(counts, counted, getattr(counts, counted) + 1)
        for name in pair.right_arguments:
            found[pair.expected.name, name].right += 1
    return dict(sorted(found.items()))


def pairs_of(score: Score, model: str) -> list[Pair]:
    return [pair for _, verdict in score.judged(model) for pair in verdict.pairs]


def to_json(score: Score) -> dict[str, Any]:
    """Every figure, and every question with what is right and what each model gave."""
    models = list(score.results)
    return {
        "title": score.title,
        "about": score.about,
        "models": models,
        "references": score.references,
        "rows": len(score.rows),
        "questions": len(score.questions),
        "notes": [str(note) for note in find_notes(score)],
        "figures": [figure.to_json() for figure in score.figures],
        "unrelated_text": [figure.to_json() for figure in score.kept_figures],
        "decisions": {model: find_decisions(score, model) for model in models},
        "unreadable": {model: count_unreadable(score, model) for model in models},
        "faults": {model: count_faults(verdict for _, verdict in score.judged(model)) for model in models},
        "classes": CLASSES,
        "functions": {
            model: [
                vars(counts) | {"function": name, "f1": counts.f1, "seen": seen(score, name)} for name, counts in held
            ]
            for model, held in ((model, by_function(score, model).items()) for model in models)
        },
        "arguments": {
            model: [
                {"function": function, "argument": argument}
                | {key: getattr(counts, key) for key in ("expected", "given", "right")}
                for (function, argument), counts in by_argument(score, model).items()
            ]
            for model in models
        },
        "answers": describe_answers(score),
    }


def seen(score: Score, function: str) -> bool | None:
    return None if score.trained is None else function in score.trained


def describe_answers(score: Score) -> list[dict]:
    """Every question as JSON: its place, the turns before it, what was expected, and what each model gave."""
    return [
        {
            "place": question.place,
            "history": [describe_turn(turn) for turn in question.history.turns],
            "expected": {
                "text": question.text,
                "calls": [{"name": turn.name, "arguments": turn.parameters} for turn in question.calls],
            },
            "given": {model: describe_answer(result, i) for model, result in score.results.items()},
        }
        for i, question in enumerate(score.questions)
    ]


def describe_turn(turn) -> dict:
    if turn.role != "tool":
        return {"role": turn.role, "content": turn.content}
    result = {"result": turn.observation} if turn.observed else {}
    return {"role": turn.role, "name": turn.name, "arguments": turn.parameters} | result


def describe_answer(result: Result, i: int) -> dict | None:
    """What a model gave to question i, as JSON; None if it was not asked."""
    answer, verdict = result.answers[i], result.verdicts[i]
    if answer is None or verdict is None:
        return None
    return {
        "fault": verdict.fault,
        "nearly_exact": verdict.is_nearly_exact,
        "text": answer.text,
        "calls": [call._asdict() for call in answer.calls],
        "reasoning": answer.reasoning,
        "unreadable": answer.fault,
        "finish_reason": answer.finish_reason,
        "raw": answer.raw,
    }
