"""Plugins: installed packages (entry-point group `qapbench.plugins`) and Python files that a spec names.

The built-in strategies, model families, checkpoint formats and tasks arrive through the same entry points as anybody's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from qapbench.errors import Problem, UserError, first_line
from qapbench.hashing import code_files, digest_files

ENTRY_POINTS = "qapbench.plugins"
FILE_MODULE = "qapbench_plugin_"
"""How the names of the modules begin that are made of plugin files."""

_broken: dict[str, str] = {}
_loaded_files: dict[Path, str] = {}
_undo: list[tuple[str, Callable[[], None]]] = []
"""The module of each registration, and what takes it back, the latest last."""


class BrokenPluginWarning(UserWarning):
    """An installed plugin failed to import; what it would have registered is missing."""


@functools.cache
def load_plugins() -> None:
    """Import every module of the entry-point group, once per process.

    A plugin that fails to import is warned of by name, with the file and line where it failed, and leaves all others
    working: what it had registered by then is taken back, and `broken_plugins` remembers it, so that a lookup of an
    unknown name can mention it.
    """
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    # The built-in ones come first, so that a plugin which takes one of their names is the one that fails.
    for point in sorted(points, key=lambda point: not point.value.startswith("qapbench.")):
        try:
            with _whole_or_not_at_all():
                point.load()
        except (Exception, SystemExit) as error:
            _broken[point.name] = described(error, _file_of(point.value.partition(":")[0]))
            warnings.warn(f"plugin '{point.name}' ({point.value}) {_broken[point.name]}", BrokenPluginWarning, 2)


def note_registration(module: str, undo: Callable[[], None]) -> None:
    """Remember how to take back a registration, in case that the plugin which makes it fails further down.

    Args:
        module: name of the module that registers.
        undo: takes the registration back.
    """
    _undo.append((module, undo))


@contextlib.contextmanager
def _whole_or_not_at_all() -> Iterator[None]:
    """Take back what a plugin registered if it fails: other specs are not to find half of it.

    The modules that registered are forgotten, so that another plugin which imports one of them registers it again.
    """
    before, imported = len(_undo), set(sys.modules)
    try:
        yield
    except BaseException:
        while len(_undo) > before:
            module, undo = _undo.pop()
            undo()
            if module not in imported:
                sys.modules.pop(module, None)
        raise


def broken_plugins() -> dict[str, str]:
    """The entry points that failed to import, by name -> what failed and where."""
    return dict(_broken)


def load_plugin_file(path: str | Path) -> None:
    """Run a user's Python file, so that its decorators register. The same file is run once per process.

    Raises:
        UserError: it is not there, fails, or changed since it was run (what it registered is the old code).
    """
    try:
        file = Path(path).resolve()
        found = file.is_file()
    except (OSError, ValueError):  # too long, not to be entered, or no path at all
        file, found = Path(ascii(str(path))[:300]), False
    if not found:
        raise UserError(f"no such plugin file: {file}")
    digest = digest_files(code_files(file, "plugin"))  # and what it imports beside itself
    if (loaded := _loaded_files.get(file)) is not None:
        if loaded != digest:
            raise UserError(f"plugin {file} changed since this process loaded it; start a new process")
        return
    load_plugins()
    # The path is part of the module's name: inspect finds a class's source by it, and stems repeat.
    stem = re.sub(r"\W", "_", file.stem)  # a dot would make a package of it
    name = f"{FILE_MODULE}{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"a plugin must be a Python file (.py): {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _whole_or_not_at_all():
            spec.loader.exec_module(module)
    except UserError:
        sys.modules.pop(name, None)
        raise
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise UserError(f"plugin {file} {described(error, str(file))}") from error
    _loaded_files[file] = digest


def load_plugin_files(named: object) -> list[Problem]:
    """Run the files that a spec's `plugins` lists, and return what went wrong, under the field of each.

    Anything but a list of texts is left to the validation of the field.
    """
    if not isinstance(named, list) or not all(isinstance(plugin, str) for plugin in named):
        return []
    problems: list[Problem] = []
    for index, plugin in enumerate(named):
        try:
            load_plugin_file(plugin)
        except UserError as error:
            problems += [problem.under("plugins", index) for problem in error.problems]
    return problems


def described(error: BaseException, file: str | None = None) -> str:
    """What went wrong while a plugin was imported, and the file and line where it did.

    Args:
        file: the plugin's own, whose last line that ran is named; without one, or where none of it ran, the place is
            where the error was raised.
    """
    return f"failed to load: {error_and_place(error, file)}"


def error_and_place(error: BaseException, file: str | None = None) -> str:
    """An error of a plugin's code in one line, with the file and line where it was raised.

    Args:
        file: as for `described`.
    """
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        frames = [frame for frame in frames if frame.filename != __file__]
        chosen = [frame for frame in frames if frame.filename == file] or frames
        where = f"{chosen[-1].filename}:{chosen[-1].lineno}" if chosen else "unknown place"
    return f"{type(error).__name__}: {first_line(error)} ({where})"


def plugin_of(module: str) -> str:
    """What a user calls the plugin that a module belongs to: the name of an installed one, or the file of a file.

    Args:
        module: dotted name of the module.
    """
    if module.startswith(FILE_MODULE):
        return f"plugin {getattr(sys.modules.get(module), '__file__', module)}"
    values = {
        point.value.partition(":")[0]: point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
    }
    parts = module.split(".")
    names = (values.get(".".join(parts[:size])) for size in range(len(parts), 0, -1))
    return next((f"plugin '{name}'" for name in names if name), f"module {module}")


def _file_of(module: str) -> str | None:
    """The file of a module that may fail to import."""
    try:
        found = importlib.util.find_spec(module)
    except Exception:  # its package fails to import, in any way
        return None
    return found.origin if found else None
