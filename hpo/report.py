"""Reports on studies: what the store says, as values, JSON and tables."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo import trials
from hpo.config import LaunchConfiguration
from hpo.confirmation import Confirmation
from hpo.driver import CONFIRMATION
from hpo.errors import NothingFoundError
from hpo.racing import RaceSummary, described, given_up
from search_spaces.criteria import CriterionSpec
from search_spaces.imports import Named, runs_code
from search_spaces.procedures import OneShot
from storage.store import CONFIGURATION
from storage.trials import FAILURE, LOSSES

if TYPE_CHECKING:
    from optuna.study import Study
    from rich.table import Table

    from hpo.comparison import Comparison
    from objectives.elastic.prune import ElasticReport
    from objectives.objective import Evaluation
    from objectives.pruning.prune import PruneReport
    from objectives.pruning.records import StepRecord
    from storage.lease import LeaseHolder
    from storage.summaries import StudySummary

__all__ = [
    "LEGEND",
    "StudyReport",
    "TrialSummary",
    "comparison_parts",
    "configuration_of",
    "configuration_table",
    "elastic_parts",
    "evaluation_tables",
    "next_commands",
    "plain_table",
    "prune_command",
    "prune_parts",
    "studies_json",
    "studies_table",
    "trial_json",
    "trial_tables",
]

LEGEND = "Composites are written LLR/MLL/HLL/FCL; abs: ranked by absolute relevance."

_N_REASONS = 5


@dataclass(frozen=True, slots=True)
class TrialSummary:
    """A complete trial in a line.

    Attributes:
        number: Its number in the study.
        composite: Its label.
        value: The study's metric on the search images.
        auc: Area under the curve on the search images.
        heuristic: The heuristic's name, if it is one.
        confirmation_auc: Area under the curve on the confirmation images, if confirmed.
        repair: Of the networks that it prunes, if it isn't left to the study.
    """

    number: int
    composite: str
    value: float
    auc: float
    heuristic: str | None
    confirmation_auc: float | None
    repair: str | None


@dataclass(frozen=True, slots=True)
class StudyReport:
    """A study at one moment.

    Attributes:
        name: The study's name.
        metric: What it maximises.
        configuration: How it was last launched.
        n_trials: Search trials by state.
        n_losses: How often a trial was lost with its worker.
        n_masks: Masks of which its complete trials asked for the accuracy.
        n_known_masks: Those that needed no computation, because a trial of this or another study had measured them.
        failures: Number of failed trials by reason, the most frequent first; heuristics too.
        best: The best trial; None before the first.
        heuristics: Each complete heuristic, best first.
        confirmation: The best trial on images that the search never saw; None until the search has ended.
        race: What races have saved; None where trials don't race.
        driver: Who drives it now; None if nobody does, or it was not asked.
    """

    name: str
    metric: str
    configuration: LaunchConfiguration
    n_trials: Mapping[str, int]
    n_losses: int
    n_masks: int
    n_known_masks: int
    failures: Mapping[str, int]
    best: TrialSummary | None
    heuristics: tuple[TrialSummary, ...]
    confirmation: Confirmation | None
    race: RaceSummary | None
    driver: "LeaseHolder | None" = None

    @classmethod
    def of(cls, study: "Study", driver: "LeaseHolder | None" = None) -> "StudyReport":
        """What the store says of a study, and of its driver where the caller has asked.

        Raises:
            NothingFoundError: The study was made by another program.
        """
        configuration = configuration_of(study)
        stored = study.get_trials(deepcopy=False)
        states = Counter(trial.state for trial in stored if trials.role(trial) == "search")
        best = next(iter(trials.best(stored)), None)
        failures = Counter(
            trial.user_attrs.get(FAILURE, "unknown") for trial in stored if trial.state == TrialState.FAIL
        )
        confirmation = study.user_attrs.get(CONFIRMATION)
        confirmed = None if confirmation is None else Confirmation.from_json(confirmation)
        # A search that went on may have found better since.
        current = confirmed if confirmed is not None and best is not None and confirmed.trial == best.number else None
        heuristic_auc = {} if current is None else current.heuristics
        reports = [_trial_report(trial, heuristic_auc.get(name)) for name, trial in trials.heuristics(stored).items()]
        return cls(
            name=study.study_name,
            metric=configuration.metric,
            configuration=configuration,
            n_trials={state.name.lower(): states[state] for state in TrialState},
            n_losses=sum(trial.user_attrs.get(LOSSES, 0) for trial in stored),
            n_masks=sum(trial.user_attrs.get(trials.MASKS, {}).get("n", 0) for trial in stored),
            n_known_masks=sum(trial.user_attrs.get(trials.MASKS, {}).get("n_known", 0) for trial in stored),
            failures=dict(failures.most_common()),
            best=None if best is None else _trial_report(best, None if current is None else current.auc),
            heuristics=tuple(sorted(reports, key=lambda report: (-report.value, report.number))),
            confirmation=current,
            race=RaceSummary.of(stored, configuration),
            driver=driver,
        )

    @property
    def n_finished(self) -> int:
        """Search trials that count."""
        return sum(self.n_trials[state.name.lower()] for state in trials.FINISHED)

    def to_json(self) -> dict[str, Any]:
        """JSON form, as `hpo status --json` prints it."""
        return {
            "study": self.name,
            "metric": self.metric,
            "n_trials": dict(self.n_trials),
            "n_losses": self.n_losses,
            "n_masks": self.n_masks,
            "n_known_masks": self.n_known_masks,
            "failures": dict(self.failures),
            "best": None if self.best is None else asdict(self.best),
            "heuristics": [asdict(heuristic) for heuristic in self.heuristics],
            "confirmation": None if self.confirmation is None else self.confirmation.to_json(),
            "race": None if self.race is None else self.race.to_json(),
            "driver": None if self.driver is None else asdict(self.driver),
            "configuration": self.configuration.to_json(),
        }

    def parts(self) -> "list[Table | str]":
        """Headline, remarks, best composite, table and verdict, to be printed one after another."""
        best = (
            [] if self.best is None else [f"Best: trial {self.best.number}, {self.best.composite} (LLR/MLL/HLL/FCL)."]
        )
        return [self.headline(), *self.remarks(), *best, self.table(), *filter(None, [self.verdict(), self.caution()])]

    def headline(self) -> str:
        """How far the study is, in a line."""
        wanted = self.configuration.n_trials
        # A grid asks its failed points again, and these count here.
        beyond = wanted is None or self.n_finished > wanted
        counted = f"{self.n_finished}" if beyond else f"{self.n_finished} of {wanted}"
        # Pruned, as Optuna says of trials, would be read as networks here.
        words = {"pruned": "given up", "fail": "failed", "running": "running", "waiting": "waiting"}
        others = [f"{self.n_trials[state]} {word}" for state, word in words.items() if self.n_trials[state]]
        remark = f" ({', '.join(others)})" if others else ""
        procedure = self.configuration.procedure_spec()
        how = self.metric if procedure == OneShot() else f"{self.metric}, procedure {procedure}"
        return f"Study {self.name}: {counted} trials{remark}, {len(self.heuristics)} heuristics, metric {how}."

    def remarks(self) -> list[str]:
        """Who drives the study, what races saved, what was known or lost, why trials failed, a line each."""
        lines = []
        if self.driver is not None:
            workers = self.configuration.workers
            shown = "" if workers is None else f" with {workers} worker{'s' * (workers > 1)}"
            lines.append(f"Driven by {self.driver}{shown}.")
        if self.race is not None:
            lines.append(f"{self.race}")
        if self.n_masks:
            share = 100 * self.n_known_masks / self.n_masks
            lines.append(f"Of {self.n_masks:,} masks, {self.n_known_masks:,} had been measured before ({share:.1f} %).")
        if self.n_losses:
            times = "once" if self.n_losses == 1 else f"{self.n_losses} times"
            lines.append(f"A trial was lost with its worker {times} and asked again.")
        reasons = list(self.failures.items())
        lines += [
            f"Failed {count} times: {reason}" if count > 1 else f"Failed: {reason}"
            for reason, count in reasons[:_N_REASONS]
        ]
        if others := sum(count for _, count in reasons[_N_REASONS:]):
            lines.append(f"{others} more failed for other reasons; see `hpo status --json`.")
        return lines

    def table(self) -> "Table":
        """The best composite against the heuristics: AUC on both sets of images, and by how much the best is better."""
        own = [] if self.metric == "auc" else [self.metric]
        table = plain_table("", numbers=[*own, "AUC search", "confirmation", "best - this [95 %]"])
        if self.best is not None:
            table.add_row(f"best: trial {self.best.number}", *self._cells(self.best), style="bold")
        for heuristic in self.heuristics:
            table.add_row(heuristic.heuristic, *self._cells(heuristic))
        return table

    def verdict(self) -> str:
        """What the confirmation says, in a line; empty before it."""
        if self.confirmation is None or not self.heuristics:
            return ""
        assert self.best is not None, "what is confirmed is the best"
        rival = self.heuristics[0]
        assert rival.heuristic is not None, "a heuristic has a name"
        if rival.composite == self.best.composite:
            return f"The search found nothing better than the heuristic {rival.heuristic}."
        difference = self.confirmation.differences[rival.heuristic]
        return (
            f"On {self.confirmation.n_images} images that the search never saw, the best composite's AUC differs from "
            f"{rival.heuristic}'s by {difference.difference:+.4f} (95 % interval {difference.low:+.4f} to "
            f"{difference.high:+.4f})."
        )

    def caution(self) -> str:
        """That repair has a part in the best composite's lead, in a line; empty where all are repaired alike."""
        heuristics = str(self.configuration.repair_spec())
        if self.best is None or not self.heuristics or self.best.repair in (None, heuristics):
            return ""
        return (
            f"The best trial's networks are repaired by {self.best.repair}, the heuristics' by {heuristics}, which has "
            "a part in the difference; with `--repair METHOD` and a space without repair a study compares all repaired "
            "alike."
        )

    def _cells(self, report: TrialSummary) -> list[str]:
        own = [] if self.metric == "auc" else [f"{report.value:.4f}"]
        cells = [*own, f"{report.auc:.4f}", _number(report.confirmation_auc)]
        if self.confirmation is None or report.heuristic is None or report is self.best:
            return [*cells, ""]
        difference = self.confirmation.differences[report.heuristic]
        return [*cells, f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"]


def configuration_of(study: "Study") -> LaunchConfiguration:
    """The configuration that a study was last launched with.

    Raises:
        NothingFoundError: The study was made by another program.
    """
    saved = study.user_attrs.get(CONFIGURATION)
    if saved is None:
        raise NothingFoundError(f"Study {study.study_name!r} was not made by `hpo launch`; see `hpo list` for others.")
    return LaunchConfiguration.from_json(saved)


def next_commands(report: StudyReport, storage: str) -> list[str]:
    """Commands to go on with after a study, ready to be typed.

    Args:
        report: Of the study.
        storage: The URL that it was opened with.
    """
    from storage.urls import default_storage_url, without_password

    elsewhere = [] if storage == default_storage_url() else ["--storage", without_password(storage)]
    return [
        shlex.join(["hpo", "export", report.name, "-o", "best.json", *elsewhere]),
        prune_command("best.json", report.configuration),
        shlex.join(["hpo", "dashboard", *elsewhere]),
    ]


def prune_command(document: str, configuration: LaunchConfiguration) -> str:
    """The command that prunes with a document, with the options that the document does not hold or may not decide."""
    options: list[str] = []
    fields: tuple[Named, ...] = ("model", "data")
    for option in fields:
        if runs_code(option, text := getattr(configuration, option)):
            options += [f"--{option}", text]
    if configuration.checkpoint is not None:
        options += ["--checkpoint", configuration.checkpoint]
    if configuration.class_map is not None:
        options += ["--class-map", configuration.class_map]
    return shlex.join(["hpo", "prune", document, "--keep-accuracy", "0.95", "-o", "slim", *options])


def configuration_table(configuration: LaunchConfiguration) -> "Table":
    """Every option that has a value."""
    table = plain_table("option", "value")
    for name, value in configuration.to_json().items():
        if value not in (None, {}, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(name, shown)
    return table


def studies_json(summaries: "Sequence[StudySummary]") -> list[dict[str, Any]]:
    """All studies, as `hpo list --json` prints them."""
    return [
        {
            "study": summary.name,
            "n_trials": {state.name.lower(): count for state, count in summary.n_trials.items()},
            "best_value": summary.best_value,
            "created": None if summary.created is None else summary.created.isoformat(),
            "last_completed": None if summary.last_completed is None else summary.last_completed.isoformat(),
        }
        for summary in summaries
    ]


def studies_table(summaries: "Sequence[StudySummary]") -> "Table":
    """All studies, a row each; trials include the heuristics."""
    table = plain_table("study", "trials", "best value", "created", "last trial")
    for summary in summaries:
        states = ", ".join(f"{count} {state.name.lower()}" for state, count in summary.n_trials.items())
        times = (
            "-" if time is None else f"{time:%Y-%m-%d %H:%M} UTC" for time in (summary.created, summary.last_completed)
        )
        table.add_row(summary.name, states or "-", _number(summary.best_value), *times)
    return table


def trial_json(trial: FrozenTrial) -> dict[str, Any]:
    """A trial, as `hpo show --json` prints it."""
    composite = trials.composite_of(trial)
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "role": trials.role(trial),
        "heuristic": trial.user_attrs.get("heuristic"),
        "reused_from": trial.user_attrs.get("reused_from"),
        "composite": None if composite is None else composite.to_json(),
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "figures": trials.figures_of(trial),
        "curve": trial.user_attrs.get("curve"),
        "steps": trial.user_attrs.get(trials.STEPS, []),
        "seconds": trial.user_attrs.get("seconds"),
        "losses": trial.user_attrs.get(LOSSES, 0),
        "failure": trial.user_attrs.get(FAILURE),
        "race": trial.user_attrs.get(trials.RACE),
        "remarks": trial.user_attrs.get("remarks", []),
    }


def trial_tables(trial: FrozenTrial) -> list["Table"]:
    """A trial: what it is, its figures and its curve."""
    facts = plain_table("", "")
    facts.show_header = False
    facts.add_row("trial", str(trial.number))
    facts.add_row("state", trial.state.name.lower())
    facts.add_row("role", " ".join(filter(None, (trials.role(trial), trial.user_attrs.get("heuristic")))))
    if (composite := trials.composite_of(trial)) is not None:
        if isinstance(composite, CriterionSpec):
            facts.add_row("criterion", composite.label)
        else:
            for group, rule in composite.rules.items():
                facts.add_row(group, str(rule))
            for name, value in composite.to_json().items():
                if name != "rules":
                    facts.add_row(name, str(value).lower() if isinstance(value, bool) else str(value))
    if "reused_from" in trial.user_attrs:
        facts.add_row("equals", f"trial {trial.user_attrs['reused_from']}")
    if LOSSES in trial.user_attrs:
        facts.add_row("lost with its worker", str(trial.user_attrs[LOSSES]))
    if FAILURE in trial.user_attrs:
        facts.add_row("failed", trial.user_attrs[FAILURE])
    if (verdict := given_up(trial)) is not None:
        facts.add_row("race", described(verdict))
    for remark in trial.user_attrs.get("remarks", ()):
        facts.add_row("remark", remark)
    for name, seconds in trial.user_attrs.get("seconds", {}).items():
        facts.add_row(name, f"{seconds:.2f} s")
    if trial.state != TrialState.COMPLETE:
        return [facts]
    return [
        facts,
        _figures_table(trials.figures_of(trial)),
        _curve_table(trials.curve_of(trial).to_json()),
        *_steps_tables(trials.steps_of(trial.user_attrs)),
    ]


def evaluation_tables(evaluation: "Evaluation") -> list["Table"]:
    """An evaluation: its figures, its curve and the procedure's steps."""
    return [
        _figures_table(evaluation.figures),
        _curve_table(evaluation.curve.to_json()),
        *_steps_tables(evaluation.steps),
    ]


def comparison_parts(comparison: "Comparison") -> "list[Table | str]":
    """Criteria against the first of them, with intervals over the runs."""
    first = comparison.standings[0].criterion
    numbers = [f"mean {comparison.metric} [95 %]", f"this - {first} [95 %]", "better in"]
    table = plain_table("criterion", numbers=numbers)
    for standing in comparison.standings:
        mean, difference = standing.figure, standing.difference
        cells = ["", ""]
        if difference is not None:
            cells = [
                f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]",
                f"{standing.n_better} of {comparison.n_compared}",
            ]
        table.add_row(standing.criterion, f"{mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}]", *cells)
    failed = [f"{each.criterion} in {each.n_failed}" for each in comparison.standings if each.n_failed]
    left_out = comparison.n_runs - comparison.n_compared
    remark = f"{left_out} of {comparison.n_runs} runs are left out, as criteria failed: {', '.join(failed)}."
    n_compared = comparison.n_compared
    compared = f"{n_compared} run{'' if n_compared == 1 else 's'} compared."
    return [compared, table, remark if failed else ""]


