"""The command line `hpo`: parse, call one function, print.

Nothing heavy is imported before a command runs, so that `--help` appears at once.
"""

import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from hpo.command_line import ARGUMENTS, EXIT_INTERRUPTED, Group, Option, configuration_options, file_option
from hpo.config import OPTIONS, given_fields, resolve
from hpo.errors import ConfigurationError, Interrupted
from hpo.terminal import print_json, print_parts, start_logging
from search_spaces.choices import ImageSet
from search_spaces.procedures import LEARNING_RATE, OneShot
from search_spaces.repairs import NO_REPAIR, RepairSpec

if TYPE_CHECKING:
    from collections.abc import Container

    from hpo.comparison import Contestant
    from hpo.config import LaunchConfiguration
    from hpo.problem import LoadedProblem
    from objectives.pruning.prune import AmountKind
    from search_spaces.criteria import Ranker
    from search_spaces.documents import CompositeDocument
    from storage.store import StudyStore

__all__ = ["cli", "main"]

_RANKED = (
    *("ranking", "procedure", "step-share", "core-share"),
    *("finetune-epochs", "finetune-learning-rate", "finetune-batch-size"),
)

_config = file_option("--config", "TOML file whose keys are the names of these options.", metavar="FILE")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON alone on standard output.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="Log more, with the origin of errors.")
_study = click.argument("study", required=False)
_storage = configuration_options("study", only=["storage"])
_comparison = partial(click.option, cls=Option, heading="Comparison")
_amount = partial(click.option, cls=Option, heading="Amount (give one)")
_elastic = partial(click.option, cls=Option, heading="Elastic network")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pruning-hpo", prog_name="hpo")
def cli() -> None:
    """Find the LRP composite with which a trained image classifier prunes best, and prune it.

    Start with `hpo launch`: it searches on handwritten digits with a small network.
    """


# Commands


