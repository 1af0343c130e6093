"""A problem that is evaluated in microseconds: its value follows from the composite alone."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.config import resolve
from hpo.driver import StudyDriver
from hpo.executors import Images, Worker, make_executor
from hpo.plots import CurvePlotter
from hpo.progress import LogProgress
from hpo.samplers import make_sampler
from objectives.objective import Evaluation
from objectives.pruning.curve import Curve
from search_spaces.composites import CompositeSpec
from search_spaces.spaces import DiscreteSpace, SearchSpace, load_space
from storage.store import StudyStore

RATES = (0.0, 0.25, 0.5, 0.75)


class StandInProblem:
    """Curves that fall from 0.9, the slower the better the composite's hash."""

    class_names = ("cat", "dog")
    n_confirmation_images = 40

    def __init__(self, *, data: str = "d0", seconds: float = 0.0) -> None:
        self.data = data
        self.seconds = seconds
        self.calls: list[tuple[str, Images]] = []
        self.failing: dict[str, str | Exception] = {}
        self.evaluating = threading.Event()

    def identity(self) -> dict[str, Any]:
        return {"data": self.data, "rates": list(RATES)}

    def describe(self) -> dict[str, Any]:
        return {
            "layer_groups": {"conv": "LLR"},
            "abs_scope": "sum",
            "output_relevance": "one",
            "rates": list(RATES),
            "preprocessing": {"size": [8, 8], "mean": [0.0], "std": [1.0]},
            "references": {"per_class": 10, "seed": 0, "sha256": "0" * 64, "source": "digits"},
            "model": {"name": "m", "fingerprint": "f", "num_classes": 2, "component_widths": {"conv": 8}},
            "data": {
                "source": "digits",
                "fingerprint": self.data,
                "classes": [0, 1],
                "n_confirmation_images": self.n_confirmation_images,
            },
            "versions": {"pruning-hpo": "0"},
        }

    def worker(self) -> Callable[[], Worker]:
        return partial(StandInProblem, data=self.data, seconds=self.seconds)

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        pass

    def evaluate(self, composite: CompositeSpec, images: Images) -> Evaluation:
        self.evaluating.set()
        time.sleep(self.seconds)
        if composite.key in self.failing:
            error = self.failing[composite.key]
            raise RuntimeError(error) if isinstance(error, str) else error
        self.calls.append((composite.key, images))
        goodness = int(hashlib.sha256(composite.key.encode()).hexdigest()[:6], 16) / 16**6
        correct = [round(40 * 0.9 * (1 - rate * (1 - goodness))) for rate in RATES]
        weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        image_auc = tuple(
            sum(weight for weight, right in zip(weights, correct, strict=True) if image < right) for image in range(40)
        )
        accuracies = tuple(right / 40 for right in correct)
        curve = Curve(
            RATES,
            accuracies,
            tuple((accuracy, accuracy) for accuracy in accuracies),
            parameters=(100, 80, 60, 40),
            flops=(1000, 700, 400, 200),
            collapsed_accuracy=0.5,
        )
        return Evaluation(curve, curve.figures(), image_auc, {"attribution": 0.25, "evaluation": 0.75})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def make_problem() -> type[StandInProblem]:
    return StandInProblem


@pytest.fixture
def narrow() -> SearchSpace:
    """Four points; of the heuristics it holds `epsilon` and `epsilon-plus`, each signed."""
    rules = {"LLR": ("Epsilon", "ZPlus"), "MLL": ("Epsilon", "ZPlus"), "HLL": ("Epsilon", "ZPlus"), "FCL": ("Epsilon",)}
    return DiscreteSpace("narrow", rules, abs=(False,))


class BlankPlotter(CurvePlotter):
    """Draws nothing; a picture takes longer than a stand-in's trial."""

    def draw(self, *arguments: Any) -> None:
        pass


Drive = Callable[..., bool]


@pytest.fixture
def drive(url: str) -> Drive:
    """Run a driver on study `s` of the store at `url`."""

    def run(
        problem: StandInProblem,
        *,
        space: SearchSpace | None = None,
        stop: threading.Event | None = None,
        sampler: optuna.samplers.BaseSampler | None = None,
        sampler_name: str = "tpe",
        pictures: bool = False,
        **options: Any,
    ) -> bool:
        configuration = resolve({"study": "s", "storage": url, "sampler": sampler_name, **options})
        space = space or load_space(configuration.space)
        with (
            StudyStore.open(url) as store,
            make_executor(configuration, problem) as executor,
            (CurvePlotter if pictures else BlankPlotter)(store) as plotter,
        ):
            driver = StudyDriver(
                configuration,
                space=space,
                sampler=sampler or make_sampler(configuration.sampler, space, configuration.seed),
                problem=problem,
                store=store,
                executor=executor,
                plotter=plotter,
                progress=LogProgress(configuration.metric),
                stop=stop or threading.Event(),
            )
            return driver.run()

    return run


@pytest.fixture
def load(url: str) -> Callable[[], optuna.Study]:
    """Load study `s`."""

    def study() -> optuna.Study:
        with StudyStore.open(url, create=False) as store:
            loaded = store.load("s")
            loaded.get_trials()
            return loaded

    return study
