"""Training data: one class for each conversation format, the table that picks one, mixtures and streams."""

import inspect
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from loguru import logger
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, get_worker_info

from . import conversation, formats, preprocessing, reader, template
from .cache import default_cache_dir, fingerprint, make_once, write_atomically
from .conversation import DataError
from .preprocessing import DataRules, RowRenderer, TokenStore, judge, prepare, read_files
from .reader import find_files
from .template import render_chat_template, render_chatglm2, render_chatglm3, render_firefly

Source = str | Path | list[str] | list[Path]
SHUFFLE_BUFFER = 1000  # samples of a stream among which the next is drawn
CHECKED_FIRST = 1000  # rows of a stream that are checked before anything expensive starts


class SFTDataset(Dataset):
    """Firefly's format. All rows are read, checked and rendered when the dataset is made, or found in the cache.

    An item is a dict of int lists of one length, at most `max_seq_length`: `input_ids`, `attention_mask` (ones) and
    `target_mask` (1: this token is learned). Items are made anew at each access.

    Args:
        source: a file of rows in any format of component.formats, a folder, a glob, or a list of these.
        tokenizer: of the model to be trained.
        max_seq_length: in tokens.
        cache_dir: folder of rendered data; by default `$XDG_CACHE_HOME/luciole` or `~/.cache/luciole`.
        workers: processes that render; by default one for each core.
        judged: raise where too many rows are bad; else `judge` is left to the caller.
        rules: the other fields of DataRules.

    Raises:
        DataError: bad rows (file, line, field), too many of them, or no row left to learn from.
    """

    render = staticmethod(render_firefly)

    def __init__(
        self,
        source: Source,
        tokenizer,
        max_seq_length: int,
        *,
        cache_dir: str | Path | None = None,
        workers: int | None = None,
        judged: bool = True,
        **rules,
    ):
        self.files = find_files(source)
        self.rules = DataRules(max_seq_length, **rules)
        self.renderer = RowRenderer(self.render, checked(tokenizer, self.render), self.rules)
        workers = workers or len(os.sched_getaffinity(0))
        try:
            data = fingerprint(self.files)
            key = fingerprint([data, *map(str, self.files), *identity(self.renderer)])
            folder = Path(cache_dir or default_cache_dir()).expanduser() / key
            make_once(folder, lambda empty: self.prepare(workers, empty, data))
            self.store = TokenStore(folder)
        except OSError as error:
            raise DataError(
                f"{error}; the data must be readable, and cache_dir a folder with room in which files can be written"
            ) from error
        if judged:
            judge(self.store.report, self.files, self.rules)

    def prepare(self, workers: int, folder: Path, data: str) -> None:
        prepare(self.files, self.renderer, workers, folder)
        if fingerprint(self.files) != data:
            raise DataError(f"{self.files[0]}: the data changed while it was read; start again when it is complete")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self.store.ends, prepend=0)

    def place(self, index: int) -> str:
        """`file:line` of a sample."""
        number, line = self.store.place(index)
        return f"{self.files[number]}:{line}"

    def find(self, input_ids: list[int]) -> str | None:
        """`file:line` of the first sample of these tokens."""
        for index in np.flatnonzero(self.lengths == len(input_ids)).tolist():
            if np.array_equal(self.store[index][0], input_ids):
                return self.place(index)
        return None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        input_ids, target_mask = self.store[index]
        return item(input_ids.tolist(), target_mask.tolist())


class ChatGLM2SFTDataset(SFTDataset):
    """Firefly's rows as ChatGLM2's rounds."""

    render = staticmethod(render_chatglm2)


class ChatGLM3SFTDataset(SFTDataset):
    """ChatGLM3's messages, with system prompts, `tools` and function calls."""

    render = staticmethod(render_chatglm3)


class ChatTemplateSFTDataset(SFTDataset):
    """The text of the tokenizer's own chat template."""

    render = staticmethod(render_chat_template)


DATA_FORMATS: dict[str, type[SFTDataset]] = {
    "chatglm2": ChatGLM2SFTDataset,
    "chatglm3": ChatGLM3SFTDataset,
    "firefly": SFTDataset,
    "chat_template": ChatTemplateSFTDataset,
}


