"""The repairer of one network on its reference images: masks become the network with repaired weights."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from objectives.fingerprints import state_fingerprint
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.fusion import images_cached, largest_step
from objectives.pruning.ranking import Masks
from objectives.repair.chunks import Chunks
from objectives.repair.moments import MatchMoments
from objectives.repair.order import OrderedNetwork, order
from objectives.repair.original import Targets, observe
from objectives.repair.passes import RepairPass
from objectives.repair.refit import Refit
from objectives.repair.rows import Linear, LinearLayer
from objectives.repair.strength import choose_strength
from search_spaces.repairs import RepairSpec

__all__ = ["FORM", "Repairer", "with_biases", "with_layers"]

METHODS: dict[str, Callable[[OrderedNetwork, Mapping[str, Targets], Masks, Chunks, Any], RepairPass]] = {
    "bn": MatchMoments,
    "refit": Refit,
}
"""What carries out each repair, with a strength as `Repairer.strength` gives it."""

FORM = 9
"""Counts changes of what a repair computes: studies and stores keep what was measured."""

# Of each layer; twice as many positions change the AUC of ResNet-20 on CIFAR-10 by 0.001.
_N_POSITIONS = 3000
# Values of all references that are kept at once; beyond, only some of the references are used.
_BYTES_KEPT = 4 * 2**30
# Weights of repaired networks that are kept.
_BYTES_REPAIRED = 128 * 2**20
_SEED = 0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Repaired:
    layers: dict[str, Linear]
    seconds: float


class Repairer:
    """Repairs pruned versions of one network.

    What the original computes on the references is computed at first use and kept. Not thread-safe.

    Args:
        network: canonical; it isn't changed.
        references: (N, C, H, W), on the network's device. Labels aren't needed.
        batches: images a layer computes at once.
    """

    def __init__(self, network: CanonicalNetwork, references: Tensor, batches: Batches) -> None:
        self.network = network
        self.batches = batches
        self._references = references
        self._strength: float | dict[str, float] | None = None
        self._repaired: OrderedDict[str, _Repaired] = OrderedDict()

    @cached_property
    def images(self) -> Tensor:
        """The references that are used: all, or as many as there is memory for, drawn by a fixed seed."""
        references = self._references
        # A step reads and writes, a branch waits beside it, and of what is read some channels may be copied.
        bytes_each = 3 * largest_step(self.network.module.graph) * references.element_size()
        n_images = max(1, min(len(references), _BYTES_KEPT // bytes_each))
        if n_images == len(references):
            return references
        _log.info("The repair uses %d of %d references: memory holds no more.", n_images, len(references))
        drawn = torch.randperm(len(references), generator=torch.Generator().manual_seed(_SEED))[:n_images]
        return references[drawn.sort().values.to(references.device)]

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what a repaired network depends on beside the original, the masks and the repair."""
        references = state_fingerprint({"images": self._references})
        content = [FORM, references, self.batches.asked, _N_POSITIONS, _BYTES_KEPT, _SEED]
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    def strength(self, repair: RepairSpec) -> float | dict[str, float] | None:
        """The repair's strength, chosen on the references where it has none; None of `none`.

        What is chosen for a transformer's refit is each layer's own.
        """
        if repair.strength is not None or repair.method == "none":
            return repair.strength
        if repair.method == "bn":
            return 1 / len(self.images)  # as if one image more had shown no change
        if self._strength is None:
            generator = torch.Generator().manual_seed(_SEED)
            widths = self.network.components.items()
            masks = {name: torch.rand(width, generator=generator) < 0.5 for name, width in widths}
            for mask in masks.values():
                mask[0] &= not bool(mask.all())  # or what it reaches might not be reached
            self._strength = self.batches.run(
                lambda size: choose_strength(self._ordered, self._targets, self.images, masks, size), self._at_most
            )
            _log.info("The references choose strength %s for refitting.", self._strength)
        return self._strength

    def layers(self, masks: Masks, repair: RepairSpec) -> dict[str, Linear]:
        """The layers that a repair changes, by name; none where nothing is pruned.

        Raises:
            RepairError: a layer can't be repaired.
            OutOfMemoryError: the device has no room for a single image.
        """
        return self._repair(masks, repair).layers

    def seconds(self, masks: Masks, repair: RepairSpec) -> float:
        """What `layers` takes when it is first asked, once the strength is chosen; raises as it does."""
        return self._repair(masks, repair).seconds

    def _repair(self, masks: Masks, repair: RepairSpec) -> _Repaired:
        strength = self.strength(repair)
        if strength is None or all(bool(mask.all()) for mask in masks.values()):
            return _Repaired({}, 0.0)
        key = f"{repair.method} {strength!r} {[mask.tolist() for mask in masks.values()]}"
        if key not in self._repaired:
            # What the original computes is observed before the clock starts.
            method, targets = METHODS[repair.method], self._targets

            def repaired(batch_size: int) -> dict[str, Linear]:
                images = Chunks.of(self.images, batch_size)
                return method(self._ordered, targets, masks, images, strength).repair()

            start = time.perf_counter()
            layers = self.batches.run(repaired, self._at_most)
            self._repaired[key] = _Repaired(layers, time.perf_counter() - start)
            self._forget()
        self._repaired.move_to_end(key)
        return self._repaired[key]

    def on(self, network: CanonicalNetwork) -> Repairer:
        """A repairer of the same network with other weights: their outputs are its targets.

        What has been chosen for this one's weights holds for those.
        """
        other = Repairer(network, self._references, self.batches)
        other._strength = self._strength
        return other

    def repaired(self, masks: Masks, repair: RepairSpec) -> CanonicalNetwork:
        """The network with repaired weights, to be masked or made slim by the same masks.

        Raises:
            RepairError: a layer can't be repaired.
        """
        return with_layers(self.network, self.layers(masks, repair))

    def _forget(self) -> None:
        """What is kept serves races, which come back to the same masks for more images."""

        def size(repaired: _Repaired) -> int:
            return sum(tensor.nbytes for layer in repaired.layers.values() for tensor in layer.parameters())

        while len(self._repaired) > 1 and sum(map(size, self._repaired.values())) > _BYTES_REPAIRED:
            self._repaired.popitem(last=False)

    @cached_property
    def _at_most(self) -> int | None:
        return images_cached(self.network.module.graph, self._references.dtype, self._references.device)

    @cached_property
    def _ordered(self) -> OrderedNetwork:
        return order(self.network.module)

    @cached_property
    def _targets(self) -> dict[str, Targets]:
        return self.batches.run(
            lambda size: observe(self._ordered, self.images, size, _N_POSITIONS, _SEED), self._at_most
        )


def with_layers(network: CanonicalNetwork, layers: Mapping[str, nn.Module]) -> CanonicalNetwork:
    """A canonical network with other layers in the place of some; the network itself where there are none.

    Args:
        network: it isn't changed, and shares its other modules.
        layers: by name.
    """
    if not layers:
        return network
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(network.module.graph, copies))
    for old, new in copies.items():
        new.meta = dict(old.meta)
    module = fx.GraphModule(network.module, graph, "CanonicalNetwork")
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer)
    return replace(network, module=module.eval())


def with_biases(network: CanonicalNetwork, names: Iterable[str]) -> CanonicalNetwork:
    """A canonical network whose layers of these names have biases, zeros where they had none, as repaired ones do."""
    layers = {}
    for name in names:
        layer = LinearLayer(network.module.get_submodule(name), ())  # type: ignore[arg-type]
        if layer.module.bias is None:
            layers[name] = layer.replaced(layer.weight(), layer.bias())
    return with_layers(network, layers)
