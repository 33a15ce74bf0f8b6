"""Time that commands take to start, compared to what they cannot do without.

    python -m benchmarks.startup [--repeat 5]

`qapbench --help` is compared to `import typer, rich`, and the commands that load no model to `import torch`, all in one
run, each in a fresh process. The minimum over the repetitions is printed, since other work on a machine only adds time.
Every command runs once before it is timed, so that Python has compiled its modules, as it has on a user's second day.
The compiled modules lie in a folder of this benchmark's own, whatever the environment says of writing them.
"""

from __future__ import annotations

import argparse
import os
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


def seconds(commands: dict[str, list[str]], folder: Path, repeat: int) -> dict[str, float]:
    """The least wall time of each command over so many rounds, after one that is not timed; each in a fresh process.

    Commands take turns, so that a slower minute of the machine does not fall on one of them alone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    least = dict.fromkeys(commands, float("inf"))
    for timed in [False] + [True] * repeat:
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            if timed:
                least[name] = min(least[name], time.perf_counter() - started)
    return least


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
        for name, arguments in COMMANDS.items():
            commands[name] = [sys.executable, "-m", "qapbench.cli", *arguments]
        spent = seconds(commands, folder, repeat)
        table = Table(title=f"Seconds to start, least of {repeat}", title_justify="left")
        for column in ("command", "seconds", "compared to"):
            table.add_column(column, justify="left" if column == "command" else "right")
        for name in IMPORTS:
            table.add_row(f"import {name}", f"{spent[name]:.2f}", "")
        for name in COMMANDS:
            ratio = f"{spent[name] / spent['typer, rich']:.2f} x typer, rich"
            more = f"torch {spent[name] - spent['torch']:+.2f} s"
            table.add_row(f"qapbench {name}", f"{spent[name]:.2f}", ratio if name == "--help" else more)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
