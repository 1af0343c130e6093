"""Models: trained classifiers by name, with their weights, preprocessing and fingerprint."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

import objectives.cifar_resnets
import objectives.digits
from objectives.checkpoints import load_weights, read_checkpoint
from objectives.errors import ModelError
from objectives.fingerprints import state_fingerprint
from objectives.options import OptionValue
from objectives.preprocessing import Preprocessing
from search_spaces.imports import import_object, is_import_path
from search_spaces.suggestions import did_you_mean

__all__ = ["LoadedModel", "load_model"]

_logger = logging.getLogger(__name__)

_TIMM_SOURCES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A trained classifier and what belongs to it.

    Attributes:
        network: In evaluation mode, float32; maps (N, C, H, W) to logits (N, num_classes).
        name: What it was loaded by: timm's name or `package.module:factory`.
        options: Arguments that the network was built with.
        preprocessing: From an image to the network's input.
        fingerprint: SHA-256 of the state dict.
        num_classes: Outputs.
        label_names: Name of each output, where they are known; of an ImageNet class all synonyms, joined by ", ".
        checkpoint: File of the weights; None if the name alone determines them.
        label_ids: WordNet id of each output, of ImageNet classifiers.
    """

    network: nn.Module
    name: str
    options: Mapping[str, OptionValue]
    preprocessing: Preprocessing
    fingerprint: str
    num_classes: int
    label_names: tuple[str, ...] | None
    checkpoint: str | None
    label_ids: tuple[str, ...] | None = None


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    options: Mapping[str, OptionValue] | None = None,
    size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
    initial_seed: int | None = None,
    device: str | torch.device = "cpu",
    allow_imports: bool = True,
) -> LoadedModel:
    """Loads a trained classifier.

        >>> load_model("cifar_resnet20", checkpoint="resnet20.safetensors").num_classes
        10

    Args:
        name: A timm name, or `package.module:factory`, a callable that returns the network; modules in the working
            directory can be named.
        checkpoint: A safetensors or torch file of weights. Without it, a timm network gets its pretrained weights and a
            factory's network stays as it is. The number of outputs follows the checkpoint's head.
        options: Arguments of the network's constructor or of the factory.
        size: Overrides the preprocessing's height and width, or one number for both.
        mean: Overrides the preprocessing's mean, one value or one for each channel.
        std: Overrides the preprocessing's standard deviation, likewise.
        crop: Overrides the share that the preprocessing's crop keeps.
        interpolation: Overrides how the preprocessing resizes.
        initial_seed: Without a checkpoint, begins with random weights drawn from this seed, to be trained: a timm
            network instead of its pretrained ones.
        device: Where to put the network.
        allow_imports: False refuses import paths; pass it for names that come from a document or a store.

    Raises:
        ModelError: The network can't be built, its weights can't be had, or it doesn't classify images.
        CheckpointMismatchError: The checkpoint doesn't fit the network.
    """
    if is_import_path(name) and not allow_imports:
        raise ModelError(f"The model {name!r} is not imported from here; pass it as `--model` on the command line.")
    given = dict(options or {})
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[], enabled=initial_seed is not None):
        if initial_seed is not None:
            torch.manual_seed(initial_seed)
        if is_import_path(name):
            network, configuration = _from_factory(name, given), None
        else:
            network = _from_timm(name, given, state, state is None and initial_seed is None)
            configuration = network.pretrained_cfg
    if state is not None:
        load_weights(network, state, str(checkpoint))
    network = network.eval().to(device)
    _check_dtype(network, name)
    configuration = configuration or getattr(network, "pretrained_cfg", None)
    if not isinstance(configuration, Mapping):
        configuration = None
    preprocessing = Preprocessing.resolve(
        configuration, _input_channels(network), size=size, mean=mean, std=std, crop=crop, interpolation=interpolation
    )
    if configuration is None and (size is None or mean is None or std is None):
        _logger.warning(
            "%s has no `pretrained_cfg`: images are prepared as %s; override it with --size, --mean, --std and --crop",
            name,
            preprocessing,
        )
    num_classes = _count_classes(network, name, preprocessing)
    label_names, label_ids = _labels(configuration or {}, num_classes)
    return LoadedModel(
        network=network,
        name=name,
        options=given,
        preprocessing=preprocessing,
        fingerprint=state_fingerprint(network.state_dict()),
        num_classes=num_classes,
        label_names=label_names,
        checkpoint=None if checkpoint is None else str(checkpoint),
        label_ids=label_ids,
    )


