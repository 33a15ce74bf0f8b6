"""The mistakes that the mutation campaign makes: one place each, all of them Python, none in text."""

import ast
import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from benchmarks import mutations
from benchmarks.mutants import mutants

ROOT = Path(__file__).parents[1]


def changed(source: str) -> set[str]:
    """The lines that stand in the mutants of a source and not in it."""
    return {line[1:].strip() for one in mutants(source, "x.py") for line in one.diff(source) if line[0] == "+"}


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("a = b < c", {"a = b <= c"}),
        ("a = (b) >= (c)", {"a = (b) > (c)"}),
        ("a = b is not None", {"a = b is None"}),
        ("a = b + (c * d)", {"a = b - (c * d)", "a = b + (c / d)"}),
        ("a -= b", {"a += b"}),
        ("a = b and c", {"a = b or c"}),
        ("a = not b", {"a = b"}),
        ("a = [3, 0.5, True]", {"a = [4, 0.5, True]", "a = [3, 1.0, True]", "a = [3, 0.5, False]"}),
        ("a = min(b, c)", {"a = max(b, c)"}),
        ("a = b.clamp(min=c)", {"a = b", "a = b.clamp()"}),
        ("a = f(b, c=d)", {"a = f(b)"}),
        ("a = f(c=d, e=g)", {"a = f(e=g)", "a = f(c=d)"}),
        ("a = 'ü' if b else c", {"a = 'ü' if not (b) else c"}),
        ("f(a)", {"pass"}),
        ("raise ValueError(1 + 2)", set()),
        ("a = f'{b + 1}'", set()),
        ("'''1 < 2'''", set()),
        ("import os", set()),
    ],
)
def test_the_mistakes_of_a_line(line: str, wanted: set[str]) -> None:
    assert changed(line + "\n") == wanted


def test_text_annotations_and_decorators_stay() -> None:
    source = '@d(1)\ndef f(a: "Literal[1]" = 2) -> Annotated[int, 3]:\n    """One < two."""\n    return a\n'
    assert changed(source) == {'def f(a: "Literal[1]" = 3) -> Annotated[int, 3]:'}


def test_every_drawn_mutant_is_one_change_that_has_tests() -> None:
    """The draw is the same for a seed, takes each group in turn, and names files that exist."""
    chosen, same, other = (list(itertools.islice(mutations.drawn(ROOT, seed), 10)) for seed in (0, 0, 1))
    assert chosen == same != other
    turn = [mutations.group_of(one.file, ROOT) for one in chosen[: len(mutations.GROUPS)]]
    assert turn == list(mutations.GROUPS.values())
    for one in chosen:
        source = (ROOT / one.file).read_text(encoding="utf-8")
        ast.parse(one.applied(source))
        assert one.diff(source)
        close, others = mutations.tests_of(one.file, ROOT)
        assert close + others
        assert not set(close) & set(others)
        assert all((ROOT / test).is_file() for test in close + others)


def test_reasons_are_about_lines_that_exist() -> None:
    for (file, original, _), reason in mutations.read_reasons(mutations.REASONS).items():
        lines = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        assert original[1:] in lines, f"{file} has no such line any more: {original}"
        assert reason


def test_what_a_file_of_results_has_is_not_tried_again(tmp_path: Path) -> None:
    first, second = itertools.islice(mutations.drawn(mutations.ROOT, 0), 2)
    outcome = mutations.Outcome(first, "killed", "a test", 1.0, ["-a", "+b"])
    file = tmp_path / "results.jsonl"
    assert mutations.read_tried(file) == mutations.read_tried(None) == []
    file.write_text(json.dumps({"index": 0, **dataclasses.asdict(outcome)}) + "\n", encoding="utf-8")
    tried = mutations.read_tried(file)
    assert mutations.as_json(first) in tried
    assert mutations.as_json(second) not in tried
