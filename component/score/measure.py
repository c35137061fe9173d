"""Asks models the questions of rows and measures their losses: the base, the tuned model, and its merges."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loguru import logger

from ..data.render import TokenizedSample
from ..export.merge import merged_model, plan_merge, requantise
from ..inference.calls import Answer
from ..inference.engine import Engine
from ..inference.sampling import Sampling
from ..inference.session import Session
from ..kernel.decoder import longest_conversation
from ..kernel.model import base_of
from ..run.errors import DataError
from ..run.log import counted
from ..train.identity import describe_data
from ..trust import read_run
from .comparison import compare
from .figures import BASE, TRAINED, Kept, Result, Score
from .losses import count_learned, longest_answer, render_row, summed_losses
from .questions import Question, Row, called_functions, read_scored_rows

VARIANTS = ("trained", "merged", "full", "requantised")
KEEP = Path(__file__).resolve().parents[2] / "data/keep.jsonl"  # everyday questions, no row of which is trained on
REQUANTISED_BITS = (8, 4)
SPARE = 16  # tokens that an answer may have beyond the longest right one, and as many more as a quarter of that
LANGUAGES = (("Chinese", True), ("English", False))
TELL = 10  # seconds between two lines of progress


@dataclass(frozen=True)
class Task:
    """What each model is given.

    Attributes:
        prompts: token ids of each question's prompt.
        samples: the rows as training renders them.
        kept: rows of unrelated text, by name.
        max_new_tokens: of an answer.
    """

    rows: list[Row]
    questions: list[Question]
    prompts: list[list[int]]
    samples: list[TokenizedSample]
    kept: dict[str, list[TokenizedSample]]
    max_new_tokens: int


def prepare_task(
    session: Session, rows: list[Row], kept: dict[str, list[Row]], max_new_tokens: int | None = None
) -> Task:
    """Render rows and prompts. No weight is needed.

    Args:
        max_new_tokens: by default what the longest right answer needs, and some more.

    Raises:
        DataError: a row has something that the model's format cannot write; the text names file and line.
    """

    def render(listed: list[Row]) -> list[TokenizedSample]:
        return [render_row(row, session.render, session.tokenizer) for row in listed]

    samples = render(rows)
    questions = [question for row in rows for question in row.questions(session.data_format)]
    prompts = []
    for question in questions:
        try:
            prompts.append(session.prompt(question.history))
        except DataError as error:
            raise DataError(f"{question.place}: {error}") from None
    longest = longest_answer(samples)
    others = {name: render(listed) for name, listed in kept.items()}
    return Task(rows, questions, prompts, samples, others, max_new_tokens or longest + longest // 4 + SPARE)


def read_kept(file: Path, by_language: bool) -> dict[str, list[Row]]:
    """Read rows of unrelated text, by name: those with Chinese characters and the others, or all by the file's name."""
    if by_language and not file.exists():  # in a container, another data folder may lie over ours
        return {}
    rows = read_scored_rows(file)
    if not by_language:
        return {file.name: rows}
    chinese = [
        any("一" <= character <= "鿿" for turn in row.conversation.turns for character in turn.content) for row in rows
    ]
    groups = {
        name: [row for row, one in zip(rows, chinese, strict=True) if one is is_chinese]
        for name, is_chinese in LANGUAGES
    }
    return {name: group for name, group in groups.items() if group}


def find_trained(
    adapter: Path | None, data: str | list, rows: list[Row], train_rows: list[Row] | None
) -> tuple[set[str] | None, list[str]]:
    """Find which functions the training has seen (None if nobody knows), and what is to be told of that.

    Args:
        data: the source of `rows`. If these are the rows that the adapter has learned, its manifest tells.
        train_rows: those of --train_file, if that was given.
    """
    run = read_run(adapter) if adapter else {}
    if run.get("data") == describe_data(data, streaming=False):
        return None, ["recall: these rows were learned, so this shows what was kept of them, and not how new ones go"]
    return (called_functions(train_rows) if train_rows is not None else None), []


class Progress:
    """Logs every TELL seconds how much of the work is done, and how long the rest will take."""

    def __init__(self, total: int):
        self.total, self.done, self.started, self.told = total, 0, time.monotonic(), time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= TELL:
            self.told = now
            left = (now - self.started) / max(self.done, 1) * (self.total - self.done)
            logger.info(f"scored {self.done:,} of {self.total:,}, {left:.0f} s left")


def score_models(
    session: Session,
    task: Task,
    title: str,
    variants: Sequence[str] = ("trained",),
    batch: int = 64,
    trained: set[str] | None = None,
    notes: Sequence[str] = (),
) -> Score:
    """Let the base and the tuned model, or the base alone where the session has no adapter, do a task. The base and
    the tuned model are the same loaded weights.

    Args:
        variants: of VARIANTS; others than "trained" are loaded one after another.
        batch: conversations that are answered at once.
        trained: names of functions that training has seen; None if nobody knows.
    """
    room = longest_conversation(session.model.config)
    too_long = sum(len(prompt) >= room for prompt in task.prompts)
    notes = [*notes, *([left_out(too_long, "question", room)] if too_long else [])]
    if cut := sum(len(sample.input_ids) > room for sample in task.samples):
        notes.append(left_out(cut, "row", room) + " for the loss")
    results, kept = {}, {name: {} for name in task.kept}
    models = list_models(session, variants)
    columns = sum(len(names) for names, _ in models)
    progress = Progress(columns * (len(task.prompts) + len(task.samples) + sum(map(len, task.kept.values()))))
    for names, make in models:
        for name, result, others in measure(session, make(), names, task, batch, progress):
            results[name] = result
            for language, found in others.items():
                kept[language][name] = found
    others = [Kept(language, count_learned(task.kept[language]), found) for language, found in kept.items()]
    learned = count_learned(task.samples)
    return Score(title, task.rows, task.questions, learned, results, others, trained, notes)


