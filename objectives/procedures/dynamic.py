"""Dynamic pruning for scarce data, an implementation of the idea of DPX-SD (Yasui et al. 2025), not a reproduction.

Iterative pruning by relevance degrades in cascades: where components go that a class needs, that class loses relevance,
so its other components go next. With few images a class and fixed weights, two changes stand against it. A is the
harmonic mean of class accuracies on the reference images, which is low as soon as one class is.

change of pruning rate    a step that lowers A by more than a tolerance is undone and halved, down to one component;
                          steps grow twofold after each that is taken, and what is left is ranked anew
change of pruning order   where the smallest step hurts, its components and the `search_width` next ones are tried one
                          by one, and those go first that lower A least, whatever their relevance

Thresholds, schedule and width of the paper aren't available to us: these are our choice, and so is the bound on work.
Pruning proceeds in shares of the original components, as iterative pruning does, and a report follows each. Within a
share at most `rankings_per_step` rankings are made and `evaluations_per_step` candidates measured; with the last of
them what is left of the share goes in the latest order. Once A is 0 there is nothing to protect and nothing is
measured: where a class has no reference right from the start, this is iterative pruning. Without a change of rate the
smallest step is the whole share; where that has more components than candidates may be measured, those around its end
are tried, and the least relevant go untried.

The paper's baselines are `one_shot` (PX) and `iterative` (DPX), which this is without both changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

import torch
from torch import Tensor

from objectives.procedures.steps import Pruning, Step
from objectives.pruning.curve import harmonic_mean
from objectives.pruning.ranking import Masks, Ranking
from search_spaces.procedures import Dynamic

__all__ = ["dynamic"]


def dynamic(pruning: Pruning, options: Dynamic) -> Iterator[Step]:
    """Yields steps of equal shares, the last of which takes what is left.

    Args:
        pruning: ranks all components over the whole network.
        options: see `Dynamic`.
    """
    course = _Course(pruning, options)
    share = Decimal(0)
    while course.left:
        share = min(share + Decimal(str(options.step_share)), Decimal(1))
        n_pruned = course.ranking.n_pruned(float(share))
        if n_pruned > len(course.gone):
            yield course.step(n_pruned)


class _Course:
    """The state of one pruning.

    Attributes:
        ranking: the latest one.
        gone: pruned components, positions in the concatenation of all layers, in their order.
        left: the others, in the order in which they are to be pruned.
        level: A of what is left.
        size: components of the next step.
    """

    def __init__(self, pruning: Pruning, options: Dynamic) -> None:
        self.pruning = pruning
        self.options = options
        self.ranking = pruning.rank()
        self.gone: list[int] = []
        self.left: list[int] = self.ranking.order.tolist()
        self.kept = torch.ones(len(self.ranking), dtype=torch.bool)
        self.level = 0.0 if self._changes_nothing else self._accuracy([])
        self.size = len(self.ranking)
        self._is_fresh = True
        self._n_harmless = 0  # at the beginning of `left`, found by a search

    @property
    def _changes_nothing(self) -> bool:
        return self.options.fixed_rate and self.options.fixed_order

    def step(self, end: int) -> Step:
        """Prunes until `end` components are gone."""
        largest, n_rankings, n_left = end - len(self.gone), 1, self.options.evaluations_per_step
        if not self._is_fresh:
            self._rank()
        while (rest := end - len(self.gone)) > 0:
            if not self._is_fresh and not self._n_harmless and n_rankings < self.options.rankings_per_step:
                self._rank()
                n_rankings += 1
            if self.level == 0 or n_left == 1:
                self._prune(rest, 0.0 if self.level == 0 else self._accuracy(self.left[:rest]))
                continue
            n = rest if self.options.fixed_rate else min(self.size, rest)
            accuracy = self._accuracy(self.left[:n])
            n_left -= 1
            if n > 1 and not self.options.fixed_rate and not self._is_harmless(accuracy):
                self.size = n // 2
                continue
            most = n_left - 2  # one is kept for what is chosen, and one for the next step
            beyond = min(self.options.search_width, max(most - n, most // 2))
            if not self.options.fixed_order and not self._is_harmless(accuracy) and beyond > 0:
                n_tried = self._search(max(0, n + beyond - most), n + beyond)
                accuracy = self._accuracy(self.left[:n])
                n_left -= n_tried + 1
            if self._is_harmless(accuracy):
                self.size = min(2 * n, largest)
            self._prune(n, accuracy)
        order = torch.tensor([*self.gone, *self.left])
        return Step(Ranking(order, self.ranking.widths, self.ranking.kinds), end)

    def _search(self, start: int, end: int) -> int:
        """Puts those of the components at these places first that hurt least; how many there are."""
        pool = self.left[start:end]
        accuracies = [self._accuracy([each], pool[place + 1 :]) for place, each in enumerate(pool)]
        # Stable: of those that hurt alike the least relevant goes first.
        order = sorted(range(len(pool)), key=lambda place: -accuracies[place])
        self.left[start:end] = [pool[place] for place in order]
        self._n_harmless = 0 if start else sum(map(self._is_harmless, accuracies))
        return len(pool)

    def _is_harmless(self, accuracy: float) -> bool:
        return accuracy >= self.level - self.options.tolerance

    def _accuracy(self, pruned: Sequence[int], ahead: Sequence[int] = ()) -> float:
        """A of what is left without these components.

        Args:
            pruned: positions.
            ahead: components without any one of which it is likely to be asked for next.
        """
        candidates = (self._masks([each]) for each in ahead)
        return harmonic_mean(self.pruning.class_accuracies(self._masks(pruned), candidates))

    def _masks(self, pruned: Sequence[int]) -> Masks:
        kept: Tensor = self.kept.clone()
        kept[list(pruned)] = False
        return self.ranking.split(kept)

    def _prune(self, n: int, accuracy: float) -> None:
        """The next `n` components, after which A is `accuracy`."""
        self.kept[self.left[:n]] = False
        self.gone += self.left[:n]
        del self.left[:n]
        self.level = accuracy
        self._is_fresh = False
        self._n_harmless = max(0, self._n_harmless - n)

    def _rank(self) -> None:
        self.ranking = self.pruning.rank(self.ranking.split(self.kept.clone()))
        self.left = self.ranking.order[len(self.gone) :].tolist()
        self._is_fresh = True
        self._n_harmless = 0
