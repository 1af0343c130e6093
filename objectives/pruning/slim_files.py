"""Files of a slim network: an exported program that runs alone, and weights that this product reads back.

=====================  ==============================================================================================
`slim.pt2`             loads with `torch.export.load(path).module()` and runs without this product, for any batch size
`slim.safetensors`     weights, with kept components, export document and repair as metadata; `load_slim` reads it
`coupled.pt2`          the coupled network as an exported program
`coupled.safetensors`  state dict of the user's own class, resized; `load_coupled` reads it into a network of that class
=====================  ==============================================================================================
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import objectives.models  # noqa: F401 (registers this product's networks with timm)
from objectives.attribution.composites import check_shape, fitting
from objectives.canonization import canonize
from objectives.errors import CheckpointMismatchError, ModelError, SlimFileError
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import slim
from objectives.repair.repairer import with_biases
from search_spaces.documents import CompositeDocument
from search_spaces.files import write_atomically
from search_spaces.reasons import message_of
from search_spaces.repairs import NO_REPAIR, RepairSpec

__all__ = [
    "build_original",
    "check_output",
    "kept_indices",
    "load_coupled",
    "load_slim",
    "masks_of",
    "new_directory",
    "read_state",
    "write_program",
    "write_state",
    "write_weights",
]

_FORMAT = "pruning-hpo/slim/1"


def check_output(target: Path) -> None:
    """Refuse what `new_directory` would refuse at once, before anything is computed for it.

    Raises:
        SlimFileError: `target` exists and isn't empty, or there is no room or permission for a directory.
    """
    with _temporary(target):
        pass


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that appears whole at `target` when the block ends well; otherwise nothing is left behind.

    Raises:
        SlimFileError: `target` exists and isn't empty, or there is no room or permission.
    """
    with _temporary(target) as temporary:
        content = temporary / "content"
        content.mkdir()
        yield content
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        os.replace(content, target)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A directory beside `target`, or as near to it as there are any, for as long as the block lasts."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SlimFileError(f"The output {str(target)!r} already exists; choose another directory or remove it.")
        existing = next(parent for parent in target.absolute().parents if parent.exists())
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=existing) as temporary:
            yield Path(temporary)
    except SlimFileError:
        raise
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> SlimFileError:
    return SlimFileError(f"{str(target)!r} can't be written ({_first_line(error)}); make room or choose another path.")


