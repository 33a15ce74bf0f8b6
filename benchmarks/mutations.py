"""Mutation testing: does a test fail if one line is made wrong?

    python -m benchmarks.mutations --seed 0 --count 100

Draws one-line mistakes (`benchmarks.mutants`) in the strategies and in the modules of quantization, pruning, stored
results and statistics, equally many from each of these groups. Each is made in a copy of the working tree, and the test
files that concern its module run there: first those that import the module or name what it defines, then the other
tests of its group. A mutant that no test notices has survived; its diff is shown, and it needs a test, or a reason in
`mutations.yaml` why it is equivalent to the original; with a reason it is not tried again. The result is 1 if there is
a survivor.

The draw depends on the seed and on the source. `--start 30 --count 70` goes on behind the first thirty. Mutants that
the file of `--results` has already are not tried again, so the same command goes on where it was stopped. With `--list`
nothing runs. An existing tool would do if it had no need to: mutmut leaves decorated functions alone, which most
strategies are, and cosmic-ray changes the working tree itself; neither draws a seeded sample or chooses test files.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from .mutants import Mutant, mutants

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_suffix(".yaml")
TOO_SLOW = "time limit"
QUICK_FIRST = ("analysis", "records", "methods", "strategies", "tasks", "contract", "models", "leaderboard", "running")
"""Folders of tests, the quicker ones first."""
out = Console(width=120, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that are drawn from together.

    Attributes:
        modules: patterns of their files.
        tests: patterns of the test files that concern all of them.
        without: files that belong to another group.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()


STATISTICS = ("qapbench/analysis/paired.py", "qapbench/analysis/ranking.py", "qapbench/records/tally.py")
GROUPS = {
    "strategies": Group(("strategies/*/*.py",), ("tests/strategies/test_*.py", "tests/contract/test_*.py")),
    "quantization": Group(
        (
            "qapbench/quantize/**/*.py",
            "qapbench/methods/affine.py",
            "qapbench/methods/formats.py",
            "qapbench/methods/normal_float.py",
            "qapbench/methods/plans.py",
            "qapbench/methods/quantization.py",
            "qapbench/methods/rotation.py",
        ),
        (
            "tests/strategies/test_affine.py",
            "tests/strategies/test_*format*.py",
            "tests/strategies/test_*ptq*.py",
            "tests/strategies/test_rotations.py",
            "tests/contract/test_allocation*.py",
            "tests/contract/test_overrides*.py",
            "tests/contract/test_ptq*.py",
            "tests/models/test_backends.py",
            "tests/models/test_calibration*.py",
            "tests/models/test_install*.py",
            "tests/models/test_receipt.py",
            "tests/models/test_compress.py",
        ),
    ),
    "pruning": Group(
        (
            "qapbench/prune/*.py",
            "qapbench/methods/*pruner.py",
            "qapbench/methods/scores.py",
            "qapbench/methods/tokens.py",
        ),
        (
            "tests/contract/test_pruner*.py",
            "tests/contract/test_item*.py",
            "tests/strategies/test_fusions.py",
            "tests/models/test_compress.py",
            "tests/models/test_decoder.py",
            "tests/models/test_families.py",
        ),
    ),
    "store": Group(
        ("qapbench/records/*.py",),
        ("tests/records/test_*.py", "tests/running/test_damaged*.py", "tests/running/test_engine.py"),
        without=STATISTICS,
    ),
    "statistics": Group(
        STATISTICS,
        ("tests/analysis/test_*.py", "tests/tasks/test_score.py", "tests/leaderboard/test_leaderboard_r*.py"),
    ),
}
HOOK = '''
"""Takes the package from the copy, whatever is installed."""
import sys
from importlib.util import spec_from_file_location

PLACES = {places!r}


class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in PLACES:
            return None
        place = PLACES[name]
        return spec_from_file_location(name, place + "/__init__.py", submodule_search_locations=[place])


sys.meta_path.insert(0, Copy)
'''


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: the mutant.
        status: "killed", "survived", "equivalent" (for a written reason), or "too slow" (killed by its time limit).
        by: the test that noticed it, or the reason why it is equivalent.
        seconds: time that its tests took.
        diff: the lines that differ.
    """

    mutant: Mutant
    status: str
    by: str
    seconds: float
    diff: list[str]


