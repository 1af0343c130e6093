"""Trials that run out of memory, are not numbers, or never end."""

import pytest
from chaos.invariants import composite_key
from chaos.launches import RAY, full_only
from chaos.stub import StubSettings
from optuna.trial import TrialState

from storage.store import StudyStore

REASONS = {"memory": "out of memory", "nan": "must be finite", "hang": "longer than"}


@pytest.mark.parametrize("executor", [pytest.param("local", marks=full_only), "ray"])
def test_a_tenth_of_trials_fails(postgresql_server, make_study, record, executor):
    faults = ("memory", "nan", "hang") if executor == "ray" else ("memory", "nan")
    study = make_study(
        postgresql_server.new_database(),
        settings=StubSettings(seconds=0.05, faulty=0.1, faults=faults),
        options=(*RAY, "--trial-timeout", "3") if executor == "ray" else (),
    )
    with study.witness:
        study.run()
    tally = study.check()
    expected = {
        composite.key: fault
        for composite in study.space.grid()
        if (fault := study.settings.fault(composite)) is not None
    }
    assert set(expected.values()) == set(faults)
    with StudyStore.open(study.url, read_only=True) as store:
        failed = store.load("s").get_trials(states=(TrialState.FAIL,))
    assert {composite_key(trial) for trial in failed} == set(expected)
    for trial in failed:
        assert REASONS[expected[composite_key(trial)]] in trial.user_attrs["failure"]
    record(10, tally, failures=len(failed))
