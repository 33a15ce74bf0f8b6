"""Generation of DiagramQA scenes, of a whole split as a parquet file, or of a contact sheet.

The result of `sample(seed, index, split)` depends only on its arguments. The splits train, val and test share nothing,
because the checksum of an image, or of a text-only question, decides which split may contain it.

    python -m qapbench.tasks.diagramqa.generate --split test --seed 2026 --images 2400 --texts 1200 --out test.parquet
    python -m qapbench.tasks.diagramqa.generate --sheet sheet.png
"""

from __future__ import annotations

import argparse
import functools
import io
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .families import FAMILIES
from .scene import Question, Scene
from .sheet import contact_sheet

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SPLITS = {"train": 0, "val": 1, "test": 2, "heldout": 3}
BUCKETS = 8
"""Checksums are divided into this many buckets: 0 belongs to test and heldout, 1 to val, and the others to train."""
TEXT_TRIES = 200
"""Largest number of scenes that are tried until one may be in the split."""
PER_IMAGE = 2
"""Largest number of questions of one scene, and therefore about one image, in a frozen split."""
SHEET_SCENES = 2
"""Number of scenes of each family on a contact sheet."""
COLUMNS = ["pid", "image", "question", "choices", "answer", "hint", "subject", "grade", "topic", "family"]


def _owns(split: str, checksum: int) -> bool:
    """Tell whether `split` may contain what has this checksum."""
    bucket = checksum % BUCKETS
    if split == "train":
        return bucket >= 2
    return bucket == (1 if split == "val" else 0)


def _text_key(question: Question) -> int:
    """Checksum of a question's texts. Questions that differ only in the order of their choices have the same one."""
    return zlib.crc32("|".join([question.question, question.hint, *sorted(question.choices)]).encode())


@functools.cache
def _names(modality: str) -> tuple[str, ...]:
    return tuple(name for name, family in FAMILIES.items() if modality in ("", family.modality))


@functools.cache
def _cumulative(modality: str) -> np.ndarray:
    weights = np.array([FAMILIES[name].weight for name in _names(modality)])
    return np.cumsum(weights / weights.sum())


def image_families() -> list[str]:
    """Names of the families whose questions have an image."""
    return list(_names("image"))


def text_families() -> list[str]:
    """Names of the text-only families."""
    return list(_names("text"))


