"""Comparisons: criteria against one another over random subsets of classes and seeds (Yeom et al. 2021, section 4.2.2).

A run is a subset of the classes and a seed of the references and the split. Every criterion prunes the same network,
restricted to the subset's outputs, with the same references, and is measured on the same images, so that criteria are
compared run by run, as in the paper's Figures 8 to 10. Where a task's split says what each class is for, a run is a
seed alone, also of a new network's weights (Avé et al. 2025, section 4). A folder keeps what is computed:

==================  ==================================================================================================
`rows.jsonl`        the settings, then a row a run and criterion; written whole after each of them, and gone on with
`rows.csv`          the same rows as a table
`summary.json`      means and paired differences with their intervals
`comparison.png`    mean curves, and each criterion's figure over the first one's, a dot a run
==================  ==================================================================================================
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hpo.confirmation import paired_bootstrap
from hpo.errors import ComparisonFileError, ConfigurationError
from hpo.plots import comparison_png
from search_spaces.choices import ImageSet
from search_spaces.errors import PruningHPOError
from search_spaces.files import write_atomically
from search_spaces.reasons import message_of
from storage.identity import differences
from storage.locks import file_lock

if TYPE_CHECKING:
    from hpo.config import LaunchConfiguration
    from hpo.problem import LoadedProblem
    from hpo.progress import Progress
    from objectives.models import LoadedModel
    from objectives.objective import Evaluation
    from search_spaces.criteria import Ranker

__all__ = [
    "Comparison",
    "Contestant",
    "Estimate",
    "Row",
    "Run",
    "Runs",
    "Standing",
    "compare_criteria",
    "draw_subsets",
    "parse_seeds",
]

_ROWS = "rows.jsonl"
_LOCK = ".lock"
_FORMAT = "pruning-hpo/comparison/1"
_N_SUBSETS = 5
_CLASSES_PER_SUBSET = 3
# What decides a row's figures, beside the network and the run.
_SETTINGS = (
    "data",
    "class_map",
    "references_per_class",
    "sample",
    "evaluation_images",
    "confirmation_share",
    "rates",
    "components",
    "ranking",
    "abs_scope",
    "output_relevance",
    "dtype",
    "batch_size",
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A criterion or composite that is compared.

    Attributes:
        name: By which the user calls it.
        ranker: What ranks components.
        layer_groups: Layer group of each layer that a composite was found with; None where any will do.
    """

    name: str
    ranker: "Ranker"
    layer_groups: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What all criteria are compared on at a time.

    Attributes:
        classes: Outputs of the network that the task keeps, ascending; none where a task's split names them.
        seed: Of the references and the split, and of a network that is trained on one.
    """

    classes: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        seed = f"seed {self.seed}"
        return f"classes {','.join(map(str, self.classes))}, {seed}" if self.classes else seed


@dataclass(frozen=True, slots=True)
class Runs:
    """Which runs a comparison has: every subset with every seed, or with a task's split every seed.

    Attributes:
        n_subsets: Distinct subsets of the classes; None where the usual number will do.
        classes_per_subset: Size of each; likewise.
        seeds: Of references and split, and of a network that is trained on one; at least one.
        subset_seed: Of the draw of subsets, and of the bootstrap.

    Raises:
        ConfigurationError: A number is out of range.
    """

    n_subsets: int | None = None
    classes_per_subset: int | None = None
    seeds: tuple[int, ...] = (0,)
    subset_seed: int = 0

    def __post_init__(self) -> None:
        if self.n_subsets is not None and self.n_subsets < 1:
            raise ConfigurationError(f"`--n-subsets` must be at least 1, but got {self.n_subsets}.")
        if self.classes_per_subset is not None and self.classes_per_subset < 2:
            raise ConfigurationError(f"`--classes-per-subset` must be at least 2, but got {self.classes_per_subset}.")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(f"`--seeds` must name numbers from 0 on, each once, but got {list(self.seeds)}.")

    def of(self, classes: Sequence[int]) -> list[Run]:
        """All runs over these classes, subset by subset."""
        n_subsets = _N_SUBSETS if self.n_subsets is None else self.n_subsets
        subsets = draw_subsets(classes, self.size, n_subsets, seed=self.subset_seed)
        return [Run(subset, seed) for subset in subsets for seed in self.seeds]

    def of_split(self) -> list[Run]:
        """A run a seed, of a task whose split says what each class is for.

        Raises:
            ConfigurationError: Subsets of the classes are asked for.
        """
        for option, value in (("n-subsets", self.n_subsets), ("classes-per-subset", self.classes_per_subset)):
            if value is not None:
                raise ConfigurationError(
                    f"`--{option} {value}` draws subsets of the classes, but `--splits` says what each class is for; "
                    "leave it out, and choose runs by `--seeds`."
                )
        return [Run((), seed) for seed in self.seeds]

    @property
    def size(self) -> int:
        """Classes of each subset."""
        return _CLASSES_PER_SUBSET if self.classes_per_subset is None else self.classes_per_subset


@dataclass(frozen=True, slots=True)
class Row:
    """One criterion in one run.

    Attributes:
        classes: Of the run.
        seed: Of the run.
        criterion: Its name.
        key: Of what ranks, see `Ranker.key`.
        data: Fingerprint of the run's images.
        network: Fingerprint of the unpruned network; None in files of earlier versions.
        n_images: Images that accuracy was measured on.
        figures: Every figure of the curve by name; empty where it failed.
        rates: Pruning rates of the curve.
        accuracies: Accuracy at each rate; empty where it failed.
        seconds: What it took.
        failure: Why there is no curve; None where there is one.
    """

    classes: tuple[int, ...]
    seed: int
    criterion: str
    key: str
    data: str
    n_images: int
    figures: Mapping[str, float]
    rates: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: float
    failure: str | None = None
    network: str | None = None

    @property
    def run(self) -> Run:
        """The run that it is of."""
        return Run(self.classes, self.seed)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**{**value, **{name: tuple(value[name]) for name in ("classes", "rates", "accuracies")}})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over runs with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a criterion does.

    Attributes:
        criterion: Its name.
        figure: Mean of its figure.
        difference: Mean of its figure minus the first criterion's in the same run; None of the first itself.
        n_better: Runs in which it is better than the first.
        n_failed: Runs in which it failed.
    """

    criterion: str
    figure: Estimate
    difference: Estimate | None
    n_better: int
    n_failed: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Criteria against the first of them.

    Attributes:
        metric: Figure that they are compared by.
        n_runs: All runs.
        n_compared: Runs in which no criterion failed; the standings are of these.
        standings: In the order of the criteria.
        values: Criterion -> its figure in each of these runs.
        curves: Criterion -> rates, and mean accuracies over these runs.
    """

    metric: str
    n_runs: int
    n_compared: int
    standings: tuple[Standing, ...]
    values: Mapping[str, tuple[float, ...]]
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]

    @classmethod
    def of(cls, rows: Iterable[Row], criteria: Sequence[str], *, metric: str, seed: int) -> Self:
        """From a row of each criterion in each run.

        Runs are resampled, whole: criteria are always seen on the same ones, and a run counts once, whatever classes it
        shares with others. Over a handful of runs such intervals are too narrow.

        Args:
            rows: Of all criteria and runs.
            criteria: Names; the others are compared to the first.
            metric: Figure to compare by.
            seed: Of the bootstrap.

        Raises:
            ConfigurationError: There is no run in which no criterion failed.
        """
        by_run: dict[Run, dict[str, Row]] = {}
        for row in rows:
            by_run.setdefault(row.run, {})[row.criterion] = row
        compared = [own for own in by_run.values() if all(own[name].failure is None for name in criteria)]
        if not compared:
            failure = next(row.failure for own in by_run.values() for row in own.values() if row.failure is not None)
            raise ConfigurationError(f"A criterion failed in every run, so that there is nothing to compare: {failure}")
        values = np.array([[own[name].figures[metric] for name in criteria] for own in compared])
        means = paired_bootstrap(values, seed=seed)
        gains = paired_bootstrap(values - values[:, :1], seed=seed)
        standings = [
            Standing(
                criterion=name,
                figure=Estimate(means[place].difference, means[place].low, means[place].high),
                difference=None
                if place == 0
                else Estimate(gains[place].difference, gains[place].low, gains[place].high),
                n_better=int((values[:, place] > values[:, 0]).sum()),
                n_failed=sum(own[name].failure is not None for own in by_run.values()),
            )
            for place, name in enumerate(criteria)
        ]
        curves = {}
        for name in criteria:
            accuracies = np.mean([own[name].accuracies for own in compared], axis=0)
            curves[name] = (compared[0][name].rates, tuple(accuracies.tolist()))
        of_criteria = {name: tuple(values[:, place].tolist()) for place, name in enumerate(criteria)}
        return cls(metric, len(by_run), len(compared), tuple(standings), of_criteria, curves)

    def to_json(self) -> dict[str, Any]:
        """JSON form, without the values of single runs."""
        return {
            "metric": self.metric,
            "n_runs": self.n_runs,
            "n_compared": self.n_compared,
            "standings": [asdict(standing) for standing in self.standings],
            "curves": {
                name: {"rates": list(rates), "accuracies": list(accuracies)}
                for name, (rates, accuracies) in self.curves.items()
            },
        }


def draw_subsets(classes: Sequence[int], size: int, count: int, *, seed: int) -> list[tuple[int, ...]]:
    """Distinct random subsets of the classes, each ascending; a larger count draws the same ones first.

    Raises:
        ConfigurationError: There are not so many.
    """
    n_there_are = math.comb(len(classes), size)
    if count > n_there_are:
        raise ConfigurationError(
            f"Of {len(classes)} classes there are {n_there_are} subsets of {size}, fewer than `--n-subsets {count}`; "
            "change `--classes-per-subset`, or lower it."
        )
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        places = generator.choice(len(classes), size, replace=False)
        drawn[tuple(sorted(classes[place] for place in places))] = None
    return list(drawn)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of `0,1,2`.

    Raises:
        ConfigurationError: They are no whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"`--seeds` must be whole numbers separated by commas, but got {text!r}.") from None


def compare_criteria(
    configuration: "LaunchConfiguration",
    contestants: Sequence[Contestant],
    runs: Runs,
    folder: Path,
    progress: "Progress",
    *,
    layer_groups: Mapping[str, tuple[str, ...]] | None = None,
    images: ImageSet = "search",
) -> Comparison:
    """Compare criteria, and keep everything in a folder; what is there already is not computed again.

    Args:
        configuration: Network, images, procedure and metric; of its classes, or of all that have images, the subsets
            are drawn, unless there is a split.
        contestants: At least two; the others are compared to the first.
        runs: Which there are.
        folder: To write to; made where it is missing.
        progress: Whom to tell how far it is.
        layer_groups: Name patterns of the layers of each group; None groups layers by depth.
        images: To measure accuracy on.

    Raises:
        ConfigurationError: There are too few classes, subsets of a split's classes are asked for, or a composite was
            found with other layer groups.
        ComparisonFileError: The folder holds something else, is used by another comparison, or cannot be written.
        ObjectiveError: The network or the images cannot be used, or the network's training on a split diverges.
    """
    from hpo.problem import load_network
    from objectives.datasets import known_classes

    of_split = None if configuration.splits is None else runs.of_split()
    progress.phase("Loading network and images")
    model = load_network(configuration)
    classes: Sequence[int] = ()
    if of_split is None:
        chosen, class_map = configuration.classes, configuration.class_map
        classes = known_classes(configuration.data, model, classes=chosen, class_map=class_map)
    every = runs.of(classes) if of_split is None else of_split
    settings = _settings(configuration, model, classes, runs, layer_groups, images)
    with _RowsFile.opened(folder, settings) as file:
        wanted = [(run, contestant) for run in every for contestant in contestants]
        n_done = sum(file.row(run, contestant) is not None for run, contestant in wanted)
        progress.phase("Comparing", len(wanted), n_done)
        for run in every:
            left = [contestant for contestant in contestants if file.row(run, contestant) is None]
            if left:
                loaded = _load(configuration, run, model, layer_groups)
                _check(loaded, contestants, file.of_run(run), run)
                _compare_run(loaded, run, left, images, file, progress, n_done)
                n_done += len(left)
        rows = [row for run, contestant in wanted if (row := file.row(run, contestant)) is not None]
        names = [contestant.name for contestant in contestants]
        comparison = Comparison.of(rows, names, metric=configuration.metric, seed=runs.subset_seed)
        _write(folder / "rows.csv", _csv(rows))
        _write(folder / "summary.json", (json.dumps(comparison.to_json(), indent=2) + "\n").encode())
        _write(folder / "comparison.png", comparison_png(comparison.values, comparison.curves, comparison.metric))
        return comparison


def _load(
    configuration: "LaunchConfiguration",
    run: Run,
    model: "LoadedModel",
    layer_groups: Mapping[str, tuple[str, ...]] | None,
) -> "LoadedProblem":
    from hpo.problem import load_problem

    if configuration.splits is not None:  # a new network has initial weights of its own in each run
        return load_problem(replace(configuration, seed=run.seed), layer_groups)
    return load_problem(replace(configuration, classes=run.classes, seed=run.seed), layer_groups, model=model)


def _check(problem: "LoadedProblem", contestants: Sequence[Contestant], known: Sequence[Row], run: Run) -> None:
    """Refuse composites of other layer groups, and images and networks that are not those of the run's other rows."""
    groups = problem.objective.layer_groups
    for contestant in contestants:
        if contestant.layer_groups is not None and differences(dict(contestant.layer_groups), dict(groups)):
            raise ConfigurationError(
                f"{contestant.name!r} was found with other layer groups than this network's; pass its network, and its "
                "`--space` where that has groups of its own."
            )
    for row in known:
        if row.data != problem.task.fingerprint:
            raise ComparisonFileError(
                f"The images of {run} are not those that {row.criterion} was measured on; choose another folder."
            )
        if row.network not in (None, problem.model.fingerprint):
            raise ComparisonFileError(
                f"The network of {run} was trained anew and is not the one that {row.criterion} pruned; choose another "
                "folder."
            )


