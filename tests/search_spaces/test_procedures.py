import pytest

from search_spaces import PROCEDURES, Iterative, OneShot, ProcedureError, procedure_from_json


@pytest.mark.parametrize("name", PROCEDURES)
def test_every_procedure_has_defaults_and_returns_from_json(name: str) -> None:
    spec = procedure_from_json(name)
    assert spec == PROCEDURES[name]()
    assert procedure_from_json(spec.name, spec.options) == spec
    assert str(spec).startswith(name)


def test_a_procedure_says_its_options() -> None:
    assert str(OneShot()) == "one_shot"
    assert str(Iterative(step_share=0.1)) == "iterative(step_share=0.1)"
    assert procedure_from_json("iterative", {"step_share": 0.1}) == Iterative(0.1)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), True, "0.1", None])
def test_a_share_is_above_0_and_at_most_1(share: object) -> None:
    with pytest.raises(ProcedureError, match=r"must be a share of at least 0\.0001 and at most 1, but got"):
        Iterative(step_share=share)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("oneshot", {}, "Unknown procedure 'oneshot'. Did you mean 'one_shot'? Known: "),
        ("one_shot", {"step_share": 0.1}, "Procedure one_shot takes no option 'step_share'. It takes none."),
        ("iterative", {"tolerance": 0.1}, "Procedure iterative takes no option 'tolerance'. Known: step_share."),
    ],
)
def test_unknown_names(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ProcedureError) as caught:
        procedure_from_json(name, options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tolerance", 1.0),
        ("tolerance", -0.1),
        ("search_width", 0),
        ("rankings_per_step", 1.5),
        ("evaluations_per_step", True),
        ("fixed_rate", 1),
        ("fixed_order", "no"),
        ("step_share", 0),
    ],
)
def test_values_that_dynamic_does_not_take(option: str, value: object) -> None:
    with pytest.raises(ProcedureError, match=f"^`{option}` of a procedure"):
        procedure_from_json("dynamic", {option: value})
