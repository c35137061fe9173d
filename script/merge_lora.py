"""Merge an adapter into its base model: a folder that loads and runs as any other model does, without peft.

python script/merge_lora.py --adapter FOLDER --output FOLDER [--base MODEL] [--dtype TYPE] [--from_4bit]

Two merges can be meant. By default the adapter is added to the full-precision base. With --from_4bit it is added to the
weights that it was trained beside: those of the base after quantisation to 4 bits and back. In both the result is saved
in --dtype; it is never quantised again, which would round the adapter away. OUTPUT appears only when it is whole.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="such as output/x/final")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name [the folder in adapter_config.json]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of merge and result [bfloat16]")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of one file of weights, at most [5GB]")
    parser.add_argument("--from_4bit", action="store_true", help="merge into the base's 4-bit values, as in training")
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


def check_merge(cli: argparse.Namespace) -> str:
    """Return the base to merge into. Raises ArgumentError for what can be refused before a weight is read."""
    from component.run.errors import ArgumentError
    from component.trust import check_adapter, check_model, find_model_file, read_model_json

    if cli.output.exists() or cli.output.is_symlink():
        raise ArgumentError(f"--output {cli.output}: exists; choose another name, or remove it")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", cli.max_shard_size):
        raise ArgumentError(f"--max_shard_size {cli.max_shard_size!r}: expected a size such as 500MB or 5GB")
    named = check_adapter(cli.adapter).get("base_model_name_or_path")
    base = cli.base or named
    if not cli.base and (not named or ".." in Path(named).parts or not Path(named).is_dir()):
        raise ArgumentError(
            f"{cli.adapter / 'adapter_config.json'}: base_model_name_or_path is {named!r}, which is no folder here; "
            "give the base with --base, so that nothing but what you name is loaded"
        )
    given = f"--base {base}" if cli.base else f"{cli.adapter / 'adapter_config.json'}: base_model_name_or_path {base}"
    try:
        check_model(base)
        config = find_model_file(base, "config.json")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{given}: {error}") from error
    if not config:
        raise ArgumentError(
            f"{given}: no config.json is to be had; give a folder with the model's files, or its hub name where the "
            "hub can be reached"
        )
    quantised = read_model_json(config).get("quantization_config")
    if quantised and not (cli.from_4bit and quantised.get("load_in_4bit")):
        raise ArgumentError(
            f"{config}: the base is quantised, and a merge into rounded weights is not the model that full precision "
            "gives; give that with --base, or set --from_4bit if it is bitsandbytes' 4 bits and you want them"
        )
    return base


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


def merge(cli: argparse.Namespace, base: str) -> None:
    import torch
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from component.model import adopt_conversation, four_bit, from_pretrained, load_adapter, sketch_base
    from component.run.errors import ArgumentError
    from component.run.files import make_once

    dtype = getattr(torch, cli.dtype)
    check_room(cli.output, sketch_base(base, dtype).num_parameters() * dtype.itemsize)

    def fill(folder: Path) -> None:
        logger.info(f"loading {base} in {cli.dtype}{', by way of 4 bits' * cli.from_4bit}")
        tokenizer = from_pretrained(AutoTokenizer, base)
        adopt_conversation(tokenizer, cli.adapter)
        quantization = {"quantization_config": four_bit(dtype)} if cli.from_4bit else {}
        model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype, **quantization)
        if cli.from_4bit:
            model = model.dequantize()
        adapted = load_adapter(model, cli.adapter)
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ArgumentError(f"--adapter {cli.adapter}: {error}") from error
        vars(model.config).pop("auto_map", None)  # the base's Python is not copied, and must not be asked for
        ends = model.generation_config.eos_token_id  # answers end at the tokenizer's EOS, too
        ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
        if tokenizer.eos_token_id not in (None, *ends):
            model.generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]
        model.save_pretrained(folder, max_shard_size=cli.max_shard_size)
        tokenizer.save_pretrained(folder)

    make_once(cli.output, fill)


if __name__ == "__main__":
    main()
