"""The data sets of a run: one source, a mixture of several, or a stream."""

from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import numpy as np
from loguru import logger
from torch.utils.data import ConcatDataset, Subset

from ..run.errors import unusable
from ..run.files import write_atomically
from .dataset import SFTDataset, Source
from .rules import DataRules, judge, log_report
from .store import REJECTED
from .stream import StreamingSFTDataset


def load_datasets(
    args, make: type[SFTDataset], tokenizer, seed: int, output_dir: str | None, *, goes_on: bool = False
) -> tuple:
    """Load the training data of a run, and its evaluation data if there is any. What was found in them is logged.

    Args:
        args: QLoRAArguments.
        make: a class of DATA_FORMATS.
        output_dir: the folder for `rejected.jsonl`, which is written if rows were rejected.
        goes_on: whether the run continues from a checkpoint. If so, a stream's first rows were checked when it began.

    Returns:
        The training data (SFTDataset, Mixture or StreamingSFTDataset), and the evaluation data (SFTDataset or None).
        Both are cheap to pickle.
    """
    rules, workers = rules_of(args), args.preprocessing_workers
    with_rejected: dict[Path, None] = {}  # folders of stores with rejected rows, each once

    def load(source: Source) -> SFTDataset:
        part = make(source, tokenizer, cache_dir=args.cache_dir, workers=workers, judged=False, **asdict(rules))
        if output_dir and part.store.report.bad:
            with_rejected[part.store.folder] = None
            path = Path(output_dir, REJECTED)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, b"".join((folder / REJECTED).read_bytes() for folder in with_rejected))
            except OSError as error:
                raise unusable(f"{path} could not be written ({error}); make room, or choose another", error) from error
            logger.warning(f"rejected rows and why: {path}")
        judge(part.store.report, part.files, rules)
        log_report(part.store.report, part.files, rules)
        return part

    weights = args.train_file if isinstance(args.train_file, dict) else {}
    sources, shares = list(weights) or [args.train_file], list(weights.values()) or [1.0]
    evaluated = load(args.eval_file) if args.eval_file else None
    if args.streaming:
        trained = StreamingSFTDataset(sources, shares, make.render, tokenizer, rules, seed, check=not goes_on)
    else:
        loaded = [load(source) for source in sources]
        trained = Mixture(loaded, shares, seed) if weights else loaded[0]
    return trained, evaluated


def require_stores(*datasets) -> None:
    """Open the stores of datasets that rank 0 has loaded, on another machine (SFTDataset.require_store)."""
    for part in chain.from_iterable(map(parts_of, datasets)):
        part.require_store()


def parts_of(dataset) -> list[SFTDataset]:
    """The sources of a dataset that `load_datasets` made, each as rendered to a store. A stream has none."""
    parts = dataset.dataset.datasets if isinstance(dataset, Mixture) else [dataset]
    return [part for part in parts if isinstance(part, SFTDataset)]


def describe_sources(dataset) -> list[dict]:
    """Names of the files of each source of a dataset and, unless it is a stream, how much of them is learned."""
    if isinstance(dataset, StreamingSFTDataset):
        return [{"files": [file.name for file in files]} for files in dataset.files]
    found = []
    for part in parts_of(dataset):
        counts = {key: getattr(part.store.report, key) for key in ("rows", "kept", "tokens", "learned")}
        found.append({"files": [file.name for file in part.files]} | counts)
    return found


def rules_of(args) -> DataRules:
    return DataRules(**{rule.name: getattr(args, rule.name) for rule in fields(DataRules)})


class Mixture(Subset):
    """A mixture of datasets: as many samples as the parts have together, divided among the parts by weight.

    A part that is larger than its share gives a random selection. A smaller one is repeated whole as often as it fits
    into its share, and a random selection fills the rest.
    """

    def __init__(self, parts: list[SFTDataset], weights: list[float], seed: int):
        draw = np.random.default_rng(seed)
        total = sum(map(len, parts))
        chosen, offset = [], 0
        ends = np.round(np.cumsum(weights) / sum(weights) * total).astype(int)
        for part, count, weight in zip(parts, np.diff(ends, prepend=0).tolist(), weights, strict=True):
            times, rest = divmod(count, len(part))
            whole = np.tile(np.arange(len(part)), times)
            chosen += [offset + whole, offset + draw.permutation(len(part))[:rest]]
            offset += len(part)
            logger.info(f"{part.files[0]}: {count} of {total} samples by its weight of {weight:g}")
        super().__init__(ConcatDataset(parts), np.concatenate(chosen))

    def find_place(self, input_ids: list[int]) -> str | None:
        """`file:line` of the first sample that has these tokens, or None."""
        return next(filter(None, (part.find_place(input_ids) for part in self.dataset.datasets)), None)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.concatenate([part.lengths for part in self.dataset.datasets])[self.indices]
