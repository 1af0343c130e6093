"""A composite: which rule propagates relevance through which layer group."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import CompositeError
from search_spaces.repairs import RepairSpec
from search_spaces.rules import GROUPS, RULE_DEFAULTS, RuleSpec
from search_spaces.suggestions import did_you_mean

__all__ = ["AGGREGATES", "ATTENTION_RULES", "CompositeSpec", "NORMALIZATIONS"]

AGGREGATES = ("mean", "rms")
"""How a component's relevance is taken over the reference samples: its mean, or the root of its mean square."""

ATTENTION_RULES = ("AttnLRP", "CP", "ZPlus")
"""Rules of the attention softmax; only transformers have one."""

NORMALIZATIONS = ("none", "l2", "mean")
"""What the scores of a layer are divided by: nothing, their l2 norm, or the mean of their absolute values."""

_PARAMETERS = (
    *GROUPS,
    "abs",
    "epsilon",
    "attention",
    "aggregate",
    "normalize",
    *(f"{group}_gamma" for group in GROUPS),
)
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True, slots=True)
class CompositeSpec:
    """A rule per layer group, and how components are ranked by the relevance that these give.

        >>> CompositeSpec.parse_rules("LLR=Epsilon,MLL=Epsilon,HLL=ZPlus,FCL=Epsilon", abs=True)

    Parameters live in the rules that use them, so that equal specs are equal points of a search.

    Attributes:
        LLR: Rule of the low-level layers.
        MLL: Rule of the mid-level layers.
        HLL: Rule of the high-level layers.
        FCL: Rule of the fully-connected layers.
        abs: Rank by absolute relevance (Hatefi et al. 2024) rather than by its signed value; always true with `rms`,
            which knows no sign.
        attention: Rule of the attention softmax; None for networks without attention.
        aggregate: Of `AGGREGATES`.
        normalize: Of `NORMALIZATIONS`.
        repair: Of the networks that it prunes; None leaves it to the study.

    Raises:
        CompositeError: A field is of the wrong type, or no attention rule has this name.
    """

    LLR: RuleSpec
    MLL: RuleSpec
    HLL: RuleSpec
    FCL: RuleSpec
    abs: bool
    attention: str | None = None
    aggregate: str = "mean"
    normalize: str = "none"
    repair: RepairSpec | None = None

    def __post_init__(self) -> None:
        for group, rule in self.rules.items():
            if not isinstance(rule, RuleSpec):
                raise CompositeError(f"Group {group} needs a RuleSpec, but got {rule!r}.")
        if not isinstance(self.abs, bool):
            raise CompositeError(f"`abs` must be true or false, but got {self.abs!r}.")
        if self.attention is not None and self.attention not in ATTENTION_RULES:
            raise CompositeError(
                f"Unknown attention rule {self.attention!r}.{did_you_mean(str(self.attention), ATTENTION_RULES)}"
            )
        for field, known in (("aggregate", AGGREGATES), ("normalize", NORMALIZATIONS)):
            value = getattr(self, field)
            if value not in known:
                raise CompositeError(f"Unknown value {value!r} of `{field}`.{did_you_mean(str(value), known)}")
        if self.repair is not None and not isinstance(self.repair, RepairSpec):
            raise CompositeError(f"`repair` must be a RepairSpec or None, but got {self.repair!r}.")
        if self.aggregate == "rms":
            object.__setattr__(self, "abs", True)

    @property
    def rules(self) -> dict[str, RuleSpec]:
        """The rule of each layer group, in the order of `GROUPS`."""
        return {group: getattr(self, group) for group in GROUPS}

    @property
    def epsilon(self) -> float | None:
        """The epsilon of the `Epsilon` rules; None where no group has one or groups differ."""
        epsilons = {rule.epsilon for rule in self.rules.values() if rule.epsilon is not None}
        return epsilons.pop() if len(epsilons) == 1 else None

    @property
    def attribution_key(self) -> str:
        """Canonical text of what decides the relevance; all ways to rank by it share it."""
        rules = ",".join(f"{group}={rule}" for group, rule in self.rules.items())
        return rules if self.attention is None else f"{rules},attention={self.attention}"

    @property
    def key(self) -> str:
        """Canonical text: equal if and only if the composites are."""
        further = "".join(f",{name}={value}" for name, value in self._further.items())
        return f"{self.attribution_key},abs={str(self.abs).lower()}{further}"

    @property
    def _further(self) -> dict[str, str]:
        """What differs from the usual; names of stored composites leave the usual ones out."""
        usual = {"aggregate": "mean", "normalize": "none", "repair": None}
        return {name: str(getattr(self, name)) for name, value in usual.items() if getattr(self, name) != value}

    @property
    def label(self) -> str:
        """Short text for tables: rules from LLR to FCL, parameters only where they are not the usual ones."""
        rules = "/".join(
            rule.name if rule == RuleSpec.parse(rule.name, group=group, epsilon=self.epsilon) else str(rule)
            for group, rule in self.rules.items()
        )
        attention = "" if self.attention is None else f" attention={self.attention}"
        epsilon = "" if self.epsilon in (None, RULE_DEFAULTS["Epsilon"]["epsilon"]) else f" epsilon={self.epsilon!r}"
        absolute = " abs" if self.abs and self.aggregate != "rms" else ""
        further = "".join(
            f" {value}" if name == "aggregate" else f" {name}={value}" for name, value in self._further.items()
        )
        return f"{rules}{attention}{epsilon}{absolute}{further}"

    def to_json(self) -> dict[str, Any]:
        """JSON form, as `{"rules": {"LLR": {"name": "Epsilon", "epsilon": 1e-06}, ...}, "abs": true}`."""
        value: dict[str, Any] = {"rules": {group: rule.to_json() for group, rule in self.rules.items()}}
        if self.attention is not None:
            value["attention"] = self.attention
        return {**value, "abs": self.abs, **self._further}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CompositeSpec":
        """Inverse of `to_json`.

        Raises:
            CompositeError: `value` is no composite.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rules"), Mapping):
            raise CompositeError(f"A composite is an object with 'rules' and 'abs', but got {value!r}.")
        _require_known("composite key", value, ("rules", "abs", "attention", "aggregate", "normalize", "repair"))
        rules = value["rules"]
        _require_groups(rules)
        if "abs" not in value:
            raise CompositeError("The composite lacks 'abs'; give true or false.")
        return cls(
            **{group: RuleSpec.from_json(rules[group]) for group in GROUPS},
            abs=value["abs"],
            attention=value.get("attention"),
            aggregate=value.get("aggregate", "mean"),
            normalize=value.get("normalize", "none"),
            repair=None if value.get("repair") is None else RepairSpec.parse(value["repair"]),
        )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> "CompositeSpec":
        """The composite of Optuna parameters, as `{"LLR": "Epsilon", ..., "abs": True, "epsilon": 1e-06}`.

        Args:
            parameters: A rule as `RuleSpec.parse` reads it for each group, and `abs`; where they matter also
                `epsilon` (for all groups), `LLR_gamma` ... `FCL_gamma`, `attention`, `aggregate` and `normalize`.

        Raises:
            UnknownRuleError: No rule has this name.
            CompositeError: A parameter is unknown, missing or out of range.
        """
        _require_known("parameter", parameters, _PARAMETERS)
        _require_groups({name: value for name, value in parameters.items() if name in GROUPS})
        if "abs" not in parameters:
            raise CompositeError("Parameter 'abs' is missing; give true or false.")
        rules: dict[str, Any] = {}
        for group in GROUPS:
            rule: Any = parameters[group]
            gamma: Any = parameters.get(f"{group}_gamma")
            epsilon: Any = parameters.get("epsilon")
            rules[group] = (
                RuleSpec("Gamma", gamma=gamma)
                if rule == "Gamma" and gamma is not None
                else RuleSpec.parse(rule, group=group, epsilon=epsilon)
            )
        abs_: Any = parameters["abs"]
        attention: Any = parameters.get("attention")
        aggregate: Any = parameters.get("aggregate", "mean")
        normalize: Any = parameters.get("normalize", "none")
        return cls(**rules, abs=abs_, attention=attention, aggregate=aggregate, normalize=normalize)

    @classmethod
    def parse_rules(
        cls,
        text: str,
        *,
        abs: bool = False,
        epsilon: float | None = None,
        attention: str | None = None,
        aggregate: str = "mean",
        normalize: str = "none",
    ) -> "CompositeSpec":
        """The composite of a command line, as `LLR=Epsilon,MLL=Gamma(0.1),HLL=ZPlus,FCL=Epsilon`.

        Args:
            text: A rule as `RuleSpec.parse` reads it for each of the four groups, in any order.
            abs: Rank by absolute relevance.
            epsilon: Parameter of every bare `Epsilon`; 1e-6 where absent.
            attention: Of `ATTENTION_RULES`; None for networks without attention.
            aggregate: Of `AGGREGATES`.
            normalize: Of `NORMALIZATIONS`.

        Raises:
            UnknownRuleError: No rule has this name.
            CompositeError: A group is unknown, missing or given twice, or a parameter is out of range.
        """
        rules: dict[str, str] = {}
        for item in _COMMA_OUTSIDE_PARENTHESES.split(text):
            group, separator, rule = (part.strip() for part in item.partition("="))
            if not separator:
                raise CompositeError(f"Cannot read {item.strip()!r} in rules {text!r}; write LLR=RULE,...,FCL=RULE.")
            if group in rules:
                raise CompositeError(f"Group {group!r} is given twice in rules {text!r}.")
            rules[group] = rule
        _require_groups(rules)
        ranking = {"abs": abs, "aggregate": aggregate, "normalize": normalize}
        return cls.from_parameters({**rules, **ranking, "epsilon": epsilon, "attention": attention})

    def __str__(self) -> str:
        return self.key


def _require_known(what: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise CompositeError(f"Unknown {what} {name!r}.{did_you_mean(str(name), known)}")


def _require_groups(rules: Mapping[str, object]) -> None:
    _require_known("layer group", rules, GROUPS)
    for group in GROUPS:
        if group not in rules:
            raise CompositeError(f"Layer group {group} has no rule; give one of {', '.join(RULE_DEFAULTS)}.")
