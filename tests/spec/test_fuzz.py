"""A small sample of the campaign over made-up specs (`python -m benchmarks.fuzz_specs`)."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks.fuzz_specs import PLACED, endings, made_up
from qapbench import UserError, metrics
from qapbench.methods import plugins
from qapbench.spec.spec_file import load_spec


def test_a_sample_of_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metrics.names()  # what is built in is loaded before the entries are copied
    monkeypatch.setattr(metrics, "_entries", dict(metrics._entries))
    monkeypatch.setattr(plugins, "_loaded_files", {})
    before = signal.getsignal(signal.SIGALRM)
    try:
        found = endings(7, range(40), tmp_path, fresh=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    # How long one takes depends on what else the machine does: the campaign itself asks for that.
    assert {ending.kind for ending in found} <= {"valid", "refused", "slow"}
    assert sum(ending.kind == "refused" for ending in found) > 20


def test_specs_are_the_same_for_the_same_seed() -> None:
    assert made_up(0, 5) == made_up(0, 5)
    assert len({made_up(seed, index)[0] for seed in (0, 1) for index in range(10)}) > 15


def test_a_broken_plugin_breaks_only_specs_that_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.names()  # what is built in is loaded before the entries are copied
    monkeypatch.setattr(metrics, "_entries", dict(metrics._entries))
    monkeypatch.setattr(plugins, "_loaded_files", {})
    good = "from qapbench import metric\n\n@metric('of_{0}')\ndef of_{0}(tokens):\n    return tokens.mean(dim=-1)\n"
    (tmp_path / "good.py").write_text(good.format("good"))
    broken = {
        "half.py": good.format("half") + "raise RuntimeError\n",
        "syntax.py": "def (:\n",
        "beside.py": "import syntax\n",
        "nul.py": "x = 1\0\n",
        "exits.py": good.format("exit") + "raise SystemExit(2)\n",
    }
    text = "model: diagram-llava\ntask: diagramqa\nprune: {method: cdpruner, keep: 3, sensitivity: of_good}\n"
    for name, source in broken.items():
        (tmp_path / name).write_text(source)
        path = tmp_path / "spec.yaml"
        path.write_text(f"{text}plugins: [good.py, {name}]\n")
        with pytest.raises(UserError) as caught:
            load_spec(path)
        told = [str(problem) for problem in caught.value.problems]
        assert len(told) == 1
        assert PLACED.match(told[0])
        assert "line 4: plugins.1: " in told[0]
        path.write_text(f"{text}plugins: [good.py]\n")
        assert len(load_spec(path)) == 1
    assert not {"of_half", "of_exit"} & set(metrics.names())


def test_every_problem_is_one_line_whatever_a_name_holds(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    for name in ("noise:\n  seed: 0\n", "a\rb", "a\u2028b"):
        data = {"model": name, "task": name, "prune": {"method": name, "keep": 3, "sensitivity": name}}
        path.write_text(json.dumps(data))
        with pytest.raises(UserError) as caught:
            load_spec(path)
        assert len(caught.value.problems) >= 2
        assert all(len(str(problem).splitlines()) == 1 for problem in caught.value.problems)


def test_a_plugin_is_looked_at_once_for_all_runs_of_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for what it imports beside itself costs milliseconds, and a spec may have thousands of runs."""
    metrics.names()
    monkeypatch.setattr(plugins, "_loaded_files", {})
    (tmp_path / "good.py").write_text("import json\n")
    looked: list[dict[str, Path]] = []
    digest = plugins.digest_files
    monkeypatch.setattr(plugins, "digest_files", lambda files: looked.append(files) or digest(files))
    path = tmp_path / "spec.yaml"
    spec = {"model": "diagram-llava", "task": "diagramqa", "plugins": ["good.py"], "matrix": {"seed": [*range(30)]}}
    path.write_text(json.dumps(spec))
    assert len(load_spec(path)) == 30
    assert len(looked) == 1


@pytest.mark.parametrize("field", ["", " ame", "ame\t", "a\nb", "\u202ename", "\u00a0"])
def test_a_field_whose_name_cannot_be_seen_is_shown(field: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({"model": "diagram-llava", "task": "diagramqa", field: 1}))
    with pytest.raises(UserError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"line 1: {field!a}: unknown field")
