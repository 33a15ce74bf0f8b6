"""What makes a run another run: the content that it reads, the code and the libraries; and what does not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from llava_checkpoints import save_clip
from run_questions import QUESTIONS, row

from qapbench import RunSpec, UserError, hashing, metrics, run
from qapbench.analysis.sensitivity import studies_of
from qapbench.hashing import LIBRARIES, digest_code, digest_file
from qapbench.methods import plugins
from qapbench.methods.kinds import pruners, ptqs
from qapbench.models.relevance import find_tower, load_tower
from qapbench.running import fingerprints
from qapbench.running.plan import Planned
from qapbench.running.planner import Planner

Spec = Callable[..., dict[str, Any]]
Plan = Callable[..., Planned]
ROOT = Path(__file__).parents[2]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
PRUNE = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
FORMAT = {"bits": 8, "symmetric": True}


@pytest.fixture
def plan(spec_of: Spec, tmp_path: Path) -> Plan:
    """The plan of a spec, by a planner that knows nothing from before."""

    def make(**fields: Any) -> Planned:
        data = {**spec_of(task=fields.pop("task", {})), **fields}
        return Planner(tmp_path / "runs", torch.device("cpu")).plan(RunSpec.parse(data))

    return make


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.parquet"
    pd.DataFrame([row(index) for index in range(20, 28)]).to_parquet(path)
    return path


def calibrated(train: Path, pruned: bool) -> dict[str, Any]:
    calibration = {"samples": 4, "data": str(train), "pruned": pruned}
    return {"method": "smoothquant", "weights": FORMAT, "activations": FORMAT, "calibration": calibration}


# -- code --

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # a file, a run that it belongs to, a run that it does not
    ("strategies/pruners/cdpruner.py", {"prune": PRUNE}, {"prune": {"method": "random", "keep": 5}}),
    ("strategies/pruners/dpp.py", {"prune": PRUNE}, {"prune": {"method": "random", "keep": 5}}),
    ("strategies/metrics/combined.py", {"prune": PRUNE}, {"prune": {**PRUNE, "sensitivity": "l2"}}),
    ("strategies/fusions/score.py", {"prune": PRUNE}, {"prune": {**PRUNE, "fusion": "rank"}}),
    ("strategies/ptq/rtn.py", {"quantize": W4A4}, {}),
    ("qapbench/methods/affine.py", {"quantize": W4A4}, {}),
    ("qapbench/methods/kinds.py", {"prune": {"method": "random", "keep": 5}}, {}),
]


def change(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a file of the project have another content, as far as any hash can tell."""
    file = (ROOT / name).resolve()
    assert file.is_file()
    monkeypatch.setattr(hashing, "digest_file", lambda path: "0" * 64 if path.resolve() == file else digest_file(path))


