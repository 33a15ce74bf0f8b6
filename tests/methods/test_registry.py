"""The registry itself: collisions, suggestions, typed parameters, plugin files."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from qapbench import Pruner, UserError, metrics, pruner, pruners, ptq, quantizer
from qapbench.errors import nearest
from qapbench.methods import plugins
from qapbench.methods.plugins import load_plugin_file
from qapbench.methods.registry import Registry


def toys(check: Callable[[Any], None] = lambda target: None) -> Registry[Any]:
    """An empty registry of functions of one positional argument."""
    return Registry("toy", lambda entry, params: lambda x: entry.target(x, **params), check, positional=1)


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    metrics.names()
    for held in (metrics, pruners):
        monkeypatch.setattr(held, "_entries", dict(held._entries))
    monkeypatch.setattr(plugins, "_loaded_files", {})
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.startswith("qapbench_plugin_"):
            del sys.modules[name]


def test_parameters_become_the_spec() -> None:
    items = toys()

    @items.register("scale")
    def scale(x: float, by: Annotated[float, Field(gt=0)] = 2.0, how: Literal["up", "down"] = "up") -> float:
        """Multiply, or divide."""
        return x * by if how == "up" else x / by

    assert items.names() == ["scale"]
    assert "scale" in items
    assert items.create("scale")(3.0) == 6.0
    assert items.create("scale", by=4, how="down")(8.0) == 2.0
    assert items.validate("scale", {"by": 3}) == {"by": 3.0, "how": "up"}
    described = items.describe("scale")
    assert described["doc"] == "Multiply, or divide."
    assert list(described["parameters"]) == ["by", "how"]
    assert "test_registry.py:" in described["origin"]
    assert items.entry("scale").source == Path(__file__)


def test_every_mistake_in_one_error() -> None:
    items = toys()

    @items.register("scale")
    def scale(x: float, by: Annotated[float, Field(gt=0)] = 2.0, times: int = 1) -> float:
        return x * by * times

    with pytest.raises(UserError) as caught:
        items.create("scale", by=-1.0, times="2", tims=3)
    assert len(caught.value.problems) == 3
    assert {problem.where for problem in caught.value.problems} == {("by",), ("times",), ("tims",)}
    assert "tims: unknown field of toy 'scale'; did you mean 'times'?" in str(caught.value)


def test_required_parameter() -> None:
    items = toys()

    @items.register("power")
    def power(x: float, exponent: int) -> float:
        return x**exponent

    with pytest.raises(UserError, match="exponent: this field is required"):
        items.create("power")
    assert items.create("power", exponent=2)(3.0) == 9.0


def test_collision_names_both_origins() -> None:
    items = toys()

    @items.register("same")
    def first(x: float) -> float:
        return x

    with pytest.raises(UserError) as caught:

        @items.register("same")
        def second(x: float) -> float:
            return -x

    message = str(caught.value)
    assert "toy 'same' is registered twice" in message
    assert message.count("test_registry.py:") == 2
    assert "first" in message
    assert "second" in message
    assert items.create("same")(1.0) == 1.0, "the first one stays"


def test_the_same_definition_twice_is_no_collision() -> None:
    items = toys()

    def one(x: float) -> float:
        return x

    items.register("one")(one)
    items.register("one")(one)
    assert items.names() == ["one"]


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="no metric 'outlier_intensty'; did you mean 'outlier_intensity'"):
        metrics.create("outlier_intensty")
    with pytest.raises(UserError, match=r"no pruner 'xyzzy'; valid: attention, .*cdpruner.* and \d+ more"):
        pruners.create("xyzzy")
    assert "xyzzy" not in pruners
    assert nearest("a", []) == "there are none"


def test_variadic_parameters_cannot_be_a_spec() -> None:
    with pytest.raises(TypeError, match=r"\*args and \*\*kwargs"):

        @toys().register("any")
        def anything(x: float, **options: float) -> float:
            return x


def test_wrong_targets_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"a pruner must be a subclass of qapbench\.Pruner"):
        pruner("not-one")(object)
    with pytest.raises(TypeError, match=r"a ptq must be a subclass of qapbench\.PTQ"):
        ptq("not-one")(lambda: None)

    @dataclass(frozen=True)
    class Uncallable:
        bits: int = 4

    with pytest.raises(TypeError, match="class with __call__"):
        quantizer("not-one")(Uncallable)
    assert "not-one" not in pruners


def test_a_metric_that_returns_the_wrong_thing_is_named(own_registries: None) -> None:
    metrics.register("flat")(lambda tokens: tokens.sum())
    with pytest.raises(UserError, match=r"metric 'flat': must return \[B, N\] = \(2, 3\), got \(\)"):
        metrics.create("flat")(torch.ones(2, 3, 4))
    metrics.register("text")(lambda tokens: "high")
    with pytest.raises(UserError, match=r"metric 'text': must return \[B, N\] = \(2, 3\), got str"):
        metrics.create("text")(torch.ones(2, 3, 4))
    metrics.register("log")(lambda tokens: tokens.sum(dim=-1).log())
    with pytest.raises(UserError, match="metric 'log': scores: 6 of 6 values are not finite"):
        metrics.create("log")(torch.zeros(2, 3, 4))


PLUGIN = '''
from dataclasses import dataclass

from qapbench import Pruner, Selection, metric, pruner


@metric("{name}")
def first_channel(tokens, channel: int = 0):
    """One channel of each token."""
    return tokens[..., channel]


@pruner("{name}-first")
@dataclass(frozen=True)
class First(Pruner):
    """The first tokens."""

    def choose(self, tokens, scores, keep):
        return Selection(scores.argsort(dim=-1, stable=True)[:, :keep])
'''


def plugin(folder: Path, name: str, stem: str = "mine") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{stem}.py"
    file.write_text(PLUGIN.format(name=name))
    return file


def test_plugin_file(tmp_path: Path, own_registries: None) -> None:
    file = plugin(tmp_path, "channel")
    load_plugin_file(file)
    load_plugin_file(str(file))  # a second time does nothing
    assert metrics.create("channel", channel=1)(torch.arange(6.0).view(1, 3, 2)).tolist() == [[1, 3, 5]]
    assert metrics.entry("channel").source == file
    assert isinstance(pruners.create("channel-first"), Pruner)
    with pytest.raises(UserError, match="did you mean 'channel'"):
        metrics.create("channel", chanel=1)


def test_plugin_files_of_one_name_keep_their_sources(tmp_path: Path, own_registries: None) -> None:
    """The source is part of a result's key: it must be the file that defines the item."""
    files = {name: plugin(tmp_path / name, name) for name in ("one", "two")}
    for file in files.values():
        load_plugin_file(file)
    for name, file in files.items():
        assert metrics.entry(name).source == file
        assert pruners.entry(f"{name}-first").source == file


