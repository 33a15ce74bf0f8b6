"""Pictures of extreme shapes on every family, with every pruner: an answer, or a refusal by the family's processor.

    python -m benchmarks.geometry [CHECKPOINT ...]

Without a checkpoint, random ones of a few thousand weights are made, one of every family. A picture that the processor
accepts has to be answered under every pruner, with and without a sensitivity and at the smallest budget. A pruner that
keeps every token has to give the logits of the model alone, to the bit. tests/contract/test_geometry.py tries a sample.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from qapbench import UserError, compress, pruners
from qapbench.models import family_of
from qapbench.models.loading import load_model
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.lm import AskingLM
from qapbench.tasking.questions import RefusedPictureError, processor_inputs

Shape = tuple[int, int]
SIZES: list[Shape] = [(1, 1), (1, 2), (3, 50), (50, 1), (1, 199), (1, 2000), (2000, 4)]  # width, height in pixels
UNFIT = "not for this model"
"""Outcome of a pruner that the model refuses by name, whatever the picture is."""
RIGHT = ("answered", "refused", UNFIT)
EVERYTHING = 1 << 20  # a budget that no image of a family with views of any size exceeds


class Case(NamedTuple):
    """One picture under one pruning.

    Attributes:
        size: width and height of the picture in pixels.
        pruner: name of the pruner.
        keep: its budget.
        sensitivity: name of the metric; None for none.
        everything: whether the budget is that of every token.
    """

    size: Shape
    pruner: str
    keep: int
    sensitivity: str | None
    everything: bool


def cases(model: Any) -> list[Case]:
    """Every size with every pruner, at one token and at all, with and without a metric."""
    budgets = ((1, False), (family_of(model).view_tokens or EVERYTHING, True))
    product = itertools.product(SIZES, pruners.names(), budgets, (None, "combined"))
    return [Case(size, pruner, keep, metric, whole) for size, pruner, (keep, whole), metric in product]


def loaded(folder: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, and its processor."""
    spec = RunSpec.parse({"model": str(folder), "task": "diagramqa"})
    return load_model(spec, torch.device("cpu"), False)


@functools.lru_cache(maxsize=1)  # the cases of a size stand together
def asked(model: Any, processor: Any, size: Shape) -> tuple[Any, torch.Tensor]:
    """A question on a picture of this size: the model's inputs, and what it answers alone, [1, V].

    Raises:
        RefusedPictureError: the processor refuses the picture.
    """
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    prompt = AskingLM(processor).apply_chat_template([{"role": "user", "content": "<image>\nWhat is this?"}])
    inputs = processor_inputs(processor, prompt, [Image.fromarray(pixels)])
    with torch.inference_mode():
        return inputs, model(**inputs).logits[:, -1]


def outcome(model: Any, processor: Any, case: Case) -> str:
    """What becomes of a case: "answered", "refused" by the processor, UNFIT, or what is wrong."""
    prune = {"method": case.pruner, "keep": case.keep, "sensitivity": case.sensitivity}
    try:
        inputs, dense = asked(model, processor, case.size)
        with torch.inference_mode(), compress(model, {"prune": prune}, processor):
            logits = model(**inputs).logits[:, -1]
    except RefusedPictureError:
        return "refused"
    except UserError as error:
        return UNFIT if str(error).startswith("prune.method: ") else f"refused by compress: {error}"
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    if not bool(logits.isfinite().all()):
        return "not finite"
    if case.everything and not torch.equal(logits, dense):
        return "not what the model answers alone"
    return "answered"


def _tiny(folder: Path) -> Iterator[Path]:
    """Random checkpoints of every family, from the makers that the tests use."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
    makers = importlib.import_module("family_checkpoints")
    importlib.import_module("llava_checkpoints").save_llava(folder / "llava")
    yield folder / "llava"
    for name in sorted(makers.PROCESSORS):
        yield makers.save_family(name, folder / name)


def main(checkpoints: Annotated[list[Path] | None, typer.Argument(help="Folders of checkpoints.")] = None) -> None:
    """Try every shape with every pruner, and print a table."""
    torch.set_num_threads(1)
    table = Table("model", "answered", "refused by the processor", UNFIT, "wrong")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in checkpoints or _tiny(Path(folder)):
            model, processor = loaded(path)
            counts: Counter[str] = Counter()
            for case in cases(model):
                what = outcome(model, processor, case)
                counts[what if what in RIGHT else "wrong"] += 1
                if what not in RIGHT:
                    wrong.append(f"{path.name} {case}: {what}")
            table.add_row(path.name, *(str(counts[name]) for name in (*RIGHT, "wrong")))
    console = Console()
    console.print(table)
    for line in wrong:
        console.print(line, markup=False)
    raise typer.Exit(int(bool(wrong)))


if __name__ == "__main__":
    typer.run(main)
