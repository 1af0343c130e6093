"""Export: from a study to documents that anyone can prune with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo import trials
from hpo.config import LaunchConfiguration, given_fields, resolve
from hpo.confirmation import Confirmed, compare, read_confirmed
from hpo.driver import DESCRIPTION
from hpo.errors import ConfigurationError, NothingFoundError
from hpo.problem import load_problem, refuse_imports
from hpo.report import configuration_of
from search_spaces.composites import CompositeSpec
from search_spaces.criteria import CriterionSpec
from search_spaces.documents import CompositeDocument
from search_spaces.repairs import RepairSpec
from search_spaces.spaces import load_space
from storage.errors import StudyIdentityError
from storage.identity import differences
from storage.store import IDENTITY

if TYPE_CHECKING:
    from optuna.study import Study

    from hpo.problem import Problem
    from hpo.progress import Progress

__all__ = ["choose_trials", "document_options", "export_paths", "export_trials"]


def choose_trials(study: "Study", *, trial: int | None = None, top: int | None = None) -> list[FrozenTrial]:
    """The trials to export: one by its number, or the best of distinct composites, best first.

    Raises:
        NothingFoundError: No trial has this number, it is not complete, it has a criterion, or no trial is complete.
    """
    stored = study.get_trials(deepcopy=False)
    if trial is None:
        if best := trials.best(stored, top or 1):
            return best
        raise NothingFoundError(f"Study {study.study_name!r} has no complete trial yet; go on with `hpo launch`.")
    if not 0 <= trial < len(stored):
        raise NothingFoundError(f"Study {study.study_name!r} has no trial {trial}, but 0 to {len(stored) - 1}.")
    if stored[trial].state != TrialState.COMPLETE:
        raise NothingFoundError(f"Trial {trial} is {stored[trial].state.name}, not COMPLETE; choose another one.")
    ranker = trials.composite_of(stored[trial])
    if isinstance(ranker, CriterionSpec):
        raise NothingFoundError(f"Trial {trial} is the baseline {ranker.label}, no composite; choose another one.")
    return [stored[trial]]


def export_trials(
    study: "Study", chosen: Sequence[FrozenTrial], options: Mapping[str, Any], progress: "Progress"
) -> list[CompositeDocument]:
    """A document for each trial; what is not yet confirmed is confirmed now.

    Args:
        study: Where the trials are from; nothing is written to it.
        chosen: Complete trials.
        options: Options of this command line by field name, which hold over the study's saved configuration.
        progress: Whom to tell how far it is.

    Raises:
        NothingFoundError: The study was made by another program.
        ImportRefusedError: Confirming needs an import that only the store names.
        StudyIdentityError: What was loaded to confirm differs from what the study searched on.
    """
    configuration = configuration_of(study)
    description = study.user_attrs[DESCRIPTION]
    heuristics = trials.heuristics(study.get_trials(deepcopy=False))
    confirmed: dict[int, Confirmed] = {}
    if description["data"]["n_confirmation_images"]:
        wanted = {trial.number: trial for trial in (*heuristics.values(), *chosen)}
        confirmed = read_confirmed(study.user_attrs, wanted)
        if missing := [trial for number, trial in wanted.items() if number not in confirmed]:
            problem = _load(study, configuration, options, progress)
            confirmed |= _confirm(problem, missing, progress)
    return [_document(study, trial, configuration, description, heuristics, confirmed) for trial in chosen]


def export_paths(output: Path, count: int) -> list[Path]:
    """Where documents are written: `best.json`, or `best-1.json`, `best-2.json` and so on for more than one."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{rank}{output.suffix}") for rank in range(1, count + 1)]


