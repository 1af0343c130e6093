"""A way to a PostgreSQL server that loses connections: when a transaction commits, or without the server's notice."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


@dataclass(eq=False)
class _Link:
    """A client's connection and the one to the server that stands for it."""

    client: socket.socket
    server: socket.socket
    answer_is_lost: threading.Event = field(default_factory=threading.Event)
    is_cut: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        for each in (self.client, self.server):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class CommitProxy:
    """Forwards connections on a port of 127.0.0.1 to another, and drops them as it is told to."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._n_left = 0
        self._delivered = True
        self.port: int = self._listener.getsockname()[1]
        self.n_lost = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        # A blocked `accept` ends with the shutdown, not with the closing.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.close()

    def lose(self, n: int, *, delivered: bool) -> None:
        """Drop the connection of the nth COMMIT from now: its answer, or with `delivered=False` itself."""
        with self._lock:
            self._n_left, self._delivered = n, delivered

    def keep(self) -> None:
        """Drop no connection."""
        with self._lock:
            self._n_left = 0

    def cut(self) -> None:
        """Drop all connections without the server's notice, as if the client's network was gone."""
        for link in self._links:
            link.is_cut.set()
            with suppress(OSError):
                link.client.shutdown(socket.SHUT_RDWR)

    def _is_lost(self, data: bytes) -> bool:
        if _COMMIT not in data:
            return False
        with self._lock:
            self._n_left -= 1
            lost = self._n_left == 0
            self.n_lost += lost
            return lost

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            link = _Link(client, socket.create_connection(self._server))
            self._links.append(link)
            for pump in (self._ask, self._answer):
                threading.Thread(target=pump, args=(link,), daemon=True).start()

    def _ask(self, link: _Link) -> None:
        with suppress(OSError):
            while data := link.client.recv(65536):
                if self._is_lost(data):
                    if not self._delivered:
                        break
                    link.answer_is_lost.set()
                link.server.sendall(data)
        if not link.answer_is_lost.is_set() and not link.is_cut.is_set():
            link.close()

    def _answer(self, link: _Link) -> None:
        with suppress(OSError):
            while (data := link.server.recv(65536)) and not link.answer_is_lost.is_set():
                link.client.sendall(data)
        if not link.is_cut.is_set():
            link.close()
