"""The Ray executor on a cluster that is there already: real networks, machines that come and go."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from hpo.config import resolve
from hpo.errors import ExecutorError
from hpo.executors import Job
from hpo.executors.local import LocalExecutor
from hpo.executors.ray import RayExecutor
from hpo.problem import load_problem
from objectives.errors import DeviceError
from search_spaces.heuristics import HEURISTICS

TOKEN = "0123456789abcdef" * 4

NETWORK = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3)
        self.last = nn.Linear(6, 10)

    def forward(self, images):
        return self.last(torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3)))

def tiny():
    return Tiny().eval()
"""


class Sleeper:
    """Tells which process has computed a job, after a while."""

    def __init__(self, seconds=0.5):
        self.seconds = seconds

    def prepare(self, composites):
        pass

    def evaluate(self, composite, images):
        time.sleep(self.seconds)
        return os.getpid()


class Signing(Sleeper):
    """Names its process in a folder while it computes a confirmation, for longer."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def evaluate(self, composite, images):
        if images == "confirmation":
            Path(self.folder, str(os.getpid())).touch()
            time.sleep(10)
        return super().evaluate(composite, images)


class Threads(Sleeper):
    """Tells with how many threads it computes."""

    def evaluate(self, composite, images):
        return torch.get_num_threads()


def unable():
    raise DeviceError("There is no device 'cuda' on this machine; it has cpu.")


@contextmanager
def ray_process(*arguments):
    """`ray start`, as a service runs it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster with four CPUs in its own directory; it wants a token."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        head = ["--head", f"--port={port}", "--num-cpus=4", "--include-dashboard=false"]
        # The path of a socket has 107 bytes at most, and pytest's own folders leave too few of them.
        with (
            tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
            ray_process(*head, f"--temp-dir={folder}") as process,
        ):
            deadline = time.monotonic() + 120  # whoever connects waits for less
            while not Path(folder, "session_latest", "sockets", "raylet").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"


@pytest.fixture
def connect(cluster):
    def executor(factory, **options):
        return RayExecutor(resolve({"executor": "ray", "ray_address": cluster, **options}), factory)

    return executor


@pytest.fixture
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def outcomes(executor, n, timeout_s=90):
    ended = {}
    deadline = time.monotonic() + timeout_s
    while len(ended) < n:
        assert time.monotonic() < deadline, f"only {sorted(ended)} have ended"
        if (outcome := executor.wait(1)) is not None:
            ended[outcome.job.number] = outcome
    return ended


def evaluations(executor, batches):
    with executor:
        for jobs in batches:
            executor.submit(jobs)
        ended = outcomes(executor, sum(map(len, batches)))
    assert [outcome.failure for outcome in ended.values() if outcome.failure] == []
    return {
        number: (outcome.evaluation.curve, outcome.evaluation.figures, outcome.evaluation.image_auc)
        for number, outcome in ended.items()
    }


@pytest.mark.slow
def test_values_are_those_of_the_local_executor(connect, one_thread):
    problem = load_problem(
        resolve({"rates": "0,0.3,0.6", "evaluation_images": "100", "confirmation_share": "0.2"}), None
    )
    composites = list(HEURISTICS.values())[:6]
    jobs = [Job(number, composite) for number, composite in enumerate(composites)] + [
        Job(6, composites[1], "confirmation")
    ]
    local = evaluations(LocalExecutor(problem), [jobs])
    assert evaluations(connect(problem.worker(), workers=2), [jobs[:3], jobs[3:5], jobs[5:]]) == local


@pytest.mark.slow
def test_workers_compute_with_as_many_threads_as_they_have_cpus(connect):
    with connect(Threads, workers=1, cpus_per_trial=2) as executor:
        executor.submit([Job(0, HEURISTICS["zplus"])])
        assert outcomes(executor, 1)[0].evaluation == 2


