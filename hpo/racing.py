"""Races of a study: whom its trials have to beat, and what races have saved."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo import trials
from hpo.in_flight import Asked
from hpo.samplers import SAMPLERS, GridSampler
from objectives.pruning.curve import weights
from objectives.racing import Correctness, GivenUp, Race

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from hpo.config import LaunchConfiguration, Pruner
    from objectives.objective import Evaluation
    from search_spaces.spaces import SearchSpace

__all__ = ["RIVAL", "RaceSummary", "Races", "default_pruner", "described", "given_up"]

RIVAL = "rival"
"""The user attribute of a study that holds what its best trial so far classifies correctly."""

_SMALL_GRID = 100


def default_pruner(configuration: "LaunchConfiguration", space: "SearchSpace", sampler: "BaseSampler") -> "Pruner":
    """The pruner of a study whose user names none.

    A sampler of the user's own may ask again for what was given up, as it hears no value.
    """
    can_race = configuration.sampler in SAMPLERS and weights(configuration.metric, configuration.rates) is not None
    is_small = isinstance(sampler, GridSampler) and (space.size() or 0) < _SMALL_GRID
    return "race" if can_race and not is_small else "none"


class Races:
    """Sets trials of the search to race against the best one so far.

    The rival is kept in the study, so that a study that is resumed races on. Heuristics are evaluated exactly, as they
    are reported beside the best.

    Args:
        configuration: Names metric and risk.
        stored: The study's attribute `RIVAL`, if there is one.
    """

    def __init__(self, configuration: "LaunchConfiguration", stored: dict[str, Any] | None) -> None:
        self._configuration = configuration
        self._race: Race | None = None
        if stored is not None:
            self._lead(stored["trial"], tuple(stored["rates"]), Correctness.from_json(stored["correct"]))

    def lead(self, asked: Asked, evaluation: "Evaluation") -> dict[str, Any]:
        """Make a trial the one to beat; the study's attribute `RIVAL`."""
        rates, correct = evaluation.curve.rates, evaluation.correct
        self._lead(asked.number, rates, correct)
        return {"trial": asked.number, "rates": list(rates), "correct": correct.to_json()}

    def race(self, asked: Asked) -> Race | None:
        """The race that a trial has to run; None if it is to be evaluated exactly."""
        return None if asked.heuristic is not None else self._race

    def _lead(self, number: int, rates: tuple[float, ...], correct: Correctness) -> None:
        of_rates = weights(self._configuration.metric, rates)
        assert of_rates is not None, "checked with the configuration"
        self._race = Race(number, correct, rates, of_rates, self._configuration.race_risk)


@dataclass(frozen=True, slots=True)
class RaceSummary:
    """What races have saved a study.

    Attributes:
        n_given_up: Trials that were given up.
        n_certain: Those of them that certainly could not have become the best.
        share: Of all images times rates of the search's trials, those that were measured.
        risk: Probability, at most, that the best of the trials was given up.
    """

    n_given_up: int
    n_certain: int
    share: float
    risk: float

    @classmethod
    def of(cls, stored: Iterable[FrozenTrial], configuration: "LaunchConfiguration") -> "RaceSummary | None":
        """Of a study's trials; None where they don't race or none has ended."""
        if configuration.pruner != "race":
            return None
        searched = [
            trial for trial in stored if trials.role(trial) == "search" and "reused_from" not in trial.user_attrs
        ]
        verdicts = [verdict for trial in searched if (verdict := given_up(trial)) is not None]
        n_complete = sum(trial.state == TrialState.COMPLETE for trial in searched)
        if not verdicts and not n_complete:
            return None
        share = (n_complete + sum(verdict.share for verdict in verdicts)) / (n_complete + len(verdicts))
        n_certain = sum(verdict.certain for verdict in verdicts)
        return cls(len(verdicts), n_certain, share, configuration.race_risk if n_certain < len(verdicts) else 0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        times = "trial was" if self.n_given_up == 1 else "trials were"
        return (
            f"Race: {self.n_given_up} {times} given up, {100 * self.share:.1f} % of the evaluations were made; "
            f"the best of all trials is among the others with a probability of at least {100 * (1 - self.risk):g} %."
        )


def given_up(trial: FrozenTrial) -> GivenUp | None:
    """How a trial lost its race; None if it did not."""
    document = trial.user_attrs.get(trials.RACE)
    return None if trial.state != TrialState.PRUNED or document is None else GivenUp(**document)


def described(verdict: GivenUp) -> str:
    """A lost race in a line."""
    how = "for certain" if verdict.certain else "by the paired test"
    return (
        f"given up against trial {verdict.rival} {how}, on {verdict.n_images} images down to rate "
        f"{verdict.lowest_rate:g}: at most {verdict.bound:+.4f}"
    )
