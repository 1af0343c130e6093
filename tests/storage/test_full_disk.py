"""A full disk, on a tiny file system of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from storage.errors import StoreFullError
from storage.lease import file_lease
from storage.store import StudyStore
from storage.trials import TrialResult

SIZE = 1024 * 1024


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    return mount_disk(SIZE)


def _fill(disk: Path, n_left: int = 0) -> Path:
    """Take all space but about so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - n_left) // 4096 * 4096)
    return ballast


def _result(**attributes: object) -> TrialResult:
    return TrialResult(value=0.5, curve=dict.fromkeys(range(0, 100, 5), 0.5), attributes=attributes)


def _call(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()


def test_full_database_keeps_finished_trials_and_goes_on(small_disk: Path) -> None:
    url = f"sqlite:///{small_disk}/studies.db"
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        trials = [study.ask() for _ in range(40)]
        finish_all = [partial(store.finish, trial, _result(text="x" * 40_000)) for trial in trials]
        with pytest.raises(StoreFullError) as caught:
            _call(finish_all)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"No space left for {url}; free some and launch again")
        with StudyStore.open(url, read_only=True) as reader:
            finished = [trial for trial in reader.load("digits").trials if trial.state.is_finished()]
            assert [trial.number for trial in finished] == list(range(len(finished)))
            assert 3 < len(finished) < 40
            assert all(trial.user_attrs == {"text": "x" * 40_000} for trial in finished)
            assert all(len(trial.intermediate_values) == 20 for trial in finished)
        store.finish(trials[len(finished)], _result())
        assert len([trial for trial in study.trials if trial.state.is_finished()]) == len(finished) + 1


def test_full_disk_speaks_the_same_through_optuna(small_disk: Path) -> None:
    with StudyStore.open(f"sqlite:///{small_disk}/studies.db") as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        ballast = _fill(small_disk)
        with pytest.raises(StoreFullError, match="No space left"):
            study.set_user_attr("text", "x" * 100_000)
        with pytest.raises(StoreFullError, match="No space left"):
            _call([study.ask] * 1000)
        ballast.unlink()
        study.set_user_attr("text", "x" * 100_000)


def test_full_artifact_directory_leaves_no_part_of_a_file(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", str(small_disk / "artifacts"))
    with StudyStore.open(f"sqlite:///{tmp_path}/studies.db") as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        former = store.add_artifact(study, "plot.png", bytes(SIZE // 2))
        for write in (
            lambda: store.write_artifact("curve.png", bytes(SIZE)),
            lambda: store.add_artifact(study, "plot.png", bytes(SIZE)),
        ):
            with pytest.raises(StoreFullError) as caught:
                write()
            assert str(caught.value).startswith(f"No space left for {small_disk}/artifacts; free some")
            assert "\n" not in str(caught.value)
        assert {path.name for path in (small_disk / "artifacts").iterdir()} == {former, "store.json"}
        with store.artifacts.open_reader(former) as file:
            assert len(file.read()) == SIZE // 2


def test_store_that_does_not_fit_is_not_half_created(small_disk: Path) -> None:
    ballast = _fill(small_disk, n_left=8 * 4096)
    url = f"sqlite:///{small_disk}/studies.db"
    with pytest.raises(StoreFullError, match="No space left"):
        StudyStore.open(url)
    assert [path.name for path in small_disk.iterdir() if path.is_file()] == ["ballast"]
    ballast.unlink()
    with StudyStore.open(url) as store:
        assert store.summaries() == []


def test_lease_that_does_not_fit_is_a_full_disk_too(small_disk: Path) -> None:
    _fill(small_disk)
    with pytest.raises(StoreFullError, match="No space left"), file_lease(small_disk / "locks", "digits"):
        pass
