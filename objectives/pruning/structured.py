"""Coupled pruning: torch-pruning's dependency graph removes whole groups of channels that depend on each other.

The result is another function than the network masked by the ranking: writers of one residual stream lose the same
channels, though their rankings differ. Its accuracy is therefore measured, never derived. In exchange it is an ordinary
network of the user's own class.

In a vision transformer nothing needs to be coupled but the residual stream, whose channels the layer norms mix, so that
none can go: neurons inside the MLPs and heads are removed, the rows of pruned writers of the stream become zero, and
the result computes what the masked network computes.

What must hold is that it equals the network whose coupled channels are masked, since they are zero wherever they were
written. That is checked on every result, so that a coupling which torch-pruning misses is noticed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from objectives.attribution.attention import Heads
from objectives.attribution.operations import Activation
from objectives.errors import UnsupportedNetworkError
from objectives.network import CanonicalNetwork
from objectives.pruning import rates
from objectives.pruning.masking import masked
from objectives.pruning.ranking import Masks

__all__ = ["CoupledNetwork", "coupled_masks", "prune_coupled", "resize_transformer"]

_LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class CoupledNetwork:
    """A network from which coupled groups were removed.

    Attributes:
        network: of the user's own class, with resized layers; the user's network isn't touched.
        n_removed: components removed, those that went along with a coupled one included; of a transformer also those
            whose rows became zero.
        widths: components left in each layer, and heads in each attention.
    """

    network: nn.Module
    n_removed: int
    widths: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is removed at once: one channel of a coupled group, or one position in all groups of a grouped convolution.

    Attributes:
        score: mean of its components' scores.
        group: number of the coupled group.
        indices: channels of the group's root layer.
        components: that it couples, as layer and index.
    """

    score: float
    group: int
    indices: tuple[int, ...]
    components: tuple[tuple[str, int], ...]


def prune_coupled(
    network: nn.Module, canonical: CanonicalNetwork, scores: Mapping[str, Tensor], n_pruned: int
) -> CoupledNetwork:
    """Removes coupled channels, least relevant first, until `n_pruned` components are gone.

    A channel's score is the mean of its components' scores over all layers that it couples. Some channel of every group
    stays, so that no layer disappears.

    Args:
        network: the user's own, in evaluation mode; a copy is pruned.
        canonical: its canonical form.
        scores: layer -> (components,).
        n_pruned: components to remove; never more are removed.

    Raises:
        UnsupportedNetworkError: torch-pruning can't follow the network, or misses one of its couplings.
    """
    pruned = copy.deepcopy(network)
    graph, groups, units = _found(pruned, network, canonical, scores)
    chosen = _least_relevant(units, [_width(group) for group in groups], n_pruned)
    for number, group in enumerate(groups):
        indices = sorted(index for unit in chosen if unit.group == number for index in unit.indices)
        if indices:
            root = group[0].dep
            with _followed(network):
                graph.get_pruning_group(root.target.module, root.handler, idxs=indices).prune()
    pruned.requires_grad_(False)
    removed = [component for unit in chosen for component in unit.components]
    _check_equal(pruned, network, canonical, removed)
    widths = {name: _out_width(pruned.get_submodule(name)) for name in canonical.components}
    return CoupledNetwork(pruned, len(removed), widths)


def coupled_masks(
    network: nn.Module,
    canonical: CanonicalNetwork,
    scores: Mapping[str, Tensor],
    shares: Sequence[float],
    *,
    by_group: bool,
) -> list[dict[str, Tensor]]:
    """Masks without whole coupled channels, nested for growing shares; the exact slim networks need no index sums.

    Channels go in the order of `prune_coupled`, and some channel of every group stays. What torch-pruning doesn't
    follow isn't coupled.

    Args:
        network: the user's own, in evaluation mode; it isn't changed.
        canonical: its canonical form.
        scores: layer -> (components,).
        shares: of the components that are removed at most, increasing.
        by_group: each group loses its share, rather than the network.

    Raises:
        UnsupportedNetworkError: torch-pruning can't follow the network.
    """
    _, groups, units = _found(copy.deepcopy(network), network, canonical, scores)
    units.sort(key=_order)
    of_groups = [[unit for unit in units if unit.group == number] for number in range(len(groups))]
    last = {own[-1] for own in of_groups if own}
    parts = of_groups if by_group else [units]
    masks = []
    for share in shares:
        kept = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
        for part in parts:
            most = rates.n_pruned(share, sum(len(unit.components) for unit in part))
            for unit in (unit for unit in part if unit not in last):
                most -= len(unit.components)
                if most < 0:
                    break
                for name, index in unit.components:
                    kept[name][index] = False
        masks.append(kept)
    return masks


