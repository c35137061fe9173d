"""Writes the model card of a final adapter or an export, README.md in English and Chinese, from what is recorded."""

import hashlib
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..run.files import write_atomically
from ..run.log import harmless, redact
from ..run.manifest import CARD
from ..trust import read_model_json
from .facts import (
    EXACT_AS_TRAINED,
    EXACT_BESIDE_FULL,
    SCORE,
    describe_adapter,
    describe_base,
    describe_data,
    describe_training,
    is_chatglm,
    read_record,
    read_score,
)
from .licences import copy_licences, find_licences, name_left

LIBRARIES = {  # kind of folder: the library that loads it
    "adapter": "peft",
    "merged": "transformers",
    "glm": "transformers",
    "gguf": "gguf",
    "glm-adapter": "peft",
}
MARK = "<!-- written by Luciole; a card that differs from this sum is somebody's own, and is left alone: "
SHOWN = 3  # names of a source's files


def write_card(
    folder: Path,
    kind: str,
    base: str,
    adapter: Path | None = None,
    made: dict | None = None,
    record: dict | None = None,
) -> None:
    """Write a folder's card, and copy the base's licence files into it.

    Args:
        folder: one that is being made; all its other files are there.
        kind: one of LIBRARIES. "adapter": as it was trained; "merged": official names; "glm": GlmForCausalLM;
            "gguf": files for llama.cpp; "glm-adapter": an adapter under GLM's names.
        base: folder or hub name.
        adapter: what was trained; None for an export of the base alone.
        made: how an export was made: "into" ("trained" or "full") of a merge, and "dtype", of its numbers.
        record: the adapter's manifest; by default its own is read.
    """
    copy_licences(base, folder)
    record = record if record is not None else read_record(adapter) if adapter else {}
    (folder / CARD).write_text(render(folder, kind, base, adapter, made or {}, record), encoding="utf-8")


def renew_card(adapter: Path) -> list[Path]:
    """Put the score that lies beside a final adapter into its card, and return the card's name; nothing where the card
    shows it already, or somebody has changed the card."""
    card = adapter / CARD
    if not card.is_file() or not is_unchanged(card.read_bytes()):
        return []
    base = read_model_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    new = render(adapter, "adapter", base, adapter, {}, read_record(adapter)).encode()
    if new == card.read_bytes():
        return []
    write_atomically(card, new)
    return [card]


def score_file(adapter: Path) -> Path:
    """The file of figures that an adapter's card shows."""
    return adapter.absolute().parent / SCORE


def render(folder: Path, kind: str, base: str, adapter: Path | None, made: dict, record: dict) -> str:
    """The text of a card."""
    facts = {
        "kind": kind,
        "base": describe_base(base, record),
        "adapter": describe_adapter(folder if LIBRARIES[kind] == "peft" else adapter, record) if adapter else None,
        "data": describe_data(record),
        "training": describe_training(record),
        "is_chatglm": is_chatglm(base, record),
        "score": read_score(adapter) if adapter else None,
        "made": {"into": None, "dtype": None} | made,
        "files": sorted(path.name for path in folder.iterdir()),
        "gguf": sorted(path.name for path in folder.glob("*.gguf")),
        "licences": [path.name for path in find_licences(folder)],
        "licences_left": name_left(base, folder),
        "measured": (EXACT_AS_TRAINED, EXACT_BESIDE_FULL),
    }
    template = environment().get_template("card.md.jinja")
    english, chinese = (template.render(facts, say=say).strip() for say in (in_english, in_chinese))
    return sign(redact(f"---\n{head(facts)}\n---\n\n{english}\n\n{chinese}\n"))


def in_english(english: Any, chinese: Any) -> Any:
    return english


def in_chinese(english: Any, chinese: Any) -> Any:
    return chinese


def head(facts: dict) -> str:
    """The card's YAML as the hub reads it. Without a licence, which the base's decides, and without a base that has no
    name there."""
    kind, adapter = facts["kind"], facts["adapter"]
    tags = ["luciole"] + ["lora"] * (LIBRARIES[kind] == "peft")
    tags += ["qlora"] * bool(adapter and adapter["bits"] == 4)
    return ModelCardData(
        base_model=facts["base"]["hub"],
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=sorted(tags),
    ).to_yaml()


def sign(text: str) -> str:
    return f"{text}\n{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_unchanged(card: bytes) -> bool:
    """Whether a card is as it was written, without a word of anybody's."""
    text = card.decode(errors="replace")
    return text == sign(text.rpartition(f"\n{MARK}")[0])


@cache
def environment() -> Environment:
    filters = {"code": code, "names": names, "quoted": quoted, "shell": shell}
    filters |= {"n": show_number, "share": show_share, "interval": show_interval}
    loaded = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    loaded.filters |= filters
    return loaded


def plain(name: str) -> str:
    """A name in one line, and without what could end a code span or a table's cell: that is shown by its number."""
    return "".join(f"U+{ord(c):04X}" if c in "`|\\" else c for c in harmless(name, kept=""))


def code(name: str) -> str:
    """A name as a code span, in which nothing is read as Markdown or HTML."""
    return f"`{plain(name)}`" if name.strip() else "–"


def names(listed: list[str], shown: int = SHOWN) -> str:
    more = f", … ({len(listed):,})" if len(listed) > shown else ""
    return ", ".join(map(code, listed[:shown])) + more


def quoted(name: str) -> str:
    """A name as a literal of Python."""
    return '"' + plain(name).replace('"', "U+0022") + '"'


def shell(name: str) -> str:
    """A name as a word of a shell."""
    return shlex.quote(plain(name))


def show_number(value: float | None, places: int | None = None) -> str:
    if value is None:
        return "–"
    if places is not None:
        return f"{value:,.{places}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def show_share(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{part / whole:.1%}"


def show_interval(estimate: tuple, is_share: bool) -> str:
    """A figure of a score with its interval: `48.0% [41.2, 54.9]`."""
    factor, places, unit = (100, 1, "%") if is_share else (1, 3, "")
    value, low, high = (None if part is None else f"{factor * part:.{places}f}" for part in estimate)
    if value is None:
        return "–"
    return f"{value}{unit}" if low is None or high is None else f"{value}{unit} [{low}, {high}]"
