"""The attribution engine: relevance of all components on the reference samples, by zennit, one composite at a time.

Relevance starts as 1 at the true class's logit and 0 elsewhere (Yeom et al. 2021, section 3.2), or as the logit itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from zennit.core import stabilize

from objectives.attribution.composites import check_attention, check_groups, zennit_composite
from objectives.attribution.operations import STABILIZER
from objectives.attribution.relevance import Relevance, moments, spread
from objectives.datasets import LabelledImages
from objectives.errors import RelevanceError
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from search_spaces.choices import AbsScope, OutputRelevance
from search_spaces.composites import CompositeSpec

__all__ = ["Attribution", "ZennitAttribution", "captured", "start_relevance"]

_N_KEPT = 8
_BALANCE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class Attribution(Protocol):
    """An engine that attributes composites on fixed reference samples.

    Engines are not thread-safe: hooks live on the one canonical copy. Use one engine a worker.
    """

    @property
    def batches(self) -> Batches:
        """Samples that are attributed at a time."""
        ...

    def attribute(self, composite: CompositeSpec) -> Relevance:
        """Relevance under a composite.

        Raises:
            RelevanceError: relevance that isn't finite or doesn't balance.
            OutOfMemoryError: the device has no room for a single image.
        """
        ...

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        """Computes together what composites that will be asked soon share; may do nothing."""
        ...

    def on(self, network: CanonicalNetwork) -> Attribution:
        """This engine for one composite on a network with other weights: it keeps nothing, and shares `batches`."""
        ...


def start_relevance(logits: Tensor, labels: Tensor, output_relevance: OutputRelevance) -> Tensor:
    """What relevance starts as, (N, classes): 0 but at the true classes (N,)."""
    chosen = logits.gather(1, labels[:, None]) if output_relevance == "logit" else 1.0
    return torch.zeros_like(logits).scatter_(1, labels[:, None], chosen)


@dataclass(frozen=True, slots=True, eq=False)
class ZennitAttribution:
    """zennit's own rules on the canonical network, one forward and backward pass a composite.

    Attributes:
        network: canonical; hooks are on it only during `attribute`.
        layer_groups: group of every layer.
        references: images (N, C, H, W) and labels (N,) on the network's device.
        batch_size: part of a study's identity, since it changes rounding.
        abs_scope: where `abs` is taken.
        output_relevance: what relevance starts as.
        batches: images a pass; halved where memory runs out.

    Raises:
        UnsupportedNetworkError: a layer has no group.
    """

    network: CanonicalNetwork
    layer_groups: Mapping[str, str]
    references: LabelledImages
    batch_size: int
    abs_scope: AbsScope = "sum"
    output_relevance: OutputRelevance = "one"
    batches: Batches = field(init=False)
    _kept: OrderedDict[str, Relevance] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        check_groups(self.network, self.layer_groups)
        object.__setattr__(self, "batches", Batches("attribution", self.batch_size))

    def attribute(self, composite: CompositeSpec) -> Relevance:
        """See `Attribution.attribute`; the latest relevances are kept, which other rankings share."""
        key = composite.attribution_key
        if key not in self._kept:
            self._kept[key] = self.batches.run(lambda batch_size: self._attribute(composite, batch_size))
            if len(self._kept) > _N_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        """Does nothing: zennit attributes one composite at a time."""

    def on(self, network: CanonicalNetwork) -> ZennitAttribution:
        """See `Attribution.on`."""
        engine = replace(self, network=network)
        object.__setattr__(engine, "batches", self.batches)
        return engine

    def _attribute(self, composite: CompositeSpec, batch_size: int) -> Relevance:
        check_attention(self.network, composite)
        sums: dict[str, Tensor] = {}
        rules = zennit_composite(composite, self.layer_groups)
        with rules.context(self.network.module) as module, captured(module, self.network) as values:
            for start in range(0, len(self.references), batch_size):
                batch = slice(start, start + batch_size)
                relevance = self._backward(module, values, self.references.images[batch], self.references.labels[batch])
                for name, at_outputs in relevance.items():
                    of_batch = moments(spread(self.network, name, at_outputs), self.abs_scope)
                    sums[name] = sums[name] + of_batch if name in sums else of_batch
        return Relevance(len(self.references), {name: of_all.cpu() for name, of_all in sums.items()})

    def _backward(self, module: nn.Module, values: CapturedValues, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            logits = module(images.detach().clone().requires_grad_())
        start = start_relevance(logits.detach(), labels, self.output_relevance)
        names = list(self.network.components)
        sums = [tensor for branches, output in values.sums.values() for tensor in (*branches, output)]
        relevances = torch.autograd.grad(logits, [values.outputs[name] for name in names] + sums, start)
        at_sums = iter(relevances[len(names) :])
        for name, (branches, output) in values.sums.items():
            shares = [next(at_sums) for _ in branches]
            self._check_sum(name, output.detach(), shares, next(at_sums))
        return dict(zip(names, relevances, strict=False))

    def _check_sum(self, name: str, output: Tensor, shares: list[Tensor], relevance: Tensor) -> None:
        """The branches of a residual sum receive its relevance, less what the stabilizer takes."""
        stacked = torch.stack(shares)
        error = (stacked.sum(dim=0) - relevance * output / stabilize(output, STABILIZER)).abs().sum()
        # Branches that nearly cancel have shares far above the relevance, and rounding in proportion to the shares.
        scale = torch.maximum(relevance.abs().sum(), stacked.abs().sum())
        if bool(error > _BALANCE_TOLERANCE[output.dtype] * scale):
            raise RelevanceError(
                f"The branches of the residual sum {name!r} don't add up to its relevance: {float(error):.3g} of "
                f"{float(relevance.abs().sum()):.3g} are lost."
            )


@dataclass(frozen=True, slots=True, eq=False)
class CapturedValues:
    """Tensors of the latest forward pass whose gradients are relevances.

    Attributes:
        outputs: layer or attention that has components -> its output.
        sums: residual sum -> (its branches, its output).
    """

    outputs: dict[str, Tensor]
    sums: dict[str, tuple[tuple[Tensor, ...], Tensor]]


@contextmanager
def captured(module: nn.Module, network: CanonicalNetwork) -> Iterator[CapturedValues]:
    """Keeps the outputs of all that has components, and the operands of all residual sums of each forward pass."""
    values = CapturedValues({}, {})

    def keep_output(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values.outputs[name] = output

        return hook

    def part_branches(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A shortcut feeds the block as well: a view of its own separates the relevance that the sum gives it.
        return tuple(branch.view_as(branch) for branch in inputs)

    def keep_sum(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values.sums[name] = (inputs, output)

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep_output(name)) for name in network.components]
    for name in network.residual_sums:
        residual_sum = module.get_submodule(name)
        handles.append(residual_sum.register_forward_pre_hook(part_branches))
        handles.append(residual_sum.register_forward_hook(keep_sum(name)))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
        values.outputs.clear()
        values.sums.clear()
