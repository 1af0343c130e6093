"""The export document: a composite, all that is needed to prune with it again, and the evidence for it."""

import copy
import functools
import itertools
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from search_spaces.choices import AbsScope, Components, OutputRelevance, RankingScope
from search_spaces.composites import CompositeSpec
from search_spaces.errors import (
    CompositeError,
    DocumentError,
    DocumentVersionError,
    DocumentWriteError,
    ProcedureError,
    SplitError,
)
from search_spaces.files import write_atomically
from search_spaces.procedures import OneShot, ProcedureSpec, TaskRelevant, procedure_from_json
from search_spaces.repairs import NO_REPAIR, RepairSpec
from search_spaces.suggestions import did_you_mean
from search_spaces.task_splits import TaskSplit

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

__all__ = ["CompositeDocument", "document_schema", "load_document", "write_document"]

_VERSION = 1
_SCHEMA = f"composite-v{_VERSION}.schema.json"
_USUAL: Mapping[str, Any] = {"components": "all", "procedure_options": {}, "ranking": "global"}
_LONGEST = 120  # characters of a value in a message
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True, kw_only=True)
class CompositeDocument:
    """The content of an export document; a copy of the values it is made from, checked against the schema.

    It names the model as it was given at the command line, and the data likewise but with absolute paths; it never
    imports or opens them. The keys of each dictionary are described in `document_schema()`.

    Attributes:
        composite: What the study found.
        layer_groups: Layer group of each layer by its module name.
        abs_scope: Where `abs` takes the absolute value: of each sample's sum over space, or before any sum.
        output_relevance: Relevance at the true class's output.
        procedure: How pruning proceeds from rankings, of `search_spaces.procedures.PROCEDURES`.
        procedure_options: What the procedure takes, by name.
        components: What is pruned: attention heads, neurons of a transformer's MLPs, or all that there are.
        ranking: Whether components are ranked over the whole network, or each kind or layer of them within itself.
        rates: Pruning rates of the curves, increasing from 0.
        repair: Method and strength of the repair of every pruned network, as `RepairSpec.to_json` gives them.
        preprocessing: Size, mean, standard deviation and the like of the model's images.
        references: How the reference samples were selected.
        model: Name, options, fingerprint and shape of the network.
        data: Source, fingerprint and classes of the images.
        versions: Version of each library.
        study: The study and trial that found the composite; None if it comes from elsewhere.
        curve: Rates and accuracies on the search images.
        figures: Figures of the curve by name.
        confirmation: Result on images that the search never saw.
        created: UTC, ISO 8601.

    Raises:
        DocumentError: A value breaks the schema; the message names its JSON path.
    """

    version: int = _VERSION
    kind: str = "pruning-hpo/composite"
    composite: CompositeSpec
    layer_groups: dict[str, str]
    abs_scope: AbsScope
    output_relevance: OutputRelevance
    procedure: str = OneShot.name
    procedure_options: dict[str, Any] = field(default_factory=dict)
    components: Components = "all"
    ranking: RankingScope = "global"
    rates: tuple[float, ...]
    repair: dict[str, Any] = field(default_factory=NO_REPAIR.to_json)
    preprocessing: dict[str, Any]
    references: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    study: dict[str, Any] | None = None
    curve: dict[str, Any] | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    confirmation: dict[str, Any] | None = None
    versions: dict[str, str]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not isinstance(self.composite, CompositeSpec):
            raise DocumentError(f"$.composite is {_short(self.composite)}, but must be a CompositeSpec.")
        value = _plain(self.to_json(), "$")
        _validate(value)
        # The plain copies, so that no later change of the caller's values gets past the check.
        for name in value.keys() - {"composite", "rates"}:
            object.__setattr__(self, name, value[name])
        object.__setattr__(self, "rates", tuple(value["rates"]))

    @property
    def procedure_spec(self) -> ProcedureSpec:
        """The procedure with its options."""
        return procedure_from_json(self.procedure, self.procedure_options)

    def to_json(self) -> dict[str, Any]:
        """The document as its JSON file holds it, in the file's order; a copy."""
        value = {item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(self)}
        # The usual ones are left out, as in documents from before there was a choice.
        value = {name: item for name, item in value.items() if _USUAL.get(name, ...) != item}
        return {**value, "composite": self.composite.to_json(), "rates": list(self.rates)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CompositeDocument":
        """Inverse of `to_json`.

        Raises:
            DocumentVersionError: The document is of another version.
            DocumentError: A value breaks the schema; the message names its JSON path.
        """
        plain = _plain(value, "$")
        _validate(plain)
        try:
            composite = CompositeSpec.from_json(plain["composite"])
        except CompositeError as error:
            raise DocumentError(f"$.composite cannot be used: {error}") from error
        return cls(**{**plain, "composite": composite})


def load_document(source: str | os.PathLike[str] | Mapping[str, Any]) -> CompositeDocument:
    """Reads and checks a document; needs no torch and imports nothing that the document names.

        >>> load_document("best.json").composite.HLL.name
        'ZPlus'

    Args:
        source: The path of a JSON file, or its content.

    Raises:
        DocumentVersionError: The document is of another version.
        DocumentError: The file cannot be read, is not JSON or breaks the schema; one line with the JSON path.
    """
    if isinstance(source, Mapping):
        return CompositeDocument.from_json(source)
    path = os.fspath(source)
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DocumentError(f"{path}: document cannot be read: {error.strerror}; `hpo export` writes one.") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, numbers of endless digits
        raise DocumentError(f"{path}: document is not valid JSON: {error}; `hpo export` writes one.") from error
    try:
        return CompositeDocument.from_json(value)
    except DocumentError as error:
        raise type(error)(f"{path}: {error}") from error


def write_document(path: str | os.PathLike[str], document: CompositeDocument) -> None:
    """Writes the document as JSON; the file is there whole or, on an error, as it was before.

    Raises:
        DocumentWriteError: No such directory, no permission, no space.
    """
    content = (json.dumps(document.to_json(), indent=2, allow_nan=False) + "\n").encode()
    target = Path(path)
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(content)  # a device or a pipe, which must not be replaced by a file
        else:
            write_atomically(Path(os.path.realpath(target)), content)
    except OSError as error:
        raise DocumentWriteError(
            f"Document {str(target)!r} cannot be written: {error.strerror}; choose another path or make room."
        ) from error


def document_schema() -> dict[str, Any]:
    """The published JSON schema of the document (draft 2020-12)."""
    from importlib import resources

    schema: dict[str, Any] = json.loads((resources.files("search_spaces") / "schemas" / _SCHEMA).read_bytes())
    return schema


def _plain(value: Any, path: str) -> Any:
    """A copy of `value` made of JSON's own types."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DocumentError(f"{path} is {value}, but must be a finite number.")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DocumentError(f"{path} has the key {_short(key)}, but keys must be texts.")
        return {key: _plain(item, _child(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise DocumentError(f"{path} is {_short(value)}, which JSON cannot hold; convert it to a number, text or list.")


def _validate(value: Any) -> None:
    if not isinstance(value, dict):
        raise DocumentError(f"$ is {_short(value)}, but must be an object.")
    version = value.get("version", _VERSION)
    if isinstance(version, bool) or version != _VERSION:
        raise DocumentVersionError(
            f"document version {_short(version)} is not known; this release reads version {_VERSION}."
        )
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(value))
    if error is not None:
        raise DocumentError(_describe(error)) from error
    for path, reason in _contradictions(value):
        raise DocumentError(f"{path} {reason}.")


@functools.cache
def _validator() -> "Validator":
    import jsonschema

    return jsonschema.Draft202012Validator(document_schema())


def _contradictions(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the schema's language cannot say."""
    rates = value["rates"]
    curve = value.get("curve") or {"rates": [0], "accuracies": [0]}
    for path, increasing in (("$.rates", rates), ("$.curve.rates", curve["rates"])):
        if increasing[0] != 0 or any(low >= high for low, high in itertools.pairwise(increasing)):
            yield path, f"is {_short(increasing)}, but must increase strictly from 0"
    if len(curve["accuracies"]) != len(curve["rates"]):
        yield "$.curve.accuracies", f"has {len(curve['accuracies'])} values for {len(curve['rates'])} rates"
    if "repair" in value:
        try:
            RepairSpec.from_json(value["repair"])
        except CompositeError as error:
            yield "$.repair", f"cannot be used: {str(error).removesuffix('.')}"
    try:
        procedure_from_json(value["procedure"], value.get("procedure_options"))
    except ProcedureError as error:
        yield "$.procedure_options", f"cannot be used: {str(error).removesuffix('.')}"
    split = value["data"].get("split")
    if (value["procedure"] == TaskRelevant.name) != (split is not None):
        yield "$.data", f"{'lacks a' if split is None else 'has a'} split, which procedure task_relevant alone needs"
    if split is not None:
        try:
            TaskSplit.from_toml(split)
        except SplitError as error:
            yield "$.data.split", f"cannot be used: {str(error).removesuffix('.')}"
    confirmation = value.get("confirmation")
    if confirmation is not None and len(confirmation["accuracies"]) != len(rates):
        yield "$.confirmation.accuracies", f"has {len(confirmation['accuracies'])} values for {len(rates)} rates"
    try:
        created = datetime.fromisoformat(value["created"])
    except ValueError:
        created = None
    if created is None or created.utcoffset() != timedelta(0):
        yield "$.created", f"is {_short(value['created'])}, but must be a UTC time such as 2025-01-31T12:00:00+00:00"


def _describe(error: "ValidationError") -> str:
    path = functools.reduce(_child, error.absolute_path, "$")
    instance = cast(Any, error.instance)
    rule = cast(Any, error.validator_value)
    if error.validator == "required":
        missing = next(key for key in rule if key not in instance)
        remedy = "; `hpo export` writes whole ones" if path == "$" else ""
        return f"{path} lacks {missing!r}{remedy}."
    if error.validator == "additionalProperties":
        known = cast(Any, error.schema)["properties"]
        unknown = next(key for key in instance if key not in known)
        return f"{path} has the unknown key {unknown!r}.{did_you_mean(unknown, known)}"
    if error.validator == "enum":
        return f"{path} has the unknown value {_short(instance)}.{did_you_mean(str(instance), rule)}"
    value = f"{path} is {_short(instance)}"
    if error.validator == "type":
        return f"{value}, but must be of type {rule if isinstance(rule, str) else ' or '.join(rule)}."
    if error.validator in _BOUNDS:
        return f"{value}, but must be {_BOUNDS[error.validator]} {rule:g}."
    return f"{value}, which breaks the schema's {error.validator} {json.dumps(rule)}."


def _child(path: str, key: object) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    text = str(key)
    return f"{path}.{text}" if text.isidentifier() else f"{path}[{text!r}]"


def _short(value: object) -> str:
    """One line of bounded length."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = printer.maxlong = _LONGEST
    text = printer.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
