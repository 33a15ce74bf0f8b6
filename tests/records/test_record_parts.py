"""What records and scores are made of."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qapbench.records.record import read_record
from qapbench.records.store import write_json
from qapbench.records.tally import Scores, Tally

STORED = Path(__file__).parent / "schema1" / "13de59195cfebcbc"


def test_no_part_of_a_record_can_be_changed() -> None:
    record = read_record(STORED)
    for part in (record, record.receipt, record.scores, record.environment, record.timing):
        field = next(iter(type(part).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, getattr(part, field))


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = Field(default=2, alias="schema")


def test_a_model_is_written_under_the_names_that_it_is_read_by(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", Aliased(schema=3))
    assert (tmp_path / "x.json").read_text() == '{\n "schema": 3\n}\n'
    assert Aliased.model_validate_json((tmp_path / "x.json").read_text()).schema_version == 3


def test_scores_of_a_run_miss_nothing_and_know_every_question() -> None:
    said = Scores([], Tally(0, 0)).to_json()
    assert (said["missing"], said["unknown"]) == (0, 0)
