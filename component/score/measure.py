"""Asks models the questions of rows and measures their losses: the base, the tuned model, and its merges."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from ..data.messages import question_answer_pairs
from ..data.render import TokenizedSample
from ..export.merge import merged_model, name_of, plan_merge, requantise
from ..inference.calls import Answer
from ..inference.engine import Engine
from ..inference.sampling import Sampling
from ..inference.session import Session
from ..kernel.decoder import longest_conversation
from ..kernel.model import base_of
from ..run.errors import DataError, NumericError
from ..run.files import fingerprint
from ..run.log import counted
from ..run.manifest import versions
from ..train.identity import describe_data
from ..trust import find_adapter_weights, read_run
from .comparison import compare
from .figures import BASE, TRAINED, Kept, Note, Result, Score
from .losses import count_learned, longest_answer, render_row, summed_losses
from .questions import Question, Row, called_functions, read_scored_rows

VARIANTS = ("trained", "merged", "full", "requantised")
KEEP = Path(__file__).resolve().parents[2] / "data/keep.jsonl"  # everyday questions, no row of which is trained on
REQUANTISED_BITS = (8, 4)
SPARE = 16  # tokens that an answer may have beyond the longest right one, and as many more as a quarter of that
LANGUAGES = (("Chinese", True), ("English", False))
TELL = 10  # seconds between two lines of progress
MANY = 1000  # rows whose rendering is told of, and questions at the end of a run that are warned of
PAIRED = ("chatglm2", "firefly")  # formats of questions and answers alone
RECALL = "recall: these rows were learned, so this shows what was kept of them, and not how new ones go"
LONG_QUESTIONS = "{n} of the questions left out: longer than the model's context of {room} tokens"
LONG_ROWS = "{n} of the rows left out of the loss: longer than the model's context of {room} tokens"


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
        max_new_tokens: by default what the longest right answer needs, and some more. A warning tells if it is less.

    Raises:
        DataError: a row has something that the model's format cannot write; the text names file and line.
    """

    def render(listed: list[Row]) -> list[TokenizedSample]:
        return [render_row(row, session.render, session.tokenizer) for row in listed]

    if len(rows) >= MANY:
        logger.info(f"rendering {counted(len(rows), 'row')} and their questions")
    if session.data_format in PAIRED:
        require_pairs(rows, session.data_format)
    samples = render(rows)
    questions = [question for row in rows for question in row.questions(session.data_format)]
    prompts = []
    for question in questions:
        try:
            prompts.append(session.prompt(question.history))
        except DataError as error:
            raise DataError(f"{question.place}: {error}") from None
    longest = longest_answer(samples)
    if max_new_tokens and max_new_tokens < longest:
        logger.warning(
            f"max_new_tokens is {max_new_tokens:,}, and the longest right answer has {longest:,} tokens: whoever gives "
            "it is truncated, and wrong"
        )
    others = {name: render(listed) for name, listed in kept.items()}
    return Task(rows, questions, prompts, samples, others, max_new_tokens or longest + longest // 4 + SPARE)


def require_pairs(rows: list[Row], data_format: str) -> None:
    """Raise DataError, by file and line, for a row with more than questions and answers, which have no place in a
    format of PAIRED."""
    remedy = "score rows of questions and answers alone, or a model that was trained with data_format chat_template"
    for row in rows:
        try:
            question_answer_pairs(row.conversation, data_format, remedy)
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None


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
) -> tuple[set[str] | None, list[Note]]:
    """Find which functions the training has seen (None if nobody knows), and what is to be told of that.

    Args:
        data: the source of `rows`. If these are the rows that the adapter has learned, its manifest tells.
        train_rows: those of --train_file, if that was given.
    """
    run = read_run(adapter) if adapter else {}
    if run.get("data") == describe_data(data, streaming=False):
        return None, [Note(RECALL)]
    return (called_functions(train_rows) if train_rows is not None else None), []


