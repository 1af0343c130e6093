"""The Ray executor on a real cluster of this machine, with workers that sleep, fail, hang and die."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from hpo.config import resolve
from hpo.errors import ExecutorError
from hpo.executors import Job
from hpo.executors.ray import _INIT, RayExecutor, Room, is_users
from objectives.errors import RelevanceError
from search_spaces.errors import SpaceError
from search_spaces.heuristics import HEURISTICS
from storage.store import StudyStore

N_WORKERS = 3
TIMEOUT_S = 4.0
SECRETS = {"HPO_STORAGE": "postgresql://ann:secret@host/x", "PGPASSWORD": "secret", "AWS_SECURITY_TOKEN": "x"}

QUICK, SLOW, ILL, WRONG, EXITING, DYING, HANGING, STOPPED, TELLING, BROKEN = HEURISTICS.values()


class Stub:
    """A worker whose conduct follows from the composite."""

    def __init__(self):
        self.prepared = 0
        self.confirming = False
        self.asked = threading.Event()

    @property
    def stage(self):
        if not self.confirming:
            return None
        self.asked.set()
        return "35 % pruned"

    def prepare(self, composites):
        self.prepared = len(composites)
        if BROKEN.key in [composite.key for composite in composites]:
            raise RuntimeError("nothing to share")

    def evaluate(self, composite, images):
        conduct = {
            SLOW.key: lambda: time.sleep(1),
            ILL.key: lambda: raise_(RelevanceError("No relevance.")),
            WRONG.key: lambda: raise_(SpaceError("Write it so.")),
            EXITING.key: lambda: sys.exit(3),
            DYING.key: die,
            HANGING.key: lambda: "".join(map(str, range(10**9))),  # never asks for signals
            STOPPED.key: stop,
        }.get(composite.key, lambda: None)
        start = time.time()
        conduct()
        if images == "confirmation":
            self.confirming = True
            self.asked.wait()
            time.sleep(TIMEOUT_S + 1)
            self.confirming = False
        return {"pid": os.getpid(), "start": start, "prepared": self.prepared, "environment": dict(os.environ)}


def raise_(error):
    raise error


def die():
    time.sleep(0.2)  # the answer to the job before is on its way
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1)  # another thread may have taken the signal


def configure(**options):
    return resolve({"executor": "ray", "cpus_per_trial": 0.25, **options})


def outcomes(executor, n):
    """Outcomes of n jobs, by number."""
    ended = {}
    deadline = time.monotonic() + 60
    while len(ended) < n:
        assert time.monotonic() < deadline, f"only {sorted(ended)} have ended"
        if (outcome := executor.wait(1)) is not None:
            assert outcome.job.number not in ended
            ended[outcome.job.number] = outcome
    return ended


def jobs(*composites, first=0):
    return [Job(number, composite) for number, composite in enumerate(composites, first)]


def private_environment():
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH_", *SECRETS))}


@pytest.fixture(scope="module")
def executor():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        environment = private_environment()
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.delenv("MKL_NUM_THREADS", raising=False)
        bystander = subprocess.Popen(["sleep", "7200"])
        before = signal.getsignal(signal.SIGTERM)
        with RayExecutor(configure(workers=N_WORKERS, trial_timeout_s=TIMEOUT_S), Stub) as executor:
            assert signal.getsignal(signal.SIGTERM) is before
            assert os.environ["PGPASSWORD"] == "secret"
            for number in range(N_WORKERS):
                executor.submit([Job(number, SLOW)])
            outcomes(executor, N_WORKERS)
            yield executor
        assert private_environment() == environment
        assert bystander.poll() is None, "the reaper ends what belongs to Ray only"
        bystander.kill()
        bystander.wait()


def test_a_cluster_that_comes_up_too_late_for_ray_is_started_once_more(monkeypatch, caplog):
    folders, start = [], ray.init

    def init(**arguments):
        folders.append(Path(arguments["_temp_dir"]))
        start(**arguments)
        if len(folders) == 1:
            raise TimeoutError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with RayExecutor(configure(), Stub) as executor:
        executor.submit(jobs(QUICK))
        assert outcomes(executor, 1)[0].failure is None
        assert [folder.exists() for folder in folders] == [False, True]
    assert [record.getMessage() for record in caplog.records] == [
        "Ray cannot start here: TimeoutError: The current node timed out during startup. Trying once more."
    ]


def test_a_cluster_that_does_not_come_up_twice_is_an_error(monkeypatch):
    folders = []

    def init(**arguments):
        folders.append(Path(arguments["_temp_dir"]))
        raise TimeoutError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ExecutorError, match=r"Ray cannot start here: .* timed out"), RayExecutor(configure(), Stub):
        pass
    assert [folder.exists() for folder in folders] == [False, False]


def test_workers_compute_at_once(executor):
    assert executor.n_workers == N_WORKERS
    for number in range(2 * N_WORKERS):
        executor.submit([Job(number, SLOW)])
    evaluations = [outcome.evaluation for outcome in outcomes(executor, 2 * N_WORKERS).values()]
    starts = sorted(evaluation["start"] for evaluation in evaluations)
    assert any(last - first < 1 for first, last in zip(starts, starts[N_WORKERS - 1 :], strict=False))
    assert len({evaluation["pid"] for evaluation in evaluations}) == N_WORKERS


def test_a_batch_stays_together_and_is_prepared_whole(executor):
    executor.submit(jobs(QUICK, SLOW, TELLING))
    evaluations = [outcome.evaluation for _, outcome in sorted(outcomes(executor, 3).items())]
    assert len({evaluation["pid"] for evaluation in evaluations}) == 1
    assert [evaluation["prepared"] for evaluation in evaluations] == [3, 3, 3]
    assert sorted(evaluations, key=lambda evaluation: evaluation["start"]) == evaluations


def test_a_worker_begins_the_next_batch_without_the_driver(executor):
    for number in range(2 * N_WORKERS):
        executor.submit([Job(number, SLOW)])
    time.sleep(3)  # the driver is busy
    starts = {}
    for outcome in outcomes(executor, 2 * N_WORKERS).values():
        starts.setdefault(outcome.evaluation["pid"], []).append(outcome.evaluation["start"])
    assert all(1 <= max(times) - min(times) < 2.5 for times in starts.values())


def test_workers_know_no_secret(executor):
    executor.submit(jobs(TELLING))
    environment = outcomes(executor, 1)[0].evaluation["environment"]
    assert not SECRETS.keys() & environment.keys()
    assert not [name for name, value in environment.items() if "secret" in value]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_nobody_else_may_use_the_cluster(executor):
    address = ray.get_runtime_context().gcs_address
    program = f"import ray; ray.init(address={address!r}, **{_INIT!r}); print(len(ray.nodes()), 'nodes')"
    tokens = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    without = {name: value for name, value in os.environ.items() if name not in tokens}

    def join(environment):
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
        )

    with ThreadPoolExecutor() as threads:  # who is refused tries for a while
        joined, refused = threads.map(join, [{**without, **tokens}, without])
    assert joined.stdout == "1 nodes\n", joined.stderr
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "InvalidAuthToken" in refused.stderr
    lines = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not [line for line in lines if tokens["RAY_AUTH_TOKEN"] in line]


def test_failures_have_causes(executor):
    executor.submit(jobs(ILL, WRONG, BROKEN, EXITING))
    ended = outcomes(executor, 4)
    assert (ended[0].failure, ended[0].cause) == ("No relevance.", "composite")
    assert (ended[1].failure, ended[1].cause) == ("Write it so.", "objective")
    assert ended[2].evaluation is not None
    assert (ended[3].failure, ended[3].cause) == ("SystemExit: 3", "objective")


def test_a_worker_that_may_be_broken_gets_no_more_jobs(executor):
    executor.submit(jobs(TELLING, WRONG, TELLING, EXITING, TELLING))
    ended = outcomes(executor, 5)
    assert [ended[number].cause for number in range(5)] == [None, "objective", None, "objective", "unstarted"]
    assert ended[0].evaluation["pid"] == ended[2].evaluation["pid"], "a refusal is no sign of a broken worker"
    for number in range(2 * N_WORKERS):
        executor.submit([Job(number, SLOW)])
    pids = {outcome.evaluation["pid"] for outcome in outcomes(executor, 2 * N_WORKERS).values()}
    assert ended[0].evaluation["pid"] not in pids


def test_a_confirmation_may_take_longer_than_a_trial_and_says_how_far_it_is(executor):
    executor.submit([Job(0, QUICK, "confirmation"), Job(1, QUICK)])
    ended, stages = {}, []
    while len(ended) < 2:
        if (outcome := executor.wait(0.1)) is not None:
            ended[outcome.job.number] = outcome
        elif executor.stages() not in stages:
            stages.append(dict(executor.stages()))
    assert [ended[number].failure for number in (0, 1)] == [None, None]
    assert {0: "35 % pruned"} in stages
    assert all(each in ({}, {0: "35 % pruned"}) for each in stages)


def test_a_dead_worker_loses_its_job_alone(executor):
    executor.submit(jobs(QUICK, DYING, QUICK, QUICK))
    executor.submit(jobs(SLOW, QUICK, first=4))
    ended = outcomes(executor, 6)
    assert [ended[number].cause for number in range(6)] == [None, "worker", "unstarted", "unstarted", None, None]
    assert re.match(r"Its worker died \(ActorDiedError: Worker unexpectedly exits [^\n]*\)\.$", ended[1].failure)


@pytest.mark.parametrize("composite", [HANGING, STOPPED])
def test_a_trial_that_takes_too_long_is_ended_with_its_worker(executor, composite):
    for number in range(N_WORKERS):
        executor.submit(jobs(composite, QUICK, first=2 * number))
    ended = outcomes(executor, 2 * N_WORKERS)
    assert {ended[2 * number].failure for number in range(N_WORKERS)} == {"It took longer than 4 s (--trial-timeout)."}
    assert {ended[2 * number].cause for number in range(N_WORKERS)} == {"objective"}
    assert {ended[2 * number + 1].cause for number in range(N_WORKERS)} == {"unstarted"}
    executor.submit(jobs(QUICK))
    assert outcomes(executor, 1)[0].evaluation is not None


def test_a_worker_that_died_idle_costs_nothing(executor):
    for number in range(N_WORKERS):
        executor.submit([Job(number, SLOW)])
    pids = {outcome.evaluation["pid"] for outcome in outcomes(executor, N_WORKERS).values()}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    executor.submit(jobs(QUICK, QUICK))
    ended = outcomes(executor, 2)
    assert {outcome.cause for outcome in ended.values()} == {None}
    assert not pids & {outcome.evaluation["pid"] for outcome in ended.values()}


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("nodes", "options", "cpus", "gpus", "n_workers"),
    [
        ([node(4)], {}, 1, 0, 4),
        ([node(4)], {"cpus_per_trial": 1.5}, 1.5, 0, 2),
        ([node(4)], {"workers": 3}, 1, 0, 3),
        ([node(8, 2), node(8, 4), node(8, 8, alive=False), node(0)], {}, 1, 1, 6),
        ([node(8, 2), node(8)], {"gpus_per_trial": 0.25}, 1, 0.25, 8),
        ([node(8, 2)], {"gpus_per_trial": 0.3}, 1, 0.3, 6),
        ([node(8, 8)], {"gpus_per_trial": 4, "cpus_per_trial": 2}, 2, 4, 2),
        ([node(2, 8)], {}, 1, 1, 2),
        ([node(8, 8)], {"device": "cpu"}, 1, 0, 8),
        ([node(8, 8)], {"gpus_per_trial": 0}, 1, 0, 8),
        ([node(2)], {"workers": 5, "ray_address": "auto"}, 1, 0, 5),
    ],
)
def test_as_many_workers_as_fit(nodes, options, cpus, gpus, n_workers):
    configuration = resolve({"executor": "ray", **options})
    room = Room.of(nodes, configuration)
    assert (room.cpus, room.gpus, room.n_workers(configuration)) == (cpus, gpus, n_workers)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (
            [node(4), node(8, 1)],
            {"gpus_per_trial": 2},
            "A worker of 1 CPUs and 2 GPUs fits nowhere: Ray has machines of 4 CPUs with 0 GPUs and "
            "8 CPUs with 1 GPUs; change `--cpus-per-trial` or `--gpus-per-trial`.",
        ),
        (
            [node(4)],
            {"device": "cuda"},
            "A worker of 1 CPUs and 1 GPUs fits nowhere: Ray has machines of 4 CPUs with 0 GPUs; "
            "change `--cpus-per-trial` or `--gpus-per-trial`.",
        ),
        (
            [node(2)],
            {"workers": 4},
            "`--workers 4` of 1 CPUs and 0 GPUs each do not fit into 2 CPUs with 0 GPUs: pass `--workers 2`, "
            "or lower `--cpus-per-trial` or `--gpus-per-trial`.",
        ),
    ],
)
def test_more_than_there_is_is_refused(nodes, options, message):
    configuration = resolve({"executor": "ray", **options})
    with pytest.raises(ExecutorError) as caught:
        Room.of(nodes, configuration).n_workers(configuration)
    assert str(caught.value) == message


class Launch:
    """`hpo launch` on digits with workers of Ray, in a session of its own as in a terminal."""

    def __init__(self, folder, options=()):
        # Ray's sockets allow no long paths.
        self.temporary = Path(tempfile.mkdtemp(prefix="t"))
        self.url = f"sqlite:///{folder / 'studies.db'}"
        command = [sys.executable, "-m", "hpo.cli", "launch", "--executor", "ray", "--workers", "2", "--seed", "0"]
        self.process = subprocess.Popen(
            [*command, "--rates", "0,0.3,0.6", "--evaluation-images", "100", "--n-trials", "400", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "HPO_STORAGE": self.url, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
        )

    def wait_for(self, part):
        for line in self.process.stderr:
            if part in line:
                return
        raise AssertionError(f"no line has {part!r}")

    def pids(self):
        """The driver and all that it has started, as long as they run."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                pids.append(int(folder.name))
        return pids

    def titles(self):
        """What they write over their arguments."""
        titles = []
        for pid in self.pids():
            with suppress(OSError):
                titles.append(Path(f"/proc/{pid}/cmdline").read_text())
        return titles


