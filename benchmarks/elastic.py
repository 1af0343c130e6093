"""Prune and grow on CIFAR-10 with ResNet-20: what rebuilding gives, and iterative against one-shot pruning.

    python benchmarks/elastic.py            # measures what is missing and prints the tables
    python benchmarks/elastic.py --table    # prints what has been measured
    python benchmarks/elastic.py --epochs 1 --images 10 --evaluation 100 --results /tmp/elastic.json    # a smoke run

It can be stopped and started again as one likes: every case is written to `benchmarks/results/elastic.json` when it is
done, none is measured twice, and a training that is stopped goes on after its last whole epoch. It needs the data pack
(`HPO_DATA_PACK`, by default `../shared/data` beside the repository) and, at its usual size, some 80 minutes of one core
for each of three seeds.

Components are ranked within each layer, as torch-pruning does by default, on 10 references a class. With `refit` what
is pruned is repaired on these before each training.

rebuilt     The network without 30, 50 or 70 % of its components is trained (`pruned`); then what was pruned returns and
            is trained as long, while the core stays as it is (`rebuilt`). `untrained` is the pruned network before.
            Intervals are of rebuilt - pruned, by a paired bootstrap over images.
iterative   67 % of the parameters are pruned at once, or in five steps of 20 % of what is left, each of which ranks
            anew and is trained. One-shot is trained for as many epochs in all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pack import cifar10, data_pack

RESULTS = Path(__file__).resolve().parent / "results" / "elastic.json"
RANKERS = ("epsilon-abs", "epsilon-abs+refit", "weight", "taylor")
SPARSITIES = (0.3, 0.5, 0.7)
STEP = 0.2  # of the parameters that are left
N_STEPS = 5  # 0.8 ** 5 is 0.328
SEEDS = (0, 1, 2)
LEARNING_RATE = 0.001


@dataclass(frozen=True)
class Case:
    """One ranking with one seed, of the references and of the training."""

    kind: str
    ranker: str
    seed: int
    sparsity: float | None = None

    @property
    def key(self) -> str:
        """Under which its results are kept."""
        return " ".join(
            map(str, (self.kind, self.ranker, self.seed, *([] if self.sparsity is None else [self.sparsity])))
        )


CASES = [
    case
    for seed in SEEDS
    for ranker in RANKERS
    for case in (
        *(Case("rebuilt", ranker, seed, sparsity) for sparsity in SPARSITIES),
        Case("one_shot", ranker, seed),
        Case("iterative", ranker, seed),
    )
]


@dataclass(frozen=True)
class Size:
    """How much is computed: epochs of a training, training images a class, and images to measure on."""

    epochs: int
    images: int
    evaluation: int


class Experiment:
    """The network and images of one case, and its trainings, which keep checkpoints."""

    def __init__(self, case: Case, size: Size, checkpoints: Path) -> None:
        from objectives import Objective, ObjectiveOptions, load_model, load_task

        pack = data_pack()
        self.case, self.size, self.checkpoints = case, size, checkpoints / case.key.replace(" ", "-")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        model = load_model("cifar_resnet20", checkpoint=str(pack / "weights" / "cifar10_resnet20.safetensors"))
        given: dict[str, Any] = {"seed": case.seed, "evaluation_images": 20, "confirmation_share": 0.95}
        task = load_task(cifar10(pack), model, references_per_class=10, **given)
        self.training = load_task(cifar10(pack), model, references_per_class=size.images, **given).references
        self.objective = Objective(model, task, ObjectiveOptions((0.0, 0.5), ranking="layer"))
        images = task.confirmation
        self.images = type(images)(images.images[: size.evaluation], images.labels[: size.evaluation])

    def options(self, n_epochs: int) -> Any:
        """Of a training."""
        from objectives.training import GRADIENT_NORM, TrainingOptions

        return TrainingOptions(
            n_epochs, 32, LEARNING_RATE, schedule="cosine", max_gradient_norm=GRADIENT_NORM, seed=self.case.seed
        )

    def correct(self, network: Any) -> Any:
        """Which images a network classifies correctly, as NumPy floats."""
        from objectives.pruning.evaluation import correct_predictions

        return correct_predictions(network, self.images, self.objective.batches).double().numpy()

    def ranking(self, masks: Any = None, weights: Any = None) -> Any:
        """The case's order of components."""
        from search_spaces import heuristic

        return self.objective.ranking(heuristic(self.case.ranker.removesuffix("+refit")), masks, weights)

    def repaired(self, masks: Any, weights: Any = None) -> Any:
        """The network that a training begins with; where the case repairs, what masks prune is made up for."""
        from search_spaces.repairs import RepairSpec

        method = "refit" if self.case.ranker.endswith("+refit") else "none"
        return self.objective.repaired(masks, RepairSpec(method), weights)


