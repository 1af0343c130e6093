"""The public surface of `objectives`."""

import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest

import objectives
from objectives import errors

MODULES = [module.name for module in pkgutil.walk_packages(objectives.__path__, "objectives.")]


def test_import_stays_cheap():
    heavy = ("numpy", "optuna", "timm", "torch", "torch_pruning", "zennit")
    program = f"import sys, objectives; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_exported_name_is_there():
    assert list(objectives.__all__) == sorted(objectives.__all__)
    for name in objectives.__all__:
        value = getattr(objectives, name)
        assert value.__name__ == name
        assert name in value.__doc__ or value.__doc__
    assert set(objectives.__all__) <= set(dir(objectives))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'objectives' has no attribute 'no_such_name'"):
        objectives.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", ["objectives", *MODULES])
def test_all_is_sorted_and_exists(name):
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert exported == sorted(exported)
    assert all(hasattr(module, item) for item in exported)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_print_their_message_and_survive_pickling(name):
    error_class = getattr(errors, name)
    assert issubclass(error_class, errors.ObjectiveError)
    assert str(error_class("No 'x'.")) == "No 'x'."
    assert str(pickle.loads(pickle.dumps(error_class("No 'x'.")))) == "No 'x'."


def test_the_tree_of_errors_is_drawn_as_it_is():
    drawn = {}
    parents = []
    for line in errors.__doc__.splitlines():
        name, _, rest = line.lstrip(" │├└─").partition(" ")
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4
        if name.endswith("Error") and depth:
            parents = [*parents[: depth - 1], name]
            builtin = rest.strip().partition(")")[0].removeprefix("(") if rest.strip().startswith("(") else None
            drawn[name] = (parents[-2] if len(parents) > 1 else None, builtin)
    assert drawn.keys() - {"PruningHPOError"} == set(errors.__all__)
    for name in errors.__all__:
        error_class = getattr(errors, name)
        parent, builtin = drawn[name]
        assert error_class.__bases__[0].__name__ == parent
        assert (error_class.__bases__[1].__name__ if len(error_class.__bases__) > 1 else None) == builtin
