"""The shared engine: relevance of many composites for the price of a few.

Relevance of a layer depends on the rules from the logits down to it, so composites form a tree: those that agree on the
rules of the groups passed so far share all relevance up to there (`objectives.attribution.plan`). Reference samples are
taken in chunks. A chunk needs one forward pass and, for all rules and parameters together, two more for the sums of
positive and negative contributions; then relevance runs down the tree, the rows of one level that share the next rules
stacked along the batch.

Scores agree with zennit's to rounding, and so do those of different chunks and stacks.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from objectives.attribution.composites import check_attention, check_groups
from objectives.attribution.engine import ZennitAttribution, start_relevance
from objectives.attribution.plan import ATTENTION, Plan, Segment, make_plan
from objectives.attribution.propagation import Batch, Rule
from objectives.attribution.relevance import Relevance, moments, spread
from objectives.datasets import LabelledImages
from objectives.errors import OptionError
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from search_spaces.choices import AbsScope, OutputRelevance
from search_spaces.composites import CompositeSpec

__all__ = ["DEFAULT_MEMORY", "SharedAttribution"]

DEFAULT_MEMORY = 2**30
"""Bytes."""

# Shares of the memory: the chunk at work; forward passes and relevances that are kept for composites to come.
_CHUNK, _PASSES, _PREFIXES = 1 / 4, 3 / 8, 1 / 8
# Values of a stacked tensor: what a core's caches hold of a few such tensors, and what fills a GPU.
_STACK = {"cpu": 2**20, "cuda": 2**26}
# Rows of a stack, where one sample's values are many; they share the factors made of the denominators.
_ROWS = {"cpu": 4, "cuda": 1}
# Least and most samples of a chunk: enough to fill a convolution, and few, so that a stack has several rows.
_SAMPLES = {"cpu": (4, 16), "cuda": (1, 1024)}
# Of the memory a stacked tensor may take: a dozen are alive at once at the deepest level, and the levels above wait.
_OF_MEMORY = 64

_Path = tuple[Rule, ...]
_Pending = dict[fx.Node, Tensor]

_log = logging.getLogger(__name__)


class SharedAttribution:
    """Attributes many composites together; see `objectives.attribution.engine.Attribution`.

    Not thread-safe. Finished relevances, forward passes and relevances at the borders of groups are kept within the
    memory, so composites that are asked one at a time share them too. What it can't do it hands to zennit, and logs so.

    Args:
        network: canonical; its weights must not change.
        layer_groups: group of every layer.
        references: images (N, C, H, W) and labels (N,) on the network's device.
        batch_size: most images of a forward pass.
        abs_scope: where `abs` is taken.
        output_relevance: what relevance starts as.
        memory: bytes for all that grows with images and composites, roughly; never less than one image needs.

    Attributes:
        batches: samples of a chunk; halved where memory runs out.

    Raises:
        UnsupportedNetworkError: a layer has no group.
        OptionError: the memory isn't positive.
    """

    def __init__(
        self,
        network: CanonicalNetwork,
        layer_groups: Mapping[str, str],
        references: LabelledImages,
        batch_size: int,
        abs_scope: AbsScope = "sum",
        output_relevance: OutputRelevance = "one",
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        check_groups(network, layer_groups)
        if memory < 1:
            raise OptionError(f"`memory` must be at least 1 byte, but got {memory}.")
        self.network = network
        self.layer_groups = layer_groups
        self.references = references
        self.abs_scope = abs_scope
        self.output_relevance = output_relevance
        self.memory = memory
        self._zennit = ZennitAttribution(network, layer_groups, references, batch_size, abs_scope, output_relevance)
        plan = make_plan(network, layer_groups)
        if isinstance(plan, str):
            _log.warning("The shared attribution engine has no rule for %s; zennit attributes this network.", plan)
        self._plan: Plan | None = None if isinstance(plan, str) else plan
        device = references.images.device.type
        width = references.images.element_size()
        self._stack = max(1, min(_STACK.get(device, _STACK["cuda"]), memory // (width * _OF_MEMORY)))
        fitting = 1 if self._plan is None else int(_CHUNK * memory / (width * max(1, self._plan.elements)))
        least, most = _SAMPLES.get(device, _SAMPLES["cuda"])
        largest = 1 if self._plan is None else max((segment.elements for segment in self._plan.segments), default=1)
        stacked = self._stack // (_ROWS.get(device, 1) * largest)
        fitting = max(1, min(batch_size, fitting, max(least, min(most, stacked))))
        self.batches = Batches("attribution", fitting)
        self._relevances: OrderedDict[str, Relevance] = OrderedDict()
        self._kept_for = fitting
        self._passes: dict[int, Batch] = {}
        self._bytes_of_passes = _PASSES * memory
        self._prefixes = _Prefixes(int(_PREFIXES * memory))

    def on(self, network: CanonicalNetwork) -> SharedAttribution:
        """See `Attribution.on`."""
        engine = copy.copy(self)
        engine.network, engine._zennit = network, self._zennit.on(network)
        if self._plan is not None:
            plan = make_plan(network, self.layer_groups)
            assert isinstance(plan, Plan), "it has the steps of the network before"
            engine._plan = plan
        engine._relevances, engine._passes, engine._prefixes = OrderedDict(), {}, _Prefixes(0)
        engine._bytes_of_passes = 0
        return engine

    def attribute(self, composite: CompositeSpec) -> Relevance:
        """See `Attribution.attribute`."""
        if self._plan is None:
            return self._zennit.attribute(composite)
        key = composite.attribution_key
        if key not in self._relevances:
            self.prepare([composite])
        self._relevances.move_to_end(key)
        return self._relevances[key]

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        """Computes the relevances of all these composites together and keeps them until others are prepared."""
        missing = {c.attribution_key: c for c in composites if c.attribution_key not in self._relevances}
        if self._plan is None or not missing:
            return
        self._relevances.update(self.batches.run(lambda n_samples: self._attribute(missing, n_samples)))
        size = sum(relevance.nbytes for relevance in self._relevances.values())
        wanted = {composite.attribution_key for composite in composites}
        for key in [key for key in self._relevances if key not in wanted]:
            if size <= _PREFIXES * self.memory:
                break
            size -= self._relevances.pop(key).nbytes

    def _attribute(self, composites: Mapping[str, CompositeSpec], n_samples: int) -> dict[str, Relevance]:
        assert self._plan is not None
        if n_samples != self._kept_for:  # memory has run out; what was kept is of larger chunks
            self._passes.clear()
            self._prefixes.clear()
            self._kept_for = n_samples
        paths = {key: self._path(composite) for key, composite in composites.items()}
        root = _Branch(())
        for path in paths.values():
            root.grow(path)
        n_references = len(self.references)
        n_chunks = math.ceil(n_references / n_samples)
        bounds = [n_references * index // n_chunks for index in range(n_chunks + 1)]
        with torch.no_grad():
            for samples in itertools.starmap(slice, itertools.pairwise(bounds)):
                batch = self._pass(samples)
                start = start_relevance(batch.logits, self.references.labels[samples], self.output_relevance)
                self._descend(0, [root], {self._plan.logits: start}, _Chunk(samples.start, batch))
        sums = root.collect()
        return {
            key: self._relevance([sums[path[:depth]] for depth in range(1, len(path) + 1)])
            for key, path in paths.items()
        }

    def _path(self, composite: CompositeSpec) -> _Path:
        assert self._plan is not None
        check_attention(self.network, composite)
        rules: dict[str, Rule] = {**composite.rules, ATTENTION: composite.attention}
        return tuple(rules[segment.group] for segment in self._plan.segments)

    def _pass(self, samples: slice) -> Batch:
        """The forward pass of a chunk; the first ones are kept, as many as the memory holds."""
        assert self._plan is not None
        if samples.start in self._passes:
            return self._passes[samples.start]
        images = self.references.images[samples]
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        batch = Batch.of(self._plan, images)
        size = self._plan.elements * images.element_size() * len(images)
        if (len(self._passes) + 1) * size <= self._bytes_of_passes:
            self._passes[samples.start] = batch
        return batch

    def _descend(self, depth: int, branches: list[_Branch], pending: _Pending, chunk: _Chunk) -> None:
        """Propagates one row a branch through the segment at `depth`, and on.

        Args:
            depth: in the tree.
            branches: of the rows.
            pending: relevance of the nodes whose readers all lie above, stacked.
            chunk: of reference samples.
        """
        assert self._plan is not None
        if depth == len(self._plan.segments):
            return
        segment = self._plan.segments[depth]
        parts: dict[_Path, list[tuple[int, _Branch]]] = {}
        below = _Stacks([], [])
        for row, branch in enumerate(branches):
            for child in branch.children.values():
                if (kept := self._prefixes.get(child.path, chunk.first)) is not None:
                    child.add(kept.sums)
                    below.add([child], kept.pending)
                else:
                    used = tuple(child.rule(self._plan, group) for group in segment.groups)
                    parts.setdefault(used, []).append((row, child))
        for rules, members in parts.items():
            children = [child for _, child in members]
            above = _rows(pending, [row for row, _ in members], len(branches))
            through, sums = self._walk(segment, dict(zip(segment.groups, rules, strict=True)), above, chunk.batch)
            for row, child in enumerate(children):
                child.add(sums[row])
                if depth + 1 < len(self._plan.segments):
                    self._prefixes.put(
                        child.path, chunk.first, _Prefix(_rows(through, [row], len(children)), sums[row])
                    )
            below.add(children, through)
        if depth + 1 < len(self._plan.segments):
            del pending
            stack = self._stack * self.batches.size // self.batches.asked
            most = stack // (len(chunk.batch.logits) * self._plan.segments[depth + 1].elements)
            for reached, waiting in below.regrouped(max(1, most)):
                self._descend(depth + 1, reached, waiting, chunk)

    def _walk(
        self, segment: Segment, rules: Mapping[str, Rule], pending: _Pending, batch: Batch
    ) -> tuple[_Pending, Tensor]:
        """Propagates stacked rows through a segment under one rule a group.

        Returns:
            The relevance that waits behind the segment, and the moments of the segment's components, (rows, 3, n).
        """
        pending = dict(pending)
        n_samples = len(batch.logits)
        layer_groups = batch.plan.layer_groups
        n_rows = len(next(iter(pending.values()))) // n_samples
        sums: list[Tensor] = []
        for node in segment.nodes:
            relevance = pending.pop(node, None)
            if relevance is None:  # queries and keys where attention is a constant
                continue
            if node.target in segment.components:
                rows = spread(self.network, str(node.target), relevance.unflatten(0, (-1, n_samples)))
                sums.append(moments(rows, self.abs_scope))
            group = layer_groups.get(str(node.target))
            for source, share in batch.propagate(node, relevance, None if group is None else rules.get(group)):
                if source in pending:  # a layer's share is a new tensor, that of another step may be the relevance
                    waiting = pending[source]
                    share = share.add_(waiting) if group is not None else waiting + share
                pending[source] = share
        return pending, torch.cat(sums, dim=-1) if sums else torch.empty(n_rows, 3, 0, dtype=torch.float64)

    def _relevance(self, sums: list[Tensor]) -> Relevance:
        """From the moments along a path to each layer's, in forward order."""
        assert self._plan is not None
        by_layer: dict[str, Tensor] = {}
        widths = self.network.components
        for segment, values in zip(self._plan.segments, sums, strict=True):
            parts = values.split([widths[name] for name in segment.components], dim=-1)
            by_layer.update(zip(segment.components, parts, strict=True))
        return Relevance(len(self.references), {name: by_layer[name] for name in widths})


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Reference samples from the `first` on, and their forward pass."""

    first: int
    batch: Batch


@dataclass(slots=True, eq=False)
class _Branch:
    """A node of the tree of composites: the rules so far, and the moments of the latest segment's components."""

    path: _Path
    children: dict[Rule, _Branch] = field(default_factory=dict)
    sums: Tensor | None = None

    def grow(self, path: _Path) -> None:
        if len(path) > len(self.path):
            rule = path[len(self.path)]
            self.children.setdefault(rule, _Branch((*self.path, rule))).grow(path)

    def rule(self, plan: Plan, group: str) -> Rule:
        return next(rule for rule, segment in zip(self.path, plan.segments, strict=False) if segment.group == group)

    def add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def collect(self) -> dict[_Path, Tensor]:
        """The moments of all branches below, by path, on the CPU."""
        found: dict[_Path, Tensor] = {}
        for child in self.children.values():
            assert child.sums is not None
            found[child.path] = child.sums.cpu()
            found.update(child.collect())
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """Where the rules of some groups have led on one chunk: pending relevance of one row, and moments (3, n)."""

    pending: _Pending
    sums: Tensor

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in (*self.pending.values(), self.sums))