def _from_factory(spec: str, options: Mapping[str, OptionValue]) -> nn.Module:
    try:
        factory = import_object(spec)
    except ImportError as error:
        raise ModelError(f"The model {spec!r} can't be imported: {error}.") from error
    if not callable(factory):
        raise ModelError(f"{spec!r} is a {type(factory).__name__}; name a callable that returns the network.")
    try:
        network = factory(**options)
    except Exception as error:  # a user's factory may raise anything
        raise ModelError(
            f"{spec!r} failed with the options {dict(options)}: {_describe(error)}; check --model-option."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{spec!r} returned a {type(network).__name__}; it must return a torch.nn.Module.")
    return network


def _from_timm(
    name: str, options: Mapping[str, OptionValue], state: Mapping[str, Tensor] | None, pretrained: bool
) -> Any:
    arguments: dict[str, Any] = dict(options)
    if not name.startswith(_TIMM_SOURCES):
        configuration = _registered_configuration(name)
        if pretrained and not _has_weights(name):
            raise ModelError(f"The model {name!r} comes without weights; pass yours with --checkpoint FILE.")
        if state is not None and "num_classes" not in options:
            arguments |= _classes_of_head(getattr(configuration, "classifier", None) or (), state)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError) as error:
        raise ModelError(
            f"The model {name!r} can't be built with the options {arguments}: {_describe(error)}; check --model-option."
        ) from error
    except Exception as error:  # a failed download raises what its many layers raise
        remedy = "pass --checkpoint FILE with weights" if pretrained else f"check it and --model-option ({arguments})"
        raise ModelError(f"The model {name!r} can't be loaded: {_describe(error)}; {remedy}.") from error


def _has_weights(name: str) -> bool:
    entrypoint = timm.model_entrypoint(name.split(".", 1)[0])
    return timm.models.is_model_pretrained(name) or inspect.getmodule(entrypoint) is objectives.digits


def _registered_configuration(name: str) -> Any:
    if not timm.is_model(name):
        raise ModelError(
            f"Unknown model {name!r}: it is no timm model, and your own is written package.module:factory."
            f"{did_you_mean(name, timm.list_models())}"
        )
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part behind the dot is no tag of that architecture
        tags = timm.list_models(f"{timm.models.get_arch_name(name)}.*", include_tags=True)
        raise ModelError(f"Unknown model {name!r}.{did_you_mean(name, tags)}") from error


def _classes_of_head(heads: str | Sequence[str], state: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of outputs of a checkpoint's head, as an argument; nothing where the head isn't found."""
    for head in (heads,) if isinstance(heads, str) else heads:
        if f"{head}.weight" in state:
            return {"num_classes": int(state[f"{head}.weight"].shape[0])}
    return {}


def _check_dtype(network: nn.Module, name: str) -> None:
    for key, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(f"The parameter {key!r} of {name!r} is {parameter.dtype}; call `.float()` on the network.")


def _input_channels(network: nn.Module) -> int:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ModelError(f"The network {type(network).__name__} has no torch.nn.Conv2d; pass an image classifier.")


def _count_classes(network: nn.Module, name: str, preprocessing: Preprocessing) -> int:
    device = next(network.parameters()).device
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(2, *preprocessing.input_shape, device=device))
    except Exception as error:  # whatever the network's layers say of a shape that they can't take
        raise ModelError(
            f"The network {name!r} can't take images of shape {preprocessing.input_shape}: {_describe(error)}; "
            "pass its --size."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2 or logits.shape[1] < 2:
        kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ModelError(
            f"The network {name!r} returns an output of {kind} for 2 images; "
            "it must return logits of shape (images, classes) with at least two classes."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"The network {name!r} returns logits that aren't finite; check the weights it was given.")
    return int(logits.shape[1])


def _labels(
    configuration: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    names = configuration.get("label_names")
    if names and len(names) == num_classes:
        return tuple(map(str, names)), None
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None, None
    information: Any = ImageNetInfo(subset)
    return tuple(information.label_descriptions()), tuple(information.label_names())


def _describe(error: Exception) -> str:
    """The kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__
