"""The reaper of an own Ray cluster: a program that clears away what is left of it once its driver has ended.

    python reaper.py DRIVER_PID FOLDER

The driver holds its standard input: a line says that the cluster is up, the end that the driver has ended, also where
it was killed. Ray's servers and workers end by themselves then, but two of its agents go on for a minute, a worker that
was just starting for half of one, and its folder stays for ever. Other processes that the driver has started are none
of its business.
"""

import os
import select
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["main"]

_GRACE_S = 3.0


def main(driver: int, folder: str) -> None:
    """Wait for the driver's end, then end its cluster and remove the folder."""
    sys.stdin.readline()
    processes = _opened(_cluster(driver, folder))
    sys.stdin.read()
    _end(processes)
    _end(_opened(_named(folder)))
    shutil.rmtree(folder, ignore_errors=True)


def _opened(pids: Iterable[int]) -> list[int]:
    """Descriptors of processes: unlike its number, a process's descriptor is never another's."""
    processes = []
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            processes.append(os.pidfd_open(pid))
    return processes


def _end(processes: Iterable[int]) -> None:
    for process in processes:
        if not select.select([process], [], [], 0)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], _GRACE_S)


def _named(folder: str) -> Iterator[int]:
    """Processes that have the folder in their arguments, as a worker has until it is ready."""
    for status in Path("/proc").glob("[0-9]*"):
        pid = int(status.name)
        if pid != os.getpid() and folder in _arguments(pid):
            yield pid


def _cluster(driver: int, folder: str) -> Iterator[int]:
    """Processes of the cluster in this folder, which is the driver's; none where there is no /proc.

    Its servers, which the driver has started, have the folder in their arguments; not all that they start in turn do.
    """
    children = defaultdict[int, list[int]](list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces and brackets.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children[parent].append(int(status.parent.name))
    found = [pid for pid in children[driver] if pid != os.getpid() and folder in _arguments(pid)]
    for pid in found:  # which grows
        found += children[pid]
        yield pid


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
