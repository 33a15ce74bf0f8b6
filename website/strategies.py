"""A page for every registered strategy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.docstrings import documentation
from qapbench.methods.kinds import KINDS, pruners
from qapbench.methods.quantization import PTQ
from qapbench.methods.registry import Entry
from qapbench.methods.tokens import VisionTokens

from .facts import KEEP, MODEL, facts
from .gallery import strip
from .markdown import code, indented, page, table
from .spec_fields import parameter_table

PLURALS = {
    "pruner": ("Pruners", "Which visual tokens are kept."),
    "ptq": ("PTQ methods", "How linears are quantized."),
    "metric": ("Sensitivity metrics", "How much a token suffers from quantization; higher means keep."),
    "fusion": ("Fusions", "How relevance and sensitivity become one score."),
    "allocation": ("Allocations", "How many bits each layer gets, from what rounding it does to the model."),
    "quantizer": ("Quantizers", "What metrics use to simulate what a token loses."),
}
INTRO = """\
Everything that is registered, a page each: formula, parameters, source, where it acts, the model families that it works
on, and its code. These pages are made of the registry. Side by side: [pruners](../../pruners.md),
[PTQ methods](../../ptq.md), [the derivation of the metrics](../../sensitivities.md)."""
IN_SPEC = {
    "pruner": "prune: {{method: {item}, keep: 32}}",
    "ptq": "quantize: {{method: {item}, weights: {{bits: 4}}, activations: {{bits: 8}}}}",
    "metric": "prune: {{method: cdpruner, keep: 32, sensitivity: {item}}}",
    "fusion": "prune: {{method: cdpruner, keep: 32, sensitivity: combined, fusion: {item}}}",
    "allocation": "quantize: {{method: rtn, weights: {{bits: 4}}, allocate: {item}}}",
}
DEPTH, COUNT = 32, 576  # layers and visual tokens of LLaVA-1.5-7B


def pages() -> dict[str, str]:
    """Source of each page, by its path."""
    made = {"reference/strategies/index.md": _index()}
    for kind, registry in KINDS.items():
        made |= {f"reference/strategies/{kind}/{entry.name}.md": _page(kind, entry) for entry in registry}
    return made


def nav() -> list[dict[str, Any]]:
    """The pages of each kind, as mkdocs' `nav` takes them."""
    return [
        {title: [f"reference/strategies/{kind}/{name}.md" for name in KINDS[kind].names()]}
        for kind, (title, _) in PLURALS.items()
    ]


def _index() -> str:
    parts = []
    for kind, (title, about) in PLURALS.items():
        rows = [(f"[`{one.name}`]({kind}/{one.name}.md)", _first_sentence(one)) for one in KINDS[kind]]
        parts += [f"## {title} {{ #{kind} }}", about, table(("name", "what it is"), rows)]
    return page("# Strategies", INTRO, *parts)


def _first_sentence(entry: Entry[Any]) -> str:
    return re.split(r"(?<=[.:])\s", _prose(entry.documentation.text), maxsplit=1)[0]


def _page(kind: str, entry: Entry[Any]) -> str:
    described = KINDS[kind].describe(entry.name)
    parameters = described["parameters"]
    return page(
        f"# {entry.name}",
        f"*{PLURALS[kind][0].removesuffix('s')}.* Source: {described['source'] or 'this project'}",
        _prose(entry.documentation.text),
        _in_spec(kind, entry),
        "## Parameters",
        parameter_table(parameters) if parameters else "It has none.",
        *(_of_pruner(entry) if kind == "pruner" else _of_ptq(entry) if kind == "ptq" else _of_metric(kind, entry)),
        *_source(entry),
    )