@pytest.mark.slow
def test_a_network_of_the_users_own_travels_with_its_module(connect, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = tmp_path / "my_networks.py"
    module.write_text(NETWORK)
    options = {"model": "my_networks:tiny", "data": "digits", "size": "8", "mean": "0", "std": "1"}
    problem = load_problem(resolve({**options, "evaluation_images": "50", "confirmation_share": "0"}), None)
    module.unlink()  # as on another machine
    job = Job(0, HEURISTICS["zplus"])
    assert evaluations(connect(problem.worker(), workers=1), [[job]]) == evaluations(LocalExecutor(problem), [[job]])


@pytest.mark.slow
def test_workers_take_the_room_that_there_is(connect, cluster, tmp_path):
    jobs = [Job(number, HEURISTICS["zplus"]) for number in range(12)]
    with connect(partial(Signing, tmp_path), workers=6) as executor:
        assert executor.n_workers == 6
        for job in jobs:
            executor.submit([job])
        assert len({outcome.evaluation for outcome in outcomes(executor, 12).values()}) == 4
        with ray_process(f"--address={cluster}", "--num-cpus=2") as machine:
            pids = set()
            deadline = time.monotonic() + 120  # a machine of Ray takes its time to join where others compute
            while len(pids) < 6:
                assert machine.poll() is None
                assert time.monotonic() < deadline, pids
                for job in jobs:
                    executor.submit([job])
                pids = {outcome.evaluation for outcome in outcomes(executor, 12).values()}
            # The machine dies, and its workers with it, each at work; nothing else is lost.
            for number in range(10):
                executor.submit([Job(number, HEURISTICS["zplus"], "confirmation")])
            while len(list(tmp_path.iterdir())) < 6:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(machine.pid, signal.SIGKILL)
            causes = [outcome.cause for outcome in outcomes(executor, 10).values()]
            assert causes.count("worker") == 2
            assert causes.count(None) == 8


def test_a_worker_that_cannot_start_is_tried_thrice(connect):
    message = r"^No worker of Ray can start, 3 tried: There is no device 'cuda' on this machine; it has cpu\.$"
    with connect(unable, workers=1) as executor, pytest.raises(ExecutorError, match=message):
        outcomes(executor, 1)


def test_what_cannot_travel_is_refused(connect):
    executor = connect(partial(Sleeper, sys._getframe()), workers=1)
    with pytest.raises(ExecutorError, match=r"cannot be sent to workers of Ray .*frame"), executor:
        pass


def test_more_than_any_machine_has_is_refused(connect):
    message = r"^A worker of 1 CPUs and 2 GPUs fits nowhere: Ray has machines of .*4 CPUs with 0 GPUs.*; change "
    with pytest.raises(ExecutorError, match=message), connect(Sleeper, gpus_per_trial=2):
        pass


@pytest.mark.slow
def test_a_wrong_token_is_named(connect, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[::-1])
    with pytest.raises(
        ExecutorError, match=r"^There is no usable Ray cluster at '127\.0\.0\.1:\d+': it wants another token; "
    ):
        connect(Sleeper).__enter__()


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_named(monkeypatch):
    monkeypatch.setattr("hpo.executors.ray._CONNECT_TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        executor = RayExecutor(
            resolve({"executor": "ray", "ray_address": f"127.0.0.1:{server.getsockname()[1]}"}), Sleeper
        )
        start = time.monotonic()
        with pytest.raises(
            ExecutorError, match=r"^There is no usable Ray cluster at '127.*': none answers within 2 s; "
        ):
            executor.__enter__()
    assert time.monotonic() - start < 30


def test_a_driver_that_is_killed_leaves_no_worker(cluster, tmp_path):
    program = f"""
import time
from test_ray_cluster import Sleeper, outcomes
from hpo.config import resolve
from hpo.executors import Job
from hpo.executors.ray import RayExecutor
from search_spaces.heuristics import HEURISTICS

with RayExecutor(resolve({{"executor": "ray", "ray_address": {cluster!r}, "workers": 2}}), Sleeper) as executor:
    for number in range(4):
        executor.submit([Job(number, HEURISTICS["zplus"])])
    print(*{{outcome.evaluation for outcome in outcomes(executor, 4).values()}}, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, "--storage", "postgresql://ann:secret@host/studies"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
    ) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        # A cluster shows its users the command line of every driver, as it stands here.
        command_line = Path(f"/proc/{driver.pid}/cmdline").read_text()
        driver.kill()
    assert len(pids) == 2
    assert "postgresql://ann:***@host/studies" in command_line
    assert "secret" not in command_line
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
