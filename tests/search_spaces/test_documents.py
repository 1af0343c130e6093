import copy
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import (
    AGGREGATES,
    ATTENTION_RULES,
    GROUPS,
    NORMALIZATIONS,
    PROCEDURES,
    REPAIRS,
    RULE_DEFAULTS,
    CompositeDocument,
    CompositeSpec,
    DocumentError,
    DocumentVersionError,
    DocumentWriteError,
    Iterative,
    OneShot,
    RuleSpec,
    SearchSpaceError,
    TaskRelevant,
    document_schema,
    load_document,
    load_space,
    write_document,
)


def content() -> dict[str, Any]:
    return {
        "version": 1,
        "kind": "pruning-hpo/composite",
        "composite": {
            "rules": {
                "LLR": {"name": "Epsilon", "epsilon": 1e-6},
                "MLL": {"name": "Gamma", "gamma": 0.25},
                "HLL": {"name": "ZPlus"},
                "FCL": {"name": "AlphaBeta", "alpha": 2.0, "beta": 1.0},
            },
            "abs": True,
        },
        "layer_groups": {"conv1": "LLR", "layer1.0.conv1": "MLL", "fc": "FCL"},
        "abs_scope": "sum",
        "output_relevance": "one",
        "procedure": "one_shot",
        "rates": [0.0, 0.25, 0.5],
        "repair": {"method": "refit", "strength": None},
        "preprocessing": {"size": [32, 32], "mean": [0.5], "std": [0.25], "crop": 1.0, "interpolation": "bicubic"},
        "references": {"per_class": 10, "seed": 0, "sha256": "0" * 64, "source": "digits"},
        "model": {
            "name": "no_such_package.models:build",
            "options": {"depth": 8},
            "fingerprint": "sha256:1",
            "num_classes": 10,
            "classes": None,
            "component_widths": {"conv1": 16, "layer1.0.conv1": 16},
        },
        "data": {"source": "digits", "fingerprint": "sha256:2", "classes": [0, 1]},
        "study": {"name": "s", "trial": 3, "n_trials": 60, "sampler": "tpe", "metric": "auc", "value": 0.5},
        "curve": {"rates": [0.0, 0.25, 0.5], "accuracies": [0.9, 0.8, 0.1], "flops": [3, 2, 1]},
        "figures": {"auc": 0.5, "top_rate": None},
        "confirmation": {
            "auc": 0.5,
            "n_images": 100,
            "accuracies": [0.9, 0.8, 0.1],
            "differences": {"zplus": {"difference": 0.1, "low": -0.05, "high": 0.2}},
        },
        "versions": {"torch": "2.9.0"},
        "created": "2025-01-31T12:00:00+00:00",
    }


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    document = content()
    *parents, last = path
    place: Any = document
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


def test_documents_of_before_there_was_repair_repair_nothing() -> None:
    document = CompositeDocument.from_json(changed(("repair",), ...))
    assert document.repair == {"method": "none", "strength": None}


def test_a_procedure_has_its_options() -> None:
    assert CompositeDocument.from_json(content()).procedure_spec == OneShot()
    assert "procedure_options" not in CompositeDocument.from_json(content()).to_json()
    value = {**content(), "procedure": "iterative", "procedure_options": {"step_share": 0.1}}
    document = CompositeDocument.from_json(value)
    assert document.procedure_spec == Iterative(0.1)
    assert CompositeDocument.from_json(document.to_json()) == document


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        ({"method": "rifit"}, "$.repair.method has the unknown value 'rifit'. Did you mean 'refit'?"),
        ({"method": "refit", "strength": 0}, "$.repair.strength is 0, but must be above 0."),
        ({"method": "none", "strength": 0.1}, "$.repair cannot be used: Repair none takes no strength"),
        ({"strength": 0.1}, "$.repair lacks 'method'."),
        ({"method": "bn", "images": 3}, "$.repair has the unknown key 'images'."),
    ],
)
def test_repairs_that_cannot_be_used_are_refused(repair: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=f"^{re.escape(message)}"):
        CompositeDocument.from_json(changed(("repair",), repair))


SPLIT = {"scenario": "new_classes", "T": ["2"], "P": ["0"], "F": ["1"]}


def test_task_relevant_pruning_has_a_split() -> None:
    value = changed(("procedure",), "task_relevant")
    value["data"]["split"] = SPLIT
    document = CompositeDocument.from_json(value)
    assert document.procedure_spec == TaskRelevant()
    assert document.to_json()["data"]["split"] == SPLIT


