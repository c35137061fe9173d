"""Show what a model will learn, before paying for a GPU: figures, one sample as tokens, or a page of all.

python script/inspect_data.py --train_args_file FILE [--row N] [--html FILE] [key=value ...]
python script/inspect_data.py --data FILE --model FOLDER [--row N] [--html FILE] [key=value ...]

Rows are read with the settings of the file; bad rows are listed and stop nothing. key=value changes a setting, such as
max_seq_length=2048.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_args_file", metavar="FILE", help="the file of a training run")
    parser.add_argument("--data", metavar="FILE", help="a file, folder or glob of rows; needs --model")
    parser.add_argument("--model", metavar="FOLDER", help="the model's folder or hub name")
    parser.add_argument("--row", type=int, metavar="N", help="show sample N, from 0, with all its tokens")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at in a browser")
    parser.add_argument("--rows", type=int, default=5000, help="largest number of samples in the page [5000]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    cli = parser.parse_intermixed_args()
    if not cli.train_args_file and not (cli.data and cli.model):
        parser.error("give --train_args_file, or --data and --model")

    from component.run.process import run_program

    sys.stdout.reconfigure(errors="backslashreplace")  # for files' names that are not UTF-8
    run_program(lambda watch: inspect(cli), lambda: "stopped")


def inspect(cli: argparse.Namespace) -> None:
    from dataclasses import asdict

    from component.data.cache import limit_cache
    from component.data.dataset import DATA_FORMATS, check_choice, select_format
    from component.data.inspection import Inspection
    from component.data.load import rules_of
    from component.model import load_tokenizer
    from component.run.errors import DataError, unusable
    from component.run.files import write_atomically
    from component.settings.load import load_arguments

    if cli.html and (cli.html.is_symlink() or (cli.html.exists() and not cli.html.is_file())):
        raise DataError(f"--html {cli.html}: a link or no file; give the name of a file")
    given = {"model_name_or_path": cli.model, "train_file": cli.data}
    given |= {} if cli.train_args_file else {"output_dir": os.devnull}
    overrides = [f"{key}={value}" for key, value in given.items() if value]
    args, _ = load_arguments(cli.train_args_file, [*overrides, *cli.overrides])
    data_format, _ = select_format(args.model_name_or_path, args.data_format, args.chat_template)
    tokenizer = load_tokenizer(args)
    check_choice(args, data_format, tokenizer)
    source = list(args.train_file) if isinstance(args.train_file, dict) else args.train_file
    rules = asdict(rules_of(args)) | {"on_bad_row": "skip", "max_bad_share": 1.0}
    workers = args.preprocessing_workers
    dataset = DATA_FORMATS[data_format](source, tokenizer, cache_dir=args.cache_dir, workers=workers, **rules)
    limit_cache(args.cache_dir, args.cache_size_limit)
    inspection = Inspection(dataset, tokenizer)
    title = ", ".join(map(str, dataset.files[:3])) + (" …" if len(dataset.files) > 3 else "")
    if cli.row is not None:
        if not 0 <= cli.row < len(dataset):
            raise DataError(f"--row {cli.row}: there are samples 0 to {len(dataset) - 1}")
        print(inspection.tokens(cli.row, colours=sys.stdout.isatty()))
    else:
        print(f"{title} for {args.model_name_or_path}, data format {data_format}\n\n{inspection.table()}")
    if cli.html:
        page = inspection.html(title, args.model_name_or_path, data_format, cli.rows)
        try:
            write_atomically(cli.html, page.encode(errors="backslashreplace"))
        except OSError as error:
            raise unusable(f"--html {cli.html}: could not be written ({error}); choose another name", error) from None
        print(f"page: {cli.html}")


if __name__ == "__main__":
    main()