@pytest.fixture
def launch(tmp_path, request):
    launch = Launch(tmp_path, *getattr(request, "param", ()))
    yield launch
    for pid in launch.pids():
        os.kill(pid, signal.SIGKILL)
    launch.process.communicate()
    shutil.rmtree(launch.temporary)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[("--trial-timeout", "5")]], indirect=True, ids=["5 s"])
def test_ctrl_c_in_a_terminal_ends_everything_in_order(launch):
    """A driver that stood still for longer than a trial may take doesn't take it for the trial's time."""
    launch.wait_for("2/10  trial")
    launch.process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    launch.process.send_signal(signal.SIGCONT)
    launch.wait_for("4/10  trial")
    os.killpg(launch.process.pid, signal.SIGINT)
    start = time.monotonic()
    stdout, stderr = launch.process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert (launch.process.returncode, stdout) == (130, "")
    lines = [line for line in stderr.splitlines() if "/10  trial " not in line]
    assert lines == [
        "Interrupted: no finished trial is lost. To go on:",
        "  hpo launch --executor ray --workers 2 --seed 0 --rates 0,0.3,0.6 --evaluation-images 100 --n-trials 400 "
        "--trial-timeout 5",
    ]
    assert launch.pids() == []
    assert list(launch.temporary.iterdir()) == []
    with StudyStore.open(launch.url, read_only=True) as store:
        assert not {"RUNNING", "FAIL"} & {trial.state.name for trial in store.load("digits").get_trials()}


