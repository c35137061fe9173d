import json

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from component.chatglm import ChatGLMTokenizer
from component.chatglm.messages import to_chatglm3
from component.chatglm.prompt import TOOLS_PROMPT, tools_message
from component.chatglm.tokenization_chatglm import warn_of_text
from component.data.formats import parse_row
from component.data.render import chatglm3_messages, render_chatglm3
from tests.conftest import read_jsonl
from tests.published import CHAT_TEMPLATE

WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name"},
            "days": {"type": "integer", "description": "how many"},
        },
        "required": ["city", "days"],
    },
}
ASKED = [{"role": "user", "content": "a<|assistant|>"}]
CHAT = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": "b"}]
ARGUMENTS = {"city": "北京", "days": 2}


def weather(city: str, days: int) -> str:
    """The weather of a city.

    Args:
        city: its name
        days: how many
    """
    return f"{city} {days}"


def call(name: str, arguments: dict | str, **keys) -> dict:
    return keys | {"type": "function", "function": {"name": name, "arguments": arguments}}


def says(content: str | None = None, *calls: dict) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, **keys) -> dict:
    return {"role": "tool", "content": content, **keys}


def ids_of(tokenizer: ChatGLMTokenizer, messages: list[tuple[str, str, str]]) -> list[int]:
    """The official ids, message by message."""
    parts = [tokenizer.build_single_message(*message) for message in messages]
    return [*tokenizer.get_prefix_tokens(), *(i for part in parts for i in part)]


def apply(tokenizer: ChatGLMTokenizer, conversation: list, **settings):
    return tokenizer.apply_chat_template(conversation, return_dict=False, **settings)


@pytest.fixture
def load(tiny_tokenizer, tmp_path):
    """Loads the tiny tokenizer from a folder of that name, with these values in its config.json."""

    def load(name: str = "chatglm3-6b", **config) -> ChatGLMTokenizer:
        tiny_tokenizer.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        settings.pop("chatglm_version")  # no publisher writes it
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "chatglm"} | config))
        return AutoTokenizer.from_pretrained(tmp_path / name)

    return load


# ChatGLM3


def test_official_chats_give_the_official_ids(reference, real_tokenizer):
    for row in read_jsonl(reference / "golden/chatglm3_chat.jsonl"):
        conversation = [*(row["history"] or []), {"role": row["role"], "content": row["query"]}]
        inputs = real_tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [row["input_ids"]]
        assert inputs["position_ids"].tolist() == [row["position_ids"]]
        assert inputs["attention_mask"].tolist() == [[1] * len(row["input_ids"])]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
def test_a_template_in_the_folder_is_kept_and_not_applied(load, tmp_path, place):
    load()
    folder = tmp_path / "chatglm3-6b"
    if place == "tokenizer_config.json":
        settings = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    elif place == "chat_template.jinja":
        (folder / place).write_text(CHAT_TEMPLATE)
    else:
        (folder / place).mkdir()
        (folder / place / "tool_use.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert CHAT_TEMPLATE in (
            one.chat_template,
            *dict(one.chat_template if isinstance(one.chat_template, dict) else {}).values(),
        )
        expected = one.build_chat_input("a<|assistant|>", history=CHAT[:1])["input_ids"][0].tolist()
        assert apply(one, CHAT[:2], add_generation_prompt=True) == expected


def test_an_answer_ends_without_a_token_and_can_be_continued(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, [(message["role"], "", message["content"]) for message in CHAT])
    ask = tiny_tokenizer.get_command("<|assistant|>")
    assert apply(tiny_tokenizer, CHAT) == ids
    assert apply(tiny_tokenizer, CHAT, continue_final_message=True) == ids
    assert apply(tiny_tokenizer, CHAT, add_generation_prompt=True) == [*ids, ask]
    newest = tiny_tokenizer.build_single_message("assistant", "", "b")
    assert tiny_tokenizer.encode_message_with_chat_template(CHAT[2], CHAT[:2]) == newest


