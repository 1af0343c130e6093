"""Search spaces: which composites a study may try, and the registry of those that have a name."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from search_spaces.composites import AGGREGATES, ATTENTION_RULES, NORMALIZATIONS, CompositeSpec
from search_spaces.errors import (
    CompositeError,
    OutsideSpaceError,
    SpaceError,
    SpaceImportError,
    SpaceNotFiniteError,
    UnknownSpaceError,
)
from search_spaces.imports import import_object
from search_spaces.reasons import message_of
from search_spaces.repairs import REPAIRS, RepairSpec
from search_spaces.rules import GROUPS, RULE_DEFAULTS, RuleSpec
from search_spaces.suggestions import did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

__all__ = [
    "ContinuousSpace",
    "DiscreteSpace",
    "REPAIR_SUFFIXES",
    "RepairedSpace",
    "SPACES",
    "SearchSpace",
    "load_space",
    "register",
]


@runtime_checkable
class SearchSpace(Protocol):
    """A set of composites and their Optuna parameters.

    Every trial has the same parameters, also those that its rules do not use: samplers that model parameters jointly
    need a static space. Points that differ in an unused parameter are one composite. Implementations are frozen, so
    they can be shared by threads, and they import Optuna when called, not when loaded.
    """

    @property
    def name(self) -> str:
        """Name for people; the content decides what the space is."""
        ...

    @property
    def layer_groups(self) -> Mapping[str, tuple[str, ...]] | None:
        """Name patterns (`fnmatch`) of the layers of each group; None groups layers by depth."""
        ...

    def suggest(self, trial: "BaseTrial") -> CompositeSpec:
        """The composite of the parameters that `trial` suggests."""
        ...

    def distributions(self) -> "dict[str, BaseDistribution]":
        """The distribution of each parameter, as `suggest` asks for them."""
        ...

    def parameters(self, composite: CompositeSpec) -> dict[str, bool | float | str]:
        """Inverse of `suggest`; parameters that the composite does not use have their first or usual value.

        Raises:
            OutsideSpaceError: The composite is no point of the space.
        """
        ...

    def grid(self) -> tuple[CompositeSpec, ...]:
        """The distinct points in tree order.

        Points that share rules from the output down stand together (FCL varies slowest, LLR fastest), and all ways to
        rank, which share an attribution, are neighbours.

        Raises:
            SpaceNotFiniteError: The space is continuous.
        """
        ...

    def size(self) -> int | None:
        """Number of distinct points; None if continuous."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The whole content: part of a study's identity."""
        ...


_Factory = TypeVar("_Factory", bound=Callable[[], SearchSpace])

_OF_REPAIR = ("repair", "repair_strength")
REPAIR_SUFFIXES: Mapping[str, tuple[float, ...]] = {"+repair": (), "+repair-strength": (0.01, 0.1, 1.0)}
"""What may stand behind a registered space's name to have the repair searched, and with which strengths."""

SPACES: dict[str, Callable[[], SearchSpace]] = {}
"""Makers of the registered spaces by name; the first line of a maker's docstring describes its space."""


def register(name: str) -> Callable[[_Factory], _Factory]:
    """Decorator that registers the maker of a search space under a name."""

    def decorate(factory: _Factory) -> _Factory:
        SPACES[name] = factory
        return factory

    return decorate