def write_program(module: nn.Module, input_shape: tuple[int, int, int], path: Path) -> None:
    """Writes an exported program of a module on the CPU, with a dynamic batch size."""
    example = torch.zeros(2, *input_shape)
    with torch.no_grad():
        program = torch.export.export(
            module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
    archive = io.BytesIO()  # torch's own writer of files ends the process where a disk is full
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


def write_weights(
    module: nn.Module,
    masks: Masks,
    document: CompositeDocument,
    classes: tuple[int, ...] | None,
    path: Path,
    repair: RepairSpec = NO_REPAIR,
    repaired: Iterable[str] = (),
) -> None:
    """Writes a slim network's weights, with what `load_slim` needs to rebuild it.

    Args:
        module: the slim network.
        masks: that it was made with.
        document: that says how components were ranked.
        classes: outputs that it keeps; None for all.
        path: of the file.
        repair: of its weights.
        repaired: names of the layers that have other weights, and a bias, by it.
    """
    metadata = {
        "format": _FORMAT,
        "kept": json.dumps(kept_indices(masks)),
        "classes": json.dumps(None if classes is None else list(classes)),
        "document": json.dumps(document.to_json()),
        "repair": json.dumps(repair.to_json()),
        "repaired": json.dumps(list(repaired)),
    }
    write_state(module, path, metadata)


def write_state(module: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a state dict as safetensors; the file is there whole or not at all."""
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state, metadata=metadata))


def kept_indices(masks: Masks) -> dict[str, list[int]]:
    """JSON form of masks: the indices of what each layer keeps."""
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


def masks_of(kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Inverse of `kept_indices`, for layers of these widths.

    Raises:
        KeyError: a layer has no components.
        IndexError: a layer has fewer.
    """
    masks = {name: torch.zeros(width, dtype=torch.bool) for name, width in widths.items()}
    for name, indices in kept.items():
        masks[name][indices] = True
    return masks


def load_slim(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """The slim network of a `slim.safetensors`.

    Args:
        path: written by `hpo prune`.
        network: of the original architecture, with any weights, in evaluation mode; it isn't changed. Needed where the
            document names no timm model.

    Returns:
        (N, C, H, W) -> logits (N, classes), in evaluation mode.

    Raises:
        SlimFileError: the file isn't a slim network's.
        ModelError: the architecture isn't known by name; pass `network`.
        UnsupportedNetworkError: `network` is of another architecture.
    """
    state, metadata = read_state(path)
    if metadata.get("format") != _FORMAT:
        raise SlimFileError(f"{str(path)!r} holds no slim network of format {_FORMAT}; `hpo prune` writes one.")
    document = CompositeDocument.from_json(json.loads(metadata["document"]))
    model: Mapping[str, Any] = document.model
    if network is None:
        network = build_original(model, "slim")
    height, width = document.preprocessing["size"]
    input_shape = (len(document.preprocessing["mean"]), height, width)
    canonical = fitting(canonize(network, input_shape), document)
    check_shape(canonical, canonical.n_outputs, document)
    classes = json.loads(metadata["classes"])
    if classes is not None:
        canonical = fitting(canonize(network, input_shape, classes), document)
    masks = masks_of(json.loads(metadata["kept"]), canonical.components)
    module = slim(with_biases(canonical, json.loads(metadata.get("repaired", "[]"))), masks)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise SlimFileError(
            f"{str(path)!r} doesn't hold the weights of its own document's network ({message_of(error)}); prune again."
        ) from error
    return module


def build_original(model: Mapping[str, Any], kind: str) -> nn.Module:
    """The architecture that a file names, with random weights, in evaluation mode.

    Args:
        model: its `name`, `num_classes` and, where it has any, `options`.
        kind: of the network in the file, for messages.

    Raises:
        ModelError: it is no timm model, or can't be built.
    """
    name = model["name"]
    if ":" in name:  # an import path, or a download
        raise ModelError(f"The {kind} network was made from {name!r}; pass a network of that class.")
    options = {"num_classes": model["num_classes"], **model.get("options", {}), "pretrained": False}
    try:
        network: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # timm raises many kinds
        raise ModelError(
            f"The {kind} network's architecture {name!r} can't be built ({_first_line(error)}); pass a network of that "
            "class."
        ) from error
    return network.eval()


def read_state(
    path: str | Path, remedy: str = "pass a file that `hpo prune` wrote"
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        SlimFileError: it can't be read; the message ends with the remedy.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise SlimFileError(f"{str(path)!r} can't be read ({_first_line(error)}); {remedy}.") from error


def load_coupled(path: str | Path, network: nn.Module) -> nn.Module:
    """A network resized to a `coupled.safetensors` and given its weights.

    Args:
        path: written by `hpo prune --coupled`.
        network: of the original architecture, with as many outputs as the file's classifier; it is changed.

    Raises:
        SlimFileError: the file can't be read.
        CheckpointMismatchError: `network` is of another architecture.
    """
    state, _ = read_state(path)
    differing = sorted(state.keys() ^ network.state_dict().keys())
    if differing:
        raise CheckpointMismatchError(
            f"{str(path)!r} doesn't fit {type(network).__name__}: only one of them has {differing[0]!r} "
            f"({len(differing)} such); pass a network of the class that was pruned."
        )
    for name, module in network.named_modules():
        if {"num_heads", "head_dim", "attn_dim"} <= vars(module).keys() and f"{name}.qkv.weight" in state:
            module.attn_dim = state[f"{name}.qkv.weight"].shape[0] // 3
            module.num_heads = module.attn_dim // module.head_dim
        weight = state.get(f"{name}.weight")
        if weight is None:
            continue
        for key in ("weight", "bias"):
            if isinstance(getattr(module, key, None), nn.Parameter):
                setattr(module, key, nn.Parameter(torch.empty_like(state[f"{name}.{key}"]), requires_grad=False))
        if isinstance(module, nn.Conv2d):
            if 1 < module.groups == module.in_channels:
                module.groups = weight.shape[0] * module.in_channels // module.out_channels
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif hasattr(module, "running_mean"):
            module.num_features = weight.shape[0]
            module.running_mean = torch.empty_like(state[f"{name}.running_mean"])
            module.running_var = torch.empty_like(state[f"{name}.running_var"])
    network.load_state_dict(state)
    return network.eval()


def _first_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else type(error).__name__
