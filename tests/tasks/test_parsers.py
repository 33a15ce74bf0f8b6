"""What each parser of answers reads, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qapbench.tasks.multichoice import PARSERS, parse


def question(parser: str, options: int = 4, pid: str = "1", seed: int = 0) -> dict[str, Any]:
    return {"parser": parser, "letters": list("ABCDEFGH"[:options]), "pid": pid, "seed": seed}


@pytest.mark.parametrize(
    ("parser", "text", "index"),
    [
        ("llava", "B", 1),
        ("llava", " B\n", 1),
        ("llava", "b", None),
        ("llava", "B. two", 1),
        ("llava", "A.", None),  # the reference asks for the space
        ("llava", "A.\n", None),
        ("llava", "Because. The answer is C.", 2),
        ("llava", "The answer is C. The answer is C.", None),
        ("llava", "The answer is C", None),  # cut short before the full stop
        ("llava", "E. e\nThe answer is A.", None),  # the first rule decides, and E is not an option
        ("llava", "E", None),
        ("llava", "FAILED", None),
        ("llava", "", None),
        ("lmms", "b", 1),
        ("lmms", " A. ", 0),
        ("lmms", "A.", 0),
        ("lmms", "C. three", 2),
        ("lmms", "c. three", None),
        ("lmms", "The answer is A.", None),
        ("lmms", "Apple", None),
        ("lmms", "E", None),
        ("lmms", "", None),
        ("lmms", "ß", None),
        ("qvlm", "LECTURE: x\n###\nANSWER: D.", 3),
    ],
)
def test_parsers(parser: str, text: str, index: int | None) -> None:
    assert parse(question(parser), text) == (index, index is None)


@pytest.mark.parametrize("text", ["D", "ANSWER: A. ANSWER: A.", "ANSWER: H.", "ANSWER: A", ""])
def test_qvlm_guesses_the_same_every_time(text: str) -> None:
    guesses = [parse(question("qvlm", pid=str(pid)), text) for pid in range(50)]
    assert guesses == [parse(question("qvlm", pid=str(pid)), text) for pid in range(50)]
    assert {index for index, _ in guesses} == {0, 1, 2, 3}
    assert all(unparsed for _, unparsed in guesses)
    assert guesses != [parse(question("qvlm", pid=str(pid), seed=1), text) for pid in range(50)]


@given(st.text(), st.sampled_from(sorted(PARSERS)), st.integers(1, 8))
def test_any_text_parses_to_an_option_or_none(text: str, parser: str, options: int) -> None:
    index, unparsed = parse(question(parser, options), text)
    assert (index is None and unparsed) or 0 <= index < options


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_every_parser_reads_its_own_form(case: tuple[int, int]) -> None:
    options, index = case
    letter = "ABCDEFGH"[index]
    forms = {"llava": letter, "lmms": f"{letter}.", "qvlm": f"ANSWER: {letter}."}
    for parser, text in forms.items():
        assert parse(question(parser, options), text) == (index, False)
