"""Checkpoints: state dicts read from files, without running any code that a file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from objectives.errors import CheckpointMismatchError, ModelError

__all__ = ["load_weights", "read_checkpoint"]

_NESTED_UNDER = ("state_dict", "model_state_dict", "model")
# Wrappers prepend these: torch.nn.DataParallel (also DistributedDataParallel), then torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_MOST_NAMED = 3


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a torch file.

    A torch file may hold the state dict itself or have it under "state_dict", "model_state_dict" or "model". It is
    read with `weights_only=True`: a pickle that would run code is refused.

    Returns:
        Tensors on the CPU by name, without the prefixes of DataParallel and torch.compile.

    Raises:
        ModelError: The file doesn't exist, can't be read or holds something else than weights.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            # A safetensors file begins with the length of its header (8 bytes), then the header: a JSON object.
            is_safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError as error:
        raise ModelError(
            f"The checkpoint {str(path)!r} can't be read ({error.strerror}); pass --checkpoint with an existing file."
        ) from error
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if is_safetensors
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a file that isn't weights fails in as many ways as there are files
        raise ModelError(
            f"The checkpoint {str(path)!r} isn't a file of weights ({_first_line(error)}); "
            "pass a safetensors file, or a state dict saved by `torch.save(model.state_dict(), FILE)`."
        ) from error
    return _state_dict(content, path)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Loads a state dict into a network, every key of it and of the network.

    Only `num_batches_tracked` may be absent: evaluation doesn't read it. Floating-point weights of another precision
    are cast to the network's.

    Args:
        network: Changed in place.
        state: Tensors by name.
        origin: Where they come from, for the message.

    Raises:
        CheckpointMismatchError: Keys are missing or unexpected, or shapes differ; names the first of each.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key!r} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = [
        f"{key!r} is {state[key].dtype}, not {own[key].dtype}"
        for key in own
        if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    problems = [
        f"{what}: {_list(items)}"
        for what, items in (
            ("missing keys", [repr(key) for key in missing]),
            ("unexpected keys", [repr(key) for key in unexpected]),
            ("other shapes", shapes),
            ("other types", kinds),
        )
        if items
    ]
    if problems:
        raise CheckpointMismatchError(
            f"The checkpoint {str(origin)!r} doesn't fit the network {type(network).__name__}: {'; '.join(problems)}. "
            "Pass the --model, with its --model-option, that the checkpoint was saved from."
        )
    network.load_state_dict(dict(state), strict=False)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f"The checkpoint {str(path)!r} holds {_kind(content)}, not weights by name; "
            "save `model.state_dict()` instead."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"The checkpoint {str(path)!r} isn't a state dict: its entry {key!r} is {_kind(value)}, not a tensor; "
                f"save `model.state_dict()`, bare or under one of {', '.join(map(repr, _NESTED_UNDER))}."
            )
    state = dict(content)
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _kind(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def _list(items: list[str]) -> str:
    rest = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
