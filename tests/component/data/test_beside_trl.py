"""Chat templates of 28 families beside TRL's training templates, which mark what is learned by hand.

The package trl carries both (`make test-slow` installs it). Both are applied to the same text. What is learned of it
may differ in the ways of DIFFERENCES alone.
"""

import importlib.util
import re
from itertools import groupby
from pathlib import Path

import pytest
from jinja2 import TemplateError

from component.data.chat_template import control_of, render_chat_template
from component.data.chat_text import Chat, with_fixed_date
from component.data.formats import parse_row
from component.run.errors import DataError
from tests.component.data.test_chat_template import make_tokenizer

pytestmark = pytest.mark.slow
PACKAGE = importlib.util.find_spec("trl")
TEMPLATES = Path(PACKAGE.origin).with_name("chat_templates") if PACKAGE else None
CONTROL = re.compile(r"<\|[\w/]+\|?>|<[\w/]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]")

# Family and its EOS.
FAMILIES = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<eos>",
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "lfm2_v2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
    "nemotron_3_ultra": "<|im_end|>",
    "nemotron_3_5_lightning": "<|im_end|>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
    "qwen2_5": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
}


# Kinds of differences that all conversations together show.
#   after: theirs also learns the newline or EOS that the template writes after the token at which inference stops
#   prompt: theirs also learns the end of what the generation prompt writes
#   no prompt: the template writes the model's role after a result, and its generation prompt does not
#   stop: ours ends on <|tool_response>, at which Gemma's inference stops
#   text: the training template writes another text than the family's own (empty thoughts in early answers, an end)
#   leaves out …, moves …: ours refuses the row, theirs trains what is left
#   refused: the template refuses the row itself
TOOLLESS = {"leaves out tools", "leaves out a call"}
DIFFERENCES = {
    "cohere": TOOLLESS | {"refused"},
    "cohere2": TOOLLESS | {"refused"},
    "deepseek_r1_distill": TOOLLESS | {"prompt"},
    "deepseekv3": {"leaves out tools", "prompt"},
    "diffusion_gemma": {"after", "moves the text beside a call", "no prompt", "stop"},
    "gemma": TOOLLESS | {"after", "refused"},
    "gemma3": TOOLLESS | {"after", "refused"},
    "glm4moe": {"text"},
    "gptoss": {"leaves out a call", "leaves out the text beside a call", "prompt"},
    "lfm2": {"after", "leaves out a call"},
    "lfm2_v2": {"after"},
    "llama3": TOOLLESS,
    "muse_glimmer": {"leaves out the text beside a call", "prompt"},
    "nemotron_3_nano": {"after", "prompt"},
    "nemotron_3_super": {"after", "prompt"},
    "nemotron_3_ultra": {"after", "prompt"},
    "nemotron_3_5_lightning": {"after", "prompt"},
    "phi3": TOOLLESS | {"after"},
    "phi3_5": TOOLLESS | {"after"},
    "qwen2_5": {"after", "prompt"},
    "qwen2_5_vl": TOOLLESS | {"after"},
    "qwen3": {"after", "text"},
    "qwen3_instruct_2507": {"after"},
    "qwen3_vl": {"after"},
    "qwen3_5_nothink": {"after", "prompt", "text"},
    "qwen3_5_think": {"after", "prompt", "text"},
    "qwen3_6": {"after", "prompt", "text"},
    "qwen3_8": {"after", "prompt"},
}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, reasoning: str = "") -> dict:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def calling(*calls: tuple[str, dict], content: str = "", reasoning: str = "") -> dict:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return answer(content, reasoning) | {
        "tool_calls": [call | {"id": f"call0000{i}"} for i, call in enumerate(made)],
    }


def result(content: str, i: int = 0) -> dict:
    return {"role": "tool", "tool_call_id": f"call0000{i}", "content": content}


