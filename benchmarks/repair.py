"""What repair gives back: AUC without repair, with `bn` and with `refit`, on confirmation images.

    python benchmarks/repair.py            # measures what is missing and draws the picture
    python benchmarks/repair.py --networks cifar_vit deit_tiny --references 1 10
    python benchmarks/repair.py --table    # prints what has been measured

It can be stopped and started again as one likes: every case is written to `benchmarks/results/repair.json` when it is
done, and none is measured twice. It needs the data pack (`HPO_DATA_PACK`, by default `../shared/data` beside the
repository). Intervals are of the difference to the same ranking without repair, by a paired bootstrap over images. The
seconds of a curve are the processor's, which other programs change less than the clock's; a repair's include the choice
of its strength.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar10_vit import NETWORK as CIFAR_VIT
from data_pack import IMAGENETTE, cifar10, data_pack, imagenette

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "repair.json"
PICTURE = HERE / "results" / "repair.png"
REPAIRS = ("none", "bn", "refit")
_ON_RESNET20 = {
    # The best of the grid of cifar10_resnet20.py, which searched without repair.
    "searched": {"text": "LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=AlphaBeta"},
    # The best of `repair_study.py tpe`, which searched with refit.
    "searched-refit": {"text": "LLR=AlphaBeta,MLL=Epsilon,HLL=Epsilon,FCL=Gamma", "aggregate": "rms"},
}
SEARCHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cifar_resnet20": {
        **_ON_RESNET20,
        # The best with refit of nine composites that were compared on 500 search images.
        "epsilon-rms": {"text": "LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=Epsilon", "aggregate": "rms"},
    },
    # Those of ResNet-20.
    "cifar_resnet56": _ON_RESNET20,
    # The best of cifar10_vit.py and imagenette.py, which searched without repair.
    "cifar_vit": {
        "searched": {"text": "LLR=Epsilon,MLL=Epsilon,HLL=Gamma,FCL=ZPlus", "attention": "ZPlus"},
    },
    "mobilenetv2_100": {"searched": {"text": "LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=AlphaBeta"}},
    "deit_tiny": {"searched": {"text": "LLR=Epsilon,MLL=Gamma,HLL=ZPlus,FCL=ZPlus", "attention": "ZPlus"}},
}
"""Composites that a study has found, by network; all rank by absolute relevance."""
N_IMAGES = 1000


@dataclass(frozen=True)
class Network:
    """A network of the data pack, of timm's or this product's architecture, and how finely its curve is measured."""

    model: str
    weights: str
    rates: str = "0:0.9:0.1"
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    of_imagenet: bool = False
    is_transformer: bool = False


HALF = (0.5, 0.5, 0.5)
NETWORKS = {
    "cifar_resnet20": Network("cifar_resnet20", "cifar10_resnet20", "0:0.95:0.05"),
    "cifar_resnet56": Network("cifar_resnet56", "cifar10_resnet56"),
    "cifar_vit": Network(
        "vit_tiny_patch16_224",
        "cifar10_vit_p4_d128_l4_h4",
        options=CIFAR_VIT,
        preprocessing={
            "size": (32, 32),
            "crop": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
        },
        is_transformer=True,
    ),
    "mobilenetv2_100": Network(
        "mobilenetv2_100",
        "imagenet_mobilenetv2_100_qat",
        options={"pad_type": "same"},
        preprocessing={"mean": HALF, "std": HALF},
        of_imagenet=True,
    ),
    "deit_tiny": Network(
        "deit_tiny_patch16_224",
        "imagenet_deit_tiny_patch16_224",
        preprocessing={"crop": 0.875},
        of_imagenet=True,
        is_transformer=True,
    ),
}
REFERENCES = (10, 1, 5, 50)
BASELINES = ("weight", "taylor", "random-0")


@dataclass(frozen=True)
class Case:
    """One ranking on one network: a heuristic, a baseline or one of `SEARCHED`."""

    network: str
    criterion: str
    references: int

    @property
    def key(self) -> str:
        """Under which its results are kept."""
        return f"{self.network} {self.criterion} {self.references}"


def cases(networks: Sequence[str], references: Sequence[int]) -> list[Case]:
    """Every ranking with every number of references a class.

    Those that tell most come first: of every network the usual and the searched rankings, then the baselines, the first
    ones with other numbers of references, the other heuristics, and what is left.
    """
    from search_spaces import HEURISTICS, TRANSFORMER_HEURISTICS

    stages: list[list[Case]] = [[] for _ in range(6)]
    for n, name in itertools.product(references, networks):
        is_transformer = NETWORKS[name].is_transformer
        usual = "epsilon-cp-abs" if is_transformer else "epsilon-abs"
        heuristics = TRANSFORMER_HEURISTICS if is_transformer else HEURISTICS
        for stage, criteria in zip(
            (0, 1, 3) if n == 10 else (2, 4, 5), ((usual, *SEARCHED[name]), BASELINES, heuristics), strict=True
        ):
            stages[stage] += [Case(name, criterion, n) for criterion in criteria]
    return list(dict.fromkeys(itertools.chain(*stages)))


def make_objective(case: Case) -> Any:
    """The case's network and images."""
    from objectives import Objective, ObjectiveOptions, load_model, load_task
    from objectives.pruning.rates import parse_rates

    pack, network = data_pack(), NETWORKS[case.network]
    checkpoint = str(pack / "weights" / f"{network.weights}.safetensors")
    model = load_model(
        network.model, checkpoint=checkpoint, options=dict(network.options), **dict(network.preprocessing)
    )
    # Nothing is searched here, so most images confirm; half of them where a study has searched the other half.
    task = load_task(
        imagenette(pack) if network.of_imagenet else cifar10(pack),
        model,
        references_per_class=case.references,
        classes=IMAGENETTE if network.of_imagenet else None,
        evaluation_images=20,
        confirmation_share=0.5 if case.criterion in SEARCHED[case.network] else 0.9,
    )
    return Objective(model, task, ObjectiveOptions(parse_rates(network.rates)))


