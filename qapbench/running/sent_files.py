"""Files that workers on other machines lack: what they are, and how they get there, piece by piece.

A tree is the files that one name in a spec stands for. A machine that lacks it asks for the pieces of each file, and
keeps it in a folder of its own, under the hash of its content. Nothing here knows Ray.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from qapbench.checkpoints.find import find_checkpoint, is_embedded
from qapbench.errors import UserError
from qapbench.files import cache_folder, replace_written
from qapbench.hashing import digest_json, digest_tree, digest_unchanged, state_of_tree
from qapbench.spec.run_spec import RunSpec

PIECE = 8 << 20  # bytes that are on their way at once; a machine asks for the next piece while it writes one
FOLDER = "sent"  # name of the folder of trees in the cache
CODE = "*.py"  # of a checkpoint that brings its own; it is run only where the user trusts it

Ask = Callable[[str, int], Any]
"""Asks for a piece of a file (its name in the tree, where the piece begins), which is not waited for."""
Get = Callable[[Any], bytes]
"""Waits for a piece that was asked for."""


@dataclass(frozen=True)
class SentFile:
    """One file of a tree.

    Attributes:
        name: its name in the tree, with slashes.
        size: number of bytes.
        digest: SHA-256 of its content.
    """

    name: str
    size: int
    digest: str

    def intact(self, folder: Path) -> bool:
        """Whether the file is in a folder, with this content."""
        file = folder / self.name
        return file.is_file() and file.stat().st_size == self.size and digest_unchanged(file) == self.digest


@dataclass(frozen=True)
class Tree:
    """What one name in a spec stands for.

    Attributes:
        root: the folder on the machine that has it.
        files: its files.
        main: name of the file that the spec names; "" if it names the folder.
        checkpoint: hash of all that a checkpoint is loaded from; "" for data.
    """

    root: Path
    files: tuple[SentFile, ...]
    main: str = ""
    checkpoint: str = ""

    @property
    def digest(self) -> str:
        """Hash of the names and the contents of all files."""
        return digest_json([[file.name, file.digest] for file in self.files], 32)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(file.size for file in self.files)


# -- on the machine that has the files --


def trees_of(specs: Iterable[RunSpec]) -> dict[str, Tree]:
    """What runs read, by the names that stand in their specs: checkpoints, text towers, data and calibration data.

    What comes with the package is everywhere, and every machine finds data sets that are named by hub ids itself.

    Args:
        specs: the runs, one task each. What they name is there.
    """
    found: dict[str, Tree] = {}
    for spec in specs:
        for name in _checkpoints(spec):
            if name not in found and not is_embedded(name):
                found[name] = _checkpoint_tree(find_checkpoint(name).folder)
        for name in _data(spec):
            if name not in found and (path := Path(name).expanduser()).exists():
                found[name] = _data_tree(path.resolve())
    return found


def _checkpoints(spec: RunSpec) -> list[str]:
    return [name for name in (spec.model, spec.text_tower) if name is not None]


def _data(spec: RunSpec) -> list[str]:
    """The names of data in a spec, whether they are files, folders or hub ids."""
    given = spec.task.data
    named = list(given.values()) if isinstance(given, Mapping) else [given]
    wanted = spec.quantize.calibration if spec.quantize else None
    return [name for name in (*named, wanted.data if wanted else None) if name is not None]


def _checkpoint_tree(folder: Path) -> Tree:
    names = [name for name, _, _ in state_of_tree(folder)]
    code = [str(file.relative_to(folder)) for file in folder.rglob(CODE)]
    return _tree(folder, [*names, *code], checkpoint=digest_tree(folder))


def _data_tree(path: Path) -> Tree:
    """A folder with all its files, or a file with the pictures below its folder that it names."""
    if path.is_dir():
        return _tree(path, [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()])
    return _tree(path.parent, [path.name, *_pictures_beside(path)], main=path.name)


def _pictures_beside(data: Path) -> list[str]:
    """The picture files below the folder of a parquet file that its rows name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = pq.ParquetFile(data).read(columns=["image.path"]).column("image")
        named = {cell["path"] for cell in column.to_pylist() if cell and cell.get("path")}
    except (pa.ArrowInvalid, OSError, KeyError):  # no parquet file, or no pictures
        return []
    files = {name: (data.parent / name).resolve() for name in named if not Path(name).is_absolute()}
    inside = [file for file in files.values() if file.is_relative_to(data.parent) and file.is_file()]
    return [str(file.relative_to(data.parent)) for file in inside]


def _tree(root: Path, names: Sequence[str], main: str = "", checkpoint: str = "") -> Tree:
    files = [(name, root / name) for name in sorted(set(names))]
    sent = [SentFile(Path(name).as_posix(), file.stat().st_size, digest_unchanged(file)) for name, file in files]
    return Tree(root, tuple(sent), main, checkpoint)


