"""Locating checkpoints by embedded name, folder or hub id."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from qapbench.errors import Problem, UserError, first_line, nearest
from qapbench.hashing import CHECKPOINT_FILES
from qapbench.spec.model_name import settings_of

from .json_files import check_settings

EMBEDDED = Path(__file__).parents[1] / "models" / "embedded"
HOW_TO_CONVERT = (
    'other formats are not loaded. Convert pytorch_model*.bin once, in its folder: python -c "import glob, torch; '
    "from safetensors.torch import save_file; [save_file({k: v.clone() for k, v in torch.load(f, weights_only=True)"
    ".items()}, f[:-3] + 'safetensors', {'format': 'pt'}) for f in glob.glob('pytorch_model*.bin')]\""
)


HASHES = "hashes.safetensors"
"""File in a folder that stands for a model which was loaded in Python: hashes in the place of its weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: the checkpoint folder.
        embedded: whether it is one of the small models that come with this package.
    """

    folder: Path
    embedded: bool = False

    @property
    def status(self) -> str:
        """What an embedded model can do, in one line from `status.txt` in its folder; "" if there is no such file."""
        file = self.folder / "status.txt"
        return file.read_text(encoding="utf-8").strip() if self.embedded and file.is_file() else ""


def embedded_names() -> list[str]:
    """Names of the models that come with the package.

    Each is a checkpoint folder or a recipe for one (`assembly.json`, `outliers.json`).
    """
    files = ("config.json", "assembly.json", "outliers.json")
    return sorted({path.parent.name for file in files for path in EMBEDDED.glob(f"*/{file}")})


def is_embedded(name: str) -> bool:
    """Whether a model of this name, which may have settings, comes with the package."""
    return settings_of(name)[0] in embedded_names()


def find_checkpoint(name: str, field: str = "model", fetch: bool = True) -> Checkpoint:
    """Locate a checkpoint: an embedded model, a checkpoint folder, or a hub id (from the local cache, else downloaded).

    Args:
        name: embedded name (with settings, if it has any), path of a folder, or hub id.
        field: field of the spec that holds the name, for messages.
        fetch: whether a hub id may be downloaded.

    Raises:
        UserError: there is no such checkpoint, it has no safetensors weights, a JSON file of it is broken, the hub
            cannot be reached, or an embedded model cannot be assembled because something is not installed.
    """
    if is_embedded(name):
        return Checkpoint(_embedded(name, field), embedded=True)
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise UserError(Problem(f"'{name}': there is no home folder of that user", (field,))) from None
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(
                Problem(f"no embedded model or folder '{name}'; {nearest(name, embedded_names())}", (field,))
            )
        folder = _from_hub(name, field, fetch)
    if not (folder / "config.json").is_file():
        raise UserError(Problem(f"{folder} is not a checkpoint folder (no config.json)", (field,)))
    if not list(folder.glob("*.safetensors")):
        raise UserError(Problem(f"'{name}' holds no .safetensors weights; {HOW_TO_CONVERT}", (field,)))
    check_settings(folder, field)
    return Checkpoint(folder)


def _embedded(name: str, field: str) -> Path:
    """Folder of an embedded model, which is made first if it is a recipe."""
    name, settings = settings_of(name)
    folder = EMBEDDED / name
    if (folder / "outliers.json").is_file():
        from .outlier_recipe import with_outliers

        return with_outliers(folder, settings, find_checkpoint, field)
    if settings:
        raise UserError(Problem(f"'{name}' has no settings, and so no '{next(iter(settings))}'", (field,)))
    if (folder / "config.json").is_file():
        return folder
    from .assembly import assemble

    return assemble(folder, field)


@functools.lru_cache(maxsize=64)
def _from_hub(name: str, field: str, fetch: bool) -> Path:
    """Folder of a hub id in the local cache, downloaded first if `fetch` allows it."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if fetch and not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, timeout=10)  # fails at once if the hub is unreachable, without many retries
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES), local_files_only=not fetch))
    except Exception as error:  # httpx, OSError and hub errors have no common base
        try:
            return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES), local_files_only=True))
        except Exception:
            what = "is not in the local cache" if not fetch else f"cannot be had from the hub ({first_line(error)})"
            raise UserError(Problem(f"'{name}' {what}", (field,))) from error
