"""Training data: one class for each conversation format, and the table that picks one."""

import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from loguru import logger
from torch.utils.data import Dataset

from ..chatglm import prompt
from ..run.errors import DataError, unusable
from ..run.files import comes_into_sight, fingerprint, make_once
from .cache import cache_folder
from .chat_template import render_chat_template
from .conversation import Conversation, Turn
from .formats import detect_format
from .prepare import RowRenderer, as_item, check_tokenizer, fill_store
from .reader import find_files, read_rows
from .render import render_chatglm2, render_chatglm3, render_firefly
from .rules import DataRules, judge
from .store import Missing, TokenStore

Source = str | Path | list[str] | list[Path]
PROGRAM = [*sorted(Path(__file__).parent.glob("*.py")), Path(prompt.__file__)]  # the code that renders rows
FIRST_ROWS = 20  # of a file, by which its format is detected


class SFTDataset(Dataset):
    """Samples in Firefly's format. All rows are read, checked and rendered when the dataset is made, unless cached.

    An item is a dict of int lists of one length, at most `max_seq_length`: `input_ids`, `attention_mask` (ones) and
    `target_mask` (1: this token is learned). Items are made anew at each access.

    Args:
        source: a file of rows in any format of component.data.formats, a folder, a glob, or a list of these.
        tokenizer: of the model to be trained.
        max_seq_length: in tokens.
        cache_dir: folder of rendered data; by default `$XDG_CACHE_HOME/luciole` or `~/.cache/luciole`.
        workers: processes that render; by default one for each core.
        judged: whether to raise if too many rows are bad; if false, the caller calls `judge`.
        rules: the other fields of DataRules.

    Raises:
        DataError: bad rows (file, line, field), too many of them, or no row left to learn from.
        StorageError: the disk is full.
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
        self.renderer = RowRenderer(self.render, check_tokenizer(tokenizer, self.render), self.rules)
        self.cache_dir, self.workers = cache_dir, workers
        with faults_of_files():
            data, self.key = self.fingerprints()
            self.open_or_make(data)
        if judged:
            judge(self.store.report, self.files, self.rules)

    def fingerprints(self) -> tuple[str, str]:
        """(of the data, of the data and all that renders it)."""
        data = fingerprint(self.files)
        return data, fingerprint([data, *map(str, self.files), *cache_key_parts(self.renderer)])

    @property
    def folder(self) -> Path:
        """The store's, in this machine's cache."""
        return cache_folder(self.cache_dir) / self.key

    @cached_property
    def store(self) -> TokenStore:
        return TokenStore(self.folder)

    def __getstate__(self) -> dict:
        """All but the open store: to another process goes the folder's name, not the data."""
        return {name: value for name, value in self.__dict__.items() if name != "store"}

    def open_or_make(self, data: str) -> None:
        """Open the store, and make it where there is none, or where another process removes it before it is open."""
        while "store" not in vars(self):
            make_once(self.folder, lambda empty: self.fill(empty, data))
            with suppress(Missing):
                self.store  # noqa: B018  opens it, as does the first look at it in another process

    def fill(self, folder: Path, data: str) -> None:
        fill_store(self.files, self.renderer, self.workers or len(os.sched_getaffinity(0)), folder)
        if fingerprint(self.files) != data:
            raise DataError(f"{self.files[0]}: the data changed while it was read; start again when it is complete")

    def require_store(self) -> None:
        """Open the store on another machine than the one that made it, or make it here from the same files where it is
        not seen.

        Raises:
            DataError: the files are not here, cannot be read, or hold something else; or the store is damaged.
        """
        if not comes_into_sight(self.folder):
            self.make_again()
        self.store  # noqa: B018  opens it

    def make_again(self) -> None:
        fault = f"the prepared data {self.folder} is not there, and"
        remedy = "set cache_dir to a folder that all machines share, or have the same data under the same path on each"
        if missing := [file for file in self.files if not os.access(file, os.R_OK)]:
            raise DataError(f"{fault} {missing[0]}, to make it from, cannot be read; {remedy}")
        with faults_of_files():
            data, key = self.fingerprints()
            if key != self.key:
                raise DataError(f"{fault} {self.files[0]} or the program is not what rank 0 made it with; {remedy}")
            self.open_or_make(data)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self.store.ends, prepend=0)

    def place(self, index: int) -> str:
        """`file:line` of a sample."""
        number, line = self.store.place(index)
        return f"{self.files[number]}:{line}"

    def find_place(self, input_ids: list[int]) -> str | None:
        """`file:line` of the first sample with these tokens; None if there is none."""
        for index in np.flatnonzero(self.lengths == len(input_ids)).tolist():
            if np.array_equal(self.store[index][0], input_ids):
                return self.place(index)
        return None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        input_ids, target_mask = self.store[index]
        return as_item(input_ids.tolist(), target_mask.tolist())


