"""How a study scales over Ray workers, and how many GPUs its one driver can feed.

    python benchmarks/scaling.py            # 64 one-second trials with 1 to 16 workers, and the driver's ceiling
    python benchmarks/scaling.py --real     # ResNet-20 on CIFAR-10, 2 workers against the local executor

Trials of the first part sleep, so two cores suffice; each returns a curve of 20 points. Three ways to run them are
timed, with their workers warm:

    study      `hpo launch --executor ray` on PostgreSQL: asked, stored and drawn, from the first ask to the last result
    executor   the same executor alone, without a store
    tune       Ray Tune in its place, without a store: a searcher fed by a queue, and trainables that are reused

The second part needs the data pack (`HPO_DATA_PACK`, by default `../shared/data` beside the repository). Both write
`benchmarks/results/scaling*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from data_pack import cifar10, data_pack
from timed_launch import Stopwatch, timed_launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The root first: the tests of a package lie in a directory of its name.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

WORKERS = (1, 2, 4, 8, 16)
N_TRIALS = 64
TRIAL_S = 1.0
N_POINTS = 20
N_CEILING_TRIALS = 400
SPACES = {
    # No heuristic is among its points: a search reuses their values.
    "stub": """
[parameters]
LLR = ["Gamma(0.1)", "Gamma(0.2)", "Gamma(0.3)", "Gamma(0.4)", "Gamma(0.5)", "Gamma(0.6)", "Gamma(0.7)", "Gamma(0.8)"]
MLL = ["Epsilon", "ZPlus", "AlphaBeta", "Gamma"]
HLL = ["Epsilon", "ZPlus", "AlphaBeta", "Gamma"]
FCL = ["Epsilon", "ZPlus", "AlphaBeta", "Gamma"]
abs = [false]
""",
    "real": """
