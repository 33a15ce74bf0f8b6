"""Progress on the screen: bars in a terminal, one line in a notebook, and nothing anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .progress import ProgressCallback, assembly_progress, silent
from .visible import visible

if TYPE_CHECKING:
    from rich.console import Console


class Bars:
    """A progress bar per run, with its rate and the time left.

    Args:
        console: where they are drawn.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=console)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.bar.start()

    def report(self, name: str, done: int, total: int) -> None:
        """Show how far a run is; its first report adds a bar.

        Args:
            name: label of the bar.
            done: questions answered.
            total: questions in all.
        """
        from rich.markup import escape

        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(escape(visible(name)), total=total, completed=done, rate="")
        task = self.tasks[name]
        speed = self.bar.tasks[self.bar.task_ids.index(task)].speed
        self.bar.update(task, completed=done, rate=f"{speed:.1f}/s" if speed else "")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop the bars."""
        self.bar.stop()


class Line:
    """The latest progress in one line that is written again and again, which every notebook can show."""

    def __init__(self) -> None:
        self.width = 0

    def report(self, name: str, done: int, total: int) -> None:
        """Show how far a run is.

        Args:
            name: label of the run.
            done: questions answered.
            total: questions in all.
        """
        text = f"{visible(name)}: {done} of {total}"
        sys.stderr.write(f"\r{text.ljust(self.width)}")
        sys.stderr.flush()
        self.width = len(text)

    def close(self) -> None:
        """End the line."""
        if self.width:
            sys.stderr.write("\n")


@contextlib.contextmanager
def shown(console: Console | None = None) -> Iterator[ProgressCallback]:
    """While the context is open, show progress on standard error if that is a terminal or belongs to a notebook.

    That an embedded model is put together on first use is shown too.

    Args:
        console: where bars are drawn; standard error if None.

    Yields:
        The callback to report to.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    report: ProgressCallback = silent
    with contextlib.ExitStack() as stack:
        if console.is_jupyter:
            line = Line()
            stack.callback(line.close)
            report = line.report
        elif console.is_terminal:
            bars = Bars(console)
            stack.enter_context(bars)
            report = bars.report
        token = assembly_progress.set(lambda name, done, total: report(f"{name}: first use", done, total))
        stack.callback(assembly_progress.reset, token)
        yield report


@contextlib.contextmanager
def only_told(report: ProgressCallback) -> Iterator[ProgressCallback]:
    """While the context is open, nothing is shown: a callback of the caller's is told of the runs, and of nothing else.

    Yields:
        That callback.
    """
    token = assembly_progress.set(silent)
    try:
        yield report
    finally:
        assembly_progress.reset(token)
