"""The JSON Schema of specs: it takes the shipped ones, and refuses nothing that `load_spec` takes."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli_process import qapbench
from jsonschema import Draft202012Validator

from benchmarks.fuzz_specs import _mutated
from qapbench import UserError, pruners
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.schema import spec_schema
from qapbench.spec.spec_file import shipped_specs
from qapbench.spec.sweep_spec import SweepSpec
from qapbench.spec.yaml_reader import read_yaml

SCHEMA = Path(__file__).parents[2] / "specs" / "qapbench.schema.json"
RUN = {"model": "x", "task": "diagramqa"}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = spec_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped_specs())
def test_shipped_specs_are_valid_and_name_the_schema(name: str, validator: Draft202012Validator) -> None:
    file = shipped_specs()[name]
    assert list(validator.iter_errors(read_yaml(file)[0])) == []
    modeline = file.read_text(encoding="utf-8").split("\n")[0]
    assert modeline == "# yaml-language-server: $schema=qapbench.schema.json"
    assert file.with_name("qapbench.schema.json").is_file()


def test_the_schema_beside_the_shipped_specs_is_what_the_command_prints() -> None:
    # In a process of its own, since other tests register items of theirs in this one.
    printed = qapbench("schema").stdout
    assert printed == SCHEMA.read_text(encoding="utf-8"), "run: qapbench schema > specs/qapbench.schema.json"


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({}, ""),
        ({"model": "x"}, ""),
        ({**RUN, "modell": "y"}, ""),
        ({**RUN, "task": {"name": "a", "limi": 3}}, "task"),
        ({**RUN, "task": []}, "task"),
        ({**RUN, "task": ["a", {"limit": 3}]}, "task"),
        ({**RUN, "tasks": ["a"]}, ""),
        ({**RUN, "strata": "needs_images"}, "strata"),
        ({**RUN, "prune": {"method": "cdpruner"}}, "prune"),
        ({**RUN, "prune": {"method": "cdprune", "keep": 3}}, "prune.method"),
        ({**RUN, "prune": {"method": {"cdprune": {}}, "keep": 3}}, "prune.method"),
        ({**RUN, "prune": {"method": {"cdpruner": {"foo": 1}}, "keep": 3}}, "prune"),
        ({**RUN, "prune": {"keep": 0}, "matrix": {"prune.method": ["cdpruner"]}}, "prune"),
        ({**RUN, "matrix": {"prune.keep": []}}, "matrix.prune.keep"),
        ({**RUN, "matrix": {"prune.keep": [3, "four"]}}, "matrix.prune.keep.1"),
        ({**RUN, "cases": {"a": {"prune.sensitivity": "l7"}}}, "cases.a.prune.sensitivity"),
        ({**RUN, "quantize": {"method": "rtn", "weights": {"bits": 9}}}, "quantize"),
    ],
)
def test_mistakes_are_marked_where_they_are(spec: dict[str, Any], where: str, validator: Draft202012Validator) -> None:
    errors = list(validator.iter_errors(spec))
    assert errors
    assert {".".join(map(str, error.absolute_path)) for error in errors} == {where}


@pytest.mark.parametrize(
    "spec",
    [
        {**RUN, "task": {"name": "scienceqa", "limit": 3}, "prune": None},
        {**RUN, "task": ["diagramqa", {"name": "scienceqa", "limit": 3}], "strata": "needs_image"},
        {**RUN, "strata": ["needs_image"]},
        {**RUN, "prune": {"method": {"cdpruner": None}, "keep": 3}},
        {**RUN, "prune": {"method": "cdpruner"}, "matrix": {"prune.keep": [3, 4]}},
        {"cases": {"a": RUN}},
        {**RUN, "plugins": ["mine.py"], "prune": {"method": {"mine": {"anything": 1}}, "keep": 3}},
        {**RUN, "matrix": {"prune.sensitivity.combined.alpha": [0.5]}},
        {**RUN, "cases": {"a": {"prune": None}, "b": {"quantize.weights": {"bits": 4}}}},
    ],
)
def test_what_a_spec_may_say_is_not_marked(spec: dict[str, Any], validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(spec)) == []


def test_an_editor_is_offered_every_registered_name() -> None:
    offered = spec_schema()["$defs"]["registered-pruner"]["anyOf"]
    assert [one["const"] for one in offered if "const" in one] == pruners.names()
    assert all(one["description"] for one in offered if "const" in one)


def test_nothing_valid_is_refused(validator: Draft202012Validator) -> None:
    """Runs of shipped specs with made-up changes: each that the schema refuses, validation refuses as well."""
    draw = random.Random(0)
    contents = [read_yaml(file)[0] for file in shipped_specs().values()]
    originals = [cell for data in contents if "plugins" not in data for cell in SweepSpec.parse(data).cells()]
    refused = accepted = 0
    for _ in range(400):
        spec = copy.deepcopy(draw.choice(originals))
        for _ in range(draw.randint(1, 3)):
            spec = _mutated(spec, draw)
        try:
            json.dumps(spec, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            continue  # no JSON at all, such as a date
        if validator.is_valid(spec):
            accepted += 1
            continue
        refused += 1
        with pytest.raises(UserError):
            for cell in SweepSpec.parse(spec).cells():
                RunSpec.parse(cell)
    assert refused > 100
    assert accepted > 20
