"""`list`, `show` and `schema`: what is registered, and what a spec can say."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from qapbench.errors import UserError, nearest

from . import completion
from .console import out

READABLE = 120  # characters of a line of prose, where the console is wider


def list_items(
    kind: Annotated[
        str | None, typer.Argument(help="metric, quantizer, ..., or specs", autocompletion=completion.kinds)
    ] = None,
    matrix: Annotated[
        bool, typer.Option(help="Run every pruner on tiny models; with KIND ptq, quantized too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what is registered, or the shipped specs; with --matrix, which pruner runs on which model family.

    `list --matrix ptq` runs every pruner under every quantization method, one table per family.

    \b
    Examples:
      qapbench list pruners
      qapbench list specs
      qapbench list --matrix
    """
    if matrix:
        _list_matrix(kind, as_json)
        return
    if kind in ("spec", "specs"):
        _list_specs(as_json)
        return
    if as_json:
        items = [registry.describe(name) for registry in _registries(kind) for name in registry.names()]
        typer.echo(json.dumps(items))
        return
    for registry in _registries(kind):
        table = Table(title=registry.kind, title_justify="left")
        table.add_column("name", style="bold", no_wrap=True)
        table.add_column("parameters")
        table.add_column("what it is")
        for entry in registry:
            fields = entry.params.model_fields.items()
            params = ", ".join(key if field.is_required() else f"{key}={field.default!r}" for key, field in fields)
            table.add_row(escape(entry.name), escape(params), escape(entry.doc.partition("\n")[0]))
        out.print(table)


def _list_specs(as_json: bool) -> None:
    """List the shipped specs, which `run` and `validate` take by name."""
    from qapbench.spec.spec_file import about_spec, shipped_specs

    about = {name: about_spec(file) for name, file in sorted(shipped_specs().items())}
    if as_json:
        typer.echo(json.dumps([{"kind": "spec", "name": name, "doc": doc} for name, doc in about.items()]))
        return
    table = Table(title="spec", title_justify="left")
    table.add_column("name", style="bold")
    table.add_column("what it is")
    for name, doc in about.items():
        table.add_row(escape(name), escape(doc))
    out.print(table)


def _list_matrix(kind: str | None, as_json: bool) -> None:
    chosen = None if kind is None else _registries(kind)[0].kind
    if chosen not in (None, "pruner", "ptq"):
        raise UserError(f"--matrix: there is a matrix of pruners and one of ptq, none of {chosen}")
    from qapbench.analysis import compatibility

    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # what it warns of is in the table
    cells = list(compatibility.run_ptq_matrix() if chosen == "ptq" else compatibility.run_matrix())
    if as_json:
        typer.echo(json.dumps([cell.to_json() for cell in cells]))
        return
    marks: dict[str, int] = {}
    if chosen == "ptq":
        for family in dict.fromkeys(cell.family for cell in cells):
            own = {(_method(cell), cell.pruner): cell for cell in cells if cell.family == family}
            _print_matrix(f"ptq x pruner on {family}, as found by running", "ptq", own, marks)
    else:
        title = "pruner x model family, as found by running"
        _print_matrix(title, "pruner", {(cell.pruner, cell.family): cell for cell in cells}, marks)
    for text, number in marks.items():
        out.print(escape(f"[{number}] {text}"), soft_wrap=True, highlight=False)


def _method(cell: Any) -> str:
    """A quantization method and the format of its activations, as a row of the matrix is called."""
    return f"{cell.ptq}, {cell.activations}" if cell.activations else str(cell.ptq)


def _print_matrix(title: str, corner: str, cells: dict[tuple[str, str], Any], marks: dict[str, int]) -> None:
    """Print a table of outcomes: several below each other if its columns do not fit side by side.

    Args:
        title: above the table.
        corner: what the rows are.
        cells: outcome by (row, column).
        marks: numbers of the reasons and notes so far; new ones are added.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    shown: dict[str, list[str]] = {column: [] for _, column in cells}
    for row, column in itertools.product(rows, shown):
        cell = cells[row, column]
        said = [cell.reason] if cell.reason else cell.notes
        numbers = "".join(f" [{marks.setdefault(text, len(marks) + 1)}]" for text in said)
        shown[column].append(f"{cell.outcome}{numbers}")
    first = max(map(len, (corner, *rows))) + 4  # a column has a border and two spaces beside its text
    parts: list[list[str]] = []
    room = 0
    for column, outcomes in shown.items():
        width = max(map(len, (column, *outcomes))) + 3
        if not parts or width > room:
            parts.append([])
            room = out.width - first
        parts[-1].append(column)
        room -= width
    for part in parts:
        table = Table(title=title, title_justify="left")
        for head in (corner, *part):
            table.add_column(head, overflow="fold")
        for place, row in enumerate(rows):
            table.add_row(row, *(escape(shown[column][place]) for column in part))
        out.print(table)


def show(
    kind: Annotated[str, typer.Argument(help="metric, quantizer, ...", autocompletion=completion.kinds)],
    name: Annotated[str, typer.Argument(help="Name of the item.", autocompletion=completion.items)],
) -> None:
    """Describe one registered item: what it is, its parameters, the paper it comes from, where it is defined.

    \b
    Examples:
      qapbench show metric combined
    """
    (registry,) = _registries(kind)
    described = registry.describe(name)
    out.print(f"[bold]{escape(name)}[/] ({registry.kind}), from {escape(described['origin'])}", highlight=False)
    width = min(out.width, READABLE)
    out.print(f"\n{escape(registry.entry(name).documentation.text)}\n", highlight=False, width=width)
    if described["parameters"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("parameter", "type", "values", "default", "meaning"):
            table.add_column(head, no_wrap=head == "parameter")
        for key, schema in described["parameters"].items():
            cells = (key, _type(schema), _values(schema), _default(schema), schema.get("description", ""))
            table.add_row(*map(escape, cells))
        out.print(table, width=width)
    if described["source"]:
        out.print(f"Source: {escape(described['source'])}", highlight=False, width=width)


def schema() -> None:
    """Print the JSON Schema of spec files, with which an editor completes fields and marks mistakes.

    It goes into a file, which a spec names on its first line: `# yaml-language-server: $schema=qapbench.schema.json`

    \b
    Examples:
      qapbench schema > qapbench.schema.json
    """
    from qapbench.spec.schema import spec_schema

    typer.echo(json.dumps(spec_schema(), indent=1))


def _type(schema: dict[str, Any]) -> str:
    """The type in a JSON schema, for example "integer or null"."""
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    return str(schema.get("type") or schema.get("$ref", "any").rpartition("/")[2])


def _values(schema: dict[str, Any]) -> str:
    """The choices or bounds in a JSON schema, one per line."""
    if "anyOf" in schema:
        return "\n".join(filter(None, map(_values, schema["anyOf"])))
    if "const" in schema or "enum" in schema:
        return "\n".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return "\n".join(f"{sign} {schema[bound]}" for bound, sign in signs.items() if bound in schema)


def _default(schema: dict[str, Any]) -> str:
    """The default in a JSON schema, written as in a spec."""
    if "default" not in schema:
        return "required"
    default = schema["default"]
    return default if isinstance(default, str) else json.dumps(default)


def _registries(kind: str | None) -> list[Any]:
    from qapbench.methods.kinds import KINDS

    if kind is None:
        return list(KINDS.values())
    name = kind if kind in KINDS else kind.removesuffix("s")
    if name not in KINDS:
        raise UserError(f"no kind '{kind}'; {nearest(kind, [*KINDS, 'specs'])}")
    return [KINDS[name]]
