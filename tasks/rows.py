"""Reading and checking the rows of a multiple-choice data set. Images stay on disk until they are needed."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.errors import Problem, UserError, first_line, nearest
from qapbench.hashing import digest_file

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from PIL import Image

    from qapbench.tasking.images import Decoded

WHERE = ("task", "data")
REQUIRED = ("image", "question", "choices", "answer", "hint", "subject", "grade")
KINDS = {
    "image": "a struct {bytes, path}, null where there is none",
    "question": "text",
    "choices": "a list of texts",
    "answer": "an integer, the index of the right choice",
    "hint": "text",
    "subject": "text",
    "grade": "text",
}
BATCH = 256  # rows of a parquet file that are in memory with their images
SHOWN = 5
"""Largest number of wrong rows that one message lists. Without it, a damaged column would give a line per question."""


class LazyImage:
    """A reference to one image, which stays encoded and on disk.

    It does not hold the image itself, so it is cheap to keep, copy and pickle. The bytes are read through the
    memory-mapped table each time they are asked for.

    Attributes:
        data: absolute path of the parquet file, or the id of a data set on the hub.
        stamp: modification time of the file in nanoseconds; 0 for the hub.
        row: index of the image's row.
    """

    __slots__ = ("_digest", "data", "row", "stamp")

    def __init__(self, data: str, stamp: int, row: int) -> None:
        self.data, self.stamp, self.row = data, stamp, row
        self._digest: str | None = None

    def encoded(self) -> bytes:
        """Read the bytes of the image file (PNG, JPEG or another format).

        Raises:
            UserError: if the data changed or are gone, or if the row names an image file that cannot be read, or that
                does not lie in the data's folder, links followed: data of others must not read files of the user.
        """
        cell = _pictures(self.data, self.stamp).cell(self.row)
        if cell["bytes"] is not None:
            return cell["bytes"]
        if not self.stamp:
            raise UserError(Problem(f"{self}: the row holds only the path of an image, and no image", WHERE))
        folder = Path(self.data).parent
        try:
            path = (folder / cell["path"]).resolve()
            if not path.is_relative_to(folder.resolve()):
                message = f"{self}: the path {cell['path']!a} leads out of the data's folder {folder}"
                raise UserError(Problem(message, WHERE))
            return path.read_bytes()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; no path at all
            if isinstance(error, UserError):
                raise
            why = getattr(error, "strerror", None) or first_line(error)
            raise UserError(Problem(f"{self}: cannot read {cell['path']!a}: {why}", WHERE)) from None

    def load(self) -> Image.Image:
        """Decode the image to RGB, upright; see `decode`."""
        return self.decode().picture

    def decode(self, background: str | None = None) -> Decoded:
        """Decode the image; see `qapbench.tasking.images.as_rgb`.

        Args:
            background: the colour that transparent pixels are put on, `#rrggbb`.

        Raises:
            UserError: if the bytes cannot be read, or are not an image.
        """
        from PIL import Image, UnidentifiedImageError

        from qapbench.tasking.images import UnreadablePictureError, as_rgb

        try:
            with Image.open(io.BytesIO(self.encoded())) as image:
                return as_rgb(image, background)
        except UnreadablePictureError as error:
            message = error.problems[0].message
        except UnidentifiedImageError:  # its message holds a memory address
            message = "not a readable picture (no known format)"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"not a readable picture ({first_line(error)})"
        raise UnreadablePictureError(Problem(f"{self}: {message}", WHERE))

    def digest(self) -> str:
        """SHA-256 of the encoded bytes, in hexadecimal. Equal files have equal digests."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.encoded()).hexdigest()
        return self._digest

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyImage, (self.data, self.stamp, self.row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyImage) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__()[1])

    # lm-eval hashes a document by its repr, so this must not contain a memory address.
    def __repr__(self) -> str:
        return f"LazyImage({Path(self.data).name}, row {self.row})"


