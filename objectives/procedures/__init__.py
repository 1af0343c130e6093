"""Procedures: how pruning proceeds from rankings to ever smaller networks, one module each.

A procedure is given a way to rank what masks leave, and yields the steps in which it prunes, up to the last component;
the objective measures as much of their path as it needs. Its options and its name, the value of `--procedure`, are in
`search_spaces.procedures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from objectives.procedures.dynamic import dynamic
from objectives.procedures.iterative import iterative
from objectives.procedures.one_shot import one_shot
from objectives.procedures.prune_and_grow import prune_and_grow
from objectives.procedures.steps import Pruning, Step
from objectives.procedures.task_relevant import task_relevant

__all__ = ["PROCEDURES", "Procedure"]

Procedure = Callable[[Pruning, Any], Iterator[Step]]
"""Yields the steps in which it prunes; its second argument is its own `ProcedureSpec`."""

PROCEDURES: Mapping[str, Procedure] = {
    "dynamic": dynamic,
    "iterative": iterative,
    "one_shot": one_shot,
    "prune_and_grow": prune_and_grow,
    "task_relevant": task_relevant,
}
"""By name."""
