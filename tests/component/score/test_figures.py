import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from component.data.conversation import Conversation, Turn
from component.inference.calls import Answer, Call
from component.score.comparison import CLASSES, compare
from component.score.figures import (
    ALL_SEEN,
    BASE,
    NONE_SEEN,
    TRAINED,
    UNREADABLE,
    Kept,
    Note,
    Result,
    Score,
    by_argument,
    by_function,
    find_decisions,
    find_figures,
    find_kept_figures,
    to_json,
)
from component.score.measure import LANGUAGES, LONG_QUESTIONS, LONG_ROWS, RECALL
from component.score.questions import Question, Row
from component.score.report import figures_of, html, table
from script.score import UNUSED

TOOLS = [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]}}]
TOOLS += [{"name": "time"}]
BEIJING, PARIS, TIME = Call("weather", {"city": "北京"}), Call("weather", {"city": "Paris"}), Call("time", {})
ABOUT = {
    "adapter": {"path": "run/final", "digest": "0" * 32},
    "base": "models/nano",
    "base_bits": 16,
    "dtype": "float32",
    "date": "2026-01-01T00:00:00+00:00",
    "versions": {"torch": "2"},
}
HOSTILE = "</script><img src=x onerror=alert(1)>\033[2J&amp;"


def ask(row: int, *calls: Call, text: str = "") -> Question:
    expected = [Turn("tool", name=call.name, parameters=call.arguments, learned=True) for call in calls]
    expected = expected or [Turn("assistant", text, learned=True)]
    return Question(f"rows.jsonl:{row + 1}", row, Conversation((Turn("user", f"q{row}"),), TOOLS), tuple(expected))


def score_of(rows: list[list[Question]], losses: dict[str, list[float]], answers: dict[str, list], **more) -> Score:
    listed = [Row(asked[0].place, asked[0].row, asked[0].history) for asked in rows]
    questions = [question for row in rows for question in row]
    results = {
        model: Result(
            given,
            [answer and compare(question, answer) for question, answer in zip(questions, given, strict=True)],
            np.array(losses[model]),
        )
        for model, given in answers.items()
    }
    return Score("rows.jsonl", listed, questions, np.array([10.0] * len(rows)), results, **{"about": ABOUT} | more)


@pytest.fixture
def score() -> Score:
    """Three rows with four questions: two calls in the first, a text, and a call that did not fit."""
    rows = [[ask(0, BEIJING), ask(0, PARIS)], [ask(1, text="Hi.")], [ask(2, TIME)]]
    answers = {
        "base": [Answer("?"), Answer(fault="unparsable"), Answer(calls=(TIME,)), None],
        "tuned": [Answer(calls=(BEIJING,)), Answer(calls=(BEIJING,)), Answer("Hi."), None],
    }
    return score_of(rows, {"base": [30, 20, np.nan], "tuned": [10, 10, np.nan]}, answers, trained={"weather"})


def test_the_figures_are_those_that_were_counted_by_hand(score):
    found = {figure.name: figure for figure in find_figures(score)}
    values = {name: (figure.count, *(v.value for v in figure.values.values())) for name, figure in found.items()}
    assert values == {
        "decision right": (3, pytest.approx(1 / 3), 1),  # what cannot be read is an attempt to call
        "needless calls": (1, 1, 0),
        "missed calls": (2, 0.5, 0),
        "function right": (2, 0, 1),
        "call exact": (2, 0, 0.5),
        "call nearly exact": (2, 0, 0.5),
        "text exact": (1, 0, 1),
        "text nearly exact": (1, 0, 1),
        "argument precision": (2, pytest.approx(np.nan, nan_ok=True), 0.5),
        "argument recall": (2, 0, 0.5),
        "argument F1": (2, 0, 0.5),
        "loss per token": (20, 2.5, 1),
    }
    assert found["text exact"].values["tuned"] == pytest.approx((1, 0.2065, 1), abs=1e-4)  # 1 / (1 + 3.8415)
    assert found["loss per token"].differences["tuned"] == pytest.approx((-1.5, -2, -1))
    assert found["call exact"].differences["tuned"].value == 0.5


def test_every_decision_falls_in_one_of_four_cells(score):
    cells = {"call, call given": 1, "call, text given": 1, "text, call given": 1, "text, text given": 0}
    assert find_decisions(score, "base") == cells
    assert sum(find_decisions(score, "tuned").values()) == 3


