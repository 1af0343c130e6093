"""Racing: a composite is measured on ever more images, and given up as soon as it can't become the best any more.

Successive halving spends a growing budget on those that are left (Jamieson & Talwalkar 2016); a race drops who is worse
by a test than the best one so far on the same images (Maron & Moore 1997; Birattari et al. 2002). Here the budget is a
nested subset of the evaluation images, and on each one the rates are measured from high to low: networks at high rates
are small, and what is still to come can only be right or wrong. At rate 0 all composites are alike. After every other
rate two bounds are looked at:

exact     every image and rate that isn't measured yet is counted as right. If even that loses, it is certain.
paired    the mean difference from the figure of the best one on the same images has an upper confidence limit
          (Student's t, without replacement from a finite set, Bonferroni over all looks). If it is below 0, the
          composite is given up, wrongly with a probability of at most `risk`. Rates that the subset has not come to
          yet are estimated on the subset before, as in double sampling (Cochran 1977, chapter 12); on the first one
          they count as right. Which images the best one gets right is known of all of them, and explains a part of the
          difference: the regression estimator (chapter 7) takes it out.

Whoever leads, the best composite of a search has to survive one race only, so `risk` also bounds the probability that
the search misses it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Correctness", "GivenUp", "RUNGS", "Race"]

RUNGS = (0.064, 0.16, 0.4, 1.0)
"""Shares of the evaluation images that a composite is measured on, one after the other."""

_FEWEST_IMAGES = 50
# Groups of rates above 0 for which the share that the best one gets right explains a difference.
_N_GROUPS = 3


@dataclass(frozen=True, slots=True)
class Correctness:
    """Which images are classified correctly at which rate, packed.

    Attributes:
        n_rates: rates.
        n_images: images.
        bits: one bit an image, the rates one after the other, each from a byte of its own on.
    """

    n_rates: int
    n_images: int
    bits: bytes

    @classmethod
    def of(cls, correct: NDArray[np.bool_]) -> Correctness:
        """Of (rates, images)."""
        n_rates, n_images = correct.shape
        return cls(n_rates, n_images, np.packbits(correct, axis=1).tobytes())

    def array(self) -> NDArray[np.bool_]:
        """(rates, images)."""
        packed = np.frombuffer(self.bits, np.uint8).reshape(self.n_rates, -1)
        return np.unpackbits(packed, axis=1, count=self.n_images).astype(np.bool_)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "bits": base64.b64encode(self.bits).decode()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Correctness:
        """Inverse of `to_json`."""
        return cls(document["n_rates"], document["n_images"], base64.b64decode(document["bits"]))


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A race that a composite has lost.

    Attributes:
        rival: number of the trial that it lost against.
        n_images: images that it was measured on.
        lowest_rate: the last rate that was measured on them; higher ones were before.
        bound: upper limit of its figure's difference from the rival's.
        certain: whether the bound is exact; otherwise it holds with a probability of 1 - `risk`.
        share: of the rates above 0 times images, those measured until then.
        seconds: spent on `attribution`, on `training` where there is any, and on `evaluation`.
    """

    rival: int
    n_images: int
    lowest_rate: float
    bound: float
    certain: bool
    share: float
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Race:
    """A race against the best composite so far; can be sent to another process.

    Attributes:
        rival: number of that composite's trial.
        correct: what that composite classifies correctly.
        rates: increasing from 0.
        weights: of each rate in the figure, which is a weighted sum of accuracies.
        risk: probability of giving up a composite that would have won, at most.

    Raises:
        ValueError: these don't fit together.
    """

    rival: int
    correct: Correctness
    rates: tuple[float, ...]
    weights: tuple[float, ...]
    risk: float

    def __post_init__(self) -> None:
        if not 0 < self.risk < 1:
            raise ValueError(f"`risk` must lie between 0 and 1, but got {self.risk}.")
        if not len(self.rates) == len(self.weights) == self.correct.n_rates:
            raise ValueError(
                f"A race needs a weight and a row of `correct` a rate, but got {len(self.weights)} weights and "
                f"{self.correct.n_rates} rows for {len(self.rates)} rates."
            )

    @property
    def n_looks(self) -> int:
        """How often the paired test may be asked."""
        return len(self.rungs) * (len(self.rates) - 1)

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """Numbers of images that a composite is measured on, increasing to all of them."""
        n_images = self.correct.n_images
        sizes = {max(_FEWEST_IMAGES, math.ceil(share * n_images)) for share in RUNGS}
        return tuple(sorted({min(size, n_images) for size in sizes}))

    def run(self, measure: Callable[[int, int], NDArray[np.bool_]]) -> GivenUp | None:
        """Measures until the composite is given up.

        Args:
            measure: of the index of a rate and a number n: correctness (n,) of the first n images at that rate.

        Returns:
            None where every rate was measured on all images, which doesn't say that the composite has won.
        """
        rival = self.correct.array()
        hoped = np.ones_like(rival)
        hoped[0] = rival[0]
        n_measured = 0
        for seen, n_images, index in self._steps():
            hoped[index, :n_images] = measure(index, n_images)
            n_measured += n_images - seen
            share = n_measured / hoped[1:].size
            if share == 1:
                return None
            bound, certain = self._bound(hoped, rival, seen, n_images, index)
            if bound < 0:
                return GivenUp(self.rival, n_images, self.rates[index], bound, certain, share, seconds={})
        return None

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Numbers of images before and after, and the index of the rate, of everything that may be measured."""
        for seen, n_images in zip((0, *self.rungs), self.rungs, strict=False):
            for index in reversed(range(1, len(self.rates))):
                yield seen, n_images, index

    def _bound(
        self, hoped: NDArray[np.bool_], rival: NDArray[np.bool_], seen: int, n_images: int, index: int
    ) -> tuple[float, bool]:
        """Upper limit of the difference of the figures, and whether it is exact.

        Rates from `index` on are measured on the first `n_images` images, those below it on the first `seen`.
        """
        differences = np.asarray(self.weights)[:, None] * (hoped.astype(np.float64) - rival)
        exact = float(differences.sum(axis=0).mean())
        n_all = differences.shape[1]
        if exact < 0 or (seen or n_images) == n_all:
            return exact, True
        from scipy.special import stdtrit  # here, as importing it takes long where nothing races

        high, low = differences[index:].sum(axis=0), differences[:index].sum(axis=0)
        high = self._unexplained(high, n_images)
        if seen:
            low = self._unexplained(low, seen)
            estimate = high[:n_images].mean() + low[:seen].mean()
            variance = self._variance((high + low)[:seen]) * (1 / n_images - 1 / n_all)
            variance += self._variance(low[:seen], index) * (1 / seen - 1 / n_images)
        else:
            estimate = high[:n_images].mean() + low.mean()
            variance = self._variance(high[:n_images]) * (1 / n_images - 1 / n_all)
        freedom = (seen or n_images) - 1 - len(self._explaining)
        quantile = float(stdtrit(freedom, 1 - self.risk / self.n_looks))
        return float(estimate + quantile * math.sqrt(variance)), False

    @cached_property
    def _explaining(self) -> NDArray[np.float64]:
        """(4, images): what is known of all images, with means of 0."""
        rival = self.correct.array().astype(np.float64)
        groups = [group.mean(axis=0) for group in np.array_split(rival[1:], _N_GROUPS) if len(group)]
        known = np.stack([rival[0], *groups])
        known -= known.mean(axis=1, keepdims=True)
        return known

    def _unexplained(self, values: NDArray[np.float64], n_images: int) -> NDArray[np.float64]:
        """Values (images,) without what their regression on the first `n_images` explains; their mean stays."""
        known = self._explaining[:, :n_images]
        known = known - known.mean(axis=1, keepdims=True)
        slopes = np.linalg.lstsq(known.T, values[:n_images], rcond=None)[0]
        explained: NDArray[np.float64] = slopes @ self._explaining
        return values - explained

    def _variance(self, sample: NDArray[np.float64], n_rates: int | None = None) -> float:
        """Of the images that a sample (n,) of residuals was drawn from, sums over the first `n_rates` or all rates.

        A sample whose images all agree still doesn't know the others: one of them is taken to be the opposite.
        """
        n_images = len(sample)
        largest = sum(map(abs, self.weights[:n_rates]))
        return float((sample.var() * n_images + largest**2 / n_images) / (n_images - 1 - len(self._explaining)))
