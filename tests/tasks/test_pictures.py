"""Pictures as people save them: turned by EXIF, 16-bit, floating-point, transparent, damaged."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from question_files import picture, png, row
from transformers.image_utils import load_image
from typer.testing import CliRunner

from qapbench import RunSpec, UserError
from qapbench.cli import app
from qapbench.hashing import digest_json
from qapbench.running.plan import group_key
from qapbench.running.planner import Planner
from qapbench.spec.spec_file import load_spec
from qapbench.tasking.images import OnBackground, as_rgb, decode, decoded, digest_image
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
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Decode:
    """Through a task of ours, and as lm-eval's tasks hand pictures over."""

    def of_file(data: bytes) -> Image.Image:
        path = tmp_path / "data.parquet"
        pd.DataFrame([row("1", image=picture(data))]).to_parquet(path)
        return decoded(dataset(str(path))["test"][0]["image"])

    return of_file if request.param == "file" else lambda data: decoded(Image.open(io.BytesIO(data)))


def test_a_small_file_is_read_without_what_imports_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`read_table` imports pyarrow's data sets and these pandas, which is 50 MB of a page's memory."""
    path = tmp_path / "data.parquet"
    pd.DataFrame([row("1", image=picture(file_of(coloured())))]).to_parquet(path)
    monkeypatch.setattr(pyarrow.parquet, "read_table", lambda *_, **__: pytest.fail("read_table"))
    found = decoded(dataset(str(path))["test"][0]["image"])
    assert np.array_equal(np.asarray(found), np.asarray(coloured()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright(read: Decode, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(coloured(), "JPEG", exif=exif, quality=95)
    found = read(data)
    assert found.size == ((64, 32) if orientation < 5 else (32, 64))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(Image.open(io.BytesIO(data)))))


def test_16_bit_grey_is_scaled(read: Decode) -> None:
    found = np.asarray(read(file_of(Image.fromarray(GREY))))
    assert found.shape == (32, 64, 3)
    assert np.abs(found[..., 0] - GREY / 257).max() <= 0.5
    white = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert np.asarray(read(file_of(white)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind, said", [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_numbers_without_a_white_are_refused(read: Decode, kind: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"a {said} picture"):
        read(file_of(Image.fromarray(GREY.astype(kind)), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "1", "CMYK", "RGB"])
def test_other_modes_are_what_transformers_makes_of_them(mode: str) -> None:
    image = coloured().convert(mode)
    assert np.array_equal(np.asarray(as_rgb(image).picture), np.asarray(load_image(image)))


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


INK = np.zeros((8, 8, 4), dtype=np.uint8)  # black ink, opaque on the left and half covering in one column
INK[:, :3, 3] = 255
INK[:, 3, 3] = 128


def clear(mode: str) -> bytes:
    """Black ink on a transparent black ground, in each way in which a file can say so."""
    if mode == "RGBA":
        return file_of(Image.fromarray(INK))
    if mode == "LA":
        return file_of(Image.fromarray(INK).convert("LA"))
    values = np.where(np.arange(64).reshape(8, 8) % 8 < 4, 9, 0)  # the level 0 is transparent
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8), "P")
        image.putpalette([0, 0, 0] * 256)
        return file_of(image, transparency=0)
    if mode == "I;16":
        return file_of(Image.fromarray((values * 257).astype(np.uint16)), transparency=0)
    if mode == "RGB":
        return file_of(Image.fromarray(values.astype(np.uint8)).convert("RGB"), transparency=(0, 0, 0))
    return file_of(Image.fromarray(values.astype(np.uint8)), transparency=0)


@pytest.fixture
def both(tmp_path: Path) -> Callable[[bytes], list[Any]]:
    """The handle of a task of ours, and a picture as lm-eval's tasks hand it over."""

    def of_file(data: bytes) -> list[Any]:
        path = tmp_path / "data.parquet"
        pd.DataFrame([row("1", image=picture(data))]).to_parquet(path)
        return [dataset(str(path))["test"][0]["image"], Image.open(io.BytesIO(data))]

    return of_file


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparent_pixels_are_seen_and_put_on_a_colour(mode: str, both: Callable[[bytes], list[Any]]) -> None:
    for image in both(clear(mode)):
        plain, transparent = decode(image)
        assert transparent
        assert np.asarray(plain).max() <= 9  # black on black, as LLaVA's code sees it
        placed, transparent = decode(OnBackground(image, "#ffa000"))
        assert transparent
        pixels = np.asarray(placed).astype(int)
        assert (pixels[:, 4:] == [255, 160, 0]).all()
        assert (pixels[:, :3] <= 9).all()
        if mode in ("RGBA", "LA"):  # half covered: (1 - 128/255) of the colour
            assert np.abs(pixels[:, 3] - np.array([255, 160, 0]) * 127 / 255).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_an_opaque_picture_is_the_same_on_every_background(mode: str, both: Callable[[bytes], list[Any]]) -> None:
    for image in both(file_of(coloured().convert(mode))):
        plain, transparent = decode(image)
        placed, again = decode(OnBackground(image, "#ffffff"))
        assert (transparent, again) == (False, False)
        assert np.array_equal(np.asarray(plain), np.asarray(placed))