def rebuilt(experiment: Experiment) -> dict[str, Any]:
    """A core of one sparsity, trained, and the whole network around it."""
    from hpo.confirmation import paired_bootstrap
    from objectives.elastic.figures import figures
    from objectives.elastic.model import ElasticModel
    from objectives.elastic.rebuild import rebuild
    from objectives.memory import Batches
    from objectives.training import train

    assert experiment.case.sparsity is not None, "a case of this kind has one"
    ranking = experiment.ranking()
    masks = ranking.masks(ranking.n_pruned(experiment.case.sparsity))
    unpruned = float(experiment.correct(experiment.objective.network.module).mean())
    model = ElasticModel(experiment.repaired(masks), [ranking.masks(0), masks])
    untrained = float(experiment.correct(model.at(1)).mean())
    options, checkpoints = experiment.options(experiment.size.epochs), experiment.checkpoints
    train(model.at(1), experiment.training, options, checkpoint=checkpoints / "level-1.safetensors")
    returned = float(experiment.correct(model.at(0)).mean())
    rebuild(model, experiment.training, options, checkpoints=checkpoints)
    whole, core = (experiment.correct(model.at(level)) for level in (0, 1))
    gain = paired_bootstrap((whole - core)[:, None], seed=0)[0]
    levels = figures(model, experiment.images, Batches("evaluation", 100))
    return {
        "unpruned": unpruned,
        "untrained": untrained,
        "pruned": float(core.mean()),
        "returned": returned,
        "rebuilt": float(whole.mean()),
        "gain": [gain.difference, gain.low, gain.high],
        "parameters": [level.parameters for level in levels],
        "flops": [level.flops for level in levels],
        "latency_ms": [level.latency_ms for level in levels],
        "switch_ms": [level.switch_ms for level in levels],
    }


def one_shot(experiment: Experiment) -> dict[str, Any]:
    """All at once."""
    return _compressed(experiment, 1)


def iterative(experiment: Experiment) -> dict[str, Any]:
    """In steps, each of which is trained."""
    return _compressed(experiment, N_STEPS)


