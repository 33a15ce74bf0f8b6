"""Spec files: what YAML may hold, how every mistake is placed, and what `--set` and cases do to each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from qapbench import RunSpec, UserError, pruners
from qapbench.spec.spec_file import about_spec, load_spec, shipped_specs

BASE = "model: diagram-llava\ntask: diagramqa\n"
PRUNED = f"{BASE}prune: {{method: cdpruner, keep: 32, sensitivity: combined, fusion: {{convex: {{semantic: 0.7}}}}}}\n"


def load(folder: Path, text: str | bytes, *changes: str) -> list[RunSpec]:
    path = folder / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_spec(path, changes)


def refused(folder: Path, text: str | bytes, *changes: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text, *changes)
    return [str(problem) for problem in caught.value.problems]


DOUBLED = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
UNREADABLE: list[tuple[str, str | bytes, str]] = [
    ("binary", "seed: !!binary aGVsbG8=", "line 3: seed: of type '!!binary', but a spec holds only"),
    ("set", "prune: !!set {a, b}", "line 3: prune: of type '!!set'"),
    ("ordered map", "prune: !!omap [a: 1]", "line 3: prune: of type '!!omap'"),
    ("object", "seed: !!python/object/apply:os.system ['true']", "line 3: seed: of type '!!python/object"),
    ("own tag", "seed: !mine 3", "line 3: seed: of type '!mine'"),
    ("digits", "seed: " + "9" * 5000, "line 3: seed: a whole number of more than 64 bits"),
    ("65 bits", f"seed: {2**64}", "line 3: seed: a whole number of more than 64 bits"),
    ("0b", "seed: 0b_", "line 3: seed: '0b_' is not of type int"),
    ("0x", "seed: 0x_", "line 3: seed: '0x_' is not of type int"),
    ("typed text", "seed: !!int x", "line 3: seed: 'x' is not of type int"),
    ("typed truth", "seed: !!bool maybe", "line 3: seed: 'maybe' is not of type bool"),
    ("not a number", "seed: .nan", "line 3: seed: '.nan' is not a finite number"),
    ("infinity", "seed: -.inf", "line 3: seed: '-.inf' is not a finite number"),
    ("NUL", 'model: "a\\0b"', "line 3: model: holds the character U+0000"),
    ("half a pair", 'name: "\\ud800"', "line 3: name: holds the character U+D800"),
    ("key", '"na\\x07me": 1', "line 3: .: the key holds the character U+0007"),
    ("list as a key", "? [a]\n: 3", "line 3: .: a key is a text"),
    ("merge", "<<: 3", "line 3: .: `<<` takes a mapping"),
    ("deep", "x: " + "[" * 1000, "line 3: spec.yaml: not valid YAML: nested deeper than 32 levels"),
    ("itself", "x: &a [*a]", "line 3: x: nested deeper than 32 levels, where aliases are written out"),
    ("merges itself", "x: &a {<<: *a}", "line 3: x: nested deeper than 32 levels, where aliases are written out"),
    ("doubling", DOUBLED, "more than 20000 values, where aliases are written out"),
    ("doubling merges", MERGED, "more than 20000 values, where aliases are written out"),
    ("long text", f"name: {'x' * 5000}", "line 3: name: has 5000 characters"),
    ("large", f"# {'x' * (1 << 18)}\n", "line 1: spec.yaml: larger than a spec can be"),
    ("not text", b"name: \xff", "line 3: spec.yaml: not valid YAML: not UTF-8 text"),
    ("control", "name: \x01", "line 3: spec.yaml: not valid YAML: the character U+0001"),
    ("two", "---\nmodel: x", "line 3: spec.yaml: not valid YAML: expected a single document"),
    ("empty key", '"": 3', "line 3: '': unknown field"),
    ("long path", f"text_tower: {'x' * 3000}", "line 3: text_tower: a name of more than 255 bytes"),
    ("nobody", "text_tower: ~nosuchuser/x", "line 3: text_tower: there is no home folder of that user"),
    ("dots", f"cases: {{a: {{? {'x.' * 5000}y : 1}}}}", "line 3: cases.a: the key has 10001 characters"),
    ("many dots", f"cases: {{a: {{? {'x.' * 500}y : 1}}}}", "a dotted key of more than 16 parts"),
    (
        "grid",
        "matrix:\n" + "".join(f"  seed{n}: [1, 2, 3]\n" for n in range(80)),
        "line 3: matrix: more than 10^9 runs",
    ),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE])
def test_what_a_spec_cannot_hold_is_told_with_its_place(text: str | bytes, message: str, tmp_path: Path) -> None:
    told = refused(tmp_path, BASE.encode() + (text if isinstance(text, bytes) else text.encode()))
    assert any(message in line for line in told), told
    assert all(line.startswith("line ") for line in told)


def test_files_that_are_no_mapping(tmp_path: Path) -> None:
    for text, found in (("", "an empty file"), ("- a", "a list"), ("abc", "a text")):
        assert refused(tmp_path, text) == [
            f"line 1: spec.yaml: a spec is a mapping (`model: ...`), got {found}",
        ]


def test_a_field_that_is_missing_is_told_with_the_line_of_its_section(tmp_path: Path) -> None:
    assert refused(tmp_path, "# nothing\nmodel: diagram-llava\n") == ["line 2: task: this field is required"]
    assert refused(tmp_path, f"{BASE}prune:\n  keep: 3\n") == ["line 3: prune.method: this field is required"]


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    text = f"""{BASE}quantize:
  method: rtn
  weights: &four {{bits: 4, group_size: 128}}
  activations: {{<<: *four, bits: 8}}
