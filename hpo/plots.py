"""Pictures and tables of curves, kept as artifacts of a study and its trials."""

import csv
import io
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from search_spaces.reasons import message_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial, Trial

    from objectives.pruning.curve import Curve
    from objectives.pruning.records import StepRecord
    from storage.store import StudyStore

__all__ = [
    "CurvePage",
    "CurvePlotter",
    "comparison_png",
    "curve_csv",
    "curve_png",
    "layers_png",
    "steps_csv",
    "study_png",
]

_log = logging.getLogger(__name__)

CURVE_CSV = "curve.csv"
CURVE_PNG = "curve.png"
LAYERS_PNG = "layers.png"
STEPS_CSV = "steps.csv"
STUDY_PNG = "study.png"

_N_STEPS_DRAWN = 7


def curve_csv(curve: "Curve", classes: Sequence[str]) -> bytes:
    """The curve as a table: a row per rate, with accuracy overall and per class, parameters and FLOPs.

    Args:
        curve: To be written.
        classes: Name of each of its class accuracies.

    Raises:
        ValueError: There are more or fewer names than class accuracies.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rate", "accuracy", "parameters", "flops", *(f"accuracy {name}" for name in classes)])
    table.writerows(
        [rate, accuracy, parameters, flops, *(each for _, each in zip(classes, of_classes, strict=True))]
        for rate, accuracy, parameters, flops, of_classes in zip(
            curve.rates, curve.accuracies, curve.parameters, curve.flops, curve.class_accuracies, strict=True
        )
    )
    return text.getvalue().encode()


def steps_csv(steps: "Sequence[StepRecord]") -> bytes:
    """The steps of a procedure as a table: a row each, with the components left in every layer.

    Args:
        steps: At least one.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    layers = list(steps[0].left)
    columns = ["n_pruned", "accuracy", "loss", "parameters", "flops"]
    if steps[0].accuracy_task is not None:
        columns.insert(2, "accuracy_task")
    table.writerow(["pruned", *columns[1:], *(f"left {name}" for name in layers)])
    table.writerows(
        [*(getattr(step, column) for column in columns), *(step.left[name] for name in layers)] for step in steps
    )
    return text.getvalue().encode()


