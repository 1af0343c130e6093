import importlib
import pkgutil

import pytest

import hpo

MODULES = [module.name for module in pkgutil.walk_packages(hpo.__path__, "hpo.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_states_its_surface(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