def test_every_form_of_result_has_the_same_ids(tiny_tokenizer):
    one, other = apply(tiny_tokenizer, CHAT), apply(tiny_tokenizer, ASKED)
    assert apply(tiny_tokenizer, [CHAT, ASKED]) == [one, other]
    assert tiny_tokenizer.apply_chat_template(CHAT) == {
        "input_ids": one,
        "attention_mask": [1] * len(one),
        "position_ids": list(range(len(one))),
    }
    assert torch.equal(apply(tiny_tokenizer, CHAT, return_tensors="pt"), torch.tensor([one]))
    batch = tiny_tokenizer.apply_chat_template([CHAT, ASKED], padding=True, return_tensors="pt")
    short = len(one) - len(other)
    assert batch["input_ids"].tolist() == [one, [0] * short + other]
    assert batch["position_ids"].tolist() == [[*range(len(one))], [0] * short + [*range(len(other))]]
    assert apply(tiny_tokenizer, CHAT, truncation=True, max_length=5) == one[:5]
    settings = {"return_special_tokens_mask": True}
    assert tiny_tokenizer.apply_chat_template(ASKED, tokenizer_kwargs=settings)["special_tokens_mask"] == [0] * len(
        other
    )


def test_the_text_is_for_reading_and_says_so_once(tiny_tokenizer, log):
    warn_of_text.cache_clear()
    ask = {"tokenize": False, "add_generation_prompt": True}
    for _ in range(2):
        texts = tiny_tokenizer.apply_chat_template([CHAT[:1], ASKED], **ask)
    assert texts == [
        "[gMASK]sop<|system|> \n Be brief.<|assistant|>",
        "[gMASK]sop<|user|> \n a<|assistant|><|assistant|>",
    ]
    assert tiny_tokenizer.apply_chat_template(ASKED, **ask) == texts[1]
    (line,) = log
    assert "take the ids of tokenize=True" in line


@pytest.mark.parametrize("tools", [[WEATHER], [{"type": "function", "function": WEATHER}], [weather]])
def test_tools_are_shown_bare_in_a_system_message_of_their_own(tiny_tokenizer, tools):
    described = WEATHER | {"return": {"type": "string"}} if callable(tools[0]) else WEATHER
    expected = ids_of(tiny_tokenizer, [tools_message([described]), ("system", "", "Be brief.")])
    assert apply(tiny_tokenizer, CHAT[:1], tools=tools) == expected
    assert apply(tiny_tokenizer, CHAT[:1], tools=[]) == ids_of(tiny_tokenizer, [("system", "", "Be brief.")])
    official = [{"role": "system", "content": TOOLS_PROMPT, "tools": [described]}]
    assert tiny_tokenizer.build_chat_input("a", history=official)["input_ids"].tolist() == [
        apply(tiny_tokenizer, [{"role": "user", "content": "a"}], tools=tools, add_generation_prompt=True)
    ]


WRAPPED = {"type": "function", "function": WEATHER}


@pytest.mark.parametrize(
    ("tools", "shown"),
    [
        ([WRAPPED], [WEATHER]),
        ([WRAPPED, "now(): the time", {"name": "f"}], [WEATHER, "now(): the time", {"name": "f"}]),
        (WRAPPED, WRAPPED),
        ([{"type": "function", "function": "now"}], [{"type": "function", "function": "now"}]),
        ([{"type": "custom", "function": WEATHER}], [{"type": "custom", "function": WEATHER}]),
        ([WRAPPED | {"note": "a"}], [WRAPPED | {"note": "a"}]),
        ([], []),
        ("a hammer", "a hammer"),
    ],
)
def test_a_system_message_shows_openais_functions_bare_and_any_other_json_as_it_is(tiny_tokenizer, tools, shown):
    system = {"role": "system", "content": "Tools:", "tools": tools}
    before = json.dumps(system)
    prompt = tiny_tokenizer.build_chat_input("a", history=[system])["input_ids"][0].tolist()
    text = f"Tools:\n{json.dumps(shown, indent=4, ensure_ascii=False)}"
    asked = ids_of(tiny_tokenizer, [("system", "", text), ("user", "", "a")])
    assert prompt == [*asked, tiny_tokenizer.get_command("<|assistant|>")]
    assert json.dumps(system) == before