@dataclass(frozen=True, slots=True)
class DiscreteSpace:
    """A list of values for each parameter.

    Attributes:
        name: Name for people.
        rules: For each group the rules to try, as `RuleSpec.parse` reads them; `Epsilon` always bare.
        abs: Values of `abs`.
        epsilon: Values of the one epsilon that all `Epsilon` rules of a composite share.
        attention: Of `ATTENTION_RULES`, for networks with attention; none for others.
        aggregate: Of `AGGREGATES`; a parameter only where there is more than the mean.
        normalize: Of `NORMALIZATIONS`; a parameter only where there is more than none.
        layer_groups: Name patterns of the layers of each group; None groups layers by depth.

    Raises:
        SpaceError: A list is empty, repeats a value or has one that is out of range.
        UnknownRuleError: No rule has this name.
    """

    name: str
    rules: Mapping[str, tuple[str, ...]]
    abs: tuple[bool, ...] = (False, True)
    epsilon: tuple[float, ...] = (RULE_DEFAULTS["Epsilon"]["epsilon"],)
    attention: tuple[str, ...] = ()
    aggregate: tuple[str, ...] = AGGREGATES[:1]
    normalize: tuple[str, ...] = NORMALIZATIONS[:1]
    layer_groups: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        _require_known("parameter", self.rules, GROUPS)
        for group in GROUPS:
            if group not in self.rules:
                raise SpaceError(f"Parameter {group} is missing; list the rules to try, as {group} = ['Epsilon'].")
        further: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
            "aggregate": (self.aggregate, AGGREGATES),
            "normalize": (self.normalize, NORMALIZATIONS),
        }
        lists = {
            **self.rules,
            "abs": self.abs,
            "epsilon": self.epsilon,
            **{name: own for name, (own, _) in further.items()},
        }
        further["attention"] = (self.attention, ATTENTION_RULES)
        for parameter, values in lists.items():
            if not values:
                raise SpaceError(f"Parameter {parameter} has no values; list at least one or leave the key out.")
        for value in self.abs:
            if not isinstance(value, bool):
                raise SpaceError(f"Parameter abs takes true and false, but got {value!r}.")
        try:
            epsilons = tuple(RuleSpec("Epsilon", epsilon=epsilon) for epsilon in self.epsilon)
        except CompositeError as error:
            raise SpaceError(f"Parameter epsilon has a value out of range: {error}") from error
        object.__setattr__(self, "epsilon", tuple(rule.parameters["epsilon"] for rule in epsilons))
        for parameter, (own, known) in further.items():
            for name in own:
                if name not in known:
                    suggestion = did_you_mean(str(name), known)
                    raise SpaceError(f"Parameter {parameter} has the unknown value {name!r}.{suggestion}")
            _require_distinct(parameter, own)
        _require_distinct("abs", self.abs)
        _require_distinct("epsilon", self.epsilon)
        for group in GROUPS:
            rules = tuple(RuleSpec.parse(choice, group=group) for choice in self.rules[group])
            _require_distinct(group, tuple(map(str, rules)))
            for choice, rule in zip(self.rules[group], rules, strict=True):
                if rule.name == "Epsilon" and choice != "Epsilon":
                    raise SpaceError(f"Parameter {group} has {choice!r}; write 'Epsilon' and list values in epsilon.")
        if self.layer_groups is not None:
            _require_patterns(self.layer_groups)

    def suggest(self, trial: "BaseTrial") -> CompositeSpec:
        """See `SearchSpace.suggest`."""
        return CompositeSpec.from_parameters(
            {name: trial.suggest_categorical(name, choices) for name, choices in self._choices().items()}
        )

    def distributions(self) -> "dict[str, BaseDistribution]":
        """See `SearchSpace.distributions`."""
        from optuna.distributions import CategoricalDistribution

        return {name: CategoricalDistribution(choices) for name, choices in self._choices().items()}

    def parameters(self, composite: CompositeSpec) -> dict[str, bool | float | str]:
        """See `SearchSpace.parameters`; an unused epsilon or abs has its first value."""
        epsilon = composite.epsilon if composite.epsilon in self.epsilon else self.epsilon[0]
        parameters: dict[str, bool | float | str] = {}
        for group, rule in composite.rules.items():
            for choice in self.rules[group]:
                if RuleSpec.parse(choice, group=group, epsilon=epsilon) == rule:
                    parameters[group] = choice
                    break
            else:
                raise OutsideSpaceError(f"Space {self.name!r} has no {rule} in {group}; composite: {composite}.")
        knows_sign = composite.aggregate != "rms"
        if (
            (knows_sign and composite.abs not in self.abs)
            or composite.aggregate not in self.aggregate
            or composite.normalize not in self.normalize
            or composite.attention not in (self.attention or (None,))
            or composite.repair is not None
        ):
            raise OutsideSpaceError(f"Space {self.name!r} does not contain composite {composite}.")
        absolute = composite.abs if knows_sign else self.abs[0]
        found = {**parameters, "abs": absolute, "epsilon": epsilon}
        found.update({name: getattr(composite, name) for name in self._choices() if name not in found})
        return found

    def grid(self) -> tuple[CompositeSpec, ...]:
        """See `SearchSpace.grid`."""
        from_the_output = [
            [
                RuleSpec.parse(choice, group=group, epsilon=epsilon)
                for choice in self.rules[group]
                for epsilon in (self.epsilon if choice == "Epsilon" else (None,))
            ]
            for group in reversed(GROUPS)
        ]
        attentions: tuple[str | None, ...] = self.attention or (None,)
        points = (
            CompositeSpec(llr, mll, hll, fcl, abs=abs, attention=attention, aggregate=aggregate, normalize=normalize)
            for fcl, hll in itertools.product(*from_the_output[:2])
            for attention in attentions  # which relevance meets behind the first layers of HLL
            for mll, llr in itertools.product(*from_the_output[2:])
            # All Epsilon rules of a composite share one epsilon.
            if len({llr.epsilon, mll.epsilon, hll.epsilon, fcl.epsilon} - {None}) <= 1
            for normalize in self.normalize
            for aggregate in self.aggregate
            for abs in self.abs
        )
        return tuple(dict.fromkeys(points))

    def size(self) -> int:
        """See `SearchSpace.size`."""
        return len(self.grid())

    def to_json(self) -> dict[str, Any]:
        """See `SearchSpace.to_json`."""
        return {
            "name": self.name,
            "parameters": {name: list(choices) for name, choices in self._choices().items()},
            "groups": _groups_to_json(self.layer_groups),
        }

    def _choices(self) -> dict[str, tuple[bool | float | str, ...]]:
        choices: dict[str, tuple[bool | float | str, ...]] = {group: self.rules[group] for group in GROUPS}
        choices |= {"abs": self.abs, "epsilon": self.epsilon}
        # Absent where they aren't searched: stored studies of such spaces lack them too.
        if self.attention:
            choices["attention"] = self.attention
        if self.aggregate != AGGREGATES[:1]:
            choices["aggregate"] = self.aggregate
        if self.normalize != NORMALIZATIONS[:1]:
            choices["normalize"] = self.normalize
        return choices


