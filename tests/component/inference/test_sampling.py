"""The choice of a token from logits."""

import math

import pytest
import torch

from component.inference.sampling import GREEDY, Generation, Sampling, choose
from component.run.errors import ArgumentError

LOGITS = torch.tensor([0.5, 0.3, 0.2]).log()[[2, 0, 1]]  # of tokens 0, 1, 2: 0.2, 0.5, 0.3


class Numbers:
    def __init__(self, number):
        self.random = lambda: number


def drawn(number, logits=LOGITS, **sampling):
    generation = Generation([1], Sampling(**{"temperature": 1.0} | sampling))
    generation.draws = Numbers(number)
    return choose(logits[None], [generation])[0][0]


@pytest.mark.parametrize(
    ("sampling", "bounds"),
    [
        ({}, {0.49: 1, 0.51: 2, 0.79: 2, 0.81: 0}),
        ({"top_k": 2}, {0.62: 1, 0.63: 2, 0.99: 2}),  # 0.5 of 0.8 is 0.625
        ({"top_p": 0.6}, {0.62: 1, 0.63: 2, 0.99: 2}),  # 0.5 is less than 0.6, so that the next counts, too
        ({"top_p": 0.5}, {0.0: 1, 0.99: 1}),
        ({"top_k": 2, "top_p": 0.62}, {0.99: 1}),  # 0.625 of what top_k leaves
        ({"temperature": 0.5}, {0.65: 1, 0.66: 2, 0.89: 2, 0.9: 0}),  # 0.25, 0.09 and 0.04 of 0.38
    ],
)
def test_a_number_draws_the_token_in_whose_part_of_the_probability_it_lies(sampling, bounds):
    assert {number: drawn(number, **sampling) for number in bounds} == bounds


def test_a_number_at_the_very_end_draws_no_token_that_is_left_out():
    logits = torch.tensor([3.0, 9.0, 5.0, 1.0])
    assert drawn(1.0, logits, top_k=2) == 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-60])
def test_at_the_smallest_temperatures_the_most_probable_token_is_drawn(temperature):
    logits = torch.tensor([3.0, 90.0, 5.0, -80.0])
    assert [drawn(number, logits, temperature=temperature) for number in (0.0, 0.5, 0.999)] == [1, 1, 1]


def test_logits_that_are_not_finite_are_no_index_out_of_bounds():
    assert drawn(0.5, torch.full((4,), torch.nan)) in range(4)


def test_greedy_and_drawn_conversations_stand_side_by_side():
    generations = [Generation([1]), Generation([1], Sampling(temperature=1.0)), Generation([1], GREEDY)]
    generations[1].draws = Numbers(0.9)
    assert choose(LOGITS.expand(3, 3), generations) == [(1, None), (0, None), (1, None)]


def test_probabilities_are_told_where_they_are_asked_for():
    generations = [
        Generation([1], Sampling(logprobs=2)),
        Generation([1]),
        Generation([1], Sampling(temperature=1, logprobs=1)),
    ]
    generations[2].draws = Numbers(0.9)
    (_, first), other, (_, third) = choose(LOGITS.expand(3, 3), generations)
    assert other == (1, None)
    assert first.chosen == pytest.approx(math.log(0.5))
    assert [token for token, _ in first.top] == [1, 2]
    assert [value for _, value in first.top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert third.chosen == pytest.approx(math.log(0.2)), "of the drawn token, which is not the most probable"
    assert len(third.top) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("logprobs", -1),
    ],
)
def test_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(ArgumentError, match=f"{field} must be"):
        Sampling(**{field: value})
