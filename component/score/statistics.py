"""Intervals of rates and of differences, in numpy alone."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # 97.5% of a normal distribution's values lie below it
RESAMPLES, SEED = 2000, 0
AT_ONCE = 2**22  # draws of one block, to bound memory


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval. A figure of nothing is NaN."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """A figure that is a sum over a sum, such as right answers over all, or loss over tokens, by conversation.

    Args:
        parts: (conversations,) what is summed above.
        wholes: (conversations,) what is summed below.
    """

    parts: np.ndarray
    wholes: np.ndarray

    @property
    def value(self) -> float:
        return float(divide(self.parts.sum(), self.wholes.sum()))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """(resamples,) the figure of each resample.

        Args:
            counts: (resamples, conversations) how often each conversation was drawn.
        """
        return divide(counts @ self.parts, counts @ self.wholes)


def divide(parts, wholes):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.equal(wholes, 0), np.nan, np.divide(parts, wholes))


def wilson(successes: int, trials: int) -> Estimate:
    """The rate of successes with its 95% score interval: E. B. Wilson, Probable inference, the law of succession, and
    statistical inference, Journal of the American Statistical Association 22 (1927), 209-212."""
    if not trials:
        return Estimate(np.nan, np.nan, np.nan)
    rate, square = successes / trials, Z * Z / trials
    centre = (rate + square / 2) / (1 + square)
    half = Z * np.sqrt(rate * (1 - rate) / trials + square / (4 * trials)) / (1 + square)
    return Estimate(rate, float(max(centre - half, 0)), float(min(centre + half, 1)))


def bootstrap(figure: Ratio, base: Ratio | None = None) -> Estimate:
    """A figure with its 95% percentile interval, or its difference to the same figure of `base`: B. Efron, Bootstrap
    methods: another look at the jackknife, Annals of Statistics 7 (1979), 1-26.

    Conversations are drawn with replacement, not turns, since the turns of a conversation are not independent. A
    conversation brings its part of both figures along. The draws are the same on every call.
    """
    if not len(figure.parts):
        return Estimate(np.nan, np.nan, np.nan)
    value = figure.value - (base.value if base else 0)
    if len(figure.parts) == 1:  # nothing tells how another conversation would go
        return Estimate(value, np.nan, np.nan)
    counts = draws(len(figure.parts))
    rows = max(AT_ONCE // len(figure.parts), 1)
    blocks = [counts[start : start + rows].astype(float) for start in range(0, len(counts), rows)]
    values = np.concatenate([figure.resampled(block) - (base.resampled(block) if base else 0) for block in blocks])
    if np.isnan(values).all():
        return Estimate(value, np.nan, np.nan)
    return Estimate(value, *map(float, np.nanquantile(values, (0.025, 0.975))))


@functools.lru_cache(maxsize=2)
def draws(conversations: int) -> np.ndarray:
    """(RESAMPLES, conversations) how often each conversation is drawn, as bytes: none is drawn 256 times."""
    draw = np.random.default_rng(SEED)
    rows, shares = max(AT_ONCE // conversations, 1), np.full(conversations, 1 / conversations)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([draw.multinomial(conversations, shares, size).astype(np.uint8) for size in sizes])
