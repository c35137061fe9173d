"""Talk to a tuned model, also with functions.

python script/chat.py --adapter FOLDER [--base MODEL] [--tools FILE] [--system TEXT]
python script/chat.py --model MODEL

A model calls the functions that it is offered, and asks you for their results. /help lists the commands: to retry, to
compare with the base, to save the conversation as a row for training. Through pipes, each line is a question, the
result of a call, or a command; answers are written to standard output, calls as lines `→ name {"argument": value}`, and
the first fault ends the program with exit code 2.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.inference.options import add_model_options, check_model_options, prepare_session


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "talk to")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON of functions to offer, or rows with tools")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token [0]")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from this share alone [1]")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="most tokens of an answer [512]")
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same each time [anew]")
    cli = parser.parse_args()
    check_model_options(parser, cli)
    return cli


def main() -> None:
    cli = parse_command_line()

    from component.run.process import run_program

    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    run_program(lambda watch: chat(cli), lambda: "left; /save keeps a conversation")


def chat(cli: argparse.Namespace) -> None:
    from component.chat.conversation import Talk, read_tools
    from component.chat.terminal import talk_through
    from component.inference.sampling import Sampling

    sampling = Sampling(cli.max_new_tokens, cli.temperature, cli.top_p, seed=cli.seed)
    tools = read_tools(cli.tools) if cli.tools else []
    session = prepare_session(cli)
    talk = Talk(session, sampling)
    talk.instruct(cli.system)
    talk.offer(tools)
    session.load().open_engine(max_batch=2)  # the conversation of the tuned model, and the base's
    talk_through(talk)


if __name__ == "__main__":
    main()
