"""A network's components in random order."""

import torch

from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Ranking, rank

__all__ = ["random_ranking"]


def random_ranking(canonical: CanonicalNetwork, seed: int = 0) -> Ranking:
    """The order in which random scores prune."""
    generator = torch.Generator().manual_seed(seed)
    return rank({name: torch.rand(n, generator=generator) for name, n in canonical.components.items()})