def sample(
    seed: int, index: int, split: str = "train", *, modality: str | None = None, family: str | None = None
) -> Scene:
    """Generate one scene. The same arguments always give the same scene.

    Args:
        seed: seed of the split.
        index: number of the scene within the split.
        split: "train", "val", "test" or "heldout".
        modality: "image" or "text"; None draws either with equal probability.
        family: name of the scene's family; None draws one of the modality, in proportion to the families' weights. If
            it is given, `modality` has no effect.

    Raises:
        ValueError: if the split, the modality or the family is unknown.
        RuntimeError: if no scene that may be in the split was found.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, not {split!r}")
    if modality not in (None, "image", "text"):
        raise ValueError(f"modality must be 'image' or 'text', not {modality!r}")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"no family called {family!r}; there are {sorted(FAMILIES)}")
    rng = np.random.default_rng([SPLITS[split], seed, index])
    if family is None:
        kind = modality or ("image" if rng.random() < 0.5 else "text")
        names = _names(kind)
        family = names[min(int(np.searchsorted(_cumulative(kind), rng.random(), "right")), len(names) - 1)]
    make = FAMILIES[family].make
    for _ in range(TEXT_TRIES):
        scene = make(rng, split)
        if scene.image is not None:
            if _owns(split, zlib.crc32(scene.image.tobytes())):
                return scene
            continue
        scene.questions = [q for q in scene.questions if _owns(split, _text_key(q))]
        if scene.questions:
            return scene
    raise RuntimeError(f"family {family!r} has too few different questions for split {split!r}")


def png_bytes(scene: Scene) -> bytes:
    """Encode the image of the scene as PNG, without loss.

    Raises:
        ValueError: if the scene has no image.
    """
    if scene.image is None:
        raise ValueError("this scene has no image")
    stream = io.BytesIO()
    scene.image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def build(split: str, seed: int, images: int, texts: int) -> pd.DataFrame:
    """Generate a table of questions of one split, with at most two questions per scene.

    Every family is spread evenly over the rows. Any first n rows therefore contain each family in proportion to its
    size, to within one question.

    Args:
        split: name of the split.
        seed: seed of the split.
        images: number of questions with an image.
        texts: number of text-only questions.

    Returns:
        One row per question, with the columns COLUMNS.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    index = 0
    left = {"image": images, "text": texts}
    while sum(left.values()):
        for modality in ("image", "text"):
            if not left[modality]:
                continue
            scene = sample(seed, index, split, modality=modality)
            encoded = None if scene.image is None else png_bytes(scene)
            image = None if encoded is None else {"bytes": encoded, "path": f"{split}-{seed}-{index}.png"}
            taken = 0
            for question in scene.questions:
                key = _text_key(question) if encoded is None else zlib.crc32(encoded, _text_key(question))
                if key in seen or taken == PER_IMAGE or not left[modality]:
                    continue
                seen.add(key)
                taken += 1
                left[modality] -= 1
                rows.append(_row(f"{split}-{seed}-{modality}-{index}-{taken}", question, image))
        index += 1
    return pd.DataFrame(_spread(rows), columns=COLUMNS)


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order the rows so that those of each family have even distances. Within a family, the order stays as it is."""
    sizes = Counter(row["family"] for row in rows)
    met: Counter[str] = Counter()
    places = []
    for row in rows:
        name = row["family"]
        places.append(((met[name] + 0.5) / sizes[name], name))
        met[name] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=places.__getitem__)]


def _row(pid: str, question: Question, image: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "pid": pid,
        "image": image,
        "question": question.question,
        "choices": question.choices,
        "answer": question.answer,
        "hint": question.hint,
        "subject": question.subject,
        "grade": question.grade,
        "topic": question.topic,
        "family": question.family,
    }


def schema() -> pa.Schema:
    """The parquet schema of a frozen split."""
    import pyarrow as pa

    text = pa.string()
    kinds = {
        "image": pa.struct([("bytes", pa.binary()), ("path", text)]),
        "choices": pa.list_(text),
        "answer": pa.int64(),
    }
    return pa.schema([(name, kinds.get(name, text)) for name in COLUMNS])


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a split as a parquet file. Its metadata contain the version of Pillow that drew the images."""
    import PIL
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = schema().with_metadata({"pillow": PIL.__version__})
    table = pa.Table.from_pylist(frame.to_dict("records"), schema=fields)
    # With 200 rows per group, the images fit into the dictionary page, so that equal images are stored only once.
    pq.write_table(table, path, compression="zstd", row_group_size=200, dictionary_pagesize_limit=4 << 20)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Generate DiagramQA.")
    parser.add_argument("--split", default="test", choices=list(SPLITS))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--images", type=int, default=2400, help="number of questions with an image")
    parser.add_argument("--texts", type=int, default=1200, help="number of questions without one")
    parser.add_argument("--out", type=Path, help="parquet file to write")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet of the image families instead")
    args = parser.parse_args(argv)
    if args.sheet is not None:
        names = [name for name in image_families() for _ in range(SHEET_SCENES)]
        scenes = [sample(args.seed, i % SHEET_SCENES, args.split, family=name) for i, name in enumerate(names)]
        contact_sheet(scenes).save(args.sheet, optimize=True)
    elif args.out is not None:
        write(build(args.split, args.seed, args.images, args.texts), args.out)
    else:
        parser.error("give --out or --sheet")


if __name__ == "__main__":
    main()