def document_options(document: CompositeDocument) -> dict[str, Any]:
    """Options by field name with which a document's problem is loaded again; to be passed as `fallback`."""
    references, data, preprocessing = document.references, document.data, document.preprocessing
    classes = tuple(data["classes"])
    every_class = classes == tuple(range(document.model["num_classes"]))
    options = {
        "model": document.model["name"],
        "model_options": tuple(sorted(document.model.get("options", {}).items())),
        "size": tuple(preprocessing["size"]),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "crop": preprocessing.get("crop"),
        "interpolation": preprocessing.get("interpolation"),
        "data": data["source"],
        "classes": None if every_class else classes,
        "evaluation_images": data.get("evaluation_images"),
        "confirmation_share": data.get("confirmation_share"),
        "references_per_class": references["per_class"],
        "sample": references.get("sample"),
        "seed": references["seed"],
        "batch_size": references.get("batch_size"),
        "rates": document.rates,
        "splits": data.get("split"),
        "procedure": document.procedure,
        **document.procedure_options,
        "components": document.components,
        "ranking": document.ranking,
        "abs_scope": document.abs_scope,
        "output_relevance": document.output_relevance,
    }
    repair = RepairSpec.from_json(document.repair)
    if repair:
        options |= {"repair": repair.method, "repair_strength": repair.strength}
    return {field: value for field, value in options.items() if value is not None}


def _load(study: "Study", saved: LaunchConfiguration, options: Mapping[str, Any], progress: "Progress") -> "Problem":
    fallback = {field.name: getattr(saved, field.name) for field in fields(saved)}
    configuration = resolve(options, fallback=fallback)
    given = given_fields(options)
    refuse_imports(configuration, given, f"Study {study.study_name!r}")
    progress.phase("Loading network and images")
    name = configuration.space
    space = None if name is None else load_space(name, allow_imports="space" in given)
    problem = load_problem(configuration, None if space is None else space.layer_groups, given)
    if different := differences(study.user_attrs[IDENTITY]["objective"], problem.identity()):
        raise StudyIdentityError(
            f"Study {study.study_name!r} searched on something else; pass the options that it was launched with "
            "(stored -> loaded):",
            different,
        )
    return problem


def _confirm(problem: "Problem", missing: Sequence[FrozenTrial], progress: "Progress") -> dict[int, Confirmed]:
    from hpo.progress import TrialReport

    progress.phase("Confirmation", len(missing))
    confirmed = {}
    for trial in missing:
        composite = trials.composite_of(trial)
        if composite is None:
            raise ConfigurationError(f"Trial {trial.number} has no composite that this release reads.")
        evaluation = problem.evaluate(composite, "confirmation")
        confirmed[trial.number] = Confirmed.of(trial.number, evaluation)
        seconds = sum(evaluation.seconds.values())
        progress.trial(TrialReport(trial.number, composite.label, evaluation.figures["auc"], seconds, "", None, None))
    return confirmed


def _document(
    study: "Study",
    trial: FrozenTrial,
    configuration: LaunchConfiguration,
    description: Mapping[str, Any],
    heuristics: Mapping[str, FrozenTrial],
    confirmed: Mapping[int, Confirmed],
) -> CompositeDocument:
    composite = trials.composite_of(trial)
    assert isinstance(composite, CompositeSpec), "a chosen trial has one"
    curve = trials.curve_of(trial)
    confirmation = None
    if confirmed:
        others = {name: confirmed[other.number] for name, other in heuristics.items()}
        result = compare(confirmed[trial.number], others, seed=configuration.seed)
        confirmation = {
            "auc": result.auc,
            "n_images": result.n_images,
            "accuracies": list(result.accuracies),
            "differences": {name: asdict(difference) for name, difference in result.differences.items()},
        }
    # What a composite brings of its own stands where all documents have it.
    own = {} if composite.repair is None else {"repair": composite.repair.to_json()}
    return CompositeDocument(
        **{**description, **own},
        composite=replace(composite, repair=None),
        study={
            "name": study.study_name,
            "trial": trial.number,
            "n_trials": len(trials.finished(study.get_trials(deepcopy=False))),
            "sampler": configuration.sampler,
            "metric": configuration.metric,
            "value": trial.values[0],
        },
        curve={"rates": list(curve.rates), "accuracies": list(curve.accuracies)},
        figures={**trials.figures_of(trial)},
        confirmation=confirmation,
    )
