"""Problems: what a worker is given."""

import pickle

import pytest
import torch

from hpo.config import resolve
from hpo.problem import load_problem
from objectives.errors import DeviceError
from objectives.memory import Batches
from search_spaces.heuristics import HEURISTICS


def test_a_worker_computes_what_the_problem_does_and_knows_nothing_of_the_store():
    options = {"storage": "postgresql+psycopg://owner:s3cret-word@127.0.0.1/studies", "evaluation_images": 40}
    problem = load_problem(resolve(options, None), None)
    sent = pickle.dumps(problem.worker())
    assert b"s3cret-word" not in sent
    assert b"postgresql" not in sent
    worker = pickle.loads(sent)()
    composites = [HEURISTICS["epsilon-abs"], HEURISTICS["zplus"]]
    worker.prepare(composites)
    for composite in composites:
        assert worker.evaluate(composite, "search").curve == problem.evaluate(composite, "search").curve


def test_workers_of_ray_may_have_a_gpu_that_the_driver_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="'cuda'"):
        load_problem(resolve({"evaluation_images": 20, "device": "cuda"}), None)
    problem = load_problem(resolve({"evaluation_images": 20, "device": "cuda", "executor": "ray"}), None)
    assert problem.objective.device == torch.device("cpu")
    assert problem.identity() == load_problem(resolve({"evaluation_images": 20}), None).identity()
    with pytest.raises(DeviceError, match="'cuda'"):
        problem.worker()()


class Cramped(Batches):
    """Batches on a device with room for 25 images."""

    def run(self, compute, at_most=None):
        def compute_or_fail(size):
            if size > 25:
                raise torch.OutOfMemoryError(f"Tried to allocate {size} GiB.")
            return compute(size)

        return super().run(compute_or_fail, at_most)


def test_a_trial_says_that_batches_were_halved(drive, load):
    options = {"evaluation_images": 120, "batch_size": 100, "rates": "0,0.3,0.6"}
    problem = load_problem(resolve(options), None)
    problem.objective.batches = Cramped("evaluation", 100)
    drive(problem, **options, sampler_name="random", n_trials=2)
    trials = load().get_trials()
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    remark = "Out of memory: batches in evaluation were halved from 100 to 25 images."
    assert {tuple(trial.user_attrs["remarks"]) for trial in trials} == {(remark,)}
