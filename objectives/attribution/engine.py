"""The attribution engine: relevance of all components on the reference samples, by zennit, one composite at a time.

Relevance starts as 1 at the true class's logit and 0 elsewhere (Yeom et al. 2021, section 3.2), or as the logit itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from zennit.core import stabilize

from objectives.attribution.composites import check_groups, zennit_composite
from objectives.attribution.operations import STABILIZER
from objectives.attribution.relevance import AbsScope, Relevance
from objectives.datasets import LabelledImages
from objectives.errors import RelevanceError
from objectives.network import CanonicalNetwork
from search_spaces.composites import CompositeSpec

__all__ = ["Attribution", "OutputRelevance", "ZennitAttribution"]

OutputRelevance = Literal["one", "logit"]

_BALANCE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class Attribution(Protocol):
    """An engine that attributes composites on fixed reference samples.

    Engines are not thread-safe: hooks live on the one canonical copy. Use one engine a worker.
    """

    def attribute(self, composite: CompositeSpec) -> Relevance:
        """Relevance under a composite.

        Raises:
            RelevanceError: relevance that isn't finite or doesn't balance.
        """
        ...


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

    Raises:
        UnsupportedNetworkError: a layer has no group.
    """

    network: CanonicalNetwork
    layer_groups: Mapping[str, str]
    references: LabelledImages
    batch_size: int
    abs_scope: AbsScope = "sum"
    output_relevance: OutputRelevance = "one"

    def __post_init__(self) -> None:
        check_groups(self.network, self.layer_groups)

    def attribute(self, composite: CompositeSpec) -> Relevance:
        """See `Attribution.attribute`."""
        signed: dict[str, list[Tensor]] = {name: [] for name in self.network.components}
        element: dict[str, list[Tensor]] = {name: [] for name in self.network.components}
        rules = zennit_composite(composite, self.layer_groups)
        with rules.context(self.network.module) as module, captured(module, self.network) as values:
            for start in range(0, len(self.references), self.batch_size):
                batch = slice(start, start + self.batch_size)
                relevance = self._backward(module, values, self.references.images[batch], self.references.labels[batch])
                for name, at_outputs in relevance.items():
                    flat = at_outputs.flatten(start_dim=2) if at_outputs.ndim > 2 else at_outputs.unsqueeze(-1)
                    signed[name].append(flat.sum(dim=-1))
                    element[name].append(flat.abs().sum(dim=-1))
        signed_all = {name: torch.cat(parts) for name, parts in signed.items()}
        if self.abs_scope == "element":
            magnitude = {name: torch.cat(parts) for name, parts in element.items()}
        else:
            magnitude = {name: parts.abs() for name, parts in signed_all.items()}
        return Relevance(signed_all, magnitude)

    def _backward(self, module: nn.Module, values: CapturedValues, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            logits = module(images.detach().clone().requires_grad_())
        start = torch.zeros_like(logits)
        chosen = logits.detach().gather(1, labels[:, None]) if self.output_relevance == "logit" else 1.0
        start.scatter_(1, labels[:, None], chosen)
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
        outputs: layer -> its output.
        sums: residual sum -> (its branches, its output).
    """

    outputs: dict[str, Tensor]
    sums: dict[str, tuple[tuple[Tensor, ...], Tensor]]


@contextmanager
def captured(module: nn.Module, network: CanonicalNetwork) -> Iterator[CapturedValues]:
    """Keeps the outputs of all layers and the operands of all residual sums of each forward pass."""
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

    handles = [module.get_submodule(name).register_forward_hook(keep_output(name)) for name in network.layers]
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
