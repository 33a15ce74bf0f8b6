"""Makes mutants of Python source: copies with one small mistake in one place, as a person may make it.

A mistake is one of: a comparison or an operator exchanged for its neighbour, a constant off by one or doubled, a
condition negated or no longer negated, `and` for `or`, `min` for `max`, a call, a keyword argument or a minus left out.
Docstrings, annotations, decorators and the text of errors are left alone: no behaviour that a test should see hangs on
them.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.MatMult: ("@", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
PAIRS = [
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("floor", "ceil"),
]
SWAPPED = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
"""Names of functions and methods -> those that they are exchanged for."""


@dataclass(frozen=True)
class Mutant:
    """One mistake in one place of a file.

    Attributes:
        file: path of the file, relative to the tree.
        line: number of the line, from 1.
        kind: what was done.
        start: offset of the replaced text in the source.
        stop: offset behind it.
        text: what stands there instead.
    """

    file: str
    line: int
    kind: str
    start: int
    stop: int
    text: str

    def applied(self, source: str) -> str:
        """The source with the mistake in it."""
        return source[: self.start] + self.text + source[self.stop :]

    def compiles(self, source: str) -> bool:
        """Whether the source with the mistake in it is Python at all."""
        try:
            compile(self.applied(source), self.file, "exec")
        except SyntaxError:
            return False
        return True

    def diff(self, source: str) -> list[str]:
        """The lines that differ: those taken away, marked with "-", then those in their place, marked with "+"."""
        lines = difflib.unified_diff(source.splitlines(), self.applied(source).splitlines(), lineterm="", n=0)
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def mutants(source: str, file: str) -> list[Mutant]:
    """All mutants of a file's source, in the order of its syntax tree.

    Args:
        source: the source.
        file: path of the file, relative to the tree.
    """
    found = dict.fromkeys(_Finder(source, file).found())
    return [one for one in found if one.applied(source) != source]


class _Finder:
    """Walks over a module's syntax tree.

    Args:
        source: the module's source.
        file: path of the file, for the mutants.
    """

    def __init__(self, source: str, file: str) -> None:
        self.source, self.file = source, file
        named = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import))
        self.modules = {alias.asname or alias.name.partition(".")[0] for node in named for alias in node.names}
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def found(self) -> Iterator[Mutant]:
        """The mutants of the whole module."""
        yield from self._of(ast.parse(self.source))

    def _of(self, node: ast.AST) -> Iterator[Mutant]:
        """The mutants of a node and of all below it that behaviour hangs on."""
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Compare):
            yield from self._comparison(node)
        elif isinstance(node, ast.BinOp):
            yield from self._between(node, node.left, node.right, *OPERATORS.get(type(node.op), ("", "")))
        elif isinstance(node, ast.AugAssign):
            old, new = OPERATORS.get(type(node.op), ("", ""))
            yield from self._between(node, node.target, node.value, f"{old}=", f"{new}=")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self._between(node, node.values[0], node.values[1], old, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            kind = "negation left out" if isinstance(node.op, ast.Not) else "minus left out"
            yield self._replaced(node, kind, self._text(node.operand))
        elif isinstance(node, ast.Constant):
            yield from self._constant(node)
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.UnaryOp | ast.Compare):
            yield self._replaced(node.test, "condition negated", f"not ({self._text(node.test)})")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield self._replaced(node, "statement left out", "pass")
        for child in _behaviour(node):
            yield from self._of(child)

    def _comparison(self, node: ast.Compare) -> Iterator[Mutant]:
        operands = [node.left, *node.comparators]
        for left, right, op in zip(operands, operands[1:], node.ops, strict=False):
            yield self._replaced_between(node, left, right, "comparison", f" {COMPARISONS[type(op)]} ")

    def _between(self, node: ast.AST, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Mutant]:
        """The mutant in which the operator `old` between two operands is `new`."""
        gap = self.source[self._stop(left) : self._start(right)]
        if old and gap.count(old) == 1:
            yield self._replaced_between(node, left, right, "operator", gap.replace(old, new))

    def _constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self._replaced(node, "constant", str(not node.value))
        elif isinstance(node.value, int):
            yield self._replaced(node, "off by one", str(node.value + 1))
        elif isinstance(node.value, float):
            yield self._replaced(node, "constant", repr(node.value * 2 if node.value else 1.0))

    def _call(self, node: ast.Call) -> Iterator[Mutant]:
        name = node.func
        if isinstance(name, ast.Name) and name.id in SWAPPED:
            yield self._replaced(name, "swapped", SWAPPED[name.id])
        elif isinstance(name, ast.Attribute):
            if name.attr in SWAPPED:
                yield self._replaced(name, "swapped", f"{self._text(name.value)}.{SWAPPED[name.attr]}")
            if self._text(name.value) not in self.modules:  # `math` in place of `math.sqrt(x)` fails at once
                yield self._replaced(node, "call left out", self._text(name.value))
        parts = sorted([*node.args, *node.keywords], key=self._start)
        for index, part in enumerate(parts):
            if isinstance(part, ast.keyword) and part.arg is not None:
                start = self._stop(parts[index - 1]) if index else self._start(part)
                stop = self._stop(part)
                if not index and len(parts) > 1:
                    stop = self._start(parts[1])
                yield Mutant(self.file, part.lineno, "argument left out", start, stop, "")

    def _replaced(self, node: ast.AST, kind: str, text: str) -> Mutant:
        return Mutant(self.file, self._line(node), kind, self._start(node), self._stop(node), text)

    def _replaced_between(self, node: ast.AST, left: ast.AST, right: ast.AST, kind: str, text: str) -> Mutant:
        """The mutant with other text between two operands; parentheses around them stay."""
        start, stop = self._stop(left), self._start(right)
        gap = self.source[start:stop]
        closing, opening = len(gap) - len(gap.lstrip(") \n")), len(gap) - len(gap.rstrip("( \n"))
        kept = gap[:closing].rstrip(" "), gap[len(gap) - opening :].lstrip(" ")
        return Mutant(self.file, self._line(node), kind, start, stop, f"{kept[0]} {text.strip(') (')} {kept[1]}")

    def _text(self, node: ast.AST) -> str:
        return self.source[self._start(node) : self._stop(node)]

    def _line(self, node: ast.AST) -> int:
        return getattr(node, "lineno", 1)

    def _start(self, node: ast.AST) -> int:
        return self._offset(getattr(node, "lineno", 1), getattr(node, "col_offset", 0))

    def _stop(self, node: ast.AST) -> int:
        return self._offset(getattr(node, "end_lineno", 1), getattr(node, "end_col_offset", 0))

    def _offset(self, line: int, column: int) -> int:
        """Offset in the source. `ast` counts columns in bytes of UTF-8."""
        start = self.starts[line - 1]
        text = self.source[start : self.starts[line]]
        return start + len(text.encode()[:column].decode())


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node without docstrings, annotations, decorators and bases."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not text:
                yield child