[parameters]
LLR = ["Epsilon", "ZPlus", "Gamma"]
MLL = ["Epsilon", "AlphaBeta"]
HLL = ["Gamma"]
FCL = ["Epsilon", "ZPlus"]
abs = [false]
""",
}


def time_study(n_workers: int, n_trials: int, trial_s: float, url: str) -> dict[str, float]:
    """A whole study of the stub on PostgreSQL; its heuristics warm the workers."""
    from chaos.stub import StubProblem, StubSettings

    import hpo.study
    from hpo.config import resolve
    from storage.store import StudyStore

    settings = StubSettings(seconds=trial_s, n_rates=N_POINTS)
    hpo.study.load_problem = lambda *arguments, **options: StubProblem(settings)
    space = Path(os.environ["HPO_ARTIFACTS"], "stub.toml")
    space.write_text(SPACES["stub"])
    configuration = resolve(
        {
            "study": "scaling",
            "storage": url,
            "space": str(space),
            "sampler": "grid",
            "pruner": "none",
            "n_trials": n_trials,
            "executor": "ray",
            "workers": n_workers,
            "cpus_per_trial": 1 / 16,
        }
    )
    stopwatch = Stopwatch()
    hpo.study.launch(configuration, stopwatch)
    _, cpu_s = stopwatch.seconds()["Search"]
    with StudyStore.open(url, read_only=True) as store:
        search = [trial for trial in store.load("scaling").get_trials() if trial.user_attrs["role"] == "search"]
    assert len(search) == n_trials, "each trial is evaluated"
    seconds = max(trial.datetime_complete for trial in search) - min(trial.datetime_start for trial in search)
    return figures(n_workers, n_trials, trial_s, seconds.total_seconds(), cpu_s)


def time_executor(n_workers: int, n_trials: int, trial_s: float, url: str) -> dict[str, float]:
    """The executor alone."""
    from chaos.stub import StubProblem, StubSettings

    from hpo.config import resolve
    from hpo.executors import Job, make_executor
    from search_spaces.heuristics import HEURISTICS

    problem = StubProblem(StubSettings(seconds=trial_s, n_rates=N_POINTS))
    options = {"executor": "ray", "workers": n_workers, "cpus_per_trial": 1 / 16, "study": "s", "storage": url}
    composite = HEURISTICS["epsilon"]
    with make_executor(resolve(options), problem) as executor:

        def run(count: int) -> None:
            left = iter(range(count))
            for _, number in zip(range(2 * n_workers), left, strict=False):
                executor.submit([Job(number, composite)])
            for _ in range(count):
                while executor.wait(timeout_s=1.0) is None:
                    pass
                if (number := next(left, None)) is not None:
                    executor.submit([Job(number, composite)])

        run(2 * n_workers)
        start, start_cpu = time.monotonic(), time.process_time()
        run(n_trials)
        return figures(n_workers, n_trials, trial_s, time.monotonic() - start, time.process_time() - start_cpu)


def time_tune(n_workers: int, n_trials: int, trial_s: float, url: str) -> dict[str, float]:
    """Ray Tune: one step a trial, no logs and no checkpoints to speak of, actors reused, one trial ahead a worker."""
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "100000",
        "TUNE_MAX_PENDING_TRIALS_PG": str(n_workers),
    }
    import ray
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter, Searcher

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.config = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config = new_config
            return True

        def step(self) -> dict[str, Any]:
            began = time.time()
            time.sleep(trial_s)
            return {"curve": [0.5] * N_POINTS, "began": began, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    directory = tempfile.mkdtemp(prefix="scaling-tune-")
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    class QueueSearcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            if stop.is_set():
                return Searcher.FINISHED
            try:
                return {"number": jobs.get_nowait()}
            except queue.Empty:
                return None

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            results.put(result)

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

        def __reduce__(self) -> Any:
            return (object, ())  # its queues cannot be pickled; nothing restores it

    ray.init(num_cpus=n_workers, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(Trial, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(QueueSearcher(), 2 * n_workers), num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0, storage_path=directory),
    )
    tuning = threading.Thread(target=tuner.fit, daemon=True)
    tuning.start()
    for number in range(2 * n_workers):
        jobs.put(number)
    for _ in range(2 * n_workers):
        results.get(timeout=120)
    start_cpu = time.process_time()
    for number in range(n_trials):
        jobs.put(number)
    began = min(results.get(timeout=120)["began"] for _ in range(n_trials))
    seconds, cpu_s = time.time() - began, time.process_time() - start_cpu
    stop.set()
    tuning.join(timeout=30)
    ray.shutdown()
    shutil.rmtree(directory)
    return figures(n_workers, n_trials, trial_s, seconds, cpu_s)


def figures(n_workers: int, n_trials: int, trial_s: float, seconds: float, cpu_s: float) -> dict[str, float]:
    """What a run is worth: seconds and CPU seconds of the driver over all trials."""
    return {
        "workers": n_workers,
        "trials": n_trials,
        "trial_s": trial_s,
        "seconds": round(seconds, 3),
        "efficiency": round(n_trials * trial_s / n_workers / seconds, 4),
        "driver_cpu_ms_per_trial": round(1000 * cpu_s / n_trials, 2),
        "trials_per_s": round(n_trials / seconds, 1),
    }


WAYS = {"study": time_study, "executor": time_executor, "tune": time_tune}


def run_apart(way: str, n_workers: int, n_trials: int, trial_s: float, url: str) -> dict[str, float]:
    """One run in a process of its own: none inherits another's Ray."""
    numbers = [str(n_workers), str(n_trials), str(trial_s)]
    with tempfile.TemporaryDirectory() as artifacts:
        own = {"HPO_ARTIFACTS": artifacts, "HPO_STORAGE": url}
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, *numbers],
            env={**os.environ, **own, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(way, json.dumps(result), flush=True)
    return result


def scale(ways: list[str], workers: list[int]) -> None:
    """The first part."""
    from postgresql_cluster import running_server

    path = HERE / "results" / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with running_server() as server:
        for way in ways:
            results[way] = [run_apart(way, n, N_TRIALS, TRIAL_S, server.new_database()) for n in workers]
            results[f"{way} ceiling"] = run_apart(way, 8, N_CEILING_TRIALS, 0.0, server.new_database())
            path.write_text(json.dumps(results, indent=2) + "\n")


def compare_real() -> None:
    """The second part."""
    from storage.store import StudyStore

    pack = data_pack()
    with tempfile.TemporaryDirectory() as directory:
        space = Path(directory, "twelve.toml")
        space.write_text(SPACES["real"])
        options = ["--space", str(space), "--sampler", "grid", "--study", "s", "--evaluation-images", "1000"]
        options += ["--model", "cifar_resnet20", "--checkpoint", str(pack / "weights" / "cifar10_resnet20.safetensors")]
        options += ["--data", cifar10(pack)]
        # One trial a batch: what trials share must not be counted for one executor only.
        options += ["--trials-per-batch", "1", "--confirmation-share", "0"]
        executors = {"local": ["--executor", "local"], "ray": ["--executor", "ray", "--workers", "2"]}
        results: dict[str, Any] = {}
        values = {}
        for name, executor in executors.items():
            url = f"sqlite:///{directory}/{name}.db"
            phases = timed_launch([*options, *executor, "--storage", url])["phases"]
            results[name] = {phase: round(wall_s, 2) for phase, (wall_s, _) in phases.items()}
            with StudyStore.open(url, read_only=True) as store:
                stored = store.load("s").get_trials()
            values[name] = {
                json.dumps(trial.user_attrs["composite"], sort_keys=True): (trial.value, trial.intermediate_values)
                for trial in stored
            }
    results["same_values"] = values["local"] == values["ray"]
    results["composites"] = len(values["local"])
    results["speed_up"] = round(results["local"]["Search"] / results["ray"]["Search"], 2)
    print(json.dumps(results))
    (HERE / "results" / "scaling_real.json").write_text(json.dumps(results, indent=2) + "\n")
    if not results["same_values"]:
        sys.exit("The executors' values differ.")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the second part")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS))
    parser.add_argument("--one", nargs=4, metavar=("WAY", "WORKERS", "TRIALS", "SECONDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        way, n_workers, n_trials, trial_s = given.one
        result = WAYS[way](int(n_workers), int(n_trials), float(trial_s), os.environ.get("HPO_STORAGE", ""))
        print(json.dumps(result))
    elif given.real:
        compare_real()
    else:
        scale(given.ways, given.workers)


if __name__ == "__main__":
    main()
