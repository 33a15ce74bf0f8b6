"""The `qapbench` command line. Each command imports what it needs when it runs, so that `--help` starts fast."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.markup import escape

from qapbench import __version__
from qapbench.errors import RunFailedError, UserError

from . import costs, doctor, items, profiles, quantizing, results, running, scaffold, status, studies
from .console import collect_rarely, err

EXIT_CODES = {
    0: "the command did what it was asked for.",
    1: "a run failed, the machine refused something (a full disk, a folder that may not be written), or `doctor` found "
    "something broken. What was stored before is kept.",
    2: "the spec, an argument or a stored file is wrong. Each mistake is one line that names the place and the nearest "
    "valid name.",
    130: "interrupted by Ctrl+C. The same command goes on from what is stored.",
}
"""What the exit code of every command means."""

study_app = typer.Typer(no_args_is_help=True, help="Studies of why rows differ.", rich_markup_mode=None)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing boxes would take half of the start-up time
    help="Benchmark quantized and vision-token-pruned multimodal LLMs.",
    epilog="\n\n".join(f"Exit code {code}: {meaning}" for code, meaning in EXIT_CODES.items()),
)
# The texts that `--help` lists are short enough for 60 characters per line, where longer ones would be cut off.
app.command(short_help="Make the missing runs of a spec.")(running.run)
app.command(short_help="Say how far runs are.")(status.status)
app.command(short_help="Check a spec and list its runs.")(running.validate)
app.command(short_help="Write a quantized checkpoint.")(quantizing.quantize)
app.command("list", short_help="List what is registered, or specs.")(items.list_items)
app.command(short_help="Describe one registered item.")(items.show)
app.command(short_help="Print the JSON Schema of specs.")(items.schema)
app.command(short_help="Write a strategy to start from.")(scaffold.new)
app.command(short_help="Write the page of all runs.")(results.leaderboard)
app.command(short_help="Compare two runs by question.")(results.compare)
app.command(short_help="Draw the pruning of one question.")(studies.explain)
app.command(short_help="Write which tokens are kept.")(running.select)
app.command(short_help="Score stored outputs again.")(results.score)
app.command(short_help="Count what the rows of a spec cost.")(costs.cost)
app.command(short_help="Measure what the rows of a spec take.")(profiles.profile)
app.command(short_help="Say what works on this machine.")(doctor.doctor)
app.add_typer(study_app, name="study")
study_app.command("sensitivity", short_help="Which metric predicts harm?")(studies.study_sensitivity)


def _version(asked: bool) -> None:
    """Print the version and exit, if it was asked for."""
    if asked:
        typer.echo(f"qapbench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Benchmark quantized and vision-token-pruned multimodal LLMs."""


def main() -> None:
    """Entry point of the command line.

    Mistakes of the user are printed as one readable message, with exit code 2. What the machine refuses (a full disk, a
    folder that may not be written) and a run that failed are told in one sentence too, with exit code 1. Any other
    error is a bug that shows its traceback.
    """
    collect_rarely()
    os.environ.setdefault("TQDM_DISABLE", "1")  # qapbench shows a progress bar of its own
    for noisy in ("transformers", "torchao", "torch.utils._pytree"):  # torchao warns of kernels for other machines
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            _say("error:", str(problem))
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        _say(
            "error:",
            f"{place}{error.strerror}; what was stored before is kept, and the same command goes on from there",
        )
        sys.exit(1)
    except RunFailedError as error:
        _say("run failed:", str(error))
        sys.exit(1)


def _say(head: str, text: str) -> None:
    """Print an error to standard error, on one line however long it is."""
    err.print(f"[red]{head}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
    """Print a warning as one line, without the source line that raised it."""
    err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
