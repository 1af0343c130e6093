"""Run the whole chaos suite at its full length, and write its figures into the table of `tests/chaos/README.md`.

python tests/chaos/run.py [PYTEST ARGUMENT]...
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- figures of the last full run: begin -->", "<!-- end -->"
SCENARIOS = {
    1: "grid of 60, 4 Ray workers, kill -9 of a random worker every 3 s",
    2: "grid of 512 and 200 trials of TPE, the driver killed every 20 to 40 s as well",
    3: "the driver killed at each step, at a release, and before every seventh commit",
    4: "PostgreSQL crashed every 40 s, away for 60 s, and away for longer than `--store-timeout`",
    5: "a COMMIT, or its answer, lost: at random, and every seventh answer in turn",
    6: "five launchers at once on an empty database",
    7: "the same study name with another space, sampler, model or direction",
    8: "a full disk under SQLite, and under the artifacts",
    9: "the driver stopped for 60 s, a second launcher, the driver continued; also with its lease lost meanwhile",
    10: "10 % of trials run out of memory, return NaN, or hang past `--trial-timeout`",
    11: "Ctrl-C once and twice, SIGTERM",
    12: "drivers with mixed `TZ` and `PGTZ`",
    13: "5,000 trials: the asks' 95th percentile, the dashboard's study page",
    14: "the dashboard polled at 1 Hz on SQLite during a study",
    15: "kill and restart at concurrency 1: the sequence of trials of an uninterrupted run",
}


def main(arguments: list[str]) -> int:
    """Run pytest, and rewrite the table if all passed; pytest's exit code."""
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory, "results.jsonl")
        results.touch()
        environment = {**os.environ, "HPO_CHAOS": "full", "HPO_CHAOS_RESULTS": str(results)}
        command = [sys.executable, "-m", "pytest", str(HERE), "--timeout=3600", "--durations=15", "-n0", *arguments]
        code = subprocess.run(command, cwd=HERE.parents[1], env={**environment, "OMP_NUM_THREADS": "1"}).returncode
        records = [json.loads(line) for line in results.read_text().splitlines()]
    if code == 0:
        readme = HERE / "README.md"
        text = readme.read_text()
        before, rest = text.split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{table(records)}{END}{rest.split(END)[1]}")
    return code


def table(records: list[dict[str, Any]]) -> str:
    """The figures of all scenarios, as Markdown."""
    by_scenario = defaultdict(list)
    for record in records:
        by_scenario[record["scenario"]].append(record)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {os.cpu_count()} CPUs.",
        "",
        "| # | scenario | studies | faults and figures | complete | given up | failed | lost | duplicated | minutes |",
        "|--:|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    totals: Counter[str] = Counter()
    for number, scenario in SCENARIOS.items():
        found = by_scenario[number]
        figures: Counter[str] = Counter()
        tally: Counter[str] = Counter()
        for record in found:
            figures.update(record["figures"])
            tally.update({**(record["tally"] or {}), "seconds": record["seconds"]})
        totals.update(tally)
        totals.update({name: count for name, count in figures.items() if isinstance(count, int)})
        words = ", ".join(f"{count:g} {name.replace('_', ' ')}" for name, count in figures.items()) or "none"
        kept = " | ".join(str(tally[name]) for name in ("complete", "given_up", "failed", "lost", "duplicated"))
        lines.append(f"| {number} | {scenario} | {len(found)} | {words} | {kept} | {tally['seconds'] / 60:.1f} |")
    n_killed = totals["workers_killed"] + totals["drivers_killed"]
    lines += [
        "",
        f"**{n_killed} kills survived** ({totals['workers_killed']} workers, {totals['drivers_killed']} drivers), "
        f"{totals['restarts']} crashes of the database, {totals['commits_lost']} lost commits or answers; "
        f"trials **lost: {totals['lost']}**, **duplicated: {totals['duplicated']}**.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
