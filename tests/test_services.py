"""The services of docker-compose.yml as processes of this machine, by their own commands: a real study through all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from compose_file import SECRETS, services
from postgresql_cluster import free_port, running_server

STUDY = "composed"
N_TRIALS = 3
RATES = "0,0.3,0.6"
DIRECTORIES = ("/artifacts", "/cache", "/data", "/tmp")


class Project:
    """What `docker-compose up` and `run` do, without containers: the same commands in the same order.

    An environment holds what the file says and no more, so that a variable which it forgets is missed here too.
    Host names, ports and directories of containers are replaced by this machine's.
    """

    def __init__(self, directory, server):
        self.directory = directory
        self.server = server
        self.services = services({**SECRETS, "HPO_WORKER_CPUS": "1"})
        self.dashboard_port, ray_port, node_port = free_port(), free_port(), free_port()
        self.replaced = {
            "@postgres:5432": f"@127.0.0.1:{server.port}",
            "ray-head:6379": f"127.0.0.1:{ray_port}",
            "6379": str(ray_port),
            "6380": str(node_port),
            "8080": str(self.dashboard_port),
            **{each: f"{directory}{each}" for each in DIRECTORIES},
        }
        self.running = {}
        self.events = []

    def here(self, text):
        theirs = "|".join(map(re.escape, self.replaced))
        return re.sub(theirs, lambda found: self.replaced[found.group()], text)

    def environment(self, name):
        described = self.services[name].environment
        programs = f"{Path(sys.executable).parent}:{self.server.programs}:/usr/bin:/bin"
        return {
            "PATH": programs,
            "HOME": str(self.directory),
            "OMP_NUM_THREADS": "1",
            "PGPORT": str(self.server.port),  # of the health check of postgres, which names no port
            "RAY_TMPDIR": self.here("/tmp"),
            **{key: self.here(value) for key, value in described.items() if value is not None},
        }

    def command(self, name, *arguments):
        return [self.here(word) for word in (*self.services[name].command, *arguments)]

    def start(self, name, *arguments):
        with (self.directory / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                self.command(name, *arguments),
                env=self.environment(name),
                cwd=self.here("/data"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.events.append(f"{name} started")

    def log(self, name):
        return (self.directory / f"{name}.log").read_text()

    def up(self, last, arguments=()):
        """Start a service, with more arguments, and before it those that it waits for."""
        for needed, condition in self.services[last].depends_on.items():
            if needed not in self.running and needed != "postgres":
                self.up(needed)
            self.wait(needed, condition)
        self.start(last, *arguments)

    def wait(self, name, condition):
        if condition == "service_completed_successfully":
            assert self.running[name].wait(timeout=120) == 0, self.log(name)
            self.note(f"{name} completed")
            return
        assert condition == "service_healthy"
        deadline = time.monotonic() + 120
        while not self.is_healthy(name):
            assert name not in self.running or self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)
        self.note(f"{name} healthy")

    def note(self, event):
        if event not in self.events:
            self.events.append(event)

    def is_healthy(self, name):
        check = [self.here(word) for word in self.services[name].healthcheck]
        return subprocess.run(check, env=self.environment(name), capture_output=True, timeout=60).returncode == 0

    def down(self):
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        # Where a container ends, all its processes do; Ray's name its directory.
        for pid, command in command_lines():
            if str(self.directory) in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait(timeout=30)


def command_lines():
    """Process id and command line of all processes."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(path.name), (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def environment_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return ""


class Watch(threading.Thread):
    """Keeps every command line there is, and the environments of Ray's processes."""

    def __init__(self, directory):
        super().__init__(daemon=True)
        self.directory = str(directory)
        self.ended = threading.Event()
        self.command_lines = set()
        self.ray_environments = {}

    def run(self):
        while not self.ended.wait(0.05):
            for pid, command in command_lines():
                self.command_lines.add(command)
                if "raylet" in command and self.directory in command and pid not in self.ray_environments:
                    self.ray_environments[pid] = environment_of(pid)


@contextmanager
def watching(directory):
    watch = Watch(directory)
    watch.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        watch.join()


@pytest.fixture(scope="module")
def run():
    """A project whose study has been launched and whose services still run, and what was seen of its processes."""
    # Shorter than pytest's own: Ray's sockets lie in it, and their paths must not exceed 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="hpo-"))
    for name in DIRECTORIES:
        (directory / name[1:]).mkdir()
    # The network of digits is trained once for all tests.
    (directory / "cache" / "hpo").symlink_to(os.environ["HPO_CACHE"])
    with running_server(user="hpo", password=SECRETS["POSTGRES_PASSWORD"]) as server:
        owner = f"host=127.0.0.1 port={server.port} user=hpo dbname=postgres"
        with psycopg.connect(owner, password=server.password, autocommit=True) as connection:
            connection.execute("CREATE DATABASE hpo")
        project = Project(directory, server)
        with watching(directory) as watch:
            try:
                project.start("dashboard")
                refused = project.running.pop("dashboard")
                project.too_early = (refused.wait(timeout=60), project.log("dashboard"))
                project.events.clear()
                project.up("dashboard")
                project.wait("dashboard", "service_healthy")
                launch = (
                    "--study",
                    STUDY,
                    "--sampler",
                    "random",
                    "--exact",
                    "--n-trials",
                    str(N_TRIALS),
                    "--rates",
                    RATES,
                )
                project.up("launch", arguments=launch)
                project.running["launch"].wait(timeout=400)
                yield project, watch
            finally:
                project.down()
                shutil.rmtree(directory)