def assert_killing_leaves_nothing(launch):
    assert len(launch.pids()) > 4
    launch.process.kill()
    deadline = time.monotonic() + 10
    while launch.pids() or list(launch.temporary.iterdir()):
        assert time.monotonic() < deadline, (launch.pids(), list(launch.temporary.iterdir()))
        time.sleep(0.1)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process(launch):
    launch.wait_for("2/10  trial")
    assert_killing_leaves_nothing(launch)


@pytest.mark.slow
def test_nor_does_one_that_is_killed_while_its_cluster_comes_up(launch):
    """At the moment when Ray's two agents have just written their titles over their arguments."""
    deadline = time.monotonic() + 120
    while len([title for title in launch.titles() if re.match(r"ray::\w+Agent", title)]) < 2:
        assert time.monotonic() < deadline, launch.titles()
        time.sleep(0.02)
    assert_killing_leaves_nothing(launch)


def test_one_process_has_one_executor(executor):
    with pytest.raises(ExecutorError, match="connected to Ray already"), RayExecutor(configure(), Stub):
        pass


@pytest.mark.parametrize(
    ("name", "file", "users"),
    [
        ("mine", "mine.py", True),
        ("mine.nets", "mine/nets.py", True),
        ("json", "lib/python3.11/json/__init__.py", False),
        ("timm", ".venv/lib/python3.11/site-packages/timm/__init__.py", False),
        ("hpo.config", "hpo/config.py", False),
        ("other", "/opt/other.py", False),
    ],
)
def test_only_modules_of_the_users_own_travel(name, file, users, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_users(name, str(tmp_path / file)) is users