class ChatGLM2SFTDataset(SFTDataset):
    """Samples of Firefly's rows as ChatGLM2's rounds."""

    render = staticmethod(render_chatglm2)


class ChatGLM3SFTDataset(SFTDataset):
    """Samples of ChatGLM3's messages, with system prompts, `tools` and function calls."""

    render = staticmethod(render_chatglm3)


class ChatTemplateSFTDataset(SFTDataset):
    """Samples as the tokenizer's own chat template writes them."""

    render = staticmethod(render_chat_template)


DATA_FORMATS: dict[str, type[SFTDataset]] = {
    "chatglm2": ChatGLM2SFTDataset,
    "chatglm3": ChatGLM3SFTDataset,
    "firefly": SFTDataset,
    "chat_template": ChatTemplateSFTDataset,
}


@contextmanager
def faults_of_files() -> Iterator[None]:
    """Within it, what is wrong with a file is a Fault."""
    try:
        yield
    except OSError as error:
        remedy = "the data must be readable, and cache_dir a folder with room in which files can be written"
        raise unusable(f"{error}; {remedy}", error) from error


def cache_key_parts(renderer: RowRenderer) -> list[str | Path]:
    """Everything that decides how a row is rendered: rules, the size of the vocabulary's embedding, the tokenizer as it
    would be saved, this program and the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        renderer.tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        saved = [part for path in files for part in (path.name, fingerprint([path]))]
    settings = asdict(renderer.rules)
    decisive = {key: value for key, value in settings.items() if key not in ("on_bad_row", "max_bad_share")}
    program = fingerprint([*PROGRAM, Path(inspect.getfile(type(renderer.tokenizer)))])
    libraries = map(version, ("transformers", "tokenizers", "sentencepiece"))
    return [renderer.render.__name__, json.dumps(decisive), str(renderer.rows), *saved, program, *libraries]


def select_format(
    model_name_or_path: str, data_format: str | None = None, chat_template: str | None = None
) -> tuple[str, str]:
    """Choose which of DATA_FORMATS to train with: (format, reason).

    `data_format` decides if given, and `chat_template` asks for the format of that name; else `chatglm2` or `chatglm3`
    in the last part of the name (any case), else ChatGLM's version where config.json has it, as in a merged folder,
    else Firefly's. The folders above do not count: `chatglm3_project/Qwen2.5-7B` is no ChatGLM.

    Raises:
        DataError: an unknown `data_format`, or a folder whose config.json says something else than its name.
    """
    if data_format is not None:
        if data_format not in [*DATA_FORMATS]:  # a list, since a manifest may hold anything
            raise DataError(f"data_format is {data_format!r}; expected one of {', '.join(DATA_FORMATS)}")
        return data_format, "data_format says so"
    if chat_template:
        return "chat_template", "chat_template asks for it"
    last = last_part(model_name_or_path)
    found = max(("chatglm2", "chatglm3"), key=last.lower().rfind)
    named = found in last.lower()
    config = Path(model_name_or_path, "config.json")
    model_type = read_model_type(config)
    version = read_chatglm_version(config) if model_type == "chatglm" else None
    if version and not named:
        return f"chatglm{version}", f"{config} is of ChatGLM{version}"
    if model_type and named != (model_type == "chatglm"):
        name = f"contains {found!r}" if named else "contains neither 'chatglm2' nor 'chatglm3'"
        choice = "firefly or chat_template" if named else "chatglm2 or chatglm3"
        glm4 = "" if named else " (for GLM-4 take its transformers checkpoint, glm-4-9b-chat-hf)"
        raise DataError(
            f"{config}: model_type is {model_type!r}, but the folder's name {last!r} {name}: rename the folder, or set "
            f"data_format to {choice}{glm4}"
        )
    if version and f"chatglm{version}" != found:
        raise DataError(
            f"{config} is of ChatGLM{version}, but the folder's name {last!r} contains {found!r}: rename the folder, "
            "or set data_format to chatglm2 or chatglm3"
        )
    if named:
        return found, f"model_name_or_path contains {found!r}"
    return "firefly", f"the name {last!r} contains neither 'chatglm2' nor 'chatglm3'"


def last_part(model_name_or_path: str) -> str:
    """A model's name: the last part of its path or hub name, or the repository's name if it lies in the hub's cache."""
    parts = Path(os.path.abspath(model_name_or_path)).parts
    if len(parts) > 2 and parts[-2] == "snapshots":  # …/models--THUDM--chatglm3-6b/snapshots/<commit>
        return parts[-3].rpartition("--")[2]
    return parts[-1]