@pytest.mark.parametrize(
    ("procedure", "split", "message"),
    [
        ("task_relevant", None, "$.data lacks a split, which procedure task_relevant alone needs."),
        ("one_shot", SPLIT, "$.data has a split, which procedure task_relevant alone needs."),
        ("task_relevant", {**SPLIT, "F": ["0"]}, "$.data.split cannot be used: The class '0' is in both P and F of a"),
        ("task_relevant", {**SPLIT, "F": "1"}, "$.data.split.F is '1', but must be of type array."),
    ],
)
def test_splits_that_cannot_be_used_are_refused(procedure: str, split: object, message: str) -> None:
    value = changed(("procedure",), procedure)
    value["data"] |= {} if split is None else {"split": split}
    with pytest.raises(DocumentError, match=f"^{re.escape(message)}"):
        CompositeDocument.from_json(value)


def test_schema_is_valid_and_names_what_the_code_knows() -> None:
    schema = document_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == "urn:pruning-hpo:schema:composite:1"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["version"] == {"const": 1}
    assert schema["properties"].keys() == content().keys() | {"components", "procedure_options", "ranking"}
    assert schema["properties"]["procedure"]["enum"] == list(PROCEDURES)
    known = {field.name for procedure in PROCEDURES.values() for field in fields(procedure)}
    assert schema["properties"]["procedure_options"]["properties"].keys() == known
    assert schema["$defs"]["rule"]["properties"]["name"]["enum"] == list(RULE_DEFAULTS)
    assert schema["properties"]["repair"]["properties"]["method"]["enum"] == list(REPAIRS)
    composite = schema["properties"]["composite"]["properties"]
    assert composite["attention"]["enum"] == list(ATTENTION_RULES)
    assert composite["aggregate"]["enum"] == list(AGGREGATES)
    assert composite["normalize"]["enum"] == list(NORMALIZATIONS)
    assert schema["properties"]["layer_groups"]["additionalProperties"]["enum"] == list(GROUPS)


def test_the_example_is_valid_for_any_json_schema_reader() -> None:
    jsonschema.validate(content(), document_schema(), cls=jsonschema.Draft202012Validator)


def test_the_choice_of_components_is_written_where_it_is_not_the_usual_one() -> None:
    document = load_document({**content(), "components": "mlp", "ranking": "kind"})
    assert (document.components, document.ranking) == ("mlp", "kind")
    assert document.to_json() == {**content(), "components": "mlp", "ranking": "kind"}
    assert (load_document(content()).components, load_document(content()).ranking) == ("all", "global")
    with pytest.raises(DocumentError, match=r"\$.components has the unknown value 'head'. Did you mean 'heads'"):
        load_document({**content(), "components": "head"})


def test_round_trip(tmp_path: Path) -> None:
    document = load_document(content())
    assert document.to_json() == content()
    assert list(document.to_json()) == list(content())
    path = tmp_path / "best.json"
    write_document(path, document)
    assert load_document(path) == load_document(str(path)) == document
    assert json.loads(path.read_text()) == content()


@given(st.sampled_from(load_space("cnn-extended").grid()), st.sampled_from([None, *ATTENTION_RULES]))
def test_every_composite_makes_a_document(point: CompositeSpec, attention: str | None) -> None:
    composite = replace(point, attention=attention)
    assert load_document({**content(), "composite": composite.to_json()}).composite == composite


def test_what_may_be_left_out() -> None:
    required = document_schema()["required"]
    document = load_document({key: value for key, value in content().items() if key in required})
    assert (document.study, document.curve, document.confirmation, document.figures) == (None, None, None, {})
    assert load_document(document.to_json()) == document


def test_construction_takes_tuples_and_stamps_the_time() -> None:
    fields = {**content(), "composite": CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True), "rates": (0, 0.25, 0.5)}
    fields["preprocessing"]["size"] = (32, 32)
    del fields["created"]
    document = CompositeDocument(**fields)
    assert document.created.endswith("+00:00")
    assert document.preprocessing["size"] == [32, 32]
    assert load_document(document.to_json()) == document


def test_a_document_does_not_follow_its_makers_values() -> None:
    given_values = content()
    document = load_document(given_values)
    given_values["model"]["component_widths"]["conv1"] = -1
    document.to_json()["figures"]["auc"] = "x"
    assert document.to_json() == content()


def test_nothing_that_a_document_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_in_document.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    document = load_document(changed(("model", "name"), "named_in_document:build"))
    assert document.model["name"] == "named_in_document:build"
    assert "named_in_document" not in sys.modules


