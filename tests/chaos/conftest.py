import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the modules of this directory are imported. The root comes first: tests of a package lie in a directory of its
# name, which would take its place.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pytest.register_assert_rewrite("chaos.invariants", "chaos.launches")

from chaos.launches import FULL, ChaosStudy, full_only  # noqa: E402
from chaos.record import Record  # noqa: E402


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("HPO_STORAGE", raising=False)


@pytest.fixture(params=["postgresql", pytest.param("sqlite", marks=full_only)])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes empty stores on each backend."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path / uuid.uuid4().hex}.db"
    new_database: Callable[[], str] = request.getfixturevalue("postgresql_server").new_database
    return new_database


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    """An empty store on each backend."""
    return new_url()


@pytest.fixture
def make_study(tmp_path: Path) -> Iterator[Callable[..., ChaosStudy]]:
    """Makes studies, of which no process outlives the test; each store has a place of its own for artifacts."""
    made: list[ChaosStudy] = []
    places: dict[str, str] = {}

    def make(url: str, **fields: Any) -> ChaosStudy:
        store = fields.get("witness_url") or url
        place = places.setdefault(store, os.environ["HPO_ARTIFACTS"] + (f"-{len(places)}" if places else ""))
        made.append(ChaosStudy(url, tmp_path, Path(place), **fields))
        return made[-1]

    yield make
    for each in made:
        each.end_all()


@pytest.fixture
def full() -> bool:
    """Whether scenarios take the time that the whole suite gives them; the ordinary run has a reduced one."""
    return FULL


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Notes the figures of a scenario, where `tests/chaos/run.py` asks for them."""
    return Record(request.node.name)
