"""Objects that the user names by import path, as `package.module:object`."""

import importlib
import os
import sys
from typing import Any

__all__ = ["import_object", "is_import_path"]


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:object`."""
    module, separator, name = text.partition(":")
    return bool(separator) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


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
        reason = " ".join(str(error).split())
        raise ImportError(f"module {module_name!r} cannot be imported ({type(error).__name__}: {reason})") from error
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise ImportError(f"module {module_name!r} has no object {name!r}") from error
    return value
