"""The ready chat templates, and templates from files."""

import copy

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from component.chat_templates import FOLDER, set_chat_template
from component.chatglm.prompt import TOOLS_PROMPT, call_message
from component.data.chat_template import render_chat_template
from component.data.conversation import choose_learned
from component.data.formats import parse_row
from component.run.errors import ArgumentError, DataError
from tests.component.data.test_chat_template import CONTROL, make_tokenizer, shown, turns, with_calls
from tests.conftest import read_jsonl


def chatml(eos: str = "<|endoftext|>"):
    tokenizer = make_tokenizer("", "<s>", eos)
    tokenizer.chat_template = None
    set_chat_template(tokenizer, "chatml")
    return tokenizer


def test_chatml_shows_tools_calls_and_results_as_hermes():
    row = with_calls("北京", "x")
    row["messages"] = [{"role": "system", "content": "obey"}, *row["messages"]]
    assert shown(row, chatml()) == (
        "<|im_start|>system\nobey\n\n"
        "These functions can be called. Each line between <tools> and </tools> describes one as JSON:\n"
        '<tools>\n{"type": "function", "function": {"name": "weather"}}\n</tools>\n\n'
        "To call a function, write its name and arguments as JSON between <tool_call> and </tool_call>:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"the argument": "its value"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\n24\n</tool_response>\n<tool_response>\n24\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    )


def test_chatml_of_plain_turns():
    assert shown(turns("q1", "a1", "q2", "a2"), chatml()) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>⟧\n"
    )
    beside = with_calls("x")
    beside["messages"][1]["content"] = "let me see"
    assert '⟦let me see\n<tool_call>\n{"name"' in shown(beside, chatml())


def test_the_end_of_answers_becomes_the_eos():
    """Qwen's base models have another EOS, at which they would never arrive after this."""
    assert chatml("<|endoftext|>").eos_token == "<|im_end|>"


def test_a_template_is_saved_with_the_tokenizer(tmp_path):
    chatml().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == (FOLDER / "chatml.jinja").read_text()
    assert again.eos_token == "<|im_end|>"


@pytest.fixture(scope="module")
def fast_chatglm3(reference) -> PreTrainedTokenizerFast:
    """ChatGLM3's vocabulary as a fast tokenizer, as people convert it."""
    parts = SentencePieceExtractor(str(reference / "chatglm3-6b/tokenizer.model")).extract(models.BPE)
    bpe = models.BPE(parts["vocab"], parts["merges"], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    control = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ]
    fast.add_special_tokens({"additional_special_tokens": [AddedToken(token, normalized=False) for token in control]})
    set_chat_template(fast, "chatglm3")
    return fast


def test_chatglm3_is_the_official_prompt(fast_chatglm3, reference):
    """The golden rows, learned tokens included, by a template's text and one call of a fast tokenizer."""
    differ = set()
    rows = read_jsonl(reference / "golden/chatglm3_sft.jsonl")
    for row in [row for row in rows if row["name"] != "empty answer"]:  # refused, as no words show where it stands
        sample = render_chat_template(choose_learned(parse_row(row["sample"]), "flagged"), fast_chatglm3)
        pairs = zip(sample.input_ids, sample.target_mask, strict=True)
        if (sample.input_ids, [token if flag else -100 for token, flag in pairs]) != (row["input_ids"], row["labels"]):
            differ.add(row["name"])
    assert differ == {
        "ends with a tool call",  # ChatGLM3's format adds a result of null to
        "observation missing",  # these two
        "assistant speaks first",  # whose first answer has no prompt
    }


def test_chatglm3_offers_tools_with_the_official_sentence():
    assert f"{TOOLS_PROMPT}\\n" in (FOLDER / "chatglm3.jinja").read_text()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("{{ 1 }", r"t\.jinja:1: not a Jinja template \("),
        ('{\n"chat_template": "x"}', "holds JSON; give a file with the template's text alone"),
        (None, "cannot be read .* give chatml or chatglm3, or a file with a Jinja template; for the tokenizer's own"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path, given, fault):
    if given:
        (tmp_path / "t.jinja").write_text(given)
    with pytest.raises(ArgumentError, match=fault):
        set_chat_template(make_tokenizer("", "<s>", "</s>"), str(tmp_path / "t.jinja"))


def test_chatglm_writes_its_prompts_itself(tiny_tokenizer):
    with pytest.raises(ArgumentError, match="ChatGLM's tokenizer writes its prompts itself; leave chat_template out"):
        set_chat_template(copy.deepcopy(tiny_tokenizer), "chatglm3")


def test_chatglm3_writes_a_call_as_python():
    tokenizer = make_tokenizer("", "<s>", "</s>", control=["[gMASK]", "sop", *CONTROL])
    set_chat_template(tokenizer, "chatglm3")
    arguments = {"a": "it's \\ philosophy\n", "b": 'say "hi"', "c": [1, True, None, 0.5, {"d": "'\""}]}
    row = with_calls("x")
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = arguments
    text = shown(row, tokenizer)
    written = call_message("weather", arguments).content
    assert f"⟦weather\n {written}<|observation|>⟧\n 24<|assistant|>⟦\n a</s>⟧" in text
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"a b": 1}
    with pytest.raises(DataError, match="the parameter 'a b' cannot be a keyword argument; rename it"):
        shown(row, tokenizer)


def test_a_ready_template_needs_its_control_tokens():
    """Of a tokenizer without them, they would be learned as text, and no answer would end."""
    llama = make_tokenizer("", "<s>", "</s>", control=["[INST]"])
    with pytest.raises(
        ArgumentError, match=r"chatml needs the control token <\|im_start\|>, which the tokenizer lacks"
    ):
        set_chat_template(llama, "chatml")
    others = [token for token in CONTROL if token != "</s>"]
    endless = make_tokenizer("", "<s>", "<eos>", control=["[gMASK]", "sop", *others])
    with pytest.raises(ArgumentError, match="chatglm3 needs the control token </s>, which the tokenizer lacks"):
        set_chat_template(endless, "chatglm3")


def test_a_template_from_a_file_is_used_as_it_is(tmp_path):
    """Also one that no short conversation suits."""
    (tmp_path / "t.jinja").write_text("\ufeff{{ messages[1].content + '' }}")
    tokenizer = make_tokenizer("", "<s>", "</s>")
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.apply_chat_template(turns("q", "a")["messages"], tokenize=False) == "a"
    assert tokenizer.eos_token == "</s>"
