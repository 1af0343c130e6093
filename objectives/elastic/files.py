"""The file of an elastic network: a safetensors with the largest level's weights and the components of every level."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from objectives.canonization import canonize
from objectives.elastic.model import ElasticModel
from objectives.errors import ModelError, SlimFileError
from objectives.network import CanonicalNetwork
from objectives.pruning.slim_files import build_original, kept_indices, masks_of, read_state, write_state
from objectives.repair.repairer import with_biases
from search_spaces.choices import Components
from search_spaces.reasons import message_of

__all__ = ["Origin", "load_elastic", "save_elastic"]

_FORMAT = "pruning-hpo/elastic/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an elastic network was made from, so that its file alone brings it back.

    Attributes:
        model: `name`, `options` and `num_classes` of the original network.
        input_shape: (C, H, W).
        components: that levels differ in.
        classes: outputs that it keeps; None for all.
        preprocessing: of its images, as `Preprocessing.to_json` gives it.
        levels: share of the components that each level is without, 0 first.
        ranker: the composite or criterion that ranked them, in its JSON form.
        procedure: how pruning proceeded.
    """

    model: dict[str, Any]
    input_shape: tuple[int, int, int]
    components: Components = "all"
    classes: tuple[int, ...] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    ranker: dict[str, Any] = field(default_factory=dict)
    procedure: str = ""


def save_elastic(model: ElasticModel, path: str | Path, origin: Origin | None = None) -> None:
    """Writes an elastic network; the file is there whole or not at all.

    Args:
        model: at any level.
        path: of the file.
        origin: without it, who loads the file must bring the canonical network.

    Raises:
        SlimFileError: there is no room or permission.
    """
    metadata = {
        "format": _FORMAT,
        "widths": json.dumps({name: len(mask) for name, mask in model.masks[0].items()}),
        "kept": json.dumps([kept_indices(level) for level in model.masks]),
    }
    if origin is not None:
        metadata["origin"] = json.dumps(asdict(origin))
    try:
        write_state(model.network, Path(path), metadata)
    except OSError as error:
        raise SlimFileError(
            f"{str(path)!r} can't be written ({error.strerror or error}); make room or choose another path."
        ) from error


def load_elastic(path: str | Path, network: nn.Module | CanonicalNetwork | None = None) -> ElasticModel:
    """The elastic network of a file, at its largest level.

        >>> model = load_elastic("elastic/elastic.safetensors")
        >>> model.set_level(2)
        >>> logits = model(images)

    Args:
        path: written by `hpo prune --elastic`, or by `save_elastic`.
        network: of the original architecture, with any weights, in evaluation mode; it isn't changed, and its dtype is
            the model's. Needed where the file names no timm model. A canonical network has the components and outputs
            that the file was made with.

    Raises:
        SlimFileError: the file holds no elastic network, or one of another architecture.
        ModelError: the architecture isn't known by name; pass `network`.
        UnsupportedNetworkError: `network` can't be brought into canonical form.
    """
    state, metadata = read_state(path)
    if metadata.get("format") != _FORMAT:
        raise SlimFileError(
            f"{str(path)!r} holds no elastic network of format {_FORMAT}; `hpo prune --elastic` writes one."
        )
    if not isinstance(network, CanonicalNetwork):
        network = _canonical(network, metadata, path)
    try:
        widths = json.loads(metadata["widths"])
        kept_by_level = json.loads(metadata["kept"])
    except (KeyError, ValueError) as error:
        raise SlimFileError(f"{str(path)!r} is damaged: its components can't be read.") from error
    for name, width in network.components.items():
        if widths.pop(name, None) != width:
            raise SlimFileError(f"{str(path)!r} was made for a network without the {width} components of {name!r}.")
    if widths:
        raise SlimFileError(f"{str(path)!r} was made for a network with components in {next(iter(widths))!r}.")
    # A repair gives a bias to layers that had none.
    biased = (name.removesuffix(".bias") for name in state if name.endswith(".bias"))
    network = with_biases(network, network.layers.keys() & set(biased))
    try:
        model = ElasticModel(network, [masks_of(kept, network.components) for kept in kept_by_level])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SlimFileError(f"{str(path)!r} is damaged: its levels aren't of this network.") from error
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        raise SlimFileError(
            f"{str(path)!r} doesn't hold weights of this network ({message_of(error)}); pass the one it was made for."
        ) from error
    return model


def _canonical(network: nn.Module | None, metadata: Mapping[str, str], path: str | Path) -> CanonicalNetwork:
    """Of a network, or of one that is built, the canonical form that a file was made with."""
    if "origin" not in metadata:
        raise ModelError(f"{str(path)!r} doesn't say what network it was made from; pass its canonical form.")
    try:
        origin = json.loads(metadata["origin"])
        model, shape, classes, components = (origin[k] for k in ("model", "input_shape", "classes", "components"))
    except (KeyError, TypeError, ValueError) as error:
        raise SlimFileError(f"{str(path)!r} is damaged: its origin can't be read.") from error
    original = build_original(model, "elastic") if network is None else network
    return canonize(original, tuple(shape), classes).choosing(components)
