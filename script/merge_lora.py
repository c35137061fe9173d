"""Merge an adapter into its base model: a folder that loads and runs as any other model does, without peft.

python script/merge_lora.py --adapter FOLDER --output FOLDER [--base MODEL] [--into trained|full] [--dtype TYPE]

Two merges can be meant. --into trained adds the adapter to the weights that it was trained beside: those of the base
after rounding to 4 bits and back. --into full adds it to the full-precision base, and is the default for adapters of
other tools, which do not record their base. The result is saved in --dtype; it is never quantised again, which would
round the adapter away: to do that with a program of your own, merge --into full. OUTPUT appears only when it is whole.
docs/quality.md compares the two.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from component.export.merge import MergePlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="such as output/x/final")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name [the folder in adapter_config.json]")
    parser.add_argument("--into", choices=("trained", "full"), help="the base's values of training, or its own")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the result [the base's own]")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of one file of weights, at most [5GB]")
    parser.add_argument("--from_4bit", action="store_true", help="an older name of --into trained")
    cli = parser.parse_args()

    from component.run.process import run_program

    run_program(
        lambda watch: merge_or_tell(cli),
        lambda: f"stopped; {cli.output} {'is there' if cli.output.exists() else 'was not made'}",
    )


def merge_or_tell(cli: argparse.Namespace) -> None:
    """Merge, and raise StorageError for what cannot be read or written."""
    from safetensors import SafetensorError

    from component.run.errors import StorageError

    try:
        merge(cli, check_merge(cli))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{cli.output}: could not be written ({error}); nothing was left there") from error
    print(f"merged model: {cli.output}")


def check_merge(cli: argparse.Namespace) -> "MergePlan":
    """Decide what is merged. Raises ArgumentError for what can be refused before a weight is read."""
    from loguru import logger

    from component.export.merge import plan_merge
    from component.run.errors import ArgumentError

    if cli.output.exists() or cli.output.is_symlink():
        raise ArgumentError(f"--output {cli.output}: exists; choose another name, or remove it")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", cli.max_shard_size):
        raise ArgumentError(f"--max_shard_size {cli.max_shard_size!r}: expected a size such as 500MB or 5GB")
    if cli.from_4bit and cli.into == "full":
        raise ArgumentError("--from_4bit is an older name of --into trained, and --into is full; give one of them")
    if cli.from_4bit:
        logger.info("--from_4bit is called --into trained now")
    return plan_merge(cli.adapter, cli.base, "trained" if cli.from_4bit else cli.into, cli.dtype)


def check_room(output: Path, size: int) -> None:
    """Raise StorageError unless a folder of `size` bytes can be made."""
    import os
    import shutil

    from component.run.errors import StorageError
    from component.run.folder import show_size

    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"--output {output}: nothing can be written in {above}; choose another folder")
    if (free := shutil.disk_usage(above).free) < size:
        raise StorageError(
            f"--output {output}: the merged weights need {show_size(size)}, and {show_size(free)} are free in {above}; "
            "make room, or choose another folder"
        )


def merge(cli: argparse.Namespace, plan: "MergePlan") -> None:
    from component.export.merge import describe_rounding, save_merged
    from component.model import sketch_base
    from component.run.files import make_once

    check_room(cli.output, sketch_base(plan.base, plan.dtype).num_parameters() * plan.dtype.itemsize)
    roundings = []
    make_once(cli.output, lambda folder: roundings.append(save_merged(plan, folder, cli.max_shard_size)))
    for rounding in roundings:  # none if another process has made the folder meanwhile
        print(describe_rounding(plan, rounding))


if __name__ == "__main__":
    main()