def drawn(root: Path, seed: int) -> Iterator[Mutant]:
    """The mutants of all groups in the order in which they are drawn: one of each group in turn.

    Args:
        root: the tree.
        seed: seed of the draw.
    """
    piles = []
    for name, group in GROUPS.items():
        files = sorted({file for pattern in group.modules for file in root.glob(pattern)})
        names = [file.relative_to(root).as_posix() for file in files]
        pile = [
            one
            for name in names
            if name not in group.without
            for one in mutants((root / name).read_text(encoding="utf-8"), name)
        ]
        random.Random(f"{seed} {name}").shuffle(pile)
        piles.append(pile)
    turns = (one for turn in itertools.zip_longest(*piles) for one in turn if one is not None)
    yield from (one for one in turns if one.compiles((root / one.file).read_text(encoding="utf-8")))


def group_of(file: str, root: Path) -> Group:
    """The group that a module belongs to."""
    for group in GROUPS.values():
        if file not in group.without and any(root / file in root.glob(pattern) for pattern in group.modules):
            return group
    raise ValueError(f"{file} belongs to no group")


def tests_of(file: str, root: Path) -> tuple[list[str], list[str]]:
    """The test files that concern a module: those close to it, and the others of its group.

    Close are those that import the module, name it, or name a public class or function that it defines.

    Args:
        file: the module, relative to the tree.
        root: the tree.
    """
    path = root / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    words = {path.stem, *(name for name in named if not name.startswith("_"))} - {"__init__"}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(words))) + r")\b") if words else None
    every = sorted((root / "tests").glob("*/test_*.py"))
    group = {test for one in group_of(file, root).tests for test in root.glob(one)}
    text = {test: test.read_text(encoding="utf-8") for test in every}
    close = [test for test in every if test in group and pattern and pattern.search(text[test])]
    module = ".".join(Path(file).with_suffix("").parts)
    close += [test for test in every if test not in group and re.search(rf"\b{re.escape(module)}\b", text[test])]
    rest = [test for test in sorted(group) if test not in close]

    def paths(files: list[Path]) -> list[str]:
        order = sorted(files, key=lambda test: (_speed(test.parent.name), test))
        return [test.relative_to(root).as_posix() for test in order]

    return paths(close), paths(rest)


def _speed(folder: str) -> int:
    return QUICK_FIRST.index(folder) if folder in QUICK_FIRST else len(QUICK_FIRST)