@pytest.mark.parametrize("version", [2, 0, "1", True, None, 1.5])
def test_other_versions(version: object) -> None:
    with pytest.raises(DocumentVersionError) as caught:
        load_document({"version": version, "whatever": 1})
    assert str(caught.value) == f"document version {version!r} is not known; this release reads version 1."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), ..., "$ lacks 'version'; `hpo export` writes whole ones."),
        (("kind",), "x", "$.kind is 'x', which breaks the schema's const \"pruning-hpo/composite\"."),
        (("modle",), {}, "$ has the unknown key 'modle'. Did you mean 'model'? Known: abs_scope, "),
        (
            ("composite", "rules", "LLR", "name"),
            "Epsillon",
            "$.composite.rules.LLR.name has the unknown value 'Epsillon'. Did you mean 'Epsilon'? Known: AlphaBeta, ",
        ),
        (
            ("composite", "rules", "LLR", "gamma"),
            1,
            "$.composite.rules.LLR has the unknown key 'gamma'. Known: epsilon",
        ),
        (("composite", "rules", "LLR", "epsilon"), ..., "$.composite.rules.LLR lacks 'epsilon'."),
        (("composite", "rules", "LLR", "epsilon"), 0, "$.composite.rules.LLR.epsilon is 0, but must be above 0."),
        (("composite", "rules", "LLR", "epsilon"), float("nan"), "$.composite.rules.LLR.epsilon is nan, but must be a"),
        (("composite", "rules", "FCL", "alpha"), 3.0, "$.composite cannot be used: Rule AlphaBeta needs alpha - beta"),
        (("composite", "rules", "FCL"), ..., "$.composite.rules lacks 'FCL'."),
        (("composite", "rules", "XXX"), {}, "$.composite.rules has the unknown key 'XXX'."),
        (("composite", "abs"), 1, "$.composite.abs is 1, but must be of type boolean."),
        (("composite", "attention"), "CPP", "$.composite.attention has the unknown value 'CPP'. Did you mean 'CP'?"),
        (("composite", "normalize"), "L2", "$.composite.normalize has the unknown value 'L2'. Did you mean 'l2'?"),
        (("composite",), "x", "$.composite is 'x', but must be of type object."),
        (
            ("layer_groups", "layer1.0.conv1"),
            "LRL",
            "$.layer_groups['layer1.0.conv1'] has the unknown value 'LRL'. Did",
        ),
        (("layer_groups",), {}, "$.layer_groups is {}, which breaks the schema's minProperties 1."),
        (("abs_scope",), "sums", "$.abs_scope has the unknown value 'sums'. Did you mean 'sum'? Known: element, sum."),
        (("procedure",), "iterativ", "$.procedure has the unknown value 'iterativ'. Did you mean 'iterative'?"),
        (
            ("procedure_options",),
            {"step_share": 0.1},
            "$.procedure_options cannot be used: Procedure one_shot takes no option 'step_share'.",
        ),
        (
            ("procedure_options",),
            {"step_share": 0},
            "$.procedure_options.step_share is 0, but must be at least 0.0001.",
        ),
        (("procedure_options",), {"stepshare": 1}, "$.procedure_options has the unknown key 'stepshare'. Did you"),
        (("rates",), [0, 0.5, 0.5], "$.rates is [0, 0.5, 0.5], but must increase strictly from 0."),
        (("rates",), [0.1, 0.5, 0.6], "$.rates is [0.1, 0.5, 0.6], but must increase strictly from 0."),
        (("rates", 2), 1.0, "$.rates[2] is 1.0, but must be below 1."),
        (("rates",), [0, 0.5], "$.confirmation.accuracies has 3 values for 2 rates."),
        (("curve", "rates"), [0.5, 0.2, 0.1], "$.curve.rates is [0.5, 0.2, 0.1], but must increase strictly from 0."),
        (("curve", "accuracies"), [0.9], "$.curve.accuracies has 1 values for 3 rates."),
        (("curve",), 3, "$.curve is 3, but must be of type object or null."),
        (("preprocessing", "std"), [0], "$.preprocessing.std[0] is 0, but must be above 0."),
        (("references", "sha256"), "abc", "$.references.sha256 is 'abc', which breaks the schema's pattern"),
        (
            ("model", "component_widths", "conv1"),
            0,
            "$.model.component_widths.conv1 is 0, but must be at least 1.",
        ),
        (("figures", "auc"), float("inf"), "$.figures.auc is inf, but must be a finite number."),
        (
            ("figures", "auc"),
            {1},
            "$.figures.auc is {1}, which JSON cannot hold; convert it to a number, text or list.",
        ),
        (("figures", 3), 1, "$.figures has the key 3, but keys must be texts."),
        (("created",), "yesterday", "$.created is 'yesterday', but must be a UTC time such as 2025-01-31T12:00:00+00"),
        (("created",), "2025-01-31T12:00:00", "$.created is '2025-01-31T12:00:00', but must be a UTC time"),
        (("created",), "2025-01-31T12:00:00+02:00", "$.created is '2025-01-31T12:00:00+02:00', but must be a UTC time"),
    ],
)
def test_errors_name_path_and_value(path: tuple[str | int, ...], value: object, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load_document(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_construction_is_checked_as_loading_is() -> None:
    fields = {**content(), "composite": "x"}
    with pytest.raises(DocumentError, match=r"\$.composite is 'x', but must be a CompositeSpec"):
        CompositeDocument(**fields)
    fields = {**content(), "composite": CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True), "abs_scope": "x"}
    with pytest.raises(DocumentError, match=r"\$.abs_scope has the unknown value 'x'"):
        CompositeDocument(**fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "document is not valid JSON: "),
        (b"", "document is not valid JSON: "),
        (b"\xff\xfe\xff", "document is not valid JSON: "),
        (b"[" * 100_000, "document is not valid JSON: "),
        (b"[]", "$ is [], but must be an object."),
        (b"NaN", "$ is nan, but must be a finite number."),
        (b'{"version": 1e999}', "$.version is inf, but must be a finite number."),
        (b'{"version": 2}', "document version 2 is not known; this release reads version 1."),
    ],
)
def test_files_that_are_no_document(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(raw)
    with pytest.raises(DocumentError) as caught:
        load_document(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "valid JSON" not in message or str(caught.value).endswith("; `hpo export` writes one.")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    with pytest.raises(DocumentError) as caught:
        load_document(path)
    assert str(caught.value) == (
        f"{path}: document cannot be read: No such file or directory; `hpo export` writes one."
    )


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, child in children for leaf in leaves(child, (*path, key)))][0 if path else 1 :]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(leaves(content())), json_values)
def test_any_change_loads_or_fails_in_one_line(path: tuple[str | int, ...], value: object) -> None:
    try:
        document = load_document(changed(path, value))
    except SearchSpaceError as error:
        message = str(error)
    else:
        message = ""
        assert load_document(document.to_json()) == document
    assert "\n" not in message


