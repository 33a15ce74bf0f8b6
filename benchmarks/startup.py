"""Time that commands take to start, compared to what they cannot do without.

    python -m benchmarks.startup [--repeat 5]

`qapbench --help` is compared to `import typer, rich`, and the commands that load no model to `import torch`, all in one
run, each in a fresh process. The minimum over the repetitions is printed, since other work on a machine only adds time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

IMPORTS = {"typer, rich": "import typer, rich", "torch": "import torch"}
COMMANDS: dict[str, list[str]] = {
    "--help": ["--help"],
    "list": ["list"],
    "show metric l2": ["show", "metric", "l2"],
    "validate quickstart": ["validate", "quickstart"],
    "run quickstart --dry-run": ["run", "quickstart", "--dry-run"],
}


def seconds(command: list[str], folder: Path, repeat: int) -> float:
    """The least wall time of a command over so many runs, each in a fresh process."""
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = {name: seconds([sys.executable, "-c", code], folder, repeat) for name, code in IMPORTS.items()}
        table = Table(title=f"Seconds to start, least of {repeat}", title_justify="left")
        for column in ("command", "seconds", "compared to"):
            table.add_column(column, justify="left" if column == "command" else "right")
        for name, spent in base.items():
            table.add_row(f"import {name}", f"{spent:.2f}", "")
        for name, arguments in COMMANDS.items():
            spent = seconds([sys.executable, "-m", "qapbench.cli", *arguments], folder, repeat)
            ratio = f"{spent / base['typer, rich']:.2f} x typer, rich"
            more = f"torch {spent - base['torch']:+.2f} s"
            table.add_row(f"qapbench {name}", f"{spent:.2f}", ratio if name == "--help" else more)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
