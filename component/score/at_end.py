"""The score of a run that is done, beside its final adapter (setting score_at_end)."""

from pathlib import Path

import torch
from loguru import logger

from ..inference.session import Session
from ..run.errors import DoesNotFit, Fault
from ..run.log import counted
from ..run.manifest import MANIFEST
from ..run.resume import FINAL
from .measure import KEEP, MANY, Task, find_trained, prepare_task, read_kept, score_models
from .questions import Row, read_scored_rows
from .report import table, write_files

FIGURES, PAGE = "score.json", "score.html"


def is_scored(folder: Path) -> bool:
    """Whether an output folder has a score that is newer than its final adapter."""
    figures, manifest = folder / FIGURES, folder / FINAL / MANIFEST
    return figures.is_file() and figures.stat().st_mtime >= manifest.stat().st_mtime


def read_eval_rows(args) -> list[Row]:
    """Read the rows that a run will be scored on. Raises DataError for what would only be found when it is done.

    Args:
        args: QLoRAArguments.
    """
    return read_scored_rows(args.eval_file, args.loss_on, skips=args.on_bad_row == "skip")


def check_eval_rows(args, data_format: str) -> None:
    """Raise DataError for rows that cannot be scored, and warn of so many that their score takes long."""
    questions = sum(len([*row.questions(data_format)]) for row in read_eval_rows(args))
    if questions > MANY:
        logger.warning(
            f"score_at_end: eval_file {args.eval_file} asks {counted(questions, 'question')} of both models, which may "
            "take long; a smaller eval_file takes less, and script/score.py --limit scores some of its rows later"
        )


def read_train_rows(args, task: Task) -> list[Row] | None:
    """Read the rows of training, whose functions are known, where calls are asked for. A stream is not read again."""
    if args.streaming or not any(question.calls for question in task.questions):
        return None
    source = list(args.train_file) if isinstance(args.train_file, dict) else args.train_file
    return read_scored_rows(source, args.loss_on, skips=True)


def session_of(args, data_format: str, tokenizer, folder: Path, model=None) -> Session:
    """A session of a run's final adapter: with the model that was trained, or with the adapter loaded from its folder.

    Args:
        model: with its adapter, as it was trained. None: it is loaded.
    """
    final = folder / FINAL
    if model is None:
        return Session.open(
            args.model_name_or_path,
            final,
            base_bits=args.base_bits,
            data_format=data_format,
            chat_template=args.chat_template,
        )
    dtype = getattr(torch, args.compute_dtype)
    return Session(
        tokenizer, data_format, model.eval(), args.base_bits, final, args.model_name_or_path, dtype, model.device
    )


def score_run(args, make_session, folder: Path) -> str:
    """Score a run's final adapter beside its base on eval_file, and write FIGURES and PAGE. Returns the table.

    Args:
        args: QLoRAArguments.
        make_session: gives the session; called here, so that its faults are told as the score's.
        folder: output_dir.

    Raises:
        Fault: the score could not be made. The final adapter is not touched.
    """
    try:
        rows = read_eval_rows(args)
        session = make_session()
        task = prepare_task(session, rows, read_kept(KEEP, by_language=True))
        trained, notes = find_trained(session.adapter, args.eval_file, rows, read_train_rows(args, task))
        score = score_models(session, task, f"eval_file {args.eval_file}", trained=trained, notes=notes)
        for file in write_files(score, folder / FIGURES, folder / PAGE):
            logger.info(f"score: {file}")
        return table(score)
    except (Fault, torch.cuda.OutOfMemoryError) as error:
        kind = type(error) if isinstance(error, Fault) else DoesNotFit
        raise kind(
            f"score_at_end: {error}; the final adapter is whole: {folder / FINAL}. The same command scores it again, "
            "and so does script/score.py"
        ) from error