def _prose(text: str) -> str:
    """A docstring's text as markdown. Outside of `code`, what markdown would read as emphasis stands as it is."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<!^)([*_<])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(?m)(?<=[^\n])\n(?=- )", "\n\n", "`".join(parts))


def _in_spec(kind: str, entry: Entry[Any]) -> str:
    if kind not in IN_SPEC:
        return ""
    item = entry.name
    if needed := [key for key, field in entry.params.model_fields.items() if field.is_required()]:
        item = f"{{{entry.name}: {{{', '.join(f'{key}: ...' for key in needed)}}}}}"
    text = IN_SPEC[kind].format(item=item)
    if kind == "ptq" and isinstance(entry.target, type) and issubclass(entry.target, PTQ):
        text = f"quantize: {{method: {item}}}" if entry.target.formats is not None else text
    return code(text, "yaml")


def _of_pruner(entry: Entry[Any]) -> list[str]:
    target: Any = entry.target
    said = documentation(VisionTokens).parameters
    needs = table(
        ("it reads", "which is"), [(f"`{name}`", _prose(said[name])) for name in ("projected", *sorted(target.needs))]
    )
    optional = f"Of these, {', '.join(f'`{name}`' for name in sorted(target.optional))} may be missing." * bool(
        target.optional
    )
    dense, own = facts()["cost"][""], facts()["cost"][entry.name]
    heads = ("", "visual tokens, mean over layers", "prefill, TFLOPs", "selection, TFLOPs", "KV cache, MB")
    rows = [
        (name, *(f"{numbers[key]:g}" for key in ("layer_mean", "prefill", "selection", "kv")))
        for name, numbers in (("nothing pruned", dense), (f"`{entry.name}`, keep {KEEP}", own))
    ]
    return [
        "## Where it acts",
        _place(entry),
        needs,
        optional,
        "## What it keeps",
        strip(entry.name, up="../../../"),
        "32 of 144 tokens of six pictures; [all pruners side by side](../../../gallery.md).",
        "## Model families",
        _families(facts()["pruner"][entry.name]),
        "Found by running it on a tiny random model of each family (`qapbench list --matrix`).",
        "## Cost",
        table(heads, rows),
        f"One prompt of {MODEL} with one image and 64 text tokens, counted by `qapbench cost`; "
        "[what is counted](../../../cost.md).",
    ]


def _place(entry: Entry[Any]) -> str:
    target: Any = entry.target
    if not issubclass(target, DecoderPruner):
        return "In front of the decoder: every layer of the language model receives the kept tokens."
    drops = target(**pruners.validate(entry.name, {})).stages(COUNT, KEEP, DEPTH)
    shown = table(("layers before the drop", "tokens left"), [(str(one.after), str(one.keep)) for one in drops])
    return (
        f"Inside the decoder. In LLaVA-1.5-7B ({DEPTH} layers, {COUNT} visual tokens), `keep: {KEEP}` drops tokens "
        f"here:\n\n{shown}"
    )


def _of_ptq(entry: Entry[Any]) -> list[str]:
    target: Any = entry.target
    formats = [f"`{one}`" if one else "as they are" for one in target.formats or ()]
    rows = [
        ("calibrates on samples", "yes" if target.calibrates else "no"),
        ("formats if the spec gives none", " and ".join(formats) or "the spec has to give them"),
        ("formats of weights", ", ".join(target.weight_formats)),
        ("granularities of weights", ", ".join(target.weight_granularities)),
        ("granularities of activations", ", ".join(target.activation_granularities) or "none: they stay as they are"),
    ]
    found = facts()["ptq"].get(entry.name, {})
    return [
        "## Where it acts",
        "On the linears of the parts in `scope` (the language model by default); see [PTQ methods](../../../ptq.md).",
        table(("", ""), rows),
        "## Model families",
        _families(found),
        "A sample, found by running it under several pruners on tiny random models; `qapbench list --matrix ptq` runs "
        "it on all families.",
    ]


def _families(found: dict[str, str]) -> str:
    rows = [(f"`{family}`", outcome) for family, outcome in sorted(found.items())]
    return table(("family", "outcome"), rows)


def _of_metric(kind: str, entry: Entry[Any]) -> list[str]:
    needs = getattr(entry.target, "needs", None) if kind == "metric" and isinstance(entry.target, type) else None
    acts = {
        "metric": "On the projected tokens of one image (inside the decoder, on their hidden states), in float32. It "
        "works on every model family.",
        "fusion": "On the relevance and the sensitivity of one image's tokens, both normalised to (0, 1]; see "
        "[fusion](../../../concepts/fusion.md). It works on every model family.",
        "allocation": "On the errors that each number of bits causes in each layer, or linear, on the calibration "
        "samples. It works with every PTQ method and every model family with known decoder layers.",
        "quantizer": "Inside metrics that simulate quantization of a token; it does not quantize the model.",
    }[kind]
    reads = "It also looks at the language model's first linears (`FirstReads`)." if needs else ""
    return ["## Where it acts", acts, reads]


def _source(entry: Entry[Any]) -> list[str]:
    file = entry.source
    if file is None:
        return []
    text = Path(file).read_text(encoding="utf-8")
    return ["## Code", f'??? note "{_repository_path(file)}"\n\n{indented(code(text, "python"))}']


def _repository_path(file: Path) -> str:
    root = Path(__file__).parents[1]
    return file.resolve().relative_to(root).as_posix()