def test_pictures_that_differ_on_a_background_have_other_digests(both: Callable[[bytes], list[Any]]) -> None:
    ink, blank = Image.fromarray(INK), Image.fromarray(np.zeros_like(INK))
    assert digest_image(ink) == digest_image(blank)  # both black
    on = [digest_image(OnBackground(image, "#ffffff")) for image in (ink, blank)]
    assert len({*on, digest_image(OnBackground(ink, "#fffff0"))}) == 3
    handle = both(clear("RGBA"))[0]
    handles = [handle, *(OnBackground(handle, colour) for colour in ("#ffffff", "#000000"))]
    assert len(set(map(digest_image, handles))) == 3


@pytest.mark.parametrize("wrong", ["whit", "#fff", "ffffff", "#gggggg", "", "#ffffff ", 7])
def test_a_colour_is_white_or_hexadecimal(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"task\.background: ") as caught:
        RunSpec.parse({"model": "m", "task": {"name": "scienceqa", "background": wrong}})
    assert len(str(caught.value).splitlines()) == 1


def test_the_background_is_part_of_a_run(tmp_path: Path) -> None:
    def spec(**task: Any) -> RunSpec:
        return RunSpec.parse({"model": "m", "task": {"name": "scienceqa", **task}})

    assert spec(background="white") == spec(background="#FFFFFF")
    ids = [one.digest({}) for one in (spec(), spec(background="white"), spec(background="#fefefe"))]
    assert len(set(ids)) == 3
    assert spec(background=None).digest({}) == ids[0]
    fields = spec().model_dump(mode="json", exclude={"name", "model", "text_tower", "plugins", "dtype"})
    for name in (
        "data",
        "include_path",
        "background",
        "metric",
        "blank_images",
    ):  # as before there were these
        del fields["task"][name]
    assert ids[0] == digest_json([fields, {}])
    asked = {"method": "smoothquant", "calibration": {"samples": 4}}
    asked |= {name: {"bits": 8} for name in ("weights", "activations")}
    groups = [
        group_key(RunSpec.parse({"model": "m", "task": {"name": "scienceqa", **task}, "quantize": quantize}), {})
        for quantize in (asked, None)
        for task in ({}, {"background": "white"})
    ]
    assert groups[0] != groups[1]  # calibration samples are shown on it
    assert groups[2] == groups[3]


def test_set_takes_a_colour_that_yaml_takes_for_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: m\ntask: {name: scienceqa}\n")
    (spec,) = load_spec(path, ["task.background=#0a0b0c"])
    assert spec.task.background == "#0a0b0c"


def test_unreadable_pictures_by_the_command(tmp_path: Path) -> None:
    """`validate` decodes the pictures only on request."""
    path = tmp_path / "data.parquet"
    pd.DataFrame([row("q0", image=picture(b"no picture")), row("q1")]).to_parquet(path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: diagram-llava\ntask: {{name: scienceqa, data: {path}}}\n")
    command = ["validate", str(spec)]
    assert CliRunner().invoke(app, command).exit_code == 0
    found = CliRunner().invoke(app, [*command, "--check-data"])
    assert isinstance(found.exception, UserError)
    assert str(found.exception).startswith("task.data: question 'q0': ")
    pd.DataFrame([row("q0", image=picture(png("red"))), row("q1")]).to_parquet(path)
    good = CliRunner().invoke(app, [*command, "--check-data"])
    assert (good.exit_code, "1 run(s), all valid" in good.stdout) == (0, True)
