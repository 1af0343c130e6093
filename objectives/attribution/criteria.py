"""Criteria that rank components without relevance: the baselines of Yeom et al. 2021 and Hatefi et al. 2024.

Unless a criterion says otherwise, a component's score is the mean over the reference samples of the magnitude of a
value v summed over space, where v stands for the component's outputs z (of a head: its outputs at all tokens) as their
relevance would:

    score_c = 1/N sum_n |sum_p v_c,p(x_n)|     (with the abs scope `element`: 1/N sum_n sum_p |v_c,p(x_n)|)

The scores of a layer are then divided by their l2 norm (Yeom et al. 2021, section 3.1), but for `random`. A layer whose
batch norm is folded into it has the outputs, weights and gradients of both together. L is the cross entropy of the true
class over the classes that the task keeps, F the true class's logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from objectives.attribution.engine import captured
from objectives.attribution.operations import Activation, plain_gradients
from objectives.attribution.relevance import moments, normalized, spread
from objectives.datasets import LabelledImages
from objectives.errors import RelevanceError
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks, of_kept
from search_spaces.choices import AbsScope
from search_spaces.criteria import Criterion, CriterionSpec

__all__ = ["N_STEPS", "ReferenceSamples", "conductance", "criterion_scores"]

N_STEPS = 20
"""Steps of integrated gradients from the zero image to the sample."""


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSamples:
    """A network and the samples that its components are scored on.

    Attributes:
        network: canonical; it is changed only while a criterion is computed.
        references: images (N, C, H, W) and labels (N,) on the network's device.
        batches: images a pass; halved where memory runs out.
        abs_scope: where magnitudes are taken.
    """

    network: CanonicalNetwork
    references: LabelledImages
    batches: Batches
    abs_scope: AbsScope = "sum"

    def mean_magnitude(
        self, values_of: Callable[[PlainNetwork, Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The score of the module's docstring, layer -> (components,) in float64.

        Args:
            values_of: the value v of all outputs, from the network, images (N, C, H, W) and labels (N,).
        """

        def compute(batch_size: int) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            with plain(self.network) as network:
                for start in range(0, len(self.references), batch_size):
                    batch = slice(start, start + batch_size)
                    values = values_of(network, self.references.images[batch], self.references.labels[batch])
                    for name, value in values.items():
                        _, magnitude, _ = moments(spread(self.network, name, value.detach()), self.abs_scope)
                        sums[name] = sums[name] + magnitude if name in sums else magnitude
            return {name: of_all.cpu() / len(self.references) for name, of_all in sums.items()}

        return self.batches.run(compute)


class PlainNetwork:
    """A canonical network while its backward pass is the gradient. Made by `plain`."""

    def __init__(self, network: CanonicalNetwork, outputs: dict[str, Tensor]) -> None:
        self.network = network
        self._latest = outputs

    def run(self, images: Tensor, *, gradient: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, classes) and outputs of all that has components, by name in forward order."""
        with torch.set_grad_enabled(gradient):
            logits: Tensor = self.network.module(images.detach().clone().requires_grad_(gradient))
        return logits, {name: self._latest[name] for name in self.network.components}


@contextmanager
def plain(network: CanonicalNetwork) -> Iterator[PlainNetwork]:
    """The network with gradients while the block lasts."""
    with plain_gradients(network.module), captured(network.module, network) as values:
        yield PlainNetwork(network, values.outputs)


_Scores = Callable[[CriterionSpec, ReferenceSamples], dict[str, Tensor]]
_CRITERIA: dict[Criterion, _Scores] = {}


def _register(name: Criterion) -> Callable[[_Scores], _Scores]:
    def register(criterion: _Scores) -> _Scores:
        _CRITERIA[name] = criterion
        return criterion

    return register


def criterion_scores(spec: CriterionSpec, samples: ReferenceSamples, masks: Masks | None = None) -> dict[str, Tensor]:
    """Score of every component, layer -> (components,) in float64 in forward order; the highest are pruned last.

    Args:
        spec: the criterion.
        samples: network and images that it is computed on.
        masks: of the samples' network, where it is a pruned one: only kept components have a score, see `of_kept`.

    Raises:
        RelevanceError: a score isn't finite, or all scores of a layer of an unpruned network are 0.
        OutOfMemoryError: the device has no room for a single image.
    """
    scores = _CRITERIA[spec.name](spec, samples)
    if masks is not None:
        scores = of_kept(scores, masks)
    for name, of_layer in scores.items():
        if not bool(of_layer.isfinite().all()):
            raise RelevanceError(f"The criterion {spec.label} of layer {name!r} isn't finite; use another one.")
        if masks is None and not bool((of_layer != 0).any()):
            raise RelevanceError(f"The criterion {spec.label} is 0 all over layer {name!r}; use another one.")
    assert spec.normalize is not None, "the specification fills it in"
    return {name: normalized(of_layer, spec.normalize) for name, of_layer in scores.items()}


@_register("weight")
def _weight(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The score is |w_c|_2 of the weights without bias that make the component: a layer's row, a head's rows of v.

    Yeom et al. 2021, criterion W. Needs no reference samples.
    """
    return _weight_norms(samples.network, 2)


