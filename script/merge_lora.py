"""Merge an adapter into its base model: a folder that loads and runs as any other model does, without peft.

python script/merge_lora.py --adapter FOLDER --output FOLDER [--base MODEL] [--into trained|full] [--dtype TYPE]

Two merges can be meant. --into trained adds the adapter to the weights that it was trained beside: those of the base
after rounding to 4 bits and back. --into full adds it to the full-precision base, and is the default for adapters of
other tools, which do not record their base. The result is saved in --dtype; it is never quantised again, which would
round the adapter away: to do that with a program of your own, merge --into full. docs/quality.md compares the two.
OUTPUT appears only when it is whole; a killed merge leaves .tmp-OUTPUT beside it, which the next one of that name
removes.
"""

import argparse
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
        lambda watch: merge(cli),
        lambda: f"stopped; {cli.output} {'is there' if cli.output.exists() else 'was not made'}",
    )


def merge(cli: argparse.Namespace) -> None:
    from component.export.merge import describe_rounding, save_merged
    from component.export.output import check_room, make_output
    from component.model import sketch_base

    plan = check_merge(cli)
    check_room(cli.output, sketch_base(plan.base, plan.dtype).num_parameters() * plan.dtype.itemsize)
    rounding = make_output(cli.output, lambda folder: save_merged(plan, folder, cli.max_shard_size))
    print(describe_rounding(plan, rounding))
    print(f"merged model: {cli.output}")


def check_merge(cli: argparse.Namespace) -> "MergePlan":
    """Decide what is merged. Raises ArgumentError for what can be refused before a weight is read."""
    from loguru import logger

    from component.export.merge import plan_merge
    from component.export.output import check_output
    from component.run.errors import ArgumentError

    check_output(cli.output, cli.max_shard_size)
    if cli.from_4bit and cli.into == "full":
        raise ArgumentError("--from_4bit is an older name of --into trained, and --into is full; give one of them")
    if cli.from_4bit:
        logger.info("--from_4bit is called --into trained now")
    return plan_merge(cli.adapter, cli.base, "trained" if cli.from_4bit else cli.into, cli.dtype)


if __name__ == "__main__":
    main()
