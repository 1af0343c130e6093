"""The file of an elastic network: a safetensors with the largest level's weights and the components of every level."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from objectives.elastic.model import ElasticModel
from objectives.errors import SlimFileError
from objectives.network import CanonicalNetwork
from search_spaces.files import write_atomically
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
        "kept": json.dumps(
            [{name: mask.nonzero().flatten().tolist() for name, mask in level.items()} for level in model.masks]
        ),
    }
    state = {name: tensor.contiguous().cpu() for name, tensor in model.network.state_dict().items()}
    try:
        write_atomically(Path(path), safetensors.torch.save(state, metadata=metadata))
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
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it isn't a mapping)
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise SlimFileError(f"{str(path)!r} can't be read ({message_of(error)}).") from error
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
    levels = []
    try:
        for kept in kept_by_level:
            masks = {name: torch.zeros(width, dtype=torch.bool) for name, width in network.components.items()}
            for name, indices in kept.items():
                masks[name][indices] = True
            levels.append(masks)
        model = ElasticModel(network, levels)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SlimFileError(f"{str(path)!r} is damaged: its levels aren't of this network.") from error
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        raise SlimFileError(
            f"{str(path)!r} doesn't hold weights of this network ({message_of(error)}); pass the one it was made for."
        ) from error
    return model
