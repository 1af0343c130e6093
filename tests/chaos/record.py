"""The figures of a scenario, kept for the table of the last full run."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.invariants import Tally

RESULTS = "HPO_CHAOS_RESULTS"


class Record:
    """Appends one JSON line per scenario to the file that `HPO_CHAOS_RESULTS` names, if it does.

    Args:
        test: Name of the test.
    """

    def __init__(self, test: str) -> None:
        self._test = test
        self._start = time.monotonic()

    def __call__(self, scenario: int, tally: Tally | None = None, **figures: Any) -> None:
        """Note what a scenario has come to.

        Args:
            scenario: Its number in `tests/chaos/README.md`.
            tally: What its study holds.
            figures: Kills and the like, by what they are called in the table.
        """
        if not (path := os.environ.get(RESULTS)):
            return
        line = {"scenario": scenario, "test": self._test, "seconds": round(time.monotonic() - self._start, 1)}
        self._start = time.monotonic()
        line |= {"figures": figures, "tally": None if tally is None else asdict(tally)}
        with Path(path).open("a") as results:
            results.write(json.dumps(line) + "\n")