def prune_parts(report: "PruneReport") -> "list[Table | str]":
    """A pruned network against the unpruned one; masked, exact and coupled results apart."""
    table = plain_table("network", numbers=("accuracy", "parameters", "FLOPs", "size", "latency"))
    for name, figures in (("unpruned", report.unpruned), ("exact slim", report.exact), ("coupled", report.coupled)):
        if name == "exact slim":
            table.add_row("masked", f"{report.masked_accuracy:.4f}", "", "", "", "")
        if figures is not None:
            table.add_row(
                name,
                f"{figures.accuracy:.4f}",
                f"{figures.parameters:,}",
                f"{figures.flops:,}",
                f"{figures.size_bytes / 1024:,.0f} KiB",
                f"{figures.latency_ms:.2f} ms",
            )
    repair = report.repair
    agrees = f"The exact slim network agrees with the unpruned one on {100 * repair.agreement:.1f} %"
    measured_on = f"{report.images['n_images']} {report.images['set']} images"
    if repair.method == "none":
        repaired = f"{agrees} of {measured_on}."
    elif repair.seconds is None:
        repaired = (
            f"Before each training repaired by {repair.method}, {_strength(repair.strength)}, on {repair.n_references} "
            f"reference images.\n{agrees} of {measured_on}."
        )
    else:
        assert repair.accuracy_without is not None, "a repair of its own is measured"
        assert repair.agreement_without is not None, "a repair of its own is measured"
        repaired = (
            f"Repaired by {repair.method}, {_strength(repair.strength)}, on {repair.n_references} reference images in "
            f"{repair.seconds:.1f} s: accuracy {repair.accuracy_without:.4f} without, "
            f"{report.exact.accuracy:.4f} with.\n"
            f"{agrees} of {measured_on}, without on {100 * repair.agreement_without:.1f} %."
        )
    images = f"Accuracy on {measured_on}; latency of one image, median."
    removed = f"Pruned {report.n_pruned} of {report.n_components} components by {report.procedure}."
    if report.n_removed_coupled is not None:
        removed += f" The coupled network lost {report.n_removed_coupled}."
    return [
        removed,
        table,
        images,
        repaired,
        *report.warnings,
        "\n".join(["Wrote:", *(f"  {file}" for file in report.files)]),
    ]


