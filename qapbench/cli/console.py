"""Consoles, options and progress bars that the commands share."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qapbench.bars import Bars
from qapbench.progress import assembly_progress
from qapbench.visible import visible

from . import completion

if TYPE_CHECKING:
    from qapbench.records.record import Record


class VisibleConsole(Console):
    """A console on which no text of a spec, a record or a model moves the cursor or turns the writing direction."""

    def render_str(self, text: str, **more: Any) -> Text:
        return super().render_str(visible(text), **more)


USUAL = gc.get_threshold()
RARELY = 200_000  # new objects between two searches for unreachable ones
WIDE = 200  # characters per line of output that is not printed to a terminal
# Tables in a pipe or a file may be wide; otherwise the terminal, or COLUMNS, sets the width.
out = VisibleConsole(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
err = VisibleConsole(stderr=True)

SpecArgument = Annotated[
    str,
    typer.Argument(help="A spec file, or the name of a shipped spec (quickstart).", autocompletion=completion.specs),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a dotted key.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the results.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Let a checkpoint run its own Python code.")]


def print_notes(notes: Iterable[str]) -> None:
    """Print what a reader of the numbers has to know, each note once."""
    for note in dict.fromkeys(notes):
        out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)


def write_page(records: list[Record], page: Path, title: str, runs: Path) -> None:
    """Write the leaderboard page and print its path.

    Args:
        records: records of the runs.
        page: the .html file to write.
        title: title of the page.
        runs: folder of the results.
    """
    from qapbench.leaderboard import build

    page.parent.mkdir(parents=True, exist_ok=True)
    build(records, page, title=title, runs=runs)
    out.print(f"Leaderboard: {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


def collect_rarely() -> None:
    """Let Python look for unreachable objects only after many new ones, while modules are imported and specs are read.

    Importing torch and the strategies makes some 400,000 objects that stay. By default Python walks all of them again
    for every few thousand new ones, and once more at exit, which took half a second of `list` and `validate`.
    """
    gc.set_threshold(RARELY, *USUAL[1:])
    atexit.register(gc.freeze)  # Python's last search leaves out what is frozen


def collect_as_usual() -> None:
    """Undo `collect_rarely`, before a model is loaded: unreachable tensors are not to wait for so many objects."""
    gc.set_threshold(*USUAL)


class Progress(Bars):
    """The bars of a command, on standard error, so that tables on standard output can be piped."""

    def __init__(self) -> None:
        super().__init__(err)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop the bars. If the user interrupted the work, say that the same command continues it."""
        super().__exit__(kind, *rest)
        if kind is KeyboardInterrupt:
            err.print("stopped; the same command goes on from here", highlight=False)
            raise typer.Exit(130) from None


@contextlib.contextmanager
def watching_assembly() -> Iterator[None]:
    """Show a progress bar while an embedded model is put together, which happens once per machine."""
    shown: list[Progress] = []

    def report(name: str, done: int, total: int) -> None:
        if not shown:
            shown.append(Progress())
            shown[0].bar.start()
        shown[0].report(f"{name}: first use", done, total)
        if done == total:
            shown.pop().bar.stop()

    token = assembly_progress.set(report)
    try:
        yield
    finally:
        assembly_progress.reset(token)
        for bars in shown:
            bars.bar.stop()
