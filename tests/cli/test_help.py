"""What `--help` says: every command has examples that it takes, and the exit codes are listed."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qapbench.cli import EXIT_CODES, app


def below(command: Any, name: str) -> dict[str, Any]:
    """Every command, by its full name."""
    commands = getattr(command, "commands", None)
    if not commands:
        return {name: command}
    return {full: one for word, each in commands.items() for full, one in below(each, f"{name} {word}").items()}


COMMANDS = below(typer.main.get_command(app), "qapbench")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_it_takes(name: str) -> None:
    command = COMMANDS[name]
    shown = CliRunner().invoke(app, [*name.split()[1:], "--help"]).output
    examples = [
        line.strip() for line in shown.partition("Examples:")[2].splitlines() if line.startswith("    qapbench")
    ]
    assert examples, f"`{name} --help` has no example"
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[: len(name.split())] == name.split()
        command.make_context(name, words[len(name.split()) :])  # raises for an option or a value that it does not know
    assert shown.count("Example") == 1


def test_there_are_as_many_commands_as_registered() -> None:
    assert {"qapbench run", "qapbench study sensitivity", "qapbench doctor"} <= set(COMMANDS)
    assert len(COMMANDS) >= 17


def test_help_lists_the_exit_codes() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for code, meaning in EXIT_CODES.items():
        assert f"Exit code {code}: {meaning}" in shown
