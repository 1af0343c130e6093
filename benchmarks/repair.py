"""What repair gives back: AUC without repair, with `bn` and with `refit`, on confirmation images.

    python benchmarks/repair.py            # measures what is missing and draws the picture
    python benchmarks/repair.py --table    # prints what has been measured

It can be stopped and started again as one likes: every case is written to `benchmarks/results/repair.json` when it is
done, and none is measured twice. It needs the data pack (`HPO_DATA_PACK`, by default `../shared/data` beside the
repository). Intervals are of the difference to the same ranking without repair, by a paired bootstrap over images. The
seconds of a curve are those of this machine; a repair's include the choice of its strength.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pack import IMAGENETTE, cifar10, data_pack, imagenette

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "repair.json"
PICTURE = HERE / "results" / "repair.png"
REPAIRS = ("none", "bn", "refit")
SEARCHED = {
    # The best of the grid of cifar10_resnet20.py, which searched without repair.
    "searched": ("LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=AlphaBeta", "mean"),
    # The best with refit of nine composites that were compared on 500 search images.
    "epsilon-rms": ("LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=Epsilon", "rms"),
}
N_IMAGES = 1000


@dataclass(frozen=True)
class Case:
    """One ranking on one network: a heuristic, one of `SEARCHED`, `magnitude` or `random`."""

    network: str
    criterion: str
    references: int
    rates: str = "0:0.95:0.05"

    @property
    def key(self) -> str:
        """Under which its results are kept."""
        return f"{self.network} {self.criterion} {self.references}"


CASES = [
    *(Case("cifar_resnet20", criterion, 10) for criterion in ("epsilon-abs", "searched", "zplus-abs", "random")),
    Case("cifar_resnet20", "epsilon-rms", 10),
    Case("mobilenetv2_100", "epsilon-abs", 10, "0:0.9:0.1"),
    Case("cifar_resnet56", "epsilon-abs", 10, "0:0.9:0.1"),
    *(Case("cifar_resnet20", "epsilon-abs", n) for n in (1, 5, 50)),
    Case("cifar_resnet20", "magnitude", 10),
    Case("mobilenetv2_100", "zplus-abs", 10, "0:0.9:0.1"),
    Case("cifar_resnet56", "zplus-abs", 10, "0:0.9:0.1"),
    *(Case("cifar_resnet20", name, 10) for name in ("zplus", "epsilon-plus-abs", "epsilon-plus", "epsilon")),
    *(Case("cifar_resnet20", f"epsilon-{name}", 10) for name in ("gamma", "gamma-abs")),
    *(Case("cifar_resnet20", f"epsilon-alpha2-beta1{suffix}", 10) for suffix in ("", "-abs")),
    *(Case("mobilenetv2_100", "epsilon-abs", n, "0:0.9:0.1") for n in (1, 5, 50)),
]


def make_objective(case: Case) -> Any:
    """The case's network and images."""
    from objectives import Objective, ObjectiveOptions, load_model, load_task
    from objectives.pruning.rates import parse_rates

    pack = data_pack()
    if case.network == "mobilenetv2_100":
        weights = pack / "weights" / "imagenet_mobilenetv2_100_qat.safetensors"
        half = (0.5, 0.5, 0.5)
        model = load_model(case.network, checkpoint=str(weights), options={"pad_type": "same"}, mean=half, std=half)
        source, classes = imagenette(pack), IMAGENETTE
    else:
        weights = pack / "weights" / f"{case.network.replace('cifar', 'cifar10')}.safetensors"
        model = load_model(case.network, checkpoint=str(weights))
        source, classes = cifar10(pack), None
    # Nothing is searched here, so most images confirm.
    task = load_task(
        source,
        model,
        references_per_class=case.references,
        classes=classes,
        evaluation_images=20,
        confirmation_share=0.9,
    )
    return Objective(model, task, ObjectiveOptions(parse_rates(case.rates)))


def make_ranking(case: Case, objective: Any) -> Any:
    """The order in which the case prunes."""
    import torch

    from objectives.pruning.ranking import rank
    from search_spaces import CompositeSpec, heuristic

    if case.criterion == "random":
        generator = torch.Generator().manual_seed(0)
        return rank({name: torch.rand(n, generator=generator) for name, n in objective.component_widths.items()})
    if case.criterion == "magnitude":
        # l2 norm of each filter, divided by the l2 norm of its layer (Yeom et al. 2021)
        weights = {name: objective.network.module.get_submodule(name).weight for name in objective.component_widths}
        norms = {name: weight.flatten(1).norm(dim=1) for name, weight in weights.items()}
        return rank({name: norm / norm.norm() for name, norm in norms.items()})
    if case.criterion in SEARCHED:
        rules, aggregate = SEARCHED[case.criterion]
        return rank(objective.scores(CompositeSpec.parse_rules(rules, abs=True, aggregate=aggregate)))
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
        start = time.perf_counter()
        strength = objective.repairer.strength(repair)
        repairing, evaluating, correct = time.perf_counter() - start, 0.0, []
        for rate in rates:
            masks = ranking.masks(n_pruned(rate, len(ranking)))
            start = time.perf_counter()
            objective.repairer.layers(masks, repair)
            middle = time.perf_counter()
            correct.append(evaluator.measure(masks, n_images, repair).correct.numpy())
            repairing, evaluating = repairing + middle - start, evaluating + time.perf_counter() - middle
        by_image[method] = np.array(weights("auc", rates)) @ np.array(correct, float)
        gain = paired_bootstrap((by_image[method] - by_image["none"])[:, None], seed=0)[0]
        result[method] = {
            "auc": float(by_image[method].mean()),
            "gain": [gain.difference, gain.low, gain.high],
            "accuracies": np.mean(correct, axis=1).tolist(),
            "strength": strength,
            "repair_s": repairing,
            "evaluation_s": evaluating,
        }
    return result


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    columns = ("network", "ranking", "references a class", "images", *REPAIRS, "refit - none, 95 %")
    lines = [f"| {' | '.join((*columns, 'repair / evaluation, s'))} |", "|---" * (len(columns) + 1) + "|"]
    for key, result in results.items():
        network, criterion, references = key.split()
        aucs = " | ".join(f"{result[method]['auc']:.3f}" for method in REPAIRS)
        gain, low, high = result["refit"]["gain"]
        seconds = f"{result['refit']['repair_s']:.0f} / {result['refit']['evaluation_s']:.0f}"
        lines.append(
            f"| {network} | {criterion} | {references} | {result['n_images']} | {aucs} | "
            f"{gain:+.3f} [{low:+.3f}, {high:+.3f}] | {seconds} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """The curves of the composite searched with refit and of the best heuristic on ResNet-20."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "searched": "Epsilon/Epsilon/Epsilon/AlphaBeta abs (searched)",
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
    only_table = parser.parse_args().table
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in CASES:
        if only_table or case.key in results:
            continue
        results[case.key] = measure(case)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(case.key, {method: round(results[case.key][method]["auc"], 4) for method in REPAIRS}, flush=True)
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