def test_functions_and_arguments_have_tables_of_their_own(score):
    weather, time = by_function(score, "tuned")["weather"], by_function(score, "base")["time"]
    assert (weather.expected, weather.given, weather.named, weather.right, weather.f1) == (2, 2, 2, 1, 0.5)
    assert (time.expected, time.given, time.right, time.f1) == (0, 1, 0, None)
    city = by_argument(score, "tuned")["weather", "city"]
    assert (city.expected, city.given, city.right) == (2, 2, 1)
    assert by_argument(score, "base")["weather", "city"].given == 0


def test_a_call_of_another_function_counts_for_both():
    score = score_of([[ask(0, TIME)]], {"base": [1]}, {"base": [Answer(calls=(BEIJING,))]})
    functions = by_function(score, "base")
    assert (functions["time"].expected, functions["time"].given) == (1, 0)
    assert (functions["weather"].expected, functions["weather"].given, functions["weather"].arguments) == (0, 1, 1)


def test_rows_without_calls_have_lines_of_texts_and_loss_alone():
    score = score_of([[ask(0, text="Hi.")]], {"base": [5]}, {"base": [Answer("Ho.")]})
    names = [figure.name for figure in find_figures(score)]
    assert names == ["decision right", "needless calls", "text exact", "text nearly exact", "loss per token"]
    assert "by function" not in table(score)


def test_other_merges_are_compared_with_the_model_as_trained(score):
    three = score_of(
        [score.questions[:2], score.questions[2:3], score.questions[3:]],
        {"base": [3, 3, 3], "tuned": [1, 1, 1], "merged": [2, 2, 2]},
        dict.fromkeys(("base", "tuned", "merged"), score.results["tuned"].answers),
    )
    assert three.references == {"tuned": "base", "merged": "tuned"}
    (loss,) = [figure for figure in find_figures(three) if figure.name == "loss per token"]
    assert {model: estimate.value for model, estimate in loss.differences.items()} == pytest.approx(
        {"tuned": -0.2, "merged": 0.1}
    )
    lines = [line.split() for line in table(three).splitlines()]
    assert lines.count(["n", "base", "tuned", "merged"]) == 1
    assert ["loss", "per", "token", "30", "0.300", "0.100", "0.200"] in lines
    assert ["loss", "per", "token", "-0.200*", "+0.100*"] in lines
    assert "difference of tuned to base, of the others to tuned (" in table(three)
    two = replace(three, results={model: three.results[model] for model in ("base", "tuned")})
    assert "difference" not in table(two)


MERGES = ("merged", "full", "merged to 8 bits", "merged to 4 bits", "full to 8 bits", "full to 4 bits")


def test_tables_fit_a_terminal(score):
    """With long numbers: a thousand right calls of one function, and a wrong one of another."""
    calls = [[ask(i, BEIJING)] for i in range(1000)] + [[ask(1000, TIME)]]
    given = [Answer(calls=(BEIJING,))] * 1001
    for models, columns in ((("base", "tuned"), 100), (("base", "tuned", *MERGES), 120)):
        losses = {model: [10 + i / 100 for i in range(1001)] for model in models}
        wide = score_of(calls, losses, dict.fromkeys(models, given))
        assert max(map(len, table(wide).splitlines())) <= columns
        wide = replace(wide, trained={"weather"})
        assert "exact, unseen functions" in table(wide)
        assert max(map(len, table(wide).splitlines())) <= columns + 2
    assert re.search(r"^ +n +base +tuned +merged +full +8 bits +4 bits +8 bits +4 bits$", table(wide), re.MULTILINE)


def test_lines_of_seen_functions_are_left_out_where_there_is_nothing_beside_them(score):
    """The call of another function did not fit, so that nothing is known of it."""
    assert "functions" not in "".join(figure.name for figure in score.figures)
    assert "\nevery right call is of a function that training has seen, so there are no others" in table(score)
    assert "\nno right call is of a function that training has seen" in table(replace(score, trained={"time"}))
    assert "right call is" not in table(replace(score, trained=None))
    rows = [[ask(0, BEIJING)], [ask(1, TIME)]]
    both = score_of(rows, {"base": [1, 1]}, {"base": [Answer(calls=(BEIJING,))] * 2}, trained={"weather"})
    values = {figure.name: (figure.count, figure.values["base"].value) for figure in both.figures}
    assert values["exact, seen functions"] == (1, 1)
    assert values["exact, unseen functions"] == (1, 0)
    assert "right call is" not in table(both)


