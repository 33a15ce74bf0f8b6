"""Files that are sent to machines that lack them: all of them, whole or not at all, and once."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_questions import row

from qapbench import RunSpec, UserError
from qapbench.running import sent_files
from qapbench.running.sent_files import FileServer, Tree, lacks, received, trees_of, with_places


class Server:
    """Reads files as the server does, counts the pieces, and does what a test wants with each."""

    def __init__(self, tree: Tree, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        self.tree, self.change, self.asked = tree, change, list[str]()
        self.server = FileServer([tree])

    def ask(self, name: str, start: int) -> bytes:
        self.asked.append(name)
        return self.server.piece(self.tree.digest, name, start)

    def get(self, data: bytes) -> bytes:
        return self.change(data)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkpoint's, of several files, of which some need many pieces."""
    monkeypatch.setattr(sent_files, "PIECE", 64)
    folder = tmp_path / "model"
    (folder / "clip").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "clip" / "model.safetensors").write_bytes(bytes(100))
    (folder / "clip" / "config.json").write_text("{}")
    (folder / "modeling.py").write_text("")
    (folder / "picture.png").write_bytes(b"not read by a run")
    return folder


def tree_of(folder: Path) -> Tree:
    return trees_of([RunSpec.parse({"model": str(folder), "task": "scienceqa"})])[str(folder)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_spec_names_is_sent_with_the_pictures_of_its_data(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    rows = [row(index) for index in range(4)]
    for at, path in enumerate(("pictures/a.png", "../outside.png", "nowhere.png")):
        rows[at]["image"] = {"bytes": None, "path": path}
    pd.DataFrame(rows).to_parquet(folder / "test.parquet")
    (folder / "pictures" / "a.png").write_bytes(b"a")
    (folder / "pictures" / "b.png").write_bytes(b"b")
    (tmp_path / "outside.png").write_bytes(b"a file of somebody's")
    (tmp_path / "calibration.parquet").write_bytes(b"no parquet")
    asked = {
        "model": str(model),
        "text_tower": str(model / "clip"),
        "task": {"name": "scienceqa", "data": str(folder / "test.parquet")},
        "quantize": {
            "method": "gptq",
            "weights": {"bits": 4},
            "calibration": {"data": str(tmp_path / "calibration.parquet")},
        },
    }
    embedded = {"model": "diagram-llava-outliers", "task": {"name": "scienceqa", "data": "owner/name"}}
    spec = RunSpec.parse(asked)
    trees = trees_of([spec, RunSpec.parse(embedded)])
    files = {name: ([file.name for file in tree.files], tree.main) for name, tree in trees.items()}
    checkpoint = ["clip/config.json", "clip/model.safetensors", "config.json", "model.safetensors", "modeling.py"]
    assert files == {
        str(model): (checkpoint, ""),
        str(model / "clip"): (["config.json", "model.safetensors"], ""),
        str(folder / "test.parquet"): (["pictures/a.png", "test.parquet"], "test.parquet"),
        str(tmp_path / "calibration.parquet"): (["calibration.parquet"], "calibration.parquet"),
    }
    moved = with_places(spec, {name: f"/there/{at}" for at, name in enumerate(trees)})
    assert (moved.model, moved.text_tower, moved.task.data) == ("/there/0", "/there/1", "/there/2")
    assert moved.quantize is not None
    assert moved.quantize.calibration is not None
    assert moved.quantize.calibration.data == "/there/3"
    assert with_places(spec, {}) == spec


def test_a_folder_of_data_and_several_are_sent_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "x.png").write_bytes(name.encode())
    data = {"owner/one": str(tmp_path / "one"), "owner/two": str(tmp_path / "two")}
    spec = RunSpec.parse(
        {"model": "diagram-llava-outliers", "task": {"name": "mme", "from": "lmms-eval", "data": data}}
    )
    trees = trees_of([spec])
    assert {name: [file.name for file in tree.files] for name, tree in trees.items()} == {
        str(tmp_path / "one"): ["in/x.png"],
        str(tmp_path / "two"): ["in/x.png"],
    }
    moved = with_places(spec, {str(tmp_path / "two"): "/there"})
    assert moved.task.data == {"owner/one": str(tmp_path / "one"), "owner/two": "/there"}


def test_a_tree_arrives_whole_and_is_found_again(model: Path, tmp_path: Path) -> None:
    tree, cache = tree_of(model), tmp_path / "cache"
    server = Server(tree)
    place, sent = received(tree, server.ask, server.get, cache)
    assert (place, sent) == (cache / tree.digest, tree.size)
    assert content(place) == {name: data for name, data in content(model).items() if name != "picture.png"}
    assert server.asked.count("model.safetensors") == 5  # four pieces, and none behind the end

    server = Server(tree)
    assert received(tree, server.ask, server.get, cache) == (place, 0)
    assert server.asked == []
    (place / "config.json").write_text("[]")  # damaged, with the size that it should have
    assert received(tree, server.ask, server.get, cache) == (place, 2)
    assert set(server.asked) == {"config.json"}
    assert (place / "config.json").read_text() == "{}"
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [tree.digest]


def test_a_transfer_that_was_cut_off_goes_on(model: Path, tmp_path: Path) -> None:
    tree, cache = tree_of(model), tmp_path / "cache"
    whole, left = tree.files[0].name, 3

    def cut(data: bytes) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("the driver is gone")
        return data

    server = Server(tree, cut)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        received(tree, server.ask, server.get, cache)
    assert not (cache / tree.digest).exists()
    server = Server(tree)
    place, sent = received(tree, server.ask, server.get, cache)
    assert sent == tree.size - tree.files[0].size
    assert whole not in server.asked
    assert not lacks(str(place), Tree(model, tree.files))


def test_what_arrives_with_another_content_is_refused(model: Path, tmp_path: Path) -> None:
    tree, cache = tree_of(model), tmp_path / "cache"
    server = Server(tree, lambda data: data[::-1])
    with pytest.raises(UserError, match=r"config\.json arrived with another content"):
        received(tree, server.ask, server.get, cache)
    assert not (cache / tree.digest).exists()
    (model / "config.json").write_text("{...}")  # changed after it was announced, while it is sent
    server = Server(tree)
    with pytest.raises(UserError, match=r"config\.json arrived with another content"):
        received(tree, server.ask, server.get, cache)
    with pytest.raises(KeyError):  # nothing else can be asked for
        server.ask("picture.png", 0)


def test_a_full_disk_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of(model)
    server = Server(tree)
    usage = shutil.disk_usage(tmp_path)._replace(free=tree.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="are to be sent here"):
        received(tree, server.ask, server.get, tmp_path / "cache")
    assert server.asked == []


def test_two_workers_of_a_machine_get_a_tree_once(model: Path, tmp_path: Path) -> None:
    tree, found = tree_of(model), list[Any]()
    server, both = Server(tree), threading.Barrier(2)

    def work() -> None:
        both.wait()
        found.append(received(tree, server.ask, server.get, tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent for _, sent in found) == [0, tree.size]
    assert len({place for place, _ in found}) == 1
