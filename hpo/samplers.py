"""Samplers: which composite a study tries next."""

import hashlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import SamplerError
from hpo.trials import role
from search_spaces.errors import SearchSpaceError
from search_spaces.imports import import_object, is_import_path
from search_spaces.reasons import message_of, reason_of
from search_spaces.suggestions import did_you_mean

if TYPE_CHECKING:
    from optuna.study import Study

    from search_spaces.spaces import SearchSpace

__all__ = ["GridSampler", "ReseededSampler", "SAMPLERS", "learns", "make_sampler", "sampler_failure"]

SAMPLERS: dict[str, Callable[["SearchSpace", int], BaseSampler]] = {}
"""Makers of the samplers that have a name, from a search space and a seed."""

# How often TPE itself is asked for another point, which takes long in a long study, and how often each number of
# parameters is drawn anew.
_N_REDRAWN = 3
_N_CHANGED = 8


def _register(
    name: str,
) -> Callable[[Callable[["SearchSpace", int], BaseSampler]], Callable[["SearchSpace", int], BaseSampler]]:
    def decorate(make: Callable[["SearchSpace", int], BaseSampler]) -> Callable[["SearchSpace", int], BaseSampler]:
        SAMPLERS[name] = make
        return make

    return decorate


class ReseededSampler(BaseSampler):
    """Draws trial N with a generator of its own, seeded by the study's seed and N.

    A study that was interrupted and resumed therefore asks for the points that it would have asked for anyway, and
    several drivers' draws would not coincide. The inner sampler must keep no state but its generator.

    Args:
        build: Makes the inner sampler from a seed.
        seed: Of the study.
        distinct_in: A space whose points are drawn as a whole, by an inner sampler that is multivariate, and in which
            those that a search trial has already are drawn again, and then changed in ever more parameters: where most
            parameters are choices, TPE proposes its best point over and over (56 of 100 trials, measured). A point is
            repeated only where that finds no other. Without it each parameter is drawn by itself.
    """

    def __init__(
        self, build: Callable[[int], BaseSampler], seed: int, *, distinct_in: "SearchSpace | None" = None
    ) -> None:
        self._build = build
        self._seed = seed
        self._distinct_in = distinct_in
        self._keys: dict[int, str] = {}  # of trials that have all of their parameters

    def infer_relative_search_space(self, study: "Study", trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`; what all trials have in common that have parameters.

        Optuna counts baselines too, which have none: nothing would be in common, and each parameter drawn by itself.
        """
        if self._distinct_in is None:
            return {}
        points = [other for other in study.get_trials(deepcopy=False) if other.distributions]
        common = optuna.search_space.intersection_search_space(points, include_pruned=True)
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: "Study", trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        drawn = self._sampler(trial.number).sample_relative(study, trial, search_space)
        if not drawn or self._distinct_in is None:
            return drawn
        space, taken = self._distinct_in, self._taken(study, trial)
        # Optuna asks no sampler for what has one value only.
        fixed = {
            name: distribution.to_external_repr(0)
            for name, distribution in space.distributions().items()
            if isinstance(distribution, CategoricalDistribution) and distribution.single()
        }
        for again in range(1, _N_REDRAWN):
            if _key(space, fixed | drawn) not in taken:
                return drawn
            drawn = self._sampler(trial.number, str(again)).sample_relative(study, trial, search_space)
        proposals = itertools.chain([drawn], self._changed(drawn, study, trial, search_space))
        return next((each for each in proposals if _key(space, fixed | each) not in taken), drawn)

    def _changed(
        self, drawn: dict[str, Any], study: "Study", trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> Iterator[dict[str, Any]]:
        """The point with ever more parameters drawn anew."""
        choose = random.Random(f"{self._seed}/{trial.number}")
        names = sorted(search_space)
        for n_changed in range(1, len(names) + 1):
            for _ in range(_N_CHANGED):
                sampler = optuna.samplers.RandomSampler(seed=choose.getrandbits(32))
                yield drawn | {
                    name: sampler.sample_independent(study, trial, name, search_space[name])
                    for name in choose.sample(names, n_changed)
                }

    def _taken(self, study: "Study", trial: FrozenTrial) -> set[str]:
        """Keys of the points that other search trials have."""
        assert self._distinct_in is not None, "only then is it asked for"
        for other in study.get_trials(deepcopy=False):
            if other.number in self._keys or role(other) != "search":
                continue
            if (key := _key(self._distinct_in, other.params)) is not None:
                self._keys[other.number] = key
        return {key for number, key in self._keys.items() if number != trial.number}

    def sample_independent(
        self, study: "Study", trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        # Each parameter has its own stream: one stream would give all parameters the same first draw.
        sampler = self._sampler(trial.number, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, trial_number: int, stream: str = "") -> BaseSampler:
        digest = hashlib.sha256(f"{self._seed}/{trial_number}/{stream}".encode()).digest()
        return self._build(int.from_bytes(digest[:4], "big"))


class GridSampler(BaseSampler):
    """Serves every distinct point of a finite space once, in the order of `SearchSpace.grid`.

    What former launches have served is read from the trials' composites, not from their numbers, so heuristics,
    failures and resumed studies leave no hole; it is read once, and later asks take the same time however many trials
    there are. A point that failed in an earlier launch is served again; one that fails now is not, until the next
    launch. A trial that is asked again has its point already. For one driver, and one sampler per launch.

    Raises:
        SpaceNotFiniteError: The space is continuous.
    """

    def __init__(self, space: "SearchSpace") -> None:
        self._space = space
        self._points = {composite.key: space.parameters(composite) for composite in space.grid()}
        self._forgiven: frozenset[int] | None = None
        self._unserved: dict[str, None] | None = None
        self._served: dict[int, str] = {}

    def infer_relative_search_space(self, study: "Study", trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return self._space.distributions()

    def sample_relative(
        self, study: "Study", trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The first point that no other search trial has, and that agrees with what the trial has been given."""
        if trial.number not in self._served:
            if self._unserved is None:
                others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
                self._unserved = dict.fromkeys(self._untaken(others))
            # An ask that is cut off may leave a trial with some of its parameters.
            given = trial.params.items()
            key = next((key for key in self._unserved if given <= self._points[key].items()), None)
            if key is None:
                return {}
            del self._unserved[key]
            # The store asks for a trial again where an outage has cut its ask off.
            self._served[trial.number] = key
        return dict(self._points[self._served[trial.number]])

    def sample_independent(
        self, study: "Study", trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Always raises: the grid serves whole points.

        Raises:
            SamplerError: Every point has been served, or the space asks for more than its `distributions`.
        """
        raise SamplerError(
            f"The grid of space {self._space.name!r} has no value for parameter {param_name!r}; "
            "every point is served, or `suggest` and `distributions` of the space differ."
        )

    def n_left(self, trials: Sequence[FrozenTrial]) -> int:
        """How many points are to be asked for: those that none of the study's trials has, or one that waits."""
        return len(self._untaken([trial for trial in trials if trial.state != TrialState.WAITING]))

    def _untaken(self, trials: Sequence[FrozenTrial]) -> list[str]:
        """Keys of the points that none of these trials has, in the order of the grid."""
        searched = [trial for trial in trials if role(trial) == "search"]
        if self._forgiven is None:
            self._forgiven = frozenset(trial.number for trial in searched if trial.state == TrialState.FAIL)
        taken = {_key(self._space, trial.params) for trial in searched if trial.number not in self._forgiven}
        return [key for key in self._points if key not in taken]


def _key(space: "SearchSpace", parameters: Mapping[str, Any]) -> str | None:
    """Canonical key of a point; None while its parameters are incomplete."""
    try:
        return space.suggest(optuna.trial.FixedTrial(dict(parameters))).key
    except (ValueError, SearchSpaceError):
        return None


@_register("grid")
def _grid(space: "SearchSpace", seed: int) -> BaseSampler:
    return GridSampler(space)


@_register("random")
def _random(space: "SearchSpace", seed: int) -> BaseSampler:
    return ReseededSampler(lambda drawn: optuna.samplers.RandomSampler(seed=drawn), seed)


@_register("tpe")
def _tpe(space: "SearchSpace", seed: int) -> BaseSampler:
    return ReseededSampler(
        lambda drawn: optuna.samplers.TPESampler(seed=drawn, multivariate=True), seed, distinct_in=space
    )


def make_sampler(spec: str, space: "SearchSpace", seed: int) -> BaseSampler:
    """The sampler that the user names.

    Args:
        spec: A registered name; `package.module:Class`, such as `optuna.samplers:GPSampler`; or `optunahub:NAME`,
            which downloads `samplers/NAME` from OptunaHub.
        space: The space to sample; only a grid needs it now.
        seed: Passed on to classes that take `seed`. Only the registered samplers are reseeded for every trial.

    Raises:
        SamplerError: The name is unknown, or its class cannot be imported or built.
        SpaceNotFiniteError: A grid of a continuous space.
    """
    if spec in SAMPLERS:
        return SAMPLERS[spec](space, seed)
    if spec.startswith("optunahub:"):
        return _build(spec, _load_from_hub(spec), seed)
    if is_import_path(spec):
        try:
            sampler_class = import_object(spec)
        except ImportError as error:
            raise SamplerError(f"Sampler {spec!r} cannot be loaded: {error}.") from error
        return _build(spec, sampler_class, seed)
    raise SamplerError(
        f"Unknown sampler {spec!r}.{did_you_mean(spec, SAMPLERS)} "
        "Other samplers: package.module:Class, such as optuna.samplers:GPSampler, or optunahub:NAME."
    )


def learns(spec: str) -> bool:
    """Whether the sampler that the user names may choose by what earlier trials have found."""
    return spec not in ("grid", "random")


def sampler_failure(spec: str, error: BaseException) -> SamplerError:
    """What a sampler of the user's has raised, in our words."""
    return SamplerError(f"Sampler {spec!r} failed: {reason_of(error)}; try `--sampler tpe` in another --study.")


def _load_from_hub(spec: str) -> object:
    name = spec.partition(":")[2].removeprefix("samplers/")
    try:
        import optunahub
    except ImportError as error:
        raise SamplerError(f"Sampler {spec!r} needs OptunaHub; run `pip install optunahub`.") from error
    try:
        package = optunahub.load_module(f"samplers/{name}")
    except Exception as error:  # network, GitHub or the package's own imports
        raise SamplerError(f"Sampler {spec!r} cannot be loaded from OptunaHub: {message_of(error)}") from error
    return _only_sampler(spec, vars(package))


def _only_sampler(spec: str, names: Mapping[str, object]) -> type[BaseSampler]:
    """The sampler class of a package from OptunaHub, which may import others beside its own."""
    public: Sequence[str] = names.get("__all__") or list(names)  # type: ignore[assignment]
    classes = [
        value
        for value in (names[name] for name in public if name in names)
        if isinstance(value, type) and issubclass(value, BaseSampler) and not value.__module__.startswith("optuna.")
    ]
    if len(classes) != 1:
        found = ", ".join(sorted(found.__name__ for found in classes)) or "none"
        raise SamplerError(f"Sampler {spec!r} must have one sampler class, but has {found}.")
    return classes[0]


def _build(spec: str, sampler_class: object, seed: int) -> BaseSampler:
    if not (isinstance(sampler_class, type) and issubclass(sampler_class, BaseSampler)):
        raise SamplerError(
            f"Sampler {spec!r} must be a subclass of optuna.samplers.BaseSampler, but is {sampler_class!r}."
        )
    arguments = {"seed": seed} if "seed" in inspect.signature(sampler_class).parameters else {}
    try:
        return sampler_class(**arguments)
    except Exception as error:  # the user's class may raise anything
        raise SamplerError(f"Sampler {spec!r} cannot be built: {reason_of(error).rstrip('.')}.") from error
