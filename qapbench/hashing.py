"""Content hashes, of which every identity is made: run ids, groups, calibration keys, study ids.

What each of them covers, and so what makes a result stale, is written down in docs/identity.md.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a checkpoint is loaded from; everything else in its folder is ignored."""
LIBRARIES = ("torch", "transformers", "lm-eval")
"""Packages whose version may move a number."""


def digest_json(value: Any, length: int = 16) -> str:
    """The first characters of the SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def digest_file(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_tree(folder: Path) -> str:
    """SHA-256 over every file that a checkpoint folder is loaded from. Computed once per process and content."""
    return _digest_tree(folder, state_of_tree(folder))


def state_of_tree(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time of the last change, and size of every file that a checkpoint folder is loaded from.

    Nothing is read, so it is cheap to ask before anything that was kept of the folder is used again.
    """
    files = {file for pattern in CHECKPOINT_FILES for file in folder.rglob(pattern)}
    states = [(str(file.relative_to(folder)), file.stat()) for file in sorted(files)]
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


@functools.lru_cache(maxsize=64)
def _digest_tree(folder: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _, _ in states:
        total.update(f"{name}\0{digest_unchanged(folder / name)}\0".encode())
    return total.hexdigest()


def digest_unchanged(file: Path) -> str:
    """SHA-256 of a file's content. Computed once per process, as long as time of last change and size stay."""
    state = file.stat()
    return _digest_unchanged(file, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4096)
def _digest_unchanged(file: Path, modified: int, size: int) -> str:
    return digest_file(file)


def add_tensor(total: Any, value: Tensor) -> None:
    """Feed a tensor's shape, dtype and bytes to a hash, wherever the tensor lies."""
    import torch

    total.update(f"{tuple(value.shape)} {value.dtype}\0".encode())
    total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def library_versions() -> dict[str, str]:
    """`library NAME` -> version of each of LIBRARIES: the environment part of a run's identity."""
    return {f"library {package}": installed_version(package) for package in LIBRARIES}


@functools.cache
def installed_version(package: str) -> str:
    """The version of an installed package, or "not installed". Its metadata is read once per process."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# -- code --


def digest_code(target: Any) -> str:
    """SHA-256 of the code of a registered function or class, and of every project module that it imports.

    Imports are followed as they are written, directly and indirectly, as long as they stay in the target's own project:
    its package, or for a single file the files beside it. Of a notebook the source of the cell counts.

    Raises:
        UserError: there is no source, as for what is typed on standard input.
    """
    inner = inspect.unwrap(target)
    name = _source_name(inner)
    if name is not None and Path(name).is_file():
        return digest_files(code_files(Path(name), inner.__module__))
    cell = "".join(linecache.getlines(name)) if name else ""
    if not cell:
        raise UserError(
            f"{inner.__qualname__} has no source that can be read, so its results could not be told from those of "
            "another version; define it in a file (and name that under `plugins`) or in a notebook"
        )
    return hashlib.sha256(cell.encode()).hexdigest()


def _source_name(target: Any) -> str | None:
    """The file, or the notebook cell, in which a function or class is written; None where there is no telling.

    inspect looks for a class's file in its module, which a notebook does not have: one of its own functions tells.
    """
    try:
        return inspect.getsourcefile(target)
    except (OSError, TypeError):
        pass
    functions = [target] if inspect.isfunction(target) else [inspect.unwrap(f) for f in vars(target).values()]
    names = [f.__code__.co_filename for f in functions if inspect.isfunction(f) and f.__module__ == target.__module__]
    return next((name for name in names if linecache.getlines(name)), None)


def digest_files(files: dict[str, Path]) -> str:
    """SHA-256 over files, each under a name that does not depend on where it lies."""
    total = hashlib.sha256()
    for name, file in sorted(files.items()):
        total.update(f"{name}\0{digest_file(file)}\0".encode())
    return total.hexdigest()


def code_files(file: Path, module: str) -> dict[str, Path]:
    """The file of a module and of every project module that it imports, by a name that is the same on every machine.

    Args:
        file: the source file.
        module: its dotted name; modules of one top-level package are one project. A module without a package (a
            plugin file, a script) has the Python files of its own folder as its project.
    """
    package = module.partition(".")[0] if "." in module or file.name == "__init__.py" else ""
    alone = file.parent.name in ("site-packages", "dist-packages")  # a module of its own: what lies beside is not its
    found: dict[str, Path] = {}
    waiting = [(module if package else file.stem, file)]
    while waiting:
        name, path = waiting.pop()
        if name in found:
            continue
        found[name] = path
        state = path.stat()
        for imported in _imports(path, name, (state.st_mtime_ns, state.st_size)):
            own = _in_package(imported, package) if package else {} if alone else _beside(imported, file.parent)
            # qapbench's own `__init__` only re-exports, and `_imports` follows what it re-exports by name.
            waiting += [(n, p) for n, p in (own | _in_package(imported, "qapbench")).items() if n != "qapbench"]
    return found


@functools.lru_cache(maxsize=4096)
def _imports(file: Path, module: str, state: tuple[int, int]) -> tuple[str, ...]:
    """Dotted names of the modules (or of names in modules) that a file's import statements name.

    A file that is no Python code names none: running it fails, and says why.

    Args:
        file: the source file.
        module: its dotted name.
        state: time of its last change, and size; results are kept as long as they stay the same.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names += [_public(base, alias.name) for alias in node.names]
    return tuple(dict.fromkeys(names))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement that may run: what stands under `if TYPE_CHECKING` does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def _public(base: str, name: str) -> str:
    """`from base import name` as a dotted name; a public name of qapbench as that of the module that defines it."""
    if base == "qapbench":
        from qapbench import DEPRECATED, HOMES

        home = HOMES.get(DEPRECATED.get(name, name))
        return f"qapbench.{home}.{name}" if home else f"qapbench.{name}"
    return f"{base}.{name}" if base else name


def _in_package(name: str, package: str) -> dict[str, Path]:
    """The module that a dotted name is, or is defined in, where it belongs to that package."""
    if name.partition(".")[0] != package:
        return {}
    parts = name.split(".")
    for size in (len(parts), len(parts) - 1):
        module = ".".join(parts[:size])
        if module and (path := _file_of(module)) is not None:
            return {module: path}
    return {}


@functools.lru_cache(maxsize=4096)
def _file_of(module: str) -> Path | None:
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _beside(name: str, folder: Path) -> dict[str, Path]:
    """The file below a folder that an absolute import names."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        base = folder.joinpath(*parts[:size])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return {".".join(parts[:size]): file}
    return {}
