"""How much faster the product is than a plain loop, side by side in one run.

    python benchmarks/speed.py                      # every part; half an hour on one core, most of it the plain loop's
    python benchmarks/speed.py --part attribution   # 256 composites: the shared engine against zennit one by one
    python benchmarks/speed.py --part curve         # 20 rates: slim networks against dense masked ones
    python benchmarks/speed.py --part study         # the CIFAR-10 grid through the command line, exact and raced
    python benchmarks/speed.py --part tpe           # trials until TPE and random search are near the grid's best
    python benchmarks/speed.py --part overhead      # what a trial costs beside its computation
    python benchmarks/speed.py --part growth        # seconds against composites, images and depth
    python benchmarks/speed.py --part limits        # images a second against the machine's arithmetic and memory
    python benchmarks/speed.py --table              # what has been measured, in Markdown

`plain` is a straightforward, decent loop, written here: zennit per composite with references batched by 50, evaluation
of the dense masked network in batches of 250, images decoded in memory, in float32 and with the same threads. Each
factor is a ratio of process CPU time, or of wall time on a GPU, where attribution adds ResNet-50 at 224 px. Every part
writes `benchmarks/results/speed_PART.json`, on a GPU with the card's name. Parts `curve` and `study` need the data pack
(`HPO_DATA_PACK`, by default `../shared/data` beside the repository).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cifar10_vit import NETWORK as CIFAR_VIT
from data_pack import cifar10, data_pack
from timed_launch import timed_launch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

if TYPE_CHECKING:
    from objectives.datasets import LabelledImages
    from objectives.network import CanonicalNetwork
    from objectives.objective import Objective
    from objectives.pruning.ranking import Masks
    from search_spaces.composites import CompositeSpec
    from search_spaces.spaces import DiscreteSpace

Rows = Iterator[dict[str, Any]]

PARTS: dict[str, Callable[[torch.device], Rows]] = {}
"""Each part by its name: it measures on a device and yields the rows of its table."""

PLAIN_BATCH = {"attribution": 50, "evaluation": 250}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def part(function: Callable[[torch.device], Rows]) -> Callable[[torch.device], Rows]:
    """Decorator that registers a part under its function's name."""
    PARTS[function.__name__] = function
    return function


