"""The hashes of code: whatever of a project its imports reach counts, and nothing else; wherever the project lies."""

import inspect
import linecache
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qapbench import UserError, metric, metrics, pruners, ptqs
from qapbench.hashing import _file_of, _imports, code_files, digest_code
from qapbench.methods import plugins
from qapbench.methods.plugins import load_plugin_file
from qapbench.methods.registry import Registry

PLUGIN = '''
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qapbench import Pruner, Selection, metric, pruner

from hashed_helper import first

if TYPE_CHECKING:
    from hashed_types import Anything


@metric("hashed-metric")
def hashed_metric(tokens):
    """One channel of each token."""
    return first(tokens)


@pruner("hashed-pruner")
@dataclass(frozen=True)
class HashedPruner(Pruner):
    """The first tokens."""

    def choose(self, tokens: "Anything", scores, keep):
        return Selection(scores.argsort(dim=-1, stable=True)[:, :keep])
'''
HELPER = """
def first(tokens):
    import hashed_deeper

    return tokens[..., hashed_deeper.CHANNEL]
"""


def files_of(registry: Registry[Any], name: str) -> dict[str, Path]:
    target = registry.entry(name).target
    return code_files(Path(inspect.getsourcefile(target) or ""), target.__module__)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries, loaded files, modules and the caches of `hashing` are after the test what they were."""
    metrics.names()
    for held in (metrics, pruners):
        monkeypatch.setattr(held, "_entries", dict(held._entries))
    monkeypatch.setattr(plugins, "_loaded_files", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("qapbench_plugin_", "hashed_")):
            del sys.modules[name]
    _imports.cache_clear()
    _file_of.cache_clear()


def project(folder: Path, **changed: str) -> Path:
    """A plugin file, the helper that it imports, what the helper imports, and what nothing imports at run time."""
    sources = {"mine": PLUGIN, "hashed_helper": HELPER, "hashed_deeper": "CHANNEL = 0\n", "hashed_types": "A = 0\n"}
    folder.mkdir()
    for name, source in {**sources, "unrelated": "x = 1\n", **changed}.items():
        (folder / f"{name}.py").write_text(source)
    return folder / "mine.py"


def digests(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(of the metric, of the pruner) that the plugin registers, in registries that do not know it yet."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(file.parent)
        for held in (metrics, pruners):
            patch.setattr(held, "_entries", dict(held._entries))
        load_plugin_file(file)
        found = digest_code(metrics.entry("hashed-metric").target), digest_code(pruners.entry("hashed-pruner").target)
    for name in [name for name in sys.modules if name.startswith("hashed_")]:
        del sys.modules[name]
    return found


def test_a_strategys_files_are_what_it_imports() -> None:
    files = files_of(pruners, "cdpruner")
    names = {path.name for path in files.values()}
    assert {"cdpruner.py", "dpp.py"} <= names
    # `from qapbench import Pruner` leads to the module that defines it, not to the package that offers everything.
    assert {"qapbench.methods.kinds", "qapbench.methods.tokens"} <= set(files)
    assert files["qapbench.methods.kinds"].parts[-3:] == ("qapbench", "methods", "kinds.py")
    root = files["qapbench.methods.kinds"].parents[1]
    assert "qapbench" not in files
    assert root / "__init__.py" not in files.values()
    assert not any("visionzip" in name or "calibration" in name for name in files), "it imports neither"
    assert all(path.is_file() for path in files.values())


def test_a_calibrated_methods_files_include_what_calibrates() -> None:
    files = files_of(ptqs, "gptq")
    tails = {path.parts[-3:] for path in files.values()}
    assert {("quantize", "calibration", "runner.py"), ("quantize", "calibration", "observers.py")} <= tails
    assert files["qapbench.quantize.calibration.runner"].name == "runner.py"
    assert "qapbench" not in files
    assert not any("quantize.calibration" in name for name in files_of(ptqs, "rtn"))


def test_a_plugins_files_are_those_beside_it(fresh: None, tmp_path: Path) -> None:
    file = project(tmp_path / "here")
    files = code_files(file, "qapbench_plugin_mine_01234567")
    own = {name: path.name for name, path in files.items() if not name.startswith("qapbench.")}
    assert own == {"mine": "mine.py", "hashed_helper": "hashed_helper.py", "hashed_deeper": "hashed_deeper.py"}
    assert "qapbench.methods.kinds" in files


@pytest.mark.parametrize("edited", ["mine", "hashed_helper", "hashed_deeper"])
def test_editing_what_a_plugin_imports_changes_its_digest(
    edited: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project(tmp_path / "here")
    before = digests(file, monkeypatch)
    target = file.with_name(f"{edited}.py")
    target.write_text(target.read_text() + "\n# another version\n")
    monkeypatch.setattr(plugins, "_loaded_files", {})  # as in a new process
    after = digests(file, monkeypatch)
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("edited", ["hashed_types", "unrelated"])
def test_what_it_does_not_import_at_run_time_does_not_count(
    edited: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project(tmp_path / "here")
    before = digests(file, monkeypatch)
    file.with_name(f"{edited}.py").write_text("A = 1\n")
    monkeypatch.setattr(plugins, "_loaded_files", {})
    assert digests(file, monkeypatch) == before


def test_moving_the_folder_does_not(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project(tmp_path / "here")
    before = digests(file, monkeypatch)
    (tmp_path / "else").mkdir()
    moved = Path(shutil.move(file.parent, tmp_path / "else" / "where")) / file.name
    assert not file.exists()
    assert digests(moved, monkeypatch) == before
    renamed = moved.rename(moved.with_name("other.py"))
    assert digests(renamed, monkeypatch) != before, "a name is part of a module"


def test_a_plugin_file_with_a_dot_in_its_name(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the files beside it as its project, like any other, and may be moved."""
    file = project(tmp_path / "here")
    file = file.rename(file.with_name("mine.v2.py"))
    before = digests(file, monkeypatch)
    moved = Path(shutil.move(file.parent, tmp_path / "there")) / file.name
    assert digests(moved, monkeypatch) == before
    moved.with_name("hashed_helper.py").write_text(HELPER + "\n# another version\n")
    monkeypatch.setattr(plugins, "_loaded_files", {})
    assert digests(moved, monkeypatch) != before


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_only_what_runs_of_a_type_checking_branch_counts(test: str, fresh: None, tmp_path: Path) -> None:
    source = f"import typing\nfrom typing import TYPE_CHECKING\nif {test}:\n    import hashed_types\nelse:\n"
    file = project(tmp_path / "here", mine=source + "    import hashed_deeper\n")
    assert set(code_files(file, "mine")) == {"mine", "hashed_deeper"}