def make_ranking(case: Case, objective: Any) -> Any:
    """The order in which the case prunes."""
    from objectives.pruning.ranking import rank
    from search_spaces import CompositeSpec, heuristic

    if case.criterion in SEARCHED[case.network]:
        return rank(objective.scores(CompositeSpec.parse_rules(abs=True, **SEARCHED[case.network][case.criterion])))
    return rank(objective.scores(heuristic(case.criterion)))


def measure(case: Case) -> dict[str, Any]:
    """All repairs of one case."""
    import numpy as np

    from hpo.confirmation import paired_bootstrap
    from objectives.pruning.curve import weights
    from objectives.pruning.rates import n_pruned
    from objectives.repair.repairer import Repairer
    from search_spaces import RepairSpec

    objective = make_objective(case)
    ranking, evaluator, rates = (
        make_ranking(case, objective),
        objective.evaluator("confirmation"),
        objective.options.rates,
    )
    n_images = min(N_IMAGES, len(objective.task.confirmation))
    result: dict[str, Any] = {
        "n_images": n_images,
        "rates": list(rates),
        "n_references": len(objective.task.references),
    }
    by_image = {}
    for method in REPAIRS:
        repair = RepairSpec(method)
        objective.repairer = Repairer(objective.network, objective.task.references.images, objective.repairer.batches)
        evaluator.repairer = objective.repairer
        start = time.process_time()
        strength = objective.repairer.strength(repair)
        repairing, evaluating, correct = time.process_time() - start, 0.0, []
        for rate in rates:
            masks = ranking.masks(n_pruned(rate, len(ranking)))
            start = time.process_time()
            objective.repairer.layers(masks, repair)
            middle = time.process_time()
            correct.append(evaluator.measure(masks, n_images, repair).correct.numpy())
            repairing, evaluating = repairing + middle - start, evaluating + time.process_time() - middle
        by_image[method] = np.array(weights("auc", rates)) @ np.array(correct, float)
        gain = paired_bootstrap((by_image[method] - by_image["none"])[:, None], seed=0)[0]
        result[method] = {
            "auc": float(by_image[method].mean()),
            "gain": [gain.difference, gain.low, gain.high],
            "accuracies": np.mean(correct, axis=1).tolist(),
            "strength": strength,
            "repair_cpu_s": repairing,
            "evaluation_cpu_s": evaluating,
        }
    return result


def table(results: dict[str, Any]) -> str:
    """The AUCs as a Markdown table: a row a ranking, a column a number of references."""
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for key, result in results.items():
        *ranking, references = key.split()
        aucs = " / ".join(f"{result[method]['auc']:.3f}" for method in REPAIRS)
        gain, low, high = result["refit"]["gain"]
        rows.setdefault(tuple(ranking), {})[int(references)] = f"{aucs}; {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    return _by_references(("network", "ranking"), rows)


def seconds_table(results: dict[str, Any]) -> str:
    """What a curve's refit takes, and its evaluation on 1,000 images, as a Markdown table; medians over rankings."""
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for key, result in results.items():
        network, _, references = key.split()
        refit = result["refit"]
        evaluation = refit["evaluation_cpu_s"] * N_IMAGES / result["n_images"]
        taken.setdefault((network, int(references)), []).append((refit["repair_cpu_s"], evaluation))
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for (network, references), pairs in taken.items():
        medians = " / ".join(f"{statistics.median(part):.1f}" for part in zip(*pairs, strict=True))
        rows.setdefault((network,), {})[references] = medians
    return _by_references(("network",), rows)


def _by_references(heads: Sequence[str], rows: Mapping[tuple[str, ...], Mapping[int, str]]) -> str:
    numbers = sorted(REFERENCES)
    lines = [f"| {' | '.join((*heads, *map(str, numbers)))} |", "|---" * (len(heads) + len(numbers)) + "|"]
    for first, cells in rows.items():
        lines.append(f"| {' | '.join((*first, *(cells.get(number, '') for number in numbers)))} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """The curves of the composite searched with refit and of the best heuristic on ResNet-20."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "searched-refit": "AlphaBeta/Epsilon/Epsilon/Gamma rms (searched)",
        "epsilon-abs": "epsilon-abs (best heuristic)",
    }
    keys = {name: f"cifar_resnet20 {name} 10" for name in shown}
    if not all(key in results for key in keys.values()):
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        result = results[keys[name]]
        for method, colour in zip(REPAIRS, ("#888888", "#d98c1f", "#1f6fd9"), strict=True):
            own = result[method]
            axis.plot(result["rates"], own["accuracies"], color=colour, label=f"{method}: AUC {own['auc']:.3f}")
        axis.set(title=title, xlabel="share of filters pruned", ylim=(0, 1))
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measures what is missing, and prints and draws all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument(
        "--references", nargs="+", type=int, choices=REFERENCES, default=REFERENCES, help="a class; default: all"
    )
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in [] if given.table else cases(given.networks, given.references):
        if case.key in results:
            continue
        results[case.key] = measure(case)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(case.key, {method: round(results[case.key][method]["auc"], 4) for method in REPAIRS}, flush=True)
    draw(results)
    print(table(results))
    print(seconds_table(results))


if __name__ == "__main__":
    main()
