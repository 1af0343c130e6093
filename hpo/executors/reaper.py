"""The reaper of an own Ray cluster: a program that clears away what is left of it once its driver has ended.

    python reaper.py FOLDER

The driver holds its standard input: a line says that the cluster is up, the end that the driver has ended, also where
it was killed. Ray's servers and workers end by themselves then, but two of its agents go on for a minute, a worker that
was just starting for half of one, and its folder stays for ever. Other processes that the driver has started are none
of its business.

All of them have the folder in their arguments at first. Some write a title over them once they are ready, as Ray's
agents do: they are found by those that have started them, which end with the driver. So they are looked for as long as
the cluster is coming up, since the driver may end before it is.
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
_BETWEEN_LOOKS_S = 0.25


def main(folder: str) -> None:
    """Wait for the driver's end, then end its cluster and remove the folder."""
    opened: dict[int, int] = {}
    is_up = False
    while not is_up:
        is_up = bool(select.select([sys.stdin], [], [], _BETWEEN_LOOKS_S)[0])
        _open(_cluster(folder), opened)
    sys.stdin.read()
    for _ in range(2):  # what was just starting is found the second time
        _open(_cluster(folder), opened)
        _end(opened.values())
    shutil.rmtree(folder, ignore_errors=True)


def _open(pids: Iterable[int], opened: dict[int, int]) -> None:
    """Adds descriptors of processes: unlike its number, a process's descriptor is never another's."""
    for pid in pids:
        if pid in opened:
            if not _has_ended(opened[pid]):
                continue
            os.close(opened.pop(pid))
        with suppress(ProcessLookupError):  # it has just ended
            opened[pid] = os.pidfd_open(pid)


def _has_ended(process: int, within_s: float = 0.0) -> bool:
    return bool(select.select([process], [], [], within_s)[0])


def _end(processes: Iterable[int]) -> None:
    for process in processes:
        if not _has_ended(process):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            _has_ended(process, _GRACE_S)


def _cluster(folder: str) -> Iterator[int]:
    """Processes with the folder in their arguments, and all that they have started; none where there is no /proc."""
    children = defaultdict[int, list[int]](list)
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces and brackets.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        pid = int(status.parent.name)
        children[parent].append(pid)
        if pid != os.getpid() and folder in _arguments(pid):
            found.append(pid)
    for pid in found:  # which grows
        found += [child for child in children[pid] if child not in found]
        yield pid


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


if __name__ == "__main__":
    main(sys.argv[1])