def read_model_type(config: Path) -> str | None:
    """A config.json's model_type; None where it cannot be read, which loading the model reports better."""
    try:
        return json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def read_chatglm_version(config: Path) -> str | None:
    """ChatGLM's version, 2 or 3, by a config.json's own key or the name that it gives the model; else None."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    names = re.findall(r"chatglm([23])", str(values.get("_name_or_path", "")).rpartition("/")[2].lower())
    own = values.get("chatglm_version")
    return str(own) if own in (2, 3) else names[-1] if names else None


def check_choice(args, data_format: str, tokenizer) -> None:
    """Refuse to train a model with a chat template of its own in Firefly's format, unless that was asked for.

    Rows in Firefly's own format are trained in it, with a warning. Any other rows could mean either format.

    Args:
        args: QLoRAArguments.

    Raises:
        DataError: `data_format` must be named.
    """
    if args.data_format or data_format != "firefly" or not tokenizer.chat_template:
        return
    model = args.model_name_or_path
    source = list(args.train_file) if isinstance(args.train_file, dict) else args.train_file
    kinds = {file: kind for file in find_files(source) if (kind := kind_of_rows(file))}
    other = next((file for file, kind in kinds.items() if kind != "firefly"), None)
    if other:
        raise DataError(
            f"{model} has a chat template of its own, and {other} holds rows of the kind {kinds[other]!r}, which can "
            "be trained in two ways; choose one:\n"
            "  data_format=chat_template  as the model's template writes them: for a model that can chat already\n"
            "  data_format=firefly        <s>question</s>answer</s>, as Firefly does: for a base model\n"
            'Add one of them to the command, or "data_format" to the file of settings'
        )
    logger.warning(
        f"{model} has a chat template of its own, and Firefly's rows are trained as <s>question</s>answer</s>, which a "
        "model that can chat already does not know; data_format=chat_template trains them by its template "
        "(data_format=firefly: as now, without this warning)"
    )


def warn_of_endless_answers(data_format: str, tokenizer) -> None:
    """Warn if an answer ends on none of the tokenizer's `stops`, so that transformers' generate would go on."""
    if data_format != "chat_template" or not tokenizer.stops:
        return
    short = Conversation((Turn("user", "1"), Turn("assistant", "2", learned=True)))
    with suppress(DataError):
        sample = render_chat_template(short, tokenizer)
        end = sample.input_ids[max(i for i, learned in enumerate(sample.target_mask) if learned)]
        if end not in tokenizer.stops:
            logger.warning(
                f"answers end on {tokenizer.convert_ids_to_tokens(end)}, at which generate does not stop by the base's "
                f"generation_config.json or config.json: give it eos_token_id={end} when you chat"
            )


def kind_of_rows(file: Path) -> str | None:
    """Which of ROW_FORMATS a file's first readable row is in; None if none of its FIRST_ROWS is in any."""
    for _, row in islice(read_rows(file), FIRST_ROWS):
        with suppress(DataError):
            if not isinstance(row, DataError):
                return detect_format(row)
    return None


def select_dataset(model_name_or_path: str, data_format: str | None = None) -> type[SFTDataset]:
    """The dataset class for a model, see `select_format`."""
    return DATA_FORMATS[select_format(model_name_or_path, data_format)[0]]
