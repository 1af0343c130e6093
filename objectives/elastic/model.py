"""The elastic network: nested levels of one network on one set of weights.

Each level is the exact slim network of its masks, and a smaller level keeps nothing that a larger one is without. So
the channels of every value in the graph have an order of which each level stores a beginning: those that the smallest
level stores come first, then those that the next one adds, and so on. With rows and columns in these orders, a level's
weight is a corner of the largest level's, `weight[:rows, :columns]`, a view without memory of its own. No layers need
to be coupled: where branches of a residual sum store different channels, index buffers add them, as in any slim
network.

To switch the level is to choose another graph over the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from objectives.network import CanonicalNetwork, n_channels, shape_of
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import draft, stored_channels

__all__ = ["ElasticModel", "corner"]


class ElasticModel(nn.Module):
    """Several sizes of a classifier in the memory of the largest.

        >>> model = ElasticModel(canonical, [ranking.masks(ranking.n_pruned(rate)) for rate in (0, 0.3, 0.5, 0.7)])
        >>> model.set_level(3)
        >>> logits = model(images)

    Its parameters and state dict are the largest level's. What changes them in place (an optimizer, `load_state_dict`)
    changes all levels at once; `to`, `float` and the like, and copies of the model, keep the levels together. A level
    is trained as `train(model.at(level), ...)`.

    Not thread-safe: one thread at a time runs it or switches its level.

    Args:
        network: canonical; it isn't changed, and its weights are copied once.
        masks: kept components of each level, the largest level first; layers that aren't named are kept whole.

    Attributes:
        masks: likewise, of all layers.

    Raises:
        ValueError: there is no level, masks don't fit the network, or levels aren't nested.
    """

    def __init__(self, network: CanonicalNetwork, masks: Sequence[Masks]) -> None:
        super().__init__()
        self.masks = _checked(network, masks)
        orders = _orders(network, self.masks)
        largest, *smaller = (draft(network, level, orders).written() for level in self.masks)
        self.network = largest._apply(torch.clone)  # what is kept whole isn't copied by slimming
        self._smaller = tuple(smaller)  # no submodules: their tensors are the largest level's
        self._level = 0
        self._share(check=True)

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return len(self.masks)

    @property
    def level(self) -> int:
        """The level that `forward` runs, 0 for the largest."""
        return self._level

    def set_level(self, level: int) -> None:
        """Has `forward` run another level.

        Raises:
            ValueError: there is no such level.
        """
        self.at(level)
        self._level = level

    def at(self, level: int) -> fx.GraphModule:
        """A level's own network, (N, C, H, W) -> logits (N, classes), on the shared weights.

        Raises:
            ValueError: there is no such level.
        """
        if not 0 <= level < self.n_levels:
            raise ValueError(f"`level` must be from 0 to {self.n_levels - 1}, but got {level}.")
        return self._smaller[level - 1] if level else self.network

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes) of the current level."""
        logits: Tensor = (self._smaller[self._level - 1] if self._level else self.network)(images)
        return logits

    def weights(self, level: int) -> dict[str, Tensor]:
        """What a level uses of the shared weights.

        Returns:
            Name of a weight of the largest level -> view of it. A layer all of whose inputs are pruned uses its bias.
        """
        network = self.at(level)
        own: dict[str, Tensor] = dict(network.named_parameters())
        for node in _constants(network):
            own[node.meta["parameter"]] = network.get_buffer(str(node.target))
        return {name: tensor.detach() for name, tensor in own.items()}

    def _share(self, *, check: bool = False) -> None:
        """Has all smaller levels use the largest one's weights; with `check` where they are equal, or fails."""
        whole = self.weights(0)
        for network in self._smaller:
            for name, parameter in list(network.named_parameters()):
                view = corner(whole[name], parameter.shape)
                assert not check or torch.equal(view, parameter), f"{name} of a level is a corner of the largest one's"
                parent, _, key = name.rpartition(".")
                setattr(network.get_submodule(parent), key, nn.Parameter(view, requires_grad=False))
            for node in _constants(network):
                constant = network.get_buffer(str(node.target))
                source = whole[node.meta["parameter"]]
                view = source.reshape(-1)[: constant.numel()].view(constant.shape)
                assert not check or torch.equal(view, constant), f"{node} of a level is a part of the largest one's"
                setattr(network, str(node.target), view)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for network in self._smaller:
            network._apply(fn, recurse)
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share()


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """View of the first entries of a tensor in each dimension."""
    return tensor[tuple(slice(size) for size in shape)]


def _constants(network: fx.GraphModule) -> list[fx.Node]:
    """Steps that read a constant which counts as a parameter: an embedding, or the bias of a layer without inputs."""
    return [node for node in network.graph.nodes if node.op == "get_attr" and node.meta.get("parameter") is not None]


def _checked(network: CanonicalNetwork, masks: Sequence[Masks]) -> tuple[dict[str, Tensor], ...]:
    if not masks:
        raise ValueError("An elastic network needs masks of at least one level, but got none.")
    widths = network.components
    levels: list[dict[str, Tensor]] = []
    for level, given in enumerate(masks):
        for name, mask in given.items():
            if name not in widths:
                raise ValueError(f"The masks of level {level} name {name!r}, which has no components.")
            if mask.dtype != torch.bool or mask.shape != (widths[name],):
                raise ValueError(
                    f"The mask of {name!r} in level {level} must be bool of shape {(widths[name],)}, but got "
                    f"{mask.dtype} of shape {tuple(mask.shape)}."
                )
        whole = {name: torch.ones(width, dtype=torch.bool) for name, width in widths.items()}
        levels.append({name: given.get(name, all_kept).cpu().clone() for name, all_kept in whole.items()})
    for level, (larger, smaller) in enumerate(itertools.pairwise(levels)):
        for name in widths:
            if bool((smaller[name] & ~larger[name]).any()):
                raise ValueError(
                    f"Levels must be nested, but level {level + 1} keeps components of {name!r} that level {level} is "
                    "without."
                )
    return tuple(levels)


def _orders(network: CanonicalNetwork, masks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Order of the channels of every value: by the number of levels that store them, then by index."""
    n_levels: dict[str, Tensor] = {}
    for level in masks:
        for name, channels in stored_channels(network, level).items():
            n_levels.setdefault(name, torch.zeros(_n_channels(network, name), dtype=torch.int64))[channels] += 1
    return {name: (-number).argsort(stable=True) for name, number in n_levels.items()}


def _n_channels(network: CanonicalNetwork, name: str) -> int:
    (node,) = (node for node in network.module.graph.nodes if node.name == name)
    return n_channels(shape_of(node))
