"""What a shell offers when the tab key is pressed."""

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from qapbench import pruners
from qapbench.cli import app, completion
from qapbench.spec.spec_file import shipped_specs


def test_names_that_begin_so() -> None:
    assert completion.specs("quick") == ["quickstart"]
    assert completion.specs("") == sorted(shipped_specs())
    assert completion.kinds("pr") == ["pruner"]


@pytest.mark.parametrize("kind", ["pruner", "pruners"])
def test_items_of_the_kind_before(kind: str) -> None:
    context: Any = SimpleNamespace(params={"kind": kind})
    assert completion.items(context, "") == pruners.names()
    assert completion.items(context, "vision") == ["visionzip"]


def test_no_kind_offers_nothing() -> None:
    context: Any = SimpleNamespace(params={"kind": None})
    assert completion.items(context, "") == []


def test_the_shell_reaches_them() -> None:
    asked = {"_QAPBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "qapbench show pruner visionz", "COMP_CWORD": "3"}
    assert CliRunner().invoke(app, [], prog_name="qapbench", env=asked).stdout.split() == ["visionzip"]