@dataclass(frozen=True, slots=True)
class ContinuousSpace:
    """All rules in every group, a gamma for each group and one epsilon from log-uniform ranges.

    Attributes:
        name: Name for people.
        gamma: Lowest and highest gamma; the parameters are `LLR_gamma` to `FCL_gamma`.
        epsilon: Lowest and highest epsilon.
        layer_groups: Name patterns of the layers of each group; None groups layers by depth.

    Raises:
        SpaceError: A range does not increase from above 0, or a pattern is wrong.
    """

    name: str
    gamma: tuple[float, float] = (0.01, 10.0)
    epsilon: tuple[float, float] = (1e-6, 1.0)
    layer_groups: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        for parameter, (low, high) in {"gamma": self.gamma, "epsilon": self.epsilon}.items():
            if not 0 < low < high < float("inf"):
                raise SpaceError(f"The range of {parameter} must increase from above 0, but got {low!r} to {high!r}.")
        if self.layer_groups is not None:
            _require_patterns(self.layer_groups)

    def suggest(self, trial: "BaseTrial") -> CompositeSpec:
        """See `SearchSpace.suggest`."""
        parameters: dict[str, object] = {
            **{group: trial.suggest_categorical(group, tuple(RULE_DEFAULTS)) for group in GROUPS},
            "abs": trial.suggest_categorical("abs", (False, True)),
            "epsilon": trial.suggest_float("epsilon", *self.epsilon, log=True),
            **{f"{group}_gamma": trial.suggest_float(f"{group}_gamma", *self.gamma, log=True) for group in GROUPS},
        }
        return CompositeSpec.from_parameters(parameters)

    def distributions(self) -> "dict[str, BaseDistribution]":
        """See `SearchSpace.distributions`."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return {
            **{group: CategoricalDistribution(tuple(RULE_DEFAULTS)) for group in GROUPS},
            "abs": CategoricalDistribution((False, True)),
            "epsilon": FloatDistribution(*self.epsilon, log=True),
            **{f"{group}_gamma": FloatDistribution(*self.gamma, log=True) for group in GROUPS},
        }

    def parameters(self, composite: CompositeSpec) -> dict[str, bool | float | str]:
        """See `SearchSpace.parameters`; unused ones have the value nearest to the rule's default."""
        default = RULE_DEFAULTS["Epsilon"]["epsilon"]
        epsilon = _nearest(default if composite.epsilon is None else composite.epsilon, self.epsilon)
        gammas = {
            f"{group}_gamma": _nearest(RuleSpec.parse("Gamma", group=group).parameters["gamma"], self.gamma)
            if rule.gamma is None
            else _nearest(rule.gamma, self.gamma)
            for group, rule in composite.rules.items()
        }
        parameters: dict[str, bool | float | str] = {
            **{group: rule.name for group, rule in composite.rules.items()},
            "abs": composite.abs,
            "epsilon": epsilon,
            **gammas,
        }
        if CompositeSpec.from_parameters(parameters) != composite:
            raise OutsideSpaceError(f"Space {self.name!r} does not contain composite {composite}.")
        return parameters

    def grid(self) -> tuple[CompositeSpec, ...]:
        """See `SearchSpace.grid`; always raises."""
        raise SpaceNotFiniteError(f"Space {self.name!r} is continuous and has no grid; use `--sampler tpe` or random.")

    def size(self) -> None:
        """See `SearchSpace.size`; None."""
        return None

    def to_json(self) -> dict[str, Any]:
        """See `SearchSpace.to_json`."""
        return {
            "name": self.name,
            "parameters": {
                **{group: list(RULE_DEFAULTS) for group in GROUPS},
                "abs": [False, True],
                "epsilon": {"low": self.epsilon[0], "high": self.epsilon[1], "log": True},
                **{f"{group}_gamma": {"low": self.gamma[0], "high": self.gamma[1], "log": True} for group in GROUPS},
            },
            "groups": _groups_to_json(self.layer_groups),
        }


