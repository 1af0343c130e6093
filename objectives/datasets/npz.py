"""NumPy archives: `--data npz:TRAIN.npz,EVAL.npz`, with pixels or with encoded images."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objectives.datasets.labels import LabelSet
from objectives.datasets.sources import ArraySource, ImageSource, SourcePair, decode_image, register_source
from objectives.errors import DataError

__all__ = ["EncodedSource", "open_npz"]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSource:
    """Image files that lie end to end in memory.

    Attributes:
        content: Bytes of all files, uint8.
        offsets: File i is content[offsets[i]:offsets[i + 1]], shape (N + 1,).
        labels: Integers (N,).
        names: Of the files, or empty.
        origin: The archive, for messages.
        domains: Each image's, where they are known.
    """

    content: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    labels: NDArray[np.integer]
    names: tuple[str, ...]
    origin: str
    domains: tuple[str, ...] | None = None

    def image(self, index: int) -> Image.Image:
        """The decoded file."""
        start, end = self.offsets[index : index + 2]
        return decode_image(self.content[start:end].tobytes())

    def name(self, index: int) -> str:
        """For messages."""
        return f"{self.origin}[{index}]" + (f" ({self.names[index]})" if self.names else "")


@register_source("npz")
def open_npz(argument: str, labels: LabelSet) -> SourcePair:
    """Reads two archives, each in one of two layouts.

    `x` uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W) with `y` integers (N,); or `jpeg` uint8, all files end to end (of
    any format that Pillow reads), `offset` integers (N + 1,), `label` integers (N,) and, if wanted, `name` (N,).
    Labels are output indices. Either may have `domain`, texts (N,), for splits by domain.

    Raises:
        DataError: A file can't be read or has another layout, or both are the same file.
    """
    paths = [Path(part.strip()).expanduser() for part in argument.split(",") if part.strip()]
    if len(paths) != 2:
        raise DataError(f"The data `npz` needs two files, not {argument!r}; write --data npz:TRAIN.npz,EVAL.npz.")
    train, evaluation = map(_read, paths)
    if paths[0].resolve() == paths[1].resolve():
        raise DataError(
            f"{str(paths[0])!r} is given for training and for evaluation, so reference images would be evaluated on; "
            "pass two files."
        )
    return SourcePair(train, evaluation)


def _read(path: Path) -> ImageSource:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {
                key: archive[key] for key in ("x", "y", "jpeg", "offset", "label", "name", "domain") if key in archive
            }
    except OSError as error:
        raise DataError(
            f"The data file {str(path)!r} can't be read ({error.strerror or error}); check --data."
        ) from error
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"The data file {str(path)!r} isn't a NumPy .npz archive of plain arrays ({error}).") from error
    if {"x", "y"} <= arrays.keys():
        return _pixels(arrays, path)
    if {"jpeg", "offset", "label"} <= arrays.keys():
        return _encoded(arrays, path)
    raise DataError(
        f"The data file {str(path)!r} has the arrays {', '.join(arrays) or 'of other names'}; it needs `x` and `y`, "
        "or `jpeg`, `offset` and `label`."
    )


def _pixels(arrays: dict[str, NDArray[Any]], path: Path) -> ArraySource:
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)):
        raise DataError(
            f"`x` in {str(path)!r} is {x.dtype} {x.shape}; it must be uint8 pixels of shape (N, H, W, 3) or (N, H, W)."
        )
    _check_labels(y, len(x), "y", path)
    return ArraySource(x, y, str(path), _domains(arrays, len(x), path))


def _encoded(arrays: dict[str, NDArray[Any]], path: Path) -> EncodedSource:
    content, offsets, labels = arrays["jpeg"], arrays["offset"], arrays["label"]
    _check_labels(labels, len(labels), "label", path)
    if (
        content.dtype != np.uint8
        or content.ndim != 1
        or offsets.shape != (len(labels) + 1,)
        or offsets.dtype.kind not in "iu"
        or np.any(np.diff(offsets.astype(np.int64)) < 0)
        or offsets[0] < 0
        or offsets[-1] > len(content)
    ):
        raise DataError(
            f"`jpeg` and `offset` in {str(path)!r} don't agree: `jpeg` must be uint8 (bytes,) and `offset` "
            f"{len(labels) + 1} ascending positions in it."
        )
    names = tuple(map(str, arrays["name"])) if "name" in arrays and len(arrays["name"]) == len(labels) else ()
    domains = _domains(arrays, len(labels), path)
    return EncodedSource(content, offsets.astype(np.int64), labels, names, str(path), domains)


def _domains(arrays: dict[str, NDArray[Any]], n_images: int, path: Path) -> tuple[str, ...] | None:
    if "domain" not in arrays:
        return None
    domains = arrays["domain"]
    if domains.dtype.kind != "U" or domains.shape != (n_images,):
        raise DataError(
            f"`domain` in {str(path)!r} is {domains.dtype} {domains.shape}; it must be texts of shape ({n_images},)."
        )
    return tuple(map(str, domains))


def _check_labels(labels: NDArray[Any], n_images: int, key: str, path: Path) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (n_images,):
        raise DataError(
            f"`{key}` in {str(path)!r} is {labels.dtype} {labels.shape}; it must be integers of shape ({n_images},)."
        )
