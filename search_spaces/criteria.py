"""A criterion: a ranking of components that needs no relevance, as a baseline of composites."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from search_spaces.composites import NORMALIZATIONS, CompositeSpec
from search_spaces.errors import CriterionError
from search_spaces.suggestions import did_you_mean

__all__ = ["CRITERIA", "Criterion", "CriterionSpec", "Ranker", "ranker_from_json"]

Criterion = Literal[
    "weight", "weight-l1", "gradient", "taylor", "hessian", "activation", "integrated-gradients", "random"
]

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
"""All criteria; `objectives.attribution.criteria` defines them."""

_KEYS = ("criterion", "normalize", "seed")


@dataclass(frozen=True, slots=True)
class CriterionSpec:
    """A criterion and what it takes; equal specs are equal rankings.

        >>> CriterionSpec("taylor").label, CriterionSpec("random", seed=3).label
        ('taylor', 'random seed=3')

    Attributes:
        name: Of `CRITERIA`.
        normalize: What the scores of a layer are divided by, of `NORMALIZATIONS`. By default `l2` (Yeom et al. 2021),
            but `none` for `random`, which would prune wide layers first otherwise.
        seed: Of `random`, at least 0; no other criterion has one.

    Raises:
        CriterionError: No criterion has this name, the normalisation is unknown, or a seed is missing or too much.
    """

    name: Criterion
    normalize: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in CRITERIA:
            raise CriterionError(f"Unknown criterion {self.name!r}.{did_you_mean(str(self.name), CRITERIA)}")
        if self.normalize is None:
            object.__setattr__(self, "normalize", self._usual)
        if self.normalize not in NORMALIZATIONS:
            known = did_you_mean(str(self.normalize), NORMALIZATIONS)
            raise CriterionError(f"Unknown value {self.normalize!r} of `normalize`.{known}")
        if self.name != "random":
            if self.seed is not None:
                raise CriterionError(f"Criterion {self.name} takes no seed, but got {self.seed!r}; leave it out.")
        elif isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise CriterionError(f"Criterion random needs a seed of at least 0, but got {self.seed!r}.")

    @property
    def _usual(self) -> str:
        return "none" if self.name == "random" else "l2"

    @property
    def repair(self) -> None:
        """Of the networks that it prunes: always left to the study."""

    @property
    def key(self) -> str:
        """Canonical text: equal if and only if the criteria are; never that of a composite."""
        return ",".join(f"{name}={value}" for name, value in self.to_json().items())

    @property
    def label(self) -> str:
        """Short text for tables."""
        seed = "" if self.seed is None else f" seed={self.seed}"
        return f"{self.name}{seed}{'' if self.normalize == self._usual else f' normalize={self.normalize}'}"

    def to_json(self) -> dict[str, Any]:
        """JSON form, as `{"criterion": "taylor", "normalize": "l2"}`."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"criterion": self.name, "normalize": self.normalize, **seed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CriterionSpec":
        """Inverse of `to_json`.

        Raises:
            CriterionError: `value` is no criterion.
        """
        if not isinstance(value, Mapping) or "criterion" not in value:
            raise CriterionError(f"A criterion is an object with 'criterion', but got {value!r}.")
        for key in value:
            if key not in _KEYS:
                raise CriterionError(f"Unknown criterion key {key!r}.{did_you_mean(str(key), _KEYS)}")
        return cls(value["criterion"], normalize=value.get("normalize"), seed=value.get("seed"))

    def __str__(self) -> str:
        return self.key


Ranker: TypeAlias = CompositeSpec | CriterionSpec
"""What ranks components: both have `key`, `label`, `repair` and `to_json`."""


def ranker_from_json(value: Mapping[str, Any]) -> Ranker:
    """Inverse of both `to_json`: of an object with 'criterion' a criterion, else a composite.

    Raises:
        CriterionError: `value` is a criterion that cannot be.
        CompositeError: `value` is neither.
    """
    if isinstance(value, Mapping) and "criterion" in value:
        return CriterionSpec.from_json(value)
    return CompositeSpec.from_json(value)
