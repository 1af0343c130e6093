"""Procedures: how pruning proceeds from rankings to ever smaller networks, and what each of them takes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, ClassVar, TypeAlias

from search_spaces.errors import ProcedureError
from search_spaces.suggestions import did_you_mean

__all__ = [
    "BATCH_SIZE",
    "Dynamic",
    "Iterative",
    "LEARNING_RATE",
    "LEAST_SHARE",
    "OneShot",
    "PROCEDURES",
    "ProcedureSpec",
    "PruneAndGrow",
    "TaskRelevant",
    "procedure_from_json",
]

LEAST_SHARE = 0.0001
"""Of a step: smaller ones are of no use, as there are fewer components, and would take long to add up to one."""

LEARNING_RATE = 0.001
"""Of fine-tuning, by default: that of Yeom et al. 2021; networks whose batch norm is folded bear no large one."""

BATCH_SIZE = 32
"""Of fine-tuning, by default."""

_LARGEST_USUAL_RATE = 0.99


@dataclass(frozen=True, slots=True)
class _Named:
    """What all procedures share: a name, and options that are their fields."""

    name: ClassVar[str]

    @property
    def options(self) -> dict[str, Any]:
        """JSON form of the options by name; with `name` the inverse of `procedure_from_json`."""
        return asdict(self)

    @property
    def fine_tunes(self) -> bool:
        """Whether pruned networks are trained, so that they have other weights than the unpruned one."""
        return False

    @property
    def usual_repair(self) -> str:
        """Of `REPAIRS`: how `hpo prune` repairs unless its user says so or, of what is trained, a document does."""
        return "none" if self.fine_tunes else "refit"

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True, slots=True)
class OneShot(_Named):
    """One ranking, of the unpruned network, prunes at every rate (Hatefi et al. 2024)."""

    name: ClassVar[str] = "one_shot"


@dataclass(frozen=True, slots=True)
class Iterative(_Named):
    """Every step prunes a share of the components, then ranks what is left anew (Yeom et al. 2021, Algorithm 1).

    Attributes:
        step_share: Of the original components, pruned in each step; at least `LEAST_SHARE` and at most 1.
        finetune_epochs: Passes over the reference images, by which each step's network is trained; 0 trains nothing
            (Scenario 2), more are Scenario 1.
        finetune_learning_rate: Above 0; by default `LEARNING_RATE` where anything is trained, else None.
        finetune_batch_size: Images that a step of the training takes at most; by default `BATCH_SIZE` where anything is
            trained, else None.

    Raises:
        ProcedureError: A value is out of range, or says how to train where nothing is trained.
    """

    name: ClassVar[str] = "iterative"
    step_share: float = 0.05
    finetune_epochs: int = 0
    finetune_learning_rate: float | None = None
    finetune_batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_share("step_share", self.step_share)
        _check_whole("finetune_epochs", self.finetune_epochs, 0)
        for name, usual in (("finetune_learning_rate", LEARNING_RATE), ("finetune_batch_size", BATCH_SIZE)):
            if self.finetune_epochs == 0 and getattr(self, name) is not None:
                raise ProcedureError(f"`{name}` of a procedure needs `finetune_epochs` of at least 1; leave it out.")
            if self.finetune_epochs and getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        if self.finetune_epochs > 0:
            _check_training(self.finetune_learning_rate, self.finetune_batch_size)

    @property
    def options(self) -> dict[str, Any]:
        """See `_Named.options`; without fine-tuning none of its own, as before there was any."""
        return asdict(self) if self.fine_tunes else {"step_share": self.step_share}

    @property
    def fine_tunes(self) -> bool:
        """See `_Named.fine_tunes`."""
        return self.finetune_epochs > 0


@dataclass(frozen=True, slots=True)
class Dynamic(_Named):
    """As `Iterative`, but in smaller steps and in another order where accuracy suffers (DPX-SD, Yasui et al. 2025).

    Both changes switched off are `Iterative`, and so is all that follows once a class has no reference right. The
    paper's thresholds and schedule aren't known to us; the defaults are our choice, see
    `objectives.procedures.dynamic`.

    Attributes:
        step_share: Of the original components, pruned between two reports; at least `LEAST_SHARE` and at most 1.
        tolerance: By how much a step may lower the harmonic mean of class accuracies; at least 0 and below 1.
        search_width: How many components beyond those of a step are tried one by one where even the smallest one hurts.
        rankings_per_step: At most, within a share.
        evaluations_per_step: Of candidates on the reference images, at most, within a share; what is left of it goes
            unseen.
        fixed_rate: No change of pruning rate.
        fixed_order: No change of pruning order.

    Raises:
        ProcedureError: A value is out of range.
    """

    name: ClassVar[str] = "dynamic"
    step_share: float = 0.05
    tolerance: float = 0.01
    search_width: int = 16
    rankings_per_step: int = 4
    evaluations_per_step: int = 80
    fixed_rate: bool = False
    fixed_order: bool = False

    def __post_init__(self) -> None:
        _check_share("step_share", self.step_share)
        value = self.tolerance
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ProcedureError(f"`tolerance` of a procedure must be at least 0 and below 1, but got {value!r}.")
        for name in ("search_width", "rankings_per_step", "evaluations_per_step"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("fixed_rate", "fixed_order"):
            if not isinstance(getattr(self, name), bool):
                raise ProcedureError(f"`{name}` of a procedure is true or false, but got {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class PruneAndGrow(_Named):
    """Prunes to a core in trained steps, and rebuilds what is larger around it, which stays as it is.

    After "Model Elasticity via Prune-and-Grow CNN Architectures"; see `objectives.procedures.prune_and_grow`.

    Attributes:
        core_share: Of the original components, pruned to reach the core; at least `LEAST_SHARE` and below 1.
        step_share: Of the original components, pruned in each step on the way; from `core_share` on it is one shot.
        finetune_epochs: Passes over the reference images, by which each step's network and each rebuilt one is trained;
            at least 1.
        finetune_learning_rate: Above 0; it falls along a cosine.
        finetune_batch_size: Images that a step of the training takes at most.

    Raises:
        ProcedureError: A value is out of range.
    """

    name: ClassVar[str] = "prune_and_grow"
    core_share: float = 0.7
    step_share: float = 0.2
    finetune_epochs: int = 5
    finetune_learning_rate: float = LEARNING_RATE
    finetune_batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        _check_share("core_share", self.core_share)
        if self.core_share == 1:
            raise ProcedureError("`core_share` of a procedure must be below 1, or there is no core.")
        _check_share("step_share", self.step_share)
        _check_whole("finetune_epochs", self.finetune_epochs, 1)
        _check_training(self.finetune_learning_rate, self.finetune_batch_size)

    @property
    def fine_tunes(self) -> bool:
        """See `_Named.fine_tunes`."""
        return True


@dataclass(frozen=True, slots=True)
class TaskRelevant(_Named):
    """Prunes to what one task needs, and adapts each size to new data (Avé et al. 2025, Algorithm 1).

    Of a split into extra knowledge T, the task P and new data F, see `search_spaces.task_splits`. The defaults are the
    paper's; it gives no bound on epochs, ours is 50.

    Attributes:
        step_share: Of what is left, pruned in each step; at least `LEAST_SHARE` and below 1.
        pretrain_epochs: Passes over T and P, at most, by which the unpruned network is trained; 0 where it has been.
        finetune_epochs: Passes, at most, of every retraining on P and of every adaptation; at least 1.
        finetune_learning_rate: Of all trainings (Adam); above 0.
        finetune_batch_size: Images that a step of them takes at most.
        patience: Epochs without a higher validation accuracy after which a training ends.

    Raises:
        ProcedureError: A value is out of range.
    """

    name: ClassVar[str] = "task_relevant"
    step_share: float = 0.2
    pretrain_epochs: int = 50
    finetune_epochs: int = 50
    finetune_learning_rate: float = 5e-4
    finetune_batch_size: int = BATCH_SIZE
    patience: int = 4

    def __post_init__(self) -> None:
        _check_share("step_share", self.step_share)
        if self.step_share == 1:
            raise ProcedureError("`step_share` of task_relevant must be below 1: a step that takes all leaves nothing.")
        _check_whole("pretrain_epochs", self.pretrain_epochs, 0)
        _check_whole("finetune_epochs", self.finetune_epochs, 1)
        _check_training(self.finetune_learning_rate, self.finetune_batch_size)
        _check_whole("patience", self.patience, 1)

    @property
    def fine_tunes(self) -> bool:
        """See `_Named.fine_tunes`."""
        return True

    @property
    def rates(self) -> tuple[float, ...]:
        """Shares of the original components that are gone before and after each of ten steps, as far as 99 %."""
        kept = 1 - Decimal(str(self.step_share))
        shares = [float(1 - kept**step) for step in range(11)]
        return (*shares[:2], *(share for share in shares[2:] if share <= _LARGEST_USUAL_RATE))


ProcedureSpec: TypeAlias = OneShot | Iterative | Dynamic | PruneAndGrow | TaskRelevant

PROCEDURES: Mapping[str, type[ProcedureSpec]] = {
    each.name: each for each in (OneShot, Iterative, Dynamic, PruneAndGrow, TaskRelevant)
}
"""Every procedure by name; `objectives.procedures` carries them out."""


def procedure_from_json(name: str, options: Mapping[str, Any] | None = None) -> ProcedureSpec:
    """The procedure of this name; options that aren't given have their defaults.

    Raises:
        ProcedureError: There is no such procedure, or it takes no such option or value.
    """
    if name not in PROCEDURES:
        raise ProcedureError(f"Unknown procedure {name!r}.{did_you_mean(str(name), PROCEDURES)}")
    known = [field.name for field in fields(PROCEDURES[name])]
    for option in options or {}:
        if option not in known:
            reason = did_you_mean(str(option), known) if known else " It takes none."
            raise ProcedureError(f"Procedure {name} takes no option {option!r}.{reason}")
    return PROCEDURES[name](**(options or {}))


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProcedureError(f"`{name}` of a procedure must be a whole number of at least {least}, but got {value!r}.")


def _check_training(learning_rate: object, batch_size: object) -> None:
    is_number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not is_number or not 0 < learning_rate < math.inf:  # type: ignore[operator]
        raise ProcedureError(f"`finetune_learning_rate` of a procedure must be above 0, but got {learning_rate!r}.")
    _check_whole("finetune_batch_size", batch_size, 1)


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST_SHARE <= value <= 1:
        raise ProcedureError(
            f"`{name}` of a procedure must be a share of at least {LEAST_SHARE} and at most 1, but got {value!r}."
        )