def function(name: str, **types: str) -> dict:
    properties = {key: {"type": kind, "description": "d"} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": f"tells {name}", "parameters": parameters}}


OBEY = {"role": "system", "content": "obey"}
WEATHER = ("weather", {"city": "北京"})
CLOCK = ("clock", {"zone": "y", "hours": 3, "exact": True, "until": None, "step": 0.5})
TOOLS = [function("weather", city="string"), function("clock", zone="string", hours="integer")]
ROUND, ANOTHER, CALL = (
    (user("q1"), answer("a1")),
    (user("q2"), answer("a2")),
    (user("q3"), calling(WEATHER), result("24")),
)
CONVERSATIONS = {
    "one round": (ROUND, None),
    "two rounds": ((*ROUND, *ANOTHER), None),
    "three rounds": ((*ROUND, *ANOTHER, user("q3"), answer("a3")), None),
    "system": ((OBEY, *ROUND), None),
    "system, two rounds": ((OBEY, *ROUND, *ANOTHER), None),
    "lines and spaces": ((user("q 1\n\nq"), answer("a 1\n\n- b")), None),
    "tools without a call": (ROUND, TOOLS),
    "call": (CALL[:2], TOOLS),
    "call and answer": ((*CALL, answer("a1")), TOOLS),
    "call and answer, tools not offered": ((*CALL, answer("a1")), None),
    "system, call and answer": ((OBEY, *CALL, answer("a1")), TOOLS),
    "call, then a round": ((*CALL, answer("a1"), *ANOTHER), TOOLS),
    "call after a round": ((*ROUND, *CALL, answer("a3")), TOOLS),
    "two calls in turn": ((*CALL, calling(CLOCK), result("9"), answer("a1")), TOOLS),
    "parallel calls": ((user("q1"), calling(WEATHER, CLOCK), result("24"), result("9", 1), answer("a1")), TOOLS),
    "call without arguments": ((user("q1"), calling(("now", {})), result("9"), answer("a1")), [function("now")]),
    "text beside a call": ((user("q1"), calling(WEATHER, content="see"), result("24"), answer("a1")), TOOLS),
    "reasoning": ((user("q1"), calling(WEATHER, reasoning="h1"), result("24"), answer("a1", "h2")), TOOLS),
}


def tokenizer_of(family: str):
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return make_tokenizer(template, "<s>", FAMILIES[family], control=CONTROL.findall(template))


def learned_here(row: dict, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    sample = render_chat_template(parse_row(row), tokenizer)
    return stretches(sample.input_ids, sample.target_mask, tokenizer)


def learned_there(row: dict, tokenizer, template: str) -> tuple[str, list[tuple[int, int]]]:
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return stretches(encoded["input_ids"], encoded["assistant_masks"], tokenizer)


def stretches(ids: list[int], mask: list[int], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it each learned stretch begins and ends."""
    text, found, edge = "", [], 0
    for flag, run in groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        edge, text = len(text), text + tokenizer.decode([token for _, token in run])
        found += [(edge, len(text))] if flag else []
    return text, found


def kinds_of_differences(family: str, conversation: str) -> set[str]:
    messages, tools = CONVERSATIONS[conversation]
    row = {"messages": list(messages)} | ({"tools": tools} if tools else {})
    training = with_fixed_date((TEMPLATES / f"{family}_training.jinja").read_text(encoding="utf-8"))
    own, marked = tokenizer_of(family), tokenizer_of(family)
    marked.chat_template = training
    try:
        chat = Chat(parse_row(row), marked, control_of(marked)[0])
        text, ours = learned_here(row, marked)
    except DataError as error:
        return {check_refusal(str(error), row, marked, training)}
    same, theirs = learned_there({"messages": chat.messages, "tools": chat.tools}, marked, training)
    assert same == text.removesuffix(marked.eos_token) or same == text
    kinds = set() if learned_here(row, own)[0] == text else {"text"}
    answers = [i for i, is_learned in enumerate(chat.learned) if is_learned]
    for i, (begin, end), (their_begin, their_end) in zip(answers, ours, theirs, strict=True):
        if begin != their_begin:
            kinds.add("prompt" if their_begin < begin else "no prompt")
            extra = text[min(begin, their_begin) : max(begin, their_begin)]
            prompt = chat.write(chat.messages[:i], asks=True)
            in_prompt = prompt.startswith(text[: max(begin, their_begin)]) or prompt.endswith(extra)
            assert in_prompt == (their_begin < begin)
        if end < their_end:
            kinds.add("after")
            assert text[end:their_end].removesuffix(marked.eos_token) == "\n"
        if their_end < end:
            kinds.add("stop")
            assert text[their_end:end] == "<|tool_response>"
    return kinds


def check_refusal(fault: str, row: dict, tokenizer, template: str) -> str:
    """The kind of a refusal; asserts that the template refuses the row too or leaves out what the fault says."""
    if "refuses the row" in fault:
        with pytest.raises(TemplateError):
            learned_there(row, tokenizer, template)
        return "refused"
    text = learned_there(row, tokenizer, template)[0]
    if "behind the next message" in fault:
        assert text.index("24") < text.index("see")
        return "moves the text beside a call"
    left_out = fault.partition("leaves out ")[2].partition(";")[0]
    if left_out == "tools":
        assert text == learned_there(row | {"tools": None}, tokenizer, template)[0]
    elif left_out == "a call":
        fewer = [
            message | {"tool_calls": message["tool_calls"][:-1]} if "tool_calls" in message else message
            for message in row["messages"]
        ]
        assert text == learned_there(row | {"messages": fewer}, tokenizer, template)[0]
    else:
        assert left_out == "the text beside a call"
        assert "see" not in text
    return f"leaves out {left_out}"


@pytest.mark.skipif(not PACKAGE, reason="trl is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_is_what_trl_marks_but_for_known_differences(family):
    found = {kind for conversation in CONVERSATIONS for kind in kinds_of_differences(family, conversation)}
    assert found == DIFFERENCES[family]
