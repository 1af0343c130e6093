import pytest

from search_spaces import PROCEDURES, Iterative, OneShot, ProcedureError, TaskRelevant, procedure_from_json


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
        (
            "iterative",
            {"tolerance": 0.1},
            "Procedure iterative takes no option 'tolerance'. Known: finetune_batch_size",
        ),
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


def test_how_to_fine_tune_has_defaults_and_is_left_out_where_nothing_is() -> None:
    tuned = Iterative(finetune_epochs=2)
    assert tuned.options == {
        "step_share": 0.05,
        "finetune_epochs": 2,
        "finetune_learning_rate": 0.001,
        "finetune_batch_size": 32,
    }
    assert procedure_from_json("iterative", tuned.options) == tuned
    assert tuned.fine_tunes
    assert Iterative().options == Iterative(finetune_epochs=0).options == {"step_share": 0.05}
    assert [name for name in PROCEDURES if procedure_from_json(name).fine_tunes] == ["prune_and_grow", "task_relevant"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("core_share", 0),
        ("core_share", 1),
        ("step_share", 1.1),
        ("finetune_epochs", 0),
        ("finetune_learning_rate", None),
        ("finetune_batch_size", 0),
    ],
)
def test_values_that_prune_and_grow_does_not_take(option: str, value: object) -> None:
    with pytest.raises(ProcedureError, match=f"^`{option}` of a procedure must be"):
        procedure_from_json("prune_and_grow", {option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("step_share", 0),
        ("step_share", 1),
        ("pretrain_epochs", -1),
        ("finetune_epochs", 0),
        ("finetune_learning_rate", float("inf")),
        ("finetune_batch_size", 0),
        ("patience", 0),
    ],
)
def test_values_that_task_relevant_does_not_take(option: str, value: object) -> None:
    with pytest.raises(ProcedureError, match=f"^`{option}` of "):
        procedure_from_json("task_relevant", {option: value})


def test_the_rates_of_task_relevant_are_its_steps_ends() -> None:
    assert TaskRelevant().rates[-1] == 0.8926258176  # ten iterations of 20 %
    assert TaskRelevant().rates[:4] == (0, 0.2, 0.36, 0.488)
    assert TaskRelevant(0.9).rates == (0, 0.9, 0.99)
    assert TaskRelevant(0.995).rates == (0, 0.995)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_epochs": -1}, "`finetune_epochs` of a procedure must be a whole number of at least 0, but got -1."),
        ({"finetune_epochs": True}, "`finetune_epochs` of a procedure must be a whole number"),
        (
            {"finetune_epochs": 1, "finetune_learning_rate": 0},
            "`finetune_learning_rate` of a procedure must be above 0",
        ),
        (
            {"finetune_epochs": 1, "finetune_batch_size": 0},
            "`finetune_batch_size` of a procedure must be a whole number",
        ),
        (
            {"finetune_batch_size": 8},
            "`finetune_batch_size` of a procedure needs `finetune_epochs` of at least 1; leave",
        ),
    ],
)
def test_values_that_fine_tuning_does_not_take(options: dict[str, object], message: str) -> None:
    with pytest.raises(ProcedureError) as caught:
        procedure_from_json("iterative", options)
    assert str(caught.value).startswith(message)
