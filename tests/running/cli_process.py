"""The command in a process of its own, forked from one that has imported the libraries, which takes seconds."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

LIBRARIES = [
    "torch",
    "pandas",
    "scipy.stats",
    "transformers.models.auto.processing_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.generation",
    "datasets",
    "lm_eval.api.task",
    "lm_eval.tasks",
    "lm_eval.evaluator",
    "pyarrow.parquet",
    "rich.table",
    "typer",
    "qapbench.methods.kinds",
]
"""Imported once, in the process that the commands are forked from. The command line itself is imported by each."""
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(LIBRARIES)


def qapbench(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line as its entry point does.

    Args:
        arguments: what follows `qapbench`.
        cwd: the working directory; None is that of this process.
        timeout: seconds until it is killed.

    Returns:
        Exit code, standard output and standard error.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return _done(_command, arguments, cwd, timeout)


def pytest(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run pytest, which imports plugins and test modules that stay out of this process. See `qapbench`."""
    return _done(_pytest, arguments, cwd, timeout)


def _done(
    target: Callable[..., None], arguments: Sequence[object], cwd: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run the target in a forked process, with arguments, and wait for its end."""
    words = list(map(str, arguments))
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "stdout", Path(folder) / "stderr"
        process = _forking.Process(target=target, args=(words, environment, cwd or Path.cwd(), *streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def started(*arguments: object) -> multiprocessing.process.BaseProcess:
    """Start the command line, for whoever wants to kill it. What it prints is lost.

    Args:
        arguments: what follows `qapbench`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nowhere = Path(os.devnull)
    process = _forking.Process(
        target=_command, args=(list(map(str, arguments)), environment, Path.cwd(), nowhere, nowhere)
    )
    process.start()
    return process


def _command(words: list[str], environment: dict[str, str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """What the forked process does: become the command."""
    _become(environment, cwd, stdout, stderr)
    sys.argv = ["qapbench", *words]

    import torch

    from qapbench.cli import main

    torch.set_num_threads(1)
    main()


def _pytest(words: list[str], environment: dict[str, str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """What the forked process does: become pytest."""
    _become(environment, cwd, stdout, stderr)

    import pytest

    sys.exit(pytest.main(words))


def _become(environment: dict[str, str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """Take over an environment, a working directory, and files as the standard streams."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
