"""Options of the programs that open a model: which one, beside which base, with which prompts."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session


def add_model_options(parser: argparse.ArgumentParser, alone: str) -> None:
    """Add the options that `prepare_session` reads. `alone`: what the program does with a model without an adapter."""
    parser.add_argument("--adapter", metavar="FOLDER", help="such as output/x/final")
    parser.add_argument("--model", metavar="MODEL", help=f"{alone} this model alone, without an adapter")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name [the folder in adapter_config.json]")
    parser.add_argument("--base_bits", type=int, choices=(4, 16), help="bits of the base's weights [as in training]")
    parser.add_argument("--data_format", metavar="NAME", help="how conversations become tokens [as in training]")
    parser.add_argument("--chat_template", metavar="NAME", help="chat template instead of the adapter's or base's")


def check_model_options(parser: argparse.ArgumentParser, cli: argparse.Namespace) -> None:
    """End the program with a message if the options contradict one another."""
    if bool(cli.adapter) == bool(cli.model):
        parser.error("give either --adapter or --model")
    if cli.model and cli.base:
        parser.error("--base needs --adapter")


def prepare_session(cli: argparse.Namespace) -> "Session":
    """The session that the options ask for, without weights. Raises as Session.prepare does."""
    from .session import Session  # its libraries take seconds, which --help need not wait for

    return Session.prepare(
        cli.model or cli.base,
        cli.adapter,
        base_bits=cli.base_bits,
        data_format=cli.data_format,
        chat_template=cli.chat_template,
    )


def positive(text: str) -> int:
    """An option's value that must be a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
