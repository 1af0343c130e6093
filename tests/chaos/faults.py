"""What is done to a study: processes killed, databases restarted, answers lost."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from chaos.invariants import marked
from postgresql_cluster import Server

_CHUNK = 65536


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
    """Processes of Ray's actors that hold our workers."""
    return [pid for pid, title in marked(mark).items() if title.startswith("ray::") and "IDLE" not in title]


def kill_ray_worker(mark: str, choose: random.Random) -> bool:
    """kill -9 a random worker, if there is one."""
    workers = sorted(ray_workers(mark))
    if not workers:
        return False
    with suppress(ProcessLookupError):
        os.kill(choose.choice(workers), signal.SIGKILL)
        return True
    return False


@dataclass
class LossyProxy:
    """A TCP proxy before PostgreSQL that loses the answer of chosen COMMITs, and the connection with it.

    Args:
        url: Of the database behind it.
        loses: Whether to lose the answer of the N-th COMMIT, counted from 1.
    """

    url: str
    loses: Callable[[int], bool]
    n_commits: int = 0
    n_lost: int = 0
    _connections: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.close()

    @property
    def proxied(self) -> str:
        """The URL that leads through it."""
        port = self._listener.getsockname()[1]
        return self.url.replace(f":{urlsplit(self.url).port}/", f":{port}/")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", urlsplit(self.url).port))
                self._connections += [client, server]
                lost = threading.Event()
                threading.Thread(target=self._ask, args=(client, server, lost), daemon=True).start()
                threading.Thread(target=self._answer, args=(client, server, lost), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(_CHUNK):
                if b"COMMIT\0" in data:
                    with self._lock:
                        self.n_commits += 1
                        if self.loses(self.n_commits):
                            self.n_lost += 1
                            lost.set()
                server.sendall(data)
        _shut(server)

    def _answer(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            # An answer that arrives after the COMMIT was passed on means that it has been carried out.
            while (data := server.recv(_CHUNK)) and not lost.is_set():
                client.sendall(data)
        _shut(client)
        _shut(server)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def outage(server: Server, seconds: float) -> None:
    """Crash a database, and start it again after a while."""
    server.stop()
    time.sleep(seconds)
    server.start()
