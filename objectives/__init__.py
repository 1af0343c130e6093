"""From a composite to a sparsity-accuracy curve: models, data, attribution, pruning.

    >>> model = load_model("digits_cnn")
    >>> objective = Objective(model, load_task("digits", model), ObjectiveOptions(rates=(0.0, 0.25, 0.5)))
    >>> objective.evaluate(heuristic("epsilon-abs")).figures["auc"]

Names are imported at first use, so that `import objectives` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from objectives.attribution.composites import load_composite
    from objectives.datasets import load_task
    from objectives.elastic.files import load_elastic
    from objectives.models import load_model
    from objectives.objective import Evaluation, Objective, ObjectiveOptions
    from objectives.pruning.curve import Curve
    from objectives.pruning.prune import prune
    from objectives.pruning.slim_files import load_coupled, load_slim

__all__ = [
    "Curve",
    "Evaluation",
    "Objective",
    "ObjectiveOptions",
    "load_composite",
    "load_coupled",
    "load_elastic",
    "load_model",
    "load_slim",
    "load_task",
    "prune",
]

_MODULES = {
    "Curve": "objectives.pruning.curve",
    "Evaluation": "objectives.objective",
    "Objective": "objectives.objective",
    "ObjectiveOptions": "objectives.objective",
    "load_composite": "objectives.attribution.composites",
    "load_coupled": "objectives.pruning.slim_files",
    "load_elastic": "objectives.elastic.files",
    "load_model": "objectives.models",
    "load_slim": "objectives.pruning.slim_files",
    "load_task": "objectives.datasets",
    "prune": "objectives.pruning.prune",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'objectives' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
