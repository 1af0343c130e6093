"""The file of an elastic network: a safetensors with the largest level's weights and the components of every level."""

from __future__ import annotations

import json
from pathlib import Path

from objectives.elastic.model import ElasticModel
from objectives.errors import SlimFileError
from objectives.network import CanonicalNetwork
from objectives.pruning.slim_files import kept_indices, masks_of, read_state, write_state
from search_spaces.reasons import message_of

__all__ = ["load_elastic", "save_elastic"]

_FORMAT = "pruning-hpo/elastic/1"


def save_elastic(model: ElasticModel, path: str | Path) -> None:
    """Writes an elastic network; the file is there whole or not at all.

    Raises:
        SlimFileError: there is no room or permission.
    """
    metadata = {
        "format": _FORMAT,
        "widths": json.dumps({name: len(mask) for name, mask in model.masks[0].items()}),
        "kept": json.dumps([kept_indices(level) for level in model.masks]),
    }
    try:
        write_state(model.network, Path(path), metadata)
    except OSError as error:
        raise SlimFileError(
            f"{str(path)!r} can't be written ({error.strerror or error}); make room or choose another path."
        ) from error


def load_elastic(path: str | Path, network: CanonicalNetwork) -> ElasticModel:
    """The elastic network of a file, at its largest level.

    Args:
        path: written by `save_elastic`.
        network: canonical form of the original architecture, with any weights and with the components and outputs that
            the file was made with; it isn't changed.

    Raises:
        SlimFileError: the file holds no elastic network, or one of another architecture.
    """
    state, metadata = read_state(path, "pass a file that `save_elastic` wrote")
    if metadata.get("format") != _FORMAT:
        raise SlimFileError(f"{str(path)!r} holds no elastic network of format {_FORMAT}.")
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
