"""Problems: what a worker is given."""

import pickle

from hpo.config import resolve
from hpo.problem import load_problem
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
