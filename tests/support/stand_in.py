"""A problem that is evaluated in microseconds, an executor that loses jobs as it is told to, and a driver of both."""

import hashlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
from optuna.samplers import BaseSampler

from hpo.config import resolve
from hpo.driver import StudyDriver
from hpo.executors import Executor, Job, Outcome, Worker, make_executor
from hpo.executors.computation import compute
from hpo.plots import CurvePlotter
from hpo.progress import LogProgress
from hpo.samplers import make_sampler
from objectives.objective import Evaluation
from objectives.pruning.curve import Curve
from objectives.racing import Correctness, GivenUp, Race
from search_spaces.choices import ImageSet
from search_spaces.composites import CompositeSpec
from search_spaces.spaces import SearchSpace, load_space
from storage.patience import IMPATIENT, Patience
from storage.store import StudyStore

RATES = (0.0, 0.25, 0.5, 0.75)


class StandInProblem:
    """Curves that fall from 0.9, the slower the better the composite's hash."""

    class_names = ("cat", "dog")
    n_confirmation_images = 40

    def __init__(self, *, data: str = "d0", seconds: float = 0.0) -> None:
        self.data = data
        self.seconds = seconds
        self.calls: list[tuple[str, str]] = []
        self.failing: dict[str, str | Exception] = {}
        self.evaluating = threading.Event()

    @property
    def has_attention(self) -> bool:
        return False

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

    def subject(self, images: ImageSet) -> str:
        return hashlib.md5(f"{self.data} {images}".encode()).hexdigest()

    def worker(self) -> Callable[[], Worker]:
        return partial(StandInProblem, data=self.data, seconds=self.seconds)

    @property
    def stage(self) -> str | None:
        return None

    def prepare(self, composites: Sequence[CompositeSpec]) -> None:
        pass

    def evaluate(self, composite: CompositeSpec, images: ImageSet) -> Evaluation:
        self.evaluating.set()
        time.sleep(self.seconds)
        if composite.key in self.failing:
            error = self.failing[composite.key]
            raise RuntimeError(error) if isinstance(error, str) else error
        self.calls.append((composite.key, images))
        return self._evaluation(composite)

    def race(self, composite: CompositeSpec, race: Race) -> Evaluation | GivenUp:
        correct = self._evaluation(composite).correct.array()
        verdict = race.run(lambda index, n_images: correct[index, :n_images])
        if verdict is None:
            return self.evaluate(composite, "search")
        self.calls.append((composite.key, "race"))
        return replace(verdict, seconds={"attribution": 0.25, "evaluation": 0.25})

    @staticmethod
    def _evaluation(composite: CompositeSpec) -> Evaluation:
        goodness = int(hashlib.sha256(composite.key.encode()).hexdigest()[:6], 16) / 16**6
        n_correct = [round(40 * 0.9 * (1 - rate * (1 - goodness))) for rate in RATES]
        correct = Correctness.of(np.arange(40) < np.array(n_correct)[:, None])
        weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        image_auc = tuple(
            sum(weight for weight, right in zip(weights, n_correct, strict=True) if image < right)
            for image in range(40)
        )
        accuracies = tuple(right / 40 for right in n_correct)
        curve = Curve(
            RATES,
            accuracies,
            tuple((accuracy, accuracy) for accuracy in accuracies),
            parameters=(100, 80, 60, 40),
            flops=(1000, 700, 400, 200),
            collapsed_accuracy=0.5,
        )
        return Evaluation(curve, curve.figures(), correct, image_auc, {"attribution": 0.25, "evaluation": 0.75})


class BlankPlotter(CurvePlotter):
    """Draws nothing; a picture takes longer than a stand-in's trial."""

    def draw(self, *arguments: Any) -> None:
        pass


class RandomOrderExecutor:
    """Workers that take turns at random, and lose jobs as they are told to; all within the driver's thread."""

    def __init__(
        self,
        problem: StandInProblem,
        n_workers: int,
        *,
        seed: int = 0,
        lose: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self.n_workers = n_workers
        self.submitted: list[tuple[Job, ...]] = []
        self.most_batches = 0
        self._problem = problem
        self._random = random.Random(seed)
        self._lose = lose
        self._batches: list[deque[Job]] = []
        self._outcomes: deque[Outcome] = deque()

    def stages(self) -> dict[int, str]:
        return {}

    def submit(self, jobs: Sequence[Job]) -> None:
        self.submitted.append(tuple(jobs))
        self._batches.append(deque(jobs))
        self.most_batches = max(self.most_batches, len(self._batches))

    def wait(self, timeout_s: float) -> Outcome | None:
        if not self._outcomes:
            if timeout_s == 0:
                return None
            self._compute(self._random.choice(self._batches[: self.n_workers]))
        return self._outcomes.popleft()

    def _compute(self, batch: deque[Job]) -> None:
        job = batch.popleft()
        if self._lose(job):
            self._outcomes.append(Outcome(job, failure="the process was killed by signal 9", cause="worker"))
            self._outcomes.extend(Outcome(each, failure="its worker died", cause="unstarted") for each in batch)
            batch.clear()
        else:
            self._outcomes.append(compute(self._problem, job))
        if not batch:
            self._batches = [each for each in self._batches if each]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def drive_study(
    url: str,
    problem: StandInProblem,
    *,
    space: SearchSpace | None = None,
    stop: threading.Event | None = None,
    sampler: BaseSampler | None = None,
    sampler_name: str = "tpe",
    pictures: bool = False,
    executor: Executor | None = None,
    patience: Patience = IMPATIENT,
    **options: Any,
) -> bool:
    """Run a driver on study `s` of the store at `url`."""
    configuration = resolve({"study": "s", "storage": url, "sampler": sampler_name, **options})
    space = space or load_space(configuration.space or "cnn")
    with (
        StudyStore.open(url, patience=patience) as store,
        store.lease(configuration.study),
        executor or make_executor(configuration, problem) as computing,
        (CurvePlotter if pictures else BlankPlotter)(store) as plotter,
    ):
        driver = StudyDriver(
            configuration,
            space=space,
            sampler=sampler or make_sampler(configuration.sampler, space, configuration.seed),
            problem=problem,
            store=store,
            executor=computing,
            plotter=plotter,
            progress=LogProgress(configuration.metric),
            stop=stop or threading.Event(),
        )
        return driver.run()