@_register("weight-l1")
def _weight_l1(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The score is |w_c|_1 of the same weights: Li et al. 2017, and the magnitude pruning (IMP) of Avé et al. 2025."""
    return _weight_norms(samples.network, 1)


def _weight_norms(network: CanonicalNetwork, order: int) -> dict[str, Tensor]:
    weights = _weights(network)
    return {
        name: weights[name].detach().reshape(n_components, -1).double().norm(p=order, dim=1).cpu()
        for name, n_components in network.components.items()
    }


@_register("gradient")
def _gradient(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The value v is dL/dz: Yeom et al. 2021, criterion G (Sun et al. 2017)."""
    return samples.mean_magnitude(lambda network, images, labels: _loss_gradients(network, images, labels)[1])


@_register("taylor")
def _taylor(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The value v is z dL/dz, the loss's first-order change where z becomes 0 (Molchanov et al. 2017; Yeom's T)."""

    def values(network: PlainNetwork, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs, gradients = _loss_gradients(network, images, labels)
        return {name: outputs[name] * gradient for name, gradient in gradients.items()}

    return samples.mean_magnitude(values)


@_register("hessian")
def _hessian(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The score is sum w^2 h over the weights w that make the component, without bias, as for `weight`.

    h stands for the diagonal of the loss's Hessian: the mean over samples of (dL/dw)^2, the empirical Fisher
    information. So half of it is what removing each of them alone does to the loss in second order (Optimal Brain
    Damage, LeCun et al. 1989), as torch-pruning's Hessian importance of a layer takes it. One backward pass a sample.
    """
    network, references, weights = samples.network, samples.references, _weights(samples.network)

    def compute(batch_size: int) -> dict[str, Tensor]:
        squares = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        with plain(network) as gradients_of, _trained(weights.values()):
            for image, label in zip(references.images.split(1), references.labels.split(1), strict=True):
                logits, _ = gradients_of.run(image)
                with torch.enable_grad():
                    loss = nn.functional.cross_entropy(logits, label)
                gradients = torch.autograd.grad(loss, list(weights.values()))
                for square, gradient in zip(squares.values(), gradients, strict=True):
                    square += gradient.double().square()
        return squares

    squares = samples.batches.run(compute)
    return {
        name: (weights[name].detach().double().square() * squares[name] / len(references))
        .reshape(n_components, -1)
        .sum(dim=1)
        .cpu()
        for name, n_components in network.components.items()
    }


@_register("activation")
def _activation(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The value v is f(z), f the nonlinearity that alone reads z, else the identity (Molchanov et al. 2017, sec. 2.2).

    Before a ReLU a component that never fires would have a large magnitude.
    """

    def values(network: PlainNetwork, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _, outputs = network.run(images, gradient=False)
        nonlinearities = {name: _nonlinearity(network.network, name) for name in outputs}
        return {
            name: output if (f := nonlinearities[name]) is None else f.apply_operator(output)
            for name, output in outputs.items()
        }

    return samples.mean_magnitude(values)


@_register("integrated-gradients")
def _integrated_gradients(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The value v is the conductance, the path integral of dF/dz dz from the zero image to the sample.

    Integrated gradients (Sundararajan et al. 2017) of inner units (Dhamdhere et al. 2018); see `conductance`.
    """
    return samples.mean_magnitude(conductance)


@_register("random")
def _random(spec: CriterionSpec, samples: ReferenceSamples) -> dict[str, Tensor]:
    """The score is uniform in [0, 1), drawn from the seed in forward order; the same on every device."""
    assert spec.seed is not None, "a random criterion has one"
    generator = torch.Generator().manual_seed(spec.seed)
    return {
        name: torch.rand(n_components, generator=generator, dtype=torch.float64)
        for name, n_components in samples.network.components.items()
    }


def conductance(network: PlainNetwork, images: Tensor, labels: Tensor, n_steps: int = N_STEPS) -> dict[str, Tensor]:
    """Conductance of every output z of all that has components, in the outputs' shapes.

        v = sum_k dF/dz(x (k - 1/2) / m) (z(x k / m) - z(x (k - 1) / m)),  k = 1 ... m

    Over a layer that all paths cross, it adds up to F(x) - F(0) but for the error of the sum (completeness).

    Args:
        network: whose backward pass is the gradient.
        images: preprocessed, (N, C, H, W); 0 is the mean image where preprocessing subtracts the mean.
        labels: true classes, (N,).
        n_steps: m.
    """
    _, before = network.run(torch.zeros_like(images), gradient=False)
    sums = {name: torch.zeros_like(output) for name, output in before.items()}
    for step in range(1, n_steps + 1):
        logits, outputs = network.run(images * ((step - 0.5) / n_steps))
        gradients = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), list(outputs.values()))
        _, after = network.run(images * (step / n_steps), gradient=False)
        for name, gradient in zip(outputs, gradients, strict=True):
            sums[name] = sums[name] + gradient * (after[name] - before[name])
        before = after
    return sums


def _loss_gradients(
    network: PlainNetwork, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs z and dL/dz of every sample, by name."""
    logits, outputs = network.run(images)
    with torch.enable_grad():
        # The sum, so that a sample's gradient doesn't depend on its batch.
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {name: output.detach() for name, output in outputs.items()}, dict(zip(outputs, gradients, strict=True))


def _weights(network: CanonicalNetwork) -> dict[str, Tensor]:
    """Weights that make the components, by name in forward order: a layer's, or of heads those of v."""
    weights: dict[str, Tensor] = {}
    for name in network.components:
        layer = network.module.get_submodule(network.heads[name].value if name in network.heads else name)
        assert isinstance(layer, nn.Conv2d | nn.Linear), "components are outputs of these"
        weights[name] = layer.weight
    return weights


@contextmanager
def _trained(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Has parameters require gradients while the block lasts."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _nonlinearity(network: CanonicalNetwork, name: str) -> Activation | None:
    """The nonlinearity that alone reads a layer's outputs."""
    (node,) = (node for node in network.module.graph.nodes if node.op == "call_module" and node.target == name)
    readers = [network.module.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    if len(node.users) == len(readers) == 1 and isinstance(readers[0], Activation):
        return readers[0]
    return None