def _compare_run(
    problem: "LoadedProblem",
    run: Run,
    contestants: Sequence[Contestant],
    images: ImageSet,
    file: "_RowsFile",
    progress: "Progress",
    n_done: int,
) -> None:
    from hpo.progress import TrialReport
    from objectives.errors import RelevanceError, RepairError, TrainingError

    with suppress(PruningHPOError):  # what fails here fails again below, where its criterion takes the blame
        problem.prepare([contestant.ranker for contestant in contestants])
    for number, contestant in enumerate(contestants, start=n_done):
        try:
            row = _row(run, contestant, problem, problem.evaluate(contestant.ranker, images))
        except (RelevanceError, RepairError, TrainingError) as error:
            row = _row(run, contestant, problem, None, message_of(error))
        file.add(row)
        value = row.figures.get(problem.configuration.metric)
        remark = "" if row.failure is None else f"failed: {row.failure}"
        label = f"{contestant.name}, {run}"
        failed = row.failure is not None
        progress.trial(TrialReport(number, label, value, row.seconds, remark, None, None, failed))


def _row(
    run: Run,
    contestant: Contestant,
    problem: "LoadedProblem",
    evaluation: "Evaluation | None",
    failure: str | None = None,
) -> Row:
    return Row(
        classes=run.classes,
        seed=run.seed,
        criterion=contestant.name,
        key=contestant.ranker.key,
        data=problem.task.fingerprint,
        network=problem.model.fingerprint,
        n_images=0 if evaluation is None else len(evaluation.image_auc),
        figures={} if evaluation is None else dict(evaluation.figures),
        rates=problem.objective.options.rates,
        accuracies=() if evaluation is None else evaluation.curve.accuracies,
        seconds=0.0 if evaluation is None else sum(evaluation.seconds.values()),
        failure=failure,
    )