@dataclass(frozen=True, slots=True)
class RepairedSpace:
    """The points of another space, with several ways to repair the networks that they prune.

        >>> load_space("cnn+repair").size()
        3636

    Attributes:
        base: Space of composites that leave the repair to the study.
        repair: Of `REPAIRS`.
        repair_strength: Strengths of the repairs other than none; a parameter only where there are any, else the
            reference images choose.

    Raises:
        SpaceError: A list repeats a value or has one that is out of range.
    """

    base: SearchSpace
    repair: tuple[str, ...] = tuple(REPAIRS)
    repair_strength: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.repair:
            raise SpaceError("Parameter repair has no values; list at least one or leave the key out.")
        try:
            for method in self.repair:
                RepairSpec(method)
            strengths = tuple(RepairSpec("refit", strength).strength or 0.0 for strength in self.repair_strength)
        except CompositeError as error:
            raise SpaceError(f"Parameter repair has a value out of range: {error}") from error
        if strengths and set(self.repair) == {"none"}:
            raise SpaceError("Parameter repair_strength has values, but repair only none; add bn or refit to it.")
        object.__setattr__(self, "repair_strength", strengths)
        _require_distinct("repair", self.repair)
        _require_distinct("repair_strength", self.repair_strength)

    @property
    def name(self) -> str:
        """See `SearchSpace.name`."""
        return f"{self.base.name}+repair{'-strength' if self.repair_strength else ''}"

    @property
    def layer_groups(self) -> Mapping[str, tuple[str, ...]] | None:
        """See `SearchSpace.layer_groups`."""
        return self.base.layer_groups

    def suggest(self, trial: "BaseTrial") -> CompositeSpec:
        """See `SearchSpace.suggest`."""
        composite = self.base.suggest(trial)
        method = trial.suggest_categorical("repair", self.repair)
        strength = None
        if self.repair_strength:
            strength = trial.suggest_categorical("repair_strength", self.repair_strength)
        return replace(composite, repair=_repair(method, strength))

    def distributions(self) -> "dict[str, BaseDistribution]":
        """See `SearchSpace.distributions`."""
        from optuna.distributions import CategoricalDistribution

        own = {name: CategoricalDistribution(choices) for name, choices in self._choices().items()}
        return {**self.base.distributions(), **own}

    def parameters(self, composite: CompositeSpec) -> dict[str, bool | float | str]:
        """See `SearchSpace.parameters`; the strength of none is the first one."""
        if composite.repair not in self._repairs():
            raise OutsideSpaceError(f"Space {self.name!r} does not contain composite {composite}.")
        assert composite.repair is not None, "it is one of ours"
        parameters = self.base.parameters(replace(composite, repair=None))
        parameters["repair"] = composite.repair.method
        if self.repair_strength:
            parameters["repair_strength"] = composite.repair.strength or self.repair_strength[0]
        return parameters

    def grid(self) -> tuple[CompositeSpec, ...]:
        """See `SearchSpace.grid`; all repairs of a composite, which share its ranking, are neighbours."""
        repairs = self._repairs()
        return tuple(replace(point, repair=repair) for point in self.base.grid() for repair in repairs)

    def size(self) -> int | None:
        """See `SearchSpace.size`."""
        size = self.base.size()
        return None if size is None else size * len(self._repairs())

    def to_json(self) -> dict[str, Any]:
        """See `SearchSpace.to_json`."""
        base = self.base.to_json()
        own = {name: list(choices) for name, choices in self._choices().items()}
        return {**base, "name": self.name, "parameters": {**base["parameters"], **own}}

    def _repairs(self) -> tuple[RepairSpec, ...]:
        strengths: tuple[float | None, ...] = self.repair_strength or (None,)
        return tuple(dict.fromkeys(_repair(method, strength) for method in self.repair for strength in strengths))

    def _choices(self) -> dict[str, tuple[float | str, ...]]:
        return {"repair": self.repair} | ({"repair_strength": self.repair_strength} if self.repair_strength else {})