@cli.command(
    examples="""
    hpo launch
    hpo launch --sampler grid --space mine.toml --exact
    hpo launch --model resnet18 --data folder:flowers --classes 3,7,11 --n-trials 200
    hpo launch --model cifar_resnet20 --checkpoint resnet20.safetensors --data npz:train.npz,eval.npz
    hpo launch --repair refit
    hpo launch --space cnn+repair
    hpo launch --procedure iterative --step-share 0.1
    hpo launch --procedure iterative --finetune-epochs 5
    hpo launch --procedure dynamic --metric auc_lowest_class
    hpo launch --procedure prune_and_grow --core-share 0.5 --finetune-epochs 10
    hpo launch --procedure task_relevant --splits splits.toml
    hpo launch --baselines
    hpo launch --config study.toml --device cuda:0
    hpo launch --sampler grid --executor ray --workers 4
    hpo launch --executor ray --ray-address 10.0.0.5:6379 --gpus-per-trial 0.5
    """
)
@configuration_options("study", "search", "execution", "model", "data", "objective")
@click.option(
    "--exact", is_flag=True, cls=Option, heading="Search", help="Evaluate every trial exactly, as --pruner none does."
)
@_config
@_verbose
@click.pass_context
def launch(ctx: click.Context, /, config: Path | None, exact: bool, verbose: bool, **options: Any) -> None:
    """Run a study, or go on with it.

    Evaluates the published heuristics, searches for a better composite, and confirms the best on images that the search
    never saw. The same command resumes a study that was interrupted; a larger --n-trials extends one that is finished.
    """
    console = start_logging(verbose)
    if exact:
        if options["pruner"] not in (None, "none"):
            raise ConfigurationError(f"`--pruner {options['pruner']}` contradicts `--exact`; leave one out.")
        options["pruner"] = "none"
    configuration = resolve(options, config)
    from hpo.progress import make_progress
    from hpo.study import launch as run

    try:
        with make_progress(configuration.metric, console) as progress:
            worked = run(configuration, progress)
    except KeyboardInterrupt:
        click.echo("Interrupted: no finished trial is lost. To go on:", err=True)
        click.echo(f"  {_same_command(ctx)}", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    _print_study(configuration, finished_before=not worked)


@cli.command(
    examples="""
    hpo status
    hpo status resnet18-flowers --json
    """
)
@_study
@_storage
@_json
@_verbose
def status(study: str | None, storage: str | None, as_json: bool, verbose: bool) -> None:
    """Show how far a study is, its best composite against the heuristics, and its configuration.

    STUDY may be left out where there is only one.
    """
    start_logging(verbose)
    from hpo.report import StudyReport, configuration_table

    with _open(storage) as store:
        loaded = _load(store, study)
        report = StudyReport.of(loaded, store.lease_holder(loaded.study_name))
    if as_json:
        print_json(report.to_json())
        return
    print_parts(*report.parts(), configuration_table(report.configuration))


@cli.command(
    name="list",
    examples="""
    hpo list
    hpo list --storage sqlite:///studies.db --json
    """,
)
@_storage
@_json
@_verbose
def list_(storage: str | None, as_json: bool, verbose: bool) -> None:
    """List the studies of a store."""
    start_logging(verbose)
    from hpo.report import studies_json, studies_table

    with _open(storage) as store:
        summaries = store.summaries()
    if as_json:
        print_json(studies_json(summaries))
    elif not summaries:
        print_parts("No studies yet; start one with `hpo launch`.")
    else:
        print_parts(studies_table(summaries))


@cli.command(
    examples="""
    hpo show 37
    hpo show 37 --study resnet18-flowers --json
    """
)
@click.argument("trial", type=click.IntRange(min=0))
@click.option("--study", metavar="NAME", help="Name of the study; may be left out where there is only one.")
@_storage
@_json
@_verbose
def show(trial: int, study: str | None, storage: str | None, as_json: bool, verbose: bool) -> None:
    """Show a trial: its composite, figures and curve."""
    start_logging(verbose)
    from hpo.errors import NothingFoundError
    from hpo.report import trial_json, trial_tables

    with _open(storage) as store:
        loaded = _load(store, study)
        trials = loaded.get_trials(deepcopy=False)
    if trial >= len(trials):
        raise NothingFoundError(f"Study {loaded.study_name!r} has {len(trials)} trials, but none of number {trial}.")
    if as_json:
        print_json(trial_json(trials[trial]))
    else:
        print_parts(*trial_tables(trials[trial]))


@cli.command(
    examples="""
    hpo evaluate --heuristic epsilon-plus-abs
    hpo evaluate --heuristic epsilon-abs --repair bn --repair-strength 0.3
    hpo evaluate --heuristic zplus --procedure iterative --ranking layer
    hpo evaluate --rules LLR=Epsilon,MLL=Epsilon,HLL=ZPlus,FCL=Epsilon --abs --epsilon 1e-6 --json
    hpo evaluate --composite best.json --model resnet18 --data folder:flowers
    """
)
@click.option(
    "--composite", cls=Option, heading="Composite", metavar="FILE", help="Export document to take the composite from."
)
@click.option(
    "--heuristic",
    cls=Option,
    heading="Composite",
    metavar="NAME",
    help="Published composite, or baseline (see `hpo spaces`).",
)
@click.option(
    "--rules",
    cls=Option,
    heading="Composite",
    metavar="RULES",
    help="A rule for each layer group: LLR=RULE,MLL=RULE,HLL=RULE,FCL=RULE.",
)
@click.option(
    "--abs",
    "absolute",
    is_flag=True,
    cls=Option,
    heading="Composite",
    help="With --rules: rank by absolute relevance.",
)
@click.option(
    "--epsilon",
    type=float,
    cls=Option,
    heading="Composite",
    help="With --rules: epsilon of the Epsilon rules.  [default: 1e-06]",
)
@click.option(
    "--attention",
    cls=Option,
    heading="Composite",
    metavar="RULE",
    help="With --rules: rule of a vision transformer's attention: AttnLRP, CP or ZPlus.",
)
@configuration_options("model", "data", "objective")
@configuration_options("search", only=["space"])
@click.option(
    "--images",
    type=click.Choice(get_args(ImageSet)),
    default="search",
    show_default=True,
    help="Images to measure accuracy on.",
)
@_config
@_json
@_verbose
def evaluate(
    composite: str | None,
    heuristic: str | None,
    rules: str | None,
    absolute: bool,
    epsilon: float | None,
    attention: str | None,
    images: Any,
    config: Path | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Evaluate one composite without a study: its curve and figures.

    With --composite, the document's network, images and settings hold where no option says otherwise; of a --space only
    the layer groups are used.
    """
    if sum(given is not None for given in (composite, heuristic, rules)) != 1:
        raise click.UsageError("Give one of --composite, --heuristic and --rules.")
    if rules is None and (absolute or epsilon is not None or attention is not None):
        raise click.UsageError("--abs, --epsilon and --attention go with --rules.")
    console = start_logging(verbose)
    from hpo.progress import make_progress
    from hpo.report import evaluation_tables

    document = None if composite is None else _read_document(composite)
    spec = document.composite if document is not None else _ranker(heuristic, rules, absolute, epsilon, attention)
    configuration, given = _resolve_with(document, options, config)
    with make_progress(configuration.metric, console) as progress:
        progress.phase("Loading network and images")
        problem = _load_problem(configuration, document, given)
        progress.phase("Evaluating")
        evaluation = problem.evaluate(spec, images)
    if as_json:
        curve = evaluation.curve
        print_json(
            {
                "rates": list(curve.rates),
                "accuracies": list(curve.accuracies),
                **evaluation.figures,
                "composite": spec.to_json(),
                "procedure": problem.objective.options.procedure.name,
                "procedure_options": problem.objective.options.procedure.options,
                "repair": configuration.repair_spec().to_json(),
                "images": images,
                "n_images": len(evaluation.image_auc),
                "parameters": list(curve.parameters),
                "flops": list(curve.flops),
                "class_accuracies": [list(accuracies) for accuracies in curve.class_accuracies],
                "steps": [step.to_json() for step in evaluation.steps],
                "seconds": dict(evaluation.seconds),
                "remarks": list(evaluation.remarks),
            }
        )
        return
    repair = configuration.repair_spec()
    repaired = f", repaired by {repair}" if repair else ""
    procedure = configuration.procedure_spec()
    by = "" if procedure == OneShot() else f", pruned by {procedure}"
    title = f"{spec.label} on {len(evaluation.image_auc)} {images} images{by}{repaired}"
    print_parts(title, *evaluation_tables(evaluation), *evaluation.remarks)


@cli.command(
    examples="""
    hpo compare --criteria epsilon-abs,weight,taylor,gradient -o criteria
    hpo compare --criteria best.json,epsilon-abs,zplus --n-subsets 20 --seeds 0,1,2 -o composites
    hpo compare --criteria best,epsilon-abs,taylor --study digits --images confirmation -o best-of-digits
    hpo compare --criteria zplus,weight,taylor --procedure iterative --finetune-epochs 3 -o tuned
    hpo compare --criteria epsilon-abs,weight --procedure task_relevant --splits splits.toml --seeds 0,1,2,3,4 -o task
    """
)
@_comparison(
    "--criteria",
    required=True,
    metavar="A,B,...",
    help="What to compare, the others to the first: heuristics and baselines (see `hpo spaces`), files of export "
    "documents, of which only the composite is taken, and best: the best composite of --study.",
)
@_comparison(
    "--n-subsets",
    type=int,
    metavar="N",
    help="Random subsets of the classes; not with --splits.  [default: 5]",
)
@_comparison(
    "--classes-per-subset",
    type=int,
    metavar="K",
    help="Classes of each subset; the network keeps their outputs alone.  [default: 3]",
)
@_comparison(
    "--seeds",
    default="0",
    show_default=True,
    metavar="A,B,...",
    help="Seeds of the references and the split, and of a network that is trained on one; every subset runs with each.",
)
@_comparison(
    "--subset-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the draw of subsets, and of the bootstrap.",
)
@click.option("--study", metavar="NAME", help="Study that `best` is of; may be left out where there is only one.")
@_storage
@configuration_options("model")
@configuration_options("data", only=[name for name in OPTIONS if name != "seed"])
@configuration_options("objective")
@configuration_options("search", only=["metric", "space"])
@click.option(
    "--images",
    type=click.Choice(get_args(ImageSet)),
    default="search",
    show_default=True,
    help="Images to measure accuracy on.",
)
@click.option(
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Directory of the comparison; what is computed there already is not computed again.",
)
@_config
@_json
@_verbose
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    criteria: str,
    n_subsets: int | None,
    classes_per_subset: int | None,
    seeds: str,
    subset_seed: int,
    study: str | None,
    storage: str | None,
    images: Any,
    o: Path,
    config: Path | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Compare criteria over random subsets of the classes and seeds, run by run.

    In each run all criteria prune the same network with the same references and are measured on the same images. With
    --classes, subsets are drawn from these; with --splits, runs differ in their seed alone. A comparison that was
    interrupted goes on; more criteria, subsets and seeds may be added to one.
    """
    console = start_logging(verbose)
    from hpo.comparison import Runs, compare_criteria, parse_seeds
    from hpo.progress import make_progress
    from hpo.report import comparison_parts
    from search_spaces.spaces import load_space

    runs = Runs(n_subsets, classes_per_subset, parse_seeds(seeds), subset_seed)
    configuration, _ = _resolve_with(None, options, config)
    contestants = _contestants(criteria, study, storage)
    space = None if configuration.space is None else load_space(configuration.space)
    try:
        with make_progress(configuration.metric, console) as progress:
            comparison = compare_criteria(
                configuration,
                contestants,
                runs,
                o,
                progress,
                layer_groups=None if space is None else space.layer_groups,
                images=images,
            )
    except KeyboardInterrupt:
        click.echo("Interrupted: no finished row is lost. To go on:", err=True)
        click.echo(f"  {_same_command(ctx)}", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_parts(*comparison_parts(comparison), f"Wrote rows.csv, summary.json and comparison.png to {o}.")


@cli.command(
    examples="""
    hpo export digits -o best.json
    hpo export digits --trial 37 -o trial37.json
    hpo export digits --top 3 -o best.json    (writes best-1.json, best-2.json, best-3.json)
    hpo export digits --json
    """
)
@_study
@file_option("-o", "File to write; may be left out with --json.", metavar="FILE", default=None)
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="This trial instead of the best.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="The K best composites, each in a file.")
@_storage
@configuration_options("model", only=["model", "checkpoint", "model-option"])
@configuration_options("data", only=["data", "class-map"])
@configuration_options("search", only=["space"])
@configuration_options("objective", only=["device"])
@_json
@_verbose
def export(
    study: str | None,
    o: Path | None,
    trial: int | None,
    top: int | None,
    storage: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Write the best composite of a study as a document to prune with, on this machine or another.

    A trial that was not confirmed is confirmed now, with the network and images of the study's configuration; the
    options say where these are, if they have moved.
    """
    if trial is not None and top is not None:
        raise click.UsageError("Give --trial or --top, not both.")
    if o is None and not as_json:
        raise click.UsageError("Name the file to write with -o FILE, or pass --json.")
    console = start_logging(verbose)
    from hpo.export import choose_trials, export_paths, export_trials
    from hpo.progress import make_progress
    from hpo.report import configuration_of, prune_command
    from search_spaces.documents import write_document

    with _open(storage) as store, make_progress("AUC", console) as progress:
        loaded = _load(store, study)
        chosen = choose_trials(loaded, trial=trial, top=top)
        documents = export_trials(loaded, chosen, options, progress)
    paths = [] if o is None else export_paths(o, len(documents) if top is not None and top > 1 else 1)
    for path, document in zip(paths, documents, strict=bool(paths)):
        write_document(path, document)
    if as_json:
        contents = [document.to_json() for document in documents]
        print_json(contents if top is not None else contents[0])
        return
    for path, document in zip(paths, documents, strict=True):
        assert document.study is not None, "it is from a study"
        repair = RepairSpec.from_json(document.repair)
        repaired = f", repaired by {repair}" if repair else ""
        print_parts(f"Wrote {path}: trial {document.study['trial']}, {document.composite.label}{repaired}.")
    print_parts(f"Next:\n  {prune_command(str(paths[0]), configuration_of(loaded))}")


@cli.command(
    examples="""
    hpo prune best.json --rate 0.4 -o slim
    hpo prune best.json --keep-accuracy 0.95 -o slim
    hpo prune best.json --rate 0.4 --repair none -o slim
    hpo prune best.json --flops 0.5 --coupled -o slim --checkpoint resnet18.pt --data folder:flowers
    hpo prune best.json --elastic 0.3,0.5,0.7 -o elastic
    hpo prune --heuristic epsilon-abs --elastic 0.3,0.5 --ranking layer --grow-epochs 10 --grow-images 50 -o elastic
    hpo prune --heuristic taylor --elastic 0.3 --ranking layer --procedure iterative --finetune-epochs 5 -o elastic
    """
)
@click.argument("document", metavar="[DOCUMENT]", required=False)
@_amount(
    "--rate",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Prune this share of the components.",
)
@_amount(
    "--keep-accuracy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Prune as much as keeps this share of the unpruned accuracy.",
)
@_amount(
    "--params",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Keep at most this share of the parameters.",
)
@_amount(
    "--flops",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Keep at most this share of the multiply-adds.",
)
@_amount(
    "--elastic",
    metavar="LEVELS",
    help="Make one network of several nested sizes, switched at run time: the whole one and those without these "
    "shares of the components, such as 0.3,0.5,0.7.",
)
@click.option(
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="New directory to write slim.pt2, slim.safetensors and report.json to; of an elastic network "
    "elastic.safetensors and report.json.",
)
@click.option(
    "--coupled",
    is_flag=True,
    help="Also prune whole coupled groups (torch-pruning), measured anew; of an elastic network nothing else.",
)
@_elastic(
    "--heuristic",
    metavar="NAME",
    help="Rank by this published composite or baseline (see `hpo spaces`), without a document.",
)
@_elastic(
    "--grow-epochs",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Train the smallest level, and then what each larger one has beyond it, for so many epochs; 0 leaves all "
    "weights as they are.",
)
@_elastic(
    "--grow-learning-rate",
    type=click.FloatRange(0, min_open=True),
    metavar="RATE",
    help="With --grow-epochs: largest learning rate of its cosine schedule; batch norm is folded, so large ones "
    f"diverge.  [default: {LEARNING_RATE:g}]",
)
@_elastic(
    "--grow-images",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --grow-epochs: so many training images of each class.  [default: the reference images]",
)
@configuration_options("model", "data")
@configuration_options("objective", only=["batch-size", *_RANKED, "repair", "repair-strength", "device"])
@_config
@_json
@_verbose
def prune(
    document: str | None,
    rate: float | None,
    keep_accuracy: float | None,
    params: float | None,
    flops: float | None,
    elastic: str | None,
    o: Path,
    coupled: bool,
    heuristic: str | None,
    grow_epochs: int,
    grow_learning_rate: float | None,
    grow_images: int | None,
    config: Path | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Prune a network with an exported composite, and write the smaller network.

    The document's network and images are used where no option says otherwise. What is left is refitted to the unpruned
    network's outputs on the reference images, unless --repair says otherwise or it is fine-tuned. slim.pt2 is a program
    that loads and runs with torch alone.

    With --elastic the result is one network of several sizes that share their weights: the smallest is pruned, and
    with --grow-epochs repaired and trained first, then larger ones are grown around it, which stays as it is.
    `objectives.load_elastic` loads it.
    """
    given_amounts: dict[AmountKind, float | None] = {
        "rate": rate,
        "keep_accuracy": keep_accuracy,
        "parameters": params,
        "flops": flops,
    }
    wanted = {kind: value for kind, value in given_amounts.items() if value is not None}
    if len(wanted) + (elastic is not None) != 1:
        raise click.UsageError("Give one of --rate, --keep-accuracy, --params, --flops and --elastic.")
    _check_elastic(elastic is not None, document, heuristic, grow_epochs, grow_learning_rate, grow_images)
    console = start_logging(verbose)
    from hpo.progress import make_progress

    content = None if document is None else _read_document(document)
    configuration, given = _resolve_with(content, options, config)
    named = given_fields(options, config)
    # The ranking's scope may be another one, so that no layer goes as a whole.
    by_document = [name for name in _RANKED if OPTIONS[name].field in named and (elastic is None or name != "ranking")]
    if content is not None and by_document:
        raise ConfigurationError(f"The document says how pruning proceeds; leave `--{by_document[0]}` out.")
    from objectives.pruning.prune import PruneAmount
    from objectives.pruning.slim_files import check_output

    amounts = [PruneAmount(kind, value) for kind, value in wanted.items()]
    check_output(o)
    trains = configuration.procedure_spec().fine_tunes
    if elastic is not None and {"repair", "repair_strength"} & named and not (grow_epochs or trains):
        raise ConfigurationError(
            "The levels of an elastic network share weights, which a repair fits to the smallest alone until larger "
            "ones are trained around it; add `--grow-epochs N`, or leave `--repair` out."
        )
    usual = configuration.procedure_spec().usual_repair
    configuration = replace(configuration, repair=configuration.repair or usual)
    with make_progress("AUC", console) as progress:
        if elastic is not None:
            from hpo.elastic import Growing, make_elastic
            from hpo.report import elastic_parts
            from objectives.elastic.prune import parse_levels

            levels = parse_levels(elastic)

            repair = NO_REPAIR if trains else configuration.repair_spec()
            growing = Growing(grow_epochs, grow_learning_rate or LEARNING_RATE, grow_images, repair)
            ranker = _ranker(heuristic, None, False, None, None) if content is None else content.composite
            progress.phase("Loading network and images")
            problem = _load_problem(configuration, content, given)
            made = make_elastic(problem, ranker, levels, o, coupled, growing, given, progress)
            result, parts = made.to_json(), elastic_parts(made)
        else:
            from hpo.problem import load_model_and_task
            from hpo.report import prune_parts
            from objectives.pruning.prune import prune as run

            assert content is not None, "without --elastic there is a document"
            progress.phase("Loading network and images")
            model, task = load_model_and_task(configuration, given)
            progress.phase("Pruning")
            report = run(
                model,
                task,
                content,
                amount=amounts[0],
                coupled=coupled,
                output=o,
                device=configuration.device,
                batch_size=configuration.batch_size,
                repair=configuration.repair_spec(),
            )
            result, parts = report.to_json(), prune_parts(report)
    if as_json:
        print_json(result)
    else:
        print_parts(*parts)


def _check_elastic(
    is_elastic: bool,
    document: str | None,
    heuristic: str | None,
    grow_epochs: int,
    grow_learning_rate: float | None,
    grow_images: int | None,
) -> None:
    """Refuse options of `prune` that don't go together."""
    if not is_elastic:
        if heuristic is not None or grow_epochs:
            raise click.UsageError("--heuristic and --grow-epochs go with --elastic.")
        if document is None:
            raise click.UsageError("Missing argument 'DOCUMENT'.")
    elif (document is None) == (heuristic is None):
        raise click.UsageError("Give DOCUMENT or --heuristic.")
    if not grow_epochs and (grow_learning_rate is not None or grow_images is not None):
        raise click.UsageError("--grow-learning-rate and --grow-images go with --grow-epochs.")
    if grow_learning_rate is not None and not math.isfinite(grow_learning_rate):
        raise click.UsageError(f"--grow-learning-rate must be a finite number, but got {grow_learning_rate}.")


@cli.command(
    examples="""
    hpo dashboard
    hpo dashboard --storage sqlite:///studies.db --port 9000
    """
)
@_storage
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; there is no password.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--allow-writes", is_flag=True, help="Let visitors rename and delete studies.")
@_verbose
def dashboard(storage: str | None, host: str, port: int, allow_writes: bool, verbose: bool) -> None:
    """Show the studies in the browser with optuna-dashboard, until Ctrl-C."""
    start_logging(verbose)
    from storage.dashboard import serve

    def announce(address: str) -> None:
        click.echo(f"Dashboard: {address} (Ctrl-C ends it)")

    serve(_storage_url(storage), host=host, port=port, allow_writes=allow_writes, on_ready=announce)


@cli.group(
    examples="""
    hpo db init
    hpo db check
    """
)
def db() -> None:
    """Set up the database of a store, and look after it."""


@db.command(
    examples="""
    hpo db init
    hpo db init --storage postgresql+psycopg://ada@db.example.org/studies
    HPO_DASHBOARD_PASSWORD=... hpo db init --dashboard-role dashboard
    """
)
@_storage
@click.option(
    "--dashboard-role",
    metavar="NAME",
    help="On PostgreSQL, also let this role read everything and write nothing; its password is taken from the "
    "environment variable HPO_DASHBOARD_PASSWORD.",
)
@_json
@_verbose
def init(storage: str | None, dashboard_role: str | None, as_json: bool, verbose: bool) -> None:
    """Create or upgrade the tables of a store.

    Studies stay as they are. Any number of processes may do so at once. A server's database must be there already
    (`createdb NAME`); the dashboard's role takes a user who owns it and may create roles (`ALTER ROLE ada CREATEROLE`).
    """
    start_logging(verbose)
    from hpo.administration import initialization_json, initialization_lines, initialize

    done = initialize(_storage_url(storage), dashboard_role)
    if as_json:
        print_json(initialization_json(done))
    else:
        print_parts(*initialization_lines(done))


@db.command(
    examples="""
    hpo db check
    hpo db check --storage sqlite:///studies.db --json
    """
)
@_storage
@_json
@_verbose
@click.pass_context
def check(ctx: click.Context, /, storage: str | None, as_json: bool, verbose: bool) -> None:
    """Show the health of a store.

    Changes nothing; exits with 1 where something is wrong.
    """
    start_logging(verbose)
    from hpo.administration import health_json, health_parts
    from storage.health import check as look

    health = look(_storage_url(storage))
    if as_json:
        print_json(health_json(health))
    else:
        print_parts(*health_parts(health))
    if health.problems:
        ctx.exit(1)


@cli.command(
    examples="""
    hpo gc
    hpo gc --dry-run
    hpo gc --older-than 24h --yes
    hpo gc --measurements-older-than 2160h
    """
)
@_storage
@click.option(
    "--older-than",
    default="1h",
    show_default=True,
    metavar="TIME",
    help="Leave files alone that were written later: seconds, or 90s, 30m, 2h. A driver may be about to record them.",
)
@click.option(
    "--measurements-older-than",
    metavar="TIME",
    help="Also forget what studies have measured of pruned networks before then: later studies measure it again.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@_verbose
def gc(
    storage: str | None,
    older_than: str,
    measurements_older_than: str | None,
    dry_run: bool,
    yes: bool,
    verbose: bool,
) -> None:
    """Clear away what drivers that died have left.

    Releases trials that are running though nobody drives their study, so that a launch goes on with them, and removes
    artifacts that nothing refers to, and old measurements where it is told to. Says first what it is about to do, and
    asks.
    """
    start_logging(verbose)
    from hpo.administration import clear, leftovers_lines, parse_age
    from storage.leftovers import find_leftovers
    from storage.store import StudyStore

    age, measured_before = parse_age(older_than), None
    if measurements_older_than is not None:
        measured_before = datetime.now(UTC) - parse_age(measurements_older_than, "--measurements-older-than")
    with StudyStore.open(_storage_url(storage), read_only=dry_run, create=False) as store:
        leftovers = find_leftovers(store, age, measured_before)
        if not leftovers:
            print_parts(f"Nothing to do in {store.url_masked}.")
            return
        print_parts(*leftovers_lines(leftovers, store))
        if dry_run:
            return
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigurationError("Standard input is no terminal to ask at; pass --yes, or --dry-run to look.")
            click.confirm("Go on?", abort=True)
        for done in clear(store, leftovers):
            print_parts(done)


@cli.command(
    examples="""
    hpo spaces
    hpo spaces --json
    """
)
@_json
@_verbose
def spaces(as_json: bool, verbose: bool) -> None:
    """List what can be searched: spaces, heuristics, baselines, samplers and metrics."""
    start_logging(verbose)
    from hpo.catalogue import catalogue, catalogue_tables

    if as_json:
        print_json(catalogue())
    else:
        print_parts(*catalogue_tables())


# What commands share


def _print_study(configuration: "LaunchConfiguration", *, finished_before: bool) -> None:
    from hpo.report import StudyReport, next_commands
    from storage.errors import StoreUnreachableError
    from storage.patience import Outages, Patience
    from storage.store import StudyStore
    from storage.urls import mask_password

    def read(again: bool) -> StudyReport:
        with StudyStore.open(configuration.storage, read_only=True) as store:
            return StudyReport.of(store.load(configuration.study))

    # Everything is stored: a database that is away just now must not let the launch fail.
    patience = Patience(configuration.store_timeout_s)
    report = Outages(patience, mask_password(configuration.storage), (StoreUnreachableError,)).wait_out(read)
    if finished_before:
        print_parts(f"Study {configuration.study} is finished; a larger --n-trials goes on with it.")
    commands = next_commands(report, configuration.storage)
    print_parts(*report.parts(), "\n".join(["Next:", *(f"  {line}" for line in commands)]))


def _storage_url(storage: str | None) -> str:
    from storage.urls import default_storage_url

    return storage or default_storage_url()


@contextmanager
def _open(storage: str | None) -> "Iterator[StudyStore]":
    from storage.store import StudyStore

    with StudyStore.open(_storage_url(storage), read_only=True) as store:
        yield store


def _load(store: "StudyStore", name: str | None) -> Any:
    """The study of this name, or the only one."""
    from hpo.errors import NothingFoundError

    if name is None:
        names = [summary.name for summary in store.summaries()]
        if not names:
            raise NothingFoundError(f"There is no study in {store.url_masked}; start one with `hpo launch`.")
        if len(names) > 1:
            raise NothingFoundError(f"Name one of the {len(names)} studies: {', '.join(names)}.")
        (name,) = names
    return store.load(name)


def _read_document(path: str) -> "CompositeDocument":
    from search_spaces.documents import load_document

    return load_document(path)


def _contestants(criteria: str, study: str | None, storage: str | None) -> "list[Contestant]":
    """What `hpo compare` compares, by its names."""
    from hpo.comparison import Contestant
    from search_spaces.heuristics import heuristic

    names = [name.strip() for name in criteria.split(",")]
    if len(set(names)) < max(2, len(names)):
        raise ConfigurationError(f"`--criteria` must name at least two, each once, but got {criteria!r}.")
    if study is not None and "best" not in names:
        raise ConfigurationError(
            "`--study` says whose best is compared, but `--criteria` has no `best`; leave one out."
        )
    contestants = []
    for name in names:
        if name == "best":
            contestants.append(_best_of(study, storage))
        elif name.endswith(".json"):
            document = _read_document(name)
            contestants.append(Contestant(name, document.composite, document.layer_groups))
        else:
            contestants.append(Contestant(name, heuristic(name)))
    return contestants


def _best_of(study: str | None, storage: str | None) -> "Contestant":
    from hpo import trials
    from hpo.comparison import Contestant
    from hpo.driver import DESCRIPTION
    from hpo.export import choose_trials

    with _open(storage) as store:
        loaded = _load(store, study)
        (trial,) = choose_trials(loaded)
        composite = trials.composite_of(trial)
        assert composite is not None, "a complete trial has one"
        return Contestant("best", composite, loaded.user_attrs[DESCRIPTION]["layer_groups"])


def _ranker(
    heuristic: str | None, rules: str | None, absolute: bool, epsilon: float | None, attention: str | None
) -> "Ranker":
    from search_spaces.composites import CompositeSpec
    from search_spaces.heuristics import heuristic as named

    if heuristic is not None:
        return named(heuristic)
    assert rules is not None, "one of the three is given"
    spec = CompositeSpec.parse_rules(rules, abs=absolute, epsilon=epsilon, attention=attention)
    if epsilon is not None and spec.epsilon is None:
        raise ConfigurationError(f"`--epsilon {epsilon:g}` is for the Epsilon rule, which --rules lacks; leave it out.")
    return spec


def _resolve_with(
    document: "CompositeDocument | None", options: dict[str, Any], config: Path | None
) -> "tuple[LaunchConfiguration, Container[str]]":
    """The configuration, in which a document's settings hold over the defaults, and the fields that may run code.

    Raises:
        ConfigurationError: As `resolve`, or the file has a key that is no option of this command.
    """
    in_file = given_fields({}, config)
    if ignored := [option.name for option in OPTIONS.values() if option.field in in_file - set(options)]:
        raise ConfigurationError(
            f"Key {ignored[0]!r} of {str(config)!r} is no option of `{click.get_current_context().command_path}`; "
            "leave it out."
        )
    if document is None:
        return resolve(options, config), ("model", "data", "space")
    from hpo.export import document_options
    from hpo.problem import refuse_imports

    configuration = resolve(options, config, document_options(document))
    given = given_fields(options, config)
    refuse_imports(configuration, given, "The document")
    return configuration, given


def _load_problem(
    configuration: "LaunchConfiguration", document: "CompositeDocument | None", given: "Container[str]"
) -> "LoadedProblem":
    from hpo.problem import load_problem
    from search_spaces.spaces import load_space

    if document is None:
        space = None if configuration.space is None else load_space(configuration.space)
        return load_problem(configuration, None if space is None else space.layer_groups)
    return load_problem(configuration, None, given, document)


def _same_command(ctx: click.Context) -> str:
    """This command as it was typed, but for passwords."""
    from storage.urls import mask_password

    return shlex.join([*ctx.command_path.split(), *map(mask_password, ctx.meta[ARGUMENTS])])


def main() -> NoReturn:
    """Entry point of `hpo`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)
    try:
        cli(prog_name="hpo")
    except SystemExit as exit:
        if exit.code:
            # The worker's thread may be inside a long computation, which nothing can end but the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit.code if isinstance(exit.code, int) else 1)
        raise
    raise AssertionError("click ends with SystemExit")


if __name__ == "__main__":
    main()
