"""Splits of classes or domains into extra knowledge T, the task P and new data F (Avé et al. 2025).

A network is trained on T and P, pruned to what P needs, and adapted to F. A split stands in a TOML table:

    scenario = "new_subclasses"
    T = ["automobile", "dog", "horse"]
    P = ["airplane", "bird", "frog", "ship"]
    F = ["cat", "deer", "truck"]
    [superclasses]
    vehicle = ["airplane", "automobile", "ship", "truck"]
    animal = ["bird", "cat", "deer", "dog", "frog", "horse"]
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from search_spaces.errors import SplitError
from search_spaces.suggestions import did_you_mean

__all__ = ["SPLIT_SETS", "Scenario", "SplitBy", "TaskSplit", "read_split", "read_splits"]

Scenario = Literal["new_classes", "new_subclasses"]
"""What comes after pruning: classes that the network doesn't know, learnt beside those that it does; or other
subclasses (or another domain) of the classes that it knows."""

SplitBy = Literal["class", "domain"]
"""What T, P and F name: classes, or domains of which each has images of all classes."""

SPLIT_SETS = ("T", "P", "F")
"""What a split divides into."""


@dataclass(frozen=True, slots=True)
class TaskSplit:
    """Which classes or domains are extra knowledge, the task, and new.

    Attributes:
        scenario: what F is to the network.
        T: that the network is trained on before it is pruned, besides P; may be empty.
        P: that relevance is computed on and pruned networks are retrained on.
        F: that pruned networks are adapted to.
        superclasses: superclass -> its classes, for new subclasses by class: the network's outputs, in this order.
        by: what the three name.

    Raises:
        SplitError: a set is empty or shares a name with another, or the superclasses don't fit.
    """

    scenario: Scenario
    T: tuple[str, ...]
    P: tuple[str, ...]
    F: tuple[str, ...]
    superclasses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by: SplitBy = "class"

    def __post_init__(self) -> None:
        for name, known in (("scenario", get_args(Scenario)), ("by", get_args(SplitBy))):
            value = getattr(self, name)
            if value not in known:
                raise SplitError(f"Unknown {name} of a split {value!r}.{did_you_mean(str(value), known)}")
        set_of: dict[str, str] = {}
        for key in SPLIT_SETS:
            for name in getattr(self, key):
                if name in set_of:
                    where = f"twice in {key}" if set_of[name] == key else f"in both {set_of[name]} and {key}"
                    raise SplitError(f"The {self.by} {name!r} is {where} of a split; leave it in one place.")
                set_of[name] = key
        for key in ("P", "F"):
            if not getattr(self, key):
                raise SplitError(f"{key} of a split is empty; name at least one {self.by}.")
        self._check_superclasses()

    def _check_superclasses(self) -> None:
        if self.by == "domain" and self.scenario == "new_classes":
            raise SplitError("A split by domain has no new classes; its scenario is 'new_subclasses'.")
        if self.by == "domain" or self.scenario == "new_classes":
            if self.superclasses:
                raise SplitError(
                    f"A split by {self.by} of scenario {self.scenario!r} takes no `superclasses`; leave them out."
                )
            return
        superclass_of: dict[str, str] = {}
        for superclass, classes in self.superclasses.items():
            for name in classes:
                if name in superclass_of:
                    raise SplitError(
                        f"The class {name!r} of a split is in the superclasses {superclass_of[name]!r} and "
                        f"{superclass!r}; leave it in one."
                    )
                superclass_of[name] = superclass
        for name in (*self.T, *self.P, *self.F):
            if name not in superclass_of:
                raise SplitError(f"The class {name!r} of a split has no superclass; put it into one of `superclasses`.")
        known = {superclass_of[name] for name in self.P}
        for name in self.F:
            if superclass_of[name] not in known:
                raise SplitError(
                    f"The class {name!r} in F of a split is of superclass {superclass_of[name]!r}, of which P has no "
                    "class; put one into P, or choose the scenario 'new_classes'."
                )

    @classmethod
    def from_toml(cls, table: Mapping[str, Any]) -> "TaskSplit":
        """The split that a TOML table states.

        Raises:
            SplitError: it has other keys or values than a split, or the split can't be.
        """
        known = [each.name for each in fields(cls)]
        for key in table:
            if key not in known:
                raise SplitError(f"A split takes no {key!r}.{did_you_mean(key, known)}")
        for key in ("scenario", "P", "F"):
            if key not in table:
                raise SplitError(f"A split needs {key!r}; add it.")
        superclasses = table.get("superclasses", {})
        if not isinstance(superclasses, Mapping):
            raise SplitError(f"`superclasses` of a split are a table of lists of classes, but got {superclasses!r}.")
        return cls(
            scenario=table["scenario"],
            T=_names("T", table.get("T", [])),
            P=_names("P", table["P"]),
            F=_names("F", table["F"]),
            superclasses={key: _names(f"Superclass {key!r}", value) for key, value in superclasses.items()},
            by=table.get("by", "class"),
        )

    def to_json(self) -> dict[str, Any]:
        """The table that states it, without what is as usual; inverse of `from_toml`."""
        values = {key: list(getattr(self, key)) for key in SPLIT_SETS}
        superclasses = {name: list(classes) for name, classes in self.superclasses.items()}
        return {
            "scenario": self.scenario,
            **values,
            **({"superclasses": superclasses} if superclasses else {}),
            **({} if self.by == "class" else {"by": self.by}),
        }

    def without_extra(self) -> "TaskSplit":
        """The baseline whose T is empty."""
        return replace(self, T=())

    def outputs(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Names of the outputs of the split's networks: the superclasses, or all classes where there are none."""
        return tuple(self.superclasses) or tuple(class_names)


def read_splits(path: str | Path) -> dict[str, TaskSplit]:
    """The splits of a TOML file, one table each, by name.

    Raises:
        SplitError: the file can't be read, or a table is no split.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SplitError(
            f"The splits {str(path)!r} can't be read ({error.strerror}); give an existing file."
        ) from error
    except ValueError as error:  # tomllib.TOMLDecodeError, UnicodeDecodeError
        raise SplitError(f"The splits {str(path)!r} aren't TOML ({error}).") from error
    splits = {}
    for name, table in document.items():
        if not isinstance(table, Mapping):
            raise SplitError(f"{name!r} in {str(path)!r} is no table; a file of splits has one for each: [NAME].")
        try:
            splits[name] = TaskSplit.from_toml(table)
        except SplitError as error:
            raise SplitError(f"Split {name!r} of {str(path)!r}: {error}") from error
    return splits


def read_split(text: str) -> TaskSplit:
    """The split that `FILE.toml` holds, or `FILE.toml:NAME` where it holds several.

    Raises:
        SplitError: as `read_splits`, there is no such split, or it isn't said which.
    """
    stem, named, name = text.partition(".toml:")
    path = f"{stem}.toml" if named else text
    splits = read_splits(path)
    if not splits:
        raise SplitError(f"{path!r} has no splits; write one as a table: [NAME].")
    if not named and len(splits) > 1:
        raise SplitError(f"{path!r} has {len(splits)} splits; name one of them, as {path}:{next(iter(splits))}.")
    if named and name not in splits:
        raise SplitError(f"{path!r} has no split {name!r}.{did_you_mean(name, splits)}")
    return splits[name] if named else next(iter(splits.values()))


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise SplitError(f"{key} of a split is a list of names, but got {value!r}.")
    return tuple(value)
