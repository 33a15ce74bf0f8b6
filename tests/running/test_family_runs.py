"""Whole runs on every family: prompts, batches and stored tokens where images differ in size."""

from pathlib import Path
from typing import Any

import pytest
from family_checkpoints import PROCESSORS, save_family

from qapbench import RunSpec
from qapbench.records.store import answers_of
from qapbench.running import run

pytestmark = pytest.mark.usefixtures("one_thread")
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
PRUNES: dict[str, Any] = {
    "dense": None,
    "cdpruner": {"method": "cdpruner", "keep": 4, "sensitivity": "combined"},
    "visionzip": {"method": "visionzip", "keep": 4},
}


@pytest.mark.parametrize(
    "name, answers", [*((name, "letter") for name in sorted(PROCESSORS)), ("qwen2_5_vl", "generate")]
)
def test_no_answer_depends_on_the_batch(name: str, answers: str, tmp_path: Path) -> None:
    folder = save_family(name, tmp_path / "model")
    task = {"name": "diagramqa", "limit": 4, "answers": answers}
    specs = [
        RunSpec.parse({"name": label, "model": str(folder), "task": task, "quantize": W4A4, "prune": prune})
        for label, prune in PRUNES.items()
    ]
    answered = []
    for size in (1, 3):
        records = run(specs, tmp_path / str(size), batch_size=size, device="cpu")
        answered.append([answers_of(tmp_path / str(size) / record.run_id).read() for record in records])
    assert answered[0] == answered[1]
    for label, record, stored in zip(PRUNES, records, answered[0], strict=True):
        images = [image for answer in stored for image in answer.images or []]
        assert images
        if label == "dense":
            assert all(image.kept is None for image in images)
            continue
        views = [(len(image.kept or []) + image.merged) / 4 for image in images]
        assert all(count == int(count) >= 1 for count in views)
        assert record.tokens is not None
        assert record.tokens.mean == 4 * sum(views) / len(views)
        assert (record.tokens.separators is not None) == name.startswith("llava")
        assert min(image.available for image in images) >= 16