@pytest.mark.parametrize("test", ["not TYPE_CHECKING", "not typing.TYPE_CHECKING", "typing.TYPE_CHECKING or True"])
def test_what_runs_although_it_names_type_checking_counts(test: str, fresh: None, tmp_path: Path) -> None:
    source = f"import typing\nfrom typing import TYPE_CHECKING\nif {test}:\n    import hashed_deeper\n"
    file = project(tmp_path / "here", mine=source)
    assert set(code_files(file, "mine")) == {"mine", "hashed_deeper"}


def test_relative_imports_inside_a_package(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the package itself, a sibling, a parent and everything of a module; circles end."""
    top = tmp_path / "hashed_package"
    (top / "inner").mkdir(parents=True)
    sources = {
        "__init__": "",
        "one": "from . import two\nfrom .inner import three\n",
        "two": "from .one import *\n",
        "inner/__init__": "from .four import value\n",
        "inner/three": "from ..two import anything\nimport hashed_package.five\nimport os.path\n",
        "inner/four": "value = 1\n",
        "five": "",
        "six": "",
    }
    for name, source in sources.items():
        (top / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    names = {name.removeprefix("hashed_package.") for name in code_files(top / "one.py", "hashed_package.one")}
    assert {"one", "two", "inner.three", "five"} <= names
    assert "six" not in names
    assert all(not name.startswith("os") for name in names)


@pytest.mark.parametrize("held", [{"__name__": __name__}, {"__name__": "__main__"}, {}])
def test_code_without_a_source_is_refused(held: dict[str, Any]) -> None:
    """Made by `exec`, by whatever module."""
    exec("def made_up(tokens):\n    return tokens\n", held)
    with pytest.raises(UserError) as refused:
        digest_code(held["made_up"])
    message = str(refused.value)
    assert message.startswith("made_up has no source that can be read")
    assert "define it in a file (and name that under `plugins`) or in a notebook" in message
    assert "\n" not in message


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`__main__` as a notebook has it: without a file."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(linecache, "cache", dict(linecache.cache))
    return module


def run_cell(source: str, number: int, module: types.ModuleType, names: str = "/tmp/ipykernel_1/{}.py") -> None:
    """Run a notebook's cell: its source is nowhere but in the cache of lines, under a name that is no file."""
    name = names.format(number)
    assert not Path(name).exists()
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), vars(module))


CELL = "# a cell\n\ndef in_a_cell(tokens):\n    return tokens[..., {channel}]\n"


@pytest.mark.parametrize("names", ["/tmp/ipykernel_1/{}.py", "<ipython-input-{}>"])
def test_a_function_of_a_notebook_is_hashed_by_its_source(names: str, notebook: types.ModuleType) -> None:
    found = []
    for number, channel in enumerate((0, 1, 0)):
        run_cell(CELL.format(channel=channel), number, notebook, names)
        found.append(digest_code(notebook.in_a_cell))
    assert found[0] != found[1], "another source"
    assert found[0] == found[2], "the same source, in another cell"
    assert len(found[0]) == 64
    assert int(found[0], 16)


def test_a_registered_function_of_a_notebook(notebook: types.ModuleType, fresh: None) -> None:
    """What is hashed is the function itself, also behind decorators that wrap it."""
    run_cell("import functools\n" + CELL.format(channel=0), 1, notebook)
    target = metric("hashed-in-a-cell")(notebook.in_a_cell)
    assert digest_code(metrics.entry("hashed-in-a-cell").target) == digest_code(target)
    run_cell("def wrap(f):\n    return functools.wraps(f)(lambda *args: f(*args))\n", 2, notebook)
    assert digest_code(notebook.wrap(target)) == digest_code(target)


CLASS_CELL = '''from dataclasses import dataclass

from qapbench import Pruner, Selection


@dataclass(frozen=True)
class InACell(Pruner):
    """The first tokens."""

    def choose(self, tokens, scores, keep):
        return Selection(scores.argsort(dim=-1, stable=True)[:, {first}:keep])
'''


def test_a_class_of_a_notebook_is_hashed_by_its_source(notebook: types.ModuleType) -> None:
    """Pruners and PTQ methods are classes."""
    found = []
    for number, first in enumerate((0, 1, 0)):
        run_cell(CLASS_CELL.format(first=first), number, notebook)
        found.append(digest_code(notebook.InACell))
    assert found[0] != found[1]
    assert found[0] == found[2]


def test_helpers_in_the_same_cell_count(notebook: types.ModuleType) -> None:
    """As docs/identity.md says."""
    found = []
    for number, channel in enumerate((0, 1)):
        source = f"CHANNEL = {channel}\n\n\ndef in_a_cell(tokens):\n    return tokens[..., CHANNEL]\n"
        run_cell(source, number, notebook)
        found.append(digest_code(notebook.in_a_cell))
    assert found[0] != found[1]
