"""Log lines, and what no line may hold."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

# What libraries tell their own developers, or of what is as it should be here: logger, and how the line begins.
CHATTER = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)S?$")
SECRET_TEXT = re.compile(r"(?<=://)[^/\s'\"]+@|\bhf_\w{20,}")


def redact(text: str) -> str:
    """A text without the values of environment variables that are secret by their name (of 8 characters on),
    credentials in URLs, and Hugging Face tokens."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name):
            text = text.replace(value, f"<{name}>")
    return SECRET_TEXT.sub(lambda match: "<credentials>@" if match[0].endswith("@") else "<token>", text)


class RedactedStream:
    """Standard output or error, all that is written to which passes `redact`: lines, tables, tracebacks, warnings."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.stream.write(redact(text))


def configure_logging(rank: int) -> None:
    """One readable line an event, above the progress bar; of other ranks than 0 what is bound to `any_rank` alone.
    Libraries speak up from warnings on.

    Nothing that is printed from here on holds a secret.
    """
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, RedactedStream) else RedactedStream(stream) for stream in (sys.stdout, sys.stderr)
    )
    logger.remove()
    logger.add(
        lambda line: tqdm.write(line, file=sys.stderr, end=""),
        format="{time:HH:mm:ss} {level: <7} {message}",
        filter=lambda record: rank == 0 or "any_rank" in record["extra"],
        diagnose=False,  # a traceback shows code, never the values of variables
    )
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).handlers = [logging.lastResort]  # theirs hold the error stream of their import
    transformers_logging.set_verbosity(logging.WARNING if rank == 0 else logging.ERROR)
    transformers_logging.disable_progress_bar()
    for name in CHATTER:
        logging.getLogger(name).addFilter(is_for_users)
    # How peft reads a renamed property; what component.model.warn_of_cpu says with the remedy.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="CUDA initialization: ")


def is_for_users(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(CHATTER[record.name])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers says nothing below errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
