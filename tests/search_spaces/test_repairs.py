import re

import pytest

from search_spaces import NO_REPAIR, REPAIRS, CompositeSpec, RepairSpec, RepairSpecError

SPECS = [NO_REPAIR, RepairSpec("bn"), RepairSpec("refit"), RepairSpec("refit", 0.1), RepairSpec("bn", 3)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_text_and_json_come_back(spec: RepairSpec) -> None:
    assert RepairSpec.parse(str(spec)) == spec
    assert RepairSpec.from_json(spec.to_json()) == spec
    assert bool(spec) == (spec.method != "none")


def test_texts() -> None:
    assert [str(spec) for spec in SPECS] == ["none", "bn", "refit", "refit(0.1)", "bn(3)"]
    assert {spec.method for spec in SPECS} == set(REPAIRS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepairSpec("rifit"), "Unknown repair 'rifit'. Did you mean 'refit'?"),
        (
            lambda: RepairSpec("none", 0.1),
            "Repair none takes no strength, but got 0.1; choose bn or refit, or omit it.",
        ),
        (lambda: RepairSpec("refit", 0.0), "The strength of a repair must be a number above 0, but got 0.0."),
        (lambda: RepairSpec("refit", float("nan")), "The strength of a repair must be a number above 0, but got nan."),
        (lambda: RepairSpec.parse("refit(much)"), "Repair 'refit(much)' has a strength that is no number."),
        (lambda: RepairSpec.parse("re fit"), "Unknown repair 're fit'."),
        (lambda: RepairSpec.from_json({"strength": 1}), "A repair is an object with 'method' and 'strength', but got"),
    ],
)
def test_refusals_name_the_value(make: object, message: str) -> None:
    with pytest.raises(RepairSpecError, match=f"^{re.escape(message)}"):
        make()  # type: ignore[operator]


def test_a_composite_may_bring_its_repair() -> None:
    plain = CompositeSpec.parse_rules("LLR=Epsilon,MLL=Epsilon,HLL=ZPlus,FCL=Epsilon", abs=True)
    assert plain.repair is None
    assert "repair" not in plain.to_json()
    specs = (RepairSpec("refit", 0.1), NO_REPAIR)
    repaired = [CompositeSpec.from_json({**plain.to_json(), "repair": str(spec)}) for spec in specs]
    assert [composite.repair for composite in repaired] == [RepairSpec("refit", 0.1), NO_REPAIR]
    assert [CompositeSpec.from_json(composite.to_json()) for composite in repaired] == repaired
    assert len({plain.key, *(composite.key for composite in repaired)}) == 3
    assert {composite.attribution_key for composite in repaired} == {plain.attribution_key}
    assert repaired[0].label == f"{plain.label} repair=refit(0.1)"
