"""Time that the leaderboard page takes to open in headless Chromium.

    PYTHONPATH=tests/leaderboard python -m benchmarks.leaderboard_page [--rows 200] [--loads 7] [--out page.html]

The page has 200 rows with stored answers, flipped questions and a study.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from leaderboard_runs import write_questions, write_runs, write_study
from playwright.sync_api import sync_playwright

from qapbench import metrics
from qapbench.leaderboard import build
from qapbench.records.load import load_records

PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
READY = "() => performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


def make_page(rows: int, out: Path) -> Path:
    """Build a page with many rows.

    Args:
        rows: number of rows: full precision, dense, semantic only, and combinations of budgets, weights and metrics.
        out: file to write.

    Returns:
        The same file.
    """
    grid = itertools.product(range(2, 15), ("0.5", "0.7", "0.9"), metrics.names())
    cells = (f"{metric}@{keep}@{weight}" for keep, weight, metric in grid)
    names = ["full", "dense", "semantic", *itertools.islice(cells, rows - 3)]
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        write_runs(runs, write_questions(Path(folder) / "test.parquet"), names)
        write_study(runs)
        started = time.perf_counter()
        build(load_records(runs), out, runs=runs)
        print(f"built in {time.perf_counter() - started:.1f} s, {out.stat().st_size / 2**20:.1f} MB, {len(names)} rows")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--loads", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("leaderboard.html"))
    asked = parser.parse_args()
    page = make_page(asked.rows, asked.out)
    found: dict[str, list[float]] = {"first paint": [], "table ready": [], "all drawn": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(asked.loads):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.resolve().as_uri())
            tab.wait_for_selector(":root:not([data-drawing])", state="attached", timeout=120_000)
            found["all drawn"].append(tab.evaluate("() => performance.now()"))
            found["first paint"].append(tab.evaluate(PAINT))
            found["table ready"].append(tab.evaluate(READY))
            tab.close()
        browser.close()
    for name, times in found.items():
        print(f"{name}: median {statistics.median(times):.0f} ms, best {min(times):.0f} ms of {asked.loads}")


if __name__ == "__main__":
    main()
