"""Full disks, under the database and under the artifacts."""

import pytest
from chaos.launches import GRID_6
from chaos.stub import StubSettings


def fill(disk, n_left):
    """Take all space but about so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - n_left) // 4096 * 4096)
    return ballast


@pytest.mark.parametrize("under", ["SQLite", "the artifacts"])
def test_a_full_disk(mount_disk, tmp_path, monkeypatch, make_study, record, under):
    disk = mount_disk(8 * 1024 * 1024)
    database, artifacts = (disk, tmp_path) if under == "SQLite" else (tmp_path, disk)
    monkeypatch.setenv("HPO_ARTIFACTS", str(artifacts / "artifacts"))
    study = make_study(f"sqlite:///{database}/studies.db", space_path=GRID_6, settings=StubSettings(seconds=0.2))
    with study.witness:
        first = study.start()
        first.wait_for("2/6  trial")
        ballast = fill(disk, n_left=8192)
        assert first.end() == 1, first.log
        assert "No space left" in first.log.splitlines()[-1]
        # Still full: it says so again.
        second = study.start()
        assert second.end() == 1, second.log
        ballast.unlink()
        study.run()
    record(8, study.check(), full_disks=1)
