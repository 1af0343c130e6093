"""Devices by name."""

from __future__ import annotations

import copy

import torch
from torch import nn

from objectives.errors import DeviceError

__all__ = ["on_device", "resolve_device"]


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        DeviceError: there is no such device; the message lists those there are.
    """
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if n_gpus else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index or "0").isdecimal() and name != "cuda:" and int(index or 0) < n_gpus:
        return torch.device("cuda", int(index or 0))
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(n_gpus))])
    raise DeviceError(f"There is no device {name!r} on this machine; it has {there}.")


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself where it already is on the device, else a copy there."""
    if all(parameter.device == device for parameter in network.parameters()):
        return network
    return copy.deepcopy(network).to(device)
