"""The Ray executor: warm workers in processes of their own, on one machine or many."""

import logging
import math
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpo.config import DEFAULT_CPUS_PER_TRIAL, LaunchConfiguration
from hpo.errors import ExecutorError, Interrupted
from hpo.executors import Job, Outcome, Worker, reaper
from hpo.executors.computation import compute, prepare
from search_spaces.errors import PruningHPOError
from search_spaces.reasons import message_of, reason_of
from storage.urls import mask_password

__all__ = ["RayExecutor", "Room", "is_users"]

_CONNECT_TIMEOUT_S = 20.0
_NO_CLUSTER = "Could not find any running Ray instance"
_MOST_FAILED_STARTS = 3
_LONGEST_RESTART_DELAY_S = 60.0
_PATIENCE_S = 30.0
_TICK_S = 0.2
_WATCH_S = 1.0
# Of an actor's calls: those that it answers while it computes.
_WATCH = "watch"

_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
# What a worker could reach a database or a bucket with; workers know neither.
_SECRETS = ("AWS_", "HPO_", "PG")
_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OURS = ("hpo", "objectives", "search_spaces", "storage")

_log = logging.getLogger("hpo")


class RayExecutor:
    """Computes batches in Ray actors, which keep network and images as long as they live.

    A thread of its own owns all state and reacts to events: a batch that was submitted, an answer of a worker, a worker
    that died. So workers are served while the driver writes to its database, and none waits for another.

    An own cluster ends with the executor, and with the driver's process, however that ends.

    Args:
        configuration: How many workers, and what each needs.
        factory: Makes a worker; is sent to the cluster once.

    Raises:
        ExecutorError: On entering, Ray is not installed, its cluster cannot be reached, or has no room for a worker.
    """

    def __init__(self, configuration: LaunchConfiguration, factory: Callable[[], Worker]) -> None:
        self._configuration = configuration
        self._factory = factory
        self._timeout_s = math.inf if configuration.trial_timeout_s is None else configuration.trial_timeout_s
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome | ExecutorError] = queue.SimpleQueue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ray-workers", daemon=True)
        self._cleanup = ExitStack()
        self._n_workers = 0
        self._ray: Any = None
        self._actor_class: Any = None
        self._arguments: tuple[Sequence[Any], int, bool] = ([], 1, False)
        # Owned by the thread:
        self._batches: deque[Sequence[Job]] = deque()
        self._crew: list[_Member] = []
        self._starts: list[float] = []
        self._n_failed_starts = 0
        self._waiting_since: float | None = None
        # Replaced as a whole, for the driver's thread to read:
        self._stages: Mapping[int, str] = {}

    @property
    def n_workers(self) -> int:
        """See `Executor.n_workers`."""
        return self._n_workers

    def stages(self) -> Mapping[int, str]:
        """See `Executor.stages`; as of a second ago."""
        return self._stages

    def submit(self, jobs: Sequence[Job]) -> None:
        """See `Executor.submit`."""
        self._events.put(partial(self._enqueue, jobs))

    def wait(self, timeout_s: float) -> Outcome | None:
        """See `Executor.wait`."""
        try:
            outcome = self._outcomes.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(outcome, ExecutorError):
            raise outcome
        return outcome

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._ray = ray = stack.enter_context(_connected(self._configuration.ray_address))
            room = Room.of(ray.nodes(), self._configuration)
            self._n_workers = room.n_workers(self._configuration)
            resources = {"num_cpus": room.cpus, "num_gpus": room.gpus}
            self._actor_class = ray.remote(
                **resources, max_restarts=0, max_task_retries=0, concurrency_groups={_WATCH: 1}
            )(_Actor)
            # In a list, so that the actor's process prepares itself before it reads what may import torch.
            self._arguments = ([_put(ray, self._factory)], max(1, int(room.cpus)), room.gpus > 0)
            self._starts = [0.0] * self._n_workers
            self._thread.start()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._cleanup:
            self._left.set()
            self._events.put(lambda: None)
            self._thread.join()
            for member in self._crew:
                self._ray.kill(member.actor)

    # The thread

    def _work(self) -> None:
        try:
            before = time.monotonic()
            while not self._left.is_set():
                before = self._tick(before)
                try:
                    event = self._events.get(timeout=_TICK_S)
                except queue.Empty:
                    continue
                event()
        except ExecutorError as error:
            self._outcomes.put(error)
        except Exception as error:  # the driver must not wait for ever
            _log.debug("The executor failed.", exc_info=True)
            self._outcomes.put(ExecutorError(f"Ray failed: {_reason(error)}; launch again to go on."))

    def _tick(self, before: float) -> float:
        """Do what time demands; the present time, to be passed to the next call."""
        now = time.monotonic()
        # While this process was stopped, answers may have come that nobody has read.
        pause_s = now - before - _TICK_S
        for member in list(self._crew):
            if pause_s > 1:
                member.deadline += pause_s
            if member.jobs and now > member.deadline:
                self._end(member)
            elif member.jobs and member.watched_again <= now:
                member.watched_again = math.inf
                told = member.actor.stage.options(concurrency_group=_WATCH).remote()
                self._then(told, partial(self._told, member))
        self._stages = dict(member.stage for member in self._crew if member.stage is not None)
        while self._starts and self._starts[0] <= now:
            del self._starts[0]
            self._start()
        if self._waiting_since is not None and now - self._waiting_since > _PATIENCE_S:
            self._waiting_since = None
            _log.warning(
                "No worker has started for %.0f s: the cluster is busy (`ray status` tells), or the network is large; "
                "waiting.",
                _PATIENCE_S,
            )
        return now

    def _start(self) -> None:
        if self._waiting_since is None and not any(other.ready for other in self._crew):
            self._waiting_since = time.monotonic()
        member = _Member(self._actor_class.remote())
        self._crew.append(member)
        answer = member.actor.start.remote(*self._arguments)
        self._then(answer, partial(self._started, member))

    def _then(self, answer: Any, handle: Callable[["Future[Any]"], None]) -> None:
        answer.future().add_done_callback(lambda future: self._events.put(partial(handle, future)))

    def _started(self, member: "_Member", answer: "Future[str | None]") -> None:
        error = answer.exception()
        failure = answer.result() if error is None else f"its process died ({_reason(error)})"
        if failure is None:
            member.ready = True
            self._n_failed_starts = 0
            self._waiting_since = None
            self._dispatch()
            return
        self._dismiss(member)
        self._n_failed_starts += 1
        if self._n_failed_starts >= _MOST_FAILED_STARTS and not any(other.ready for other in self._crew):
            raise ExecutorError(f"No worker of Ray can start, {self._n_failed_starts} tried: {failure}")
        _log.info("A worker could not start: %s", failure)
        delay_s = min(2.0 ** (self._n_failed_starts - 1), _LONGEST_RESTART_DELAY_S)
        self._starts = sorted([*self._starts, time.monotonic() + delay_s])

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        self._batches.append(jobs)
        self._dispatch()

    def _dispatch(self) -> None:
        for member in self._crew:
            if self._batches and member.ready and not member.jobs:
                self._give(member, self._batches.popleft())

    def _give(self, member: "_Member", jobs: Sequence[Job]) -> None:
        """Send a whole batch at once: the worker need not wait for us between two jobs."""
        member.jobs = batch = list(jobs)
        member.begun = False
        member.deadline = time.monotonic() + sum(map(self._limit_s, jobs))
        self._then(member.actor.begin.remote(), partial(self._began, member, batch))
        self._then(member.actor.prepare.remote(list(jobs)), partial(self._prepared, member, batch))
        for job in jobs:
            self._then(member.actor.compute.remote(job), partial(self._computed, member, batch, job))

    def _limit_s(self, job: Job) -> float:
        """How long a job may take; a confirmation as long as it likes, as nothing can take its place."""
        return self._timeout_s if job.images == "search" else math.inf

    def _is_busy(self, member: "_Member", batch: list[Job]) -> bool:
        """Whether a worker still computes this batch; answers may come late, and in another order."""
        return member in self._crew and member.jobs is batch and bool(batch)

    def _began(self, member: "_Member", batch: list[Job], answer: "Future[None]") -> None:
        if not self._is_busy(member, batch):
            return
        error = answer.exception()
        if error is None:
            member.begun = True
        else:
            self._lose(member, error)

    def _prepared(self, member: "_Member", batch: list[Job], answer: "Future[None]") -> None:
        if not self._is_busy(member, batch):
            return
        error = answer.exception()
        if error is None:
            member.deadline = time.monotonic() + self._limit_s(batch[0])
        else:
            self._lose(member, error)

    def _told(self, member: "_Member", answer: "Future[tuple[int, str] | None]") -> None:
        """Note how far a worker is; of one that has died the computation tells."""
        member.watched_again = time.monotonic() + _WATCH_S
        if answer.exception() is None:
            stage = answer.result()
            is_current = stage is not None and any(job.number == stage[0] for job in member.jobs)
            member.stage = stage if is_current else None

    def _computed(self, member: "_Member", batch: list[Job], job: Job, answer: "Future[Outcome]") -> None:
        if not self._is_busy(member, batch):
            return
        error = answer.exception()
        if error is None:
            outcome = answer.result()
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            outcome = Outcome(job, failure=_reason(error), cause="objective")
        else:
            self._lose(member, error)
            return
        member.begun, member.stage = True, None
        batch.remove(job)
        member.deadline = time.monotonic() + self._limit_s(batch[0]) if batch else math.inf
        self._outcomes.put(outcome)
        if outcome.unexpected:  # a broken worker fails at once, so it would get job after job
            _log.info("The worker of trial %d is replaced: %s", job.number, outcome.failure)
            self._release(batch)
            self._replace(member)
        self._dispatch()

    def _lose(self, member: "_Member", error: BaseException) -> None:
        """Replace a worker that has died."""
        if not member.begun:  # it died while it was idle, and nobody could know
            self._batches.appendleft(member.jobs)
        else:
            failure = f"Its worker died ({_reason(error)})."
            _log.info("Trial %d: %s", member.jobs[0].number, failure)
            self._give_up(member, Outcome(member.jobs[0], failure=failure, cause="worker"))
        self._replace(member)

    def _end(self, member: "_Member") -> None:
        """Replace a worker whose trial takes too long."""
        failure = f"It took longer than {self._timeout_s:g} s (--trial-timeout)."
        self._give_up(member, Outcome(member.jobs[0], failure=failure, cause="objective"))
        self._replace(member)

    def _give_up(self, member: "_Member", outcome: Outcome) -> None:
        self._outcomes.put(outcome)
        self._release(member.jobs[1:])

    def _release(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._outcomes.put(Outcome(job, failure="Its worker ended before it began.", cause="unstarted"))

    def _replace(self, member: "_Member") -> None:
        self._dismiss(member)
        self._start()

    def _dismiss(self, member: "_Member") -> None:
        self._crew.remove(member)
        self._ray.kill(member.actor)


@dataclass(slots=True, eq=False)
class _Member:
    """A worker, as the executor knows it.

    Attributes:
        actor: Ray's handle.
        ready: Whether it has started.
        begun: Whether it has answered since it was given `jobs`.
        jobs: Those of its batch that have not ended, in the order in which it computes them.
        deadline: When its present job has taken too long.
        stage: Number of the job at work, and how far it is, where it has said so.
        watched_again: When it is asked for that; infinite while it has been.
    """

    actor: Any
    ready: bool = False
    begun: bool = False
    jobs: list[Job] = field(default_factory=list)
    deadline: float = math.inf
    stage: tuple[int, str] | None = None
    watched_again: float = 0.0


class _Actor:
    """A worker in its own process; all calls but those of the group `_WATCH` are computed one after the other."""

    _worker: Worker
    _at_work: int | None = None

    def start(self, shipped: Sequence[Any], n_threads: int, has_gpu: bool) -> str | None:
        """Make the worker; None, or why it cannot be made."""
        for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(n_threads)
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import ray

        try:
            factory: Callable[[], Worker] = ray.get(shipped[0])
            self._worker = factory()
        except PruningHPOError as error:
            return str(error)
        except Exception as error:  # a network may raise anything, where its machine differs from the driver's
            return _reason(error)
        return None

    def begin(self) -> None:
        """Answer, as only a living worker does."""

    def prepare(self, jobs: Sequence[Job]) -> None:
        prepare(self._worker, jobs)

    def compute(self, job: Job) -> Outcome:
        self._at_work = job.number
        try:
            return compute(self._worker, job)
        finally:
            self._at_work = None

    def stage(self) -> tuple[int, str] | None:
        """Number of the job at work, and how far it is."""
        number = self._at_work  # another thread computes
        stage = None if number is None else self._worker.stage
        return None if number is None or stage is None else (number, stage)


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker needs, and how many such workers a cluster has room for.

    Attributes:
        cpus: Of a worker.
        gpus: Of a worker.
        n_fit: How many fit at a time, were there no other programs.
        there: The machines, in words.
    """

    cpus: float
    gpus: float
    n_fit: int
    there: str

    @classmethod
    def of(cls, nodes: Sequence[dict[str, Any]], configuration: LaunchConfiguration) -> Self:
        """The room on these nodes, which are as `ray.nodes()` gives them."""
        machines = [
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]
        ]
        has_gpus = any(gpus for _, gpus in machines)
        gpus = configuration.gpus_per_trial
        if gpus is None:
            gpus = float(configuration.device == "cuda" or (has_gpus and configuration.device != "cpu"))
        cpus = configuration.cpus_per_trial or DEFAULT_CPUS_PER_TRIAL
        n_fit = sum(_n_fit(cpus, gpus, *machine) for machine in machines)
        there = " and ".join(sorted({f"{machine[0]:g} CPUs with {machine[1]:g} GPUs" for machine in machines}))
        return cls(cpus, gpus, n_fit, there)

    def n_workers(self, configuration: LaunchConfiguration) -> int:
        """How many workers to have.

        Raises:
            ExecutorError: No worker fits, or an own cluster, which never grows, has no room for as many as asked for.
        """
        wanted, own = configuration.workers, configuration.ray_address is None
        each = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"
        if not self.n_fit:
            raise ExecutorError(
                f"A worker of {each} fits nowhere: Ray has machines of {self.there}; "
                "change `--cpus-per-trial` or `--gpus-per-trial`."
            )
        if wanted is None:
            return self.n_fit
        if own and wanted > self.n_fit:
            raise ExecutorError(
                f"`--workers {wanted}` of {each} each do not fit into {self.there}: "
                f"pass `--workers {self.n_fit}`, or lower `--cpus-per-trial` or `--gpus-per-trial`."
            )
        if wanted > self.n_fit:
            _log.info("The cluster has room for %d of %d workers; the others start when it grows.", self.n_fit, wanted)
        return wanted


def _n_fit(cpus: float, gpus: float, machine_cpus: float, machine_gpus: float) -> int:
    """How many workers fit into a machine; a share of a GPU lies on one GPU."""
    by_cpus = math.floor(machine_cpus / cpus + 1e-9)
    if gpus == 0:
        return by_cpus
    by_gpus = machine_gpus * math.floor(1 / gpus + 1e-9) if gpus < 1 else machine_gpus // gpus
    return min(by_cpus, int(by_gpus))


def _put(ray: Any, factory: Callable[[], Worker]) -> Any:
    """Send what makes a worker to the cluster, with the user's own modules: other machines don't have them."""
    own = [module for name, module in sorted(sys.modules.items()) if is_users(name, getattr(module, "__file__", None))]
    with ExitStack() as stack:
        for module in own:
            ray.cloudpickle.register_pickle_by_value(module)
            stack.callback(ray.cloudpickle.unregister_pickle_by_value, module)
        try:
            return ray.put(factory)
        except Exception as error:  # pickling calls the network's own code
            raise ExecutorError(
                f"The network or the images cannot be sent to workers of Ray ({_reason(error)}); "
                "use `--executor local`, or make them picklable."
            ) from error


def is_users(name: str, file: str | None) -> bool:
    """Whether a module lies in the working directory and is not installed."""
    if file is None or name == "__main__" or name.partition(".")[0] in sys.stdlib_module_names.union(_OURS):
        return False
    path = Path(file)
    return path.is_relative_to(Path.cwd()) and not {"dist-packages", "site-packages"} & set(path.parts)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at this address, or to an own one that ends with the context.

    Raises:
        ExecutorError: It is not installed, is in use already, or cannot be reached or started.
    """
    try:
        import ray
    except ImportError as error:
        raise ExecutorError("Ray is not installed; run `pip install ray`, or leave out --executor.") from error
    if ray.is_initialized():
        raise ExecutorError("This process is connected to Ray already; call `ray.shutdown()` first.")
    with ExitStack() as stack:
        if (masked := [mask_password(argument) for argument in sys.argv]) != sys.argv:
            # A cluster shows its users the command line of every driver.
            ray._raylet.setproctitle(shlex.join(masked))  # type: ignore[attr-defined]  # compiled
        if address is None:
            stack.enter_context(_own_cluster(ray))
        else:
            with _environment():
                _take_notice_of_token()
                _check_reachable(address)
                stack.callback(ray.shutdown)
                _initialize(ray, f"There is no usable Ray cluster at {address!r}", address=address)
        yield ray


@contextmanager
def _own_cluster(ray: Any) -> Iterator[None]:
    """A cluster that ends with the context, and with this process.

    On a busy machine its servers may not come up in the half minute that Ray gives them: then they are started anew.

    Raises:
        ExecutorError: It cannot be started.
    """
    for is_last in (False, True):
        with ExitStack() as stack:
            # A directory of its own: Ray leaves its logs behind, and `auto` must not find this cluster.
            folder = tempfile.mkdtemp(prefix="hpo-ray-")
            announce = stack.enter_context(_reaped(folder))
            stack.enter_context(_own_token())
            try:
                with _environment():
                    _take_notice_of_token()
                    stack.callback(ray.shutdown)
                    _initialize(ray, "Ray cannot start here", address="local", _temp_dir=folder)
            except ExecutorError as error:
                if is_last:
                    raise
                _log.warning("%s Trying once more.", error)
                continue
            announce()
            yield
            return


def _initialize(ray: Any, failure: str, **arguments: str) -> None:
    """Connect this process.

    Raises:
        ExecutorError: It fails; begins with what that means.
    """
    try:
        with _sigterm_kept():
            ray.init(**_INIT, **arguments)
    except SystemExit as error:  # Ray's answer to SIGTERM
        raise Interrupted from error
    except Exception as error:
        raise ExecutorError(f"{failure}: {_reason(error)}") from error


@contextmanager
def _reaped(folder: str) -> Iterator[Callable[[], None]]:
    """Have the cluster in this folder cleared away when this context, or this process, ends; call once it is up."""
    with subprocess.Popen(
        [sys.executable, "-I", reaper.__file__, folder],
        stdin=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C in a terminal is for the driver
    ) as process:
        assert process.stdin is not None, "it is a pipe"
        yield partial(print, file=process.stdin, flush=True)


@contextmanager
def _own_token() -> Iterator[None]:
    """Have a cluster that starts now want a token, which it alone knows.

    Its servers listen to the whole network: without one, whoever reaches them runs code as this user.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    former = {name: os.environ[name] for name in own if name in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        os.environ.update(former)


def _take_notice_of_token() -> None:
    """Have Ray read the environment's token again: it reads it once in a process, perhaps for another cluster."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    # In this order, as its threads may read them now.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_reachable(address: str) -> None:
    """Try the address in another process: Ray goes on trying for minutes, and cannot be interrupted.

    Raises:
        ExecutorError: There is no usable cluster.
    """
    program = f"import ray, sys; ray.init(address=sys.argv[1], **{_INIT!r})"
    command = [sys.executable, "-c", program, address]
    try:
        subprocess.run(command, check=True, timeout=_CONNECT_TIMEOUT_S, stdin=subprocess.DEVNULL, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        if any("InvalidAuthToken" in line for line in lines):
            which = "another" if os.environ.get("RAY_AUTH_MODE") == "token" else "a"
            reason = f"it wants {which} token; set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN."
        elif any(_NO_CLUSTER in line for line in lines):
            reason = "no Ray runs on this machine; run `ray start`, or leave out --ray-address."
        elif isinstance(error, subprocess.TimeoutExpired) or not lines:
            reason = f"none answers within {_CONNECT_TIMEOUT_S:.0f} s; run `ray start`, or leave out --ray-address."
        else:
            reason = lines[-1]
        raise ExecutorError(f"There is no usable Ray cluster at {address!r}: {reason}") from error


@contextmanager
def _environment() -> Iterator[None]:
    """What processes that start now see: none of what only the driver may know.

    Nor does this process see it meanwhile: a store that is open would find no password to connect anew.
    """
    former = dict(os.environ)
    for name in former:
        if name.startswith(_SECRETS):
            del os.environ[name]
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        for name in _SETTINGS.keys() - former.keys():
            del os.environ[name]
        os.environ.update(former)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _reason(error: BaseException) -> str:
    """An error in a line; of one that comes from a worker, the cause."""
    cause = getattr(error, "cause", None) or error
    # Ray begins with five lines about the actor, and says at the end why its process has ended.
    _, begin, detail = message_of(cause).rpartition("Worker exit detail: ")
    return f"{type(cause).__name__}: {detail[:400]}" if begin else reason_of(cause)
