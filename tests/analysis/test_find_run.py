"""A run is named by its folder, by the start of its id, or by its name."""

import shutil
from pathlib import Path

import pytest

from qapbench import UserError
from qapbench.analysis.paired import find_run
from qapbench.records.record import SCORED, read_record

STORED = Path(__file__).parents[1] / "records" / "schema1" / "13de59195cfebcbc"


def test_a_folder_with_scored_questions_is_itself(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / SCORED).write_text("")
    assert find_run(str(tmp_path / "elsewhere"), tmp_path / "nothing here") == tmp_path / "elsewhere"


def test_by_the_start_of_the_id_or_by_name(tmp_path: Path) -> None:
    record = read_record(STORED)
    folder = shutil.copytree(STORED, tmp_path / record.run_id)
    for name in (record.run_id, record.run_id[:5], record.name):
        assert find_run(name, tmp_path) == folder
    (tmp_path / "empty").mkdir()  # a folder that holds no run is no run
    with pytest.raises(UserError, match="no run"):
        find_run(str(tmp_path / "empty"), tmp_path)
