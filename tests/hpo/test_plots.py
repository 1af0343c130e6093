import threading

import pytest
from matplotlib.image import imread
from optuna.artifacts import get_all_artifact_meta

from hpo.plots import CurvePage, CurvePlotter, curve_csv, curve_png, study_png
from search_spaces.heuristics import HEURISTICS
from storage.store import StudyStore


@pytest.fixture
def curve(make_problem):
    return make_problem().evaluate(HEURISTICS["zplus"], "search").curve


def test_the_table_has_a_row_per_rate(curve):
    header, first, *rest = curve_csv(curve, ("cat", "a,b")).decode().splitlines()
    assert header == 'rate,accuracy,parameters,flops,accuracy cat,"accuracy a,b"'
    assert first == f"0.0,{curve.accuracies[0]},100,1000,{curve.accuracies[0]},{curve.accuracies[0]}"
    assert len(rest) == 3


def test_every_class_accuracy_needs_a_name(curve):
    with pytest.raises(ValueError, match="argument 2"):
        curve_csv(curve, ("cat", "cow", "dog"))


@pytest.mark.parametrize("draw", [lambda curve: curve_png(curve, "a\nb"), lambda c: study_png({"a": c}, {"b": c}, "s")])
def test_pictures_are_pictures(curve, draw, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(draw(curve))
    pixels = imread(path)
    assert pixels.shape[0] == 400
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_a_page_keeps_nothing_of_its_last_picture(curve, make_problem):
    page = CurvePage(curve.rates)
    other = page.png(make_problem().evaluate(HEURISTICS["epsilon"], "search").curve, "another\ntitle")
    assert page.png(curve, "t") == curve_png(curve, "t") != other


def test_a_page_is_for_its_rates(curve):
    with pytest.raises(ValueError, match="`curve` must have the rates"):
        CurvePage((0.0, 1.0)).png(curve, "t")


def test_pictures_are_drawn_on_any_thread(curve):
    drawn = []
    threads = [threading.Thread(target=lambda: drawn.append(curve_png(curve, "t"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 1


def test_a_picture_that_cannot_be_drawn_ends_no_other(curve, url, caplog):
    with StudyStore.open(url) as store:
        study = store.create_or_resume("s", identity={}, configuration={})
        trials = [study.ask(), study.ask()]
        with CurvePlotter(store) as plotter:
            plotter.draw(trials[0], curve, "$\\nonsense$")  # Matplotlib's mathematics
            plotter.draw(trials[1], curve, "t")
            assert plotter.finish(60)
    assert [len(get_all_artifact_meta(trial, storage=store.storage)) for trial in trials] == [0, 1]
    [message] = [record.message for record in caplog.records if "not drawn" in record.message]
    assert message.startswith("The curve of trial 0 is not drawn: ")
    assert "\n" not in message