class CurvePage:
    """A page for pictures of curves over the same rates; its axes are drawn once, which is most of a picture's work.

    Not thread-safe.
    """

    def __init__(self, rates: tuple[float, ...]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.rates = rates
        figure = _figure(6.0, right=0.96)
        self._canvas = cast("Any", FigureCanvasAgg(figure))  # its methods have no types
        self._axes = figure.add_subplot()
        # Matplotlib leaves out what is animated when it draws a figure.
        (self._line,) = self._axes.plot(rates, [0.0] * len(rates), marker="o", markersize=3, animated=True)
        _label(self._axes)
        self._canvas.draw()
        self._empty = self._canvas.copy_from_bbox(figure.bbox)

    def png(self, curve: "Curve", title: str) -> bytes:
        """A picture of one trial's curve.

        Raises:
            ValueError: The curve has other rates.
        """
        if curve.rates != self.rates:
            raise ValueError(f"`curve` must have the rates {self.rates}, but has {curve.rates}.")
        import numpy as np
        from PIL import Image

        self._canvas.restore_region(self._empty)
        self._line.set_ydata(curve.accuracies)
        self._axes.draw_artist(self._line)
        self._axes.draw_artist(self._axes.set_title(title, fontsize="small"))
        content = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(content, "png")
        return content.getvalue()


def curve_png(curve: "Curve", title: str) -> bytes:
    """A picture of one trial's curve."""
    return CurvePage(curve.rates).png(curve, title)


def study_png(best: Mapping[str, "Curve"], heuristics: Mapping[str, "Curve"], title: str) -> bytes:
    """A picture of the best trials' curves (solid, by label) against the heuristics' (dashed)."""
    figure = _figure(9.0, right=0.75)
    axes = figure.add_subplot()
    for label, curve in best.items():
        axes.plot(curve.rates, curve.accuracies, linewidth=1.2, label=label)
    for label, curve in heuristics.items():
        axes.plot(curve.rates, curve.accuracies, linewidth=1.0, linestyle="--", alpha=0.7, label=label)
    axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _finish(figure, title)


def layers_png(steps: "Sequence[StepRecord]", title: str) -> bytes:
    """A picture of how many components each layer has left after some of the steps (Yeom et al. 2021, Figure 7).

    Args:
        steps: At least one; at most seven of them are drawn, evenly spread.
        title: Of the picture.
    """
    import numpy as np

    figure = _figure(9.0, right=0.85)
    axes = figure.add_subplot()
    layers = list(steps[0].left)
    for index in np.unique(np.linspace(0, len(steps) - 1, _N_STEPS_DRAWN).round().astype(int)):
        step = steps[index]
        label = f"{100 * step.n_pruned / step.n_components:.0f} % pruned"
        axes.plot([step.left[name] for name in layers], marker="o", markersize=3, linewidth=1.0, label=label)
    axes.set(xlabel="layer, in forward order", ylabel="components left")
    axes.set_xticks(range(len(layers)), [str(number) for number in range(1, len(layers) + 1)], fontsize="xx-small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure, title)


def comparison_png(
    values: "Mapping[str, Sequence[float]]",
    curves: "Mapping[str, tuple[Sequence[float], Sequence[float]]]",
    figure_name: str,
) -> bytes:
    """A picture of criteria over the same runs: their mean curves, and each one's figure over the first one's.

    Args:
        values: The figure of every criterion, one value a run, in the same order of runs; each is a dot.
        curves: Rates and mean accuracies of every criterion.
        figure_name: What the values are.
    """
    from matplotlib.figure import Figure

    first, *others = values
    n_panels = 1 + len(others)
    figure = Figure(figsize=(0.4 + 3.4 * n_panels, 3.6), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for name, (rates, accuracies) in curves.items():
        panels[0].plot(rates, accuracies, linewidth=1.2, label=name)
    _label(panels[0])
    panels[0].legend(fontsize="xx-small")
    panels[0].set_title("mean over the runs", fontsize="small")
    every = [value for of_criterion in values.values() for value in of_criterion]
    margin = 0.05 * (max(every) - min(every)) or 0.01
    limits = min(every) - margin, max(every) + margin
    for axes, name in zip(panels[1:], others, strict=True):
        axes.plot(limits, limits, linewidth=0.8, linestyle="--", color="grey")
        axes.scatter(values[first], values[name], s=14, alpha=0.7)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"{figure_name} of {first}", ylabel=name)
        axes.grid(alpha=0.3)
        n_better = sum(other > own for own, other in zip(values[first], values[name], strict=True))
        axes.set_title(f"{name} better in {n_better} of {len(values[name])}", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _figure(width: float, right: float) -> "Figure":
    # The object-oriented interface alone: pyplot keeps global state and is not thread-safe.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.0))
    # Fixed margins: a constrained layout draws everything twice.
    figure.subplots_adjust(left=0.7 / width, right=right, bottom=0.13, top=0.88)
    return figure


def _label(axes: "Axes") -> None:
    axes.set(xlabel="share of components pruned", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _finish(figure: "Figure", title: str) -> bytes:
    (axes,) = figure.axes
    _label(axes)
    return _png(figure, title)


def _png(figure: "Figure", title: str) -> bytes:
    (axes,) = figure.axes
    axes.set_title(title, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


class CurvePlotter:
    """Draws the curves of finished trials on one thread of its own, off the path of the trials.

    A context manager. Pictures that are not drawn when it is left are not lost: the next launch draws what is missing.
    """

    def __init__(self, store: "StudyStore") -> None:
        self._store = store
        self._waiting: queue.SimpleQueue[tuple[FrozenTrial | Trial, Curve, Sequence[StepRecord], str] | None] = (
            queue.SimpleQueue()
        )
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="curve-plotter", daemon=True)

    def draw(
        self, trial: "FrozenTrial | Trial", curve: "Curve", title: str, steps: "Sequence[StepRecord]" = ()
    ) -> None:
        """Have the pictures of a finished trial drawn, one of its procedure's steps too; returns at once."""
        self._waiting.put((trial, curve, steps, title))

    def finish(self, timeout_s: float) -> bool:
        """Wait for the pictures; whether all are drawn. Nothing may be drawn afterwards."""
        self._waiting.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandoned.set()
        self._waiting.put(None)
        # The store is closed next; a picture takes 0.1 s.
        self._thread.join(timeout=2.0)

    def _work(self) -> None:
        page: CurvePage | None = None
        while (item := self._waiting.get()) is not None and not self._abandoned.is_set():
            trial, curve, steps, title = item
            try:
                if steps:  # first: who finds the curve's picture takes it that all are there
                    self._store.add_artifact(trial, LAYERS_PNG, layers_png(steps, title), "image/png")
                if page is None or page.rates != curve.rates:
                    page = CurvePage(curve.rates)
                self._store.add_artifact(trial, CURVE_PNG, page.png(curve, title), "image/png")
            except Exception as error:  # the store's, or whatever drawing raises
                # A picture is not worth a study; what ails the store will show when the next trial is written.
                _log.warning("The curve of trial %d is not drawn: %s", trial.number, message_of(error))
