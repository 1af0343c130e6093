"""A way to a PostgreSQL server that loses connections just when a transaction commits."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class CommitProxy:
    """Forwards connections on a port of 127.0.0.1 to another, and drops one at the COMMIT that it is told to."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
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

    def lose(self, n: int, *, delivered: bool) -> None:
        """Drop the connection of the nth COMMIT from now: its answer, or with `delivered=False` itself."""
        with self._lock:
            self._n_left, self._delivered = n, delivered

    def keep(self) -> None:
        """Drop no connection."""
        with self._lock:
            self._n_left = 0

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
            server = socket.create_connection(self._server)
            answer_is_lost = threading.Event()
            for pump in (self._ask, self._answer):
                threading.Thread(target=pump, args=(client, server, answer_is_lost), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, answer_is_lost: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self._is_lost(data):
                    if not self._delivered:
                        break
                    answer_is_lost.set()
                server.sendall(data)
        if not answer_is_lost.is_set():
            _close(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, answer_is_lost: threading.Event) -> None:
        with suppress(OSError):
            while (data := server.recv(65536)) and not answer_is_lost.is_set():
                client.sendall(data)
        _close(client, server)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