def _settings(
    configuration: "LaunchConfiguration",
    model: "LoadedModel",
    classes: Sequence[int],
    runs: Runs,
    layer_groups: Mapping[str, tuple[str, ...]] | None,
    images: ImageSet,
) -> dict[str, Any]:
    """What all rows of a folder share; more criteria, subsets and seeds may be added to them."""
    from objectives.repair.repairer import FORM

    procedure, repair = configuration.procedure_spec(), configuration.repair_spec()
    subsets: dict[str, Any] = {"classes": list(classes), "classes_per_subset": runs.size}
    settings = {
        **(subsets if configuration.splits is None else {"split": configuration.splits.to_json()}),
        "model": {"name": model.name, "options": dict(model.options), "fingerprint": model.fingerprint},
        "preprocessing": model.preprocessing.to_json(),
        "subset_seed": runs.subset_seed,
        "layer_groups": layer_groups,
        "images": images,
        "procedure": {"name": procedure.name, **procedure.options},
        "repair": str(repair),
        **({"repair_form": FORM} if repair else {}),
        **{name: getattr(configuration, name) for name in _SETTINGS},
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


class _RowsFile:
    """The rows of a comparison, on disk and in memory; `opened` keeps other processes away."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / _ROWS
        self._head = {"format": _FORMAT, "settings": settings}
        self._rows: dict[tuple[Run, str, str], Row] = {}

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, settings: Mapping[str, Any]) -> Iterator["_RowsFile"]:
        """Those of a folder, which is made where it is missing.

        Raises:
            ComparisonFileError: The folder holds something else, or a comparison of other settings; another process
                writes to it; it cannot be written.
        """
        file = cls(folder, settings)
        try:
            if folder.exists() and not (folder.is_dir() and (file._path.exists() or _is_new(folder))):
                raise ComparisonFileError(f"{str(folder)!r} is there and holds no comparison; choose another folder.")
            folder.mkdir(parents=True, exist_ok=True)
        except ComparisonFileError:
            raise
        except OSError as error:
            raise _unwritable(folder, error) from error
        with file_lock(folder / _LOCK, timeout_s=0) as is_ours:
            if not is_ours:
                raise ComparisonFileError(
                    f"Another `hpo compare` is writing to {str(folder)!r}; wait for its end or choose another folder."
                )
            file._read()
            yield file

    def row(self, run: Run, contestant: Contestant) -> Row | None:
        """What is known of a criterion in a run."""
        return self._rows.get((run, contestant.name, contestant.ranker.key))

    def of_run(self, run: Run) -> list[Row]:
        """All rows of a run, also of criteria that are not compared now."""
        return [row for (of, _, _), row in self._rows.items() if of == run]

    def add(self, row: Row) -> None:
        """Keep a row; on disk when this returns."""
        self._rows[row.run, row.criterion, row.key] = row
        lines = [self._head, *(each.to_json() for each in self._rows.values())]
        _write(self._path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())

    def _read(self) -> None:
        if not self._path.exists():
            return
        try:
            head, *lines = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            stored = head["settings"] if head["format"] == _FORMAT else None
            rows = [Row.from_json(line) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ComparisonFileError(
                f"{str(self._path)!r} is damaged, or no comparison; remove it or choose another folder."
            ) from error
        different = differences(stored, self._head["settings"])
        if different:
            more = f" ({len(different)} settings differ)" if len(different) > 1 else ""
            # A name, such as the procedure's, explains the options that differ with it.
            first = min(different, key=lambda difference: not difference.key.endswith(".name"))
            folder = str(self._path.parent)
            raise ComparisonFileError(
                f"{folder!r} holds a comparison of other settings: {first}{more}; choose another folder."
            )
        self._rows = {(row.run, row.criterion, row.key): row for row in rows}


def _is_new(folder: Path) -> bool:
    return all(path.name == _LOCK for path in folder.iterdir())


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ComparisonFileError:
    return ComparisonFileError(
        f"{str(path)!r} cannot be written: {error.strerror}; make room or choose another folder."
    )


def _csv(rows: Sequence[Row]) -> bytes:
    """A row a line: the run, the criterion, every figure and the accuracy at every rate."""
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    own = ["classes", "seed", "criterion", "images", "seconds", "failure"]
    table.writerow([*own, *figures, *(f"accuracy {rate:g}" for rate in rows[0].rates)])
    for row in rows:
        said = [" ".join(map(str, row.classes)), row.seed, row.criterion, row.n_images, row.seconds, row.failure or ""]
        table.writerow([*said, *(row.figures.get(name, "") for name in figures), *row.accuracies])
    return text.getvalue().encode()
