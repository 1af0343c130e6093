import sys
from pathlib import Path

import pytest

from search_spaces import Named, import_object, is_import_path, runs_code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("package.module:object", True),
        ("module:Class.method", True),
        ("module", False),
        ("module:", False),
        (":object", False),
        ("C:\\space.toml", False),
        ("timm:resnet18.a1_in1k", True),
        ("a b:c", False),
        ("a:b:c", False),
    ],
)
def test_form(text: str, expected: bool) -> None:
    assert is_import_path(text) is expected


@pytest.mark.parametrize("kind", ["model", "space"])
@pytest.mark.parametrize("text", ["own:x", "timm:data.dataset.os.system", "folder:x", "npz:x", "digits:x"])
def test_import_paths_of_models_and_spaces_run_code(kind: Named, text: str) -> None:
    assert runs_code(kind, text)


@pytest.mark.parametrize("text", ["resnet18", "hf-hub:a/b", "evil.1x:f", "cnn", "mine.toml"])
def test_names_run_no_code(text: str) -> None:
    assert not runs_code("model", text)
    assert not runs_code("space", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", False),
        ("folder:flowers", False),
        ("npz:a,b", False),
        ("timm:?root=DIR", False),
        ("timm:folder?root=a/b", False),
        ("timm:torch/cifar10?root=DIR", False),
        ("timm:TORCH/cifar10?trust_remote_code=1", True),
        ("timm:hfds/x", True),
        ("timm:HFIDS/x", True),
        ("timm:tfds/x", True),
        ("timm:wds/?root=pipe:x", True),
        ("own.images:load", True),
        ("optunahub:x", True),
    ],
)
def test_data_that_run_code(text: str, expected: bool) -> None:
    assert runs_code("data", text) is expected


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; what is imported from it is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_modules_of_the_working_directory(here: Path) -> None:
    (here / "first_neighbour.py").write_text("class Outer:\n    value = 3\n")
    assert import_object("first_neighbour:Outer.value") == 3
    (here / "second_neighbour.py").write_text("value = 4\n")
    assert import_object("second_neighbour:value") == 4
    assert sys.path.count(str(here)) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.path", "'os.path' is not of the form package.module:object"),
        ("no_such_module:x", "module 'no_such_module' cannot be imported (ModuleNotFoundError: No module named"),
        ("os:no_such_object", "module 'os' has no object 'no_such_object'"),
        ("broken_module:x", "module 'broken_module' cannot be imported (ValueError: two lines)"),
        ("unreadable_module:x", "module 'unreadable_module' cannot be imported (SyntaxError:"),
    ],
)
def test_errors_are_one_line(here: Path, path: str, message: str) -> None:
    (here / "broken_module.py").write_text("raise ValueError('two\\nlines')\n")
    (here / "unreadable_module.py").write_text("def\n")
    with pytest.raises(ImportError) as caught:
        import_object(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
