"""Whether a change helped by more than the noise: gains paired by seed. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95
# Quantiles of the normal distribution: of the two-sided 95 % interval, and of 80 % power.
Z_INTERVAL, Z_POWER = 1.959964, 0.841621


@cache
def t_quantile(confidence: float, freedom: int) -> float:
    """How far from 0 Student's t lies at most with this probability, on either side.

    With t = sqrt(freedom) * tan(angle), the density is proportional to cos(angle)^(freedom - 1)
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7); integrated by Gauss's rule
    and inverted by bisection.
    """
    nodes, weights = np.polynomial.legendre.leggauss(128)

    def mass(angle: float) -> float:
        return angle / 2 * (weights * np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1)).sum()

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if mass(middle) < confidence * mass(math.pi / 2):
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


@dataclass
class Verdict:
    """What a changed flag did to the accuracy."""

    flag: str
    before: str  # name of a group of runs
    after: str
    gains: Sequence[float]  # in percentage points, for each seed that both groups have
    step: float  # what one validation image counts, in percentage points
    notes: Sequence[str] = ()  # what a reader must know besides

    @property
    def mean(self) -> float:
        """The mean gain; NaN without a seed in common."""
        return statistics.mean(self.gains) if self.gains else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation of the gains over the seeds; NaN for fewer than two seeds.

        Accuracies are multiples of one image. Rounding to multiples of a step has the deviation
        step / sqrt(12) (Sheppard, Proc. London Math. Soc. 29, 1898), and the difference of two
        rounded accuracies step / sqrt(6): equal gains of a few seeds show no less noise than that.
        """
        if len(self.gains) < 2:
            return math.nan
        return max(statistics.stdev(self.gains), self.step / math.sqrt(6))

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean gain (Student 1908); NaN for fewer than two seeds."""
        seeds = len(self.gains)
        if seeds < 2:
            return math.nan
        return t_quantile(CONFIDENCE, seeds - 1) * self.deviation / math.sqrt(seeds)

    @property
    def words(self) -> str:
        """'helps', 'hurts' or what else follows."""
        if len(self.gains) < 2:
            return "no verdict from one seed" if self.gains else "no seed in common"
        if abs(self.mean) > self.half_width:
            return "helps" if self.mean > 0 else "hurts"
        return "no difference larger than the noise"

    def seeds_needed(self) -> float:
        """Seeds with which a true gain of this mean and deviation is found in 80 % of sweeps.

        ((z_0.975 + z_0.8) * deviation / mean)^2 + z_0.975^2 / 2, rounded up: Guenther, 'Sample size
        formulas for normal theory t tests', The American Statistician 35, 1981.
        """
        if len(self.gains) < 2 or not self.mean:
            return math.inf
        ratio = (Z_INTERVAL + Z_POWER) * self.deviation / self.mean
        return math.ceil(ratio**2 + Z_INTERVAL**2 / 2)

    def line(self) -> str:
        """The verdict in one line."""
        text = f"{self.before} → {self.after}: {self.words}"
        if len(self.gains) > 1:
            text += f" ({self.mean:+.2f} ± {self.half_width:.2f} points, {len(self.gains)} seeds"
            more = self.seeds_needed() - len(self.gains)
            if self.words not in ("helps", "hurts") and more < 1000:
                text += f"; about {more} more would show this gain with 80 % power"
            text += ")"
        return "; ".join([text, *self.notes])