@dataclass(slots=True)
class Clock:
    """Seconds of the work within `running` blocks: process CPU time, or wall time on a GPU."""

    device: torch.device
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        start = self._now()
        yield
        self.seconds += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one operation and runs it."""
        output = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


# Part 1: attribution.

# As many reference images as `plain` takes at a time, and the composites of four rules in four groups.
N_REFERENCES = 50
N_COUNTED = 4  # reference images for counting operations, whose number is proportional to them
VIT = "vit_tiny_patch16_224"
NETWORKS = {"cifar_resnet20": 32, "resnet18": 112}
NETWORKS_ON_GPU = {**NETWORKS, "resnet50": 224}


@part
def attribution(device: torch.device) -> Rows:
    """256 composites on `N_REFERENCES` images; `plain` is timed on 16 of them and scaled.

    In these 16 every rule stands in every group equally often with each rule of any other group. Half of them run
    before the shared engine and half after it, so that a machine that is busy with other things slows both. On a
    transformer there are three times as many, one rule of attention after the other.
    """
    from objectives.layer_groups import group_layers
    from search_spaces.composites import ATTENTION_RULES

    for name, size in (NETWORKS if device.type == "cpu" else NETWORKS_ON_GPU).items():
        network, references = random_network(name, size, N_REFERENCES, device)
        composites = grid()
        found = compare_engines(network, group_layers(network), references, composites, orthogonal(composites))
        yield {"network": f"{name}, {size} px", **found}
    network, references = random_network(VIT, 32, N_REFERENCES, device, **CIFAR_VIT)
    composites = [replace(each, attention=rule) for rule in ATTENTION_RULES for each in grid()]
    sampled = [
        replace(each, attention=ATTENTION_RULES[index % 3]) for index, each in enumerate(orthogonal(composites[:256]))
    ]
    found = compare_engines(network.choosing("mlp"), group_layers(network), references, composites, sampled)
    yield {"network": "CIFAR transformer, MLPs", **found}


def random_network(
    name: str, size: int, n_images: int, device: torch.device, **options: Any
) -> tuple[CanonicalNetwork, LabelledImages]:
    """A network with random weights, in canonical form, and as many random images."""
    import timm

    import objectives.cifar_resnets  # noqa: F401 (registers its networks with timm)
    from objectives.canonization import canonize
    from objectives.datasets import LabelledImages

    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **options})
    for module in model.modules():  # timm's zeros in the last batch norm of a block would let no relevance through
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    images = torch.randn(n_images, 3, size, size, device=device)
    labels = torch.arange(n_images, device=device) % 10
    return canonize(model.eval().to(device), (3, size, size)), LabelledImages(images, labels)


def compare_engines(
    network: CanonicalNetwork,
    groups: dict[str, str],
    references: LabelledImages,
    composites: Sequence[CompositeSpec],
    sampled: Sequence[CompositeSpec],
) -> dict[str, float | int]:
    """Times and operations of both engines on one network, a composite each, and the difference of their scores.

    `plain` runs on the composites in `sampled`.
    """
    from objectives.attribution.shared import SharedAttribution
    from objectives.datasets import LabelledImages

    plain, shared = Clock(references.images.device), Clock(references.images.device)
    plain_attribution(network, groups, references, sampled[0])  # warm
    for composite in sampled[::2]:
        with plain.running():
            plain_attribution(network, groups, references, composite)
    engine = SharedAttribution(network, groups, references, PLAIN_BATCH["attribution"])
    with shared.running():
        engine.prepare(composites)
    differences = []
    for composite in sampled[1::2]:
        with plain.running():
            expected = plain_attribution(network, groups, references, composite)
        given = engine.attribute(composite).scores(absolute=True)
        differences += [float((expected[name] - v).abs().max() / v.abs().max()) for name, v in given.items()]
    few = LabelledImages(references.images[:N_COUNTED], references.labels[:N_COUNTED])
    forward = flops(lambda: network.module(few.images))
    of_plain = flops(lambda: [plain_attribution(network, groups, few, composite) for composite in sampled])
    of_shared = flops(lambda: SharedAttribution(network, groups, few, PLAIN_BATCH["attribution"]).prepare(composites))
    plain_s, shared_s = plain.seconds / len(sampled), shared.seconds / len(composites)
    return {
        "n_composites": len(composites),
        "n_references": len(references),
        "plain_s": plain_s,
        "shared_s": shared_s,
        "factor": plain_s / shared_s,
        "plain_forward_units": of_plain / forward / len(sampled),
        "shared_forward_units": of_shared / forward / len(composites),
        "largest_difference": max(differences),
    }


def grid(epsilons: tuple[float, ...] = (1e-6,)) -> list[CompositeSpec]:
    """The composites of four rules in four groups, in tree order."""
    from search_spaces.rules import GROUPS, RULE_DEFAULTS
    from search_spaces.spaces import DiscreteSpace

    rules = dict.fromkeys(GROUPS, tuple(RULE_DEFAULTS))
    return list(DiscreteSpace("grid", rules, abs=(True,), epsilon=epsilons).grid())


def orthogonal(composites: Sequence[CompositeSpec]) -> list[CompositeSpec]:
    """16 of the 256 composites: any two groups have each pair of rules once (an orthogonal array of strength 2)."""
    # Over the field of four elements: (x, y) -> (x, y, x + y, x + 2 y), where 2 y is this permutation.
    doubled = (0, 2, 3, 1)
    found = [
        composites[x * 64 + y * 16 + (x ^ y) * 4 + (x ^ doubled[y])] for x, y in itertools.product(range(4), repeat=2)
    ]
    return [found[(5 * index) % 16] for index in range(16)]


def plain_attribution(
    network: CanonicalNetwork, groups: dict[str, str], references: LabelledImages, composite: CompositeSpec
) -> dict[str, Tensor]:
    """Absolute scores of all components by zennit, as a plain loop computes them; layer -> (components,)."""
    from objectives.attribution.composites import zennit_composite

    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    names = list(network.components)
    sums = {name: torch.zeros(width, device=references.images.device) for name, width in network.components.items()}
    with zennit_composite(composite, groups).context(network.module) as module:
        handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        for images, labels in zip(
            references.images.split(PLAIN_BATCH["attribution"]),
            references.labels.split(PLAIN_BATCH["attribution"]),
            strict=True,
        ):
            logits = module(images.clone().requires_grad_())
            start = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
            for name, relevance in zip(
                names, torch.autograd.grad(logits, [outputs[name] for name in names], start), strict=True
            ):
                by_sample = (
                    relevance.sum(dim=(1,) if relevance.ndim == 3 else (2, 3)) if relevance.ndim > 2 else relevance
                )
                sums[name] += by_sample.abs().sum(dim=0)
        for handle in handles:
            handle.remove()
    return {name: values.double().cpu() / len(references) for name, values in sums.items()}


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with Flops() as counter:
        run()
    return counter.total


# Part 2: a curve.


@dataclass(frozen=True, slots=True)
class Case:
    """A trained network, its images, and the heuristics whose curves are counted."""

    name: str
    model: dict[str, Any]
    data: str
    n_images: int
    n_references: int
    heuristics: tuple[str, ...]
    components: str | None = None


def cases() -> Iterator[Case]:
    """CIFAR ResNet-20 and the MLPs of the CIFAR transformer on 1,000 images, and MobileNetV2 at 224 px on 100."""
    pack = data_pack()
    imagenet, weights = pack / "imagenet", pack / "weights"
    yield Case(
        "cifar_resnet20",
        {"name": "cifar_resnet20", "checkpoint": weights / "cifar10_resnet20.safetensors"},
        cifar10(pack),
        n_images=1000,
        n_references=100,
        heuristics=("epsilon-abs", "zplus-abs", "epsilon-plus-abs"),
    )
    yield Case(
        "mobilenetv2_100",
        {
            "name": "mobilenetv2_100",
            "checkpoint": weights / "imagenet_mobilenetv2_100_qat.safetensors",
            "options": {"pad_type": "same"},
        },
        f"npz:{imagenet / 'ref1000.npz'},{imagenet / 'val1300_dev.npz'}",
        n_images=100,
        n_references=32,
        heuristics=("epsilon-abs", "zplus-abs"),
    )
    yield Case(
        "cifar_vit",
        {
            "name": VIT,
            "checkpoint": weights / "cifar10_vit_p4_d128_l4_h4.safetensors",
            "options": CIFAR_VIT,
            "size": 32,
            "crop": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
        },
        cifar10(pack),
        n_images=1000,
        n_references=100,
        heuristics=("epsilon-cp-abs", "zplus-cp"),
        components="mlp",
    )


@part
def curve(device: torch.device) -> Rows:
    """20 rates of every case, the making of slim networks included.

    Plain and ours take turns at every rate, so that a machine that is busy with other things slows both. A row for the
    first curve of a study and, without the unpruned network that all share, for a later one.
    """
    for case in cases():
        yield from time_curves(case, device)


def time_curves(case: Case, device: torch.device) -> Rows:
    """One row a dtype, over all heuristics of the case."""
    from search_spaces import heuristic

    objectives = {dtype: make_objective(case, dtype, device) for dtype in DTYPES}
    curves = [
        take_turns(objectives, plain_masks(objectives["fp32"], heuristic(name)), device) for name in case.heuristics
    ]
    plain_s = sum(curve.total_s("plain") for curve in curves)
    for dtype in DTYPES:
        ours_s = sum(curve.total_s(dtype) for curve in curves)
        rates = objectives[dtype].options.rates
        yield {
            "network": case.name,
            "dtype": dtype,
            "n_images": case.n_images,
            "n_curves": len(curves),
            "plain_s": plain_s / len(curves),
            "ours_s": ours_s / len(curves),
            "factor": plain_s / ours_s,
            "factor_of_later_curves": plain_s / (ours_s - sum(curve.seconds[dtype][0] for curve in curves)),
            "largest_auc_difference": max(abs(curve.auc(dtype, rates) - curve.auc("plain", rates)) for curve in curves),
        }


def make_objective(case: Case, dtype: str, device: torch.device) -> Objective:
    """The case's network and images."""
    from objectives.datasets import LabelledImages, load_task
    from objectives.models import load_model
    from objectives.objective import Objective, ObjectiveOptions
    from objectives.pruning.rates import DEFAULT_RATES, parse_rates

    options = dict(case.model)
    model = load_model(options.pop("name"), **options)
    per_class = max(1, case.n_references // model.num_classes)
    task = load_task(case.data, model, evaluation_images=case.n_images, references_per_class=per_class)
    few = LabelledImages(*(tensor[: case.n_references] for tensor in (task.references.images, task.references.labels)))
    rates = parse_rates(DEFAULT_RATES)
    objective_options = ObjectiveOptions(rates, dtype=dtype, device=str(device), components=case.components)
    return Objective(model, replace(task, references=few), objective_options)


def plain_masks(objective: Objective, composite: CompositeSpec) -> list[Masks]:
    """The masks of every rate, as the product ranks."""
    ranking = objective.ranking(composite)
    return [ranking.masks(ranking.n_pruned(rate)) for rate in objective.options.rates]


@dataclass(frozen=True, slots=True)
class Counted:
    """Correct predictions and seconds at every rate, by who has counted them: `plain`, or a dtype of ours."""

    correct: dict[str, list[Tensor]]
    seconds: dict[str, list[float]]

    def total_s(self, name: str) -> float:
        """Seconds of a curve."""
        return sum(self.seconds[name])

    def auc(self, name: str, rates: Sequence[float]) -> float:
        """Normalised area under accuracy over rate."""
        return area_of([float(correct.double().mean()) for correct in self.correct[name]], rates)


def area_of(accuracies: Sequence[float], rates: Sequence[float]) -> float:
    """Figure `auc` of a curve."""
    from objectives.pruning.curve import weights

    of_rates = weights("auc", rates)
    assert of_rates is not None
    return sum(weight * accuracy for weight, accuracy in zip(of_rates, accuracies, strict=True))


def take_turns(objectives: Mapping[str, Objective], masks: Sequence[Masks], device: torch.device) -> Counted:
    """Plain and ours on the same masks and images."""
    from objectives.pruning.evaluation import Evaluator

    evaluators = {
        dtype: Evaluator(each.network, each.evaluator("search").images, each.batches, DTYPES[dtype])
        for dtype, each in objectives.items()
    }
    counted = Counted(*({name: [] for name in ("plain", *evaluators)} for _ in range(2)))
    for mask in masks:
        turns: dict[str, Callable[[], Tensor]] = {"plain": lambda mask=mask: plain_count(objectives["fp32"], mask)}
        for dtype, evaluator in evaluators.items():
            turns[dtype] = lambda evaluator=evaluator, mask=mask: evaluator.measure(mask).correct
        for name, turn in turns.items():
            clock = Clock(device)
            with clock.running():
                counted.correct[name].append(turn())
            counted.seconds[name].append(clock.seconds)
    return counted


def plain_count(objective: Objective, mask: Masks) -> Tensor:
    """Which search images the dense masked network classifies correctly."""
    from objectives.memory import Batches
    from objectives.pruning.evaluation import correct_predictions
    from objectives.pruning.masking import masked

    network = objective.model.network.to(objective.device)
    images = objective.task.search.to(objective.device)
    with masked(network, objective.network.prunable, mask) as dense:
        return correct_predictions(dense, images, Batches("plain", PLAIN_BATCH["evaluation"]))


# Part 3: a study through the command line.

GRID = HERE / "results" / "cifar10_resnet20.json"  # of cifar10_resnet20.py
NEAR = 0.003


@part
def study(device: torch.device) -> Rows:
    """The 512-point grid on CIFAR ResNet-20, 10 references a class, 1,000 images.

    The plain loop and the exact studies take 32 seeded points (two rules a group, both rankings), and their seconds are
    scaled to 512; the race runs over all of them. Seconds are the search's, without heuristics and confirmation.
    """
    space = seeded_space()
    case = next(cases())
    objective = make_objective(case, "fp32", device)
    plain, aucs = time_plain(objective, space.grid(), device)
    n_points = 512
    scale = n_points / len(aucs)
    yield {"way": "plain", "points_run": len(aucs), "seconds_512": plain * scale}
    exact = json.loads(GRID.read_text())["auc"]
    seconds, values = time_study(case, "bf16", ["--pruner", "race"], None, device)
    best = max(values, key=lambda label: values[label])
    yield {
        "way": "--pruner race --dtype bf16",
        "points_run": n_points,
        "seconds_512": seconds,
        "factor": plain * scale / seconds,
        "completed": len(values),
        "best": best,
        "auc_below_the_grids_best": max(exact.values()) - exact[best],
    }
    for dtype in reversed(DTYPES):
        seconds, values = time_study(case, dtype, ["--exact"], space, device)
        yield {
            "way": f"--exact --dtype {dtype}",
            "points_run": len(aucs),
            "seconds_512": seconds * scale,
            "factor": plain / seconds,
            "largest_auc_difference": max(abs(values[label] - auc) for label, auc in aucs.items()),
        }


def seeded_space() -> DiscreteSpace:
    """Two of the four rules in each group, by a seed."""
    from search_spaces.rules import GROUPS, RULE_DEFAULTS
    from search_spaces.spaces import DiscreteSpace

    generator = random.Random(0)
    return DiscreteSpace("seeded", {group: tuple(generator.sample(tuple(RULE_DEFAULTS), 2)) for group in GROUPS})


def time_plain(
    objective: Objective, composites: Sequence[CompositeSpec], device: torch.device
) -> tuple[float, dict[str, float]]:
    """Seconds of the plain loop, and the AUC of every composite under the product's masks."""
    clock, aucs = Clock(device), {}
    references = objective.task.references.to(device)
    for composite in composites:
        masks = plain_masks(objective, composite)
        with clock.running():
            plain_attribution(objective.network, objective.layer_groups, references, composite)
            counts = [plain_count(objective, mask) for mask in masks]
        rates = objective.options.rates
        aucs[composite.label] = area_of([float(count.double().mean()) for count in counts], rates)
    return clock.seconds, aucs


def time_study(
    case: Case, dtype: str, options: Sequence[str], space: DiscreteSpace | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Seconds of a grid study's search through the command line, and the AUC of its complete trials."""
    from search_spaces.composites import CompositeSpec
    from storage.store import StudyStore

    with tempfile.TemporaryDirectory() as directory:
        path = HERE / "cifar10_resnet20.toml"
        if space is not None:
            path = Path(directory, "seeded.toml")
            lists = {**space.rules, "epsilon": space.epsilon}
            lines = [f"{name} = {json.dumps(list(values))}" for name, values in lists.items()]
            path.write_text("\n".join(["[parameters]", *lines, "abs = [false, true]", ""]))
        url = f"sqlite:///{directory}/s.db"
        launch = ["--study", "s", "--storage", url, "--sampler", "grid", "--space", str(path), "--dtype", dtype]
        launch += ["--model", case.name, "--checkpoint", str(case.model["checkpoint"]), "--data", case.data]
        launch += ["--evaluation-images", str(case.n_images), "--device", str(device), *options]
        launch += ["--references-per-class", str(case.n_references // 10)]
        wall_s, cpu_s = timed_launch(launch)["phases"]["Search"]
        with StudyStore.open(url, read_only=True) as store:
            values = {
                CompositeSpec.from_json(trial.user_attrs["composite"]).label: trial.value
                for trial in store.load("s").get_trials()
                if trial.value is not None and trial.user_attrs["role"] == "search"
            }
    return (cpu_s if device.type == "cpu" else wall_s), values


# Part 4: how many trials a sampler needs.


@part
def tpe(device: torch.device) -> Rows:
    """Trials until an AUC within 0.003 of the grid's best, by seed, as the exactly evaluated grid has them."""
    import optuna

    from hpo.samplers import make_sampler
    from search_spaces.spaces import load_space

    space = load_space(str(HERE / "cifar10_resnet20.toml"))
    aucs = json.loads(GRID.read_text())["auc"]
    wanted = max(aucs.values()) - NEAR

    def trials_needed(sampler: str, n_at_once: int, seed: int) -> int:
        search = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, space, seed))
        for start in range(0, 2 * len(aucs), n_at_once):
            asked = [(trial := search.ask(), space.suggest(trial)) for _ in range(n_at_once)]
            for number, (trial, composite) in enumerate(asked):
                search.tell(trial, aucs[composite.label])
                if aucs[composite.label] >= wanted:
                    return start + number + 1
        return 2 * len(aucs)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for sampler, n_at_once in (("random", 1), ("tpe", 1), ("tpe", 8)):
        needed = [trials_needed(sampler, n_at_once, seed) for seed in range(10)]
        yield {
            "sampler": sampler,
            "trials_at_once": n_at_once,
            "median_trials": statistics.median(needed),
            "trials": sorted(needed),
            "points_near_the_best": sum(value >= wanted for value in aucs.values()),
        }


# Part 5: overhead.


@part
def overhead(device: torch.device) -> Rows:
    """The digits default: CPU milliseconds of a trial beside its computation, and seconds to the first trial.

    Exact, with artifacts, on SQLite, by the local executor; what heuristics and confirmation cost counts as theirs.
    The network is trained in a launch before.
    """
    n_trials = 200
    with tempfile.TemporaryDirectory() as directory:
        always = ["--storage", f"sqlite:///{directory}/s.db", "--exact", "--device", str(device)]
        timed_launch(["--study", "training", "--n-trials", "1", *always])
        for sampler in ("random", "tpe"):
            launch = ["--study", sampler, "--sampler", sampler, *always]
            timed = timed_launch([*launch, "--n-trials", str(n_trials)])
            total_s = sum(timed["phases"][phase][1] for phase in ("Heuristics", "Search", "Confirmation"))
            beside_s = total_s - timed["computing_s"] - timed["asking_s"]
            yield {
                "sampler": sampler,
                "n_trials": n_trials,
                "ms_beside_computing": 1000 * beside_s / n_trials,
                "ms_asking": 1000 * timed["asking_s"] / n_trials,
                "seconds_to_first_trial": timed["first_trial_s"],
            }


# Part 6: growth.


@part
def growth(device: torch.device) -> Rows:
    """Seconds against size, and the exponent of the power law that fits them best.

    Networks and images are random; composites and reference images count in attribution, evaluation images in a curve
    of 20 rates, depth in both.
    """
    epsilons = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    composites = {64: grid()[:64], 256: grid(), 1024: grid(epsilons)[:1024]}
    sizes: dict[str, tuple[Mapping[int, Any], Callable[..., float]]] = {
        "composites": (composites, lambda chosen: attribution_s("cifar_resnet20", chosen, 50, device)),
        "reference images": (
            {n: n for n in (50, 100, 200, 400)},
            lambda n: attribution_s("cifar_resnet20", grid()[:64], n, device),
        ),
        "evaluation images": ({n: n for n in (250, 500, 1000, 2000)}, lambda n: curve_s("cifar_resnet20", n, device)),
        "depth, attribution": (
            {n: f"cifar_resnet{n}" for n in (20, 32, 44, 56)},
            lambda name: attribution_s(name, grid()[:64], 50, device),
        ),
        "depth, curve": (
            {n: f"cifar_resnet{n}" for n in (20, 32, 44, 56)},
            lambda name: curve_s(name, 500, device),
        ),
    }
    for name, (values, measure) in sizes.items():
        seconds = {n: measure(value) for n, value in values.items()}
        yield {"against": name, "seconds": seconds, "exponent": exponent(seconds)}


def exponent(seconds: Mapping[int, float]) -> float:
    """Slope of the line through the logarithms, by least squares."""
    slope, _ = statistics.linear_regression([math.log(n) for n in seconds], [math.log(s) for s in seconds.values()])
    return slope


def attribution_s(name: str, composites: Sequence[CompositeSpec], n_references: int, device: torch.device) -> float:
    """Seconds of the shared engine."""
    from objectives.attribution.shared import SharedAttribution
    from objectives.layer_groups import group_layers

    network, references = random_network(name, 32, n_references, device)
    engine = SharedAttribution(network, group_layers(network), references, 100)
    clock = Clock(device)
    with clock.running():
        engine.prepare(composites)
    return clock.seconds


def curve_s(name: str, n_images: int, device: torch.device) -> float:
    """Seconds of a curve of 20 rates under a random ranking."""
    from objectives.pruning.ranking import rank

    network, images = random_network(name, 32, n_images, device)
    ranking = rank({layer: torch.rand(width) for layer, width in network.components.items()})
    clock = Clock(device)
    with clock.running():
        count_images(network, images, [ranking.masks(ranking.n_pruned(rate / 20)) for rate in range(20)])
    return clock.seconds


# Part 7: the machine's limits.

N_LIMITED = 200  # images


@part
def limits(device: torch.device) -> Rows:
    """Images a second in each kind of work, and what the machine's arithmetic and its memory would allow.

    Both limits are measured: the multiply-adds of a large product of matrices in the same dtype, and the bytes of a
    large copy. An image costs the network's multiply-adds, and every step reads its inputs and writes its outputs once.
    The making of slim networks counts, but not their sizes, which whole curves alone need. Attribution is of 64
    composites, an image of each of which counts as one.
    """
    from objectives.datasets import LabelledImages
    from objectives.pruning.fusion import step_sizes
    from objectives.pruning.slimming import cost, draft

    bytes_a_second = 2 * 2**28 / seconds_of(copying(device), device)
    arithmetic = {dtype: 2 * 2048**3 / seconds_of(product(dtype, device), device) for dtype in DTYPES}
    for name, size in (NETWORKS if device.type == "cpu" else NETWORKS_ON_GPU).items():
        network, images = random_network(name, size, N_LIMITED, device)
        whole = {layer: torch.ones(width, dtype=torch.bool) for layer, width in network.components.items()}
        half = [{layer: torch.rand(len(mask)) >= 0.5 for layer, mask in whole.items()} for _ in range(8)]
        for dtype, of_dtype in DTYPES.items():
            here = LabelledImages(images.images.to(of_dtype, memory_format=torch.channels_last), images.labels)
            for work, masks, stacks in (
                ("unpruned", [whole], False),
                ("slim networks of half the filters", half, False),
                ("half the filters, masks together", half, True),
            ):
                count = partial(count_images, network, here, masks, stacks=stacks)
                drafts = [draft(network, {} if stacks else mask) for mask in masks]
                values_moved = statistics.mean(sum(step_sizes(each.graph)) for each in drafts)
                yield {
                    "network": f"{name}, {size} px",
                    "work": f"{work}, {dtype}",
                    **against_limits(
                        len(masks) * N_LIMITED / seconds_of(count, device),
                        arithmetic[dtype] / (2 * statistics.mean(cost(each).flops for each in drafts)),
                        bytes_a_second / (of_dtype.itemsize * values_moved),
                    ),
                }
        few = LabelledImages(images.images[:N_REFERENCES], images.labels[:N_REFERENCES])
        composites = grid()[:64]
        attribute = partial(attribute_all, network, few, composites)
        n_images = len(composites) * len(few)
        yield {
            "network": f"{name}, {size} px",
            "work": "attribution of 64 composites, fp32",
            **against_limits(
                n_images / seconds_of(attribute, device), arithmetic["fp32"] * n_images / flops(attribute), None
            ),
        }


def count_images(
    network: CanonicalNetwork, images: LabelledImages, masks: Sequence[Masks], *, stacks: bool | None = None
) -> None:
    """Measures masks that nothing is known of, one after the other or together, by default as the device has it."""
    from objectives.memory import Batches
    from objectives.pruning.evaluation import Evaluator

    evaluator = Evaluator(network, images, Batches("evaluation", 100), images.images.dtype, stacks=stacks)
    for index, mask in enumerate(masks):
        evaluator.measure(mask, ahead=masks[index + 1 :])


def attribute_all(network: CanonicalNetwork, references: LabelledImages, composites: Sequence[CompositeSpec]) -> None:
    """Attributes composites together."""
    from objectives.attribution.shared import SharedAttribution
    from objectives.layer_groups import group_layers

    SharedAttribution(network, group_layers(network), references, PLAIN_BATCH["attribution"]).prepare(composites)


def against_limits(achieved: float, by_arithmetic: float, by_memory: float | None) -> dict[str, Any]:
    """Columns of a row: images a second, and the limits of arithmetic and memory, if that one is known."""
    limit = by_arithmetic if by_memory is None else min(by_arithmetic, by_memory)
    return {
        "images_a_second": achieved,
        "limit_of_arithmetic": by_arithmetic,
        "limit_of_memory": "" if by_memory is None else by_memory,
        "bound_by": "arithmetic" if limit == by_arithmetic else "memory",
        "share_of_the_limit": achieved / limit,
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The least that a piece of work takes in three runs, after one that warms up."""
    work()
    clocks = [Clock(device) for _ in range(3)]
    for clock in clocks:
        with clock.running():
            work()
    return min(clock.seconds for clock in clocks)


def copying(device: torch.device) -> Callable[[], object]:
    """Copies 256 MiB."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product(dtype: str, device: torch.device) -> Callable[[], object]:
    """Multiplies two matrices of 2,048 rows and columns."""
    matrix = torch.randn(2048, 2048, device=device).to(DTYPES[dtype])
    return lambda: matrix @ matrix


# Output.


def print_row(row: dict[str, Any]) -> None:
    """Prints a row, one line a value."""
    for name, value in row.items():
        print(f"  {name:26}{value:.4g}" if isinstance(value, float) else f"  {name:26}{value}")
    print(flush=True)


def print_tables() -> None:
    """Prints what has been measured as tables in Markdown, in the order of the parts."""
    order = {name: index for index, name in enumerate(PARTS)}
    paths = (HERE / "results").glob("speed_*.json")
    for path in sorted(paths, key=lambda path: order[path.stem.split("_")[1]]):
        result = json.loads(path.read_text())
        print(f"{path.stem}: {result['device']}, {result['threads']} thread(s), torch {result['torch']}\n")
        for columns, group in itertools.groupby(result["rows"], key=lambda row: tuple(row)):
            print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
            print("|---" * len(columns) + "|")
            for row in group:
                print("| " + " | ".join(shown(row[name]) for name in columns) + " |")
            print()


def shown(value: Any) -> str:
    """A table's cell."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Runs the parts that the command line names, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    given = parser.parse_args()
    if given.table:
        print_tables()
        return
    from objectives.devices import resolve_device

    device = resolve_device(given.device)
    torch.set_num_threads(given.threads)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    suffix = "" if device.type == "cpu" else "_" + "".join(c if c.isalnum() else "-" for c in name.lower())
    for chosen in given.part:
        print(f"{chosen} on {name}, {given.threads} thread(s):")
        path = HERE / "results" / f"speed_{chosen}{suffix}.json"
        rows = []
        for row in PARTS[chosen](device):
            print_row(row)
            rows.append(row)
            result = {"device": name, "threads": given.threads, "torch": torch.__version__, "rows": rows}
            path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
