"""Serve a tuned model, and its base beside it, by OpenAI's chat API.

python script/serve.py --adapter FOLDER [--base MODEL]
python script/serve.py --model MODEL

A host that other machines reach needs a key, in a file or in the variable LUCIOLE_API_KEY. Requests that arrive
together are answered together. docs/serve.md describes what they may ask for.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.inference.options import add_model_options, check_model_options, positive, prepare_session


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "serve")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen at; 0 for any [8000]")
    parser.add_argument("--api_key_file", metavar="FILE", help="the key that requests must bring")
    parser.add_argument("--max_batch", type=positive, default=64, metavar="N", help="answers written at once [64]")
    parser.add_argument(
        "--max_tokens", type=positive, metavar="N", help="of a conversation with its answer [what the model can]"
    )
    cli = parser.parse_args()
    check_model_options(parser, cli)
    return cli


def main() -> None:
    cli = parse_command_line()

    from component.run.process import run_program

    sys.stdout.reconfigure(errors="backslashreplace")  # for folders' names that are not UTF-8
    run_program(lambda watch: run(cli), lambda: "the server has ended")


def run(cli: argparse.Namespace) -> None:
    from functools import partial

    from component.serve.app import Service
    from component.serve.guard import Guard
    from component.serve.names import fingerprints, model_ids
    from component.serve.server import WAITING, Server, bind, find_key, greeting, serve

    key = find_key(cli.api_key_file, cli.host)
    listening = bind(cli.host, cli.port)
    session = prepare_session(cli)
    models = model_ids(session.base, cli.adapter)
    marks = fingerprints(session, models)
    make_engine = partial(session.load().open_engine, cli.max_batch, cli.max_tokens)
    service = Service(session, models, marks, WAITING + cli.max_batch)
    hello = partial(print, greeting(models, cli.host, listening, bool(key)), flush=True)
    serve(Server(service, partial(Guard, host=cli.host, key=key), hello), make_engine, listening)


if __name__ == "__main__":
    main()