@pytest.mark.parametrize(("file", "mine", "other"), CASES, ids=[case[0] for case in CASES])
def test_the_id_follows_the_code_that_a_named_item_imports(
    file: str, mine: dict[str, Any], other: dict[str, Any], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, untouched = plan(**mine).id, plan(**other).id
    change(monkeypatch, file)
    assert plan(**mine).id != before
    assert plan(**other).id == untouched


@pytest.mark.parametrize(
    "file",
    [
        "qapbench/models/families/llava.py",
        "qapbench/models/tower.py",
        "tasks/multichoice.py",
        "tasks/multichoice.yaml",
        "tasks/scienceqa/scienceqa.yaml",
        "tasks/scienceqa/scienceqa_letter.yaml",
    ],
)
def test_the_id_of_every_run_follows_family_and_task(file: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [plan(), plan(quantize=W4A4)]
    change(monkeypatch, file)
    after = [plan(), plan(quantize=W4A4)]
    for old, new in zip(before, after, strict=True):
        assert old.id != new.id
        assert old.text_key != new.text_key
        assert old.group != new.group


@pytest.mark.parametrize(
    "file",
    [
        "leaderboard/builder.py",
        "qapbench/cli/running.py",
        "qapbench/analysis/explain.py",
        "qapbench/records/load.py",
        "qapbench/__init__.py",
        "strategies/pruners/visionzip.py",
        "strategies/ptq/gptq.py",
        "tasks/diagramqa/diagramqa.yaml",
    ],
)
def test_no_id_follows_code_that_a_run_has_nothing_to_do_with(
    file: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan(quantize=W4A4, prune=PRUNE)
    change(monkeypatch, file)
    after = plan(quantize=W4A4, prune=PRUNE)
    assert (after.id, after.text_key, after.group) == (before.id, before.text_key, before.group)
    assert after.fingerprints == before.fingerprints


def test_calibrating_methods_follow_the_calibrations_code(
    train: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = calibrated(train, pruned=False)
    before, plain = plan(quantize=quantize), plan(quantize=W4A4)
    change(monkeypatch, "qapbench/quantize/calibration/blocks.py")
    assert plan(quantize=quantize).id != before.id
    assert plan(quantize=W4A4).id == plain.id


PLUGIN = '''from qapbench import metric
from {helper} import power

@metric("{name}")
def {name}(tokens):
    """Mean over channels of |x| to a power that stands in another file."""
    return (tokens.abs() ** power()).mean(dim=-1)
'''


@pytest.fixture
def write_plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Writes a plugin with a helper beside it; what it registers is forgotten after the test."""
    monkeypatch.setattr(metrics, "_entries", dict(metrics._entries))

    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / "identity_helper.py").write_text("def power():\n    return 2\n")
        (folder / "identity_metric.py").write_text(PLUGIN.format(helper="identity_helper", name="helped"))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "identity_helper", raising=False)
        return folder / "identity_metric.py"

    return write


def test_the_id_follows_a_plugin_and_what_it_imports(
    write_plugin: Callable[[Path], Path], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = write_plugin(tmp_path / "mine")
    fields = {"plugins": [str(plugin)], "prune": {**PRUNE, "sensitivity": "helped"}}
    before, dense = plan(**fields), plan()
    assert {"plugin 0 identity_metric.py", "metric helped"} <= before.fingerprints.keys()
    (plugin.parent / "beside.py").write_text("nobody = 'imports me'\n")
    assert plan(**fields).id == before.id
    (plugin.parent / "identity_helper.py").write_text("def power():\n    return 3\n")
    with pytest.raises(UserError, match="changed since this process loaded it"):
        plan(**fields)  # what is in memory is the old code
    monkeypatch.setattr(plugins, "_loaded_files", {})  # as in another process
    metrics._entries.pop("helped", None)
    after = plan(**fields)
    assert after.id != before.id
    changed = {name for name, value in after.fingerprints.items() if before.fingerprints[name] != value}
    assert changed == {"plugin 0 identity_metric.py", "metric helped"}
    assert after.text_key == before.text_key  # a pruner has no say in questions without an image
    assert plan().id == dense.id


def test_a_plugin_that_was_moved_keeps_its_results(
    write_plugin: Callable[[Path], Path], plan: Plan, tmp_path: Path
) -> None:
    found = []
    for name in ("here", "there"):
        plugin = write_plugin(tmp_path / name)
        metrics._entries.pop("helped", None)  # as in another process
        found.append(plan(plugins=[str(plugin)], prune={**PRUNE, "sensitivity": "helped"}).id)
    assert found[0] == found[1]


def test_the_code_of_every_method_is_hashed_with_what_it_imports() -> None:
    """No two methods of a kind share a hash, as each has a file of its own, and each is the same again."""
    for registry in (pruners, ptqs, metrics):
        digests = {entry.name: digest_code(entry.target) for entry in registry}
        assert digests == {entry.name: digest_code(entry.target) for entry in registry}
        files = {entry.source for entry in registry}
        assert len(set(digests.values())) == len(files)


# -- libraries --


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_id_follows_the_version_of_a_library(library: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(quantize=W4A4, prune=PRUNE)
    versions = hashing.library_versions()
    assert set(versions) == {"library torch", "library transformers", "library lm-eval"}
    assert versions["library torch"] == torch.__version__
    monkeypatch.setattr(fingerprints, "library_versions", lambda: {**versions, f"library {library}": "99.0"})
    after = plan(quantize=W4A4, prune=PRUNE)
    assert after.id != before.id
    assert after.text_key != before.text_key
    assert after.group != before.group
    assert after.fingerprints[f"library {library}"] == "99.0"


def test_a_library_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "LIBRARIES", ("torch", "no-such-package"))
    assert hashing.library_versions()["library no-such-package"] == "not installed"


# -- content --


def test_the_id_follows_the_text_tower(plan: Plan, tmp_path: Path, tiny_model: Path) -> None:
    own, other = plan(prune=PRUNE), save_clip(tmp_path / "other", seed=7)
    named = plan(prune=PRUNE, text_tower=str(other))
    assert named.fingerprints["text_tower"] != own.fingerprints["text_tower"]
    assert named.id != own.id
    assert (named.text_key, named.group) == (own.text_key, own.group)
    moved = shutil.copytree(tiny_model / "clip", tmp_path / "moved")
    assert plan(prune=PRUNE, text_tower=str(moved)).id == own.id
    blind = {"method": "random", "keep": 5}  # reads no question, so no tower
    assert plan(prune=blind, text_tower=str(other)).id == plan(prune=blind).id
    assert "text_tower" not in plan(prune=blind).fingerprints


def test_names_and_paths_do_not_enter(plan: Plan, tmp_path: Path, tiny_model: Path, questions: Path) -> None:
    first = plan(quantize=W4A4, prune=PRUNE)
    model = shutil.copytree(tiny_model, tmp_path / "another name")
    (model / "README.md").write_text("nothing is loaded from me")
    data = shutil.copy(questions, tmp_path / "another name.parquet")
    same = plan(name="another label", model=str(model), task={"data": str(data)}, quantize=W4A4, prune=PRUNE)
    assert (same.id, same.text_key, same.group) == (first.id, first.text_key, first.group)
    assert same.spec.name == "another label"
    assert same.fingerprints == first.fingerprints


def test_what_is_written_out_is_what_is_meant(plan: Plan) -> None:
    """Defaults by name, equal numbers, the order of a scope: the same run."""
    first = plan(quantize=W4A4, prune=PRUNE)
    written = {**PRUNE, "fusion": {"convex": {}}, "per": "tile", "positions": "compact"}
    spelled = {**W4A4, "scope": ["language"], "backend": "simulate"}
    task = {"limit": QUESTIONS, "prompt": "cqm_a", "answers": "letter"}
    assert plan(quantize=spelled, prune=written, task=task, dtype="float32", seed=0).id == first.id
    assert plan(task={"limit": QUESTIONS + 100}).id == plan().id
    scopes = [plan(quantize={**W4A4, "scope": scope}).id for scope in (["vision", "language"], ["language", "vision"])]
    assert scopes[0] == scopes[1]


def test_everything_else_that_is_asked_enters(plan: Plan) -> None:
    base: dict[str, Any] = {"quantize": W4A4, "prune": PRUNE}
    variants: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"dtype": "bfloat16"},
        *({"task": task} for task in ({"limit": 3}, {"answers": "generate"}, {"prompt": "qcm_lea"})),
        *({"quantize": {**W4A4, **more}} for more in ({"scope": ["vision"]}, {"weights": FORMAT}, {"method": "quip"})),
        {"quantize": None},
        *({"prune": {**PRUNE, **more}} for more in ({"keep": 6}, {"per": "image"}, {"positions": "keep"})),
        {"prune": {**PRUNE, "fusion": {"convex": {"semantic": 0.4}}}},
        {"prune": {**PRUNE, "method": {"cdpruner": {"relevance_sign": "positive"}}}},
        {"prune": None},
    ]
    ids = [plan(**{**base, **variant}).id for variant in variants]
    assert len(set(ids)) == len(variants)


# -- what runs share --


def test_text_answers_and_groups_are_shared_over_pruners(plan: Plan) -> None:
    dense = plan(quantize=W4A4)
    for prune in (PRUNE, {"method": "visionzip", "keep": 3}, {"method": "fastv", "keep": 5}):
        pruned = plan(quantize=W4A4, prune=prune)
        assert pruned.id != dense.id
        assert (pruned.text_key, pruned.group) == (dense.text_key, dense.group)
    assert dense.text_key == dense.id
    assert plan().group != dense.group


@pytest.mark.parametrize("pruned", [False, True])
def test_where_calibration_prunes_the_group_follows_the_pruner(
    pruned: bool, train: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = calibrated(train, pruned)
    prunes = [PRUNE, {**PRUNE, "keep": 6}, {**PRUNE, "sensitivity": "l2"}, {"method": "random", "keep": 5}]
    plans = [plan(quantize=quantize, prune=prune) for prune in prunes]
    assert len({one.id for one in plans}) == len(prunes)
    assert len({one.group for one in plans}) == (len(prunes) if pruned else 1)
    assert len({one.text_key for one in plans}) == (len(prunes) if pruned else 1)
    towered = plan(quantize=quantize, prune=PRUNE, text_tower=str(save_clip(tmp_path / "other", seed=7)))
    assert (towered.group != plans[0].group) == pruned
    change(monkeypatch, "strategies/pruners/dpp.py")
    again = plan(quantize=quantize, prune=PRUNE)
    assert again.id != plans[0].id
    assert (again.group != plans[0].group) == pruned
    assert (again.text_key != plans[0].text_key) == pruned


def test_the_group_follows_the_samples(train: Path, plan: Plan, tmp_path: Path) -> None:
    first = plan(quantize=calibrated(train, pruned=False))
    moved = shutil.copy(train, tmp_path / "moved.parquet")
    same = plan(quantize=calibrated(Path(moved), pruned=False))
    assert (same.id, same.fingerprints) == (first.id, first.fingerprints)
    pd.DataFrame([row(index) for index in range(40, 48)]).to_parquet(tmp_path / "others.parquet")
    other = plan(quantize=calibrated(tmp_path / "others.parquet", pruned=False))
    assert other.id != first.id
    assert other.group != first.group


def test_the_sign_of_the_text_tower_enters(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it comes from the table of known towers, whose change no hash of the tower would tell."""
    from qapbench.models import relevance_sign

    tower = save_clip(tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text())
    del config["relevance_sign"]
    (tower / "config.json").write_text(json.dumps({**config, "_name_or_path": "some/tower"}))
    first = plan(prune=PRUNE, text_tower=str(tower))
    assert first.fingerprints["text_tower sign"] == "negative"
    monkeypatch.setitem(relevance_sign.KNOWN, "some/tower", "positive")
    again = plan(prune=PRUNE, text_tower=str(tower))
    assert again.fingerprints["text_tower sign"] == "positive"
    assert (again.id != first.id, again.text_key) == (True, first.text_key)


# -- what a process keeps --


def test_fresh_answers_anew_where_a_sibling_has_the_answers(spec_of: Spec, tmp_path: Path) -> None:
    """Two pruners that keep everything choose equal tokens, so the second run can take the answers of the first."""
    first, second = (RunSpec.parse(spec_of(prune={"method": name, "keep": 16})) for name in ("random", "attention"))
    runs = tmp_path / "runs"
    (alone,) = run(first, runs)
    (shared,) = run(second, runs)
    assert shared.timing.computed < alone.timing.computed
    (anew,) = run(second, runs, fresh=True)
    assert anew.timing.computed == alone.timing.computed
    assert anew.scores == shared.scores


def test_a_checkpoint_that_changes_in_place_is_another_one_in_the_same_process(
    plan: Plan, tmp_path: Path, tiny_model: Path
) -> None:
    model, clip = (
        shutil.copytree(tiny_model, tmp_path / "model"),
        shutil.copytree(tiny_model / "clip", tmp_path / "clip"),
    )
    fields = {"model": str(model), "text_tower": str(clip), "prune": PRUNE}
    before, tower = plan(**fields), load_tower(clip, 32, torch.device("cpu"))
    assert plan(**fields).id == before.id
    assert load_tower(clip, 32, torch.device("cpu")) is tower
    save_clip(clip, seed=7)
    after = plan(**fields)
    assert after.id != before.id
    assert after.fingerprints["model"] == before.fingerprints["model"]
    assert load_tower(clip, 32, torch.device("cpu")) is not tower
    (model / "generation_config.json").write_text('{"max_length": 77}')
    assert plan(**fields).fingerprints["model"] != before.fingerprints["model"]


def test_a_tower_that_is_put_beside_a_model_is_found_in_the_same_process(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "clip")
    assert find_tower(None, str(model), None)[0] is None
    shutil.copytree(tiny_model / "clip", model / "clip")
    assert find_tower(None, str(model), None)[0] == model / "clip"


def test_the_id_of_a_study_follows_the_code_of_metrics_and_pruners(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (study,) = studies_of([RunSpec.parse(spec_of(quantize=W4A4, prune=PRUNE))], sample=2)

    def content() -> dict[str, str]:
        planner = Planner(tmp_path / "runs", torch.device("cpu"))
        return study._content(planner, planner.plan(study.spec))

    before = content()
    for file, changed in (
        ("strategies/metrics/norms.py", {"metric l1", "metric l2", "metric linf"}),
        ("strategies/pruners/dpp.py", {"pruner cdpruner"}),
    ):
        with monkeypatch.context() as patch:
            change(patch, file)
            assert {name for name, value in content().items() if before[name] != value} == changed
