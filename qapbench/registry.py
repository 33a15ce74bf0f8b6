"""Named, typed, pluggable items: one `Registry` per kind of strategy.

A registered item's keyword parameters, with their annotations and defaults, are its spec: `create` validates
against them and a YAML file can set them. Items arrive through the entry-point group `qapbench.plugins`; the
built-in ones use the same door.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .errors import Problem, UserError, nearest

T = TypeVar("T")
ENTRY_POINTS = "qapbench.plugins"


class Params(BaseModel):
    """Base of the generated parameter models: strict types, nothing unknown, defaults validated too."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered item.

    Attributes:
        target: the function or class that was decorated.
        params: pydantic model of its keyword parameters.
        origin: "module.qualname (file:line)", for messages about collisions.
        default: whether the framework takes this item where a spec names none.
    """

    name: str
    target: Callable[..., Any]
    params: type[Params]
    origin: str
    default: bool = False

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.target) or ""

    @property
    def source(self) -> Path | None:
        """The file that defines the item: part of a result's key where it is not ours."""
        file = inspect.getsourcefile(inspect.unwrap(self.target))
        return Path(file) if file else None


class Registry(Generic[T]):
    """Items of one kind, by name.

    Args:
        kind: singular noun for messages ("metric").
        build: makes the usable object of an entry and its validated parameters.
        check: raises TypeError when a target cannot serve as this kind.
        positional: how many leading parameters are call arguments and not part of the spec.
    """

    def __init__(
        self,
        kind: str,
        build: Callable[[Entry[T], dict[str, Any]], T],
        check: Callable[[Any], None] = lambda target: None,
        positional: int = 0,
    ) -> None:
        self.kind = kind
        self._build = build
        self._check = check
        self._positional = positional
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, default: bool = False) -> Callable[[Any], Any]:
        """Decorator: register the target under `name`. A second registration fails and names both origins."""

        def decorate(target: Any) -> Any:
            self._check(target)
            origin = _origin(target)
            held = self._entries.get(name)
            if held and not (held.origin == origin or _is_notebook_cell(target)):
                raise UserError(
                    f"{self.kind} '{name}' is registered twice: by {held.origin} and by {origin}. "
                    "Rename one, or import the package under one name only."
                )
            if default and (other := next((e for e in self._entries.values() if e.default and e.name != name), None)):
                raise UserError(f"{self.kind}: '{other.name}' ({other.origin}) is the default already, not {origin}")
            params = _params_model(f"{self.kind}:{name}", target, self._positional)
            self._entries[name] = Entry(name, target, params, origin, default)
            return target

        return decorate

    def names(self) -> list[str]:
        load_plugins()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return (self._entries[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def entry(self, name: str) -> Entry[T]:
        """The entry of that name, or a UserError with the nearest valid name."""
        names = self.names()
        if name not in self._entries:
            raise UserError(f"no {self.kind} '{name}'; {nearest(name, names)}")
        return self._entries[name]

    @property
    def default(self) -> str:
        """Name of the item registered with `default=True`."""
        for entry in self:
            if entry.default:
                return entry.name
        raise UserError(f"no {self.kind} is registered as the default; name one")

    def validate(self, name: str, params: dict[str, Any]) -> dict[str, Any]:
        """All parameters of the item with defaults filled in. Every mistake in one UserError."""
        model = self.entry(name).params
        try:
            return model.model_validate(params).model_dump()
        except ValidationError as error:
            raise UserError(problems_of(error, model, f"{self.kind} '{name}'")) from None

    def create(self, name: str, **params: Any) -> T:
        """The item, configured and ready to call."""
        return self._build(self.entry(name), self.validate(name, params))

    def describe(self, name: str) -> dict[str, Any]:
        """Name, documentation, origin and JSON schema of the parameters."""
        entry = self.entry(name)
        schema = entry.params.model_json_schema().get("properties", {})
        return {
            "kind": self.kind, "name": name, "doc": entry.doc, "origin": entry.origin, "parameters": schema,
        }  # fmt: skip


def problems_of(error: ValidationError, model: type[BaseModel], owner: str = "") -> list[Problem]:
    """Pydantic's errors as one-line problems, with the nearest valid name for an unknown field."""
    found: list[Problem] = []
    for item in error.errors(include_url=False):
        where = tuple(item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            found += [problem.under(*where) for problem in cause.problems]
        elif item["type"] == "extra_forbidden":
            fields = _fields_at(model, where[:-1])
            of = f" of {owner}" if owner else ""
            found.append(Problem(f"unknown field{of}; {nearest(str(where[-1]), fields)}", where))
        elif item["type"] == "missing":
            found.append(Problem("this field is required", where))
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            found.append(Problem(f"{message} (got {_short(item['input'])})", where))
    return found


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Field names of the (nested) model that `path` leads to."""
    for part in path:
        info = model.model_fields.get(str(part))
        nested = [arg for arg in _flatten(info.annotation if info else None) if _is_model(arg)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    args = typing.get_args(annotation)
    return [annotation] + [leaf for arg in args for leaf in _flatten(arg)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _params_model(title: str, target: Any, positional: int) -> type[Params]:
    """The spec of a target: its parameters after the `positional` leading ones."""
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(target).parameters.values())[positional:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{title}: *args and **kwargs cannot become a typed spec; name each parameter")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return create_model(title, __base__=Params, **fields)


def _origin(target: Any) -> str:
    inner = inspect.unwrap(target)
    try:
        file, line = inspect.getsourcefile(inner), inspect.getsourcelines(inner)[1]
    except (OSError, TypeError):
        file, line = None, 0
    return f"{inner.__module__}.{inner.__qualname__} ({file}:{line})"


def _is_notebook_cell(target: Any) -> bool:
    """Running a notebook cell again is how one edits there; it is not a collision."""
    return getattr(target, "__module__", "") == "__main__" and "ipykernel" in sys.modules


@functools.cache
def load_plugins() -> None:
    """Import every module of the entry-point group, once."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        point.load()


_loaded_files: dict[Path, str] = {}


def load_plugin_file(path: str | Path) -> None:
    """Run a user's Python file, so that its decorators register. The same file is run once.

    Raises:
        UserError: it is not there, fails, or changed since it was run: what it registered is the old code.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"no such plugin file: {file}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if (loaded := _loaded_files.get(file)) is not None:
        if loaded != digest:
            raise UserError(f"plugin {file} changed since this process loaded it; start a new process")
        return
    load_plugins()
    # The path is part of the module's name: inspect finds a class's source by it, and stems repeat.
    name = f"qapbench_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"a plugin must be a Python file (.py): {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"plugin {file} failed to load: {type(error).__name__}: {error}") from error
    _loaded_files[file] = digest