class FileServer:
    """Reads pieces of the files of trees, and of no others.

    Args:
        trees: the trees.
    """

    def __init__(self, trees: Iterable[Tree]) -> None:
        self._files = {(tree.digest, file.name): tree.root / file.name for tree in trees for file in tree.files}

    def piece(self, tree: str, name: str, start: int) -> bytes:
        """A piece of a file, from some byte on; empty behind its end.

        Args:
            tree: hash of the tree.
            name: name of the file in it.
            start: the first byte.
        """
        with self._files[tree, name].open("rb") as handle:
            handle.seek(start)
            return handle.read(PIECE)


# -- on a machine that may lack them --


def lacks(name: str, tree: Tree) -> bool:
    """Whether a name in a spec stands for nothing on this machine, or for something else. Nothing is downloaded.

    Args:
        name: the name.
        tree: what it stands for where the spec is.
    """
    if tree.checkpoint:
        try:
            return digest_tree(find_checkpoint(name, fetch=False).folder) != tree.checkpoint
        except UserError:
            return True
    path = Path(name).expanduser()
    folder = path.parent if tree.main else path
    return not path.exists() or not all(file.intact(folder) for file in tree.files)


def received(tree: Tree, ask: Ask, get: Get, cache: Path | None = None) -> tuple[Path, int]:
    """Get a tree, as far as this machine does not have it from before.

    What was sent before is compared with its hashes. A transfer that was cut off goes on with the files that are
    missing. Two processes that want the same tree at once get it once.

    Args:
        tree: the tree.
        ask: asks for a piece of one of its files.
        get: waits for a piece.
        cache: the folder of trees; None takes that in the user's cache.

    Returns:
        What to write in a spec in the place of the name, and the number of bytes that were sent.

    Raises:
        UserError: there is no room, or a file arrived with another content.
    """
    cache = cache or cache_folder() / FOLDER
    whole, part = cache / tree.digest, cache / f"{tree.digest}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{tree.digest}.lock"):
            if whole.is_dir() and not all(file.intact(whole) for file in tree.files):
                shutil.rmtree(part, ignore_errors=True)
                whole.rename(part)
            missing = [] if whole.is_dir() else [file for file in tree.files if not file.intact(part)]
            _check_room(missing, cache)
            for file in missing:
                (part / file.name).parent.mkdir(parents=True, exist_ok=True)
                replace_written(part / file.name, functools.partial(_write, file=file, ask=ask, get=get))
            if not whole.is_dir():
                part.rename(whole)
    except OSError as error:
        raise UserError(f"{error.filename or cache}: {error.strerror or error}, while files were sent here") from None
    return whole / tree.main, sum(file.size for file in missing)


def _check_room(missing: Sequence[SentFile], cache: Path) -> None:
    """Check that files fit on the disk.

    Raises:
        UserError: they do not.
    """
    wanted, free = sum(file.size for file in missing), shutil.disk_usage(cache).free
    if wanted > free:
        raise UserError(f"{cache}: {wanted / 1e9:.1f} GB are to be sent here, and {free / 1e9:.1f} GB are free")


def _write(draft: Path, file: SentFile, ask: Ask, get: Get) -> None:
    """Write a file as its pieces arrive. The next one is under way while one is written.

    Raises:
        UserError: its content is not what was announced.
    """
    with draft.open("wb") as handle:
        waits_for = ask(file.name, 0)
        while data := get(waits_for):
            waits_for = ask(file.name, handle.tell() + len(data))
            handle.write(data)
    if draft.stat().st_size != file.size or digest_unchanged(draft) != file.digest:
        raise UserError(f"{file.name} arrived with another content than it had before: was it changed meanwhile?")


def with_places(spec: RunSpec, places: Mapping[str, str]) -> RunSpec:
    """A run that reads what was sent.

    Args:
        spec: the run.
        places: name in the spec -> where it is on this machine.
    """

    def place(name: Any) -> Any:
        return places.get(name, name) if isinstance(name, str) else name

    given = spec.task.data
    data = {key: place(name) for key, name in given.items()} if isinstance(given, Mapping) else place(given)
    update: dict[str, Any] = {
        "model": place(spec.model),
        "text_tower": place(spec.text_tower),
        "task": spec.task.model_copy(update={"data": data}),
    }
    if spec.quantize is not None and spec.quantize.calibration is not None:
        wanted = spec.quantize.calibration
        moved = wanted.model_copy(update={"data": place(wanted.data)})
        update["quantize"] = spec.quantize.model_copy(update={"calibration": moved})
    return spec.model_copy(update=update)
