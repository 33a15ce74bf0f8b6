"""Pages of the notebooks: their text and their code. Outputs are for whoever runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .markdown import code, page

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def pages() -> dict[str, str]:
    """Source of each page, by its path."""
    return {f"notebooks/{file.stem}.md": _page(file) for file in sorted(FOLDER.glob("*.ipynb"))}


def _page(file: Path) -> str:
    cells = [_cell(cell) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    return page(cells[0], f"The notebook itself: [{file.name}]({file.name}).", *cells[1:])


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return code(text, "python") if cell["cell_type"] == "code" else text