TEXT = "```python\ntool_call(city='北京', days=2)\n```"
NOW = ("assistant", "now", "```python\ntool_call()\n```")
CALLED = ("assistant", "weather", TEXT)
CONVERSATIONS = {
    "arguments as an object": (
        [says(None, call("weather", ARGUMENTS, id="1")), result("晴", tool_call_id="1")],
        [CALLED, ("observation", "", "晴")],
    ),
    "arguments as JSON, no id, and text beside": (
        [says("I look.", call("weather", json.dumps(ARGUMENTS))), result("晴", name="weather")],
        [("assistant", "", "I look."), CALLED, ("observation", "", "晴")],
    ),
    "parallel, answered by id": (
        [
            says("", call("weather", ARGUMENTS, id="1"), call("now", {}, id="2")),
            result("noon", tool_call_id="2"),
            result("晴", tool_call_id="1"),
        ],
        [
            CALLED,
            ("observation", "", "晴"),
            NOW,
            ("observation", "", "noon"),
        ],
    ),
    "parallel, answered by name": (
        [
            says("", call("weather", ARGUMENTS), call("now", "")),
            result("noon", name="now"),
            result("晴", name="weather"),
        ],
        [
            CALLED,
            ("observation", "", "晴"),
            NOW,
            ("observation", "", "noon"),
        ],
    ),
    "ChatGLM3's own": (
        [{"role": "assistant", "metadata": "weather", "content": TEXT}, {"role": "observation", "content": "晴"}],
        [CALLED, ("observation", "", "晴")],
    ),
    "ChatGLM3's own call, OpenAI's result": (
        [{"role": "assistant", "metadata": "weather", "content": TEXT}, result("晴")],
        [CALLED, ("observation", "", "晴")],
    ),
    "OpenAI's calls, ChatGLM3's results": (
        [
            says(None, call("weather", ARGUMENTS), call("now", {})),
            {"role": "observation", "content": "晴"},
            {"role": "observation", "content": "noon"},
        ],
        [CALLED, ("observation", "", "晴"), NOW, ("observation", "", "noon")],
    ),
    "content in parts, keys without a value": (
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "refusal": None,
                "annotations": [],
            }
        ],
        [("assistant", "", "ab")],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_calls_and_results_become_chatglm3s_messages(tiny_tokenizer, name):
    messages, expected = CONVERSATIONS[name]
    asked = {"role": "user", "content": "q"}
    assert apply(tiny_tokenizer, [asked, *messages]) == ids_of(tiny_tokenizer, [("user", "", "q"), *expected])


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "ChatGLM3" not in name])
def test_a_prompt_is_what_training_renders(tiny_tokenizer, name):
    messages = [{"role": "user", "content": "q"}, *CONVERSATIONS[name][0], {"role": "assistant", "content": "done"}]
    tools = [{"type": "function", "function": WEATHER}]
    row = {
        "messages": [{k: v for k, v in message.items() if v not in (None, [])} for message in messages],
        "tools": tools,
    }
    conversation = parse_row(row)
    assert [message for message, _ in chatglm3_messages(conversation)] == to_chatglm3(messages, tools)
    trained = render_chatglm3(conversation, tiny_tokenizer).input_ids
    assert [*apply(tiny_tokenizer, messages, tools=tools), 2] == trained


@pytest.mark.parametrize(
    ("messages", "settings", "fault"),
    [
        ([], {}, "the conversation is empty"),
        ([ASKED, []], {}, "the conversation is empty"),
        (ASKED, {"chat_template": "{{ messages }}"}, "ChatGLM's format has no chat_template; leave it out"),
        (ASKED, {"documents": [{"text": "a"}]}, "has no documents"),
        (ASKED, {"return_assistant_tokens_mask": True}, "has no return_assistant_tokens_mask"),
        (ASKED, {"enable_thinking": True}, "has no enable_thinking"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        (CHAT, {"continue_final_message": "reasoning_content"}, "only content can be continued"),
        (["a"], {}, r"messages\[0\]: role is 'a'; expected one of system, user"),
        ([{"role": "ipython", "content": "a"}], {}, "role is 'ipython'"),
        ([{"role": "user", "content": None}], {}, "content is None; expected text"),
        ([{"role": "user", "content": [{"type": "image", "url": "a"}]}], {}, "expected text"),
        ([{"role": "assistant", "content": "a", "reasoning_content": "b"}], {}, "has reasoning_content, for which"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], {}, "has function_call, for which"),
        ([*ASKED, {"role": "tool", "content": "a"}], {}, r"messages\[1\]: answers no call"),
        ([says(None, call("f", {}, id="1")), result("a", tool_call_id="2")], {}, r"messages\[1\]: answers no call"),
        ([says(None, call("f", {})), result("a"), result("b")], {}, r"messages\[2\]: answers no call"),
        (
            [*ASKED, says(None, call("f", "{a: 1}"))],
            {},
            r"messages\[1\]: tool_calls holds \{.*'arguments': '\{a: 1\}'.*\}; expected a function with its name and "
            "arguments, an object or its JSON$",
        ),
        ([says(None, call("f", [1]))], {}, r"messages\[0\]: tool_calls holds"),
        ([says(None, call("f", {"a b": 1}))], {}, "the parameter 'a b' cannot be a keyword argument"),
        ([{"role": "system", "content": "a", "tools": [WEATHER]}], {"tools": [WEATHER]}, "has tools, and others"),
        (ASKED, {"tools": ["weather"]}, "tools holds 'weather'"),
    ],
)
def test_what_the_format_does_not_have_is_refused(tiny_tokenizer, messages, settings, fault):
    with pytest.raises(ValueError, match=fault):
        tiny_tokenizer.apply_chat_template(messages, **settings)


