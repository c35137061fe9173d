import numpy as np
import pytest

from component.score.statistics import Ratio, bootstrap, draws, wilson


def test_wilsons_interval_of_8_of_10_is_that_of_the_formula():
    # z² = 3.8415; centre (0.8 + 0.1921) / 1.3841 = 0.7167; half 1.9600 · √(0.016 + 0.0096) / 1.3841 = 0.2266
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_no_success_and_no_failure_still_leave_room():
    # 3.8415 / 13.8415 = 0.2775
    assert wilson(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((1, 0.7225, 1), abs=1e-4)


def test_nothing_has_no_rate():
    assert np.isnan(wilson(0, 0)).all()
    empty = np.array([])
    assert np.isnan(bootstrap(Ratio(empty, empty))).all()


def test_conversations_that_are_all_alike_have_no_spread():
    figure = Ratio(np.array([1.0, 1, 1]), np.array([2.0, 2, 2]))
    assert bootstrap(figure) == (0.5, 0.5, 0.5)


def test_two_conversations_are_drawn_as_a_coin_falls_twice():
    # Both, one of each, or the other twice: 0, ½ and 1 with ¼, ½, ¼; 2.5% lies in the lowest, 97.5% in the highest.
    assert bootstrap(Ratio(np.array([0.0, 1]), np.ones(2))) == (0.5, 0, 1)


def test_a_difference_is_paired_so_that_what_both_share_cancels():
    hard = np.array([0.0, 1, 5, 9])
    base, tuned = Ratio(hard, np.ones(4)), Ratio(hard + 2, np.ones(4))
    assert bootstrap(tuned, base) == (2, 2, 2)
    apart = bootstrap(Ratio((hard + 2)[::-1], np.ones(4)), base)
    assert apart.value == 2
    assert apart.low < 0 < 4 < apart.high


def test_turns_of_one_conversation_count_together():
    """Forty right turns of one conversation and forty wrong ones of another are two draws, not eighty."""
    together = bootstrap(Ratio(np.array([40.0, 0]), np.array([40.0, 40])))
    assert together == (0.5, 0, 1)


def test_the_same_draws_come_in_blocks_of_any_size(monkeypatch):
    figure = Ratio(np.arange(50.0), np.ones(50))
    whole = bootstrap(figure)
    monkeypatch.setattr("component.score.statistics.AT_ONCE", 500)
    draws.cache_clear()
    assert bootstrap(figure) == pytest.approx(whole)
    draws.cache_clear()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    """Of 400 conversations of which half are right, the mean's error is √(0.25 / 400) = 0.025."""
    estimate = bootstrap(Ratio(np.arange(400) % 2 * 1.0, np.ones(400)))
    assert estimate == pytest.approx((0.5, 0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.004)


def test_one_conversation_does_not_tell_how_another_goes():
    value, low, high = bootstrap(Ratio(np.array([3.0]), np.array([4.0])))
    assert value == 0.75
    assert np.isnan([low, high]).all()
