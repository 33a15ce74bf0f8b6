"""What mkdocs calls while it builds the site: generated pages, links that leave docs/, and the last checks."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from website import api, board, commands, gallery, notebooks, shipped, spec_fields, strategies

ROOT = Path(__file__).parents[1]
COPIED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "SECURITY.md": "security.md",
    "leaderboard/results/README.md": "records-by-pull-request.md",
    "qapbench/models/embedded/diagram-llava/README.md": "cards/diagram-llava.md",
    "qapbench/models/embedded/diagram-llava-outliers/README.md": "cards/diagram-llava-outliers.md",
    "training/README.md": "cards/training.md",
    "training/smol/README.md": "cards/smol-llava.md",
}
"""Files outside of docs/ that are pages of the site, and where they stand there."""
ELSEWHERE = {
    "specs/outliers.yaml": "specs.md#outliers",
    "specs/budgets.yaml": "specs.md#budgets",
    "LICENSE": "licence.md",
    "NOTICE": "licence.md",
}
"""Files that are shown on a page of another name."""
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
)


def on_config(config: Any) -> Any:
    """Refuse public names without a docstring, and put the strategies' pages into the navigation."""
    if lacking := api.undocumented():
        raise PluginError(f"these public names have no docstring: {', '.join(lacking)}")
    _fill(config.nav)
    return config


def _fill(entries: list[Any]) -> None:
    for entry in entries:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if title == "Strategies":
                entry[title] = [*below, *strategies.nav()]
            elif isinstance(below, list):
                _fill(below)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of the code, those that stand at the top of the repository, and the board."""
    made: dict[str, str] = {}
    # Shipped specs come last, because they load plugins, whose strategies are no part of the package.
    for source in (api, board, commands, gallery, notebooks, spec_fields, strategies, shipped):
        made |= source.pages()
    for name, uri in COPIED.items():
        made[uri] = (ROOT / name).read_text(encoding="utf-8")
    licence, notice = ((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "NOTICE"))
    made["licence.md"] = f"# Licence\n\n```text\n{licence}\n```\n\n## Notice\n\n```text\n{notice}\n```\n"
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to files of the repository lead to their pages."""
    uri = page.file.src_uri
    origin = next((name for name, copied in COPIED.items() if copied == uri), f"docs/{uri}")
    return LINK.sub(lambda found: _moved(found[1], found[2] or "", origin, uri), markdown)


def _moved(target: str, anchor: str, origin: str, uri: str) -> str:
    """A link as it stands on the page.

    Args:
        target: the link, relative to `origin`.
        anchor: its anchor, or "".
        origin: path of the file in the repository that the link stands in.
        uri: path of its page.
    """
    named = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    if named in ELSEWHERE:
        there = ELSEWHERE[named]
    elif named in COPIED:
        there = COPIED[named]
    elif named.startswith("docs/"):
        there = named.removeprefix("docs/")
    else:
        return target + anchor  # mkdocs warns of it
    return posixpath.relpath(there, posixpath.dirname(uri) or ".") + anchor


def on_post_build(config: Any) -> None:
    """Refuse pages that would fetch something from another host."""
    for file in Path(config.site_dir).rglob("*.html"):
        if found := FETCHED.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{os.path.relpath(file, config.site_dir)} fetches from another host: {found[0]}")