def get(project, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{project.dashboard_port}{path}", timeout=20) as answer:
        return answer.read()


def study_of(project):
    (listed,) = json.loads(get(project, "/api/studies"))["study_summaries"]
    assert listed["study_name"] == STUDY
    return listed["study_id"], json.loads(get(project, f"/api/studies/{listed['study_id']}"))


@pytest.mark.slow
def test_services_start_in_their_order_at_the_first_try(run):
    project, _ = run
    status, said = project.too_early
    assert status != 0
    assert 'authentication failed for user "hpo_dashboard"' in said  # whom db-init has yet to create
    assert not any(secret in said for secret in SECRETS.values())
    order = {event: position for position, event in enumerate(project.events)}
    for name, service in project.services.items():
        for needed, condition in service.depends_on.items():
            ready = {"service_healthy": "healthy", "service_completed_successfully": "completed"}[condition]
            assert order[f"{needed} {ready}"] < order[f"{name} started"]
    ended = {name: process.poll() for name, process in project.running.items()}
    assert ended == {"db-init": 0, "launch": 0, "dashboard": None, "ray-head": None, "ray-worker": None}


@pytest.mark.slow
def test_study_runs_on_the_worker_and_shows_in_the_dashboard(run):
    project, _ = run
    assert project.running["launch"].returncode == 0, project.log("launch")
    study_id, study = study_of(project)
    searched = [trial for trial in study["trials"] if '"search"' in json.dumps(trial["user_attrs"]).replace("\\", "")]
    assert len(searched) == N_TRIALS
    assert {trial["state"] for trial in study["trials"]} == {"Complete"}
    assert all(len(trial["intermediate_values"]) == len(RATES.split(",")) for trial in study["trials"])
    configuration = next(each["value"] for each in study["user_attrs"] if each["key"] == "configuration")
    assert '"executor": "ray"' in configuration  # the page's API cuts long values off
    trial = study["trials"][0]
    artifacts = {each["filename"]: each["artifact_id"] for each in trial["artifacts"]}
    picture = get(project, f"/artifacts/{study_id}/{trial['trial_id']}/{artifacts['curve.png']}")
    assert picture.startswith(b"\x89PNG")
    assert (project.directory / "artifacts" / artifacts["curve.png"]).read_bytes() == picture


@pytest.mark.slow
def test_dashboard_cannot_write(run):
    project, _ = run
    study_id, _ = study_of(project)
    address = f"http://127.0.0.1:{project.dashboard_port}/api/studies/{study_id}"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=20)
    address = f"host=127.0.0.1 port={project.server.port} user=hpo_dashboard dbname=hpo"
    with psycopg.connect(address, password=SECRETS["DASHBOARD_PASSWORD"], autocommit=True) as connection:
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [(STUDY,)]
        connection.execute("SET default_transaction_read_only = off")
        for statement in ("DELETE FROM studies", "CREATE TABLE mine (a int)", "UPDATE trials SET state = 'FAIL'"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


@pytest.mark.slow
def test_nobody_joins_the_cluster_without_the_token(run):
    project, _ = run
    environment = project.environment("ray-worker")
    check = ["ray", "health-check", project.here("--address=ray-head:6379")]
    for token, status in ((SECRETS["RAY_AUTH_TOKEN"], 0), ("another" * 8, 1)):
        environment["RAY_AUTH_TOKEN"] = token
        done = subprocess.run(check, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == status, done.stderr
    assert "InvalidAuthToken" in done.stderr


@pytest.mark.slow
def test_no_secret_shows_in_arguments_logs_or_artifacts(run):
    project, watch = run
    study_of(project)
    seen = "\n".join(watch.command_lines)
    for program in ("hpo launch", "hpo dashboard", "hpo db init", "raylet", "gcs_server", "postgres"):
        assert program in seen
    written = {path: path.read_bytes() for path in files(project.directory)}
    written |= {path: path.read_bytes() for path in files(project.server.directory) if path.name != "password"}
    assert len(written) > 20
    pages = get(project, "/api/studies/1")
    for secret in SECRETS.values():
        assert secret not in seen
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert json.dumps(secret)[1:-1].encode() not in pages


@pytest.mark.slow
def test_workers_know_the_token_and_no_password(run):
    _, watch = run
    assert watch.ray_environments
    for environment in watch.ray_environments.values():
        assert SECRETS["POSTGRES_PASSWORD"] not in environment
        assert SECRETS["DASHBOARD_PASSWORD"] not in environment


def files(directory):
    with suppress(FileNotFoundError):
        return [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return []