def read(data: str) -> tuple[list[dict[str, Any]], str]:
    """Read and check all rows of a data set.

    Args:
        data: path of a parquet file, or the id `owner/name` of a data set on the hub, whose split `test` is read.

    Returns:
        The rows, and a fingerprint of the data. A row has the columns of the data, in which `image` is a
        `LazyImage` or None, `pid` is a string (the index of the row if the data give none), and a null `hint`,
        `subject` or `grade` is replaced by "". It also has `numbered`: whether `pid` is the index of the row. The
        fingerprint is the SHA-256 of the file or, for the hub, the fingerprint that `datasets` computes.

    Raises:
        UserError: if the data cannot be reached or read, a column is missing or has a wrong type, or a row is wrong.
    """
    data, path = _locate(data)
    stamp = path.stat().st_mtime_ns if path else 0
    if path:
        _check_columns(_parquet_schema(path), path.name)
        rows, has_image = _read_parquet(path)
        fingerprint = digest_file(path)
    else:
        table = _from_hub(data)
        has_image = _has_image(table.data.table.column("image"))
        rows, fingerprint = table.remove_columns("image").to_list(), str(table._fingerprint)
    for index, row in enumerate(rows):
        row["image"] = LazyImage(data, stamp, index) if has_image[index] else None
        row["numbered"] = row.get("pid") is None
        row["pid"] = str(index) if row["numbered"] else str(row["pid"])
        for name in ("hint", "subject", "grade"):
            row[name] = row[name] or ""
    _check_rows(rows, path.name if path else data)
    return rows, fingerprint


def _read_parquet(path: Path) -> tuple[list[dict[str, Any]], list[bool]]:
    """Read the rows of a parquet file without their images, and for each row whether it has one.

    pyarrow reads a file some rows at a time. `datasets`, which maps the images, takes a second to import and is only
    needed once an image is looked at.

    Raises:
        UserError: if the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    has_image: list[bool] = []
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH):
            table = pa.Table.from_batches([batch])
            has_image += _has_image(table.column("image"))
            rows += table.drop_columns("image").to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(Problem(f"{path}: cannot be read as parquet ({first_line(error)})", WHERE)) from None
    return rows, has_image


def _locate(data: str) -> tuple[str, Path | None]:
    """Tell a file from a data set on the hub.

    Returns:
        The absolute path as a string and as a `Path`, or the id of the data set and None.

    Raises:
        UserError: if `data` is a folder, or looks like the path of a file that does not exist.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return str(path.resolve()), path.resolve()
    if path.exists():
        raise UserError(Problem(f"{data}: a folder; name one parquet file", WHERE))
    local = path.suffix or path.is_absolute() or data.startswith(".") or data.count("/") != 1
    if local:
        raise UserError(Problem(f"{data}: no such file (a hub data set is written owner/name)", WHERE))
    return data, None


class _Pictures:
    """The image column of a data set: in memory if a file is small, else memory-mapped by `datasets`.

    A file is mapped anew after every REMAP bytes that were read, because pages that were read stay resident in memory
    as long as the mapping exists. `datasets` takes a second and 90 MB to import, more than a small file is worth.
    """

    REMAP = 32 << 20

    def __init__(self, data: str, stamp: int) -> None:
        self._source = (data, stamp)
        self._table: datasets.Dataset | None = None
        self._read = 0
        self._column = _small_column(data, stamp, self.REMAP) if stamp else None

    def cell(self, row: int) -> dict[str, Any]:
        if self._column is not None:
            cell: dict[str, Any] = self._column[row].as_py()
            return cell
        table = self._table
        if table is None:
            table = self._table = _open(*self._source).select_columns(["image"])
        cell = table[row]["image"]
        self._read += len(cell["bytes"] or b"")
        if self._read > self.REMAP and self._source[1]:
            self._table, self._read = None, 0
        return cell


_pictures = functools.lru_cache(maxsize=8)(_Pictures)


