"""A chat with the model of `make demo`, before and after the adapter.

python script/chat_demo.py [--model models/chatglm3-tiny] [--adapter output/chatglm3-tiny/final]

It asks a question of the sample data and one that needs the weather function, and fails if the tuned model does not
answer as it was taught.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from component.run.log import configure_logging

configure_logging(rank=0)  # before peft, whose import is not quiet

import torch
from loguru import logger
from transformers import AutoTokenizer

from component.model import from_pretrained, load_adapter, load_base, read_training
from component.run.errors import Fault
from component.trust import check_adapter
from component.verify.lessons import ask, find_lessons, shorten, taught_answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/chatglm3-tiny")
    parser.add_argument("--adapter", default="output/chatglm3-tiny/final")
    parser.add_argument("--data", type=Path, default=ROOT / "data/dummy_data_chatglm3.jsonl")
    cli = parser.parse_args()
    try:
        lessons = find_lessons(cli.data)
        check_adapter(Path(cli.adapter))
        tokenizer = from_pretrained(AutoTokenizer, cli.model)
        bits, dtype = read_training(Path(cli.adapter))
        model = load_base(cli.model, bits or 16, dtype or torch.float32, "cpu").eval()
        before = [ask(model, tokenizer, lesson) for lesson in lessons]
        model = load_adapter(model, cli.adapter).eval()
    except (Fault, OSError) as error:
        logger.error(error)
        sys.exit(getattr(error, "exit_code", 2))
    after = [ask(model, tokenizer, lesson) for lesson in lessons]

    right = True
    for lesson, untuned, tuned in zip(lessons, before, after, strict=True):
        print(f"\nuser   {lesson.turns[0].content}")
        print(f"base   {shorten(untuned)}")
        print(f"tuned  {shorten(tuned)}")
        right = right and tuned == taught_answer(lesson) != untuned
    print(
        "\nThe tuned model answers as it was taught; the base does not." if right else "\nThat is not what was taught."
    )
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
