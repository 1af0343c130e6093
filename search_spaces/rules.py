"""One rule of layer-wise relevance propagation: a name and its parameters."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import CompositeError, UnknownRuleError
from search_spaces.suggestions import did_you_mean

__all__ = ["GROUPS", "RULE_DEFAULTS", "RuleSpec"]

GROUPS = ("LLR", "MLL", "HLL", "FCL")
"""Layer groups from the image to the output: low, mid and high level, fully connected."""

RULE_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "Epsilon": {"epsilon": 1e-6},
    "ZPlus": {},
    "AlphaBeta": {"alpha": 2.0, "beta": 1.0},
    "Gamma": {"gamma": 0.25},
}
"""The rules that Hatefi et al. 2024 search, each with its parameters in the order in which they are written."""

_FCL_GAMMA = 0.05  # Hatefi et al. 2024 take a smaller gamma in fully-connected layers
_PARAMETERS = ("epsilon", "alpha", "beta", "gamma")
_WRITTEN = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule and its parameters; equal specs are equal rules.

        >>> str(RuleSpec("Gamma"))
        'Gamma(0.25)'

    Parameters that are left out take the rule's defaults; those of other rules must be left out.

    Attributes:
        name: `Epsilon`, `ZPlus`, `AlphaBeta` or `Gamma`.
        epsilon: Stabilizer of `Epsilon`, > 0.
        alpha: Weight of the positive part in `AlphaBeta`, at least 1.
        beta: Weight of the negative part in `AlphaBeta`, alpha - 1.
        gamma: Extra weight of the positive part in `Gamma`, >= 0.

    Raises:
        UnknownRuleError: No rule has this name.
        CompositeError: A parameter is of another rule or out of range.
    """

    name: str
    epsilon: float | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.name not in RULE_DEFAULTS:
            raise UnknownRuleError(f"Unknown rule {self.name!r}.{did_you_mean(str(self.name), RULE_DEFAULTS)}")
        defaults = RULE_DEFAULTS[self.name]
        for parameter in _PARAMETERS:
            value = getattr(self, parameter)
            if parameter in defaults:
                number = _finite(self.name, parameter, defaults[parameter] if value is None else value)
                object.__setattr__(self, parameter, number)
            elif value is not None:
                takes = f"takes {' and '.join(defaults)} only" if defaults else "takes none"
                raise CompositeError(f"Rule {self.name} has no parameter {parameter!r} (got {value!r}); it {takes}.")
        if self.epsilon is not None and self.epsilon <= 0:
            raise CompositeError(f"Rule Epsilon needs epsilon > 0, but got {self.epsilon!r}.")
        if self.gamma is not None and self.gamma < 0:
            raise CompositeError(f"Rule Gamma needs gamma >= 0, but got {self.gamma!r}.")
        if self.alpha is not None and self.beta is not None:
            if self.alpha < 1 or not math.isclose(self.alpha - self.beta, 1, rel_tol=1e-9):
                raise CompositeError(
                    f"Rule AlphaBeta needs alpha - beta = 1 and beta >= 0, "
                    f"but got alpha={self.alpha!r}, beta={self.beta!r}."
                )
            # alpha - 1 is exact in floating point, beta as written (2.3 - 1.3) need not be; zennit compares exactly.
            object.__setattr__(self, "beta", self.alpha - 1)

    @property
    def parameters(self) -> dict[str, float]:
        """The rule's own parameters by name."""
        return {parameter: getattr(self, parameter) for parameter in RULE_DEFAULTS[self.name]}

    def to_json(self) -> dict[str, Any]:
        """The name and the rule's own parameters, as `{"name": "Gamma", "gamma": 0.25}`."""
        return {"name": self.name, **self.parameters}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RuleSpec":
        """Inverse of `to_json`; parameters that are left out take the rule's defaults.

        Raises:
            CompositeError: `value` is no rule.
        """
        if not isinstance(value, Mapping) or "name" not in value:
            raise CompositeError(f"A rule is an object with a 'name', but got {value!r}.")
        unknown = sorted(set(value) - {"name", *_PARAMETERS})
        if unknown:
            raise CompositeError(f"Unknown rule parameter {unknown[0]!r}.{did_you_mean(unknown[0], _PARAMETERS)}")
        return cls(**value)

    @classmethod
    def parse(cls, text: str, *, group: str | None = None, epsilon: float | None = None) -> "RuleSpec":
        """Inverse of `str`; also reads a bare name.

        Args:
            text: `Gamma(0.1)`, or `Gamma` for the rule with its defaults.
            group: Layer group that the rule is for: a bare `Gamma` has gamma 0.05 in `FCL`, 0.25 elsewhere.
            epsilon: Parameter of a bare `Epsilon`; 1e-6 where absent.

        Raises:
            UnknownRuleError: No rule has this name.
            CompositeError: The parameters cannot be read or are out of range.
        """
        match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UnknownRuleError(f"Unknown rule {text!r}.{did_you_mean(str(text), RULE_DEFAULTS)}")
        name, arguments = match.groups()
        if name not in RULE_DEFAULTS or arguments is None:
            if name == "Epsilon":
                return cls(name, epsilon=epsilon)
            if name == "Gamma" and group == "FCL":
                return cls(name, gamma=_FCL_GAMMA)
            return cls(name)
        parameters = RULE_DEFAULTS[name]
        written = [argument.strip() for argument in arguments.split(",")]
        if len(written) != len(parameters):
            form = f"{name}({','.join(parameters)})" if parameters else name
            raise CompositeError(f"Rule {text.strip()!r} cannot be read; write {form}.")
        try:
            values = [float(argument) for argument in written]
        except ValueError as error:
            raise CompositeError(f"Rule {text.strip()!r} has a parameter that is no number.") from error
        return cls(name, **dict(zip(parameters, values, strict=True)))

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        # repr keeps every digit, so that distinct rules never look the same.
        return f"{self.name}({','.join(repr(value).removesuffix('.0') for value in self.parameters.values())})"


def _finite(rule: str, parameter: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CompositeError(f"Rule {rule} needs a finite number as {parameter}, but got {value!r}.")
    return float(value) + 0.0  # + 0.0 turns -0.0 into 0.0, which prints and hashes as one value
