"""A benchmark that is a study: launched or resumed through the command line, its result written beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run"]

RESULTS = Path(__file__).resolve().parent / "results"
N_BEST = 10


def run(name: str, launch: Sequence[str], network: Sequence[str], *, confirm_best: bool = False) -> None:
    """Runs a study, or what is left of it; prints its best composites and its confirmation, and writes them.

    The store is `results/NAME.db`, what is worth keeping `results/NAME.json`.

    Args:
        name: of the study.
        launch: options of `hpo launch` about the search.
        network: options about network and images, which `hpo evaluate` takes as well.
        confirm_best: measure all of the ten best on the confirmation images, not the best alone.
    """
    from hpo.cli import cli
    from search_spaces.composites import CompositeSpec
    from storage.store import StudyStore

    url = f"sqlite:///{RESULTS / name}.db"
    if status := cli(["launch", "--study", name, "--storage", url, *launch, *network], standalone_mode=False):
        os._exit(status)  # interrupted, a trial still at work: the same command goes on
    with StudyStore.open(url, read_only=True) as store:
        study = store.load(name)
        attributes = dict(study.user_attrs)
        trials = [trial for trial in study.trials if trial.user_attrs.get("role") == "search"]
        heuristics = {
            trial.user_attrs["heuristic"]: trial
            for trial in study.trials
            if trial.user_attrs.get("role") == "heuristic" and trial.value is not None
        }
    measured = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: -trial.value)
    best = [{"trial": trial.number, "auc": trial.value, **trial.params} for trial in measured[:N_BEST]]
    if confirm_best:
        for row in best:
            row |= _confirmed(url, name, row["trial"], network)
    result = {
        "best": best,
        "heuristics": {each: trial.value for each, trial in heuristics.items()},
        "confirmation": attributes["confirmation"],
        "compared": _compared(attributes, {each: trial.number for each, trial in heuristics.items()}),
        "n_searched": len(trials),
        "n_measured": len(measured),
        "median_auc": measured[len(measured) // 2].value,
        "auc": {CompositeSpec.from_json(trial.user_attrs["composite"]).label: trial.value for trial in measured},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    _print(result)


def _confirmed(url: str, study: str, trial: int, network: Sequence[str]) -> dict[str, float]:
    """AUC and mean accuracy of a trial's composite on the confirmation images."""
    from hpo.cli import cli

    with tempfile.TemporaryDirectory() as folder:
        document = str(Path(folder) / "composite.json")
        cli(["export", study, "--storage", url, "--trial", str(trial), "-o", document], standalone_mode=False)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            cli(
                ["evaluate", "--composite", document, "--images", "confirmation", "--json", *network],
                standalone_mode=False,
            )
    figures = json.loads(output.getvalue())
    return {"confirmed_auc": figures["auc"], "confirmed_mean_accuracy": figures["mean_accuracy"]}


def _compared(attributes: Mapping[str, Any], heuristics: Mapping[str, int]) -> list[dict[str, Any]]:
    """The best composite and each heuristic on the confirmation images, best first.

    Each has its AUC, with the 95 % bootstrap interval over images, and its mean accuracy; heuristics also the best
    composite's AUC minus theirs, with its interval.
    """
    import numpy as np

    from hpo.confirmation import Confirmation, paired_bootstrap, read_confirmed

    confirmation = Confirmation.from_json(attributes["confirmation"])
    numbers = {"best": confirmation.trial, **heuristics}
    confirmed = read_confirmed(attributes, numbers.values())
    areas = np.stack([confirmed[number].image_auc for number in numbers.values()], axis=1)
    rows = []
    for (name, number), interval in zip(numbers.items(), paired_bootstrap(areas, seed=0), strict=True):
        accuracies = confirmed[number].accuracies
        row: dict[str, Any] = {
            "name": name,
            "auc": confirmed[number].auc,
            "interval": [interval.low, interval.high],
            "mean_accuracy": sum(accuracies) / len(accuracies),
        }
        if name in confirmation.differences:
            difference = confirmation.differences[name]
            row["best_minus_this"] = [difference.difference, difference.low, difference.high]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["auc"])


def _print(result: Mapping[str, Any]) -> None:
    from search_spaces.rules import GROUPS

    print(
        f"The {len(result['best'])} best of {result['n_searched']} composites, {result['n_measured']} measured wholly:"
    )
    for row in result["best"]:
        rules = "/".join(row[group] for group in GROUPS)
        rest = "  ".join(f"{key}={value}" for key, value in row.items() if key not in (*GROUPS, "auc", "trial"))
        print(f"  {row['auc']:.4f}  {rules}  {rest}")
    print("\n| composite | AUC, 95 % interval | mean accuracy | best - this, 95 % interval |\n|---|---|---|---|")
    for row in result["compared"]:
        low, high = row["interval"]
        cells = [row["name"], f"{row['auc']:.4f} [{low:.4f}, {high:.4f}]", f"{row['mean_accuracy']:.4f}"]
        difference, below, above = row.get("best_minus_this", (0.0, 0.0, 0.0))
        cells.append(f"{difference:+.4f} [{below:+.4f}, {above:+.4f}]" if "best_minus_this" in row else "")
        print(f"| {' | '.join(cells)} |")
