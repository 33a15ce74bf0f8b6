"""Folders beside the package import only what is meant for them; `lint-imports` checks the rooms inside it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "strategies": ("qapbench", "qapbench.strategies"),
    "specs": ("qapbench",),
    "tasks": (
        "qapbench.errors",
        "qapbench.hashing",
        "qapbench.tasking.registry",
        "qapbench.tasking.images",
        "qapbench.tasking.text",
        "qapbench.tasks",
    ),
    "leaderboard": (
        "qapbench",
        "qapbench.analysis",
        "qapbench.checkpoints",
        "qapbench.files",
        "qapbench.receipt",
        "qapbench.records",
        "qapbench.spec",
        "qapbench.tasking",
        "qapbench.visible",
    ),
}


def imported_modules(file: Path) -> set[str]:
    """The modules of qapbench that a file's import statements name, relative imports aside."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "qapbench"}


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_what_is_mapped_into_the_package_imports_what_it_may(folder: str) -> None:
    allowed = ALLOWED[folder]
    for file in sorted((ROOT / folder).rglob("*.py")):
        for name in imported_modules(file):
            inside = any(name.startswith(f"{room}.") for room in allowed if room != "qapbench")
            assert name in allowed or inside, f"{file.relative_to(ROOT)} imports {name}"


def test_no_file_switches_the_formatter_off() -> None:
    own = [*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py"), *ROOT.glob("*/*/*/*.py")]
    marked = [file for file in own if ".venv" not in file.parts and "# fmt: " in file.read_text(encoding="utf-8")]
    assert [str(file.relative_to(ROOT)) for file in marked if file != Path(__file__)] == []


WRITES = {"write_text", "write_bytes", "save", "savefig", "save_file", "to_csv", "to_parquet"}
UNSHARED = {
    "qapbench/files.py": "which writes drafts",
    "qapbench/checkpoints/made.py": "into a new folder, which is put in its place when it is whole",
    "qapbench/checkpoints/outlier_recipe.py": "into the new folder that made.py gives it",
    "qapbench/memory.py": "into /proc, where Linux takes the order to set its mark back",
    "qapbench/analysis/pictures.py": "into memory",
    "qapbench/running/feature_cache.py": "into memory",
    "qapbench/running/saving.py": "into a new folder, which is put in its place when it is whole",
    "qapbench/running/sent_files.py": "into the draft that files.py gives it",
    "tasks/diagramqa/make_sprites.py": "for whoever changes the task",
    "tasks/diagramqa/generate.py": "for whoever changes the task",
}
"""Files that write by themselves, and why they may."""


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file by itself."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in WRITES:
        return True
    opens = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return opens == "open" and any(set(text) <= set("wxb+t") and set(text) & set("wx") for text in texts)


def test_files_are_written_whole_or_not_at_all() -> None:
    """Every file of a user's is written by `qapbench.files`, which replaces it whole."""
    own = [file for name in ("qapbench", "leaderboard", "strategies", "tasks") for file in (ROOT / name).rglob("*.py")]
    found = set()
    for file in own:
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if any(map(writes, calls)):
            found.add(file.relative_to(ROOT).as_posix())
    assert found == set(UNSHARED)
