"""Drawing of twelve questions of the frozen test split, one per image family, and of the tokens that a run keeps.

    python -m training.kept --spec table2_w4a4 --out docs/images/kept.png

The run is the row `combined` of the spec.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image, ImageDraw

from qapbench.analysis.drawing import BAD, GAP, GOOD, INK, MARGIN, PANEL, PAPER, font_of, kept
from qapbench.analysis.explain import choose_run, explain
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.spec.spec_file import load_spec

COLUMNS, LINES, LINE = 4, 3, 20


def sheet(spec: str, split: Path) -> Image.Image:
    """Draw one panel per family: the image with the dropped tokens veiled, the question, and the answer.

    A right answer is green, a wrong one red.

    Args:
        spec: name or path of a spec with a row `combined`, which prunes with a sensitivity.
        split: parquet file with the questions.
    """
    session = Session(Settings(Path("runs"), torch.device("cpu")))
    run = choose_run(load_spec(spec), "combined")
    frame = pd.read_parquet(split)
    rows: Any = frame[frame.image.notna()].drop_duplicates("family").sort_values("family")
    height = PANEL + (LINES + 1) * LINE + GAP
    down = -(-len(rows) // COLUMNS)
    page = Image.new("RGB", (2 * MARGIN + COLUMNS * (PANEL + GAP) - GAP, 2 * MARGIN + down * height), PAPER)
    pen, font = ImageDraw.Draw(page), font_of(14)
    for index, row in enumerate(rows.itertuples()):
        shown = explain(run, str(row.pid), session)
        left, top = MARGIN + index % COLUMNS * (PANEL + GAP), MARGIN + index // COLUMNS * height
        picture = shown.image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)
        page.paste(kept(picture, shown.sides, len(shown.sides) - 1), (left, top))
        for line, text in enumerate(textwrap.wrap(f"{row.family}: {row.question}", 40)[:LINES]):
            pen.text((left, top + PANEL + 4 + line * LINE), text, INK, font)
        said, truth = (row.choices[ord(letter) - ord("A")] for letter in (shown.sides[-1].answer, shown.question.truth))
        right = said == truth
        said = said if right else f"{said} (truth: {truth})"
        pen.text((left, top + PANEL + 4 + LINES * LINE), f"answer: {said}", GOOD if right else BAD, font)
    return page


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="table2_w4a4")
    parser.add_argument("--split", type=Path, default=Path("tasks/diagramqa/test.parquet"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sheet(args.spec, args.split).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
