"""The strength of the refit's penalty, chosen on the reference images by leaving some of them out.

On one pruned network, half of whose components are gone at random, layers are fitted without a fifth of the images and
their error is taken on that fifth. The equations without some images are sums of the others' (closed form): nothing is
computed again.

Of a convolutional network at most 24 layers are asked, and what is chosen has the least error of them all, each in
relation to what pruning does to it. Of a transformer each layer has its own: the first ones can follow the references
closely, the classifier, which sees every image once, hardly at all (on the CIFAR ViT 0.1 and 10). In a convolutional
network that loses more than it gains: what each layer of a MobileNetV2 likes best together prunes worse than one
strength for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from objectives.pruning.ranking import Masks
from objectives.repair.chunks import Chunks
from objectives.repair.order import OrderedNetwork
from objectives.repair.original import Targets
from objectives.repair.refit import Refit
from objectives.repair.ridge import Equations, left_out_errors

__all__ = ["STRENGTHS", "choose_strength"]

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Those that are tried, in relation to the mean of the Gram matrix's diagonal."""

_N_PARTS = 5
# Of a convolutional network, at most, spread evenly over its depth; others go on with what was best before them.
_N_LAYERS = 24


def choose_strength(
    network: OrderedNetwork, targets: Mapping[str, Targets], images: Tensor, masks: Masks, batch_size: int
) -> float | dict[str, float]:
    """One of `STRENGTHS`, of a transformer for each layer; the largest where there is only one image.

    A layer that pruning doesn't reach has the largest, too.

    Args:
        network: the original.
        targets: of each layer.
        images: reference images (N, C, H, W).
        masks: of the pruned network to choose it on.
        batch_size: images of a chunk.
    """
    if len(images) == 1:
        return STRENGTHS[-1]
    choice = _Choice(network, targets, masks, Chunks.of(images, batch_size), min(_N_PARTS, len(images)))
    choice.repair()
    if network.is_transformer:
        names = (name for name in network.layers if name in network.repairable)
        return {name: choice.best.get(name, STRENGTHS[-1]) for name in names}
    return _best(choice.errors)


def _best(errors: Sequence[float]) -> float:
    """The strength with the least error, of equals the largest."""
    return STRENGTHS[min(reversed(range(len(STRENGTHS))), key=errors.__getitem__)]


class _Choice(Refit):
    """A pass that goes on with what is best for each layer that is asked, and adds up what all strengths are worth."""

    def __init__(
        self, network: OrderedNetwork, targets: Mapping[str, Targets], masks: Masks, images: Chunks, n_parts: int
    ) -> None:
        super().__init__(network, targets, masks, images, STRENGTHS[-1])
        names = [name for name in network.layers if name in network.repairable]
        n_asked = len(names) if network.is_transformer else min(len(names), _N_LAYERS)
        self.asked = frozenset(names[(i + 1) * len(names) // n_asked - 1] for i in range(n_asked))
        self.n_parts_asked = n_parts
        self.errors = [0.0] * len(STRENGTHS)
        self.best: dict[str, float] = {}

    def n_parts(self, name: str) -> int:
        """See `Refit.n_parts`; one of a layer that isn't asked."""
        return self.n_parts_asked if name in self.asked else 1

    def chosen(self, name: str, parts: Sequence[Equations]) -> float:
        """See `Refit.chosen`."""
        if name not in self.asked:
            return next(reversed(self.best.values()), STRENGTHS[-1])
        unrepaired = sum(part.square for part in parts)
        if unrepaired == 0:
            return STRENGTHS[-1]
        errors = [error / unrepaired for error in left_out_errors(parts, STRENGTHS)]
        self.errors = [before + error for before, error in zip(self.errors, errors, strict=True)]
        self.best[name] = _best(errors)
        return self.best[name]
