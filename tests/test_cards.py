"""The table of cards and models in docs/speed.md and README_zh.md, against the estimates that a run goes by."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from component.kernel.memory import GIB, SPARE, estimate, fixed_bytes, optimizer_bytes, possible_plans
from component.kernel.model import PackedForward
from component.model import sketch_model
from component.settings.schema import QLoRAArguments

ROOT = Path(__file__).parents[1]
LLAMA_LIKE = {"hidden_size": 4096, "num_attention_heads": 32, "tie_word_embeddings": False}
SHAPES = {  # of the published config.json files
    "ChatGLM3-6B": ("chatglm", {"padded_vocab_size": 65024, "multi_query_group_num": 2}),
    "Qwen2.5-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    ),
    "Llama-3.1-8B": (
        "llama",
        LLAMA_LIKE
        | {"intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "GLM-4-9B": (
        "glm",
        LLAMA_LIKE
        | {"intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 2, "vocab_size": 151552}
        | {"head_dim": 128, "attention_bias": True},
    ),
}
TAKEN = 1  # GiB of a card that the table leaves to the driver, the context and a desktop


SIXTEEN = "### With a base in 16 bits"  # the heading of its table


def rows_of_cards(page: str, bits: int = 4) -> dict[int, list[str]]:
    """Memory in GB of each card that a page lists, and its cells, one for each of SHAPES."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(SIXTEEN)[0 if bits == 4 else 2]
    found = re.findall(r"^\| (\d+) GB[^|]*\|" + r" ([^|]*) \|" * len(SHAPES) + r".*$", text, re.MULTILINE)
    return {int(size): cells for size, *cells in found}


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("at", range(len(SHAPES)), ids=SHAPES)
def test_the_table_of_cards_says_what_the_estimate_chooses(at, bits, tmp_path):
    kind, shape = list(SHAPES.values())[at]
    AutoConfig.for_model(kind, **shape).save_pretrained(tmp_path)
    args = QLoRAArguments(model_name_or_path=str(tmp_path), train_file="x", base_bits=bits)
    forward = PackedForward(sketch_model(args), max_length=1024)
    fixed = fixed_bytes(forward, optimizer_bytes("paged_adamw_32bit", on_card=True))
    english = rows_of_cards("docs/speed.md", bits)
    chinese = rows_of_cards("README_zh.md") if bits == 4 else english
    assert list(english) == list(chinese) == ([8, 12, 16, 24, 48, 80] if bits == 4 else [16, 24, 48, 80])
    plans = possible_plans(None, "auto", longest=1024, samples=16)
    for card, cells in english.items():
        sizes = {plan: estimate(forward.layers, forward.vocab, fixed, plan) / GIB for plan in plans}
        fitting = [plan for plan, size in sizes.items() if size < SPARE * (card - TAKEN)]
        expected = "–"
        if fitting:
            plan = fitting[0]
            expected = f"`{plan.checkpointing}`, {plan.tokens}{'+' * plan.keeps_weights}: {sizes[plan]:.1f}"
        assert cells[at] == chinese[card][at] == expected, card


def test_the_minutes_of_an_epoch_follow_from_the_speed_of_an_h100_and_the_ratio_of_the_cards():
    page, readmes = (ROOT / "docs/speed.md").read_text(), [(ROOT / f"README{x}.md").read_text() for x in ("", "_zh")]
    speed = 16_800  # of an H100 with 24 GiB free
    assert f"| H100, 24 GiB free, measured | {speed:,} | {5000 * 456 / speed / 60:.1f} minutes |" in page
    for card, tflops in (("RTX 4090", 165), ("RTX 3090", 71)):
        slower = speed * tflops / 989
        minutes = round(5000 * 456 / slower / 60)
        assert f"| {card}, by estimate: × {tflops} / 989 | {round(slower, -2):,.0f} | {minutes} minutes |" in page
        assert f"{card} 约 {minutes} 分钟" in readmes[1]
        assert f"{minutes} minutes an epoch on an {card}" in readmes[0] or f"{minutes} on an {card}" in readmes[0]
