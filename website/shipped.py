"""The page of the shipped specs, with the rows that each makes."""

from __future__ import annotations

from qapbench.spec.spec_file import about_spec, load_spec, shipped_specs

from .markdown import code, page, table

INTRO = """\
These specs come with the package and run by their names: `qapbench run table2`. Tables and figures on these pages
name the spec that made them, so that each can be made again. `qapbench list specs` prints the list."""


def pages() -> dict[str, str]:
    """Source of the page, by its path."""
    parts = []
    for name, file in sorted(shipped_specs().items()):
        rows = [
            (one.name, one.quantize.label if one.quantize else "–", one.prune.label if one.prune else "–")
            for one in load_spec(name)
        ]
        text = file.read_text(encoding="utf-8")
        parts += [
            f"## {name} {{ #{name} }}",
            about_spec(file),
            code(f"qapbench run {name}", "bash"),
            code(text, "yaml"),
            table(("row", "quantized", "pruned"), rows),
        ]
    return {"specs.md": page("# Shipped specs", INTRO, *parts)}
