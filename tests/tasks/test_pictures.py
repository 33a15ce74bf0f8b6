"""Pictures as people save them: turned by EXIF, 16-bit, floating-point, transparent, damaged."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from question_files import picture, png, row
from transformers.image_utils import load_image

from qapbench import RunSpec, UserError
from qapbench.running.planner import Planner
from qapbench.tasking.images import as_rgb, decoded
from qapbench.tasks.multichoice import dataset

GREY = (np.arange(64 * 32, dtype=np.uint32) * 32).astype(np.uint16).reshape(32, 64)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def coloured() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))


Decode = Callable[[bytes], Image.Image]


@pytest.fixture(params=["file", "opened"])
def decode(request: pytest.FixtureRequest, tmp_path: Path) -> Decode:
    """Through a task of ours, and as lm-eval's tasks hand pictures over."""

    def of_file(data: bytes) -> Image.Image:
        path = tmp_path / "data.parquet"
        pd.DataFrame([row("1", image=picture(data))]).to_parquet(path)
        return decoded(dataset(str(path))["test"][0]["image"])

    return of_file if request.param == "file" else lambda data: decoded(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright(decode: Decode, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(coloured(), "JPEG", exif=exif, quality=95)
    found = decode(data)
    assert found.size == ((64, 32) if orientation < 5 else (32, 64))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(Image.open(io.BytesIO(data)))))


def test_16_bit_grey_is_scaled(decode: Decode) -> None:
    found = np.asarray(decode(file_of(Image.fromarray(GREY))))
    assert found.shape == (32, 64, 3)
    assert np.abs(found[..., 0] - GREY / 257).max() <= 0.5
    white = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert np.asarray(decode(file_of(white)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind, said", [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_numbers_without_a_white_are_refused(decode: Decode, kind: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"a {said} picture"):
        decode(file_of(Image.fromarray(GREY.astype(kind)), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "1", "CMYK", "RGB"])
def test_other_modes_are_what_transformers_makes_of_them(mode: str) -> None:
    image = coloured().convert(mode)
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(load_image(image)))


def test_every_unreadable_picture_is_named_at_once(tmp_path: Path) -> None:
    floats = file_of(Image.fromarray(GREY.astype(np.float32)), "TIFF")
    images = [png("red"), b"no picture", file_of(coloured())[:3000], floats]
    path = tmp_path / "data.parquet"
    pd.DataFrame([row(f"q{index}", image=picture(data)) for index, data in enumerate(images)]).to_parquet(path)
    spec = RunSpec.parse({"model": "given", "task": {"name": "scienceqa", "data": str(path)}})
    with pytest.raises(UserError) as caught:
        Planner(tmp_path, torch.device("cpu")).check_data([spec, spec])
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["q1", "q2", "q3"]
    assert "0x" not in str(caught.value)
    assert all(line.startswith("task.data: question") for line in lines)