def elastic_parts(report: "ElasticReport") -> "list[Table | str]":
    """The levels of an elastic network, the largest first."""
    numbers = ["pruned", "components", "accuracy", "parameters", "FLOPs", "latency", "switch", "latency after it"]
    ungrown = report.ungrown_accuracies
    if ungrown is not None:
        numbers.insert(3, "ungrown")
    table = plain_table("level", numbers=numbers)
    for sparsity, level in zip(report.sparsities, report.levels, strict=True):
        table.add_row(
            str(level.level),
            f"{100 * sparsity:g} %",
            f"{level.n_components:,}",
            f"{level.accuracy:.4f}",
            *([] if ungrown is None else [f"{ungrown[level.level]:.4f}"]),
            f"{level.parameters:,}",
            f"{level.flops:,}",
            f"{level.latency_ms:.2f} ms",
            f"{1000 * level.switch_ms:.1f} µs",
            f"{level.latency_after_switch_ms:.2f} ms",
        )
    growth = report.growth
    is_repaired = report.repair != "none"
    grown = (
        "Nothing was trained after pruning."
        if growth is None
        else f"Grown in {growth['n_epochs']} epoch{'' if growth['n_epochs'] == 1 else 's'} a level on "
        f"{growth['n_images']} images at a learning rate of {growth['learning_rate']:g}"
        f"{', the smallest level repaired by ' + report.repair + ' before' if is_repaired else ''}; "
        f"ungrown is a level's accuracy before{' both' if is_repaired else ''}."
    )
    measured_on = f"Accuracy on {report.images['n_images']} {report.images['set']} images"
    return [
        f"An elastic network of {len(report.levels)} levels and {report.n_components:,} components, ranked by "
        f"{report.ranker}, pruned by {report.procedure}; {report.size_bytes / 1024:,.0f} KiB of weights in all.",
        table,
        f"{measured_on}; latency of one image, and of switching to a level from the next one, median.",
        grown,
        *report.warnings,
        "\n".join(["Wrote:", *(f"  {file}" for file in report.files)]),
    ]


