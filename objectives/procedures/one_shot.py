"""One-shot pruning (Hatefi et al. 2024): rank once on the unpruned network, then prune at every rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from objectives.pruning.ranking import Masks, Ranking

__all__ = ["one_shot"]


def one_shot(ranking: Callable[[], Ranking], rates: Sequence[float]) -> Iterator[Masks]:
    """Yields the masks of each rate, from a single ranking.

    Args:
        ranking: of all components on the unpruned network.
        rates: increasing from 0.
    """
    ranked = ranking()
    for rate in rates:
        yield ranked.masks(ranked.n_pruned(rate))
