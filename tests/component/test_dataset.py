import copy
import json

import pytest

from component.collator import SFTDataCollator
from component.conversation import DataError
from component.dataset import ChatGLM2SFTDataset, ChatGLM3SFTDataset, SFTDataset, select_dataset
from tests.conftest import read_jsonl

ROWS = [
    {"conversations": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in (1, 40, 5)
]


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    def make(rows=ROWS, max_seq_length=1000):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return ChatGLM3SFTDataset(file, tiny_tokenizer, max_seq_length)

    return make


@pytest.mark.parametrize(
    ("name", "dataset_class"), [("chatglm3", ChatGLM3SFTDataset), ("chatglm2", ChatGLM2SFTDataset)]
)
def test_the_classes_give_the_golden_rows(reference, real_tokenizer, tmp_path, name, dataset_class):
    golden = read_jsonl(reference / f"golden/{name}_sft.jsonl")
    file = tmp_path / "golden.jsonl"
    file.write_text("".join(json.dumps(row["sample"], ensure_ascii=False) + "\n" for row in golden), encoding="utf-8")
    dataset = dataset_class(file, real_tokenizer, 10_000)
    assert len(dataset) == len(golden)
    for item, row in zip(dataset, golden, strict=True):
        assert item["input_ids"] == row["input_ids"]
        assert item["target_mask"] == [int(label != -100) for label in row["labels"]]


def test_the_published_sample_files_load(shared, real_tokenizer):
    counts = [
        len(dataset_class(shared / f"data/{name}.jsonl", real_tokenizer, 100_000))
        for name, dataset_class in (
            ("firefly_dummy_data", SFTDataset),
            ("firefly_dummy_data", ChatGLM2SFTDataset),
            ("firefly_dummy_data_chatglm3", ChatGLM3SFTDataset),
            ("toolalpaca_chatglm3", ChatGLM3SFTDataset),
        )
    ]
    assert counts == [33, 33, 34, 180]


def test_an_item_is_three_fresh_lists_of_one_length(make):
    dataset = make()
    item = dataset[0]
    before = copy.deepcopy(item)
    assert set(item) == {"input_ids", "attention_mask", "target_mask"}
    assert all(type(value) is int for values in item.values() for value in values)
    assert len(item["input_ids"]) == len(item["target_mask"]) == sum(item["attention_mask"])
    item["input_ids"].append(1)
    item["target_mask"][0] = 1
    assert dataset[0] == before


def test_a_long_row_is_cut_and_one_without_a_learned_token_is_dropped_and_named(make, log):
    whole = make()
    short = make(max_seq_length=len(whole[2]["input_ids"]) - 1)
    assert len(short) == 2
    assert short[0] == whole[0]
    assert short[1]["input_ids"] == whole[2]["input_ids"][:-1]
    assert "2 rows to learn from; 1 were cut" in log[-2]
    assert "dropped 1 rows without a learned token" in log[-1]
    assert "the first at line 2" in log[-1]


@pytest.mark.parametrize(
    ("rows", "length", "reason"), [([], 9, "the file has no rows"), (ROWS, 3, "survives max_seq_length=3")]
)
def test_nothing_left_to_learn_is_an_error(make, rows, length, reason):
    with pytest.raises(DataError, match=reason):
        make(rows, length)


@pytest.mark.parametrize(
    ("name", "data_format", "expected"),
    [
        ("THUDM/chatglm3-6b", None, ChatGLM3SFTDataset),
        ("/models/ChatGLM3-6B-32k/", None, ChatGLM3SFTDataset),
        ("/chatglm2/tuned/my-chatglm3", None, ChatGLM3SFTDataset),
        ("THUDM/chatglm2-6b", None, ChatGLM2SFTDataset),
        ("Qwen/Qwen2.5-7B", None, SFTDataset),
        ("Qwen/Qwen2.5-7B", "chatglm3", ChatGLM3SFTDataset),
        ("THUDM/chatglm3-6b", "firefly", SFTDataset),
    ],
)
def test_the_name_or_the_setting_picks_the_class(name, data_format, expected):
    assert select_dataset(name, data_format) is expected


def test_a_chatglm_under_another_name_stops_and_asks_for_the_format(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    with pytest.raises(DataError, match="set data_format to chatglm2 or chatglm3"):
        select_dataset(str(tmp_path))
    assert select_dataset(str(tmp_path), "chatglm2") is ChatGLM2SFTDataset
    with pytest.raises(DataError, match="data_format is 'glm'; expected one of chatglm2, chatglm3, firefly"):
        select_dataset("x", "glm")


def test_a_batch_is_padded_on_the_right_and_cut(tiny_tokenizer):
    samples = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "target_mask": [0, 1, 1]},
        {"input_ids": [8], "attention_mask": [1], "target_mask": [0]},
    ]
    batch = SFTDataCollator(tiny_tokenizer, 10)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target_mask"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert SFTDataCollator(tiny_tokenizer, 2)(samples)["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert samples[1]["input_ids"] == [8]