def test_the_answers_that_look_like_calls_and_cannot_be_read_are_told_beside_the_decisions(score):
    assert re.search(r"^call given, cannot be read +1 +0$", table(score), re.MULTILINE)
    assert to_json(score)["unreadable"] == {"base": 1, "tuned": 0}
    readable = replace(score, results={"tuned": score.results["tuned"]})
    assert "call given, cannot be read" not in table(readable)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "adapter run/final, base models/nano in 32 bits, float32 arithmetic"),
        ({"base_bits": 4}, "adapter run/final, base models/nano in 4 bits, float32 arithmetic"),
        ({"dtype": "bfloat16", "adapter": None}, "model models/nano in 16 bits, bfloat16 arithmetic"),
    ],
)
def test_table_and_file_say_what_was_scored(score, changes, shown):
    score = replace(score, about=ABOUT | changes)
    assert table(score).splitlines()[1] == shown
    assert json.loads(figures_of(score))["about"] == ABOUT | changes


def test_text_that_has_nothing_to_do_with_the_training_has_a_loss_by_language(score):
    kept = Kept("Chinese", np.array([2.0, 2]), {"base": np.array([2.0, 4]), "tuned": np.array([3.0, 5])})
    more = replace(score, kept=[kept])
    (figure,) = find_kept_figures(more)
    assert figure.name == "loss per token, Chinese"
    assert (figure.values["base"].value, figure.values["tuned"].value) == (1.5, 2)
    assert figure.differences["tuned"] == (0.5, 0.5, 0.5)
    assert re.search(r"Chinese +4 +1.500 \[1.000, 2.000\] +2.000 .*\+0.500 \[\+0.500, \+0.500\]", table(more))


def test_the_table_in_the_terminal(score):
    text = table(score)
    assert text.startswith("rows.jsonl: 3 rows, 4 questions, of which 3 want a call and 1 a text\n")
    assert re.search(r"^ +n +base +tuned +tuned - base$", text, re.MULTILINE)
    assert re.search(r"^text exact +1 +0\.0% \[0\.0, 79\.3\] +100\.0% \[20\.7, 100\.0\] +\+100\.0%", text, re.MULTILINE)
    assert re.search(r"^weather  city +2 +0 \(0 given\) +1 \(2 given\)$", text, re.MULTILINE)
    assert re.search(r"^wrong value +0 +1$", text, re.MULTILINE)
    assert len({len(line) for line in text.splitlines()[4:16]}) == 1


def test_chinese_and_unprintable_names_leave_the_columns_of_the_table_in_line():
    calls = [Call("查询订单", {"订单号": 1}), Call("find_order", {"a": 1}), Call("\033[2J", {})]
    rows = [[ask(i, call)] for i, call in enumerate(calls)]
    text = table(score_of(rows, {"base": [1] * 3}, {"base": [Answer(calls=(call,)) for call in calls]}))
    lines = [line for line in text.splitlines() if line.endswith(" given)")]
    assert len(lines) == 5
    widths = [sum(1 + ("一" <= character <= "鿿") for character in line) for line in lines]
    assert len(set(widths[:3])) == len(set(widths[3:])) == 1


def test_figures_are_computed_once_for_table_page_and_file(score, monkeypatch):
    shown = table(score)

    def bootstrap(*_):
        raise AssertionError("the figures are there")

    monkeypatch.setattr("component.score.figures.bootstrap", bootstrap)
    assert table(score) == shown
    assert json.loads(figures_of(score))["figures"]


def test_the_file_of_figures_holds_every_question(score):
    facts = json.loads(figures_of(score))
    assert facts["faults"] == {
        "base": {"unparsable": 1, "missed call": 1, "needless call": 1},
        "tuned": {"wrong value": 1},
    }
    first, *_, last = facts["answers"]
    assert first["place"] == "rows.jsonl:1"
    assert first["history"] == [{"role": "user", "content": "q0"}]
    assert first["expected"] == {"text": "", "calls": [{"name": "weather", "arguments": {"city": "北京"}}]}
    assert first["given"]["base"]["text"] == "?"
    assert last["given"] == {"base": None, "tuned": None}
    assert "NaN" not in figures_of(score).decode()