class Progress:
    """Logs every TELL seconds how much of one model's answers or losses is done, and how long the rest will take.

    Args:
        model: its name.
        total: how many things there are.
        things: what they are, such as answers.
        together: how many things are at work at once. Before so many are done, how long one takes is not known.
    """

    def __init__(self, model: str, total: int, things: str, together: int = 1):
        self.model, self.total, self.things = model, total, things
        self.enough = min(together, (total + 1) // 2)
        self.done, self.started, self.told = 0, time.monotonic(), time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told < TELL:
            return
        self.told = now
        left = ""
        if self.done >= self.enough:
            left = f", {(now - self.started) / self.done * (self.total - self.done):.0f} s left"
        logger.info(f"{self.model}: {self.done:,} of {self.total:,} {self.things}{left}")


def score_models(
    session: Session,
    task: Task,
    title: str,
    variants: Sequence[str] = ("trained",),
    batch: int = 64,
    trained: set[str] | None = None,
    notes: Sequence[Note] = (),
) -> Score:
    """Let the base and the tuned model, or the base alone where the session has no adapter, do a task. The base and
    the tuned model are the same loaded weights.

    Args:
        variants: of VARIANTS; others than "trained" are loaded one after another, and the session's model is given
            up for them.
        batch: conversations that are answered at once.
        trained: names of functions that training has seen; None if nobody knows.
    """
    started = time.monotonic()
    room = longest_conversation(session.model.config)
    notes = [*notes, *find_left_out(task, room)]
    results, kept = {}, {name: {} for name in task.kept}
    models = list_models(session, variants)
    for names, make in models:
        for name, result, others in measure(session, make(), names, task, batch):
            results[name] = result
            for language, found in others.items():
                kept[language][name] = found
        if len(models) > 1:
            session.model = None  # makes room for the merges
    others = [Kept(language, count_learned(task.kept[language]), found) for language, found in kept.items()]
    learned = count_learned(task.samples)
    logger.info(f"scored in {time.monotonic() - started:.0f} s")
    about = describe(session, task, batch)
    return Score(title, task.rows, task.questions, learned, results, about, others, trained, notes)


def find_left_out(task: Task, room: int) -> list[Note]:
    """Notes of the questions and rows that a model with a context of `room` tokens cannot take."""
    questions = sum(len(prompt) >= room for prompt in task.prompts)
    rows = sum(len(sample.input_ids) > room for sample in task.samples)
    found = [(LONG_QUESTIONS, questions), (LONG_ROWS, rows)]
    return [Note(text, {"n": f"{n:,}", "room": f"{room:,}"}) for text, n in found if n]


def describe(session: Session, task: Task, batch: int) -> dict[str, Any]:
    """What is scored, and how, as JSON."""
    adapter = session.adapter
    return {
        "adapter": adapter and {"path": str(adapter), "digest": fingerprint([find_adapter_weights(adapter)])},
        "base": session.base,
        "base_bits": session.base_bits,
        "dtype": name_of(session.dtype),
        "data_format": session.data_format,
        "max_new_tokens": task.max_new_tokens,
        "batch": batch,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    return model.to(session.dtype)  # it is rounded to its own type, and computes as the tuned model does


def measure(
    session: Session, model, columns: dict[str, bool], task: Task, batch: int
) -> list[tuple[str, Result, dict[str, np.ndarray]]]:
    """(name, result, losses of unrelated text by name) of each column of one model."""
    room = longest_conversation(model.config)
    found = {}
    for name, adapted in columns.items():
        progress = Progress(name, len(task.samples) + sum(map(len, task.kept.values())), "rows for the loss")
        groups = [task.samples, *task.kept.values()]
        found[name] = [losses(model, samples, adapted, room, progress) for samples in groups]
    answers = ask(session, model, columns, task, room, batch)
    results = []
    for name, (own, *others) in found.items():
        verdicts = [
            given and compare(question, given) for question, given in zip(task.questions, answers[name], strict=True)
        ]
        results.append((name, Result(answers[name], verdicts, own), dict(zip(task.kept, others, strict=True))))
    return results


def ask(
    session: Session, model, columns: dict[str, bool], task: Task, room: int, batch: int
) -> dict[str, list[Answer | None]]:
    """The greedy answers of each column by one engine; None for a prompt that leaves no room for an answer."""
    answers: dict[str, list[Answer | None]] = {name: [None] * len(task.prompts) for name in columns}
    fitting = [i for i, prompt in enumerate(task.prompts) if len(prompt) < room]
    if not fitting:
        return answers
    longest = max(len(task.prompts[i]) for i in fitting) + task.max_new_tokens
    engine = Engine(model, session.stop_ids, max_batch=batch, max_tokens=min(longest, room))
    sampling = Sampling(task.max_new_tokens)
    for name, adapted in columns.items():
        progress = Progress(name, len(fitting), "answers", together=batch)
        waiting = {i: engine.submit(task.prompts[i], sampling, adapted) for i in fitting}
        while waiting:
            engine.step()
            ended = [i for i, generation in waiting.items() if generation.finish_reason]
            for i in ended:
                done = waiting.pop(i)
                answers[name][i] = session.read(done.tokens, done.finish_reason, task.questions[i].history.tools)
            progress.add(len(ended))
    return answers


def losses(model, samples: list[TokenizedSample], adapted: bool, room: int, progress: Progress) -> np.ndarray:
    """(samples,) the summed losses of rows; NaN for those that are longer than the model's context.

    Raises:
        NumericError: one is not finite.
    """
    found = np.full(len(samples), np.nan)
    fitting = [i for i, sample in enumerate(samples) if len(sample.input_ids) <= room]
    found[fitting] = summed_losses(model, [samples[i] for i in fitting], adapted, progress.add)
    if not np.isfinite(found[fitting]).all():
        raise NumericError(
            f"{progress.model}: the loss of a row is not finite: a weight is not, or a number is too large for "
            f"{name_of(model.dtype)}; take weights from a checkpoint that is whole, or compute in another type"
        )
    progress.add(len(samples) - len(fitting))
    return found
