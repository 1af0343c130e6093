"""The configuration of a study: every option of `hpo launch` with its reader, its help text and its default.

A field of `LaunchConfiguration` is declared once; the command line, the keys of a TOML file and the copy saved with the
study all follow from that declaration.
"""

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hpo.errors import ConfigurationError
from objectives.options import parse_option
from objectives.pruning.rates import DEFAULT_RATES, parse_rates
from search_spaces.choices import (
    AbsScope,
    AttributionEngine,
    Components,
    Dtype,
    OutputRelevance,
    RankingScope,
    ReferenceSampling,
)
from search_spaces.errors import PruningHPOError
from search_spaces.imports import is_import_path
from search_spaces.procedures import (
    BATCH_SIZE,
    LEARNING_RATE,
    LEAST_SHARE,
    PROCEDURES,
    Dynamic,
    ProcedureSpec,
    PruneAndGrow,
    TaskRelevant,
    procedure_from_json,
)
from search_spaces.repairs import REPAIRS, RepairSpec
from search_spaces.suggestions import did_you_mean
from search_spaces.task_splits import TaskSplit, read_split

__all__ = [
    "DEFAULT_CPUS_PER_TRIAL",
    "ExecutorName",
    "LaunchConfiguration",
    "OPTIONS",
    "Option",
    "Pruner",
    "Section",
    "given_fields",
    "parse_seconds",
    "resolve",
]

Section = Literal["study", "search", "execution", "model", "data", "objective"]

ExecutorName = Literal["local", "ray"]
"""Where trials run."""

Pruner = Literal["none", "race"]
"""Whether trials that can't become the best are given up."""

DEFAULT_CPUS_PER_TRIAL = 1
"""What a worker of Ray computes with, where `--cpus-per-trial` does not say."""

_DEFAULT_MODEL = "digits_cnn"
_DEFAULT_DATA = "digits"
_DEFAULT_N_TRIALS = 100
_DEFAULT_N_TRIALS_DIGITS = 60
_DEFAULT_TRIALS_PER_BATCH = 8

_ABS_SCOPES = get_args(AbsScope)
_COMPONENTS = get_args(Components)
_RANKINGS = get_args(RankingScope)
_PROCEDURE_OPTIONS = {
    name: tuple(field.name for field in dataclasses.fields(procedure)) for name, procedure in PROCEDURES.items()
}
_DYNAMIC = Dynamic()
_PRUNE_AND_GROW = PruneAndGrow()
_TASK_RELEVANT = TaskRelevant()
# By name of the procedure: the paper's choices, where they aren't our usual ones.
_DEFAULTS_OF: Mapping[str, Mapping[str, Any]] = {
    TaskRelevant.name: {
        "metric": "auc_parameters",
        "ranking": "layer",
        "abs_scope": "element",
        "output_relevance": "logit",
        "references_per_class": 100,
    }
}
_ALWAYS_TRAIN = tuple(name for name, procedure in PROCEDURES.items() if procedure().fine_tunes)
_OF_PROCEDURES = frozenset(itertools.chain(*_PROCEDURE_OPTIONS.values()))
_OF_FINE_TUNING = ("finetune_learning_rate", "finetune_batch_size")
_ATTRIBUTIONS = get_args(AttributionEngine)
_DTYPES = get_args(Dtype)
_EXECUTORS = get_args(ExecutorName)
_OF_RAY = ("workers", "gpus-per-trial", "cpus-per-trial", "ray-address", "trial-timeout")
_LEAST_CPUS = 0.01  # smaller ones make thousands of workers
_PRUNERS = get_args(Pruner)
_OUTPUT_RELEVANCES = get_args(OutputRelevance)
_SAMPLES = get_args(ReferenceSampling)


