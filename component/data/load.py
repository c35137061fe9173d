"""The data sets of a run: one source, a mixture of several, or a stream."""

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from loguru import logger
from torch.utils.data import ConcatDataset, Subset

from ..run.errors import unusable
from ..run.files import write_atomically
from .dataset import SFTDataset, Source
from .rules import DataRules, judge, log_report
from .stream import StreamingSFTDataset


def load_datasets(
    args, make: type[SFTDataset], tokenizer, seed: int, output_dir: str | None, *, goes_on: bool = False
) -> tuple:
    """The training data and, if any, the evaluation data of a run; what was found in them is logged.

    Args:
        args: QLoRAArguments.
        make: of DATA_FORMATS.
        output_dir: where `rejected.jsonl` is written, if rows were.
        goes_on: the run goes on from a checkpoint, and a stream's first rows were checked when it began.

    Returns:
        (SFTDataset, Mixture or StreamingSFTDataset; SFTDataset or None). Both are cheap to pickle.
    """
    rules, workers = rules_of(args), args.preprocessing_workers
    with_rejected: dict[Path, None] = {}  # folders of stores, each once

    def load(source: Source) -> SFTDataset:
        part = make(source, tokenizer, cache_dir=args.cache_dir, workers=workers, judged=False, **asdict(rules))
        if output_dir and part.store.report.bad:
            with_rejected[part.store.folder] = None
            path = Path(output_dir, "rejected.jsonl")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, b"".join((folder / "rejected.jsonl").read_bytes() for folder in with_rejected))
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
    """Have, on another machine than rank 0's, the rows of what `load_datasets` returned there (SFTDataset)."""
    for dataset in datasets:
        for part in dataset.dataset.datasets if isinstance(dataset, Mixture) else [dataset]:
            if isinstance(part, SFTDataset):
                part.require_store()


def rules_of(args) -> DataRules:
    return DataRules(**{rule.name: getattr(args, rule.name) for rule in fields(DataRules)})


class Mixture(Subset):
    """As many samples as the parts have together, each part's share of them being its weight's.

    A part whose share is above its size is gone through again, and of one below a random selection is taken.
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
        """`file:line` of the first sample of these tokens."""
        return next(filter(None, (part.find_place(input_ids) for part in self.dataset.datasets)), None)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.concatenate([part.lengths for part in self.dataset.datasets])[self.indices]
