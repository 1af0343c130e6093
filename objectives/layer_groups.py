"""Layer groups: which layers count as low-, mid-, high-level and fully connected.

The grouping follows the tables of Hatefi et al. 2024 for VGG and ResNet and extends them by depth:

- Networks without residual stages (VGG, AlexNet): of n convolutions in forward order the first n//3 are LLR, the last
  n//3 HLL, the rest MLL.
- Two to four stages: stem and first stage LLR, last stage and a head convolution HLL, the rest MLL.
- Vision transformers: of n blocks the first n//4 are LLR, the last n//4 HLL, the rest MLL; what comes before them LLR.
- More stages: by output resolution; the stem and the highest resolution LLR, the lowest resolution and a head
  convolution HLL, the rest MLL.

Dense layers are FCL, by role: a convolution over its whole input, and all behind it, in a network without residual
stages is one too (timm's VGG). A down-sampling layer belongs to its stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from objectives.errors import UnsupportedNetworkError
from objectives.network import CanonicalNetwork, Layer, lies_in
from search_spaces.rules import GROUPS
from search_spaces.suggestions import did_you_mean

__all__ = ["group_layers"]

_MOST_NAMED_STAGES = 4
_FEWEST_BLOCKS = 4
_STEM = "<stem>"
_HEAD = "<head>"


def group_layers(network: CanonicalNetwork, patterns: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Group of every layer, by layer name in forward order.

    Args:
        network: canonical.
        patterns: a user's own grouping: shell-style name patterns for each group; the first match in the order LLR,
            MLL, HLL, FCL counts. By default layers are grouped by depth.

    Raises:
        UnsupportedNetworkError: a group isn't known, a pattern matches no layer, or a layer no pattern.
    """
    if patterns is not None:
        return _by_patterns(network, patterns)
    if network.is_transformer:
        return _by_quarters(network)
    layers = list(network.layers.values())
    groups = {layer.name: "FCL" for layer in layers if not layer.is_convolution}
    groups[network.classifier] = "FCL"
    convolutions = [layer for layer in layers if layer.name not in groups]
    stages = _stages(network, convolutions)
    if not stages:
        return _in_order(network, groups | _by_thirds(convolutions))
    if len(set(stages.values()) - {_STEM, _HEAD}) <= _MOST_NAMED_STAGES:
        return _in_order(network, groups | _by_stage(convolutions, stages))
    return _in_order(network, groups | _by_resolution(convolutions, stages))


