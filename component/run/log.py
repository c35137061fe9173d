"""Set-up and wording of log lines, and the removal of secrets from all output."""

import atexit
import logging
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from loguru import logger
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

# Lines of libraries that are hidden, since they are for developers or report what is intended here: the logger, and how
# the line begins.
CHATTER = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)S?$")
SECRET_TEXT = re.compile(r"(?<=://)[^/\s'\"]+@|\bhf_\w{20,}")
UNFINISHED = re.compile(r"(:(/(/[^/\s'\"]*)?)?|\bh(f(_\w*)?)?)\Z")  # a beginning of SECRET_TEXT, or one that may grow


def counted(number: float, thing: str, form: str = ",") -> str:
    """Write a number with what it counts: `1 row`, `2,000 rows`."""
    return f"{number:{form}} {thing}{'s' * (number != 1)}"


def harmless(text: str, kept: str = "\n\t") -> str:
    """A text whose characters that steer a terminal, or turn the order of others, are shown by number. Spaces of any
    width, and those that are `kept`, stay."""
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else f"U+{ord(c):04X}" for c in text
    )


def redact(text: str) -> str:
    """Remove secrets from a text: the values (8 characters or more) of environment variables with a secret's name,
    credentials in URLs, and Hugging Face tokens."""
    return redact_patterns(redact_values(text))


def redact_values(text: str) -> str:
    for name, value in secret_variables():
        text = text.replace(value, f"<{name}>")
    return text


def redact_patterns(text: str) -> str:
    return SECRET_TEXT.sub(lambda match: "<credentials>@" if match[0].endswith("@") else "<token>", text)


def secret_variables() -> list[tuple[str, str]]:
    return [(name, value) for name, value in os.environ.items() if len(value) >= 8 and SECRET_NAME.search(name)]


def find_unfinished(text: str) -> int:
    """Index from which on a text may be the beginning of a secret; its length if it ends with none."""
    match = UNFINISHED.search(text)
    starts = [match.start() if match else len(text)]
    for _, value in secret_variables():
        places = range(max(0, len(text) - len(value) + 1), len(text))
        starts += [at for at in places if text[at] == value[0] and value.startswith(text[at:])]
    return min(starts)


class RedactedStream:
    """Standard output or error without secrets: in lines, tables, tracebacks and warnings.

    A secret may come in several parts. So an end that may be a secret's beginning is held back, also at a flush, until
    the next part shows what it is, or until the program ends.
    """

    def __init__(self, stream):
        self.stream, self.held = stream, ""
        atexit.register(self.release)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        known = redact_values(self.held + text)
        end = find_unfinished(known)
        self.held = known[end:]
        self.stream.write(redact_patterns(known[:end]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def release(self) -> None:
        """Write what is held back."""
        held, self.held = self.held, ""
        with suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
            self.stream.write(redact_patterns(held))


def configure_logging(rank: int) -> None:
    """Set up logging: one readable line for each event, above the progress bar.

    Ranks other than 0 log only what is bound to `any_rank`. Libraries log from warnings on. Nothing that is printed
    from here on holds a secret.
    """
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, RedactedStream) else RedactedStream(stream) for stream in (sys.stdout, sys.stderr)
    )
    logger.remove()
    logger.add(
        lambda line: tqdm.write(harmless(line), file=sys.stderr, end=""),
        format="{time:HH:mm:ss} {level: <7} {message}",
        filter=lambda record: rank == 0 or "any_rank" in record["extra"],
        diagnose=False,  # a traceback shows code, never the values of variables
    )
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).handlers = [logging.lastResort]  # their own keep the error stream of before
    transformers_logging.set_verbosity(logging.WARNING if rank == 0 else logging.ERROR)
    transformers_logging.disable_progress_bar()
    for name in CHATTER:
        logging.getLogger(name).addFilter(is_for_users)
    # The first is caused by peft; the second is said by component.model.warn_of_cpu, with the remedy.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="CUDA initialization: ")


def is_for_users(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(CHATTER[record.name])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers within the block, but for errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