def test_plugin_collision_names_both_files(tmp_path: Path, own_registries: None) -> None:
    ours, theirs = plugin(tmp_path / "a", "taken"), plugin(tmp_path / "b", "taken")
    load_plugin_file(ours)
    with pytest.raises(UserError, match="registered twice") as caught:
        load_plugin_file(theirs)
    assert str(ours) in str(caught.value)
    assert str(theirs) in str(caught.value)
    with pytest.raises(UserError, match="metric 'l2' is registered twice"):
        load_plugin_file(plugin(tmp_path / "c", "l2"))


def test_plugin_that_fails(tmp_path: Path, own_registries: None) -> None:
    with pytest.raises(UserError, match="no such plugin file"):
        load_plugin_file(tmp_path / "absent.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_at_all\n")
    with pytest.raises(UserError, match=r"broken\.py failed to load: ModuleNotFoundError"):
        load_plugin_file(broken)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UserError, match=r"must be a Python file"):
        load_plugin_file(text)


def test_a_class_that_is_not_finished_is_refused() -> None:
    with pytest.raises(TypeError, match="Unfinished is no pruner yet: it does not define choose"):

        @pruner("unfinished")
        @dataclass(frozen=True)
        class Unfinished(Pruner):
            """Chooses nothing."""


def test_a_plugin_whose_helper_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is what was hashed: an edited helper would otherwise answer under the new code's id."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "edited_helper.py").write_text("K = 1\n")
    file = tmp_path / "helped.py"
    file.write_text("import edited_helper\n")
    load_plugin_file(file)
    load_plugin_file(file)
    (tmp_path / "edited_helper.py").write_text("K = 2\n")
    with pytest.raises(UserError, match="changed since this process loaded it"):
        load_plugin_file(file)
