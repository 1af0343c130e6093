import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
from captured_once import captured_once
from stand_in import StandInProblem, drive_study

from search_spaces.spaces import DiscreteSpace, SearchSpace
from storage.store import StudyStore


@pytest.fixture(scope="session", autouse=True)
def _captured_once() -> Iterator[None]:
    with captured_once():
        yield


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a command sets up for its process's log and warnings ends with the test."""
    root = logging.getLogger()
    handlers, level, show = list(root.handlers), root.level, warnings.showwarning
    yield
    root.handlers, warnings.showwarning = handlers, show
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def make_problem() -> type[StandInProblem]:
    return StandInProblem


@pytest.fixture
def narrow() -> SearchSpace:
    """Eight points; of the heuristics it holds `epsilon` and `epsilon-plus`, each signed."""
    rules = {"LLR": ("Epsilon", "ZPlus"), "MLL": ("Epsilon", "ZPlus"), "HLL": ("Epsilon", "ZPlus"), "FCL": ("Epsilon",)}
    return DiscreteSpace("narrow", rules, abs=(False,))


@pytest.fixture
def drive(url: str) -> Callable[..., bool]:
    """Run a driver on study `s` of the store at `url`."""
    return partial(drive_study, url)


@pytest.fixture
def load(url: str) -> Callable[[], optuna.Study]:
    """Load study `s`."""

    def study() -> optuna.Study:
        with StudyStore.open(url, create=False) as store:
            loaded = store.load("s")
            loaded.get_trials()
            return loaded

    return study
