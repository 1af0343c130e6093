"""Trained weights: those that a pruned network was given by training, in their places in the unpruned one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from objectives.fingerprints import state_fingerprint
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import draft, stored_channels
from objectives.repair.repairer import with_biases, with_layers

__all__ = ["TrainedWeights"]


@dataclass(frozen=True, slots=True, eq=False)
class TrainedWeights:
    """Weights of one exact slim network.

    Attributes:
        masks: that the slim network was made with.
        state: its parameters by name, with the biases that layers without inputs emit; they aren't changed.
        fingerprint: hexadecimal digest of both.
    """

    masks: Masks
    state: Mapping[str, Tensor]
    fingerprint: str

    @classmethod
    def of(cls, slim_network: fx.GraphModule, masks: Masks) -> TrainedWeights:
        """The weights that a slim network has now; copies."""
        state = {name: parameter.detach().clone() for name, parameter in slim_network.named_parameters()}
        for node in slim_network.graph.nodes:
            if node.op == "get_attr" and (name := node.meta.get("parameter")) is not None and name.endswith(".bias"):
                state[name] = slim_network.get_buffer(str(node.target)).detach().flatten().clone()
        kept = np.packbits(torch.cat([mask.cpu() for mask in masks.values()]).numpy()).tobytes()
        digest = hashlib.blake2b(kept + state_fingerprint(state).encode(), digest_size=16)
        return cls(masks, state, digest.hexdigest())

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the layers that have a bias; a repair gives one to those that had none."""
        return tuple(name.removesuffix(".bias") for name in self.state if name.endswith(".bias"))

    def on(self, network: CanonicalNetwork) -> CanonicalNetwork:
        """The network with these weights, to be pruned by the same masks or by ones that keep less.

        What the slim network lacks is as it was, and of no effect under such masks.

        Args:
            network: that the slim network was made from, with any weights; it isn't changed.
        """
        network = with_biases(network, self.biased)
        stored = stored_channels(network, self.masks)
        layers: dict[str, nn.Module] = {}
        for node in network.module.graph.nodes:
            name = str(node.target)
            if node.op != "call_module" or not {f"{name}.weight", f"{name}.bias"} & self.state.keys():
                continue
            layer = copy.deepcopy(network.module.get_submodule(name))
            for key in ("weight", "bias"):
                if (values := self.state.get(f"{name}.{key}")) is not None:
                    columns = stored[node.all_input_nodes[0].name]
                    _put(values, getattr(layer, key).data, stored[node.name], columns)
            layers[name] = layer
        return with_layers(network, layers)

    def within(self, network: CanonicalNetwork, masks: Masks) -> dict[str, Tensor]:
        """Places of these weights among those of a slim network that is without less.

        Args:
            network: that both were made from.
            masks: of the larger slim network, made with the channels in ascending order.

        Returns:
            Parameter of the larger one -> bool of its shape, true where the smaller one has it.
        """
        network = with_biases(network, self.biased)
        stored = stored_channels(network, self.masks)
        layers: dict[str, nn.Module] = {}
        for node in network.module.graph.nodes:
            layer = network.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(layer, nn.Conv2d | nn.Linear | nn.LayerNorm):
                continue
            blank = copy.deepcopy(layer)
            for parameter in blank.parameters():
                parameter.data = torch.zeros_like(parameter)
            if not isinstance(blank, nn.LayerNorm) and blank.bias is not None:  # without inputs a layer still emits it
                blank.bias.data[stored[node.name].to(blank.bias.device)] = 1
            layers[str(node.target)] = blank
        ones = {name: torch.ones_like(value) for name, value in self.state.items()}
        marked = replace(self, state=ones).on(with_layers(network, layers))
        return {
            name: parameter != 0 for name, parameter in draft(marked, masks, orders={}).written().named_parameters()
        }


def _put(values: Tensor, tensor: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Puts a slim network's values into a tensor of the unpruned network.

    Args:
        values: (rows, columns, ...) of a layer's weight, (rows,) of its bias; of a grouped convolution with all
            columns of each group, of a layer norm all of them.
        tensor: is changed.
        rows: indices of the rows that the slim network has.
        columns: likewise.
    """
    if values.shape == tensor.shape:
        tensor.copy_(values)
        return
    rows = rows.to(tensor.device)
    if values.shape[1:] == tensor.shape[1:]:
        tensor[rows] = values
    else:
        tensor[rows[:, None], columns.to(tensor.device)] = values
