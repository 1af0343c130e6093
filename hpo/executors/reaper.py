"""The reaper of an own Ray cluster: a program that clears away what is left of it once its driver has ended.

    python reaper.py DRIVER_PID FOLDER

The driver holds its standard input: a line says that the cluster is up, the end that the driver has ended, also where
it was killed. Ray's servers and workers end by themselves then, but two of its agents go on for a minute, and its
folder stays for ever.
"""

import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["main"]

_GRACE_S = 3.0


def main(driver: int, folder: str) -> None:
    """Wait for the driver's end, then end its cluster and remove the folder."""
    sys.stdin.readline()
    processes = []
    for pid in _descendants(driver):
        with suppress(ProcessLookupError):  # it has just ended
            # Unlike its number, a process's descriptor is never another's.
            processes.append(os.pidfd_open(pid))
    sys.stdin.read()
    for process in processes:
        if not select.select([process], [], [], 0)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], _GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)


def _descendants(ancestor: int) -> Iterator[int]:
    """Processes that a process and its descendants have started, without this one; none where there is no /proc."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces and brackets.
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = {ancestor}
    for _ in parents:
        grown = found | {pid for pid, parent in parents.items() if parent in found}
        if grown == found:
            break
        found = grown
    yield from found - {ancestor, os.getpid()}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