class StreamingSFTDataset(IterableDataset):
    """Rows read, checked and rendered as they are needed, shuffled within a buffer; nothing is kept on disk.

    The first CHECKED_FIRST rows are checked when it is made. A bad row that comes later is logged and left out,
    whatever `on_bad_row` says, so that it does not end a run; more than `max_bad_share` of them do, and so does a file
    that cannot be read on. Several sources are drawn from by weight, and a pass ends with the first of them that does.

    A process reads every row and renders its share: of `ranks`, and of a loader's workers. One whose share is empty
    renders all, if the stream is endless.

    Args:
        endless: pass after pass, each with another order, so that a place in the stream is a number of samples.
        sources, weights: one weight for each source.
        render: of component.template.
    """

    def __init__(
        self, sources: list[Source], weights: list[float], render, tokenizer, rules: DataRules, seed: int, endless=False
    ):
        self.endless = endless
        self.files = [find_files(source) for source in sources]
        self.weights = weights
        self.renderer = RowRenderer(render, checked(tokenizer, render), rules)
        self.seed, self.epoch = seed, 0
        self.rank, self.ranks = 0, 1
        for files in self.files:
            self.check_first(files)

    def check_first(self, files: list[Path]) -> None:
        rows = read_files(files, self.renderer.rules.on_bad_row == "skip")
        report = preprocessing.DataReport()
        for chunk in preprocessing.chunks(itertools.islice(rows, CHECKED_FIRST)):
            preprocessing.add(report, preprocessing.render_chunk((self.renderer, chunk, True)), files)
        judge(report, files, self.renderer.rules)
        log_report(report, files, self.renderer.rules)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for number in itertools.count(self.epoch):
            found = False
            for sample in self.one_pass(number):
                found = True
                yield sample
            if not (self.endless and found):
                return

    def one_pass(self, number: int) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        workers, number_of = (worker.num_workers, worker.id) if worker else (1, 0)
        count, own = self.ranks * workers, self.rank * workers + number_of
        draw = random.Random(f"{self.seed} {number}")
        streams = [self.samples(files, count, own) for files in self.files]
        buffer: list[dict[str, list[int]]] = []
        while (sample := next(draw.choices(streams, self.weights)[0], None)) is not None:
            buffer.append(sample)
            if len(buffer) > SHUFFLE_BUFFER:
                at = draw.randrange(len(buffer))
                buffer[at], buffer[-1] = buffer[-1], buffer[at]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer

    def samples(self, files: list[Path], count: int, own: int) -> Iterator[dict[str, list[int]]]:
        """Those of every `count`-th row, from row `own` on."""
        bad, found = 0, False
        rows = itertools.islice(read_files(files, skips=True), own, None, count)
        for seen, (number, line, raw) in enumerate(rows, 1):
            try:
                sample, _ = self.renderer.fit(self.renderer.parse(raw)[0])
            except DataError as error:
                bad += 1
                place = f"{files[number]}:{line}"
                logger.bind(any_rank=True).warning(f"{place}: left out: {error}")
                share = self.renderer.rules.max_bad_share
                if seen > CHECKED_FIRST and bad > share * seen:
                    raise DataError(f"{place}: {bad} bad rows of {seen}, above max_bad_share={share:g}") from None
                continue
            if sample:
                found = True
                yield item(sample.input_ids, sample.target_mask)
        if self.endless and count > 1 and not found:
            yield from self.samples(files, 1, 0)


