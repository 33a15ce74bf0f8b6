"""Hidden characters, and progress where somebody can see it."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from tqdm import tqdm

from qapbench.bars import Line, only_told, shown
from qapbench.cli.console import VisibleConsole
from qapbench.progress import assembly_progress
from qapbench.running.quiet import no_foreign_bars
from qapbench.visible import HIDDEN, json_visible, visible, visible_logger

ROOT = Path(__file__).parents[1]
SOURCES = [file for name in ("qapbench", "leaderboard", "tasks") for file in sorted((ROOT / name).rglob("*.py"))]
ATTACK = "a\x1b]0;x\x07\x1b[2J\u202eb\x9b31m"


def test_escapes_are_those_of_python() -> None:
    assert visible(ATTACK) == "a\\x1b]0;x\\x07\\x1b[2J\\u202eb\\x9b31m"
    assert visible("\N{TAG LATIN SMALL LETTER A}\ud800") == "\\U000e0061\\ud800"
    plain = "Größe 漢字 مرحبا 👨\u200d👩 a\tb\nc"
    assert visible(plain) == plain


@given(st.text())
def test_json_reads_back_and_hides_nothing(text: str) -> None:
    written = json_visible(json.dumps([text], ensure_ascii=False))
    assert json.loads(written) == [text]
    assert not HIDDEN.search(written)
    assert not HIDDEN.search(visible(text))


def test_the_terminal_gets_no_escape_sequence_of_a_name() -> None:
    console = VisibleConsole(file=io.StringIO(), width=120)
    table = Table(ATTACK, title=ATTACK)
    table.add_row(ATTACK)
    console.print(table)
    console.print(ATTACK, soft_wrap=True)
    written = console.file.getvalue()
    assert written.count("\\x1b[2J") == 4
    assert not HIDDEN.search(written)


def test_log_messages_show_the_names_of_records_escaped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        visible_logger("qapbench.test").warning("left out: %s of %d", ATTACK, 3)
    assert caplog.messages == [f"left out: {visible(ATTACK)} of 3"]
    raw = [file for file in SOURCES if "getLogger(__name__)" in file.read_text(encoding="utf-8")]
    assert [file.name for file in raw] == ["index.py"], "only the index of lm-eval's tasks, which reads no record"


@pytest.mark.parametrize("width", [20, 60])
def test_no_text_of_a_table_is_cut_off(width: int) -> None:
    console = VisibleConsole(file=io.StringIO(), width=width)
    table = Table("name", "what it is")
    table.add_row("a_name_without_any_space_that_is_long", "and_its_meaning_is_another_such_word")
    console.print(table)
    columns = zip(*(line.split("│")[1:3] for line in console.file.getvalue().splitlines() if "│" in line), strict=True)
    texts = ["".join(map(str.strip, cells)) for cells in columns]
    assert texts == ["a_name_without_any_space_that_is_long", "and_its_meaning_is_another_such_word"]


def test_progress_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown() as report:
            report("a run\x07", 3, 8)
            assembly_progress.get()("diagram-llava", 1, 2)
        assert ("a run\\x07" in stream.getvalue()) is expected
        assert ("diagram-llava: first use" in stream.getvalue()) is expected
        assert ("3/8" in stream.getvalue()) is expected
    assert stream.getvalue() == ""
    assert assembly_progress.get() is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    line = Line()
    line.report("a long name", 1, 2)
    line.report("b", 2, 2)
    line.close()
    assert sys.stderr.getvalue() == f"\ra long name: 1 of 2\r{'b: 2 of 2'.ljust(19)}\n"


def test_a_callback_of_the_callers_is_told_of_runs_alone() -> None:
    told: list[tuple[str, int, int]] = []
    with only_told(lambda *step: told.append(step)) as report:
        report("a run", 1, 2)
        assembly_progress.get()("diagram-llava", 1, 2)
    assert told == [("a run", 1, 2)]
    assert assembly_progress.get() is None


def test_other_libraries_draw_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with no_foreign_bars():
        list(tqdm(range(3), file=stream, disable=False))
    assert stream.getvalue() == ""
    list(tqdm(range(3), file=stream))
    assert "3/3" in stream.getvalue()
