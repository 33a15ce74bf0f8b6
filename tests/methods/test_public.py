"""What `import qapbench` offers: every public name, the names of version 0.1, and nothing heavy before it is used."""

import importlib
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

import qapbench

ROOT = Path(__file__).parents[2]
RENAMED = {"Share": "Fraction", "top": "top_k", "AbsMax": "AbsMaxObserver", "Found": "CalibrationResult"}


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_name_of_before_warns_and_is_the_new_object(old: str, new: str) -> None:
    """Every time, not the first time only; and to the caller's line."""
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=rf"qapbench\.{old} is now qapbench\.{new}") as caught:
            found = getattr(qapbench, old)
        assert found is getattr(qapbench, new)
        assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert old not in qapbench.__all__


def test_the_renamed_names_are_those_that_are_tested() -> None:
    assert qapbench.DEPRECATED == RENAMED


def test_every_public_name_resolves() -> None:
    """To the object of the module that it is said to come from, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in qapbench.__all__:
            home = importlib.import_module(f"qapbench.{qapbench.HOMES[name]}")
            assert getattr(qapbench, name) is getattr(home, name)
    assert sorted(qapbench.__all__) == sorted(qapbench.HOMES)
    assert set(qapbench.__all__) <= set(dir(qapbench))


def test_a_star_import_and_an_unknown_name() -> None:
    held: dict[str, Any] = {}
    exec("from qapbench import *", held)
    assert set(qapbench.__all__) <= set(held)
    with pytest.raises(AttributeError, match="module 'qapbench' has no attribute 'prunner'"):
        getattr(qapbench, "prunner")  # noqa: B009  (a type checker would find the name missing)


def test_no_public_name_is_that_of_a_module() -> None:
    """An imported module becomes an attribute of its package, and would take the place of the name."""
    folder = Path(qapbench.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert not modules & {*qapbench.__all__, *qapbench.DEPRECATED}


def test_run_stays_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package of nearly that name, and a module in it, are imported first."""
    monkeypatch.delitem(vars(qapbench), "run", raising=False)
    importlib.import_module("qapbench.running.session")
    assert isinstance(qapbench.run, types.FunctionType)
    assert isinstance(qapbench.running, types.ModuleType)
    from qapbench.running.execute import run

    assert qapbench.run is run


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "pydantic", "transformers", "lm_eval", "numpy", "pandas", "safetensors")
    code = f"import sys, qapbench; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qapbench.__version__ == project["version"]