class _Prefixes:
    """Prefixes that were used recently, by path and chunk, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.kept: OrderedDict[_Path, dict[int, _Prefix]] = OrderedDict()

    def get(self, path: _Path, index: int) -> _Prefix | None:
        if path not in self.kept:
            return None
        self.kept.move_to_end(path)
        return self.kept[path].get(index)

    def put(self, path: _Path, index: int, prefix: _Prefix) -> None:
        """Keeps a prefix in place of those used longest ago; a path that alone is too large is kept in part."""
        while self.kept and self.size + prefix.nbytes > self.limit and next(iter(self.kept)) != path:
            _, chunks = self.kept.popitem(last=False)
            self.size -= sum(chunk.nbytes for chunk in chunks.values())
        if self.size + prefix.nbytes <= self.limit:
            # A row of a stack is a view that would keep the whole stack.
            owned = _Prefix({node: value.clone() for node, value in prefix.pending.items()}, prefix.sums.clone())
            self.kept.setdefault(path, {})[index] = owned
            self.size += prefix.nbytes

    def clear(self) -> None:
        self.kept.clear()
        self.size = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Stacks:
    """Branches that relevance has reached, in stacks of rows."""

    branches: list[list[_Branch]]
    pending: list[_Pending]

    def add(self, branches: list[_Branch], pending: _Pending) -> None:
        self.branches.append(branches)
        self.pending.append(pending)

    def regrouped(self, most: int) -> Iterator[tuple[list[_Branch], _Pending]]:
        """All rows in stacks of at most `most`; those that came together are parted only where they must be."""
        while self.branches:
            n_stacks, n_rows = 1, len(self.branches[0])
            while (
                n_stacks < len(self.branches)
                and n_rows + len(self.branches[n_stacks]) <= most
                # Where a border parts q or k from its attention, relevance waits there under AttnLRP alone.
                and self.pending[n_stacks].keys() == self.pending[0].keys()
            ):
                n_rows += len(self.branches[n_stacks])
                n_stacks += 1
            branches = [branch for stack in self.branches[:n_stacks] for branch in stack]
            first = self.pending[0]
            joined = first if n_stacks == 1 else {n: torch.cat([s[n] for s in self.pending[:n_stacks]]) for n in first}
            del self.branches[:n_stacks], self.pending[:n_stacks], first
            for start in range(0, n_rows, most):
                some = branches[start : start + most]
                yield some, _rows(joined, range(start, start + len(some)), n_rows)


def _rows(stacked: _Pending, rows: Sequence[int], n_rows: int) -> _Pending:
    """Some rows of relevances (n_rows * N, ...); a view where they are consecutive."""
    if list(rows) == list(range(n_rows)):
        return stacked
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return {
            node: value.unflatten(0, (n_rows, -1))[rows[0] : rows[0] + len(rows)].flatten(0, 1)
            for node, value in stacked.items()
        }
    return {node: value.unflatten(0, (n_rows, -1))[list(rows)].flatten(0, 1) for node, value in stacked.items()}
