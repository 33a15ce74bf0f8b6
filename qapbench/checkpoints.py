"""Checkpoints and their content: embedded names, folders, hub ids."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from .errors import Problem, UserError, first_line, nearest

EMBEDDED = Path(__file__).parent / "models" / "embedded"
HOW_TO_CONVERT = (
    'other formats are not loaded. Convert pytorch_model*.bin once, in its folder: python -c "import glob, torch; '
    "from safetensors.torch import save_file; [save_file({k: v.clone() for k, v in torch.load(f, weights_only=True)"
    ".items()}, f[:-3] + 'safetensors', {'format': 'pt'}) for f in glob.glob('pytorch_model*.bin')]\""
)
Report = Callable[[str, int, int], None]
"""Called with (model name, steps done, steps in all)."""
watcher: ContextVar[Report | None] = ContextVar("watcher", default=None)
"""Who is told while an embedded model is put together on first use; a command line sets its bar here."""
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies, and whether it is one of the project's own stand-ins."""

    folder: Path
    embedded: bool = False

    @property
    def status(self) -> str:
        """One line on what a stand-in can do, from the file `status.txt` in its folder; "" where there is none."""
        file = self.folder / "status.txt"
        return file.read_text(encoding="utf-8").strip() if self.embedded and file.is_file() else ""


def embedded_names() -> list[str]:
    """Models that come with the package: checkpoint folders, and recipes for one (`assembly.json`)."""
    return sorted(
        {path.parent.name for file in ("config.json", "assembly.json") for path in EMBEDDED.glob(f"*/{file}")}
    )


def is_embedded(name: str) -> bool:
    return name in embedded_names()


@functools.lru_cache(maxsize=64)
def find_checkpoint(name: str, field: str = "model", fetch: bool = True) -> Checkpoint:
    """An embedded name, a checkpoint folder, or a hub id (from the local cache, else fetched).

    Args:
        field: of the spec, for messages.
        fetch: whether a hub id may be downloaded.

    Raises:
        UserError: there is no such checkpoint, it holds no safetensors, the hub cannot be reached, or what an embedded
            model is put together from is not installed.
    """
    if is_embedded(name):
        folder = EMBEDDED / name
        if not (folder / "config.json").is_file():
            from .assembly import assemble

            folder = assemble(folder, field)
        return Checkpoint(folder, embedded=True)
    folder = Path(name).expanduser()
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
    return Checkpoint(folder)


def _from_hub(name: str, field: str, fetch: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if fetch and not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, timeout=10)  # an unreachable hub is told at once, not after many retries
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not fetch))
    except Exception as error:  # httpx, OSError and hub errors have no common base
        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
        except Exception:
            what = "is not in the local cache" if not fetch else f"cannot be had from the hub ({first_line(error)})"
            raise UserError(Problem(f"'{name}' {what}", (field,))) from error


@functools.lru_cache(maxsize=64)
def digest_tree(folder: Path) -> str:
    """SHA-256 of every file that a checkpoint is loaded from."""
    files = sorted({file for pattern in FILES for file in folder.rglob(pattern)})
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder)}\0{digest_file(file)}\0".encode())
    return total.hexdigest()


def digest_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
