"""Chat templates for tokenizers that have none, or none that shows functions: ready ones by name, or from a file."""

import re
from pathlib import Path

from jinja2 import TemplateSyntaxError
from loguru import logger

from ..run.errors import ArgumentError

FOLDER = Path(__file__).parent
# Ready templates: the control tokens that they write, and the one at which every answer ends, if there is one.
READY = {
    "chatml": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "chatglm3": (("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "</s>"), None),
}


def set_chat_template(tokenizer, name_or_file: str) -> None:
    """Give a tokenizer another chat template, which is saved with it from then on.

    If every answer of a ready template ends on one token, this becomes the tokenizer's EOS.

    Args:
        name_or_file: one of READY, or a file with a Jinja template.

    Raises:
        ArgumentError: there is no such template, it is not Jinja, or the tokenizer lacks its control tokens.
    """
    if hasattr(tokenizer, "build_single_message"):
        raise ArgumentError("chat_template: ChatGLM's tokenizer writes its prompts itself; leave chat_template out")
    ready = name_or_file in READY
    file = FOLDER / f"{name_or_file}.jinja" if ready else Path(name_or_file)
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"chat_template: {name_or_file!r} cannot be read ({error}); give {' or '.join(READY)}, or a file with a "
            "Jinja template; for the tokenizer's own template set data_format to chat_template, and leave this out"
        ) from None
    if re.match(r'\s*\{\s*"', tokenizer.chat_template):
        raise ArgumentError(f"chat_template: {file}: holds JSON; give a file with the template's text alone")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ArgumentError(f"chat_template: {file}:{error.lineno}: not a Jinja template ({error.message})") from None
    except Exception:  # the template wants other messages than this one
        pass
    if ready:
        tokens, end = READY[name_or_file]
        known = control_tokens(tokenizer)
        if lacking := [token for token in tokens if token not in known]:
            raise ArgumentError(
                f"chat_template: {name_or_file} needs the control token {lacking[0]}, which the tokenizer lacks; give "
                "a file with a template that writes the tokenizer's own control tokens"
            )
        if end and end != tokenizer.eos_token:
            logger.info(f"chat_template: answers end on {end}, which becomes the tokenizer's EOS")
            tokenizer.eos_token = end


def control_tokens(tokenizer) -> dict[str, int]:
    """Ids of a tokenizer's control tokens by their texts."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