class TestWriting:
    def test_replaces_a_file_as_a_whole_with_the_usual_permissions(self, tmp_path: Path) -> None:
        path = tmp_path / "best.json"
        path.write_text("old")
        write_document(path, load_document(content()))
        (tmp_path / "other").touch()
        assert load_document(path).to_json() == content()
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
        assert sorted(os.listdir(tmp_path)) == ["best.json", "other"]

    def test_follows_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "link.json").symlink_to(tmp_path / "there" / "best.json")
        write_document(tmp_path / "link.json", load_document(content()))
        assert (tmp_path / "link.json").is_symlink()
        assert load_document(tmp_path / "there" / "best.json").to_json() == content()

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            (lambda directory: directory / "missing" / "best.json", "No such file or directory"),
            (lambda directory: directory, "Is a directory"),
            (lambda directory: directory / ("x" * 300), "File name too long"),
        ],
    )
    def test_nothing_is_written_on_errors(self, tmp_path: Path, place: Callable[[Path], Path], reason: str) -> None:
        path = place(tmp_path)
        with pytest.raises(DocumentWriteError) as caught:
            write_document(path, load_document(content()))
        message = f"Document {str(path)!r} cannot be written: {reason}; choose another path or make room."
        assert str(caught.value) == message
        assert isinstance(caught.value, SearchSpaceError)
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
    def test_full_disk(self) -> None:
        with pytest.raises(DocumentWriteError, match="'/dev/full' cannot be written: No space left on device"):
            write_document("/dev/full", load_document(content()))
        assert not Path("/dev/full").is_file()

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
    def test_a_write_that_breaks_off_leaves_the_former_file(self, tmp_path: Path) -> None:
        import subprocess

        path = tmp_path / "best.json"
        write_document(path, load_document(content()))
        program = (
            "import resource, sys\n"
            "from search_spaces import load_document, write_document\n"
            "document = load_document(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
            "write_document(sys.argv[1], document)\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
        assert "cannot be written: File too large" in done.stderr
        assert os.listdir(tmp_path) == ["best.json"]
        assert load_document(path).to_json() == content()


def test_documents_are_frozen() -> None:
    document = load_document(content())
    with pytest.raises(AttributeError):
        document.procedure = "x"  # type: ignore[misc]
    assert copy.deepcopy(document) == document
