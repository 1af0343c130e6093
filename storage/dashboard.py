"""The dashboard: optuna-dashboard over a study store and its artifacts.

It has no authentication, so it listens on this machine alone and, unless told otherwise, writes nothing.
"""

from __future__ import annotations

import gc
import json
import logging
from contextlib import suppress
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from storage.errors import DashboardAddressError
from storage.store import StudyStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["serve"]

_logger = logging.getLogger(__name__)
_READING_METHODS = {"GET", "HEAD", "OPTIONS"}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ALL_ADDRESSES = {"", "0.0.0.0", "::"}
# A page of thousands of trials makes a hundred times as many objects, which live until it is sent; by
# default Python looks through them again every 700 new ones, which takes a third of the page's time.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


def serve(
    url: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    allow_writes: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard of the store at a URL until Ctrl-C; this process collects garbage less often from then on.

    Args:
        url: Where the store is.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        allow_writes: Let whoever can reach the address rename and delete studies, write notes and tell trials.
        on_ready: Called with the dashboard's address once it listens.

    Raises:
        StorageError: The store cannot be opened, or holds no studies yet.
        DashboardAddressError: The address cannot be listened on.
    """
    with StudyStore.open(url, read_only=not allow_writes, create=False) as store:
        application = _application(store)
        if not allow_writes:
            application = _read_only(application)
        server = _listen(host, port, _own_pages_only(application, host))
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
        with server, suppress(KeyboardInterrupt):
            address = f"http://{host}:{server.server_port}/dashboard"
            _logger.info("The dashboard of %s listens on %s.", store.url_masked, address)
            if on_ready is not None:
                on_ready(address)
            server.serve_forever()


def _application(store: StudyStore) -> WSGIApplication:
    from optuna_dashboard import wsgi

    # Without Optuna's cache, which takes finished trials for unchangeable: their plots come later.
    application: WSGIApplication = wsgi(store.rdb, artifact_store=store.artifacts)
    return application


def _read_only(application: WSGIApplication) -> WSGIApplication:
    """Refuse every request that could write.

    A read-only database is not enough: the dashboard deletes a study's artifacts before it finds that it cannot
    delete the study.
    """

    def guarded(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] in _READING_METHODS:
            return application(environment, start_response)
        return _forbidden(start_response, "This dashboard only reads; start it with --allow-writes.")

    return guarded


def _own_pages_only(application: WSGIApplication, host: str) -> WSGIApplication:
    """Refuse requests that a page from elsewhere makes a browser send.

    Such a page reaches the dashboard under a name of its own (DNS rebinding) or writes across origins. A dashboard on
    all addresses cannot know its names, so it answers to any, but takes no writes from another origin either.
    """
    names = _LOOPBACK | {host.lower()}

    def guarded(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        asked = environment.get("HTTP_HOST", "")
        if host not in _ALL_ADDRESSES and _host_name(asked) not in names:
            return _forbidden(start_response, f"This dashboard answers to http://{host} only; use that address.")
        writes = environment["REQUEST_METHOD"] not in _READING_METHODS
        if writes and environment.get("HTTP_ORIGIN", f"//{asked}").partition("//")[2].lower() != asked.lower():
            return _forbidden(start_response, "This dashboard takes writes from its own pages only.")
        return application(environment, start_response)

    return guarded


def _host_name(address: str) -> str:
    """The name in NAME, NAME:PORT or [NAME]:PORT; empty where there is none."""
    with suppress(ValueError):
        return urlsplit(f"//{address}").hostname or ""
    return ""


def _forbidden(start_response: StartResponse, reason: str) -> Iterable[bytes]:
    status = HTTPStatus.FORBIDDEN
    start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
    return [json.dumps({"reason": reason}).encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, none of which keeps the process alive."""

    daemon_threads = True


class _RequestHandler(WSGIRequestHandler):
    """Requests go to the log instead of to standard error."""

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("%s " + format, self.address_string(), *args)


def _listen(host: str, port: int, application: WSGIApplication) -> WSGIServer:
    try:
        return make_server(host, port, application, server_class=_Server, handler_class=_RequestHandler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DashboardAddressError(
            f"Cannot serve the dashboard on {host}:{port}: {reason}; choose another --host or --port."
        ) from error