def _small_column(data: str, stamp: int, limit: int) -> pa.ChunkedArray | None:
    """The image column of a parquet file if it has at most so many bytes; None if it has more, or cannot be read.

    Args:
        data: absolute path of the file.
        stamp: modification time in nanoseconds that the file had when it was first read.
        limit: number of bytes of the whole file, which holds encoded images, so that it hardly shrinks them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        state = Path(data).stat()
        if state.st_mtime_ns == stamp and state.st_size <= limit:
            return pq.ParquetFile(data).read(columns=["image"]).column("image")
    except (pa.ArrowInvalid, OSError):
        return None  # what is wrong is said by `_open`
    return None


def _open(data: str, stamp: int) -> datasets.Dataset:
    """Open a data set as a memory-mapped table, with encoded images.

    Args:
        data: absolute path of a parquet file, or the id of a data set on the hub.
        stamp: modification time in nanoseconds that the file had when it was first read; 0 for the hub.

    Raises:
        UserError: if the data cannot be read, or the file was modified since.
    """
    import datasets

    if not stamp:
        return _from_hub(data)
    path = Path(data)
    if not path.is_file() or path.stat().st_mtime_ns != stamp:
        raise UserError(Problem(f"{data}: changed or went away while it was in use", WHERE))
    try:
        # datasets writes an uncompressed copy into its own cache (HF_DATASETS_CACHE) and maps that.
        table = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(Problem(f"{data}: cannot be read as parquet ({first_line(error)})", WHERE)) from None
    if isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    return table


def _from_hub(name: str) -> datasets.Dataset:
    import datasets
    import huggingface_hub

    way_out = f"give a local parquet file, e.g. task.data={name.split('/')[-1]}.parquet"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # Without this request, datasets would retry an unreachable hub for half a minute.
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        table = datasets.load_dataset(name, split="test")
    except Exception as error:  # errors of httpx, huggingface_hub, datasets and the OS have no common base class
        message = f"cannot load {name} from the hub ({first_line(error)}); {way_out}"
        raise UserError(Problem(message, WHERE)) from None
    _check_columns(table.data.table.schema, name)
    if isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    return table


def _parquet_schema(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        message = f"{path}: not a readable parquet file ({first_line(error)})"
        raise UserError(Problem(message, WHERE)) from None


def _check_columns(schema: pa.Schema, name: str) -> None:
    problems = []
    for column in REQUIRED:
        if column not in schema.names:
            hint = nearest(column, set(schema.names) - set(REQUIRED))
            message = f"{name}: column '{column}' is missing ({KINDS[column]})"
            problems.append(Problem(f"{message}; {hint}" if hint.startswith("did") else message, WHERE))
        elif not _fits(column, kind := schema.field(column).type):
            wrong = f"{name}: column '{column}' is {kind}, expected {KINDS[column]}"
            problems.append(Problem(wrong, WHERE))
    if problems:
        raise UserError(problems)


def _fits(column: str, kind: pa.DataType) -> bool:
    from pyarrow import types

    def text(kind: pa.DataType) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    if column == "image":
        names = {kind.field(i).name for i in range(kind.num_fields)} if types.is_struct(kind) else set()
        return types.is_null(kind) or names >= {"bytes", "path"}
    if column == "choices":
        return (types.is_list(kind) or types.is_large_list(kind)) and text(kind.value_type)
    if column == "answer":
        return types.is_integer(kind)
    return text(kind) or (column != "question" and types.is_null(kind))


def _has_image(column: pa.ChunkedArray) -> list[bool]:
    """Tell for each row whether it has an image. Only the validity bitmaps are read, not the images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return [False] * len(column)
    parts = [pc.is_valid(pc.struct_field(column, name)) for name in ("bytes", "path")]
    return pc.and_(pc.is_valid(column), pc.or_(*parts)).to_pylist()


def _check_rows(rows: list[dict[str, Any]], name: str) -> None:
    if not rows:
        raise UserError(Problem(f"{name}: no rows", WHERE))
    problems, total, seen = [], 0, dict[str, int]()
    for index, row in enumerate(rows):
        column, wrong = _mistake(row)
        if not column and row["pid"] in seen:
            column, wrong = "pid", f"'{row['pid']}' is also row {seen[row['pid']]}"
        seen.setdefault(row["pid"], index)
        if column:
            total += 1
            if total <= SHOWN:
                problems.append(Problem(f"{name}: column '{column}', row {index}: {wrong}", WHERE))
    if total > SHOWN:
        problems.append(Problem(f"{name}: and {total - SHOWN} more rows like these", WHERE))
    if problems:
        raise UserError(problems)


def _mistake(row: dict[str, Any]) -> tuple[str, str]:
    """Find the first mistake of a row: the column and what is wrong, or two empty strings if the row is valid."""
    choices, answer = row["choices"], row["answer"]
    if not row["question"]:
        return "question", "empty"
    if not choices:
        return "choices", "empty"
    if len(choices) > 26:
        return "choices", f"{len(choices)} choices, but there are 26 letters"
    if any(choice is None for choice in choices):
        return "choices", "holds a null"
    if answer is None or not 0 <= answer < len(choices):
        return "answer", f"{answer} is not an index of its {len(choices)} choices"
    return "", ""
