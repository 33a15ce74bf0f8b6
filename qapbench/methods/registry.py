"""Named, typed, pluggable items: one `Registry` per kind (strategies, model families, checkpoint formats, tasks).

A registered item's keyword parameters, with their annotations and defaults, are its spec: `create` validates
against them and a YAML file can set them. Items arrive through plugins (see `plugins`), the built-in ones too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import ValidationError

from qapbench.errors import UserError, nearest

from .parameters import Params, params_model, problems_of
from .plugins import broken_plugins, load_plugins, note_registration

if TYPE_CHECKING:
    from .docstrings import Documentation

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered item.

    Attributes:
        name: the name under which a spec finds it.
        target: the function or class that was decorated.
        params: pydantic model of its keyword parameters.
        default: whether the framework takes this item if a spec names none.
    """

    name: str
    target: Callable[..., Any]
    params: type[Params]
    default: bool = False

    @functools.cached_property
    def origin(self) -> str:
        """Where the target is defined: "module.qualname (file:line)", for messages about collisions."""
        inner = inspect.unwrap(self.target)
        return f"{inner.__module__}.{inner.__qualname__} ({':'.join(map(str, self.place or (None, 0)))})"

    @functools.cached_property
    def place(self) -> tuple[str, int] | None:
        """File and line of the target; None if they cannot be told."""
        inner = inspect.unwrap(self.target)
        try:
            file, line = inspect.getsourcefile(inner), inspect.findsource(inner)[1] + 1
        except (OSError, TypeError):
            return None
        return (file, line) if file else None

    @property
    def doc(self) -> str:
        """The docstring, without indentation."""
        return inspect.getdoc(self.target) or ""

    @property
    def documentation(self) -> Documentation:
        """What the docstring says of the item, its parameters and the paper that it comes from."""
        from .docstrings import documentation  # imported here because a run reads no docstrings

        return documentation(self.target)

    @property
    def source(self) -> Path | None:
        """The file that defines the item; None for one that is defined in a notebook."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.target))
        except (OSError, TypeError):
            return None
        return Path(file) if file else None


class Registry(Generic[T]):
    """Items of one kind, by name.

    Args:
        kind: singular noun for messages ("metric").
        build: makes the usable object of an entry and its validated parameters.
        check: raises TypeError when a target cannot serve as this kind.
        positional: how many leading parameters are call arguments and not part of the spec; None: all of them. Where
            it depends on the target, a function of it.
    """

    def __init__(
        self,
        kind: str,
        build: Callable[[Entry[T], dict[str, Any]], T],
        check: Callable[[Any], None] = lambda target: None,
        positional: int | Callable[[Any], int] | None = 0,
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
            leading = self._positional(target) if callable(self._positional) else self._positional
            params = params_model(f"{self.kind}:{name}", target, leading)
            entry: Entry[T] = Entry(name, target, params, default)
            held = self._entries.get(name)
            if held and held.place and held.place == entry.place and held.origin != entry.origin:
                return target  # lm-eval runs the file that a task's functions are in again, as a module of another name
            if held and not (held.origin == entry.origin or _is_notebook_cell(target)):
                raise UserError(
                    f"{self.kind} '{name}' is registered twice: by {held.origin} and by {entry.origin}. "
                    "Rename one, or import the package under one name only."
                )
            if default and (other := next((e for e in self._entries.values() if e.default and e.name != name), None)):
                raise UserError(
                    f"{self.kind}: '{other.name}' ({other.origin}) is the default already, not {entry.origin}"
                )
            self._entries[name] = entry
            note_registration(sys._getframe(1).f_globals["__name__"], lambda: self._restore(name, held))
            return target

        return decorate

    def _restore(self, name: str, held: Entry[T] | None) -> None:
        """Put back what was registered under a name before; nothing if None."""
        if held is None:
            self._entries.pop(name, None)
        else:
            self._entries[name] = held

    def names(self) -> list[str]:
        load_plugins()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return (self._entries[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        # What is registered is not replaced by a plugin, so it need not wait for them.
        return name in self._entries or name in self.names()

    def registered(self) -> list[Entry[T]]:
        """The entries that are registered by now. Unlike iteration, this loads no plugin."""
        return list(self._entries.values())

    def entry(self, name: str) -> Entry[T]:
        """The entry of that name, or a UserError with the nearest valid name."""
        if name not in self:
            broken = "".join(f"; plugin '{plugin}' {why}" for plugin, why in broken_plugins().items())
            raise UserError(f"no {self.kind} '{name}'; {nearest(name, self.names())}{broken}")
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
        """Describe an item by values that JSON can hold.

        Returns:
            "kind" and "name"; "doc", the docstring; "source", the paper that the docstring names ("" if it names none);
            "origin", where the item is defined; "parameters", by name the JSON schema of each, with the docstring's
            description of it.
        """
        entry = self.entry(name)
        documentation = entry.documentation
        parameters = entry.params.model_json_schema().get("properties", {})
        for key, schema in parameters.items():
            if documentation.parameters.get(key):
                schema["description"] = documentation.parameters[key]
        return {
            "kind": self.kind,
            "name": name,
            "doc": entry.doc,
            "source": documentation.source,
            "origin": entry.origin,
            "parameters": parameters,
        }


def _is_notebook_cell(target: Any) -> bool:
    """Running a notebook cell again is how one edits there; it is not a collision."""
    return getattr(target, "__module__", "") == "__main__" and "ipykernel" in sys.modules


def check_class(base: type, kind: str) -> Callable[[Any], None]:
    """Make the check that what is registered is a complete subclass.

    Args:
        base: the class.
        kind: the kind of item, for the message.
    """

    def check(target: Any) -> None:
        if not (isinstance(target, type) and issubclass(target, base)):
            raise TypeError(f"a {kind} must be a subclass of qapbench.{base.__name__}, got {target!r}")
        if inspect.isabstract(target):
            lacking = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
            raise TypeError(f"{target.__name__} is no {kind} yet: it does not define {lacking}")

    return check


def check_callable(target: Any) -> None:
    """Check that what is registered, or an instance of it, can be called.

    Raises:
        TypeError: it cannot.
    """
    usable = callable(target)
    if isinstance(target, type):  # classes are always callable; the instances have to be
        usable = any("__call__" in vars(base) for base in target.__mro__)
    if not usable:
        raise TypeError(f"expected a function or a class with __call__, got {target!r}")
