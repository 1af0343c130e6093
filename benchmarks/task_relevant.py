r"""Task-relevant pruning on the paper's splits of CIFAR-10: LRP against IMP, with and without extra knowledge.

    python benchmarks/task_relevant.py
    python benchmarks/task_relevant.py --network resnet50 --size 32 --data npz:TRAIN.npz,EVAL.npz \
        --images-per-class 5000 --evaluation-images 10000 --epochs 50 --patience 4      # the paper's size

Algorithm 1 of Avé et al. 2025 in four arms: extra knowledge T or none, all-Epsilon relevance (LRP) or weight magnitude
(IMP); 10 iterations in which each layer loses 20 % of what it has left, retraining on P, and adaptation of every size
to F (new subclasses) or to P and F (new classes). Repetitions differ in initial weights, in the images drawn and in
their order in pre-training; the four arms of one share them. The figure is accuracy after adaptation on evaluation
images, its area over parameters the metric; means with 95 % t intervals over repetitions, and paired differences.

Smaller than the paper: CIFAR ResNet-20 instead of ResNet-50 and, by default, 200 of the data pack's 1,000 training
images a class and few epochs. An arm that is measured stays in `benchmarks/results/task_relevant.json` and isn't
measured again; a run that was killed goes on from checkpoints in the cache directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from data_pack import cifar10, data_pack

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

if TYPE_CHECKING:
    from objectives.datasets import Task
    from objectives.models import LoadedModel
    from objectives.objective import Objective
    from search_spaces.task_splits import TaskSplit

RANKERS = {"LRP": "epsilon-abs", "IMP": "weight-l1"}
ARMS = (("T", "LRP"), ("T", "IMP"), ("no T", "LRP"), ("no T", "IMP"))
# Of the options, what doesn't change any figure.
_NOT_SETTINGS = ("output", "device", "threads", "repetitions", "splits", "only", "table")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=Path, default=HERE / "task_relevant.toml", help="TOML, a table each")
    parser.add_argument("--only", metavar="NAME", help="one of the splits")
    parser.add_argument("--network", default="cifar_resnet20", help="of timm, trained from scratch")
    parser.add_argument("--size", type=int, help="pixels of an image; by default the network's own")
    parser.add_argument("--data", help="CIFAR-10 as of `hpo launch`; by default the data pack's")
    parser.add_argument("--images-per-class", type=int, default=200, help="for training, validation included")
    parser.add_argument("--evaluation-images", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10, choices=range(1, 11))
    parser.add_argument("--pretraining-epochs", type=int, default=30, help="at most, on T and P")
    parser.add_argument("--epochs", type=int, default=6, help="at most, of every retraining and adaptation")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a better validation accuracy")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pretraining-learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--references", type=int, default=300, help="images of P that relevance is computed on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "task_relevant.json")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    return parser.parse_args()


class Benchmark:
    """All runs of one set of settings.

    Attributes:
        given: the command line.
        content: of the file of results: settings, and runs by split, repetition and arm.
        cache: directory of checkpoints of these settings.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        from objectives.cache import cache_directory

        self.given = given
        settings = {name: value for name, value in vars(given).items() if name not in _NOT_SETTINGS}
        settings["data"] = given.data or "data pack"
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if given.output.exists():
            self.content = json.loads(given.output.read_text())
            if self.content["settings"] != settings:
                sys.exit(f"{given.output} was measured with {self.content['settings']}; pass another --output.")
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.cache = cache_directory() / "task_relevant" / digest

    def measure(self, splits: dict[str, TaskSplit]) -> None:
        """Whatever isn't measured yet."""
        for repetition in range(self.given.repetitions):
            for name, split in splits.items():
                for extra in ("T", "no T"):
                    runs = {ranker: self.run_of(name, split, repetition, extra, ranker) for ranker in RANKERS}
                    if all("figures" in run for run in runs.values()):
                        continue
                    chosen = split if extra == "T" else split.without_extra()
                    directory = (
                        self.cache
                        / hashlib.blake2b(f"{name} {split} {repetition} {extra}".encode(), digest_size=8).hexdigest()
                    )
                    directory.mkdir(parents=True, exist_ok=True)
                    objective = self.objective(chosen, repetition, directory)
                    for ranker, run in runs.items():
                        if "figures" not in run:
                            self.evaluate(objective, ranker, run)
                            means = [round(row["accuracy"], 3) for row in run["rows"]]
                            print(f"{name}, repetition {repetition + 1}, {extra}, {ranker}:", *means, flush=True)
                    shutil.rmtree(directory)

    def run_of(self, name: str, split: TaskSplit, repetition: int, extra: str, ranker: str) -> dict[str, Any]:
        """What is known of one run; it is added to the results."""
        text = repr(split)
        known = self.content["runs"].setdefault(name, {"split": text, "repetitions": {}})
        if known["split"] != text:
            sys.exit(f"{self.given.output} has another split of the name {name!r}; pass another --output.")
        run: dict[str, Any] = known["repetitions"].setdefault(str(repetition), {}).setdefault(f"{extra}, {ranker}", {})
        return run

    def objective(self, split: TaskSplit, repetition: int, directory: Path) -> Objective:
        """The network that is trained on T and P, to be pruned."""
        from objectives.devices import resolve_device
        from objectives.objective import Objective, ObjectiveOptions
        from objectives.pretraining import pretrain
        from objectives.procedures.task_relevant import training_options
        from search_spaces.procedures import TaskRelevant

        given = self.given
        model, task = self.start(split, repetition, directory)
        procedure = TaskRelevant(
            pretrain_epochs=given.pretraining_epochs,
            finetune_epochs=given.epochs,
            finetune_learning_rate=given.learning_rate,
            finetune_batch_size=given.batch_size,
            patience=given.patience,
        )
        pretraining = replace(
            training_options(procedure, seed=repetition),
            n_epochs=given.pretraining_epochs,
            learning_rate=given.pretraining_learning_rate,
        )
        model.network.to(resolve_device(given.device))
        assert task.split is not None, "it is a split's"
        pretrain(model.network, task.split, pretraining, checkpoint=directory / "pretraining.safetensors")
        model.network.eval()
        options = ObjectiveOptions(
            procedure.rates[: given.iterations + 1],
            procedure,
            ranking="layer",
            abs_scope="element",
            output_relevance="logit",
            device=given.device,
            checkpoints=directory,
        )
        return Objective(model, task, options)

    def start(self, split: TaskSplit, repetition: int, directory: Path) -> tuple[LoadedModel, Task]:
        """A network with initial weights, and its images."""
        from objectives.cifar_resnets import CIFAR10_CLASSES
        from objectives.datasets import load_task
        from objectives.datasets.task_splits import split_task

        given = self.given
        source = given.data or cifar10(data_pack())
        images = load_task(
            source,
            self.untrained(len(CIFAR10_CLASSES), repetition, directory),
            references_per_class=given.images_per_class,
            evaluation_images=given.evaluation_images,
            confirmation_share=0,
            seed=repetition,
        )
        model = self.untrained(len(split.outputs(CIFAR10_CLASSES)), repetition, directory)
        task = split_task(
            replace(images, class_names=CIFAR10_CLASSES),
            split,
            n_outputs=model.num_classes,
            seed=repetition,
            n_references=given.references,
        )
        return model, task

    def untrained(self, n_outputs: int, repetition: int, directory: Path) -> LoadedModel:
        """A network with initial weights of a repetition's own."""
        import safetensors.torch
        import timm

        from objectives.models import load_model
        from search_spaces.files import write_atomically

        options = {"num_classes": n_outputs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(repetition)
            network = timm.create_model(self.given.network, pretrained=False, **options)
        path = directory / "untrained.safetensors"
        write_atomically(path, safetensors.torch.save(network.state_dict()))
        return load_model(self.given.network, checkpoint=path, options=options, size=self.given.size, crop=1.0)

    def evaluate(self, objective: Objective, ranker: str, run: dict[str, Any]) -> None:
        """One arm: figures, and a row for each size."""
        from search_spaces.heuristics import heuristic

        evaluation = objective.evaluate(heuristic(RANKERS[ranker]))
        run["rows"] = [
            {name: value for name, value in step.to_json().items() if name != "left"} for step in evaluation.steps
        ]
        run["figures"] = evaluation.figures
        run["seconds"] = evaluation.seconds  # since it was last begun
        self.save()

    def save(self) -> None:
        """Writes the results, wholly or not at all."""
        from search_spaces.files import write_atomically

        write_atomically(self.given.output, (json.dumps(self.content, indent=1) + "\n").encode())

    def print_tables(self) -> None:
        """Of repetitions that are finished."""
        for name, known in self.content["runs"].items():
            arms = [f"{extra}, {ranker}" for extra, ranker in ARMS]
            finished = [
                runs for runs in known["repetitions"].values() if all("figures" in runs.get(arm, {}) for arm in arms)
            ]
            if finished:
                print_table(name, arms, finished)


def print_table(name: str, arms: list[str], repetitions: list[dict[str, Any]]) -> None:
    """Accuracy after adaptation (and of P before it) by size, the metric, and the paper's comparisons."""
    rows = {arm: [runs[arm]["rows"] for runs in repetitions] for arm in arms}
    print(f"\n{name}: accuracy after adaptation (before it, on P), {len(repetitions)} repetitions\n")
    print("|", " | ".join(["parameters, mean", *arms]), "|")
    print("|--:" + "|---" * len(arms) + "|")
    for index in range(len(rows[arms[0]][0])):
        parameters = statistics.mean(run[index]["parameters"] for arm in arms for run in rows[arm])
        cells = [
            f"{interval([run[index]['accuracy'] for run in rows[arm]])} "
            f"({statistics.mean(run[index]['accuracy_task'] for run in rows[arm]):.3f})"
            for arm in arms
        ]
        print("|", " | ".join([f"{parameters / 1e6:.3f} M", *cells]), "|")
    areas = {arm: [runs[arm]["figures"]["auc_parameters"] for runs in repetitions] for arm in arms}
    print("|", " | ".join(["area", *(interval(areas[arm]) for arm in arms)]), "|")
    print(f"\n| {name}: area of the first minus that of the second | mean, 95 % interval |\n|---|---|")
    for one, other in (
        ("T, LRP", "T, IMP"),
        ("T, LRP", "no T, LRP"),
        ("T, IMP", "no T, IMP"),
        ("T, LRP", "no T, IMP"),
        ("no T, LRP", "no T, IMP"),
    ):
        gains = [a - b for a, b in zip(areas[one], areas[other], strict=True)]
        print(f"| {one} - {other} | {interval(gains, signed=True)} |")


def interval(values: list[float], *, signed: bool = False) -> str:
    """Mean and 95 % t interval of its half width; no interval of one value."""
    from scipy.stats import t

    mean = f"{statistics.mean(values):{'+' if signed else ''}.3f}"
    if len(values) < 2:
        return mean
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.3f}"


def main() -> None:
    """Measures what isn't measured yet, and prints the tables."""
    given = arguments()
    from search_spaces.errors import PruningHPOError
    from search_spaces.task_splits import read_splits

    torch.set_num_threads(given.threads)
    benchmark = Benchmark(given)
    try:
        splits = read_splits(given.splits)
        if given.only is not None:
            if given.only not in splits:
                sys.exit(f"{given.splits} has no split {given.only!r}; it has {', '.join(splits)}.")
            splits = {given.only: splits[given.only]}
        if not given.table:
            benchmark.measure(splits)
    except PruningHPOError as error:
        sys.exit(str(error))
    benchmark.print_tables()


if __name__ == "__main__":
    main()
