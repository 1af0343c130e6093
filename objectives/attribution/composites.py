"""From a `CompositeSpec` to zennit: which rule serves which layer.

==============  ==========================================================================
rule            zennit's hook
==============  ==========================================================================
Epsilon         `zennit.rules.Epsilon(epsilon)`
ZPlus           `zennit.rules.ZPlus()`
AlphaBeta       `zennit.rules.AlphaBeta(alpha, beta)`
Gamma           `zennit.rules.Gamma(gamma)`
==============  ==========================================================================

All other steps of the canonical network carry their rule themselves (`objectives.attribution.operations`); that of
attention is the composite's choice (`objectives.attribution.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from zennit.canonizers import Canonizer
from zennit.core import Composite, Hook
from zennit.rules import AlphaBeta, Epsilon, Gamma, ZPlus

from objectives.attribution.attention import attention_rule
from objectives.canonization import canonize
from objectives.errors import UnsupportedNetworkError
from objectives.network import CanonicalNetwork
from search_spaces.composites import ATTENTION_RULES, CompositeSpec
from search_spaces.documents import CompositeDocument
from search_spaces.rules import RuleSpec

__all__ = [
    "AttentionRule",
    "CanonicalForm",
    "check_attention",
    "check_groups",
    "check_shape",
    "fitting",
    "hook_of",
    "load_composite",
    "zennit_composite",
]


_OF_TRANSFORMERS = {"heads": "heads", "mlp": "MLPs"}


def hook_of(rule: RuleSpec) -> Hook:
    """The hook with which zennit serves a rule."""
    match rule.name:
        case "Epsilon":
            return Epsilon(epsilon=rule.epsilon)
        case "ZPlus":
            return ZPlus()
        case "AlphaBeta":
            return AlphaBeta(alpha=rule.alpha, beta=rule.beta)
        case "Gamma":
            return Gamma(gamma=rule.gamma)
        case _:
            raise ValueError(f"`rule` must be one that zennit serves here, but got {rule=}.")


def zennit_composite(
    composite: CompositeSpec, layer_groups: Mapping[str, str], canonical_form: CanonicalForm | None = None
) -> Composite:
    """The zennit composite of a specification.

    Args:
        composite: rules by group.
        layer_groups: group of every layer, by its name in a canonical network.
        canonical_form: lets the composite apply to the network that the canonical one was made from.

    Returns:
        A composite for `CanonicalNetwork.module`, or with `canonical_form` for the user's network.
    """
    hooks = {group: hook_of(rule) for group, rule in composite.rules.items()}
    prefix = f"{CanonicalForm.CHILD}." if canonical_form is not None else ""

    def module_map(context: dict[str, object], name: str, module: nn.Module) -> Hook | None:
        group = layer_groups.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        return None if group is None else hooks[group]

    canonizers: list[Canonizer] = [] if canonical_form is None else [canonical_form]
    # The canonical form first: it brings the attention that follows the rule.
    return Composite(module_map=module_map, canonizers=[*canonizers, AttentionRule(composite.attention)])


def check_attention(network: CanonicalNetwork, composite: CompositeSpec) -> None:
    """Refuses a composite without a rule for the network's attention, or with one for a network without.

    Raises:
        UnsupportedNetworkError: one of these.
    """
    if network.is_transformer and composite.attention is None:
        raise UnsupportedNetworkError(
            f"The network has attention, but the composite has no rule for it; choose `--space vit`, or `--attention` "
            f"{', '.join(ATTENTION_RULES)}."
        )
    if composite.attention is not None and not network.is_transformer:
        raise UnsupportedNetworkError(
            f"The composite has the attention rule {composite.attention}, but the network has no attention; choose "
            "`--space cnn` and a composite without `attention`."
        )


def check_groups(network: CanonicalNetwork, layer_groups: Mapping[str, str]) -> None:
    """Refuses groups that leave a layer without a rule, and so to the plain gradient.

    Raises:
        UnsupportedNetworkError: a layer has no group, or a group's layer isn't in the network.
    """
    for name in network.layers:
        if name not in layer_groups:
            raise UnsupportedNetworkError(
                f"The layer {name!r} has no group, so that no rule would serve it; give it one."
            )
    for name in layer_groups:
        if name not in network.layers:
            raise UnsupportedNetworkError(f"The layer groups name {name!r}, which the network doesn't have.")


class AttentionRule(Canonizer):  # type: ignore[misc] # zennit has no types
    """A zennit canonizer that has all attention of a network follow a rule while it is registered."""

    def __init__(self, rule: str | None) -> None:
        self.rule = rule
        self.active = ExitStack()

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Registers a copy of this canonizer on `root_module`."""
        applied = self.copy()
        applied.register(root_module)
        return [applied]

    def register(self, root_module: nn.Module) -> None:
        """Puts the rule in place."""
        self.active.enter_context(attention_rule(root_module, self.rule))

    def remove(self) -> None:
        """Puts the rules from before back."""
        self.active.close()

    def copy(self) -> AttentionRule:
        """A canonizer of the same rule, not yet registered."""
        return AttentionRule(self.rule)


