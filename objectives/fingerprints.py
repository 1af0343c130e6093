"""Fingerprints: what is equal has the same one, on every machine."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from objectives.preprocessing import RawImage

__all__ = ["pixels_fingerprint", "selection_fingerprint", "state_fingerprint"]


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and bytes, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pixels_fingerprint(image: RawImage) -> str:
    """SHA-256 of an image's decoded pixels, whatever file they come from."""
    # The pixels of a palette image are positions in its palette.
    pixels = np.asarray(image.convert("RGBA") if isinstance(image, Image.Image) and image.mode == "P" else image)
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}\n".encode() + pixels.tobytes()).hexdigest()


def selection_fingerprint(
    classes: Sequence[int], parts: Iterable[tuple[Sequence[int], Sequence[int], Sequence[str]]]
) -> str:
    """SHA-256 of selected images.

    Args:
        classes: Outputs that the task keeps.
        parts: References, search and confirmation images: positions in the source, outputs and `pixels_fingerprint`s.
    """
    content = [list(classes), [[list(indices), list(labels), list(images)] for indices, labels, images in parts]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