class Page(HTMLParser):
    """Elements, attributes and text of a page; scripts hold text alone."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.inside = [], [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = dict(attrs).get("id", "program") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data


def hostile_score() -> Score:
    call = Call(HOSTILE, {HOSTILE: HOSTILE})
    turns = (Turn("system", HOSTILE), Turn("user", HOSTILE))
    question = Question(HOSTILE, 0, Conversation(turns, [{"name": HOSTILE}]), (Turn("assistant", HOSTILE),))
    called = Question(HOSTILE, 0, question.history, (Turn("tool", name=HOSTILE, parameters={HOSTILE: 1}),))
    answers = [Answer(HOSTILE * 2, raw=HOSTILE), Answer(calls=(call,), raw=HOSTILE)]
    about = ABOUT | {"adapter": {"path": HOSTILE, "digest": HOSTILE}, "base": HOSTILE}
    more = {"notes": [Note("{n}", {"n": HOSTILE})], "trained": set(), "about": about}
    return score_of([[question, called]], {"tuned": [1]}, {"tuned": answers}, **more)


def test_hostile_text_is_text_in_the_page_and_in_the_terminal():
    score = hostile_score()
    page = Page(html(score))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE not in html(score)
    assert "<" not in page.scripts["data"]
    assert json.loads(page.scripts["data"])["answers"][1]["given"]["tuned"]["text"] == HOSTILE * 2
    assert "\033" not in table(score)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(score):
    text = html(score)
    page = Page(text)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    digest = base64.b64encode(hashlib.sha256(page.scripts["program"].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "http" not in text.replace("http-equiv", "")
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:,"]
    assert "innerHTML" not in page.scripts["program"]
    assert "__" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)


def test_every_name_in_the_page_has_a_chinese_one(score):
    none = dict.fromkeys(score.results, np.zeros(3))
    kept = [Kept(name, np.ones(3), none) for name, _ in LANGUAGES]
    rows = [[ask(0, BEIJING)], [ask(1, TIME)]]
    both = score_of(rows, {"base": [1, 1]}, {"base": [Answer(calls=(BEIJING,))] * 2}, trained={"weather"})
    found = [to_json(one) for one in (replace(score, kept=kept), both)]
    names = {figure["name"] for facts in found for figure in facts["figures"] + facts["unrelated_text"]}
    assert "exact, unseen functions" in names
    names |= {
        *CLASSES,
        *found[0]["decisions"]["base"],
        UNREADABLE,
        BASE,
        TRAINED,
        *MERGES,
        "system",
        "user",
        "assistant",
        "tool",
        "adapter",
        "date",
    }
    names |= {RECALL, LONG_QUESTIONS, LONG_ROWS, ALL_SEEN, NONE_SEEN, UNUSED}
    translated = set(re.findall(r'"([^"]+)": "[^"]+"', html(score).split("const ZH = {")[-1].split("\n};")[0]))
    assert names <= translated


def test_the_worst_class_stands_first_in_the_page():
    rows = [[ask(i, text="Hi.")] for i in range(5)]
    answers = [Answer("Ho."), Answer("Ho."), Answer("Ho."), Answer(fault="?"), Answer("Hi.")]
    score = score_of(rows, {"base": [1] * 5}, {"base": answers})
    data = json.loads(Page(html(score)).scripts["data"])
    assert [answer["place"] for answer in data["answers"]] == [f"rows.jsonl:{line}" for line in (4, 1, 2, 3)]
    assert data["model"] == "base"


def test_more_wrong_answers_than_the_page_holds_are_counted(monkeypatch):
    monkeypatch.setattr("component.score.report.IN_PAGE", 20)
    count = 100
    rows = [[ask(i, text="Hi. " * 3000)] for i in range(count)]
    score = score_of(rows, {"base": [1] * count}, {"base": [Answer("Ho.")] * count})
    page = html(score)
    data = json.loads(Page(page).scripts["data"])
    assert (data["wrong"], len(data["answers"])) == (count, 20)
    assert data["answers"][0]["expected"]["text"].endswith("… (8,000 more characters)")
    assert len(page) < 200_000


def test_json_is_whole_where_a_model_was_asked_nothing():
    score = score_of([[ask(0, BEIJING)]], {"base": [np.nan], "tuned": [np.nan]}, {"base": [None], "tuned": [None]})
    assert to_json(score)["figures"][-1]["values"]["base"] == {"value": None, "low": None, "high": None}
    assert "–" in table(score)