def _repair(method: str, strength: float | None) -> RepairSpec:
    return RepairSpec(method, None if method == "none" else strength)


@register("cnn")
def _cnn() -> SearchSpace:
    """The four rules of Hatefi et al. 2024 in four layer groups, signed or absolute, three epsilons."""
    return DiscreteSpace("cnn", dict.fromkeys(GROUPS, tuple(RULE_DEFAULTS)), epsilon=(1e-6, 1e-2, 1e-1))


@register("vit")
def _vit() -> SearchSpace:
    """For vision transformers: the points of `cnn` with three rules of attention."""
    return DiscreteSpace(
        "vit", dict.fromkeys(GROUPS, tuple(RULE_DEFAULTS)), epsilon=(1e-6, 1e-2, 1e-1), attention=ATTENTION_RULES
    )


@register("cnn-extended")
def _cnn_extended() -> SearchSpace:
    """The points of `cnn` with two ways to aggregate relevance over samples and three to normalise it per layer."""
    return DiscreteSpace(
        "cnn-extended",
        dict.fromkeys(GROUPS, tuple(RULE_DEFAULTS)),
        epsilon=(1e-6, 1e-2, 1e-1),
        aggregate=AGGREGATES,
        normalize=NORMALIZATIONS,
    )


@register("cnn-continuous")
def _cnn_continuous() -> SearchSpace:
    """The rules of `cnn` with a gamma for each layer group and epsilon from continuous ranges."""
    return ContinuousSpace("cnn-continuous")


def load_space(spec: str, *, allow_imports: bool = True) -> SearchSpace:
    """The search space that the user names.

        >>> load_space("cnn").size()
        1212

    Args:
        spec: A registered name, the path of a TOML file (ends in `.toml`), or `package.module:object`; with `+repair`
            behind a registered name, how pruned networks are repaired is searched too, with `+repair-strength` how
            strongly as well.
        allow_imports: False refuses import paths; pass it for names that come from a document or a store.

    Raises:
        UnknownSpaceError: No space has this name.
        SpaceError: The file does not describe a space.
        SpaceImportError: The import path leads to no space, or imports are not allowed.
    """
    if spec in SPACES:
        return SPACES[spec]()
    for suffix, strengths in REPAIR_SUFFIXES.items():
        if (base := spec.removesuffix(suffix)) in SPACES:
            return RepairedSpace(SPACES[base](), repair_strength=strengths)
    if spec.endswith(".toml"):
        return _read_toml(Path(spec))
    if ":" in spec:
        return _import_space(spec, allowed=allow_imports)
    raise UnknownSpaceError(
        f"Unknown search space {spec!r}.{did_you_mean(spec, SPACES)} "
        "With +repair behind it the repair is searched, too, with +repair-strength its strength as well. "
        "A TOML file's name ends in .toml; an import path is package.module:object."
    )


