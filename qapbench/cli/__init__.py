"""`qapbench`: parse, call, print."""

from __future__ import annotations

import functools
import logging
import sys

import tqdm.auto
import typer
from rich.markup import escape

from qapbench.errors import UserError

from . import items, results, running, studies
from .console import err, watching_assembly

study_app = typer.Typer(no_args_is_help=True, help="Studies of why rows differ.")
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Benchmark quantized and vision-token-pruned multimodal LLMs.",
)  # fmt: skip
app.command()(running.run)
app.command()(running.validate)
app.command("list")(items.list_items)
app.command()(items.show)
app.command()(results.leaderboard)
app.command()(results.compare)
app.command()(studies.explain)
app.command()(results.score)
app.add_typer(study_app, name="study")
study_app.command("sensitivity")(studies.study_sensitivity)


def main() -> None:
    """Entry point: the user's mistakes are one readable message and exit code 2, faults of ours exit with 1."""
    from qapbench.receipt import NotQuantizedError

    # Our own bar is the only one; lm-eval and transformers offer no common switch for theirs.
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    tqdm.auto.tqdm.__init__ = functools.partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    for noisy in ("transformers", "torchao", "torch.utils._pytree"):  # torchao: kernels of other machines
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with watching_assembly():
            app()
    except UserError as error:
        for problem in error.problems:
            err.print(f"[red]error:[/] {escape(str(problem))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except NotQuantizedError as error:
        err.print(f"[red]run failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        err.print(f"[red]error:[/] {escape(f'{error.filename}: {error.strerror}')}", highlight=False, soft_wrap=True)
        sys.exit(2)
