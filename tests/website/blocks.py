"""Blocks of code in the pages: where they stand, and how each kind of them is run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.testing import CliRunner

from qapbench import RunSpec
from qapbench.cli import app
from qapbench.methods.formats import Format
from qapbench.spec.spec_file import load_spec, shipped_specs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = r"(?:<!-- (?P<how>not run|parsed only): (?P<why>[^>]+?) -->\n+)?"
BLOCK = re.compile(MARK + r"(?P<in> *)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=in)```$", re.S | re.M)
NAMED = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
SECTIONS = set(RunSpec.model_fields) | {"matrix", "cases"}
BASE = {"model": "diagram-llava", "task": "diagramqa"}
FORMATS = {"weights", "activations"}
PLAIN = "text"  # blocks that show something and say nothing to a machine


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        kind: its language, as it stands behind the opening fence.
        text: the code.
        line: where the code begins in the page, from 1.
        how: "run", "parsed only" or "not run".
        why: the reason, unless it is run.
    """

    kind: str
    text: str
    line: int
    how: str
    why: str

    @property
    def file(self) -> str | None:
        """The file that the block is the content of; None if it is of none."""
        found = NAMED.match(self.text)
        return found[1] if found else None


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        indent = len(found["in"])
        body = "".join(line[indent:] or "\n" for line in found["text"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(found["kind"], body, line, found["how"] or "run", found["why"] or "")


def unlabelled(page: Path) -> list[str]:
    """First lines of blocks that are only indented, or whose fence names no language: nobody can say what they are."""
    text = page.read_text(encoding="utf-8")
    bare = [block.text.partition("\n")[0] for block in blocks_of(page) if not block.kind]
    rest = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    return bare + re.findall(r"(?m)\A {4}\S.*$|(?<=\n\n) {4}\S.*$", rest)


@dataclass
class Reader:
    """Somebody who follows one page in an empty folder, block by block.

    Attributes:
        page: the page.
        folder: the folder that commands run in.
        counts: how many blocks were run, only parsed, and left out, by language.
    """

    page: Path
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.module = types.ModuleType(f"page_{self.page.stem.replace('-', '_')}")
        self.code = ""

    def follow(self, block: Block) -> None:
        """Run a block, or check what can be checked of it."""
        self.counts["shown" if block.kind == PLAIN else block.how] += 1
        if block.kind == PLAIN:
            return
        if block.file:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        kinds = {"python": self._python, "yaml": self._yaml, "bash": self._bash}
        kinds[block.kind](block)

    def _python(self, block: Block) -> None:
        """Run Python in the page's one namespace; a file that a spec names is run by the command that reads it."""
        code = compile(block.text, f"{self.page.name}:{block.line}", "exec")
        if block.how != "run" or block.file:
            return
        begins = self.code.count("\n")
        self.code += block.text
        file = self.folder / f"{self.module.__name__}.py"  # what a strategy of the page is identified by
        file.write_text(self.code, encoding="utf-8")
        self.module.__file__ = str(file)
        sys.modules[self.module.__name__] = self.module
        code = compile("\n" * begins + block.text, str(file), "exec")
        exec(code, self.module.__dict__)

    def _yaml(self, block: Block) -> None:
        """Validate a spec, sections of one, or lines that are formats; other YAML is only read."""
        if block.how == "not run" or (block.file and "task: " in block.text and "doc_to_text" in block.text):
            list(yaml.safe_load_all(block.text))
            return
        keys = re.findall(r"(?m)^(\w+):", block.text)
        if set(keys) <= FORMATS:
            for line in block.text.splitlines():
                (section,) = yaml.safe_load(line).values()
                Format.model_validate(section)
            return
        if len(set(keys)) < len(keys):  # alternatives, one a line
            for line in block.text.splitlines():
                self._validate(line)
        else:
            self._validate(block.text)

    def _validate(self, text: str) -> None:
        written = yaml.safe_load(text)
        assert set(written) <= SECTIONS, f"no field of a spec: {set(written) - SECTIONS}"
        file = self.folder / "block.json"
        file.write_text(json.dumps({**BASE, **written}), encoding="utf-8")
        assert load_spec(str(file))

    def _bash(self, block: Block) -> None:
        """Run the commands of ours; of the others, see that a module that is called is there."""
        if block.how == "not run":
            return
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            for command in line.partition(" #")[0].split(";"):
                self._command(block, shlex.split(command))

    def _command(self, block: Block, words: list[str]) -> None:
        if not words:
            return
        if words[:2] == ["python", "-m"] and block.how == "parsed only":
            assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
            return
        assert words[0] == "qapbench", f"this is not run: {' '.join(words)}"
        words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        if block.how == "parsed only":
            self._parse(words[1:])
            return
        done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if target:
            (self.folder / target).write_text(done.stdout, encoding="utf-8")

    def _parse(self, words: list[str]) -> None:
        """See that a command takes these arguments, and that a spec which it names is shipped or a file's name."""
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"no command {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        asked = command.make_context(command.name, list(words)).params
        if spec := asked.get("spec"):
            assert spec in shipped_specs() or spec.endswith((".yaml", ".json")), f"no spec {spec}"
