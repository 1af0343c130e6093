from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import storage

MODULES = ["storage", *(f"storage.{module.name}" for module in pkgutil.iter_modules(storage.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_sorted_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'StudyStor'"):
        _ = storage.StudyStor


def test_urls_and_errors_import_neither_optuna_nor_sqlalchemy() -> None:
    code = "import sys, storage.errors, storage.urls; print({'optuna', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_store_imports_no_torch() -> None:
    code = "import sys, storage.store, storage.lease; print({'ray', 'timm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
