"""A network in canonical form, as a value: the copy, its layers, heads and components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from torch import fx

from objectives.attribution.attention import Heads
from objectives.errors import UnsupportedNetworkError
from search_spaces.choices import Components
from search_spaces.suggestions import did_you_mean

__all__ = ["CanonicalNetwork", "Layer", "channel_axis", "lies_in", "n_channels", "shape_of"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or dense layer that relevance flows through.

    Attributes:
        name: of the module in the user's network; behind it `.q`, `.k` and `.v`, where these share one.
        width: number of output channels or neurons.
        norm: name of the batch norm folded into it, if any.
        scales: names of the parameters folded into it that the user's network multiplies its outputs by (LayerScale).
        averaged: name of the user's other layer, where it stands for the mean of both, on the inputs of both (the two
            classifiers of a distilled network).
        input_shape: without the batch dimension.
        output_shape: without the batch dimension.
        kernel: (height, width) of a convolution; (1, 1) for a dense layer.
    """

    name: str
    width: int
    norm: str | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    scales: tuple[str, ...] = ()
    averaged: str | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution; otherwise it is a dense layer."""
        return len(self.output_shape) == 3


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalNetwork:
    """A copy of a classifier in canonical form.

    Attributes:
        module: the copy; its submodules keep the names of the user's. Backward through it is relevance propagation once
            rules are attached to its convolutions and dense layers.
        layers: those that relevance flows through, in forward order, by name.
        classifier: name of the last layer, whose outputs are the logits.
        residual_scopes: names of the modules that hold a residual sum, in forward order.
        residual_sums: names of the sums' modules in `module`.
        blocks: residual scopes of each of a transformer's blocks, in forward order: the innermost one that holds its
            heads, and the one that holds its MLP, where that is another.
        input_shape: (C, H, W).
        heads: of each attention, by the name of the module in `module` that computes their outputs, in forward order.
        kinds: of all that could be components, by name in forward order: `filters` (neurons of dense layers too), and
            in transformers `heads` and `mlp`.
        choice: which of them are components.
    """

    module: fx.GraphModule
    layers: dict[str, Layer]
    classifier: str
    residual_scopes: tuple[str, ...]
    residual_sums: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    input_shape: tuple[int, int, int]
    heads: dict[str, Heads]
    kinds: dict[str, str]
    choice: Components = "all"
    n_outputs: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_outputs", self.layers[self.classifier].width)

    @property
    def components(self) -> dict[str, int]:
        """Number of components of each layer or attention that has any, in forward order.

        Of convolutional networks all layers but the classifier.
        """
        return {
            name: self.heads[name].n_heads if name in self.heads else self.layers[name].width
            for name, kind in self.kinds.items()
            if self.choice in ("all", kind)
        }

    @property
    def is_transformer(self) -> bool:
        """Whether it has attention."""
        return bool(self.heads)

    @property
    def prunable(self) -> dict[str, Layer | Heads]:
        """All that can hold components, by name."""
        return {**self.layers, **self.heads}

    def choosing(self, components: Components | None) -> CanonicalNetwork:
        """The same network with other components.

        Args:
            components: which; by default the neurons of a transformer's MLPs, and all of another network.

        Raises:
            UnsupportedNetworkError: the network has no such components.
        """
        known = get_args(Components)
        if components is not None and components not in known:
            raise UnsupportedNetworkError(f"Unknown components {components!r}.{did_you_mean(components, known)}")
        if components in ("heads", "mlp") and not self.is_transformer:
            raise UnsupportedNetworkError(
                f"`--components {components}` is for vision transformers; this network has no attention heads. Leave "
                "the option out."
            )
        return replace(self, choice=components or ("mlp" if self.is_transformer else "all"))


def lies_in(name: str, *scopes: str) -> bool:
    """Whether a module lies in one of these others."""
    return name.startswith(tuple(f"{scope}." for scope in scopes))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value without the batch dimension."""
    return tuple(node.meta["shape"])


def channel_axis(shape: Sequence[int]) -> int:
    """The axis of channels, counted with the batch dimension, of a value of this shape without it.

    That is the last of tokens (T, C), the first of images (C, H, W) and of vectors (C,).
    """
    return 2 if len(shape) == 2 else 1


def n_channels(shape: Sequence[int]) -> int:
    """Number of channels of a value of this shape."""
    return shape[channel_axis(shape) - 1]
