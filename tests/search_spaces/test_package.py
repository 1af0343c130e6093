"""The public surface of `search_spaces`."""

import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest

import search_spaces
from search_spaces import errors

MODULES = [f"search_spaces.{module.name}" for module in pkgutil.iter_modules(search_spaces.__path__)]


def test_import_stays_cheap() -> None:
    heavy = ("optuna", "jsonschema", "numpy", "sqlalchemy", "torch", "ray")
    program = f"import sys, search_spaces; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["search_spaces", *MODULES])
def test_all_is_sorted_and_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, exported) for exported in module.__all__)


def test_the_package_exports_what_its_modules_do() -> None:
    exported = {name for module in MODULES for name in importlib.import_module(module).__all__}
    assert set(search_spaces.__all__) == exported


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_print_their_message_and_survive_pickling(name: str) -> None:
    error_class = getattr(errors, name)
    assert issubclass(error_class, errors.PruningHPOError)
    assert str(error_class("No 'x'.")) == "No 'x'."
    assert str(pickle.loads(pickle.dumps(error_class("No 'x'.")))) == "No 'x'."
    assert f"{name} " in f"{errors.__doc__} " or f"{name}\n" in errors.__doc__
