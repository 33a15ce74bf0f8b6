"""Where lmms-eval's tasks find their data: a local folder in place of the hub, for everything that a task loads."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError, first_line
from qapbench.hashing import digest_files, digest_json

DATA = ("task", "data")
LOCAL = ("parquet", "json", "csv", "text", "arrow", "imagefolder")  # builders of datasets, which are no hub ids
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-\w+)?$")


@dataclass
class DataSource:
    """Serves what a task loads by `datasets.load_dataset` from local folders, and keeps a hash of it.

    Attributes:
        given: a folder or a parquet file for everything, or hub id -> folder or file; None asks the hub.
        splits: the splits that the task reads.
        loaded: for everything that was loaded: its hub id, its configuration, and a hash of its content.
    """

    given: str | dict[str, str] | None
    splits: Sequence[str]
    loaded: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that was loaded. It does not depend on where a local folder lies."""
        return digest_json(sorted(self.loaded), 64)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """While the context is open, whatever calls `load_dataset` gets its data from here, and `map` runs in-process.

        Raises:
            UserError: data are missing.
        """
        import datasets.arrow_dataset
        import datasets.load

        # Every binding of `load_dataset`, also one that a module imported by name, looks this function up when called.
        build = datasets.load.load_dataset_builder
        own_map = datasets.arrow_dataset.Dataset.map

        def found(path: str, name: str | None = None, **options: Any) -> Any:
            return self._built(build, path, name, options)

        def mapped(dataset: Any, *args: Any, num_proc: int | None = None, **options: Any) -> Any:
            return own_map(dataset, *args, **options)

        datasets.load.load_dataset_builder = found
        datasets.arrow_dataset.Dataset.map = mapped
        try:
            yield
        finally:
            datasets.load.load_dataset_builder = build
            datasets.arrow_dataset.Dataset.map = own_map

    def _built(self, build: Any, path: str, name: str | None, options: dict[str, Any]) -> Any:
        """`load_dataset_builder` of what is found in place of a hub id."""
        if path in LOCAL or self.given is None:
            builder = build(path, name, **options)
            known = path if path not in LOCAL else ""
            content = _digest(builder) if path in LOCAL or Path(path).exists() else str(builder.hash)
            self.loaded.append((known, name or "", content))
            return builder
        place = self._place(path)
        hub = ("revision", "token", "data_dir", "data_files")  # they say where on the hub
        options = {key: value for key, value in options.items() if key not in hub}
        if place.is_dir() and _has_configurations(place):
            builder = build(str(place), name, **options)
        else:
            builder = build("parquet", data_files=self._files(place, path, name), **options)
        self.loaded.append((path, name or "", _digest(builder)))
        return builder

    def _place(self, path: str) -> Path:
        """The folder or file that stands for a hub id.

        Raises:
            UserError: there is none.
        """
        if isinstance(self.given, dict):
            if path not in self.given:
                raise _missing(path, f"task.data says nothing of it, only of {', '.join(sorted(self.given))}")
            place = Path(self.given[path]).expanduser()
            if not place.exists():
                raise _missing(path, f"{place} does not exist", place)
            return place
        root = Path(str(self.given)).expanduser()
        if not root.exists():
            raise _missing(path, f"{root} does not exist", root / path.rpartition("/")[2])
        return next((place for place in (root / path, root / path.rpartition("/")[2]) if place.is_dir()), root)

    def _files(self, place: Path, path: str, name: str | None) -> dict[str, list[str]]:
        """The parquet files of each split.

        Raises:
            UserError: there are none.
        """
        if place.is_file():
            return {split: [str(place)] for split in self.splits}
        own = place / name if name and (place / name).is_dir() else place
        files = sorted(own.rglob("*.parquet"))
        found: dict[str, list[str]] = {}
        for file in files:
            shard = _SHARD.match(file.stem)
            found.setdefault(shard[1] if shard else file.stem, []).append(str(file))
        if not set(found) & set(self.splits):
            what = f"of the splits {', '.join(sorted(found))}" if found else "at all"
            why = f"{own} has no parquet file of the split {' or '.join(self.splits)}, only {what}"
            raise _missing(path, why if found else f"{own} has no parquet file", place)
        return found


def hub_error(path: str, error: BaseException) -> UserError:
    """The error for data that the hub did not give.

    Args:
        path: the hub id.
        error: what datasets said.
    """
    return _missing(path, f"the hub did not give it ({type(error).__name__}: {first_line(error)})")


def _missing(path: str, why: str, place: Path | None = None) -> UserError:
    folder = place or Path("data") / path.rpartition("/")[2]
    message = (
        f"the data set {path} is missing: {why}; where there is a network, "
        f"`hf download {path} --repo-type dataset --local-dir {folder}` fetches it"
    )
    return UserError(Problem(message + ("" if place else f", and `data: {{{path}: {folder}}}` names it"), DATA))


def _has_configurations(folder: Path) -> bool:
    """Whether a folder is a copy of a hub repository whose README says which files are which configuration."""
    readme = folder / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")[:100_000]


def _digest(builder: Any) -> str:
    """Hash of the files that a builder reads, by split, wherever they lie."""
    files = getattr(builder.config, "data_files", None) or {}
    named = {
        f"{split} {index:05}": Path(file)
        for split, names in files.items()
        for index, file in enumerate(sorted(map(str, names)))
        if Path(file).is_file()
    }
    return digest_files(named)
