"""Dynamic pruning on scarce data against its baselines: does the weakest class live longer?

    python benchmarks/dynamic.py [cifar_resnet20|cifar_resnet56]

CIFAR-10 restricted to three classes, 10 references of each, weights fixed, all-Epsilon with absolute values. 20 runs,
each with classes, references and images of its own; PX (one ranking), DPX (a ranking a step) and DPX-SD with and
without each of its changes prune the same network in every run and are measured on the same 1,000 images. The figure is
the accuracy of the lowest class, its mean over the rates from 40 % to 90 % (Yasui et al. 2025); means, and paired
differences with 95 % bootstrap intervals over runs. What is measured stays in `benchmarks/results/dynamic_NETWORK.json`
and isn't measured again. It needs the data pack and some 40 minutes of one core, three times that for ResNet-56.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from data_pack import cifar10, data_pack

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("cifar_resnet20", "cifar_resnet56")
HEURISTIC = "epsilon-abs"
N_RUNS = 20
N_CLASSES = 3
N_REFERENCES = 10
N_IMAGES = 1000
RATES = (0.0, *(share / 100 for share in range(40, 91, 5)))
FIGURES = ("lowest", "harmonic", "mean")


def procedures() -> dict[str, Any]:
    """What is compared, the first against all others."""
    from search_spaces.procedures import Dynamic, Iterative, OneShot

    return {
        "DPX-SD (dynamic)": Dynamic(),
        "PX (one_shot)": OneShot(),
        "DPX (iterative)": Iterative(),
        "DPX-SD, rate fixed": Dynamic(fixed_rate=True),
        "DPX-SD, order fixed": Dynamic(fixed_order=True),
    }


def measured(network: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of every procedure in one run."""
    from objectives.datasets import load_task
    from objectives.models import load_model
    from objectives.objective import Objective, ObjectiveOptions
    from objectives.pruning.curve import harmonic_mean
    from search_spaces import heuristic

    pack = data_pack()
    classes = sorted(random.Random(seed).sample(range(10), N_CLASSES))
    model = load_model(network, checkpoint=pack / "weights" / f"{network.replace('cifar', 'cifar10')}.safetensors")
    task = load_task(
        cifar10(pack),
        model,
        classes=classes,
        references_per_class=N_REFERENCES,
        evaluation_images=N_IMAGES,
        confirmation_share=0,
        seed=seed,
    )
    for name, procedure in procedures().items():
        objective = Objective(model, task, ObjectiveOptions(RATES, procedure=procedure))
        start = time.process_time()
        curve = objective.evaluate(heuristic(HEURISTIC)).curve
        seconds = time.process_time() - start
        accuracies = np.array(curve.class_accuracies[1:])  # (rates from 40 % on, classes)
        yield (
            name,
            {
                "classes": classes,
                "lowest": float(accuracies.min(axis=1).mean()),
                "harmonic": float(np.mean([harmonic_mean(each) for each in accuracies.tolist()])),
                "mean": float(accuracies.mean()),
                "seconds": seconds,
            },
        )


def main(network: str) -> None:
    """Measures what isn't measured yet, and prints the tables."""
    from search_spaces.files import write_atomically

    path = RESULTS / f"dynamic_{network}.json"
    runs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(N_RUNS):
        if str(seed) in runs:
            continue
        runs[str(seed)] = dict(measured(network, seed))
        write_atomically(path, (json.dumps(runs, indent=2) + "\n").encode())
        print(f"run {seed + 1}/{N_RUNS}", {name: round(row["lowest"], 3) for name, row in runs[str(seed)].items()})
    for figure in FIGURES:
        print_table(figure, runs)


def print_table(figure: str, runs: dict[str, dict[str, Any]]) -> None:
    """Means of a figure, and how much better the first procedure is."""
    from hpo.confirmation import paired_bootstrap

    names = list(procedures())
    values = np.array([[run[name][figure] for name in names] for run in runs.values()])
    seconds = np.array([[run[name]["seconds"] for name in names] for run in runs.values()]).mean(axis=0)
    means = paired_bootstrap(values, seed=0)
    gains = paired_bootstrap(values[:, :1] - values, seed=0)
    print(f"\n| {figure} of {len(runs)} runs | mean, 95 % interval | {names[0]} - this, 95 % interval | CPU s |")
    print("|---|---|---|--:|")
    for name, mean, gain, each_s in zip(names, means, gains, seconds, strict=True):
        difference = "" if name == names[0] else f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        print(f"| {name} | {mean.difference:.3f} [{mean.low:.3f}, {mean.high:.3f}] | {difference} | {each_s:.1f} |")


if __name__ == "__main__":
    given = sys.argv[1:] or NETWORKS[:1]
    if len(given) != 1 or given[0] not in NETWORKS:
        sys.exit(f"Usage: python {Path(__file__).name} [{'|'.join(NETWORKS)}]")
    main(given[0])