@dataclass(frozen=True, slots=True)
class Option:
    """How one field of `LaunchConfiguration` is set.

    Attributes:
        name: Name of the option and of the TOML key: `n-trials` for `n_trials`.
        field: Name of the field.
        section: Which commands share it.
        help: One line for `--help`.
        metavar: What stands for the value in `--help`.
        default: The default in words.
        multiple: Given once per value on the command line.
        is_flag: Given without a value on the command line.
        read: Reads a string of the command line or a value of a TOML file; raises ValueError saying what it wants.
    """

    name: str
    field: str
    section: Section
    help: str
    metavar: str
    default: str
    multiple: bool
    is_flag: bool
    read: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text")
    return value.strip()


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _whole(minimum: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        wanted = f"must be a whole number of at least {minimum}"
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(wanted)
        try:
            number = int(value)
        except ValueError:
            raise ValueError(wanted) from None
        if number < minimum:
            raise ValueError(wanted)
        return number

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _between(low: float, high: float, wanted: str) -> Callable[[Any], float]:
    """Reader of a number in [low, high)."""

    def read(value: Any) -> float:
        number = _number(value)
        if not low <= number < high:
            raise ValueError(wanted)
        return number

    return read


def _cpus(value: Any) -> float:
    number = _number(value)
    if number < _LEAST_CPUS:
        raise ValueError(f"must be a number of at least {_LEAST_CPUS:g}")
    return number


def _items(value: Any) -> list[Any]:
    """Parts of `a,b,c` or of a TOML array."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(_number(item) for item in _items(value))


def _deviations(value: Any) -> tuple[float, ...]:
    numbers = _numbers(value)
    if min(numbers) <= 0:
        raise ValueError("must hold numbers above 0")
    return numbers


def _size(value: Any) -> tuple[int, int]:
    parts = re.split(r"[x,]", value) if isinstance(value, str) else _items(value)
    try:
        edges = [_whole(1)(part) for part in parts]
    except ValueError:
        edges = []
    if len(edges) not in (1, 2):
        raise ValueError("must be an edge in pixels such as 224, or HEIGHTxWIDTH such as 224x160")
    return edges[0], edges[-1]


def _classes(value: Any) -> tuple[int | str, ...]:
    classes = [int(item) if isinstance(item, str) and item.isdecimal() else item for item in _items(value)]
    if not all(
        (isinstance(item, int) and not isinstance(item, bool)) or (isinstance(item, str) and item) for item in classes
    ):
        raise ValueError("must be class indices or class names separated by commas")
    if len(set(classes)) != len(classes):
        raise ValueError("must name each class once")
    if len(classes) < 2:
        raise ValueError("must name at least two classes")
    return tuple(classes)


def _choice(names: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return str(value)

    return read


def _executor(value: Any) -> str:
    if value not in _EXECUTORS:
        raise ConfigurationError(f"Unknown executor {value!r}.{did_you_mean(str(value), _EXECUTORS)}")
    return str(value)


def _gpus(value: Any) -> float:
    number = _number(value)
    if number < 0 or (number > 1 and number != int(number)):
        raise ValueError("must be 0, a share of a GPU such as 0.25, or a whole number")
    return number


def _ray_address(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(r"auto|[^/\s]+:\d+", value) is None:
        raise ValueError("must be auto or HOST:PORT")
    return value


def _rates(value: Any) -> tuple[float, ...]:
    # Whatever is wrong with rates is said by their own parser, in full.
    text = value if isinstance(value, str) else ",".join(str(item) for item in _items(value))
    return parse_rates(text)


def parse_seconds(value: Any) -> float:
    """Seconds of a duration such as 90, 90s, 30m or 2h.

    Raises:
        ValueError: It is none; the message goes on from the option's name.
    """
    wanted = "must be a duration above 0, such as 90, 90s, 30m or 2h"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value).strip())
    if match is None or isinstance(value, bool) or float(match[1]) == 0:
        raise ValueError(wanted)
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _split(value: Any) -> TaskSplit:
    if isinstance(value, TaskSplit):
        return value
    return TaskSplit.from_toml(value) if isinstance(value, Mapping) else read_split(_text(value))


def _device(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _model_options(value: Any) -> tuple[tuple[str, Any], ...]:
    """Sorted pairs of NAME=VALUE texts, of pairs, or of a TOML table."""
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    parts = [value] if isinstance(value, str) else value
    return tuple(sorted(dict(parse_option(part) if isinstance(part, str) else part for part in parts).items()))


def _option(
    section: Section,
    help: str,
    *,
    read: Callable[[Any], Any],
    metavar: str,
    default: Any = None,
    shown: str = "",
    name: str | None = None,
    multiple: bool = False,
    is_flag: bool = False,
    private: bool = False,
) -> Any:
    """A dataclass field that carries its `Option`; `shown` words a default that depends on other options."""
    metadata = {"section": section, "help": help, "read": read, "metavar": metavar, "name": name}
    metadata |= {"multiple": multiple, "is_flag": is_flag}
    metadata["default"] = shown or ("" if default is None or is_flag else str(default))
    return dataclasses.field(default=default, repr=not private, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfiguration:
    """Everything that `hpo launch` was asked for, read and checked. Made by `resolve`.

    Checked here is what needs neither network nor data nor database; those are checked where they are loaded.
    """

    study: str = _option("study", "Name of the study.", read=_text, metavar="NAME", default="", shown="MODEL-DATA")
    storage: str = _option(
        "study",
        "Database of studies, any URL that Optuna takes.",
        read=_text,
        metavar="URL",
        default="",
        shown="$HPO_STORAGE, else a SQLite file in your data directory",
        private=True,
    )

    space: str | None = _option(
        "search",
        "What may be searched: a registered space (see `hpo spaces`), with +repair or +repair-strength behind it how "
        "pruned networks are repaired, too; a TOML file, or package.module:object.",
        read=_text,
        metavar="SPACE",
        shown="vit for vision transformers, else cnn",
    )
    sampler: str = _option(
        "search",
        "grid (every distinct point once), tpe, random, package.module:Class, or optunahub:NAME.",
        read=_text,
        metavar="SAMPLER",
        default="tpe",
    )
    n_trials: int | None = _option(
        "search",
        "Trials to search; the heuristics come on top.",
        read=_whole(1),
        metavar="N",
        shown=f"{_DEFAULT_N_TRIALS}; {_DEFAULT_N_TRIALS_DIGITS} for digits; the whole grid for grid",
    )
    timeout_s: float | None = _option(
        "search",
        "Search no longer than this: seconds, or 90s, 30m, 2h. Heuristics and confirmation always run.",
        read=parse_seconds,
        metavar="TIME",
        name="timeout",
    )
    metric: str = _option(
        "search",
        "Figure to maximise (see `hpo spaces`).",
        read=_text,
        metavar="FIGURE",
        default="auc",
        shown="auc; auc_parameters for task_relevant",
    )
    baselines: bool = _option(
        "search",
        "Evaluate the baselines beside the heuristics: weight (l2, l1), gradient, Taylor, Hessian, activation, "
        "integrated gradients, random and LRP-alpha1-beta0 (see `hpo spaces`).",
        read=_flag,
        metavar="",
        default=False,
        is_flag=True,
    )
    pruner: Pruner | None = _option(
        "search",
        "race gives a trial up as soon as it cannot become the best; none evaluates every trial exactly.",
        read=_choice(_PRUNERS),
        metavar="|".join(_PRUNERS),
        shown="none for a grid of fewer than 100 points, a sampler of your own or a metric that is no weighted sum "
        "of accuracies, else race",
    )
    race_risk: float = _option(
        "search",
        "Probability, at most, of missing the best of the trials by racing.",
        read=_between(1e-9, 0.5, "must be a probability above 0 and below 0.5"),
        metavar="SHARE",
        default=0.01,
    )

    executor: ExecutorName = _option(
        "execution",
        "Where trials run: in this process, or in as many as Ray has room for.",
        read=_executor,
        metavar="|".join(_EXECUTORS),
        default="local",
    )
    workers: int | None = _option(
        "execution",
        "Trials at a time.",
        read=_whole(1),
        metavar="N",
        shown="1; of Ray, as many as it has GPUs, else CPUs, for",
    )
    gpus_per_trial: float | None = _option(
        "execution",
        "GPUs of a worker, such as 1 or 0.25.",
        read=_gpus,
        metavar="N",
        shown="1 where there are GPUs and --device is not cpu",
    )
    cpus_per_trial: float | None = _option(
        "execution",
        "CPUs of a worker, and threads that it computes with.",
        read=_cpus,
        metavar="N",
        shown=str(DEFAULT_CPUS_PER_TRIAL),
    )
    ray_address: str | None = _option(
        "execution",
        "Running Ray cluster that this machine belongs to: auto, or HOST:PORT.",
        read=_ray_address,
        metavar="auto|HOST:PORT",
        shown="a cluster of its own on this machine",
    )
    trials_per_batch: int = _option(
        "execution",
        "Trials that a worker is given at a time, so that they share what they can.",
        read=_whole(1),
        metavar="N",
        default=1,
        shown=f"{_DEFAULT_TRIALS_PER_BATCH} for grid and random, else 1",
    )
    trial_timeout_s: float | None = _option(
        "execution",
        "End a trial of the search that takes longer, as failed: seconds, or 90s, 30m, 2h.",
        read=parse_seconds,
        metavar="TIME",
        name="trial-timeout",
    )
    max_losses: int = _option(
        "execution",
        "How often a trial whose worker of Ray died is tried again before it fails.",
        read=_whole(0),
        metavar="N",
        default=3,
    )
    store_timeout_s: float = _option(
        "execution",
        "How long to wait for a database that is away: seconds, or 90s, 30m, 2h.",
        read=parse_seconds,
        metavar="TIME",
        name="store-timeout",
        default=300.0,
        shown="5m",
    )

    model: str = _option(
        "model",
        "Network: a timm name, or package.module:factory.",
        read=_text,
        metavar="MODEL",
        default="",
        shown=f"{_DEFAULT_MODEL} with --data {_DEFAULT_DATA}",
    )
    checkpoint: str | None = _option(
        "model", "Weights: a safetensors file, or a torch file of weights alone.", read=_text, metavar="FILE"
    )
    model_options: tuple[tuple[str, Any], ...] = _option(
        "model",
        "Argument of the network's factory; repeat it for more.",
        read=_model_options,
        metavar="KEY=VALUE",
        default=(),
        shown=" ",
        name="model-option",
        multiple=True,
    )
    size: tuple[int, int] | None = _option(
        "model", "Image size instead of the network's own: an edge, or HEIGHTxWIDTH.", read=_size, metavar="PIXELS"
    )
    mean: tuple[float, ...] | None = _option(
        "model", "Mean per channel instead of the network's own.", read=_numbers, metavar="R,G,B"
    )
    std: tuple[float, ...] | None = _option(
        "model", "Standard deviation per channel instead of the network's own.", read=_deviations, metavar="R,G,B"
    )
    crop: float | None = _option(
        "model",
        "Share of the resized edge that the centre crop keeps, instead of the network's own.",
        read=_between(0.01, 1.0000001, "must be a share above 0 and at most 1"),
        metavar="SHARE",
        shown="the network's own; of one that says nothing 0.875, with --size 1",
    )
    interpolation: str | None = _option(
        "model",
        "Interpolation when resizing, such as bicubic or bilinear, instead of the network's own.",
        read=_text,
        metavar="NAME",
    )

    data: str = _option(
        "data",
        "Images: digits, folder:DIR (DIR/train/CLASS/*, DIR/val/CLASS/*), domains:DIR (DIR/train/DOMAIN/CLASS/*, "
        "likewise val), npz:TRAIN.npz,EVAL.npz, timm:NAME, or package.module:factory.",
        read=_text,
        metavar="DATA",
        default="",
        shown=f"{_DEFAULT_DATA} with --model {_DEFAULT_MODEL}",
    )
    classes: tuple[int | str, ...] | None = _option(
        "data",
        "Restrict the task to these classes of the network, by index or name.",
        read=_classes,
        metavar="A,B,...",
        shown="all",
    )
    splits: TaskSplit | None = _option(
        "data",
        "Of --procedure task_relevant: which classes, or domains of --data domains:DIR, are extra knowledge (T), the "
        "task (P) and new (F), a table of a TOML file.",
        read=_split,
        metavar="FILE.toml[:NAME]",
    )
    class_map: str | None = _option(
        "data", "JSON file: folder name -> output index of the network.", read=_text, metavar="FILE"
    )
    references_per_class: int = _option(
        "data",
        "Training images per class that relevance is computed from; all that networks are trained on.",
        read=_whole(1),
        metavar="N",
        default=10,
        shown="10; 100 for task_relevant",
    )
    sample: ReferenceSampling = _option(
        "data",
        "Which training images of a class are references.",
        read=_choice(_SAMPLES),
        metavar="|".join(_SAMPLES),
        default="random",
    )
    evaluation_images: int | None = _option(
        "data",
        "Images to measure accuracy on while searching.",
        read=_whole(1),
        metavar="N",
        shown="at most 1000",
    )
    confirmation_share: float = _option(
        "data",
        "Share of the evaluation set that confirms the best composite and is never searched on.",
        read=_between(0.0, 1.0, "must be a share of at least 0 and below 1"),
        metavar="SHARE",
        default=0.5,
    )
    seed: int = _option(
        "data", "Seed of the split, the references and the sampler.", read=_whole(0), metavar="N", default=0
    )

    rates: tuple[float, ...] = _option(
        "objective",
        "Pruning rates: FIRST:LAST:STEP, or a list such as 0,0.2,0.5.",
        read=_rates,
        metavar="RATES",
        default=(),
        shown=f"{DEFAULT_RATES}; ten steps of --step-share for task_relevant",
    )
    components: Components | None = _option(
        "objective",
        "What is pruned: neurons of a vision transformer's MLPs, its attention heads, or all.",
        read=_choice(_COMPONENTS),
        metavar="|".join(_COMPONENTS),
        shown="mlp for vision transformers, else all",
    )
    procedure: str = _option(
        "objective",
        "How pruning proceeds: one_shot ranks the unpruned network once; iterative ranks what is left anew after every "
        "step; dynamic does so in smaller steps and another order where class accuracies on the references suffer; "
        "prune_and_grow trains a core, and rebuilds what is larger around it; task_relevant prunes what a "
        "network knows to what a task needs, and adapts each size to new data (see --splits).",
        read=_choice(tuple(PROCEDURES)),
        metavar="|".join(PROCEDURES),
        default="one_shot",
    )
    step_share: float | None = _option(
        "objective",
        "Of all procedures but one_shot: share of the original components that a step prunes; of task_relevant, of "
        "those left.",
        read=_between(LEAST_SHARE, math.nextafter(1, 2), f"must be a share of at least {LEAST_SHARE} and at most 1"),
        metavar="SHARE",
        shown=f"{_DYNAMIC.step_share}; {_PRUNE_AND_GROW.step_share} for prune_and_grow and task_relevant",
    )
    core_share: float | None = _option(
        "objective",
        "Of --procedure prune_and_grow: share of the original components that the core is without.",
        read=_between(LEAST_SHARE, 1.0, f"must be a share of at least {LEAST_SHARE} and below 1"),
        metavar="SHARE",
        shown=str(_PRUNE_AND_GROW.core_share),
    )
    finetune_epochs: int | None = _option(
        "objective",
        "Of --procedure iterative and prune_and_grow: train what each step leaves for so many passes over the "
        "reference images; the next step ranks the trained network. Of task_relevant: most passes of every training of "
        "a pruned network.",
        read=_whole(0),
        metavar="N",
        shown=f"0; {_PRUNE_AND_GROW.finetune_epochs} for prune_and_grow, {_TASK_RELEVANT.finetune_epochs} for "
        "task_relevant",
    )
    finetune_learning_rate: float | None = _option(
        "objective",
        "With --finetune-epochs: learning rate (SGD, momentum 0.9; of prune_and_grow the largest of a cosine; of "
        "task_relevant Adam's); batch norm is folded, so large ones diverge.",
        read=_between(math.ulp(0.0), math.inf, "must be a number above 0"),
        metavar="X",
        shown=f"{LEARNING_RATE}; {_TASK_RELEVANT.finetune_learning_rate} for task_relevant",
    )
    finetune_batch_size: int | None = _option(
        "objective",
        "With --finetune-epochs: images of a step of the training.",
        read=_whole(1),
        metavar="N",
        shown=str(BATCH_SIZE),
    )
    pretrain_epochs: int | None = _option(
        "objective",
        "Of --procedure task_relevant: most passes over T and P by which the network is trained before it is pruned, "
        "from the --checkpoint or else from random weights; 0 where it has been trained on them.",
        read=_whole(0),
        metavar="N",
        shown=str(_TASK_RELEVANT.pretrain_epochs),
    )
    patience: int | None = _option(
        "objective",
        "Of --procedure task_relevant: epochs without a higher validation accuracy after which a training ends.",
        read=_whole(1),
        metavar="N",
        shown=str(_TASK_RELEVANT.patience),
    )
    tolerance: float | None = _option(
        "objective",
        "Of --procedure dynamic: by how much a step may lower the harmonic mean of class accuracies.",
        read=_between(0.0, 1.0, "must be a number of at least 0 and below 1"),
        metavar="X",
        shown=str(_DYNAMIC.tolerance),
    )
    search_width: int | None = _option(
        "objective",
        "Of --procedure dynamic: components beyond a step's that are tried where even one hurts.",
        read=_whole(1),
        metavar="N",
        shown=str(_DYNAMIC.search_width),
    )
    rankings_per_step: int | None = _option(
        "objective",
        "Of --procedure dynamic: most rankings within a step's share.",
        read=_whole(1),
        metavar="N",
        shown=str(_DYNAMIC.rankings_per_step),
    )
    evaluations_per_step: int | None = _option(
        "objective",
        "Of --procedure dynamic: most candidates measured on the references within a step's share.",
        read=_whole(1),
        metavar="N",
        shown=str(_DYNAMIC.evaluations_per_step),
    )
    fixed_rate: bool | None = _option(
        "objective",
        "Of --procedure dynamic: no smaller steps (an ablation).",
        read=_flag,
        metavar="",
        is_flag=True,
    )
    fixed_order: bool | None = _option(
        "objective",
        "Of --procedure dynamic: no other order (an ablation).",
        read=_flag,
        metavar="",
        is_flag=True,
    )
    ranking: RankingScope = _option(
        "objective",
        "Rank all components over the whole network, or each kind (a transformer's heads and neurons) or each layer "
        "within itself.",
        read=_choice(_RANKINGS),
        metavar="|".join(_RANKINGS),
        default="kind",
        shown="kind; layer for task_relevant",
    )
    abs_scope: AbsScope = _option(
        "objective",
        "What `abs` takes the absolute value of: a sample's relevance summed over space, or every element.",
        read=_choice(_ABS_SCOPES),
        metavar="|".join(_ABS_SCOPES),
        default="sum",
        shown="sum; element for task_relevant",
    )
    output_relevance: OutputRelevance = _option(
        "objective",
        "Relevance that the true class starts with: one, or its logit.",
        read=_choice(_OUTPUT_RELEVANCES),
        metavar="|".join(_OUTPUT_RELEVANCES),
        default="one",
        shown="one; logit for task_relevant",
    )
    dtype: Dtype = _option(
        "objective",
        "Precision of the evaluations while searching; confirmation always uses fp32.",
        read=_choice(_DTYPES),
        metavar="|".join(_DTYPES),
        default="fp32",
    )
    batch_size: int = _option(
        "objective",
        "Images per batch. Rounding depends on it, so it belongs to the study's identity.",
        read=_whole(1),
        metavar="N",
        default=100,
    )
    attribution: AttributionEngine = _option(
        "objective",
        "Attribute many composites together, or one at a time by zennit; scores agree to rounding.",
        read=_choice(_ATTRIBUTIONS),
        metavar="|".join(_ATTRIBUTIONS),
        default="shared",
    )
    attribution_memory: int = _option(
        "objective",
        "Memory in MiB that attributing composites together may take.",
        read=_whole(1),
        metavar="MIB",
        default=1024,
    )
    repair: str | None = _option(
        "objective",
        "Give pruned networks accuracy back from the reference images: bn matches each channel's mean and deviation, "
        "refit fits the remaining weights to the unpruned network's outputs. What a step has pruned "
        "is repaired before it is fine-tuned, not after.",
        read=_choice(tuple(REPAIRS)),
        metavar="|".join(REPAIRS),
        shown="none; of `hpo prune` the document's where it has one, else refit, or none of what is fine-tuned",
    )
    repair_strength: float | None = _option(
        "objective",
        "Pull of the repair towards the weights that there were; refit scales those of convolutional networks.",
        read=_between(1e-12, 1e12, "must be a number of at least 1e-12 and below 1e12"),
        metavar="X",
        shown="chosen from the reference images; of bn one by their number",
    )
    device: str = _option(
        "objective", "Device to compute on.", read=_device, metavar="auto|cpu|cuda[:N]", default="auto"
    )

    def procedure_spec(self) -> ProcedureSpec:
        """How pruning proceeds.

        Raises:
            ProcedureError: The procedure takes no such option.
        """
        options = {name: value for name in _OF_PROCEDURES if (value := getattr(self, name)) is not None}
        return procedure_from_json(self.procedure, options)

    def repair_spec(self, default: str = "none") -> RepairSpec:
        """The repair of pruned networks, by a default method.

        Raises:
            RepairSpecError: There is a strength and nothing is to be repaired.
        """
        return RepairSpec(self.repair or default, self.repair_strength)

    def to_json(self) -> dict[str, Any]:
        """JSON form, by option names; the storage URL without user information."""
        from storage.urls import without_user_information

        values: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            value = getattr(self, option.field)
            if option.field == "model_options":
                value = dict(value)
            elif isinstance(value, TaskSplit):
                value = value.to_json()
            values[name] = list(value) if isinstance(value, tuple) else value
        values["storage"] = without_user_information(self.storage)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LaunchConfiguration":
        """Inverse of `to_json`; keys of other versions are left out."""
        known = {OPTIONS[name]: value for name, value in values.items() if name in OPTIONS and value is not None}
        return cls(**{option.field: option.read(value) for option, value in known.items()})


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            name=field.metadata["name"] or field.name.replace("_", "-"),
            field=field.name,
            **{key: value for key, value in field.metadata.items() if key != "name"},
        )
        for field in dataclasses.fields(LaunchConfiguration)
    )
}


def resolve(
    command_line: Mapping[str, Any], file: Path | None = None, fallback: Mapping[str, Any] | None = None
) -> LaunchConfiguration:
    """The one place where settings meet: the command line over the file over the defaults.

    Args:
        command_line: Values by field name; None and () mean that an option was not given.
        file: TOML file whose keys are the names of the options; relative paths in it start at the working directory.
        fallback: Values by field name that hold over the defaults, such as those of an export document; they are read
            as if given. Its repair's strength is that repair's own, and so are a procedure's options and split, and how
            it fine-tunes: where another is given, they don't hold.

    Raises:
        ConfigurationError: For a value that cannot be used, a key that is unknown, or a file that cannot be read.
    """
    read = {
        option.field: _read(option, value, f"The saved {name!r}")
        for name, option in OPTIONS.items()
        if (value := (fallback or {}).get(option.field)) is not None
    }
    given = _given(command_line, file)
    if "repair" in given:
        read.pop("repair_strength", None)
    if given.get("procedure", read.get("procedure")) != read.get("procedure"):
        for name in (*_OF_PROCEDURES, "splits"):
            read.pop(name, None)
    if given.get("finetune_epochs") == 0:
        for name in _OF_FINE_TUNING:
            read.pop(name, None)
    return _checked(LaunchConfiguration(**_defaults({**read, **given})))


def given_fields(command_line: Mapping[str, Any], file: Path | None = None) -> frozenset[str]:
    """Names of the fields that the user gives, on the command line or in a file.

    Raises:
        ConfigurationError: As `resolve`.
    """
    return frozenset(_given(command_line, file))


def _given(command_line: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    values = {} if file is None else _read_file(file)
    for option in OPTIONS.values():
        value = command_line.get(option.field)
        if value is not None and value != ():
            values[option.field] = _read(option, value, f"`--{option.name}`")
    return values


def _read_file(file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Cannot read configuration file {str(file)!r}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Configuration file {str(file)!r} is not TOML: {error}.") from error
    values = {}
    for key, value in document.items():
        option = OPTIONS.get(key)
        if option is None:
            raise ConfigurationError(f"Unknown key {key!r} in {str(file)!r}.{did_you_mean(key, OPTIONS)}")
        values[option.field] = _read(option, value, f"Key {key!r} of {str(file)!r}")
    return values


def _read(option: Option, value: Any, origin: str) -> Any:
    try:
        return option.read(value)
    except PruningHPOError:  # a parser that says all of it
        raise
    except ValueError as error:
        given = value[-1] if option.multiple and isinstance(value, tuple) else value
        raise ConfigurationError(f"{origin} {error}, but got {given!r}.") from error


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that depend on other options, and make paths absolute."""
    from storage.urls import default_storage_url

    model, data = values.get("model"), values.get("data")
    if data is None:
        if model not in (None, _DEFAULT_MODEL):
            raise ConfigurationError(f"`--model {model}` needs images: pass `--data`, for example `--data folder:DIR`.")
        data = _DEFAULT_DATA
    if model is None:
        if data != _DEFAULT_DATA:
            raise ConfigurationError(
                f"`--data {data}` needs a network: pass `--model`, for example `--model resnet18`."
            )
        model = _DEFAULT_MODEL
    values |= {"model": model, "data": _absolute_data(data)}
    for field in ("checkpoint", "class_map"):
        if values.get(field) is not None:
            values[field] = str(Path(values[field]).expanduser().absolute())
    if (values.get("space") or "").endswith(".toml"):
        values["space"] = str(Path(values["space"]).expanduser().absolute())
    if values.get("n_trials") is None and values.get("sampler") != "grid":
        values["n_trials"] = _DEFAULT_N_TRIALS_DIGITS if data == _DEFAULT_DATA else _DEFAULT_N_TRIALS
    if values.get("sampler") in ("grid", "random"):
        values.setdefault("trials_per_batch", _DEFAULT_TRIALS_PER_BATCH)
    procedure = values.get("procedure", "")
    for field, default in _DEFAULTS_OF.get(procedure, {}).items():
        values.setdefault(field, default)
    if procedure == TaskRelevant.name and "rates" not in values:
        values["rates"] = TaskRelevant(values.get("step_share", _TASK_RELEVANT.step_share)).rates
    values.setdefault("rates", OPTIONS["rates"].read(DEFAULT_RATES))
    values.setdefault("study", _study_name(model, data))
    values.setdefault("storage", default_storage_url())
    return values


def _absolute_data(data: str) -> str:
    """Sources of local files with absolute paths: a saved configuration must hold from any directory."""
    scheme, _, paths = data.partition(":")
    if scheme not in ("folder", "domains", "npz") or not paths:
        return data
    parts = paths.split(",") if scheme == "npz" else [paths]
    return f"{scheme}:{','.join(str(Path(part).expanduser().absolute()) for part in parts)}"


def _study_name(model: str, data: str) -> str:
    """`digits` for the embedded default, else for example `resnet18-flowers` for `--data folder:pictures/flowers`."""
    if (model, data) == (_DEFAULT_MODEL, _DEFAULT_DATA):
        return _DEFAULT_DATA
    last = re.split(r"[,:/\\]", data.rstrip("/\\"))[-1].removesuffix(".npz")
    network = re.split(r"[:.]", model)[-1] if is_import_path(model) else model
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{network}-{last}")


def _checked(configuration: LaunchConfiguration) -> LaunchConfiguration:
    """The configuration, if its names are known."""
    from objectives.pruning.curve import FIGURES, weights

    if configuration.metric not in FIGURES:
        raise ConfigurationError(
            f"Unknown metric {configuration.metric!r}.{did_you_mean(configuration.metric, FIGURES)}"
        )
    for option in OPTIONS.values():
        owners = [name for name, options in _PROCEDURE_OPTIONS.items() if option.field in options]
        given = owners and getattr(configuration, option.field) is not None
        if given and configuration.procedure not in owners:
            raise ConfigurationError(
                f"`--{option.name}` is for `--procedure {' or '.join(owners)}`, but the procedure is "
                f"{configuration.procedure}; leave one out."
            )
    _check_splits(configuration)
    if configuration.repair is not None:
        configuration.repair_spec()  # refuses a strength that it doesn't take
    trains = configuration.finetune_epochs or configuration.procedure in _ALWAYS_TRAIN
    for name in _OF_FINE_TUNING:
        if getattr(configuration, name) is not None and not trains:
            raise ConfigurationError(f"`--{name.replace('_', '-')}` says how to fine-tune; add `--finetune-epochs N`.")
    if configuration.pruner == "race" and weights(configuration.metric, configuration.rates) is None:
        raise ConfigurationError(
            f"`--metric {configuration.metric}` is no weighted sum of accuracies, so its trials cannot race; "
            "pass `--exact`, or another metric."
        )
    if re.search(r"[/\\\x00-\x1f]", configuration.study):
        raise ConfigurationError(f"`--study` must not hold slashes or line breaks, but got {configuration.study!r}.")
    if configuration.executor == "local":
        for name in _OF_RAY:
            value = getattr(configuration, OPTIONS[name].field)
            if value is not None and (name, value) != ("workers", 1):
                raise ConfigurationError(f"`--{name}` is for workers of Ray; add `--executor ray`.")
        return configuration
    device, gpus = configuration.device, configuration.gpus_per_trial
    if device.startswith("cuda:"):
        raise ConfigurationError(f"Ray chooses each worker's GPU, so `--device {device}` cannot hold; write cuda.")
    if gpus is not None and ((device == "cpu" and gpus > 0) or (device == "cuda" and gpus == 0)):
        raise ConfigurationError(f"`--gpus-per-trial {gpus:g}` contradicts `--device {device}`; leave one out.")
    return configuration


def _check_splits(configuration: LaunchConfiguration) -> None:
    """Refuse a split without its procedure, or the other way round."""
    procedure, is_split = configuration.procedure, configuration.splits is not None
    if procedure == TaskRelevant.name and not is_split:
        raise ConfigurationError(
            f"`--procedure {procedure}` needs to know which classes are extra knowledge (T), the task (P) and new (F); "
            "pass `--splits FILE.toml`."
        )
    if is_split and procedure != TaskRelevant.name:
        raise ConfigurationError(
            f"`--splits` is for `--procedure {TaskRelevant.name}`, but the procedure is {procedure}; leave one out."
        )
    if is_split and configuration.classes is not None:
        raise ConfigurationError("`--splits` says which classes there are; leave `--classes` out.")
