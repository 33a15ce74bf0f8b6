"""Installed plugins: one that breaks is warned of by name and place, and takes nothing else with it."""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from qapbench import UserError, fusions, metrics, pruners
from qapbench.methods import plugins
from qapbench.methods.plugins import BrokenPluginWarning, broken_plugins, load_plugins
from qapbench.models.family import families
from qapbench.tasking.registry import tasks

GOOD = '''
from qapbench import metric


@metric("of-the-good-plugin")
def of_the_good_plugin(tokens):
    """The first channel."""
    return tokens[..., 0]
'''
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs modules, given as name -> source, as plugins in that order, before qapbench's own."""
    load_plugins()
    ours = importlib.metadata.entry_points(group=plugins.ENTRY_POINTS)
    before = set(sys.modules)
    monkeypatch.setattr(plugins, "_broken", {})
    monkeypatch.setattr(metrics, "_entries", dict(metrics._entries))
    monkeypatch.syspath_prepend(tmp_path)

    def put(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        points = [EntryPoint(f"plugin-{name}", name, plugins.ENTRY_POINTS) for name in sources]

        def entry_points(**which: Any) -> list[EntryPoint]:
            assert which == {"group": plugins.ENTRY_POINTS}
            return [*points, *ours]

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        load_plugins.cache_clear()

    yield put
    load_plugins.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "source, said, line",
    [
        ("import os\n\nimport no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module", 3),
        ("x = 1\n\n\ndef f(:\n    pass\n", "SyntaxError: ", 4),
        ("def fail():\n    raise ValueError('no GPU\\nhere')\n\n\nfail()\n", "ValueError: no GPU", 2),
        ("import sys\n\nsys.exit('not on this machine')\n", "SystemExit: not on this machine", 3),
    ],
    ids=["import", "syntax", "error", "exit"],
)
def test_a_broken_plugin_is_warned_of_and_leaves_the_others(
    source: str, said: str, line: int, install: Install, tmp_path: Path
) -> None:
    install({"broken_one": source, "good_one": GOOD})
    with pytest.warns(BrokenPluginWarning) as caught:
        names = metrics.names()
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"plugin 'plugin-broken_one' (broken_one) failed to load: {said}")
    assert "\n" not in message
    assert message.endswith(f"({tmp_path / 'broken_one.py'}:{line})")
    assert {"of-the-good-plugin", "l2"} <= set(names)
    assert metrics.create("of-the-good-plugin")(torch.ones(1, 2, 3)).tolist() == [[1, 1]]
    assert "cdpruner" in pruners
    assert "llava" in families
    assert list(broken_plugins()) == ["plugin-broken_one"]


def test_a_lookup_of_an_unknown_name_mentions_what_is_broken(install: Install, tmp_path: Path) -> None:
    """In every registry: any of them may hold what the plugin would have brought. A known name is found as ever."""
    install({"broken_one": "import no_such_module_at_all\n", "broken_two": "def f(:\n"})
    with pytest.warns(BrokenPluginWarning) as caught:
        load_plugins()
    assert len(caught) == 2
    for registry in (pruners, fusions, families):
        with pytest.raises(UserError, match=f"no {registry.kind} 'xyzzy'; ") as refused:
            registry.create("xyzzy")
        message = str(refused.value)
        assert "; plugin 'plugin-broken_one' failed to load: ModuleNotFoundError" in message
        assert f"{tmp_path / 'broken_one.py'}:1" in message
        assert "; plugin 'plugin-broken_two' failed to load: SyntaxError" in message
        assert f"{tmp_path / 'broken_two.py'}:1" in message
    assert pruners.create("random")


def test_plugins_are_loaded_and_warned_of_once(install: Install, recwarn: pytest.WarningsRecorder) -> None:
    install({"broken_one": "raise RuntimeError('no')\n"})
    for _ in range(3):
        metrics.names()
        families.names()
    assert len([warning for warning in recwarn if warning.category is BrokenPluginWarning]) == 1


def test_what_is_not_there_at_all(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point whose module, or whose object in it, does not exist: no line to name, the plugin all the same."""
    install({"good_one": GOOD})
    points = importlib.metadata.entry_points(group=plugins.ENTRY_POINTS)
    absent = [EntryPoint("absent", "nowhere_at_all", "g"), EntryPoint("half", "good_one:absent", "g")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [*absent, *points])
    with pytest.warns(BrokenPluginWarning):
        load_plugins()
    found = broken_plugins()
    assert list(found) == ["absent", "half"]
    assert "ModuleNotFoundError: No module named 'nowhere_at_all'" in found["absent"]
    assert "AttributeError" in found["half"]
    assert "of-the-good-plugin" in metrics


@pytest.mark.parametrize("end", ["raise RuntimeError('no')", "import sys\nsys.exit(3)", "import no_such_module_at_all"])
def test_what_a_plugin_registered_before_it_failed_is_taken_back(end: str, install: Install) -> None:
    """All of it, also what it overwrote or what its helpers registered; what another plugin brings stays."""
    half = GOOD.replace("of-the-good-plugin", "of-the-half-plugin").replace("of_the_good", "of_the_half")
    helper = GOOD.replace("of-the-good-plugin", "of-the-helper").replace("of_the_good", "of_the_helper")
    install({"half_one": f"import good_one, helper_of_half\n{half}\n\n{end}\n", "good_one": GOOD})
    Path(sys.path[0], "helper_of_half.py").write_text(helper)
    with pytest.warns(BrokenPluginWarning):
        names = metrics.names()
    assert "of-the-half-plugin" not in names
    assert "of-the-helper" not in names
    assert {"of-the-good-plugin", "l2"} <= set(names)  # half_one imported it first
    assert list(broken_plugins()) == ["plugin-half_one"]
    with pytest.raises(UserError, match=r"no metric 'of-the-half-plugin'; .*plugin 'plugin-half_one' failed to load"):
        metrics.create("of-the-half-plugin")


def test_what_a_failing_plugin_registers_of_somebody_elses_code_leaves_that_code_alone(install: Install) -> None:
    before = sys.modules["colorsys"] = importlib.import_module("colorsys")
    source = (
        "import colorsys\nfrom qapbench import task\n\ntask('hues')(colorsys.rgb_to_hls)\nraise RuntimeError('no')\n"
    )
    install({"half_one": source})
    with pytest.warns(BrokenPluginWarning):
        assert "hues" not in tasks.names()
    assert sys.modules["colorsys"] is before


def test_without_broken_plugins_nothing_is_said(install: Install, recwarn: pytest.WarningsRecorder) -> None:
    install({"good_one": GOOD})
    with pytest.raises(UserError) as refused:
        pruners.create("xyzzy")
    assert "plugin" not in str(refused.value)
    assert not [warning for warning in recwarn if warning.category is BrokenPluginWarning]
    assert broken_plugins() == {}
