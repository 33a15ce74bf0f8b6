"""What the site is made of: public names with docstrings, pages and pictures of every strategy, the kept board."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qapbench.methods.kinds import KINDS
from qapbench.models.family import families
from website import api, board, commands, facts, gallery, spec_fields, strategies

ROOT = Path(__file__).parents[2]
MOST = 500_000  # bytes of the gallery


def test_every_public_name_has_a_docstring() -> None:
    assert api.undocumented() == []


def test_a_name_without_a_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api._target("compress"), "docstring", None)
    monkeypatch.setattr(api._target("Pruner").members["choose"], "docstring", None)
    assert api.undocumented() == ["Pruner.choose", "compress"]


def test_links_out_of_docs_lead_to_their_pages_and_nothing_is_fetched() -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    from website import hooks

    assert hooks._moved("../specs/outliers.yaml", "", "docs/study.md", "study.md") == "specs.md#outliers"
    assert hooks._moved("docs/models.md", "#positions", "CONTRIBUTING.md", "contributing.md") == "models.md#positions"
    assert hooks._moved("../../README.md", "", "docs/tutorials/x.md", "tutorials/x.md") == "../../README.md"
    for fetched in (
        '<script src="https://host/a.js">',
        "<link rel=x href=//host/a.css>",
        '<img alt="" src="http://h/a">',
    ):
        assert hooks.FETCHED.search(fetched)
    assert not hooks.FETCHED.search('<a href="https://host">a link</a><img src="images/a.png">')


def test_every_public_name_is_on_a_page() -> None:
    from qapbench import HOMES

    shown = {line.removeprefix("::: ") for text in api.pages().values() for line in text.splitlines()}
    assert [name for name in HOMES if not any(path.endswith(f".{name}") for path in shown)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_has_a_page_with_its_source(kind: str) -> None:
    made = strategies.pages()
    for name in KINDS[kind].names():
        text = made[f"reference/strategies/{kind}/{name}.md"]
        assert text.startswith(f"# {name}\n")
        assert all(f"`{key}`" in text for key in KINDS[kind].entry(name).params.model_fields)
        assert "## Where it acts" in text and "## Code" in text


def test_the_facts_are_of_what_is_registered() -> None:
    found = facts.facts()
    assert set(found["cost"]) - {""} == set(found["pruner"]) == set(KINDS["pruner"].names())
    assert set(found["ptq"]) == set(KINDS["ptq"].names())
    for outcomes in found["pruner"].values():
        assert set(outcomes) == set(families.names())
    said = [outcome for kind in ("pruner", "ptq") for one in found[kind].values() for outcome in one.values()]
    assert not [outcome for outcome in said if outcome.startswith("failed")]


def test_the_gallery_has_a_strip_of_every_pruner_and_is_small() -> None:
    files = {file.stem: file for file in gallery.FOLDER.glob("*.webp")}
    assert set(files) == set(KINDS["pruner"].names())
    assert sum(file.stat().st_size for file in files.values()) < MOST


@pytest.mark.usefixtures("one_thread")
def test_strips_show_what_is_kept_now() -> None:
    for name, made in gallery.make(["divprune", "fastv"]).items():
        with Image.open(gallery.FOLDER / f"{name}.webp") as kept:
            difference = np.asarray(kept.convert("RGB"), float) - np.asarray(made, float)
        assert abs(difference).mean() < 8, name  # of 255; another choice of tokens moves it by more than 20


def test_the_page_of_fields_has_every_field_with_type_and_meaning() -> None:
    (text,) = spec_fields.pages().values()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if not all(cell.strip() for cell in row.strip("|").split(" | "))] == []


def test_the_page_of_commands_has_every_command() -> None:
    (text,) = commands.pages().values()
    assert [name for name, _ in commands.commands() if f"\n## {name} {{" not in text] == []


def test_the_readme_has_the_numbers_of_the_kept_board() -> None:
    """The table of the quickstart, row by row."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in readme.partition("<!-- quickstart -->")[2].splitlines() if "|" in line
    ]
    heads, shown = rows[0], {row[0]: row for row in rows}
    records = board.records()
    assert len(records) == 6
    for record in records:
        row = dict(zip(heads, shown[record.name], strict=True))
        for column in record.scores.columns:
            if column.name in row:
                assert row[column.name] == f"{100 * (column.accuracy or 0):.2f}", (record.name, column.name)


def test_notebooks_hold_no_outputs() -> None:
    notebooks = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 4
    for file in notebooks:
        cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert cells
        assert [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"]] == []


def test_every_page_of_the_docs_is_in_the_menu() -> None:
    """The build refuses others too, and takes longer to say so."""
    root = Path(__file__).parents[2]
    menu = (root / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(root / "docs").as_posix() for page in (root / "docs").rglob("*.md")]
    assert [page for page in pages if page not in menu] == []