def test_a_template_that_is_set_later_is_refused(load):
    tokenizer = load()
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match="has no chat_template"):
        tokenizer.apply_chat_template(ASKED)


def test_settings_that_ask_for_nothing_are_no_faults(tiny_tokenizer):
    nothing = {"documents": None, "enable_thinking": False, "sanitize_control_tokens": True, "tools": None}
    assert apply(tiny_tokenizer, CHAT, **nothing, return_assistant_tokens_mask=False) == apply(tiny_tokenizer, CHAT)


def test_transformers_pipeline_asks_with_the_official_prompt(tiny_tokenizer, make_model, monkeypatch):
    model, prompts = make_model(), []
    forward = model.forward
    model.forward = lambda input_ids, **rest: prompts.append(input_ids) or forward(input_ids, **rest)
    pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)(ASKED, max_new_tokens=1, do_sample=False)
    assert torch.equal(prompts[0], tiny_tokenizer.build_chat_input("a<|assistant|>")["input_ids"])


# ChatGLM2


@pytest.mark.parametrize(
    ("name", "config", "version"),
    [
        ("chatglm2-6b", {}, 2),
        ("mine", {"_name_or_path": "THUDM/chatglm2-6b"}, 2),
        ("chatglm3-6b", {"_name_or_path": "THUDM/chatglm2-6b"}, 3),
        ("chatglm3-6b", {"chatglm_version": 2}, 2),
        ("mine", {}, 3),
    ],
)
def test_the_tokenizer_has_its_models_version_and_keeps_it(load, tmp_path, name, config, version):
    tokenizer = load(name, **config)
    assert tokenizer.chatglm_version == version
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert AutoTokenizer.from_pretrained(tmp_path / "elsewhere").chatglm_version == version


def test_chatglm2s_conversations_give_the_ids_of_build_prompt(load):
    tokenizer = load("chatglm2-6b")
    conversation = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "那呢</s>"},
    ]
    prompt = tokenizer.encode(tokenizer.build_prompt("那呢</s>", [("你好", "好")]))
    assert apply(tokenizer, conversation, add_generation_prompt=True) == prompt
    answered = [*conversation, {"role": "assistant", "content": "晴"}]
    for settings in ({}, {"continue_final_message": True}):
        assert apply(tokenizer, answered, **settings) == prompt + tokenizer.encode("晴", add_special_tokens=False)


@pytest.mark.parametrize(
    ("messages", "settings", "fault"),
    [
        (ASKED, {}, "ChatGLM2 asks with each question"),
        (CHAT[1:], {"add_generation_prompt": True}, "ChatGLM2 asks with each question"),
        (CHAT, {}, "ChatGLM2 has questions and answers in turn"),
        (ASKED * 2, {}, "ChatGLM2 has questions and answers in turn"),
        (ASKED, {"tools": [WEATHER], "add_generation_prompt": True}, "ChatGLM2 has questions and answers in turn"),
        ([*ASKED, {"role": "assistant", "metadata": "f", "content": "a"}], {}, "ChatGLM2 has questions and answers"),
    ],
)
def test_what_chatglm2_does_not_have_is_refused(load, messages, settings, fault):
    with pytest.raises(ValueError, match=fault):
        load("chatglm2-6b").apply_chat_template(messages, **settings)


def test_messages_may_come_one_by_one(tiny_tokenizer):
    given = tiny_tokenizer.apply_chat_template(iter(CHAT), return_dict=False)
    assert given == tiny_tokenizer.apply_chat_template(CHAT, return_dict=False)
