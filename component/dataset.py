"""Training data: one class for each conversation format, and the table that picks one."""

import json
from array import array
from pathlib import Path

from loguru import logger
from torch.utils.data import Dataset

from .conversation import DataError, parse_chatglm3, parse_firefly, read_conversations
from .template import render_chatglm2, render_chatglm3, render_firefly


class SFTDataset(Dataset):
    """Firefly's format. All rows are read, checked and rendered when the dataset is made.

    An item is a dict of int lists of one length, at most `max_seq_length`: `input_ids`, `attention_mask` (ones) and
    `target_mask` (1: this token is learned). Items are made anew at each access.

    Longer rows are cut at the end; a row with no learned token before the cut is dropped, counted and logged.

    Args:
        file: a JSONL file.
        tokenizer: of the model to be trained.
        max_seq_length: in tokens.

    Raises:
        DataError: a bad row (file, line, field), or no row left to learn from.
    """

    parse = staticmethod(parse_firefly)
    render = staticmethod(render_firefly)

    def __init__(self, file: str | Path, tokenizer, max_seq_length: int):
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so no answer can be taught to end; set one in its folder")
        self.samples: list[tuple[array, bytes]] = []
        dropped, cut = [], 0
        for number, conversation in read_conversations(file, self.parse):
            sample = self.render(conversation, tokenizer)
            mask = bytes(sample.target_mask[:max_seq_length])
            # Nothing predicts the first token, so learning starts at the second.
            if any(mask[1:]):
                self.samples.append((array("i", sample.input_ids[:max_seq_length]), mask))
                cut += len(sample.input_ids) > max_seq_length
            else:
                dropped.append(number)
        logger.info(
            f"{file}: {len(self.samples)} rows to learn from; {cut} were cut to max_seq_length={max_seq_length}"
        )
        if dropped:
            logger.warning(
                f"{file}: dropped {len(dropped)} rows without a learned token in the first {max_seq_length}, the "
                f"first at line {dropped[0]}; raise max_seq_length to keep them"
            )
        if not self.samples:
            reason = f"no learned token survives max_seq_length={max_seq_length}" if dropped else "the file has no rows"
            raise DataError(f"{file}: nothing to learn: {reason}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        input_ids, target_mask = self.samples[index]
        return {
            "input_ids": input_ids.tolist(),
            "attention_mask": [1] * len(input_ids),
            "target_mask": list(target_mask),
        }


class ChatGLM2SFTDataset(SFTDataset):
    """Firefly's rows as ChatGLM2's rounds."""

    render = staticmethod(render_chatglm2)


class ChatGLM3SFTDataset(SFTDataset):
    """ChatGLM3's messages, with system prompts, `tools` and function calls."""

    parse = staticmethod(parse_chatglm3)
    render = staticmethod(render_chatglm3)


DATA_FORMATS: dict[str, type[SFTDataset]] = {
    "chatglm2": ChatGLM2SFTDataset,
    "chatglm3": ChatGLM3SFTDataset,
    "firefly": SFTDataset,
}


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
