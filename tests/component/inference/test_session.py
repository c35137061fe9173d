"""A session's prompts are the text of training, and its answers what the model wrote."""

from dataclasses import replace

import pytest

from component.data.formats import parse_chatglm3, parse_firefly
from component.data.render import render_chatglm2, render_chatglm3
from component.inference.session import Session
from tests.conftest import read_jsonl


@pytest.mark.parametrize(
    ("name", "answers", "parse", "render"),
    [("chatglm3", 203, parse_chatglm3, render_chatglm3), ("chatglm2", 159, parse_firefly, render_chatglm2)],
)
def test_the_prompt_of_every_learned_answer_is_the_golden_row_before_it(
    reference, real_tokenizer, name, answers, parse, render
):
    session, seen = Session(real_tokenizer, name), 0
    for row in read_jsonl(reference / f"golden/{name}_sft.jsonl"):
        conversation = parse(row["sample"])
        for i, turn in enumerate(conversation.turns):
            if turn.learned:
                alone = (replace(other, learned=i == at) for at, other in enumerate(conversation.turns))
                learned = render(replace(conversation, turns=tuple(alone)), real_tokenizer).target_mask
                before = replace(conversation, turns=conversation.turns[:i])
                assert session.prompt(before) == row["input_ids"][: learned.index(1)], row["name"]
                seen += 1
    assert seen == answers
