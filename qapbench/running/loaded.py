"""Runs on a model that is loaded already, as in a notebook."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qapbench.checkpoints.find import HASHES
from qapbench.errors import Problem, UserError
from qapbench.hashing import add_tensor, digest_tree
from qapbench.models import family_of
from qapbench.models.family import default_tower
from qapbench.models.relevance import find_tower
from qapbench.progress import ProgressCallback
from qapbench.spec.run_spec import RunSpec

from .fingerprints import needs_tower
from .session import Session
from .settings import Settings

FOLDER = "loaded"  # name of the folder of these models, beside those of the runs


@dataclass(frozen=True)
class Loaded:
    """A loaded model, as runs use it.

    Attributes:
        model: the model.
        processor: its processor.
        folder: a checkpoint folder that stands for it: its config, its processor, and the hashes of its weights.
    """

    model: Any
    processor: Any
    folder: Path

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.model.device

    def of(self, spec: RunSpec) -> RunSpec:
        """The run on this model, in the dtype that it has, with the text tower that the model came with.

        Raises:
            UserError: the spec asks for another dtype.
        """
        dtype = str(self.model.dtype).removeprefix("torch.")
        if spec.dtype not in ("auto", dtype):
            raise UserError(Problem(f"the model is loaded in {dtype}, the spec asks for {spec.dtype}", ("dtype",)))
        tower = spec.text_tower
        if tower is None and needs_tower(spec):
            config = self.model.config.to_dict()
            found, _ = find_tower(None, str(self.model.name_or_path), default_tower(config), True)
            tower = str(found) if found else None
        return spec.model_copy(update={"model": str(self.folder), "dtype": dtype, "text_tower": tower})

    def session(self, specs: Sequence[RunSpec], settings: Settings, progress: ProgressCallback) -> Session:
        """A session that holds the model.

        Args:
            specs: runs on it, as `of` gives them.
            settings: settings with its device.
            progress: called with (name, done, total).
        """
        made = Session(settings, progress)
        for spec in specs[:1]:
            made.adopt(spec, self.model, self.processor)
        return made


@contextmanager
def standing_for(model: Any, processor: Any, runs: Path) -> Iterator[Loaded]:
    """While the context is open, a folder stands for a loaded model, and the model is in eval mode.

    The folder holds the config, the processor and a hash of every weight, and is named by them: a run on the same
    weights is the same run, and a weight that was changed makes another one. The weights are hashed once, at about a
    second per gigabyte. The folder stays, since records name it as their model.

    Args:
        model: the model.
        processor: its processor.
        runs: folder of the results, below which it is made.

    Raises:
        UserError: no family is registered for the model, or there is no processor.
    """
    if processor is None:
        raise UserError("run(model=...) needs the model's processor too: run(..., processor=processor)")
    family_of(model).complete(processor)
    was_training = model.training
    try:
        model.eval()
        yield Loaded(model, processor, _folder(model, processor, runs / FOLDER))
    finally:
        model.train(was_training)


def _folder(model: Any, processor: Any, folders: Path) -> Path:
    """The folder that stands for a model; made whole or not at all."""
    folders.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folders, prefix=".") as draft:
        made = Path(draft) / "model"
        model.config.save_pretrained(made)
        processor.save_pretrained(made)
        save_file(_hashes(model), made / HASHES)
        name = Path(str(model.name_or_path)).name or type(model).__name__
        folder = folders / f"{name}-{digest_tree(made)[:8]}"
        if not folder.is_dir():
            made.rename(folder)
    return folder


def _hashes(model: Any) -> dict[str, torch.Tensor]:
    """The SHA-256 [32] of every weight and buffer of a model, by name."""
    hashes = {}
    for name, value in sorted(model.state_dict().items()):
        total = hashlib.sha256()
        add_tensor(total, value)
        hashes[name] = torch.tensor(list(total.digest()), dtype=torch.uint8)
    return hashes
