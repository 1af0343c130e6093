"""Studies: from a configuration to a search that is finished, or can be resumed."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from hpo.driver import StudyDriver
from hpo.errors import Interrupted
from hpo.executors import make_executor
from hpo.plots import CurvePlotter
from hpo.problem import LoadedProblem, default_space, load_problem, refuse_space
from hpo.racing import default_pruner
from hpo.samplers import GridSampler, make_sampler
from search_spaces.choices import ImageSet
from search_spaces.spaces import load_space
from storage.errors import ArtifactsAwayError, StoreNotFoundError, StudyInUseError
from storage.patience import Patience
from storage.store import StudyStore

if TYPE_CHECKING:
    from hpo.config import LaunchConfiguration
    from hpo.progress import Progress

__all__ = ["launch", "stop_on_signals"]

_log = logging.getLogger("hpo")


def launch(configuration: "LaunchConfiguration", progress: "Progress") -> bool:
    """Run a study, or go on with it, until it is finished; whether there was anything to do.

    What can be wrong with the configuration shows before anything is written.

    Args:
        configuration: What to search.
        progress: Whom to tell how far it is.

    Raises:
        PruningHPOError: Whatever the user can cause; the study can be resumed.
        Interrupted: Ctrl-C or SIGTERM; the study can be resumed.
    """
    _check_store(configuration)
    problem = None
    if configuration.space is None:  # the network decides
        make_sampler(configuration.sampler, load_space("cnn"), configuration.seed)
        progress.phase("Loading network and images")
        problem = load_problem(configuration, None)
        configuration = replace(configuration, space=default_space(problem))
    assert configuration.space is not None
    space = load_space(configuration.space)
    sampler = make_sampler(configuration.sampler, space, configuration.seed)
    if isinstance(sampler, GridSampler) and configuration.n_trials is None:
        configuration = replace(configuration, n_trials=space.size())
    if configuration.pruner is None:
        configuration = replace(configuration, pruner=default_pruner(configuration, space, sampler))
    if problem is None:
        progress.phase("Loading network and images")
        problem = load_problem(configuration, space.layer_groups)
    refuse_space(configuration, space, problem)
    _recall_measurements(configuration, problem)
    stop = threading.Event()
    with (
        make_executor(configuration, problem) as executor,
        StudyStore.open(configuration.storage, patience=Patience(configuration.store_timeout_s, stop)) as store,
        store.lease(configuration.study),
        CurvePlotter(store) as plotter,
        stop_on_signals(stop),  # last: Ray handles signals in its own way when it starts
    ):
        driver = StudyDriver(
            configuration,
            space=space,
            sampler=sampler,
            problem=problem,
            store=store,
            executor=executor,
            plotter=plotter,
            progress=progress,
            stop=stop,
        )
        return driver.run()


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM set an event, so that a study is left between two steps; the second raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise Interrupted
        stop.set()

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _check_store(configuration: "LaunchConfiguration") -> None:
    """Refuse a store that cannot be used, or a study in use, before minutes are spent on loading."""
    try:
        with StudyStore.open(configuration.storage, read_only=True) as store:
            holder = store.lease_holder(configuration.study)
            # A bucket that is away may be back once there is something to write.
            with suppress(ArtifactsAwayError):
                if (elsewhere := store.check_artifacts()) is not None:
                    _log.warning(elsewhere)
    except StoreNotFoundError:
        return
    if holder is not None:
        raise StudyInUseError(configuration.study, holder)


def _recall_measurements(configuration: "LaunchConfiguration", problem: LoadedProblem) -> None:
    """Have the problem learn what any study in the store has measured of it, before its workers are made."""
    try:
        with StudyStore.open(configuration.storage, read_only=True) as store:
            images: list[ImageSet] = ["search"]
            if problem.n_confirmation_images:
                images.append("confirmation")
            problem.learn(store.measurements([problem.subject(each) for each in images]))
    except StoreNotFoundError:
        return
