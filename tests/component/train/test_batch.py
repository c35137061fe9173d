import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from component.train.batch import PackingCollator, pack


def sample(ids: list[int], mask: list[int]) -> dict:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "target_mask": mask}


def test_a_row_holds_whole_samples_whose_positions_restart():
    (row,) = PackingCollator(8).lay_out([sample([5, 6, 7], [0, 0, 1]), sample([8, 9], [1, 1])])
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert row["ends"].tolist() == [0, 3, 5]
    assert row["ends"].dtype == torch.int32
    assert row["longest"] == 3
    # 7 follows position 1 and 9 position 3; 8 opens its sample, so nothing predicts it.
    assert row["learned"].tolist() == [1, 3]
    assert row["targets"].tolist() == [7, 9]


def test_samples_go_to_as_few_rows_as_hold_them_about_equally_full():
    assert pack([5, 4, 3, 3, 2], 10) == [[0, 3], [1, 2, 4]]
    assert pack([6, 6, 6], 10) == [[0], [1], [2]]
    assert pack([1, 10], 10) == [[1], [0]]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(64, 300))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths, limit):
    rows = pack(lengths, limit)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= limit for row in rows)
    assert rows == pack(lengths, limit)


def test_thousands_of_samples_of_which_two_never_fit_one_row_are_packed_at_once():
    started = time.perf_counter()
    assert len(pack([513] * 3000, 1024)) == 3000
    assert time.perf_counter() - started < 2  # a row more at a time, it takes 11 s


def test_a_sample_above_the_limit_is_named():
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit rows of 8; raise packing_length"):
        pack([9], 8)
