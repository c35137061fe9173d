"""The exports of `make demo-export`, asked by programs that know nothing of this project.

python script/export_demo.py [--model models/chatglm3-tiny] [--adapter output/chatglm3-tiny/final] [--exports FOLDER]

A question of the sample data and one that needs the weather function go to the tuned model as it was trained, to
transformers alone with the export of `--to glm`, and to llama.cpp with that of `--to gguf --type f32`. It fails if one
of them reads other tokens, or answers with others. llama.cpp is PyPI's xllamacpp, which `make demo-export` installs.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/chatglm3-tiny")
    parser.add_argument("--adapter", type=Path, default=Path("output/chatglm3-tiny/final"))
    parser.add_argument("--exports", type=Path, default=Path("output/exports"), help="with glm/ and gguf/ in it")
    parser.add_argument("--data", type=Path, default=ROOT / "data/dummy_data_chatglm3.jsonl")
    cli = parser.parse_args()

    from component.run.process import run_program

    run_program(lambda watch: ask_all(cli), lambda: "stopped")


def ask_all(cli: argparse.Namespace) -> None:
    from component.inference.session import Session
    from component.run.errors import NumericError
    from component.verify.elsewhere import ask_llama_cpp, ask_transformers
    from component.verify.lessons import find_lessons, shorten

    session = Session.open(cli.model, cli.adapter)
    lessons = find_lessons(cli.data)
    questions = [
        (
            [{"role": "user", "content": lesson.turns[0].content}],
            [{"type": "function", "function": tool} for tool in lesson.tools or ()] or None,
        )
        for lesson in lessons
    ]
    trained = [told_by(session, *question) for question in questions]
    (gguf,) = (cli.exports / "gguf").glob("*.gguf")
    elsewhere = {
        "transformers alone": ask_transformers(cli.exports / "glm", questions),
        "llama.cpp": ask_llama_cpp(gguf, questions),
    }
    same = True
    for i, (messages, _) in enumerate(questions):
        print(f"\nuser                {messages[0]['content']}")
        print(f"as trained          {shorten(session.tokenizer.decode(trained[i].answer))}")
        for name, told in elsewhere.items():
            equal = told[i] == trained[i]
            same = same and equal
            said = f"the same {len(told[i].prompt)} + {len(told[i].answer)} tokens"
            print(f"{name:18}  {said if equal else shorten(session.tokenizer.decode(told[i].answer))}")
    if not same:
        raise NumericError("an export does not answer as the tuned model does")
    print("\nThe exports answer as the tuned model, token for token.")


def told_by(session, messages: list[dict], tools: list | None):
    """The question's prompt and the greedy answer of the model as it was trained."""
    from component.inference.sampling import Sampling
    from component.verify.elsewhere import LENGTH, Told

    reply = session.reply(messages, tools, Sampling(max_new_tokens=LENGTH))
    list(reply)
    told = reply.generation
    return Told(told.prompt, told.tokens + [told.stop_id] * (told.stop_id is not None))


if __name__ == "__main__":
    main()
