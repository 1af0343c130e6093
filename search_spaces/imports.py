"""Objects that the user names by import path, as `package.module:object`."""

import importlib
import os
import sys
from typing import Any, Literal

from search_spaces.reasons import reason_of
from search_spaces.suggestions import did_you_mean

__all__ = ["DATA_SCHEMES", "Named", "import_object", "is_import_path", "runs_code"]

Named = Literal["model", "data", "space"]
"""What a user names by a text."""

DATA_SCHEMES = ("digits", "domains", "folder", "npz", "timm")
"""What may stand before the colon of a data source that is no import path."""


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:object`."""
    module, separator, name = text.partition(":")
    return bool(separator) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def runs_code(kind: Named, text: str) -> bool:
    """Whether loading what `text` names can run code that it chooses; a document or a store may not name such a thing.

        >>> runs_code("data", "timm:folder"), runs_code("model", "timm:folder")
        (False, True)

    Of timm's readers only those of local files and torchvision's are safe: `wds/` opens `pipe:COMMAND`, and `hfds/`,
    `hfids/` and `tfds/` run what a data set's author wrote.
    """
    scheme, _, argument = text.partition(":")
    if kind != "data" or scheme not in DATA_SCHEMES:
        return is_import_path(text)
    reader, slash, _ = argument.partition("?")[0].partition("/")
    unsafe_reader = bool(slash) and reader.lower() != "torch"
    return scheme == "timm" and (unsafe_reader or "trust_remote_code" in argument)


def import_object(path: str) -> Any:
    """The object at `package.module:object`; modules in the working directory can be named, as under `python -m`.

    Call it only with a path from the command line or a local configuration, never from a document or a store.

    Raises:
        ImportError: The path has another form, its module cannot be imported or has no such object; one line.
    """
    if not is_import_path(path):
        raise ImportError(f"{path!r} is not of the form package.module:object")
    module_name, _, name = path.partition(":")
    # It stays on the path: the user's functions may import their neighbours when they are called.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise ImportError(f"module {module_name!r} cannot be imported ({reason_of(error)})") from error
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            known = [attribute for attribute in getattr(value, "__dict__", ()) if not attribute.startswith("_")]
            hint = did_you_mean(part, known).strip()
            raise ImportError(f"module {module_name!r} has no object {name!r}{f' ({hint})' if hint else ''}") from error
    return value