def _import_space(path: str, *, allowed: bool) -> SearchSpace:
    if not allowed:
        raise SpaceImportError(f"Search space {path!r} is not imported from here; pass `--space` on the command line.")
    try:
        space = import_object(path)
    except ImportError as error:
        raise SpaceImportError(f"Search space {path!r} cannot be loaded: {error}.") from error
    if isinstance(space, type):
        raise SpaceImportError(f"Search space {path!r} is a class; name an instance of it.")
    if not isinstance(space, SearchSpace):
        members = ("name", "layer_groups", "suggest", "distributions", "parameters", "grid", "size", "to_json")
        missing = [member for member in members if not hasattr(space, member)]
        raise SpaceImportError(
            f"Search space {path!r} is a {type(space).__name__}, not a SearchSpace: it lacks {', '.join(missing)}."
        )
    return space


def _read_toml(path: Path) -> SearchSpace:
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceError(f"Search space file {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # tomllib.TOMLDecodeError, UnicodeDecodeError
        raise SpaceError(f"Search space file {str(path)!r} is not valid TOML: {message_of(error)}.") from error
    try:
        return _space_of_toml(path.stem, content)
    except (CompositeError, SpaceError) as error:
        raise type(error)(f"Search space file {str(path)!r}: {error}") from error


def _space_of_toml(stem: str, content: Mapping[str, Any]) -> SearchSpace:
    _require_known("key", content, ("name", "parameters", "groups"))
    name = content.get("name", stem)
    if not isinstance(name, str) or not name:
        raise SpaceError(f"Key name must be a text, but got {name!r}.")
    parameters = _table(content, "parameters")
    if parameters is None:
        raise SpaceError("Table [parameters] is missing; list the rules of LLR, MLL, HLL and FCL in it.")
    _require_known(
        "parameter", parameters, (*GROUPS, "abs", "epsilon", "attention", "aggregate", "normalize", *_OF_REPAIR)
    )
    lists = {parameter: _list(parameter, values) for parameter, values in parameters.items()}
    groups = _table(content, "groups")
    others = {parameter: values for parameter, values in lists.items() if parameter not in (*GROUPS, *_OF_REPAIR)}
    space = DiscreteSpace(
        name=name,
        rules={group: values for group, values in lists.items() if group in GROUPS},
        layer_groups=None if groups is None else {group: _list(group, values) for group, values in groups.items()},
        **others,
    )
    of_repair = {parameter: lists[parameter] for parameter in _OF_REPAIR if parameter in lists}
    if of_repair and "repair" not in of_repair:
        raise SpaceError(f"Parameter repair_strength needs repair beside it; list its methods of {', '.join(REPAIRS)}.")
    return RepairedSpace(space, **of_repair) if of_repair else space


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    table = content.get(key)
    if table is not None and not isinstance(table, Mapping):
        raise SpaceError(f"[{key}] must be a table, but got {table!r}.")
    return table


def _list(key: str, values: object) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise SpaceError(f"{key} must be a list, as {key} = [...], but got {values!r}.")
    return tuple(values)


def _require_known(what: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise SpaceError(f"Unknown {what} {name!r}.{did_you_mean(name, known)}")


def _require_distinct(parameter: str, values: tuple[object, ...]) -> None:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise SpaceError(f"Parameter {parameter} has {value} twice; list each value once.")


def _require_patterns(layer_groups: Mapping[str, tuple[str, ...]]) -> None:
    _require_known("layer group", layer_groups, GROUPS)
    if not layer_groups:
        raise SpaceError("Table [groups] is empty; give name patterns for each group, or leave the table out.")
    seen: dict[str, str] = {}
    for group, patterns in layer_groups.items():
        if not patterns:
            raise SpaceError(f"Layer group {group} has no patterns; list at least one or leave the group out.")
        for pattern in patterns:
            if not isinstance(pattern, str) or not pattern:
                raise SpaceError(f"Layer group {group} has {pattern!r}; a pattern is a text such as 'layer1.*'.")
            if pattern in seen:
                raise SpaceError(f"Pattern {pattern!r} stands in {seen[pattern]} and in {group}; list it once.")
            seen[pattern] = group


def _groups_to_json(layer_groups: Mapping[str, tuple[str, ...]] | None) -> dict[str, list[str]] | None:
    return None if layer_groups is None else {group: list(patterns) for group, patterns in layer_groups.items()}


def _nearest(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
