"""The last step of `make demo`: a chat with the model, before and after the adapter.

python script/chat_demo.py [--model models/chatglm3-tiny] [--adapter output/chatglm3-tiny/final]

It asks a question of the sample data and one that needs the weather function, and fails if the tuned model does not
answer as it was taught.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.run.log import configure_logging

configure_logging(rank=0)  # before peft, whose import is not quiet

from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from component.chatglm.prompt import TOOLS_PROMPT
from component.data.conversation import Conversation
from component.data.formats import read_conversations
from component.model import from_pretrained, load_adapter
from component.run.errors import Fault
from component.trust import check_adapter


def find_lessons(data: Path) -> list[Conversation]:
    """The first conversation of the sample data, and the first that calls the weather function."""
    conversations = [conversation for _, conversation in read_conversations(data)]
    weather = next(c for c in conversations if any(turn.name == "get_current_weather" for turn in c.turns))
    return [conversations[0], weather]


def ask(model, tokenizer, lesson: Conversation) -> str | dict:
    history = []
    if lesson.tools is not None:
        history = [{"role": "system", "content": TOOLS_PROMPT, "tools": lesson.tools}]
    response, _ = model.chat(tokenizer, lesson.turns[0].content, history=history, do_sample=False, max_new_tokens=100)
    return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/chatglm3-tiny")
    parser.add_argument("--adapter", default="output/chatglm3-tiny/final")
    parser.add_argument("--data", type=Path, default=Path("data/dummy_data_chatglm3.jsonl"))
    cli = parser.parse_args()
    try:
        lessons = find_lessons(cli.data)
        check_adapter(Path(cli.adapter))
        tokenizer = from_pretrained(AutoTokenizer, cli.model)
        model = from_pretrained(AutoModelForCausalLM, cli.model).eval()
        before = [ask(model, tokenizer, lesson) for lesson in lessons]
        model = load_adapter(model, cli.adapter).eval()
    except (Fault, OSError) as error:
        logger.error(error)
        sys.exit(getattr(error, "exit_code", 2))
    after = [ask(model, tokenizer, lesson) for lesson in lessons]

    right = True
    for lesson, untuned, tuned in zip(lessons, before, after, strict=True):
        answer = lesson.turns[1]
        taught = answer.content or {"name": answer.name, "parameters": answer.parameters}
        print(f"\nuser   {lesson.turns[0].content}")
        print(f"base   {shorten(untuned)}")
        print(f"tuned  {shorten(tuned)}")
        right = right and tuned == taught and untuned != taught
    print(
        "\nThe tuned model answers as it was taught; the base does not." if right else "\nThat is not what was taught."
    )
    sys.exit(0 if right else 1)


def shorten(response: str | dict) -> str:
    text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:100] + "…"


if __name__ == "__main__":
    main()