def load_datasets(args, make: type[SFTDataset], tokenizer, seed: int, output_dir: str | None) -> tuple:
    """The training data and, if any, the evaluation data of a run; what was found in them is logged.

    Args:
        args: QLoRAArguments.
        make: of DATA_FORMATS.
        output_dir: where `rejected.jsonl` is written, if rows were.

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
                raise DataError(f"{path} could not be written ({error}); make room, or choose another") from error
            logger.warning(f"rejected rows and why: {path}")
        judge(part.store.report, part.files, rules)
        log_report(part.store.report, part.files, rules)
        return part

    weights = args.train_file if isinstance(args.train_file, dict) else {}
    sources, shares = list(weights) or [args.train_file], list(weights.values()) or [1.0]
    evaluated = load(args.eval_file) if args.eval_file else None
    if args.streaming:
        trained = StreamingSFTDataset(sources, shares, make.render, tokenizer, rules, seed, endless=True)
    else:
        loaded = [load(source) for source in sources]
        trained = Mixture(loaded, shares, seed) if weights else loaded[0]
    return trained, evaluated


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

    def find(self, input_ids: list[int]) -> str | None:
        """`file:line` of the first sample of these tokens."""
        return next(filter(None, (part.find(input_ids) for part in self.dataset.datasets)), None)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.concatenate([part.lengths for part in self.dataset.datasets])[self.indices]


def log_report(report: preprocessing.DataReport, files: list[Path], rules: DataRules) -> None:
    """What became of the rows, for the log."""
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files from {files[0]} on"
    mean, learned = report.tokens / report.kept, report.learned / report.tokens
    logger.info(
        f"{name}: {report.kept:,} rows, {report.tokens:,} tokens, {learned:.0%} learned; mean length {mean:.0f}, "
        f"longest {report.longest}"
    )
    for kind, (count, first) in report.notes.items():
        logger.warning(f"{name}: {count:,} rows, the first at {first}: {kind} (max_seq_length={rules.max_seq_length})")
    for kind, (count, first) in report.odd.items():
        logger.warning(f"{name}: {count:,} rows, the first at {first}: {kind}")
    if report.bad:
        logger.warning("\n".join([f"{name}: {report.bad:,} bad rows left out", *report.fault_lines()]))


def item(input_ids: list[int], target_mask: list[int]) -> dict[str, list[int]]:
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "target_mask": target_mask}


def checked(tokenizer, render):
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so no answer can be taught to end; set one in its folder")
    if render is render_chat_template and not (tokenizer.is_fast and tokenizer.chat_template):
        raise DataError("data_format chat_template needs a fast tokenizer with a chat template; choose another format")
    return tokenizer


def identity(renderer: RowRenderer) -> list[str | Path]:
    """All that decides how a row is rendered: the rules that do, the tokenizer as it would be saved, this program and
    the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        renderer.tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        saved = [part for path in files for part in (path.name, fingerprint([path]))]
    rules = {key: value for key, value in asdict(renderer.rules).items() if key not in ("on_bad_row", "max_bad_share")}
    modules = (conversation, formats, preprocessing, reader, template, inspect.getmodule(type(renderer.tokenizer)))
    program = [fingerprint([Path(module.__file__)]) for module in modules]
    libraries = map(version, ("transformers", "tokenizers", "sentencepiece"))
    return [renderer.render.__name__, json.dumps(rules), *saved, *program, *libraries]


def select_format(model_name_or_path: str, data_format: str | None = None) -> tuple[str, str]:
    """Which of DATA_FORMATS to train with, and why.

    `data_format` decides if given; else `chatglm2` or `chatglm3` in the name (any case; the last one in a path), else
    Firefly's.

    Raises:
        DataError: an unknown `data_format`, or a folder whose config.json is ChatGLM's under a name that is not.
    """
    if data_format is not None:
        if data_format not in DATA_FORMATS:
            raise DataError(f"data_format is {data_format!r}; expected one of {', '.join(DATA_FORMATS)}")
        return data_format, "data_format says so"
    name = model_name_or_path.lower()
    found = max(("chatglm2", "chatglm3"), key=name.rfind)
    if found in name:
        return found, f"model_name_or_path contains {found!r}"
    config = Path(model_name_or_path, "config.json")
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "chatglm":
        raise DataError(
            f"{config} is a ChatGLM's, but {model_name_or_path!r} contains neither 'chatglm2' nor 'chatglm3': set "
            "data_format to chatglm2 or chatglm3 (for GLM-4 take its transformers checkpoint, glm-4-9b-chat-hf)"
        )
    return "firefly", "model_name_or_path contains neither 'chatglm2' nor 'chatglm3'"


def select_dataset(model_name_or_path: str, data_format: str | None = None) -> type[SFTDataset]:
    """The dataset class for a model, see `select_format`."""
    return DATA_FORMATS[select_format(model_name_or_path, data_format)[0]]
