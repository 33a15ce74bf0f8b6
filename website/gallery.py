"""The gallery: what every pruner keeps of the same six pictures of the embedded task, one strip for each pruner.

    python -m website.gallery         writes docs/images/gallery/NAME.webp

The strips are made of the first test question of six families, by `qapbench.compress` on the embedded model in full
precision. Kept tokens are shown, dropped ones are veiled. A pruner inside the decoder shows what its last drop leaves.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from qapbench import compress, pruners
from qapbench.checkpoints.find import find_checkpoint

from .markdown import page

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images" / "gallery"
MODEL = "diagram-llava"
KEEP, PICTURES = 32, 6
SIDE, GAP = 144, 6  # pixels of a picture in a strip, and between two
VEIL = 0.8  # opacity of the cover over a dropped token, 0 to 1
INTRO = f"""\
What every pruner keeps of the same six pictures, {KEEP} of 144 tokens each: the first test question of six families of
[`diagramqa`](results.md#the-questions), asked of the embedded model in full precision. Dropped tokens are dark.

A pruner inside the decoder shows what its last drop leaves, so `vtw`, which leaves none in the end, is dark all over;
its budget counts the mean over layers. Tokens that a method makes from several have no place in the picture and are not
shown, so `avgpool` and `downsample`, which make all of theirs, are dark too.

`python -m website.gallery` makes the strips anew, and the name of a pruner leads to its page."""


def pages() -> dict[str, str]:
    """Source of the page, by its path."""
    asked = "\n".join(f"{place}. {row.question}" for place, row in enumerate(questions(), 1))
    strips = [strip(name, f"reference/strategies/pruner/{name}.md") for name in pruners.names()]
    return {"gallery.md": page("# Gallery of kept tokens", INTRO, "The questions, from left to right:", asked, *strips)}


def strip(name: str, link: str = "", up: str = "") -> str:
    """Markdown of a pruner's strip, under its name.

    Args:
        name: the pruner.
        link: page that the name leads to; without it only the picture is given.
        up: from the page to the folder docs.
    """
    picture = f"![Six pictures with the tokens that {name} keeps]({up}images/gallery/{name}.webp)"
    return f"[`{name}`]({link})\n\n{picture}" if link else picture


def questions() -> list[Any]:
    """The six questions, as rows of the frozen test split."""
    frame = pd.read_parquet(ROOT / "tasks" / "diagramqa" / "test.parquet")
    one_each = frame[frame.image.notna()].drop_duplicates("family").sort_values("family")
    return list(one_each.itertuples())[:: max(len(one_each) // PICTURES, 1)][:PICTURES]


def make(names: Iterable[str]) -> dict[str, Image.Image]:
    """The strip of each pruner."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = find_checkpoint(MODEL).folder
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    asked = [(row.question, Image.open(io.BytesIO(row.image["bytes"])).convert("RGB")) for row in questions()]
    made = {}
    for name in names:
        found: list[Any] = []
        spec = {"prune": {"method": name, "keep": KEEP}}
        with torch.inference_mode(), compress(model, spec, processor, on_images=found.extend):
            for question, picture in asked:
                content = [{"type": "image"}, {"type": "text", "text": question}]
                chat = [{"role": "user", "content": content}]
                text = processor.apply_chat_template(chat, add_generation_prompt=True)
                model(**processor(images=picture, text=text, return_tensors="pt"), relevance_text=[question])
        made[name] = _joined([_veiled(image, one) for (_, image), one in zip(asked, found, strict=True)])
    return made


def _veiled(picture: Image.Image, found: Any) -> Image.Image:
    """The picture with its dropped tokens covered."""
    high = round(found.available**0.5)
    veil = np.full((high, high), VEIL)
    veil.flat[found.indices.tolist()] = 0
    mask = Image.fromarray((veil * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    shown = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Image.composite(Image.new("RGB", shown.size, (14, 17, 22)), shown, mask)


def _joined(pictures: list[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (len(pictures) * (SIDE + GAP) - GAP, SIDE), (255, 255, 255))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (SIDE + GAP), 0))
    return strip


def main() -> None:
    """Write the strips of all pruners."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in make(pruners.names()).items():
        picture.save(FOLDER / f"{name}.webp", quality=60, method=6)


if __name__ == "__main__":
    main()