def _by_patterns(network: CanonicalNetwork, patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    for group in patterns:
        if group not in GROUPS:
            raise UnsupportedNetworkError(f"Unknown layer group {group!r}.{did_you_mean(group, GROUPS)}")
    groups: dict[str, str] = {}
    for group in GROUPS:
        for pattern in patterns.get(group, ()):
            matches = [name for name in network.layers if fnmatchcase(name, pattern)]
            if not matches:
                raise UnsupportedNetworkError(
                    f"The pattern {pattern!r} of group {group} matches no layer.{did_you_mean(pattern, network.layers)}"
                )
            for name in matches:
                groups.setdefault(name, group)
    missing = [name for name in network.layers if name not in groups]
    if missing:
        raise UnsupportedNetworkError(
            f"No group's pattern matches the layer {missing[0]!r} ({len(missing)} of {len(network.layers)} layers have "
            "no group); add a pattern for it."
        )
    return _in_order(network, groups)


def _by_quarters(network: CanonicalNetwork) -> dict[str, str]:
    blocks = network.blocks
    if len(blocks) < _FEWEST_BLOCKS:
        raise UnsupportedNetworkError(
            f"The transformer has {len(blocks)} blocks, but its groups need at least {_FEWEST_BLOCKS}; give "
            "groups of your own in a space's TOML file."
        )
    quarter = len(blocks) // 4
    groups: dict[str, str] = {}
    latest = -1
    for name in network.layers:
        block = next((index for index, scopes in enumerate(blocks) if lies_in(name, *scopes)), None)
        if block is None and latest >= 0:
            groups[name] = "FCL"
            continue
        latest = latest if block is None else block
        groups[name] = "LLR" if latest < quarter else "HLL" if latest >= len(blocks) - quarter else "MLL"
    return groups


def _in_order(network: CanonicalNetwork, groups: Mapping[str, str]) -> dict[str, str]:
    return {name: groups[name] for name in network.layers}


def _by_thirds(convolutions: Sequence[Layer]) -> dict[str, str]:
    dense_from = next((i for i, layer in enumerate(convolutions) if _covers_its_input(layer)), len(convolutions))
    spatial, dense = convolutions[:dense_from], convolutions[dense_from:]
    third = len(spatial) // 3
    groups = {layer.name: "FCL" for layer in dense}
    for index, layer in enumerate(spatial):
        groups[layer.name] = "LLR" if index < third else "HLL" if index >= len(spatial) - third else "MLL"
    return groups


def _covers_its_input(layer: Layer) -> bool:
    """Whether a convolution sees all positions at once, as a dense layer does: (C, H, W) to (C', 1, 1), H W > 1."""
    return (
        layer.output_shape[1:] == (1, 1) and layer.input_shape[1:] != (1, 1) and layer.kernel == layer.input_shape[1:]
    )


def _stages(network: CanonicalNetwork, convolutions: Sequence[Layer]) -> dict[str, str]:
    """Stage of every convolution, by name; the stem's is `_STEM`, the head's `_HEAD`.

    A stage holds blocks, and a block holds a residual sum: `layer1.0` lies in stage `layer1`, `blocks.1.1` in
    `blocks.1`, `stages.1.blocks.0` in `stages.1`. A stage whose only block has no sum (`blocks.0`) is known by its
    siblings. Where all blocks lie in one container (torchvision's `features.3`) each block counts as a stage. A layer
    between two stages belongs to the second. Empty where no module holds a residual sum and convolutions.
    """
    scopes = {scope for scope in network.residual_scopes if scope}
    known = {_stage_of(scope) for scope in scopes}
    if len(known) == 1:
        known = scopes
    forms = {_form(stage) for stage in known}
    depths = sorted({stage.count(".") + 1 for stage in known}, reverse=True)
    found: list[str | None] = []
    for layer in convolutions:
        parts = layer.name.split(".")
        prefixes = [".".join(parts[:depth]) for depth in depths if depth < len(parts)]
        found.append(next((p for p in prefixes if p in known or _form(p) in forms), None))
    if not known.intersection(found):
        return {}
    # A sibling of one single layer before the first or behind the last known stage is the stem or the head.
    for end in (0, -1):
        if found[end] not in known and found.count(found[end]) == 1:
            found[end] = None
    inside = [index for index, stage in enumerate(found) if stage is not None]
    stages: dict[str, str] = {}
    following = _HEAD
    for index in reversed(range(len(convolutions))):
        following = found[index] or following
        stages[convolutions[index].name] = _STEM if index < inside[0] else following
    return {layer.name: stages[layer.name] for layer in convolutions}


def _by_stage(convolutions: Sequence[Layer], stages: Mapping[str, str]) -> dict[str, str]:
    order = [stage for stage in dict.fromkeys(stages.values()) if stage not in (_STEM, _HEAD)]
    group = dict.fromkeys(order, "MLL") | {_STEM: "LLR", order[0]: "LLR", order[-1]: "HLL", _HEAD: "HLL"}
    return {layer.name: group[stages[layer.name]] for layer in convolutions}


def _by_resolution(convolutions: Sequence[Layer], stages: Mapping[str, str]) -> dict[str, str]:
    areas = {stages[layer.name]: layer.output_shape[1] * layer.output_shape[2] for layer in convolutions}
    inner = [area for stage, area in areas.items() if stage not in (_STEM, _HEAD)]
    group = {stage: {max(inner): "LLR", min(inner): "HLL"}.get(area, "MLL") for stage, area in areas.items()}
    group |= {_STEM: "LLR", _HEAD: "HLL"}
    return {layer.name: group[stages[layer.name]] for layer in convolutions}


def _stage_of(block: str) -> str:
    """The container around a block; a plain list in it (`stages.1.blocks`) isn't the stage."""
    stage = block.rpartition(".")[0] or block
    while "." in stage and not re.search(r"\d", stage.rpartition(".")[2]):
        stage = stage.rpartition(".")[0]
    return stage


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)
