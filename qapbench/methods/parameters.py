"""The typed parameters of registered items, and validation errors as readable problems."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from qapbench.errors import Problem, UserError, nearest


class Params(BaseModel):
    """Base of the generated parameter models: strict types, nothing unknown, defaults validated too."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def params_model(title: str, target: Any, positional: int | None) -> type[Params]:
    """The spec of a target: its parameters after the `positional` leading ones; none at all where that is None."""
    if positional is None:
        return create_model(title, __base__=Params)
    own = list(inspect.signature(target).parameters.values())[positional:]
    hints = _hints(target, {parameter.name for parameter in own})
    fields: dict[str, Any] = {}
    for parameter in own:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{title}: *args and **kwargs cannot become a typed spec; name each parameter")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return create_model(title, __base__=Params, **fields)


def _hints(target: Any, names: set[str]) -> dict[str, Any]:
    """The annotations of those parameters. Those of call arguments may name what is imported for type checkers only."""
    if isinstance(target, type):
        return typing.get_type_hints(target, include_extras=True)

    def stand_in() -> None: ...

    inner = inspect.unwrap(target)
    stand_in.__annotations__ = {name: hint for name, hint in inner.__annotations__.items() if name in names}
    return typing.get_type_hints(stand_in, globalns=getattr(inner, "__globals__", None), include_extras=True)


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
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; nested without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 1] + "…"


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Field names of the (nested) model that `path` leads to."""
    for part in path:
        if isinstance(part, int):  # a place in a list, whose entries all have one model
            continue
        info = model.model_fields.get(str(part))
        nested = [arg for arg in _flatten(info.annotation if info else None) if _is_model(arg)]
        if not nested:
            return []
        model = nested[0]
    return [info.alias or name for name, info in model.model_fields.items()]


def _flatten(annotation: Any) -> list[Any]:
    args = typing.get_args(annotation)
    return [annotation] + [leaf for arg in args for leaf in _flatten(arg)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
