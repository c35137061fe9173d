"""Prompts by the chat templates of 28 families: beside the rows of training, and beside the templates' own prompts.

The package trl carries the templates (`make test-slow` installs it). What differs is in DIFFERENCES alone.
"""

import re
from dataclasses import replace

import pytest

from component.data.chat_template import control_of
from component.data.chat_text import Chat, with_fixed_date
from component.data.conversation import Conversation
from component.data.formats import parse_row
from component.inference.session import Session
from component.run.errors import DataError
from tests.component.data.test_beside_trl import CONVERSATIONS, FAMILIES, PACKAGE, tokenizer_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PACKAGE, reason="trl is not installed")]

# Kinds of differences that all conversations together show.
#   early: where more follows, the row writes answers without the empty thoughts that their prompts open or hold
#   reasoning: a row with reasoning goes on otherwise from its thought than one without, which the prompt follows
#   thought: the template's own prompt opens a thought that rows without reasoning do not show, or not like this
#   kept: the template's own prompt has earlier thoughts, which the row drops when its answer is text
#   ended: the template's own prompt ends a turn that the row goes on with
DIFFERENCES = {
    "deepseek_r1_distill": {"thought"},
    "deepseekv3": {"thought"},
    "diffusion_gemma": {"ended"},
    "gptoss": {"kept"},
    "nemotron_3_nano": {"reasoning", "thought"},
    "nemotron_3_super": {"reasoning", "thought"},
    "nemotron_3_ultra": {"reasoning", "thought"},
    "nemotron_3_5_lightning": {"reasoning", "thought"},
    "qwen3_5_nothink": {"early", "reasoning"},
    "qwen3_5_think": {"early"},
    "qwen3_6": {"early"},
}


def answers_of(conversation: Conversation) -> list[int]:
    """Where each message that the model writes begins."""
    return [i for i, turn in enumerate(conversation.turns) if turn.learned and not turn.joined]


def row_before(session: Session, conversation: Conversation, i: int, ends: bool) -> str | None:
    """What a training row has before the message at turn i, and after that if not `ends`; None where it is refused."""
    stop = next((j for j in range(i + 1, len(conversation.turns)) if not conversation.turns[j].joined), None)
    turns = [
        replace(turn, learned=turn.learned and i <= j < (stop or j + 1)) for j, turn in enumerate(conversation.turns)
    ]
    try:
        sample = session.render(replace(conversation, turns=tuple(turns[:stop] if ends else turns)), session.tokenizer)
    except DataError:
        return None
    return session.tokenizer.decode(sample.input_ids[: sample.target_mask.index(1)])


def own_prompt(session: Session, conversation: Conversation) -> str:
    """What the template itself writes as the prompt."""
    chat = Chat(conversation, session.tokenizer, control_of(session.tokenizer)[0])
    template = with_fixed_date(session.tokenizer.get_chat_template(tools=chat.tools))
    return session.tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def kinds_of_differences(session: Session, conversation: Conversation) -> set[str]:
    kinds = set()
    for i in answers_of(conversation):
        whole, ended = (row_before(session, conversation, i, ends) for ends in (False, True))
        if ended is None:  # the row has no place in the template
            continue
        before = replace(conversation, turns=conversation.turns[:i])
        prompt, own = session.tokenizer.decode(session.prompt(before)), own_prompt(session, before)
        if ended != prompt:
            kinds.add("reasoning")
            assert conversation.turns[i].reasoning
            assert "<think>" in prompt
        if whole is not None and whole != ended:
            kinds.add("early")
            assert conversation.turns[i + 1 :]
            assert without_thoughts(ended) == without_thoughts(whole.removesuffix("<t"))  # of <think> or <tool_call>
        if own != prompt:
            kinds.add(kind_of_own(own, prompt, before))
    return kinds


def without_thoughts(text: str) -> str:
    return re.sub(r"<think>\s*(</think>\s*)?", "", text)


def kind_of_own(own: str, prompt: str, before: Conversation) -> str:
    rest = own.removeprefix(prompt)
    if rest in ("\n", "<think>\n"):
        return "thought"
    if rest == "<turn|>\n":
        return "ended"
    assert any(turn.reasoning and turn.reasoning in own and turn.reasoning not in prompt for turn in before.turns)
    return "kept"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_the_row_has_before_the_answer_but_for_known_differences(family):
    session = Session(tokenizer_of(family), "chat_template")
    found = set()
    for messages, tools in CONVERSATIONS.values():
        found |= kinds_of_differences(
            session, parse_row({"messages": list(messages)} | ({"tools": tools} if tools else {}))
        )
    assert found == DIFFERENCES.get(family, set())
