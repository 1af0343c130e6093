"""Zeroing: a pruned network in the shape of the unpruned one, so that it can be attributed as that is.

What the exact slim network lacks is zero here: the rows of pruned components, of a head those of its q, k and v, and
the columns that read channels which nothing writes any more. So both compute the same, and relevance, gradients and
weights of what is left are those of the slim network, where the components would have other names and places.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from objectives.attribution.attention import Heads
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import stored_channels
from objectives.repair.repairer import with_layers

__all__ = ["zeroed"]


def zeroed(network: CanonicalNetwork, masks: Masks) -> CanonicalNetwork:
    """A canonical network with the weights of pruned components at zero; the network itself where none is pruned.

    Args:
        network: it isn't changed; layers that lose nothing are shared.
        masks: which components are kept.
    """
    rows: dict[str, Tensor] = {}
    for name, mask in masks.items():
        pruned = (~mask).nonzero().flatten()
        if len(pruned) == 0:
            continue
        part = network.prunable[name]
        if isinstance(part, Heads):
            rows |= dict.fromkeys((part.query, part.key, part.value), part.rows(pruned))
        else:
            rows[name] = pruned
    if not rows:
        return network
    layers: dict[str, nn.Module] = {}
    stored = stored_channels(network, masks)
    for node in network.module.graph.nodes:
        if node.target not in network.layers:
            continue
        name, channels = str(node.target), stored[node.all_input_nodes[0].name]
        layer = network.module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear), "layers of a canonical network are"
        lost = _others(channels, layer)
        if name in rows or len(lost):
            layers[name] = _without(layer, rows.get(name), lost)
    return with_layers(network, layers)


def _others(channels: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Indices of a layer's input channels that aren't among these."""
    n_channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    lost = torch.ones(n_channels, dtype=torch.bool)
    lost[channels] = False
    return lost.nonzero().flatten()


def _without(layer: nn.Conv2d | nn.Linear, rows: Tensor | None, channels: Tensor) -> nn.Module:
    """A copy of a layer with zeros in these rows, biases included, and in the columns of these input channels."""
    new = copy.deepcopy(layer)
    weight = new.weight.data
    if rows is not None:
        at = rows.to(weight.device)
        weight[at] = 0
        if new.bias is not None:
            new.bias.data[at] = 0
    n_groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    by_group = weight.view(n_groups, -1, *weight.shape[1:])
    of_group = weight.shape[1]
    by_group[(channels // of_group).to(weight.device), :, (channels % of_group).to(weight.device)] = 0
    return new