"""
    (run,) = load(tmp_path, text)
    assert run.quantize is not None
    assert run.quantize.activations is not None
    assert (run.quantize.label, run.quantize.activations.group_size) == ("rtn W4A8", 128)
    assert refused(tmp_path, text.replace("bits: 8", "bits: 99"))[0].startswith("line 6: quantize.activations.bits")


def test_keys_and_dates_are_text_as_written(tmp_path: Path) -> None:
    runs = load(tmp_path, f"{BASE}cases: {{yes: {{}}, 0x10: {{}}, 2026-11-28: {{}}, 'null': {{}}}}\n")
    assert [run.name for run in runs] == ["yes", "0x10", "2026-11-28", "null"]


def test_a_null_sensitivity_takes_the_fusion_of_the_base_with_it(tmp_path: Path) -> None:
    cases = "cases:\n  meaning alone: {prune.sensitivity: null}\n  combined: {}\n"
    alone, combined = load(tmp_path, PRUNED + "matrix: {prune.keep: [16]}\n" + cases)
    assert alone.prune is not None
    assert combined.prune is not None
    assert (alone.prune.sensitivity, alone.prune.fusion) == (None, None)
    assert combined.prune.fusion is not None
    (by_set,) = load(tmp_path, PRUNED, "prune.sensitivity=null")
    assert by_set.prune == alone.prune.model_copy(update={"keep": 32})
    other = "cases: {a: {prune.sensitivity: null, prune.fusion: rank}}\n"
    assert "`fusion` without `sensitivity`" in refused(tmp_path, PRUNED + other)[0]
    swept = load(tmp_path, PRUNED + "matrix: {prune.sensitivity: [null, l2]}\n")
    assert [run.prune and run.prune.fusion is not None for run in swept] == [False, True]


def test_values_from_python_are_refused_alike() -> None:
    plain: dict[str, Any] = {"model": "diagram-llava", "task": "diagramqa"}
    loop: list[Any] = []
    loop.append(loop)
    for wrong in (10**5000, float("nan"), b"x", {1, 2}, loop, object(), "\0"):
        for field in ("model", "seed", "prune", "plugins"):
            with pytest.raises(UserError):
                RunSpec.parse({**plain, field: wrong})
    with pytest.raises(UserError, match="finite number"):
        fusion = {"convex": {"semantic": float("nan")}}
        RunSpec.parse({**plain, "prune": {"method": "cdpruner", "keep": 3, "sensitivity": "l2", "fusion": fusion}})


def test_set_replaces_an_axis_of_the_matrix_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(PRUNED + "matrix: {prune.keep: [64, 32], seed: [0, 1]}\ncases: {a: {}, b: {seed: 3}}\n")
    said: list[str] = []
    runs = load_spec(path, ["prune.keep=16"], say=said.append)
    assert [run.prune and run.prune.keep for run in runs] == [16] * 4
    assert [run.name for run in runs][:2] == ["a seed=0", "a seed=1"]
    assert said == ["--set prune.keep replaces the axis prune.keep of the matrix"]
    assert [run.prune for run in load(tmp_path, PRUNED + "matrix: {prune.keep: [64, 32]}\n", "prune=null")] == [None]


def test_set_never_fails_to_change_anything_in_silence(tmp_path: Path) -> None:
    methods = "matrix: {prune.method: [random, cdpruner]}\n"
    told = refused(tmp_path, PRUNED + methods, "prune.method.cdpruner.relevance_sign=positive")
    assert told[0].startswith("line 4: matrix.prune.method: the matrix sets prune.method as a whole, which undoes")
    own = "cases: {a: {prune.keep: 3}, b: {prune: null}}\n"
    told = refused(tmp_path, PRUNED + own, "prune.keep=16")
    assert told[0].startswith("line 4: cases: --set prune.keep would change no run")
    path = tmp_path / "spec.yaml"
    path.write_text(PRUNED + "cases: {a: {prune.keep: 3}, b: {}}\n")
    said: list[str] = []
    runs = load_spec(path, ["prune.keep=16"], say=said.append)
    assert [run.prune and run.prune.keep for run in runs] == [3, 16]
    assert said == ["--set prune.keep does not reach cases that set it, or a section that it is in, themselves: 'a'"]


def test_every_shipped_spec_says_what_it_is_for() -> None:
    about = {name: about_spec(file) for name, file in shipped_specs().items()}
    assert {"quickstart", "table1", "table2", "scienceqa"} <= about.keys()
    for name, text in about.items():
        assert 20 < len(text) < 250, (name, text)
        assert text[-1] in ".:?", (name, text)


def test_the_table_of_pruners_names_every_registered_one_at_each_budget() -> None:
    ours = {entry.name for entry in pruners if entry.target.__module__.startswith("qapbench.strategies")}
    runs = load_spec(shipped_specs()["table1_pruners"])
    pruned = [(run.prune.method.name, run.prune.keep) for run in runs if run.prune]
    assert sorted(pruned) == sorted(itertools.product(ours, (16, 32, 64)))
    assert [run.name for run in runs if not run.prune] == ["full precision", "W4A4 dense"]
    assert all(run.quantize for run in runs[1:])
    assert all(run.strata == ["needs_image"] for run in runs)