class CanonicalForm(Canonizer):  # type: ignore[misc] # zennit has no types
    """A zennit canonizer that lets a network run in canonical form while it is registered.

    The canonical copy becomes a child of the network, whose `forward` it takes over; removal leaves the network bit for
    bit as it was.
    """

    CHILD = "canonical_form"

    def __init__(self, canonical: CanonicalNetwork) -> None:
        self.canonical = canonical
        self.network: nn.Module | None = None
        self.own_forward: Callable[..., Any] | None = None

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Registers a copy of this canonizer on `root_module`."""
        applied = self.copy()
        applied.network = root_module
        applied.register()
        return [applied]

    def register(self) -> None:
        """Puts the canonical form in place."""
        assert self.network is not None
        self.own_forward = vars(self.network).get("forward")
        self.network.add_module(self.CHILD, self.canonical.module)
        self.network.forward = self.canonical.module.forward

    def remove(self) -> None:
        """Takes the canonical form out again."""
        if self.network is not None:
            delattr(self.network, self.CHILD)
            del self.network.forward
            if self.own_forward is not None:
                self.network.forward = self.own_forward
            self.network = None

    def copy(self) -> CanonicalForm:
        """A canonizer of the same canonical form, not yet registered."""
        return CanonicalForm(self.canonical)


def load_composite(document: CompositeDocument, model: nn.Module) -> Composite:
    """The composite of an export document, for use with zennit in code of your own.

    It holds the weights that the network has now: load it again after they or their device have changed.

    >>> composite = load_composite(load_document("best.json"), model)
    >>> with composite.context(model) as modified, torch.enable_grad():
    ...     output = modified(images.requires_grad_())
    ...     (relevance,) = torch.autograd.grad(output, images, torch.eye(1000)[labels])

    Args:
        document: written by `hpo export`.
        model: the network that the document was made for, in evaluation mode; all its outputs are kept.

    Raises:
        UnsupportedNetworkError: the network isn't the document's.
    """
    height, width = document.preprocessing["size"]
    channels = len(document.preprocessing["mean"])
    canonical = fitting(canonize(model, (channels, height, width)), document)
    check_shape(canonical, canonical.n_outputs, document)
    check_groups(canonical, document.layer_groups)
    check_attention(canonical, document.composite)
    return zennit_composite(document.composite, document.layer_groups, CanonicalForm(canonical))


def fitting(network: CanonicalNetwork, document: CompositeDocument) -> CanonicalNetwork:
    """The same network with a document's components.

    Raises:
        UnsupportedNetworkError: the document's components are a transformer's, and the network is none.
    """
    if document.components in _OF_TRANSFORMERS and not network.is_transformer:
        raise UnsupportedNetworkError(
            f"The document was made for a vision transformer's {_OF_TRANSFORMERS[document.components]}; this network "
            "has no attention. Pass the `--model` it names."
        )
    return network.choosing(document.components)


def check_shape(network: CanonicalNetwork, n_outputs: int, document: CompositeDocument) -> None:
    """Refuses a network that isn't of the document's shape.

    Args:
        network: canonical, with all or some of its outputs.
        n_outputs: of the network that it was made from.
        document: what the network must fit.

    Raises:
        UnsupportedNetworkError: another number of components or outputs; the message names the first such layer.
    """
    widths: Mapping[str, int] = document.model["component_widths"]
    made_for = "The document was made for a network"
    for name, width in widths.items():
        found = network.components.get(name)
        if found != width:
            has = f"has {found}" if found is not None else "has no such layer"
            raise UnsupportedNetworkError(f"{made_for} whose layer {name!r} has {width} components; this one {has}.")
    for name in network.components:
        if name not in widths:
            raise UnsupportedNetworkError(f"{made_for} without the layer {name!r}; pass the `--model` it names.")
    expected = document.model["num_classes"]
    if n_outputs != expected:
        raise UnsupportedNetworkError(
            f"{made_for} whose layer {network.classifier!r} has {expected} outputs; this one has {n_outputs}."
        )
