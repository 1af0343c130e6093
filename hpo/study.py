"""Studies: from a configuration to a search that is finished, or can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from hpo.driver import StudyDriver
from hpo.errors import Interrupted
from hpo.executors import make_executor
from hpo.plots import CurvePlotter
from hpo.problem import load_problem
from hpo.samplers import GridSampler, make_sampler
from search_spaces.spaces import load_space
from storage.errors import StoreNotFoundError
from storage.lease import study_lease
from storage.store import StudyStore

if TYPE_CHECKING:
    from hpo.config import LaunchConfiguration
    from hpo.progress import Progress

__all__ = ["launch", "stop_on_signals"]


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
    space = load_space(configuration.space)
    sampler = make_sampler(configuration.sampler, space, configuration.seed)
    if isinstance(sampler, GridSampler) and configuration.n_trials is None:
        configuration = replace(configuration, n_trials=space.size())
    _check_store(configuration)
    progress.phase("Loading network and images")
    problem = load_problem(configuration, space.layer_groups)
    with (
        study_lease(configuration.storage, configuration.study),
        StudyStore.open(configuration.storage) as store,
        make_executor(configuration, problem) as executor,
        CurvePlotter(store) as plotter,
        stop_on_signals() as stop,
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
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a study is left between two steps; the second raises at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise Interrupted
        stop.set()

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _check_store(configuration: "LaunchConfiguration") -> None:
    """Refuse a store that cannot be used, or a study in use, before minutes are spent on loading."""
    try:
        with StudyStore.open(configuration.storage, read_only=True):
            pass
    except StoreNotFoundError:
        return
    with study_lease(configuration.storage, configuration.study):
        pass