def resize_transformer(network: nn.Module, canonical: CanonicalNetwork, masks: Masks) -> CoupledNetwork:
    """Removes a transformer's pruned heads, all of a block included, and the pruned neurons inside its MLPs.

    Args:
        network: the user's own, in evaluation mode; a copy is resized.
        canonical: its canonical form.
        masks: which components are kept.

    Raises:
        UnsupportedNetworkError: attention doesn't say how many heads it has as timm's does, or the resized network
            computes something else.
    """
    pruned = copy.deepcopy(network).requires_grad_(False)
    removed = []
    for name, mask in masks.items():
        lost = (~mask.cpu()).nonzero().flatten()
        removed += [(name, index) for index in lost.tolist()]
        if len(lost) == 0:
            continue
        readers = _readers(canonical, name)
        if name in canonical.heads:
            _remove_heads(pruned, canonical.heads[name], lost, readers)
        elif readers is None:
            layer = pruned.get_submodule(name)
            for tensor in (layer.weight, layer.bias):
                if isinstance(tensor, Tensor):
                    tensor.data[lost] = 0
        else:
            tp.prune_linear_out_channels(pruned.get_submodule(name), lost.tolist())
            _remove_columns(pruned, readers, lost)
    _check_equal(pruned, network, canonical, removed)
    widths = {name: int(mask.sum()) for name, mask in masks.items()}
    return CoupledNetwork(pruned, len(removed), widths)


def _readers(canonical: CanonicalNetwork, name: str) -> list[str] | None:
    """The layers that alone read a layer or attention, value by value; None where something mixes its values."""
    (node,) = (node for node in canonical.module.graph.nodes if node.target == name)
    readers, queue = [], list(node.users)
    while queue:
        user: fx.Node = queue.pop()
        module = canonical.module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.Linear):
            readers.append(str(user.target))
        elif isinstance(module, Activation):
            queue.extend(user.users)
        else:
            return None
    return readers


def _remove_heads(network: nn.Module, heads: Heads, lost: Tensor, readers: list[str] | None) -> None:
    attention = network.get_submodule(heads.projection.rpartition(".")[0])
    if readers is None or not {"num_heads", "head_dim"} <= vars(attention).keys():
        raise UnsupportedNetworkError(
            f"The attention in module {heads.projection.rpartition('.')[0]!r} can't be resized: it isn't built as "
            "timm's; prune without `--coupled`."
        )
    rows = heads.rows(lost)
    width = heads.n_heads * heads.head_dim
    joint = torch.cat([rows + part * width for part in range(3)])
    tp.prune_linear_out_channels(network.get_submodule(heads.projection), joint.tolist())
    _remove_columns(network, readers, rows)
    for name, value in (("num_heads", heads.n_heads - len(lost)), ("attn_dim", width - len(rows))):
        if name in vars(attention):
            setattr(attention, name, value)


def _remove_columns(network: nn.Module, readers: list[str], lost: Tensor) -> None:
    for reader in readers:
        tp.prune_linear_in_channels(network.get_submodule(reader), lost.tolist())


def _found(
    copied: nn.Module, network: nn.Module, canonical: CanonicalNetwork, scores: Mapping[str, Tensor]
) -> tuple[tp.DependencyGraph, list[tp.Group], list[_Unit]]:
    """Dependencies of a copy of a network, its coupled groups, and all that can be removed of them."""
    for parameter in copied.parameters():
        parameter.requires_grad_(True)  # torch-pruning traces the autograd graph
    with _followed(network):
        graph = _dependency_graph(copied, canonical)
    names = {module: name for name, module in copied.named_modules() if name in canonical.components}
    groups = _coupled_groups(graph, copied.get_submodule(canonical.classifier), names)
    units = [unit for number, group in enumerate(groups) for unit in _units(graph, number, group, names, scores)]
    return graph, groups, units


def _order(unit: _Unit) -> tuple[float, int, tuple[int, ...]]:
    """By which units go."""
    return unit.score, unit.group, unit.indices