def _compressed(experiment: Experiment, n_steps: int) -> dict[str, Any]:
    """The network with a share of its parameters, after as many epochs however many steps there are."""
    from objectives.pruning.fine_tuning import fine_tuned
    from objectives.pruning.slimming import cost, slim

    network, whole = experiment.objective.network, cost(experiment.objective.network.module).parameters
    options = experiment.options(experiment.size.epochs * N_STEPS // n_steps)
    masks = weights = None
    accuracies = []
    for step in range(1, n_steps + 1):
        ranking = experiment.ranking(masks, weights)
        masks = _fewest(network, ranking, (1 - STEP) ** (N_STEPS * step / n_steps) * whole)
        start = experiment.repaired(masks, weights)
        before = float(experiment.correct(slim(start, masks)).mean())
        checkpoint = experiment.checkpoints / f"step-{step}.safetensors"
        trained = fine_tuned(start, masks, experiment.training, options, checkpoint=checkpoint)
        weights = weights if trained is None else trained
        pruned = slim(network if weights is None else weights.on(network), masks)
        accuracies.append([before, float(experiment.correct(pruned).mean())])
    return {"accuracies": accuracies, "compression": 1 - cost(pruned).parameters / whole, "flops": cost(pruned).flops}


def _fewest(network: Any, ranking: Any, parameters: float) -> Any:
    """The largest network under a ranking that has at most so many parameters."""
    import bisect

    from objectives.pruning.slimming import cost, draft

    def size(n: int) -> int:
        return int(cost(draft(network, ranking.masks(n))).parameters)

    return ranking.masks(bisect.bisect_left(range(len(ranking)), -parameters, key=lambda n: -size(n)))


KINDS: dict[str, Callable[[Experiment], dict[str, Any]]] = {
    "rebuilt": rebuilt,
    "one_shot": one_shot,
    "iterative": iterative,
}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown tables, means over the seeds that there are; intervals are the seeds' widest."""
    lines = [
        "| ranking | pruned | seeds | unpruned | untrained | pruned | returned | rebuilt | rebuilt - pruned, 95 % |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for ranker in RANKERS:
        for sparsity in SPARSITIES:
            own = _of_seeds(results, "rebuilt", ranker, sparsity)
            if not own:
                continue
            names = ("unpruned", "untrained", "pruned", "returned", "rebuilt")
            cells = " | ".join(f"{_mean([result[name] for result in own]):.4f}" for name in names)
            gains = [result["gain"] for result in own]
            interval = f"[{min(gain[1] for gain in gains):+.4f}, {max(gain[2] for gain in gains):+.4f}]"
            gain = f"{_mean([gain[0] for gain in gains]):+.4f} {interval}"
            lines.append(f"| {ranker} | {100 * sparsity:g} % | {len(own)} | {cells} | {gain} |")
    lines += ["", "| ranking | compression | seeds | one-shot | iterative | iterative - one-shot, by seed |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for ranker in RANKERS:
        pairs = [
            (results[once.key], results[steps.key])
            for once, steps in ((Case("one_shot", ranker, seed), Case("iterative", ranker, seed)) for seed in SEEDS)
            if once.key in results and steps.key in results
        ]
        if not pairs:
            continue
        once, steps = ([result["accuracies"][-1][1] for result in each] for each in zip(*pairs, strict=True))
        compression = _mean([result["compression"] for pair in pairs for result in pair])
        by_seed = ", ".join(f"{second - first:+.4f}" for first, second in zip(once, steps, strict=True))
        accuracies = f"{_mean(once):.4f} | {_mean(steps):.4f}"
        lines.append(f"| {ranker} | {100 * compression:.1f} % | {len(pairs)} | {accuracies} | {by_seed} |")
    return "\n".join(lines)


def _of_seeds(results: dict[str, Any], kind: str, ranker: str, sparsity: float) -> list[dict[str, Any]]:
    keys = [Case(kind, ranker, seed, sparsity).key for seed in SEEDS]
    return [results[key] for key in keys if key in results]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measures what is missing, and prints all."""
    from search_spaces.files import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--epochs", type=int, default=3, help="of each training; one-shot has five times as many")
    parser.add_argument("--images", type=int, default=500, help="training images a class")
    parser.add_argument("--evaluation", type=int, default=4600, help="images to measure on")
    parser.add_argument("--cases", default="", help="only those whose name begins so, such as 'rebuilt epsilon-abs 0'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    size = Size(given.epochs, given.images, given.evaluation)
    known = json.loads(given.results.read_text()) if given.results.exists() else {"size": vars(size), "cases": {}}
    if known["size"] != vars(size):
        parser.error(f"{given.results} holds results of another size, {known['size']}; pass it, or another --results")
    results = known["cases"]
    checkpoints = given.results.with_suffix(".checkpoints")
    for case in CASES:
        if given.table or case.key in results or not case.key.startswith(given.cases):
            continue
        experiment = Experiment(case, size, checkpoints)
        results[case.key] = KINDS[case.kind](experiment)
        write_atomically(given.results, (json.dumps(known, indent=1) + "\n").encode())
        shutil.rmtree(experiment.checkpoints)
        print(case.key, results[case.key], flush=True)
    print(tables(results))


if __name__ == "__main__":
    main()