def left_out(count: int, thing: str, room: int) -> str:
    return f"{counted(count, thing)} left out: longer than the model's context of {room:,} tokens"


def merges_of(variants: Sequence[str]) -> list[tuple[str, int]]:
    """(into what, bits of the merged weights or 0) of each merge among variants."""
    merges = [(into, 0) for into, name in (("trained", "merged"), ("full", "full")) if name in variants]
    return merges + [
        (into, bits) for into in ("trained", "full") for bits in REQUANTISED_BITS if "requantised" in variants
    ]


def check_variants(session: Session, variants: Sequence[str]) -> None:
    """Raise ArgumentError for a merge that would be refused, before anything is measured. No weight is read."""
    for into in dict(merges_of(variants)):
        plan_merge(session.adapter, session.base, into)


def list_models(session: Session, variants: Sequence[str]) -> list[tuple[dict[str, bool], Callable]]:
    """(columns by name, with whether the adapter is used; a function that gives the model) of each model. Columns of
    one model share its weights. A merge is made when it is asked for, and nothing here keeps it."""
    if base_of(session.model) is session.model:
        return [({BASE: False}, lambda: session.model)]
    columns = {BASE: False, TRAINED: True} if "trained" in variants else {BASE: False}
    models = [(columns, lambda: session.model)]
    for into, bits in merges_of(variants):
        name = {"trained": "merged", "full": "full"}[into] + f" to {bits} bits" * bool(bits)
        models.append(({name: False}, partial(make_merge, session, into, bits, name)))
    return models


def make_merge(session: Session, into: str, bits: int, name: str) -> torch.nn.Module:
    """A merge of the session's adapter in memory, rounded again to `bits` unless they are 0."""
    logger.info(f"making the variant {name}")
    gc.collect()  # what is left of the one before
    torch.cuda.empty_cache()
    model = merged_model(session.base, session.adapter, into, device=session.device).eval()
    if bits:
        requantise(model, bits)
    return model


def measure(
    session: Session, model, columns: dict[str, bool], task: Task, batch: int, progress: Progress
) -> list[tuple[str, Result, dict[str, np.ndarray]]]:
    """(name, result, losses of unrelated text by name) of each column of one model."""
    room = longest_conversation(model.config)
    answers = ask(session, model, columns, task, room, batch, progress)
    found = []
    for name, adapted in columns.items():
        verdicts = [
            given and compare(question, given) for question, given in zip(task.questions, answers[name], strict=True)
        ]
        result = Result(answers[name], verdicts, losses(model, task.samples, adapted, room, progress))
        others = {kind: losses(model, samples, adapted, room, progress) for kind, samples in task.kept.items()}
        found.append((name, result, others))
    return found


def ask(
    session: Session, model, columns: dict[str, bool], task: Task, room: int, batch: int, progress: Progress
) -> dict[str, list[Answer | None]]:
    """The greedy answers of each column, by one engine; None for a prompt that leaves no room for an answer."""
    answers: dict[str, list[Answer | None]] = {name: [None] * len(task.prompts) for name in columns}
    fitting = [i for i, prompt in enumerate(task.prompts) if len(prompt) < room]
    progress.add(len(columns) * (len(task.prompts) - len(fitting)))
    if not fitting:
        return answers
    longest = max(len(task.prompts[i]) for i in fitting) + task.max_new_tokens
    engine = Engine(model, session.stop_ids, max_batch=batch, max_tokens=min(longest, room))
    sampling = Sampling(task.max_new_tokens)
    waiting = {
        (name, i): engine.submit(task.prompts[i], sampling, adapted)
        for name, adapted in columns.items()
        for i in fitting
    }
    while waiting:
        engine.step()
        for name, i in [key for key, generation in waiting.items() if generation.finish_reason]:
            done = waiting.pop((name, i))
            answers[name][i] = session.read(done.tokens, done.finish_reason, task.questions[i].history.tools)
            progress.add(1)
    return answers


def losses(model, samples: list[TokenizedSample], adapted: bool, room: int, progress: Progress) -> np.ndarray:
    """(samples,) the summed losses of rows; NaN for those that are longer than the model's context."""
    found = np.full(len(samples), np.nan)
    fitting = [i for i, sample in enumerate(samples) if len(sample.input_ids) <= room]
    found[fitting] = summed_losses(model, [samples[i] for i in fitting], adapted, progress.add)
    progress.add(len(samples) - len(fitting))
    return found