class Copy:
    """A copy of the working tree, in which tests run on the copy's own package.

    Args:
        folder: where to put it.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
        places = {name: str(self.root / place) for name, place in packages["package-dir"].items()}
        hook = folder / "hook"
        hook.mkdir(parents=True, exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK.format(places=places), encoding="utf-8")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(hook),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and the second of its original
            "OMP_NUM_THREADS": "1",
        }

    def test(self, files: Sequence[str], limit: float) -> str | None:
        """Run test files up to the first failure: None if all pass, else the first that failed.

        Args:
            files: test files, relative to the tree.
            limit: seconds until they count as failed.
        """
        if not files:
            return None
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *files]
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return TOO_SLOW
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, flags=re.MULTILINE)
        return None if process.returncode == 0 else next(iter(failed), f"exit {process.returncode}: {said[-300:]}")


class Campaign:
    """Tries mutants on copies of the tree.

    Args:
        copies: the copies, each used for one mutant at a time.
        reasons: reasons why mutants are equivalent, see `read_reasons`.
        limit: seconds that the close tests of a mutant, and then the others, may take.
    """

    def __init__(self, copies: Iterable[Copy], reasons: Mapping[tuple[str, ...], str], limit: float) -> None:
        self.copies: Queue[Copy] = Queue()
        for copy in copies:
            self.copies.put(copy)
        self.reasons = reasons
        self.limit = limit
        self.sound: dict[str, bool] = {}

    def passes(self, copy: Copy, test: str) -> bool:
        """Whether a test passes without any mutant. Each is tried once."""
        if test not in self.sound:
            self.sound[test] = copy.test([test], self.limit) is None
        return self.sound[test]

    def outcome(self, mutant: Mutant) -> Outcome:
        """Try a mutant: its close tests, then the others. One that is equivalent for a written reason is not tried.

        Raises:
            RuntimeError: the test that fails also fails without the mutant.
        """
        copy = self.copies.get()
        target = copy.root / mutant.file
        begun = time.monotonic()
        source = target.read_text(encoding="utf-8")
        diff = mutant.diff(source)
        if reason := self.reasons.get((mutant.file, *(line[:1] + line[1:].strip() for line in diff))):
            self.copies.put(copy)
            return Outcome(mutant, "equivalent", reason, 0.0, diff)
        try:
            target.write_text(mutant.applied(source), encoding="utf-8")
            failed = None
            for files in tests_of(mutant.file, copy.root):
                failed = failed or copy.test(files, self.limit)
            seconds = time.monotonic() - begun
            target.write_text(source, encoding="utf-8")
            if failed and "::" in failed and not self.passes(copy, failed):
                raise RuntimeError(f"{failed} fails without any mutant")
        finally:
            target.write_text(source, encoding="utf-8")
            self.copies.put(copy)
        if failed:
            return Outcome(mutant, "too slow" if failed == TOO_SLOW else "killed", failed, seconds, diff)
        return Outcome(mutant, "survived", "", seconds, diff)


def read_reasons(file: Path) -> dict[tuple[str, ...], str]:
    """Reasons why mutants are equivalent: (file of the module, the lines of its diff) -> reason."""
    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8")) or [] if file.exists() else []
    return {(one["file"], f"-{one['original']}", f"+{one['mutant']}"): one["reason"] for one in entries}


def as_json(mutant: Mutant) -> Any:
    """A mutant as its line in the file of results has it."""
    return json.loads(json.dumps(dataclasses.asdict(mutant)))


def read_tried(results: Path | None) -> list[Any]:
    """The mutants that a file of results has, as plain data."""
    if results is None or not results.exists():
        return []
    return [json.loads(line)["mutant"] for line in results.read_text(encoding="utf-8").splitlines()]


def main(
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
    count: Annotated[int, typer.Option(min=1, help="number of mutants")] = 100,
    start: Annotated[int, typer.Option(min=0, help="number of drawn mutants to pass over")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="mutants that are tried at the same time")] = 1,
    limit: Annotated[float, typer.Option(min=1, help="seconds for the tests of a mutant")] = 900,
    results: Annotated[Path | None, typer.Option(help="file that gets one line of JSON per mutant")] = None,
    only: Annotated[str, typer.Option(help="part of the path of the modules to try")] = "",
    listed: Annotated[bool, typer.Option("--list", help="show the mutants and their tests, and run nothing")] = False,
) -> None:
    """Make one-line mistakes and run the tests that should notice them."""
    chosen = list(itertools.islice((one for one in drawn(ROOT, seed) if only in one.file), start, start + count))
    tried = read_tried(results)
    chosen = [one for one in chosen if as_json(one) not in tried]
    if listed:
        for one in chosen:
            _show(one, one.diff((ROOT / one.file).read_text(encoding="utf-8")), "; ".join(tests_of(one.file, ROOT)[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(index) for index in range(workers)]
        campaign = Campaign([Copy(place) for place in places], read_reasons(REASONS), limit)
        done = []
        with ThreadPoolExecutor(workers) as pool:
            for index, outcome in enumerate(pool.map(campaign.outcome, chosen), start + len(tried)):
                done.append(outcome)
                _show(outcome.mutant, outcome.diff, f"{index}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.by}")
                if results:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"index": index, **dataclasses.asdict(outcome)}) + "\n")
    counts = {status: sum(one.status == status for one in done) for status in dict.fromkeys(one.status for one in done)}
    out.print(f"{len(done)} mutants: " + ", ".join(f"{number} {status}" for status, number in counts.items()))
    raise typer.Exit(code=1 if counts.get("survived") else 0)


def _show(mutant: Mutant, diff: list[str], said: str) -> None:
    out.print(f"{mutant.file}:{mutant.line} {mutant.kind}: {said}", markup=False)
    out.print("\n".join(f"    {line}" for line in diff), markup=False)


if __name__ == "__main__":
    typer.run(main)
