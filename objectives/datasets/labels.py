"""Labels: names of classes and the network's outputs that they stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from objectives.errors import DataError
from search_spaces.suggestions import did_you_mean

if TYPE_CHECKING:
    from objectives.models import LoadedModel

__all__ = ["LabelSet", "read_class_map"]

_logger = logging.getLogger(__name__)

_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The outputs of a network and the names they go by.

    Names are compared without regard to case, with underscores for spaces. An output goes by its full name, by each of
    the synonyms in it ("tench, Tinca tinca") and by its WordNet id; the user's class map goes before all.

    Attributes:
        n_outputs: Of the full network.
        names: Full name of each output, where they are known.
        ids: WordNet id of each output, where they are known.
        class_map: The user's own names.
    """

    n_outputs: int
    names: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None
    class_map: Mapping[str, int] = field(default_factory=dict)
    _outputs: dict[str, frozenset[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, output in self.class_map.items():
            if not 0 <= output < self.n_outputs:
                raise DataError(
                    f"The class map sends {name!r} to output {output}, but the network's outputs are "
                    f"0 to {self.n_outputs - 1}; correct the class map."
                )
        # Each kind of name only where no kind before it has that name: "crane" the full name beats "crane" the synonym.
        outputs: dict[str, frozenset[int]] = {}
        full = self.names or ()
        for pairs in (
            [(name, output) for name, output in self.class_map.items()],
            [(name, output) for output, name in enumerate(self.ids or ())],
            [(name, output) for output, name in enumerate(full)],
            [(part, output) for output, name in enumerate(full) if self.ids for part in name.split(", ")],
        ):
            found: dict[str, frozenset[int]] = {}
            for name, output in pairs:
                found[_folded(name)] = found.get(_folded(name), frozenset()) | {output}
            outputs = found | outputs
        object.__setattr__(self, "_outputs", outputs)

    @classmethod
    def of(cls, model: LoadedModel, class_map: Mapping[str, int] | None = None) -> LabelSet:
        """The label set of a loaded model."""
        return cls(model.num_classes, model.label_names, model.label_ids, class_map or {})

    def find(self, name: str) -> int | None:
        """The output that a name stands for; None if no output has it.

        Raises:
            DataError: Several outputs have the name.
        """
        outputs = self._outputs.get(_folded(name), frozenset())
        if len(outputs) > 1:
            raise DataError(
                f"The class name {name!r} stands for the outputs {', '.join(map(str, sorted(outputs)))}; "
                "use the WordNet id or the index."
            )
        return next(iter(outputs), None)

    def assign(self, names: Sequence[str], origin: str) -> dict[str, int]:
        """Maps all class names of a data set to outputs.

        Names that the network's label set or the class map knows stand for those outputs, also where there are as many
        names as outputs: their order would be a guess. As many unknown names as outputs are taken in their order, and
        told; a known name out of that order is refused, since an unknown one beside it must be a slip.

        Args:
            names: Distinct, in the data set's own order.
            origin: Of the data, for messages.

        Raises:
            DataError: A name stands for no output.
        """
        known = {name: output for name in names if (output := self.find(name)) is not None}
        unknown = [name for name in names if name not in known]
        in_order = {name: output for output, name in enumerate(names)}
        if unknown and (self.class_map or len(names) != self.n_outputs):
            raise DataError(
                f"{origin}: {unknown[0]!r} ({len(unknown)} of {len(names)} classes) is no class of the network, which "
                f"has {self.n_outputs} outputs; name classes by class name or WordNet id, or pass --class-map FILE, "
                "a JSON object from name to output index."
            )
        moved = [name for name, output in known.items() if in_order[name] != output]
        if unknown and moved:
            raise DataError(
                f"{origin}: {unknown[0]!r} is no class of the network, but {moved[0]!r} is, and stands for output "
                f"{known[moved[0]]}, so the order of the names can't be the order of the outputs."
                f"{did_you_mean(unknown[0], self.names or ())} Correct the name or pass --class-map FILE."
            )
        assigned = in_order if unknown else known
        shown = [f"{output} {name}" for name, output in assigned.items()]
        more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        how = "in this order" if unknown else "by name"
        _logger.info("%s: classes stand for outputs %s: %s%s", origin, how, ", ".join(shown[:_MOST_SHOWN]), more)
        return assigned

    def select(self, classes: Iterable[str | int], own_names: Mapping[int, str]) -> tuple[int, ...]:
        """The outputs that the user's list of classes names, in ascending order.

        Args:
            classes: Output indices, also written as text, or names.
            own_names: The data's own names of classes, by output; they go before the network's.

        Raises:
            DataError: A class is unknown, out of range or given twice, or there are fewer than two.
        """
        outputs_of_own = {_folded(name): output for output, name in own_names.items()}
        selected: dict[int, str | int] = {}
        for asked in classes:
            output = self._select_one(asked, outputs_of_own)
            if output in selected:
                raise DataError(
                    f"--classes has output {output} twice, as {selected[output]!r} and {asked!r}; remove one."
                )
            selected[output] = asked
        if len(selected) < 2:
            raise DataError(f"--classes needs at least two classes to tell apart, but has {len(selected)}; add more.")
        return tuple(sorted(selected))

    def output_of(self, asked: str | int, own_names: Mapping[int, str]) -> int:
        """The output that one class of `select` stands for.

        Raises:
            DataError: The class is unknown or out of range.
        """
        return self._select_one(asked, {_folded(name): output for output, name in own_names.items()})

    def name_of(self, output: int, own_names: Mapping[int, str]) -> str:
        """What tables call an output."""
        if self.names is not None:
            return self.names[output]
        return own_names.get(output, str(output))

    def _select_one(self, asked: str | int, outputs_of_own: Mapping[str, int]) -> int:
        text = str(asked).strip()
        if text.removeprefix("-").isdecimal():
            output = int(text)
            if not 0 <= output < self.n_outputs:
                raise DataError(
                    f"--classes: {output} is out of range; the network's outputs are 0 to {self.n_outputs - 1}."
                )
            return output
        found = outputs_of_own.get(_folded(text))
        if found is None:
            found = self.find(text)
        if found is None:
            known = [*outputs_of_own, *self._outputs]
            raise DataError(f"--classes: no class is called {text!r}; give its index.{did_you_mean(text, known)}")
        return found


def read_class_map(path: str | Path) -> dict[str, int]:
    """Reads a JSON object from class name to output index.

    Raises:
        DataError: The file can't be read or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The class map {str(path)!r} can't be read ({error.strerror}); check --class-map.") from error
    except ValueError as error:
        raise DataError(f"The class map {str(path)!r} isn't JSON ({error}); correct the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"The class map {str(path)!r} must be a JSON object from class name to output index.")
    for name, output in content.items():
        if type(output) is not int:
            raise DataError(f"The class map {str(path)!r} sends {name!r} to {output!r}; give the index of an output.")
    return content


def _folded(name: str) -> str:
    return name.strip().casefold().replace("_", " ")