def _least_relevant(units: Iterable[_Unit], widths: Sequence[int], n_pruned: int) -> list[_Unit]:
    """As many units as fit, none of which is its group's last."""
    chosen = []
    n_removed = 0
    left = list(widths)
    for unit in sorted(units, key=_order):
        if n_removed + len(unit.components) <= n_pruned and left[unit.group] > len(unit.indices):
            chosen.append(unit)
            n_removed += len(unit.components)
            left[unit.group] -= len(unit.indices)
    return chosen


def _dependency_graph(network: nn.Module, canonical: CanonicalNetwork) -> tp.DependencyGraph:
    parameter = next(network.parameters())
    example = torch.zeros(1, *canonical.input_shape, dtype=parameter.dtype, device=parameter.device)
    return tp.DependencyGraph().build_dependency(network, example_inputs=example)


@contextmanager
def _followed(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch-pruning raises many kinds; all mean that it can't follow the network
        raise UnsupportedNetworkError(
            f"torch-pruning can't follow the network {type(network).__name__} ({_first_line(error)}); prune without "
            "`--coupled`."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_equal(
    pruned: nn.Module, network: nn.Module, canonical: CanonicalNetwork, removed: Iterable[tuple[str, int]]
) -> None:
    """Some couplings aren't in the graph, such as the zero-padded shortcuts of CIFAR ResNets."""
    parameter = next(network.parameters())
    images = torch.randn(2, *canonical.input_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    for name, index in removed:
        masks[name][index] = False
    try:
        with torch.inference_mode():
            logits = pruned(images)
    except Exception as error:  # whatever layers of sizes that don't match raise
        raise _missed_coupling(network, f"doesn't run ({_first_line(error)})") from error
    with torch.inference_mode(), masked(copy.deepcopy(network), canonical.prunable, masks) as reference:
        expected = reference(images)
    difference, scale = float((logits - expected).abs().max()), float(expected.abs().max())
    if not difference <= _LOGIT_TOLERANCE * max(scale, 1.0):
        raise _missed_coupling(network, f"computes something else (logits differ by {difference:.3g} of {scale:.3g})")


def _missed_coupling(network: nn.Module, symptom: str) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(
        f"torch-pruning doesn't follow every coupling of {type(network).__name__}: the resized network {symptom}; "
        "prune without `--coupled`."
    )


def _coupled_groups(graph: tp.DependencyGraph, classifier: nn.Module, names: Mapping[nn.Module, str]) -> list[tp.Group]:
    """One full group of every set of coupled layers that holds components."""
    groups = graph.get_all_groups(ignored_layers=[classifier], root_module_types=[nn.Conv2d, nn.Linear])
    return [group for group in groups if any(_component_layer(graph, item, names) for item in group)]


def _component_layer(graph: tp.DependencyGraph, item: Any, names: Mapping[nn.Module, str]) -> str | None:
    """The layer whose outputs a group's item prunes, if they are components."""
    return names.get(item.dep.target.module) if graph.is_out_channel_pruning_fn(item.dep.handler) else None


def _units(
    graph: tp.DependencyGraph,
    number: int,
    group: tp.Group,
    names: Mapping[nn.Module, str],
    scores: Mapping[str, Tensor],
) -> Iterator[_Unit]:
    members: dict[int, dict[tuple[str, int], float]] = {}
    positions = _width(group) // _conv_groups(group)
    for item in group:
        layer = _component_layer(graph, item, names)
        if layer is not None:
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                members.setdefault(root % positions, {})[layer, index] = float(scores[layer][index])
    for position, values in members.items():
        indices = tuple(range(position, _width(group), positions))
        yield _Unit(math.fsum(values.values()) / len(values), number, indices, tuple(values))


def _conv_groups(group: tp.Group) -> int:
    """Least number of groups that divides the channels as every grouped convolution of a coupled group does."""
    modules = [item.dep.target.module for item in group]
    grouped = [m.groups for m in modules if isinstance(m, nn.Conv2d) and 1 < m.groups < m.out_channels]
    return math.lcm(*grouped)


def _width(group: tp.Group) -> int:
    return _out_width(group[0].dep.target.module)


def _out_width(module: nn.Module) -> int:
    width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    assert isinstance(width, int)
    return width
