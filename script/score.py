"""Score a tuned model beside its base: calls of functions, answers, and what the training has cost of the rest.

python script/score.py --adapter FOLDER --data FILE [--base MODEL] [--json FILE] [--html FILE]
python script/score.py --model MODEL --data FILE

Every answer and call of the rows is asked for, greedily, after the true turns before it. docs/score.md explains each
figure.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.inference.options import add_model_options, check_model_options, positive, prepare_session

VARIANTS = ("trained", "merged", "full", "requantised")


UNUSED = "--train_file is not used: every function of these rows was seen in training"


def list_of_variants(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return names


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "score")
    parser.add_argument("--data", required=True, metavar="FILE", help="a file, folder or glob of rows with the answers")
    parser.add_argument("--variants", type=list_of_variants, default=["trained"], metavar="NAMES", help=(
        "comma-separated columns beside the base: trained (as it was trained), merged (into the values of training), "
        "full (merged into the full-precision base), requantised (both merges rounded again to 8 and 4 bits) [trained]"
    ))  # fmt: skip
    parser.add_argument("--keep", metavar="FILE", help="unrelated rows whose loss should not grow [data/keep.jsonl]")
    parser.add_argument("--train_file", metavar="FILE", help="rows of the training, to tell functions that it has seen")
    parser.add_argument("--limit", type=positive, metavar="N", help="score the first N rows alone")
    parser.add_argument(
        "--max_new_tokens", type=positive, metavar="N", help="of an answer [a little more than any needs]"
    )
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="conversations answered at once [64]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and every question")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of every wrong answer")
    cli = parser.parse_args()
    check_model_options(parser, cli)
    if cli.model and cli.variants != ["trained"]:
        parser.error("--variants needs --adapter")
    if cli.json and cli.html and cli.json.resolve() == cli.html.resolve():
        parser.error("--json and --html name the same file")
    return cli


def main() -> None:
    cli = parse_command_line()

    from component.run.process import run_program

    sys.stdout.reconfigure(errors="backslashreplace")  # for files' names that are not UTF-8
    cli.if_stopped = "stopped; nothing was written; --limit scores fewer rows"
    run_program(lambda watch: score(cli), lambda: cli.if_stopped)


def score(cli: argparse.Namespace) -> None:
    from component.data.reader import find_files
    from component.score.figures import Note
    from component.score.measure import KEEP, check_variants, find_trained, prepare_task, read_kept, score_models
    from component.score.questions import read_scored_rows
    from component.score.report import check_file, table, write_files

    read = [file for source in (cli.data, cli.keep, cli.train_file) if source for file in find_files(source)]
    for name in ("json", "html"):
        check_file(getattr(cli, name), f"--{name}", read)
    rows = read_scored_rows(cli.data, limit=cli.limit)
    kept = read_kept(Path(cli.keep) if cli.keep else KEEP, by_language=not cli.keep)
    train_rows = read_scored_rows(cli.train_file) if cli.train_file else None
    session = prepare_session(cli)
    check_variants(session, cli.variants)
    task = prepare_task(session, rows, kept, cli.max_new_tokens)
    trained, notes = find_trained(session.adapter, cli.data, rows, train_rows)
    if cli.train_file and trained is None:
        notes.append(Note(UNUSED))
    result = score_models(session.load(), task, cli.data, cli.variants, cli.batch, trained, notes)
    print(table(result))
    cli.if_stopped = "stopped; --json and --html are whole or absent"
    for file in write_files(result, cli.json, cli.html):
        print(f"written: {file}")


if __name__ == "__main__":
    main()
