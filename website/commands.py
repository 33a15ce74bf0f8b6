"""The page of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from qapbench.cli import EXIT_CODES, app

from .markdown import code, page, table


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name, such as `study sensitivity`."""
    yield from _below(typer.main.get_command(app), "")


def _below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if below := getattr(command, "commands", None):
        for word, one in below.items():
            yield from _below(one, f"{name} {word}".strip())
    else:
        yield name, command


def pages() -> dict[str, str]:
    """Source of the page, by its path."""
    blocks = [part for name, command in commands() for part in _section(name, command)]
    codes = table(("code", "meaning"), [(f"`{number}`", when) for number, when in EXIT_CODES.items()])
    intro = (
        "What `qapbench COMMAND --help` says, on one page. [Running specs](../running.md) shows the commands at work."
    )
    return {"reference/commands.md": page("# Command line", intro, "## Exit codes", codes, *blocks)}


def _section(name: str, command: Any) -> list[str]:
    about, _, examples = (command.help or "").partition("Examples:")
    context = typer.Context(command)
    rows = [_row(one.get_help_record(context)) for one in command.params if one.name != "help" and not one.hidden]
    return [
        f"## {name} {{ #{name.replace(' ', '-')} }}",
        about.replace("\b", "").strip(),
        code("\n".join(line.strip() for line in examples.strip().splitlines()), "bash"),
        table(("argument or option", "meaning"), rows),
    ]


def _row(record: tuple[str, str]) -> tuple[str, str]:
    """A row of the table, from what `--help` says."""
    name, meaning = record
    return f"`{name}`", meaning.replace("<", "\\<")
