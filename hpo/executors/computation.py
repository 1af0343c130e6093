"""The computation of a batch by one worker, in whatever process it is."""

import logging
from collections.abc import Sequence

from hpo.executors import Job, Outcome, Worker
from objectives.errors import RelevanceError, TrainingError
from objectives.racing import GivenUp
from search_spaces.errors import PruningHPOError
from search_spaces.reasons import reason_of

__all__ = ["compute", "prepare"]

_log = logging.getLogger(__name__)


def prepare(worker: Worker, jobs: Sequence[Job]) -> None:
    """Have the worker compute what the jobs' composites share."""
    try:
        worker.prepare([job.composite for job in jobs])
    except Exception:  # what fails here fails again in `compute`, where a trial takes the blame
        _log.debug("The trials' shared computations failed.", exc_info=True)


def compute(worker: Worker, job: Job) -> Outcome:
    """What becomes of a job; never raises."""
    try:
        if job.race is None:
            return Outcome(job, evaluation=worker.evaluate(job.composite, job.images))
        found = worker.race(job.composite, job.race)
        return Outcome(job, given_up=found) if isinstance(found, GivenUp) else Outcome(job, evaluation=found)
    except (RelevanceError, TrainingError) as error:  # all trainings of a study have one learning rate
        return Outcome(job, failure=str(error), cause="composite")
    except PruningHPOError as error:
        return Outcome(job, failure=str(error), cause="objective")
    except BaseException as error:  # whatever a network does, even `sys.exit`, its trial must have an outcome
        _log.debug("Trial %d failed.", job.number, exc_info=True)
        return Outcome(job, failure=reason_of(error), cause="objective", unexpected=True)
