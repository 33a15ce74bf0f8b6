"""The page on adding strategies: its code runs as it stands there, beside a spec, by the real command."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from cli_process import qapbench
from run_questions import QUESTIONS, row

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-strategy.md"
SCORED = '''from qapbench import metric, quantizers

@metric("one_scale_error")
def one_scale_error(tokens):
    """What the page's quantizer leaves."""
    return (tokens - quantizers.create("one_scale", bits=3)(tokens)).norm(dim=-1)
'''


def test_every_example_of_the_page_runs(
    spec_of: Callable[..., dict[str, Any]], write_spec: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = re.findall(r'^@\w+\("(\w+)"\)', "".join(examples), re.MULTILINE)
    assert len(names) == len(examples) >= 8
    for place, code in enumerate([*examples, SCORED]):
        (tmp_path / f"mine_{place}.py").write_text(code)
    train = tmp_path / "train.parquet"
    pd.DataFrame([row(index) for index in range(QUESTIONS, QUESTIONS + 8)]).to_parquet(train)
    calibration = {"samples": 4, "data": str(train)}
    eight = {"weights": {"bits": 8}, "scope": ["language"]}
    cases: dict[str, dict[str, Any]] = {
        "metric": {"prune.sensitivity": {"median_magnitude": {"power": 2.0}}},
        "metric of a model": {"prune.sensitivity": "value_size"},
        "quantizer": {"prune.sensitivity": "one_scale_error"},
        "fusion": {"prune.sensitivity": "l2", "prune.fusion": {"convex_squared": {"semantic": 0.4}}},
        "pruner": {"prune.method": "most_attended"},
        "pruner inside": {"prune.method": {"late_peak": {"depth": 0.5}}},
        "ptq": {"quantize": {"method": "weights_only", **eight}},
        "calibrated ptq": {
            "quantize": {"method": "static_absmax", **eight, "activations": {"bits": 8}, "calibration": calibration}
        },
        "allocation": {
            "quantize": {
                "method": "rtn",
                **eight,
                "weights": {"bits": 4},
                "allocate": "ends_first",
                "calibration": calibration,
            }
        },
    }
    assert len(cases) == len(examples)  # an example more is a case more
    asked = spec_of(prune={"method": "attention", "keep": 4}, task={"limit": 4}, cases=cases)
    spec = write_spec({**asked, "plugins": [f"mine_{place}.py" for place in range(len(examples) + 1)]})
    done = qapbench("run", spec, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/record.json")]
    assert sorted(record["name"] for record in records) == sorted(cases)
    used = json.dumps([record["spec"] for record in records])
    assert [name for name in names if f'"{name}"' not in used] == ["one_scale"]  # which the metric uses
