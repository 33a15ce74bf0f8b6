"""On the embedded model, whose tower says its sign, a spec that gives none has the answers of one that gives it."""

from pathlib import Path

import pytest
import yaml

import qapbench
from qapbench.records.store import answers_of
from qapbench.spec.spec_file import load_spec

SPECS = Path(qapbench.__file__).parents[1] / "specs"


def test_shipped_specs_give_no_sign() -> None:
    for path in sorted(SPECS.glob("*.yaml")):
        assert "relevance_sign" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("method", ["cdpruner", "trim"])
def test_auto_answers_as_the_sign_of_the_tower(method: str, tmp_path: Path) -> None:
    """The quickstart's row with its few first questions: the same answers, and the same tokens kept."""
    data = yaml.safe_load((SPECS / "quickstart.yaml").read_text(encoding="utf-8"))
    row = data.pop("cases")["W4A4 cdpruner 32 + combined"]
    data["task"]["limit"] = 4
    signs = {sign: {**row["prune"], "method": {method: {"relevance_sign": sign}}} for sign in ("positive", "negative")}
    data["cases"] = {"auto": {"prune": {**row["prune"], "method": method}}} | {
        sign: {"prune": prune} for sign, prune in signs.items()
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    records = qapbench.run(load_spec(tmp_path / "spec.yaml"), tmp_path / "runs")
    kept, outputs = {}, {}
    for record, sign in zip(records, data["cases"], strict=True):
        answers = answers_of(tmp_path / "runs" / record.run_id).read()
        kept[sign] = [image.kept for answer in answers for image in answer.images or []]
        outputs[sign] = [answer.outputs for answer in answers]
    assert kept["auto"] == kept["positive"] != kept["negative"]
    assert outputs["auto"] == outputs["positive"]
    assert records[0].receipt.relevance_sign == "positive: said by the text tower's config.json"
    assert records[1].receipt.relevance_sign == "positive: said by the spec"
