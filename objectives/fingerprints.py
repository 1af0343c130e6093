"""Fingerprints of weights: equal networks have equal fingerprints, on every machine."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["state_fingerprint"]


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and bytes, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
