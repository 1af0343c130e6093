"""Criteria on toy data: Yeom et al. 2021, section 4.1, beside the figures that the paper prints.

    python benchmarks/toy_criteria.py            # trains three networks and measures: an hour of one busy core
    python benchmarks/toy_criteria.py --table    # prints what has been measured

A network of three hidden layers of 1,000 neurons is trained on each of moon, circle and multi (1,000 points a class).
50 seeds draw the reference samples and nothing else; 1,000 of the 3,000 neurons are pruned at once, and accuracy is of
the training points. Writes `benchmarks/results/toy_criteria.json`.

The network and the criteria W, T, G and L are those of the paper's published code, which go beyond its text:

- there are two ReLUs, after the first and the second layer; values are taken at the layers' outputs before them;
- W is the l1 norm of a neuron's weights, divided by the layer's sum;
- T = |sum a dL/da| and G = |sum dL/da| over the samples, divided by the layer's l2 norm. The magnitude is of the
  sum, where this product's criteria `taylor` and `gradient` take the mean of the samples' magnitudes;
- L propagates a W+ over sum a W+, without biases, and divides the samples' sum by the layer's. Behind the third layer,
  which has no ReLU, a may be negative, and such neurons receive negative relevance: they go first. This product's rule
  `ZPlus` shares a+ W+ + a- W- + b+ instead, which is never negative, so that L is a zennit hook of its own here.
  Relevance starts as the true class's logit; L1 starts with 1, as the paper's text says (section 3.2).

So the criteria are written down here as the code has them, on this product's canonical network, gradients and
start of relevance; `ours` is what this product's own criteria weight, taylor, gradient and the heuristic zplus give on
the same networks and samples.

The paper trains for 10,000 steps of the whole data with a learning rate of 0.001. That is hours of one core, so here it
is 500 steps at 0.02, with the same momentum of 0.9, in bfloat16 (`--published` does as the paper). A data set that has
been measured isn't measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn
from zennit.core import BasicHook, Composite, stabilize
from zennit.rules import ClampMod

from objectives.attribution.criteria import ReferenceSamples, criterion_scores, plain
from objectives.attribution.engine import ZennitAttribution, captured, start_relevance
from objectives.attribution.relevance import normalized
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.evaluation import correct_predictions
from objectives.pruning.ranking import rank
from objectives.pruning.slimming import slim
from search_spaces.choices import OutputRelevance
from search_spaces.composites import CompositeSpec
from search_spaces.criteria import CriterionSpec
from search_spaces.files import write_atomically
from search_spaces.heuristics import heuristic

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "toy_criteria.json"

N_CLASSES = {"moon": 2, "circle": 2, "multi": 4}
N_REFERENCES = (1, 2, 5, 10, 20, 50, 100, 200)
N_TABULATED = (1, 5, 20, 100)
N_COMPARED = 10
N_SEEDS = 50
N_NEURONS = 1000
N_PRUNED = 1000
N_TRAINING = 1000  # points a class
TRAINING_SEED = 1000  # none of the references'
AT_ONCE = 4000  # samples, in scores
CRITERIA = ("W", "T", "G", "L", "L1")
OWN_CRITERIA = CRITERIA[:4]

# Supplementary Table 1: unpruned, W, and T, G, L for n = 1, 5, 20, 100.
ACCURACY = {
    "moon": (99.90, 99.60, (79.80, 83.07, 85.01), (84.70, 86.07, 99.86), (86.99, 85.87, 99.85), (94.77, 93.53, 99.85)),
    "circle": (
        *(100.00, 97.10),
        *((68.35, 69.21, 70.23), (87.18, 82.23, 99.89), (91.87, 85.36, 100.00), (97.04, 90.88, 100.00)),
    ),
    "multi": (94.95, 91.00, (34.28, 34.28, 62.98), (77.34, 67.96, 91.85), (83.21, 77.39, 91.59), (84.76, 82.68, 91.25)),
}
# Table 1: overlap of L with W, T, G in the first and last 250 and 1,000 neurons.
OVERLAP = {
    "moon": ((0.002, 0.006, 0.006), (0.083, 0.361, 0.369), (0.381, 0.639, 0.626), (0.409, 0.648, 0.530)),
    "circle": ((0.033, 0.096, 0.096), (0.086, 0.389, 0.405), (0.424, 0.670, 0.627), (0.409, 0.623, 0.580)),
    "multi": ((0.098, 0.220, 0.215), (0.232, 0.312, 0.299), (0.246, 0.217, 0.243), (0.367, 0.528, 0.545)),
}
# Table 2: overlap of T, G, L with themselves across seeds in the first and last 250 neurons, and Spearman correlation.
CONSISTENCY = {
    "moon": ((0.920, 0.918, 0.946), (0.508, 0.685, 0.926), (0.072, 0.146, 0.152)),
    "circle": ((0.861, 0.861, 0.840), (0.483, 0.635, 0.936), (0.074, 0.098, 0.137)),
    "multi": ((0.827, 0.829, 0.786), (0.463, 0.755, 0.941), (0.080, 0.131, 0.155)),
}
SETS = (("first", 250), ("last", 250), ("first", 1000), ("last", 1000))

Scores = Mapping[str, Tensor]
"""Layer -> (seeds, neurons)."""


# Data and networks.


def points(data_set: str, n: int, seed: int) -> LabelledImages:
    """`n` points a class, as images (N, 2, 1, 1)."""
    if data_set == "moon":
        place, label = make_moons(n_samples=2 * n, noise=0.1, random_state=seed)
    elif data_set == "circle":
        place, label = make_circles(n_samples=2 * n, noise=0.1, factor=0.3, random_state=seed)
    else:
        # Arms of a spiral; a single point a class lies in the middle, whatever its class.
        random = np.random.RandomState(seed)
        radius = np.linspace(0, 1, n)
        angles = [np.linspace(arm * 4, (arm + 1) * 4, n) + random.randn(n) * 0.2 for arm in range(4)]
        place = np.concatenate([np.stack([radius * np.sin(t), radius * np.cos(t)], axis=1) for t in angles])
        label = np.repeat(np.arange(4), n)
    images = torch.from_numpy(place.astype(np.float32))[:, :, None, None]
    return LabelledImages(images, torch.from_numpy(label.astype(np.int64)))


class ToyNetwork(nn.Module):
    """Three hidden layers, of which the third has no ReLU behind it."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(2, N_NEURONS),
                relu1=nn.ReLU(),
                dropout=nn.Dropout(0.5),
                linear2=nn.Linear(N_NEURONS, N_NEURONS),
                relu2=nn.ReLU(),
                linear3=nn.Linear(N_NEURONS, N_NEURONS),
                output=nn.Linear(N_NEURONS, n_classes),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 2, 1, 1) -> (N, classes)."""
        logits: Tensor = self.layers(images.flatten(1))
        return logits


@dataclass(frozen=True)
class Training:
    """Steps of SGD over all points at once, with a momentum of 0.9."""

    n_steps: int
    learning_rate: float
    dtype: str

    def train(self, data: LabelledImages, n_classes: int, seed: int = 0) -> ToyNetwork:
        """A trained network in evaluation mode."""
        torch.manual_seed(seed)
        network = ToyNetwork(n_classes).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=self.learning_rate, momentum=0.9)
        for _ in range(self.n_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
                logits = network(data.images)
            loss = nn.functional.cross_entropy(logits.float(), data.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.eval()


SHORT = Training(500, 0.02, "bf16")
PUBLISHED = Training(10_000, 0.001, "fp32")


# The paper's criteria, of the references of all seeds at once.


def in_parts(score: Callable[..., dict[str, Tensor]]) -> Callable[..., Scores]:
    """A criterion that sums over each seed's samples, from one that gives values (samples, neurons)."""

    def scores(network: CanonicalNetwork, references: list[LabelledImages], *arguments: Any) -> Scores:
        n_samples = len(references[0])
        parts: list[dict[str, Tensor]] = []
        n_seeds = max(1, AT_ONCE // n_samples)
        for first in range(0, len(references), n_seeds):
            some = references[first : first + n_seeds]
            images = torch.cat([samples.images for samples in some])
            labels = torch.cat([samples.labels for samples in some])
            values = score(network, images, labels, *arguments)
            parts.append({name: value.detach().unflatten(0, (-1, n_samples)).sum(1) for name, value in values.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return scores


def weight(network: CanonicalNetwork, references: list[LabelledImages]) -> Scores:
    """W: the same for all seeds."""
    norms = {name: network.module.get_submodule(name).weight.abs().sum(1) for name in network.components}
    return {name: (norm / norm.sum()).expand(len(references), -1) for name, norm in norms.items()}


def loss_gradients(network: CanonicalNetwork, images: Tensor, labels: Tensor) -> tuple[Scores, Scores]:
    """Outputs a and dL/da, layer -> (samples, neurons)."""
    with plain(network) as ungated:
        logits, outputs = ungated.run(images)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return outputs, dict(zip(outputs, gradients, strict=True))


@in_parts
def taylor(network: CanonicalNetwork, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What T sums."""
    outputs, gradients = loss_gradients(network, images, labels)
    return {name: outputs[name] * gradient for name, gradient in gradients.items()}


@in_parts
def gradient(network: CanonicalNetwork, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What G sums."""
    return dict(loss_gradients(network, images, labels)[1])


class PositiveWeights(BasicHook):
    """Relevance in proportion to a W+, whatever the sign of a."""

    def __init__(self) -> None:
        super().__init__(
            param_modifiers=[ClampMod(min=0.0, zero_params="bias")],
            gradient_mapper=lambda relevance, outputs: [relevance / stabilize(outputs[0], 1e-9)],
        )


@in_parts
def relevance(
    network: CanonicalNetwork, images: Tensor, labels: Tensor, output_relevance: OutputRelevance
) -> dict[str, Tensor]:
    """What L and L1 sum."""
    rules = Composite(module_map=lambda _, name, module: PositiveWeights() if name in network.layers else None)
    with rules.context(network.module) as module, captured(module, network) as values:
        logits = module(images.clone().requires_grad_())
        outputs = dict(values.outputs)
        start = start_relevance(logits.detach(), labels, output_relevance)
        return dict(zip(outputs, torch.autograd.grad(logits, list(outputs.values()), start), strict=True))


def published(network: CanonicalNetwork, references: list[LabelledImages]) -> dict[str, Scores]:
    """Scores of every criterion as the paper's code has them."""

    def by_l2(scores: Scores) -> Scores:
        return {name: torch.stack([normalized(row, "l2") for row in rows.abs()]) for name, rows in scores.items()}

    def by_sum(scores: Scores) -> Scores:
        return {name: rows / rows.sum(1, keepdim=True) for name, rows in scores.items()}

    return {
        "W": weight(network, references),
        "T": by_l2(taylor(network, references)),
        "G": by_l2(gradient(network, references)),
        "L": by_sum(relevance(network, references, "logit")),
        "L1": by_sum(relevance(network, references, "one")),
    }


# This product's criteria.


def ours(network: CanonicalNetwork, references: list[LabelledImages]) -> dict[str, Scores]:
    """Scores of this product's weight, taylor, gradient and zplus."""
    zplus = heuristic("zplus")
    assert isinstance(zplus, CompositeSpec)
    groups = dict.fromkeys(network.layers, "FCL")
    rows: dict[str, list[dict[str, Tensor]]] = {criterion: [] for criterion in OWN_CRITERIA}
    for samples in references:
        given = ReferenceSamples(network, samples, Batches("attribution", AT_ONCE))
        for criterion, name in (("W", "weight"), ("T", "taylor"), ("G", "gradient")):
            rows[criterion].append(criterion_scores(CriterionSpec(name), given))
        engine = ZennitAttribution(network, groups, samples, AT_ONCE)
        rows["L"].append(engine.attribute(zplus).scores(absolute=zplus.abs))
    return {
        criterion: {name: torch.stack([seed[name] for seed in seeds]) for name in network.components}
        for criterion, seeds in rows.items()
    }


# Measuring.


def orders(scores: Scores) -> Tensor:
    """(seeds, 3000): neurons of all layers of each seed, the first to be pruned first."""
    n_seeds = len(next(iter(scores.values())))
    return torch.stack([rank({name: rows[seed] for name, rows in scores.items()}).order for seed in range(n_seeds)])


def accuracies(network: CanonicalNetwork, data: LabelledImages, scores: Scores) -> list[float]:
    """Accuracy in per cent on `data` without the first neurons, of each seed; equal masks are measured once."""
    known: dict[bytes, float] = {}
    found = []
    for seed in range(len(next(iter(scores.values())))):
        masks = rank({name: rows[seed] for name, rows in scores.items()}).masks(N_PRUNED)
        key = torch.cat(list(masks.values())).numpy().tobytes()
        if key not in known:
            known[key] = accuracy(slim(network, masks), data)
        found.append(known[key])
    return found


def accuracy(network: nn.Module, data: LabelledImages) -> float:
    """In per cent."""
    return 100 * float(correct_predictions(network, data, Batches("evaluation", AT_ONCE)).double().mean())


def members(order: Tensor, end: str, k: int) -> Tensor:
    """(seeds, 3000) of 0 and 1: which neurons are among the first or last `k`."""
    chosen = order[:, :k] if end == "first" else order[:, -k:]
    return torch.zeros(order.shape, dtype=torch.float64).scatter_(1, chosen, 1.0)


def overlaps(left: Tensor, right: Tensor, end: str, k: int) -> Tensor:
    """(seeds, seeds): share of the first or last `k` neurons that two orders have in common."""
    return members(left, end, k) @ members(right, end, k).T / k


def of_pairs(matrix: Tensor) -> float:
    """Mean over the 1,225 pairs of different seeds."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
    return float(matrix[rows, columns].mean())


def compare(by_n: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Tables 1 and 2 and Supplementary Table 2, from the orders of every number of references and criterion."""
    of_ten = by_n[N_COMPARED]
    overlap = {
        f"{end}-{k}": {c: float(overlaps(of_ten["L"], of_ten[c], end, k).diagonal().mean()) for c in CRITERIA}
        for end, k in SETS
    }
    consistency = {
        f"{end}-250": {c: of_pairs(overlaps(of_ten[c], of_ten[c], end, 250)) for c in CRITERIA}
        for end in ("first", "last")
    }
    consistency["spearman"] = {c: of_pairs(torch.corrcoef(of_ten[c].argsort(1).double())) for c in CRITERIA}
    consistency["spearman of the lists"] = {c: of_pairs(torch.corrcoef(of_ten[c].double())) for c in CRITERIA}
    by_size = {
        end: {n: of_pairs(overlaps(of_ten["L"], order["L"], end, 250)) for n, order in by_n.items()}
        for end in ("first", "last")
    }
    return {"overlap": overlap, "consistency": consistency, "consistency_by_n": by_size}


def measure(data_set: str, training: Training) -> dict[str, Any]:
    """All figures of one data set."""
    n_classes = N_CLASSES[data_set]
    data = points(data_set, N_TRAINING, TRAINING_SEED)
    start = time.perf_counter()
    trained = training.train(data, n_classes)
    seconds = time.perf_counter() - start
    network = canonize(trained, (2, 1, 1))
    result: dict[str, Any] = {"training_s": seconds, "unpruned": accuracy(network.module, data)}
    print(f"{data_set}: trained in {seconds:.0f} s, accuracy {result['unpruned']:.2f} %", flush=True)
    for name, criteria in (("published", published), ("ours", ours)):
        by_n: dict[int, dict[str, Tensor]] = {}
        accuracy_by_n: dict[str, dict[int, list[float]]] = {}
        for n in N_REFERENCES if name == "published" else N_TABULATED:
            scores = criteria(network, [points(data_set, n, seed) for seed in range(N_SEEDS)])
            by_n[n] = {criterion: orders(of_criterion) for criterion, of_criterion in scores.items()}
            for criterion, of_criterion in scores.items():
                accuracy_by_n.setdefault(criterion, {})[n] = accuracies(network, data, of_criterion)
            means = (f"{criterion} {np.mean(accuracy_by_n[criterion][n]):.2f}" for criterion in scores)
            print(f"  {name:10}n = {n:<4}{'  '.join(means)}", flush=True)
        result[name] = {
            "accuracy": {
                criterion: {n: {"mean": np.mean(found), "std": np.std(found)} for n, found in of_n.items()}
                for criterion, of_n in accuracy_by_n.items()
            },
            **(compare(by_n) if N_COMPARED in by_n else {}),
        }
    result["seconds"] = time.perf_counter() - start
    return result


# Output: the results as they stand in the file, in which numbers of references are text.


def holds(results: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """What should hold: the claim, whether it does, and where it doesn't."""
    for name, criterion in (("published", "L"), ("published", "L1"), ("ours", "L")):
        failing = []
        for data_set in N_CLASSES:
            means = means_of(results, data_set, name)
            for n, found in means[criterion].items():
                if int(n) >= 5 and found <= max(means["T"][n], means["G"][n]):
                    failing.append(f"{data_set} n = {n}")
        yield f"{criterion} ({name}) is before T and G at n >= 5 on all three", not failing, ", ".join(failing)
        failing = []
        for data_set in ("moon", "circle"):
            for n, cells in zip(N_TABULATED, ACCURACY[data_set][2:], strict=True):
                found = means_of(results, data_set, name)[criterion][str(n)]
                if n >= 5 and abs(found - cells[2]) > 0.5:
                    failing.append(f"{data_set} n = {n}: {found:.2f} for {cells[2]:.2f}")
        claim = f"{criterion} ({name}) is within 0.5 of the paper at n >= 5 on moon and circle"
        yield claim, not failing, ", ".join(failing)


def means_of(results: Mapping[str, Any], data_set: str, name: str) -> dict[str, dict[str, float]]:
    """Criterion -> number of references -> mean accuracy in per cent."""
    accuracy = results["data_sets"][data_set][name]["accuracy"]
    return {criterion: {n: cell["mean"] for n, cell in of_n.items()} for criterion, of_n in accuracy.items()}


def print_tables(results: Mapping[str, Any]) -> None:
    """Prints what has been measured as tables in Markdown, each figure as `measured (the paper's)`."""
    training = results["training"]
    print(f"{training['n_steps']} steps at {training['learning_rate']}, {training['dtype']}; {N_SEEDS} seeds\n")
    print("Accuracy after pruning, measured (paper; ours)\n")
    columns = [f"{c} n={n}" for n in N_TABULATED for c in OWN_CRITERIA[1:]]
    print_row("data", "unpruned", "W", *columns)
    print_row(*["---"] * (3 + len(columns)))
    for data_set, (unpruned, of_weight, *by_n) in ACCURACY.items():
        found = results["data_sets"][data_set]
        means = {name: means_of(results, data_set, name) for name in ("published", "ours")}
        cells = [f"{found['unpruned']:.2f} ({unpruned:.2f})"]
        expected = [("W", 1, of_weight)]
        expected += [
            (c, n, v) for n, row in zip(N_TABULATED, by_n, strict=True) for c, v in zip("TGL", row, strict=True)
        ]
        for criterion, n, value in expected:
            ourselves = means["ours"][criterion][str(n)]
            cells.append(f"{means['published'][criterion][str(n)]:.2f} ({value:.2f}; {ourselves:.2f})")
        print_row(data_set, *cells)
    print("\nAll numbers of references, accuracy +- standard deviation\n")
    print_row("data", "criterion", *(f"n = {n}" for n in N_REFERENCES))
    print_row(*["---"] * (2 + len(N_REFERENCES)))
    for data_set, criterion in itertools.product(N_CLASSES, CRITERIA[1:]):
        of_n = results["data_sets"][data_set]["published"]["accuracy"][criterion]
        cells = [f"{of_n[str(n)]['mean']:.2f} +- {of_n[str(n)]['std']:.2f}" for n in N_REFERENCES]
        print_row(data_set, criterion, *cells)
    print("\nTable 1: overlap with L, n = 10, measured (paper)\n")
    print_row("data", *(f"{c} {end}-{k}" for end, k in SETS for c in "WTG"))
    print_row(*["---"] * (1 + 3 * len(SETS)))
    for data_set, paper in OVERLAP.items():
        overlap = results["data_sets"][data_set]["published"]["overlap"]
        pairs = [
            f"{overlap[f'{end}-{k}'][c]:.3f} ({v:.3f})"
            for (end, k), row in zip(SETS, paper, strict=True)
            for c, v in zip("WTG", row, strict=True)
        ]
        print_row(data_set, *pairs)
    print("\nTable 2: consistency across seeds, n = 10, measured (paper)\n")
    kinds = ("first-250", "last-250", "spearman of the lists")
    print_row("data", *(f"{c} {kind}" for kind in kinds for c in "TGL"), *(f"{c} spearman of the ranks" for c in "TGL"))
    print_row(*["---"] * 13)
    for data_set, paper in CONSISTENCY.items():
        found = results["data_sets"][data_set]["published"]["consistency"]
        pairs = [
            f"{found[kind][c]:.3f} ({v:.3f})"
            for kind, row in zip(kinds, paper, strict=True)
            for c, v in zip("TGL", row, strict=True)
        ]
        print_row(data_set, *pairs, *(f"{found['spearman'][c]:.3f}" for c in "TGL"))
    print()
    for claim, is_so, failing in holds(results):
        print(f"{'held' if is_so else 'NOT HELD'}: {claim}{f' ({failing})' if failing else ''}")


def print_row(*cells: str) -> None:
    """A row of a table."""
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measures, or prints what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="train as the paper does, which takes hours")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    given = parser.parse_args()
    if not given.table:
        training = PUBLISHED if given.published else SHORT
        results = {"training": asdict(training), "torch": torch.__version__, "data_sets": {}}
        if RESULTS.exists() and (before := json.loads(RESULTS.read_text()))["training"] == asdict(training):
            results = before
        for data_set in N_CLASSES:
            if data_set not in results["data_sets"]:
                results["data_sets"][data_set] = measure(data_set, training)
                write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    if not RESULTS.exists():
        sys.exit("Nothing has been measured yet; leave --table out.")
    print_tables(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
