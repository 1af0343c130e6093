"""What is done to a study: processes killed, databases restarted."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from chaos.invariants import marked
from postgresql_cluster import Server


@dataclass
class Count:
    """How often a fault has been done."""

    n: int = 0


@contextmanager
def every(interval_s: Callable[[], float], fault: Callable[[], bool]) -> Iterator[Count]:
    """Do a fault again and again, as long as the block runs.

    Args:
        interval_s: Seconds until the next one.
        fault: Says whether it could be done.
    """
    count, stop = Count(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.wait(interval_s()):
                count.n += fault()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
    assert errors == []


def ray_workers(mark: str) -> list[int]:
    """Processes of our workers; those of Ray itself have other titles."""
    return [pid for pid, title in marked(mark).items() if title.startswith("ray::_Actor")]


def kill_ray_worker(mark: str, choose: random.Random) -> bool:
    """kill -9 a random worker, if there is one."""
    workers = sorted(ray_workers(mark))
    if not workers:
        return False
    with suppress(ProcessLookupError):
        os.kill(choose.choice(workers), signal.SIGKILL)
        return True
    return False


def outage(server: Server, seconds: float) -> None:
    """Crash a database, and start it again after a while."""
    server.stop()
    time.sleep(seconds)
    server.start()
