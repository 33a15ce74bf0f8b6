"""The page of the quickstart's runs, as a page of the site.

    python -m website.board RUNS          keeps the runs of a folder in website/quickstart.zip

The runs are kept and not made again, because they take minutes; the page is built of them by the code at hand.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from qapbench.leaderboard import build
from qapbench.records.load import load_records
from qapbench.records.record import Record

FILE = Path(__file__).parent / "quickstart.zip"
KEPT = ("record.json", "answers.jsonl", "scored.jsonl", "receipt.json", "spec.json")
STAMP = (2026, 1, 1, 0, 0, 0)  # of every file in the archive, so that equal runs give equal bytes


def pages() -> dict[str, str]:
    """The page by its path, with the same rows as CSV and JSON beside it."""
    with tempfile.TemporaryDirectory() as folder:
        runs = unpacked(Path(folder))
        page = build(load_records(runs), runs / "board.html", title="quickstart", runs=runs)
        files = [page.with_suffix(suffix) for suffix in (".html", ".csv", ".json")]
        return {file.name: file.read_text(encoding="utf-8") for file in files}


def records() -> list[Record]:
    """The records of the kept runs."""
    with tempfile.TemporaryDirectory() as folder:
        return load_records(unpacked(Path(folder)))


def unpacked(folder: Path) -> Path:
    """The folder, with the kept runs in it."""
    with zipfile.ZipFile(FILE) as archive:
        archive.extractall(folder)
    return folder


def keep(runs: Path) -> None:
    """Keep the runs of a folder."""
    with zipfile.ZipFile(FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for record in sorted(runs.glob("*/record.json")):
            for file in (record.with_name(name) for name in KEPT):
                archive.writestr(zipfile.ZipInfo(f"{record.parent.name}/{file.name}", STAMP), file.read_bytes(), 8, 9)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
