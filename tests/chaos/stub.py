"""A problem that sleeps: its value follows from the composite alone, and it fails on demand."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from objectives.pruning.curve import Curve
from objectives.pruning.records import StepRecord
from objectives.racing import Correctness, GivenUp, Race
from search_spaces.composites import CompositeSpec
from search_spaces.heuristics import HEURISTICS
from storage.measurements import MeasurementRecord

if TYPE_CHECKING:
    from objectives.pruning.evaluation import KnownMeasurement

Fault = Literal["memory", "nan", "hang"]

N_IMAGES = 40
ENVIRONMENT = "HPO_CHAOS_STUB"


@dataclass(frozen=True, slots=True)
class StubSettings:
    """How long an evaluation sleeps, and which ones fail.

    Attributes:
        seconds: Of an evaluation on search images.
        n_rates: Points of a curve.
        faulty: Share of composites that fail, chosen by their hash; the heuristics never do.
        faults: What a faulty composite does, chosen by its hash too.
        data: Part of the problem's identity.
    """

    seconds: float = 0.5
    n_rates: int = 4
    faulty: float = 0.0
    faults: tuple[Fault, ...] = ("memory", "nan", "hang")
    data: str = "d0"

    @classmethod
    def of_environment(cls) -> "StubSettings":
        """What a test has asked its launcher for."""
        values = json.loads(os.environ.get(ENVIRONMENT, "{}"))
        return cls(**{**values, "faults": tuple(values.get("faults", cls().faults))})

    def to_environment(self) -> dict[str, str]:
        """The inverse of `of_environment`."""
        return {ENVIRONMENT: json.dumps(asdict(self))}

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(rank / self.n_rates for rank in range(self.n_rates))

    def fault(self, composite: CompositeSpec) -> Fault | None:
        """What a composite's evaluation does instead of returning a curve."""
        share = _share(f"fault/{composite.key}")
        if composite in HEURISTICS.values():
            return None
        return None if share >= self.faulty else self.faults[int(share / self.faulty * len(self.faults))]

    def curve(self, composite: CompositeSpec) -> Curve:
        """Falls from 0.9, the slower the better the composite's hash."""
        correct = self._correct(composite)
        accuracies = tuple(right / N_IMAGES for right in correct)
        sizes = tuple(round(1000 * (1 - 0.9 * rate)) for rate in self.rates)
        return Curve(self.rates, accuracies, tuple((each, each) for each in accuracies), sizes, sizes, 0.5)

    def correct(self, composite: CompositeSpec) -> np.ndarray:
        return np.arange(N_IMAGES) < np.array(self._correct(composite))[:, None]

    def image_auc(self, composite: CompositeSpec) -> tuple[float, ...]:
        correct, n = self._correct(composite), self.n_rates - 1
        weights = [1 / n if 0 < rank < n else 0.5 / n for rank in range(self.n_rates)]
        return tuple(
            sum(weight for weight, right in zip(weights, correct, strict=True) if image < right)
            for image in range(N_IMAGES)
        )

    def _correct(self, composite: CompositeSpec) -> list[int]:
        goodness = _share(composite.key)
        return [round(N_IMAGES * 0.9 * (1 - rate * (1 - goodness))) for rate in self.rates]


@dataclass(frozen=True, slots=True)
class StubEvaluation:
    """Like `objectives.objective.Evaluation`, the module of which takes seconds to import torch."""

    curve: Curve
    figures: dict[str, float]
    correct: Correctness
    image_auc: tuple[float, ...]
    seconds: dict[str, float]
    remarks: tuple[str, ...] = ()
    measured: "tuple[KnownMeasurement, ...]" = ()
    origin: str = ""
    n_masks: int = 0
    n_known: int = 0
    steps: tuple[StepRecord, ...] = ()


class StubWorker:
    """Evaluates where the executor puts it."""

    def __init__(self, settings: StubSettings) -> None:
        self._settings = settings

    @property
    def stage(self) -> str | None:
        return None

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        pass

    def evaluate(self, composite: CompositeSpec, images: str) -> StubEvaluation:
        settings, start = self._settings, time.perf_counter()
        fault = settings.fault(composite) if images == "search" else None
        if fault == "hang":
            time.sleep(3600)
        time.sleep(settings.seconds)
        if fault == "memory":
            raise MemoryError(f"CUDA out of memory: tried to allocate 20.00 GiB for {composite.label}")
        curve = settings.curve(composite)
        figures = curve.figures()
        if fault == "nan":
            figures = dict.fromkeys(figures, float("nan"))
        taken = {"attribution": 0.0, "evaluation": time.perf_counter() - start}
        correct = Correctness.of(settings.correct(composite))
        return StubEvaluation(curve, figures, correct, settings.image_auc(composite), taken)

    def race(self, composite: CompositeSpec, race: Race) -> StubEvaluation | GivenUp:
        """Sleeps as long as an evaluation does, so that a kill meets it as well."""
        evaluation = self.evaluate(composite, "search")
        correct = self._settings.correct(composite)
        verdict = race.run(lambda index, n_images: correct[index, :n_images])
        return evaluation if verdict is None else replace(verdict, seconds=evaluation.seconds)


@dataclass(frozen=True, slots=True)
class MakeWorker:
    """Makes a worker in another process."""

    settings: StubSettings

    def __call__(self) -> StubWorker:
        return StubWorker(self.settings)


class StubProblem(StubWorker):
    """The problem of a study, of which the values are known beforehand."""

    class_names = ("cat", "dog")
    n_confirmation_images = N_IMAGES

    @property
    def has_attention(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        return {"data": self._settings.data, "rates": list(self._settings.rates)}

    def describe(self) -> dict[str, Any]:
        return {"rates": list(self._settings.rates), "versions": {"pruning-hpo": "0"}}

    def subject(self, images: str) -> str:
        return hashlib.blake2b(f"{self._settings.data} {images}".encode(), digest_size=16).hexdigest()

    def learn(self, records: Sequence[MeasurementRecord]) -> None:
        """It has nothing to save."""

    def worker(self) -> Callable[[], StubWorker]:
        return MakeWorker(self._settings)


def _share(text: str) -> float:
    """A number in [0, 1) that follows from a text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6
