"""RunSpec and SweepSpec: what they refuse, how they say it, and when two specs are one run."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qapbench import RunSpec, SweepSpec, UserError
from qapbench.spec.run_spec import Item, PruneSpec
from qapbench.spec.sweep_spec import override
from qapbench.spec.task_spec import TaskSpec

FULL: dict[str, Any] = {
    "name": "qapruner-32",
    "model": "diagram-llava",
    "task": "diagramqa",
    "quantize": {
        "method": "rtn",
        "weights": {"bits": 4, "group_size": 128},
        "activations": {"bits": 4, "group_size": 128},
        "scope": ["language"],
    },
    "prune": {
        "method": "cdpruner",
        "keep": 32,
        "sensitivity": "combined",
        "fusion": {"convex": {"semantic": 0.7}},
    },
}

FILES = {"model": "hash of the model", "data": "hash of the data"}


def parse(**changes: Any) -> RunSpec:
    return RunSpec.parse(override(FULL, changes | {}))


def problems(data: Any) -> dict[str, str]:
    """Path -> message of everything wrong."""
    with pytest.raises(UserError) as caught:
        RunSpec.parse(data)
    return {".".join(map(str, p.where)): p.message for p in caught.value.problems}


def test_the_documented_spec() -> None:
    spec = RunSpec.parse(FULL)
    assert spec.task.name == "diagramqa"
    assert spec.quantize is not None
    assert spec.prune is not None
    assert spec.quantize.method.name == "rtn"
    assert spec.prune.sensitivity is not None
    assert spec.prune.sensitivity.params == {"bits": 4, "group_size": 128}
    assert spec.quantize.label == "rtn W4A4"
    assert spec.prune.label == "cdpruner 32 + combined"


def test_the_least_spec() -> None:
    spec = RunSpec.parse({"model": "m", "task": "t"})
    assert (spec.quantize, spec.prune, spec.seed, spec.dtype) == (None, None, 0, "auto")
    assert (spec.task.answers, spec.task.limit) == ("letter", None)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        RunSpec.parse(FULL).seed = 1  # type: ignore[misc]


def test_unknown_fields_name_the_nearest() -> None:
    found = problems(
        {
            **FULL,
            "modle": "x",
            "task": {"name": "diagramqa", "limitt": 3},
            "quantize": {"method": "rtn", "weights": {"bits": 4, "groupsize": 64}},
            "prune": {"method": {"cdpruner": {"relevance_sgn": "positive"}}, "keep": 3, "position": "keep"},
        }
    )
    assert found == {
        "modle": "unknown field; did you mean 'model'?",
        "task.limitt": "unknown field; did you mean 'limit'?",
        "quantize.weights.groupsize": "unknown field; did you mean 'group_size'?",
        "prune.position": "unknown field; did you mean 'positions'?",
        "prune.method.cdpruner.relevance_sgn": ("unknown field of pruner 'cdpruner'; did you mean 'relevance_sign'?"),
    }


def test_wrong_types_are_not_coerced() -> None:
    found = problems(
        {
            "model": 3,
            "task": {"name": "t", "limit": "5"},
            "quantize": {"method": "rtn", "weights": {"bits": 4.0, "symmetric": 1}, "scope": "language"},
            "prune": {"method": "cdpruner", "keep": "32", "sensitivity": {"group_error": {"bits": True}}},
            "seed": "0",
            "plugins": "file.py",
        }
    )
    assert set(found) == {
        "model",
        "task.limit",
        "quantize.weights.bits",
        "quantize.weights.symmetric",
        "quantize.scope",
        "prune.keep",
        "prune.sensitivity.group_error.bits",
        "seed",
        "plugins",
    }
    assert found["prune.keep"] == "input should be a valid integer (got '32')"


@pytest.mark.parametrize(
    "changes, path",
    [
        ({"prune.keep": 0}, "prune.keep"),
        ({"quantize.weights.bits": 1}, "quantize.weights.bits"),
        ({"quantize.activations.group_size": 0}, "quantize.activations.group_size"),
        ({"quantize.scope": []}, "quantize.scope"),
        ({"quantize.scope": ["langauge"]}, "quantize.scope.0"),
        ({"prune.positions": "raster"}, "prune.positions"),
        ({"task.limit": 0}, "task.limit"),
        ({"task.answers": "words"}, "task.answers"),
        ({"dtype": "int4"}, "dtype"),
        ({"prune.fusion": {"convex": {"semantic": 1.5}}}, "prune.fusion.convex.semantic"),
        ({"prune.sensitivity": {"clip_error": {"percentile": 0}}}, "prune.sensitivity.clip_error.percentile"),
    ],
)
def test_out_of_range(changes: dict[str, Any], path: str) -> None:
    found = problems(override(FULL, changes))
    assert list(found) == [path]
    assert "(got" in found[path]


def test_unknown_items() -> None:
    found = problems(
        override(
            FULL,
            {
                "quantize.method": "rtm",
                "prune.method": {"cdprune": {}},
                "prune.sensitivity": "combind",
                "prune.fusion": "convx",
            },
        )
    )
    assert found == {
        "quantize.method": "no ptq 'rtm'; did you mean 'rtn'?",
        "prune.method": "no pruner 'cdprune'; did you mean 'cdpruner'?",
        "prune.sensitivity": "no metric 'combind'; did you mean 'combined'?",
        "prune.fusion": "no fusion 'convx'; did you mean 'convex'?",
    }


@pytest.mark.parametrize("wrong", [3, ["cdpruner"], {"a": {}, "b": {}}, {}, {"cdpruner": 3}, {1: {}}, None])
def test_malformed_items(wrong: Any) -> None:
    found = problems({**FULL, "prune": {"method": wrong, "keep": 3}})
    assert found == {"prune.method": "expected a pruner as `name` or `{name: {parameter: value}}`"}


def test_several_mistakes_make_one_readable_message() -> None:
    with pytest.raises(UserError) as caught:
        RunSpec.parse({"modle": "x", "task": {}, "prune": {"method": "cdpruner", "keep": -1}})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems) == 4
    assert "model: this field is required" in lines
    assert "task.name: this field is required" in lines
    assert not any("pydantic" in line or "\n" in line for line in lines)


def test_rules_across_fields() -> None:
    found = problems({**FULL, "quantize": {"method": "rtn"}})
    assert found["quantize"].startswith("give `weights`, `activations` or both")
    found = problems({**FULL, "prune": {"method": "cdpruner", "keep": 3, "fusion": "rank"}})
    assert found["prune"].startswith("`fusion` without `sensitivity`")


def test_not_a_mapping() -> None:
    for wrong in ([], "spec", None, 3):
        assert list(problems(wrong)) == [""]


# ---------------------------------------------------------------------------------------- one run, one id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another label"},
        {"name": None},
        {"task": {"name": "diagramqa"}},
        {"task": {"name": "diagramqa", "limit": None, "answers": "letter"}},
        {"prune.sensitivity": {"combined": None}},
        {"prune.sensitivity": {"combined": {}}},
        {"prune.sensitivity": {"combined": {"group_size": 128, "bits": 4}}},
        {"prune.fusion": None},
        {"prune.fusion": "convex"},
        {"prune.method": {"cdpruner": {"relevance_sign": "auto"}}},
        {"quantize.weights.symmetric": False},
        {"quantize.scope": None},
        {"quantize.scope": ["language", "language"]},
        {"dtype": "auto", "seed": 0, "plugins": []},
    ],
    ids=str,
)
def test_spelling_out_defaults_is_the_same_run(changes: dict[str, Any]) -> None:
    assert parse(**changes).canonical() == RunSpec.parse(FULL).canonical()
    assert parse(**changes).digest(FILES) == RunSpec.parse(FULL).digest(FILES)


def test_order_does_not_matter() -> None:
    backwards = json.loads(json.dumps(FULL), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert RunSpec.parse(backwards).canonical() == RunSpec.parse(FULL).canonical()
    one = parse(**{"quantize.scope": ["language", "vision"]})
    assert one.canonical() == parse(**{"quantize.scope": ["vision", "language"]}).canonical()


def test_an_integer_for_a_number_is_the_same_run() -> None:
    one = parse(**{"prune.fusion": {"convex": {"semantic": 1}}})
    assert one.canonical() == parse(**{"prune.fusion": {"convex": {"semantic": 1.0}}}).canonical()


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "scienceqa"},
        {"task.limit": 5},
        {"task.answers": "generate"},
        {"seed": 1},
        {"quantize": None},
        {"quantize.weights.bits": 8},
        {"quantize.weights.group_size": 64},
        {"quantize.weights.symmetric": True},
        {"quantize.activations": None},
        {"quantize.scope": ["language", "vision"]},
        {"prune": None},
        {"prune.keep": 33},
        {"prune.positions": "keep"},
        {"prune.method": "random"},
        {"prune.method": {"cdpruner": {"relevance_sign": "positive"}}},
        {"prune.sensitivity": "l2"},
        {"prune.sensitivity": {"combined": {"bits": 3}}},
        {"prune.fusion": {"convex": {"semantic": 0.6}}},
    ],
    ids=str,
)
def test_another_run_has_another_digest(changes: dict[str, Any]) -> None:
    assert parse(**changes).digest(FILES) != RunSpec.parse(FULL).digest(FILES)
    assert parse(**changes).canonical() != RunSpec.parse(FULL).canonical()


def test_digest_follows_content() -> None:
    """Every fingerprint counts, under its own name and in any order."""
    spec = RunSpec.parse(FULL)
    assert spec.digest({"model": "a", "data": "b"}) == spec.digest({"data": "b", "model": "a"})
    files = [{}, {"model": "a"}, {"model": "b"}, {"model": "a", "data": "b"}, {"model": "b", "data": "a"}]
    different = {spec.digest(content) for content in files}
    assert len(different) == len(files)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in different)


@pytest.mark.parametrize(
    "changes",
    [{"model": "elsewhere"}, {"task.data": "moved.parquet"}, {"text_tower": "c"}, {"dtype": "bfloat16"}],
)
def test_paths_do_not_enter_the_digest(changes: dict[str, Any]) -> None:
    """Their content does, and the precision in effect, as fingerprints; `canonical` says what was asked."""
    assert parse(**changes).digest(FILES) == RunSpec.parse(FULL).digest(FILES)
    assert parse(**changes).canonical() != RunSpec.parse(FULL).canonical()


def test_round_trip() -> None:
    seeded = override(FULL, {"prune.method": {"random": {"seed": 3}}})
    for data in (FULL, {"model": "m", "task": "t"}, seeded):
        spec = RunSpec.parse(data)
        assert RunSpec.parse(spec.model_dump()) == spec
        assert RunSpec.parse(spec.model_dump(mode="json")) == spec
        assert RunSpec.parse(json.loads(spec.canonical())).canonical() == spec.canonical()
        assert hash(spec.prune) == hash(RunSpec.parse(spec.model_dump()).prune)


def test_an_item_object_is_as_good_as_its_name() -> None:
    spec = RunSpec.parse({**FULL, "prune": {"method": Item(name="random", params={"seed": 3}), "keep": 4}})
    assert spec.prune is not None
    assert spec.prune.method.params == {"seed": 3}
    assert spec.prune.model_dump()["method"] == {"random": {"seed": 3}}
    assert str(spec.prune.method) == "random"
    assert RunSpec.parse(FULL).model_dump()["quantize"]["method"] == "rtn", "no parameters: the bare name"


# ---------------------------------------------------------------------------------------------- sweeps


def test_override_sets_and_copies() -> None:
    before = json.dumps(FULL)
    out = override(FULL, {"prune.keep": 64, "seed": 7, "quantize.weights.bits": 8})
    assert (out["prune"]["keep"], out["seed"], out["quantize"]["weights"]["bits"]) == (64, 7, 8)
    assert json.dumps(FULL) == before


def test_override_with_none_removes() -> None:
    assert "prune" not in override(FULL, {"prune": None})
    assert "sensitivity" not in override(FULL, {"prune.sensitivity": None})["prune"]
    assert override({"model": "m"}, {"seed": None}) == {"model": "m"}
    assert override({"model": "m"}, {"prune.sensitivity": None}) == {"model": "m"}, "no stub is left"
    assert override({"task": "t"}, {"task.limit": None}) == {"task": "t"}


def test_override_opens_names() -> None:
    assert override(FULL, {"task.limit": 5})["task"] == {"name": "diagramqa", "limit": 5}
    opened = override(FULL, {"prune.method.cdpruner.relevance_sign": "positive"})
    assert opened["prune"]["method"] == {"cdpruner": {"relevance_sign": "positive"}}
    opened = override(FULL, {"prune.sensitivity.combined.bits": 3})
    assert opened["prune"]["sensitivity"] == {"combined": {"bits": 3}}
    assert override({"model": "m"}, {"prune.method": "random", "prune.keep": 4})["prune"] == {
        "method": "random",
        "keep": 4,
    }


def test_override_of_a_whole_part_and_then_inside() -> None:
    out = override(FULL, {"prune": {"method": "random", "keep": 1}, "prune.keep": 9})
    assert out["prune"] == {"method": "random", "keep": 9}


def test_matrix_times_cases() -> None:
    sweep = SweepSpec(
        base=FULL,
        matrix={"prune.keep": [128, 32], "quantize.weights.bits": [4, 8]},
        cases={"semantic": {"prune.sensitivity": None, "prune.fusion": None}, "fused": {}},
    )
    cells = sweep.cells()
    assert len(cells) == 8
    seen = [("sensitivity" in c["prune"], c["prune"]["keep"], c["quantize"]["weights"]["bits"]) for c in cells]
    assert seen == [(fused, keep, bits) for fused in (False, True) for keep in (128, 32) for bits in (4, 8)]
    assert cells[0]["name"] == "semantic keep=128 bits=4"
    assert len({cell["name"] for cell in cells}) == 8
    assert len({RunSpec.parse(cell).digest(FILES) for cell in cells}) == 8


def test_matrix_alone_cases_alone_neither() -> None:
    by_matrix = SweepSpec(base=FULL, matrix={"prune.method": ["random", {"attention": {}}]}).cells()
    assert [cell["name"] for cell in by_matrix] == [
        "qapruner-32 method=random",
        "qapruner-32 method=attention",
    ]
    by_case = SweepSpec(base=FULL, cases={"full": {"prune": None, "quantize": None}, "ours": {}}).cells()
    assert [cell["name"] for cell in by_case] == ["full", "ours"]
    assert "prune" not in by_case[0]
    assert SweepSpec(base=FULL).cells() == [FULL]


def test_the_grid_goes_over_the_case() -> None:
    cells = SweepSpec(base=FULL, matrix={"prune.keep": [7]}, cases={"a": {"prune.keep": 3}}).cells()
    assert cells[0]["prune"]["keep"] == 7


def test_a_case_that_removes_a_section_is_not_combined_with_what_is_inside_it() -> None:
    sweep = SweepSpec.parse(
        FULL
        | {
            "matrix": {"prune.keep": [64, 32], "seed": [0, 1], "pruned": [0]},
            "cases": {"dense": {"prune": None}, "all": {}},
        }
    )
    cells = sweep.cells()
    assert [cell["name"] for cell in cells[:2]] == ["dense seed=0 pruned=0", "dense seed=1 pruned=0"]
    assert ["prune" in cell for cell in cells] == [False] * 2 + [True] * 4


def test_rows_of_a_case_without_a_section_are_counted_once() -> None:
    many = {"matrix": {"prune.keep": [*range(1, 1000)], "seed": [0, 1]}}
    assert len(SweepSpec.parse(FULL | many | {"cases": {"dense": {"prune": None}, "all": {}}}).cells()) == 2000
    with pytest.raises(UserError, match="2002 runs, of which a file can have 2000"):
        SweepSpec.parse(FULL | many | {"cases": {"a": {"prune": None}, "b": {"prune": None}, "all": {}}})


def test_cells_are_independent_copies() -> None:
    one, other = SweepSpec(base=FULL, matrix={"seed": [0, 1]}).cells()
    one["prune"]["keep"] = 1
    assert other["prune"]["keep"] == 32
    assert FULL["prune"]["keep"] == 32


def test_a_file_holds_a_run_and_what_varies() -> None:
    flat = SweepSpec.parse({**FULL, "matrix": {"prune.keep": [8, 4]}, "cases": None})
    assert flat == SweepSpec(base=FULL, matrix={"prune.keep": [8, 4]})
    assert flat.name == "qapruner-32"
    assert SweepSpec.parse(FULL).cells() == [FULL], "one run is a sweep of one"


def test_each_change_knows_its_place() -> None:
    sweep = SweepSpec(base=FULL, matrix={"seed": [5, 6]}, cases={"a": {"prune.keep": 3, "seed": 1}})
    (_, first), (_, second) = sweep.cells_with_changes()
    assert first == {"prune.keep": ("cases", "a", "prune.keep"), "seed": ("matrix", "seed", 0)}
    assert second["seed"] == ("matrix", "seed", 1)


@pytest.mark.parametrize(
    "varying, path",
    [
        ({"matrix": {"seed": []}}, "matrix.seed"),
        ({"matrix": {"seed": 3}}, "matrix.seed"),
        ({"matrix": ["seed"]}, "matrix"),
        ({"cases": {"a": 3}}, "cases.a"),
    ],
)
def test_sweeps_refuse_what_would_run_nothing(varying: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError) as caught:
        SweepSpec.parse({**FULL, **varying})
    assert [".".join(map(str, problem.where)) for problem in caught.value.problems] == [path]


def test_the_seed_reaches_a_pruner_that_is_given_as_an_object() -> None:
    prune = PruneSpec(method="random", keep=3)  # type: ignore[arg-type]
    spec = RunSpec(model="m", task=TaskSpec(name="scienceqa"), seed=7, prune=prune)
    assert spec.prune is not None
    assert spec.prune.method.params == {"seed": 7}
    with pytest.raises(UserError) as caught:
        RunSpec.parse({"model": "m", "task": "scienceqa", "seed": "a", "prune": {"method": "random", "keep": 3}})
    assert [problem.where for problem in caught.value.problems] == [("seed",)]


def test_mistakes_in_a_calibration_that_is_not_used_are_told_with_all_others() -> None:
    quantize = {"method": "rtn", "weights": {"bits": 4}}
    for calibration in (5, {"samples": "x"}):
        with pytest.raises(UserError) as caught:
            RunSpec.parse({"model": "m", "task": "t", "quantize": {**quantize, "calibration": calibration, "zzz": 1}})
        places = {problem.where[:2] for problem in caught.value.problems}
        assert places == {("quantize", "calibration"), ("quantize", "zzz")}
    unused = RunSpec.parse({"model": "m", "task": "t", "quantize": {**quantize, "calibration": {"samples": 4}}})
    assert unused.quantize is not None
    assert unused.quantize.calibration is None
