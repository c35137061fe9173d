"""Keys of rows and turns beside those that a format reads, and what becomes of them. Standard library only.

There are three kinds. A key that would change what is learned gets its row refused with a remedy, unless its value
asks for nothing. A key that is known as a note about the row is left unread. Any other key is reported as not read.
"""

import re
from collections.abc import Callable, Container, Iterator
from typing import Any

from ..run.errors import DataError
from .conversation import describe

TURN_LISTS = ("conversations", "conversation", "messages")

# Notes about a row or a turn.
NOTES = """
    id idx index key uid uuid guid hash md5 source sources data_source origin url link dataset dataset_name subset
    split version category categories type kind class label task tasks task_type task_name domain topic topics subject
    field tag tags keywords lang language locale created created_at updated updated_at date time timestamp author
    annotator annotations model model_name generator engine license title note notes comment comments score scores
    rating ratings reward quality difficulty similarity toxicity metadata meta extra info intention num_turns turns
    round rounds length num_tokens tokens token_count end_turn status channel annotator_id parallel_tool_calls
    cache_control finish_reason stop_reason usage index_in_source
"""
HARMLESS = frozenset(NOTES.split())
HARMLESS_ENDING = re.compile(r"(^|_)(ids?|uuid|scores?|ratings?|url|hash|name|date|time|at|count|tokens|language)$")

# A predicate of values: true for those that ask for nothing, so that the key does no harm.
Neutral = Callable[[Any], bool]


def never(value: Any) -> bool:
    return False


def is_one(value: Any) -> bool:
    return value in (True, 1)


def is_false(value: Any) -> bool:
    return value in (False, 0)


def is_true(value: Any) -> bool:
    return value in (True, 1) or str(value).lower() == "true"


def not_false(value: Any) -> bool:
    return value is not False and str(value).lower() != "false"  # 0 is the name of a class


def meanings(*groups: tuple[str, Neutral, str]) -> dict[str, tuple[Neutral, str]]:
    return {key: (neutral, reason) for keys, neutral, reason in groups for key in keys.split()}


PREFERENCE = (
    "a comparison of answers (DPO), which cannot be learned here; keep the chosen answer as the last turn and remove "
    "chosen and rejected"
)
UNDESIRABLE = (
    "it marks an answer that is not to be given (KTO), and every answer is learned here; remove the row, or rename the "
    "key where it means something else"
)
EITHER = (
    (
        """chosen rejected chosen_response rejected_response chosen_messages rejected_messages chosen_answer
        rejected_answer preferred dispreferred preferred_output non_preferred_output margin negative_messages
        score_chosen score_rejected""",
        never,
        PREFERENCE,
    ),
    (
        "image images image_url image_path pixel_values video videos audio audios",
        never,
        "only text can be learned; remove the row, or the key where the text means the same without it",
    ),
    ("kto_tag desirable", is_true, UNDESIRABLE),
    ("label", not_false, UNDESIRABLE),
)
ROW_MEANINGS = meanings(
    *EITHER,
    (
        "loss loss_weight loss_scale weight train training trainable",
        is_one,
        "a row has no weight of its own; give its turns `loss`, weigh files in train_file, or remove it",
    ),
    (
        "system_prompt system_message system_instruction meta_instruction",
        never,
        "a system prompt by another name; name the key system",
    ),
    ("tools functions", never, "this kind of row has no calls; write it as messages with tools"),
    ("history", never, "earlier rounds, which this kind of row keeps among its turns; write them there"),
    ("input_ids target_mask loss_mask", never, "tokens are made here, of text; remove it"),
)
TURN_MEANINGS = meanings(
    *EITHER,
    ("prefix partial", is_false, "a beginning that is to be continued cannot be learned as an answer; write all of it"),
    ("refusal", never, "what the model writes stands in content; write the refusal there"),
    (
        "train_detail training_detail loss_mask mask ignore is_train trainable",
        never,
        "a turn is learned whole or not at all; split it into turns, or remove the key",
    ),
    (
        "tool_calls function_call tool_call_id",
        never,
        "OpenAI's calls; name the list of turns messages, or write tool turns",
    ),
    ("tools functions system", never, "this belongs to the row; give it as a key of the row"),
    ("reasoning_content reasoning thinking", never, "only messages have a place for reasoning; write the row so"),
)


def says_something(value: Any) -> bool:
    """Whether a key has a value: null and empty values count as none."""
    return value is not None and value not in ("", [], {})


def refuse_preference(row: dict) -> None:
    """Raise DataError for a row that compares answers, in whatever format."""
    for key in row:
        if ROW_MEANINGS.get(key, ("", ""))[1] == PREFERENCE and says_something(row[key]):
            raise DataError(f"{key}: {PREFERENCE}")
    if isinstance(row.get("output"), list):
        raise DataError(f"output is a list: {PREFERENCE}")


def refuse_meaning(holder: dict, read: Container[str], table: dict[str, tuple[Neutral, str]], place: str = "") -> None:
    """Raise DataError for a key that would change what is learned and that the format does not read."""
    for key, value in holder.items():
        if key in table and key not in read and says_something(value):
            neutral, reason = table[key]
            if not neutral(value):
                raise DataError(f"{place}{key} is {describe(value)}: {reason}")


def unread(holder: dict, read: Container[str], table: dict) -> Iterator[str]:
    """Keys that are not read, not in `table` and not known as notes."""
    for key, value in holder.items():
        known = key in read or key in table or key in HARMLESS or HARMLESS_ENDING.search(key)
        if not known and says_something(value):
            yield key


def turns_of(row: dict, read: Container[str]) -> Iterator[tuple[str, dict]]:
    """(place, turn) of those turns of a row that are objects."""
    for name in TURN_LISTS:
        turns = row.get(name) if name in read else None
        for i, turn in enumerate(turns if isinstance(turns, list) else ()):
            if isinstance(turn, dict):
                yield f"{name}[{i}].", turn