def _strength(strength: float | dict[str, float] | None) -> str:
    if isinstance(strength, dict):
        return f"strength {min(strength.values()):.3g} to {max(strength.values()):.3g} by layer"
    return f"strength {strength:.3g}"


def _trial_report(trial: FrozenTrial, confirmation_auc: float | None) -> TrialSummary:
    composite = trials.composite_of(trial)
    return TrialSummary(
        number=trial.number,
        composite="?" if composite is None else composite.label,
        value=trial.values[0],
        auc=trial.user_attrs["auc"],
        heuristic=trial.user_attrs.get("heuristic"),
        confirmation_auc=confirmation_auc,
        repair=None if composite is None or composite.repair is None else str(composite.repair),
    )


def _figures_table(figures: Mapping[str, float]) -> "Table":
    table = plain_table("figure", numbers=["value"])
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    return table


def _curve_table(curve: Mapping[str, Any]) -> "Table":
    table = plain_table("rate", numbers=("accuracy", "parameters", "FLOPs"))
    for rate, accuracy, parameters, flops in zip(
        curve["rates"], curve["accuracies"], curve["parameters"], curve["flops"], strict=True
    ):
        table.add_row(f"{rate:g}", f"{accuracy:.4f}", f"{parameters:,}", f"{flops:,}")
    return table


def _steps_tables(steps: "Sequence[StepRecord]") -> "list[Table]":
    """A table of a procedure's steps; none where there are none."""
    if not steps:
        return []
    adapts = steps[0].accuracy_task is not None
    before = ("on P, unadapted",) if adapts else ()
    table = plain_table("step", numbers=("pruned", "accuracy", *before, "loss (references)", "parameters", "FLOPs"))
    for number, step in enumerate(steps):
        table.add_row(
            str(number) if number else "before",
            f"{step.n_pruned:,} of {step.n_components:,}",
            f"{step.accuracy:.4f}",
            *([_number(step.accuracy_task)] if adapts else []),
            f"{step.loss:.4f}",
            f"{step.parameters:,}",
            f"{step.flops:,}",
        )
    return [table]


def plain_table(*texts: str, numbers: Sequence[str] = ()) -> "Table":
    """An empty table in the house's look: columns of text, then columns of numbers, aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
