"""Small networks that are equal are captured once a process: torch.export takes a second for a small one.

Many tests build the same network anew, so that they may change it, and put it into canonical form.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn

from objectives import canonization
from objectives.fingerprints import state_fingerprint

# Of others, as those that tests define, not all that the forward pass depends on need be seen from outside.
_PACKAGES = ("objectives", "timm", "torchvision")
_N_KEPT = 12
_MOST_BYTES = 16 * 2**20

_capture = canonization._capture


@dataclass(frozen=True, slots=True)
class _Sight:
    """A network as it is now; equal ones are captured alike."""

    description: str
    network: nn.Module = field(compare=False)


@contextmanager
def captured_once() -> Iterator[None]:
    """For as long as the block lasts."""
    with patch.object(canonization, "_capture", _capture_once):
        yield


def _capture_once(network: nn.Module, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    is_known = all(_is_as_it_was_built(module) for module in network.modules())
    is_small = sum(tensor.nbytes for tensor in tensors.values()) <= _MOST_BYTES
    if not (is_known and is_small) or any(tensor.is_meta for tensor in tensors.values()):
        return _capture(network, input_shape)
    # Of a copy: the program has the very weights of what it was captured from, which a test may change.
    return _captured(_Sight(_description(network, tensors), copy.deepcopy(network)), input_shape)


@functools.lru_cache(_N_KEPT)
def _captured(sight: _Sight, input_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    return _capture(sight.network, input_shape)


def _is_as_it_was_built(module: nn.Module) -> bool:
    is_known = type(module).__module__.partition(".")[0] in (*_PACKAGES, "torch")
    return is_known and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _description(network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    simple = bool, int, float, str, tuple, list, type(None)
    settings = [
        (name, type(module), sorted((key, value) for key, value in vars(module).items() if isinstance(value, simple)))
        for name, module in network.named_modules()
    ]
    devices = {tensor.device for tensor in tensors.values()}
    return f"{network!r} {settings} {state_fingerprint(tensors)} {devices}"
