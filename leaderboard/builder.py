"""Builds the page: one HTML file that loads nothing from elsewhere, with the same rows as CSV and JSON beside it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qapbench import UserError
from qapbench.analysis.paired import NEEDS_IMAGE
from qapbench.analysis.strata import Strata
from qapbench.files import replace_all_synced
from qapbench.records.profile import read_profiles
from qapbench.records.record import Record, parse_record
from qapbench.visible import visible, visible_logger

from .costs import cost_columns, costs_of, with_equal_costs
from .export import csv_text, json_text, page_data, percent, plain, script_json, signed
from .flips import Flips, find_flips
from .paper import paper_rows, reference
from .ranking import REFERENCES, compared, scored_runs
from .rows import CONFIDENCE, Row, Score, clean, column_names, from_record, is_clean, mapping, stand_in_notes, text
from .studies import read_studies
from .tasks import columns_by_task, paper_row_by_task, rows_by_task, task_labels
from .unfinished import Unfinished, unfinished_runs

LOG = visible_logger(__name__)
TITLE = "qapbench leaderboard"
FACETS = ("model", "quantization", "pruner", "sensitivity", "fusion", "equal_cost")
APP = ("dom.js", "flips.js", "details.js", "chart.js", "tokens.js", "metrics.js", "study.js", "heat.js", "table.js")
OVERALL = "Avg"
GROUPS = {
    "Subject": ("NAT", "SOC", "LAN"),
    "Context": ("TXT", "IMG", "NO"),
    "Grade": ("G1-6", "G7-12"),
    "Strata": (NEEDS_IMAGE,),
    "Confidence": CONFIDENCE,
}
HINTS = {
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
    "TXT": "questions with a text context",
    "IMG": "questions with an image context",
    "NO": "questions without any context",
    "G1-6": "grades 1 to 6",
    "G7-12": "grades 7 to 12",
    "Avg": "all questions",
    NEEDS_IMAGE: "questions with an image that the full-precision model answers wrongly when the image is blank",
    "ECE": "expected calibration error of the most likely option, 15 bins; lower is better",
    "Brier": "Brier's score of the probabilities of the options, 0 to 2; lower is better",
}


def build(
    records: Sequence[Record | Mapping[str, Any]], out: Path | str, title: str = TITLE, runs: Path | str | None = None
) -> Path:
    """Write the page to `out`, and its rows to the .csv and .json files beside it.

    Args:
        records: records of runs, typed or as plain data. One that is not valid is left out, with a warning that says
            why.
        out: the .html file.
        title: title of the page.
        runs: folder of the records' runs. Without it there are no paired comparisons, flipped questions or studies,
            since a record holds only counts.

    Returns:
        `out`.

    Raises:
        UserError: `out` is not an .html file.
        OSError: the files cannot be written. They are then as they were.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the leaderboard is an HTML page: {out.name!r} should end in .html")
    folder = Path(runs) if runs is not None else None
    cleaned = valid_records(records)
    damaged: list[str] = []
    scored = scored_runs(cleaned, folder, damaged)
    for sentence in damaged:
        LOG.warning("%s", sentence)
    if folder and (strata := Strata(folder)):
        scored = [strata.of(run) if run else None for run in scored]
        cleaned = [run.record if run else record for run, record in zip(scored, cleaned, strict=True)]
    profiles = read_profiles(folder) if folder else {}
    costs = [costs_of(record, profiles.get(record.run_id)) for record in cleaned]
    own = [dataclasses.replace(from_record(record), costs=found) for record, found in zip(cleaned, costs, strict=True)]
    own = with_equal_costs(own)
    labels = task_labels(cleaned)
    own = rows_by_task(own, cleaned, scored) if labels else compared(own, scored)
    paper = paper_rows(len(own))
    rows = [*own, *([paper_row_by_task(row, labels, OVERALL) for row in paper] if labels else paper)]
    columns = column_names(rows)
    flips = find_flips(own, scored)
    del scored  # the scores of every question take more memory than the page
    studies = read_studies(folder) if folder else []
    data = page_data(rows, cleaned, columns, flips, studies)
    unfinished = unfinished_runs(folder) if folder else []
    page = _render(title, cleaned, rows, columns, labels, flips, unfinished, data, damaged)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = {
        out.with_suffix(".csv"): csv_text(rows, columns, labels),
        out.with_suffix(".json"): json_text(data["rows"]),
    }
    replace_all_synced({**table, out: page})
    return out


def _datatables() -> Path:
    """The file of DataTables, which comes with itables. That is not imported: it would import pandas."""
    found = find_spec("itables")
    folders = (found.submodule_search_locations if found else None) or []
    return next(path for folder in folders if (path := Path(folder) / "html" / "dt_bundle.js").is_file())


def valid_records(records: Sequence[Record | Mapping[str, Any]]) -> list[Record]:
    """The records, typed and with clean texts. Those that are not valid are left out with a warning."""
    found = []
    checked: set[int] = set()
    for record in records:
        if isinstance(record, Record) and _is_clean(record, checked):
            found.append(record)
            continue
        data = clean(record.to_json() if isinstance(record, Record) else record)
        try:
            found.append(parse_record(data))
        except UserError as error:
            name = text(mapping(data).get("run_id")) or text(mapping(data).get("name")) or "without a name"
            LOG.warning("record %s is left out: %s", name, "; ".join(map(str, error.problems[:3])))
    return found


def _is_clean(record: Record, checked: set[int]) -> bool:
    """Whether all texts and numbers of a record can be shown.

    Args:
        record: the record.
        checked: ids of lists of linears that are known to be clean, which records that were read together share.
    """
    receipt = record.receipt
    rest = record.model_copy(update={"receipt": receipt.model_copy(update={"linears": []})})
    if not is_clean((rest if id(receipt.linears) in checked else record).to_json()):
        return False
    checked.add(id(receipt.linears))
    return True


def _render(
    title: str,
    records: Sequence[Record],
    rows: Sequence[Row],
    columns: Sequence[str],
    labels: Sequence[str],
    flips: Flips,
    unfinished: Sequence[Unfinished],
    data: dict[str, Any],
    damaged: Sequence[str],
) -> str:
    """The page as HTML.

    Args:
        title: title of the page.
        records: the records.
        rows: rows of the records, then those of the paper.
        columns: names of the score columns.
        labels: labels of the tasks, if some run asked several.
        flips: questions whose answers changed.
        unfinished: runs that have no row yet.
        data: what the page's script reads.
        damaged: a sentence for each run whose files are damaged.
    """
    own = [row for row in rows if row.kind == "run"]
    notes = dict.fromkeys(note for record in records for note in stand_in_notes(record))
    notes |= dict.fromkeys(note for study in data["studies"] for note in study["notes"])
    scripts = {
        "theme": _asset("templates", "theme.js"),
        "app": "\n".join(_asset("templates", name) for name in APP),
        "datatables": _inline(_datatables().read_text("utf-8")),
        "plotly": _asset("assets", "plotly-basic.min.js"),
    }
    template = _environment().get_template("page.html")
    return template.render(
        title=clean(title),
        rows=rows,
        own=own,
        columns=[OVERALL] * (OVERALL in columns) + [name for name in columns if name != OVERALL],
        charted=[name for name in columns if not any(row.cells.get(name, Score()).plain is not None for row in rows)],
        overall=labels[0] if labels else OVERALL,
        tasks=columns_by_task(labels, columns, NEEDS_IMAGE),
        stratum=NEEDS_IMAGE,
        groups={} if labels else _grouped(columns),
        hints=HINTS,
        references=REFERENCES,
        costs=cost_columns(rows),
        facets=_facets(rows),
        stand_ins=sum(row.stand_in for row in own),
        stand_in_notes=list(notes),
        newest=max((row.created for row in own), default=""),
        damaged=[clean(sentence) for sentence in damaged],
        moved=[row for row in own if row.moved],
        flips=flips,
        unfinished=unfinished,
        studies=data["studies"],
        paper=reference(),
        style=Markup(_asset("templates", "style.css")),
        scripts={name: Markup(script) for name, script in scripts.items()},
        script_hashes=[_csp_hash(script) for script in scripts.values()],
        data=Markup(script_json(data)),
    )


def _facets(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the table can be filtered by, and the values of each: an equal cost only if some rows have one."""
    found = {name: sorted({getattr(row, name) for row in rows}) for name in FACETS}
    if not any(found["equal_cost"]):
        del found["equal_cost"]
    return found


def _grouped(columns: Sequence[str]) -> dict[str, list[str]]:
    """The score columns by group, in the order of the table. Columns that belong to no known group come last."""
    groups = {group: [name for name in names if name in columns] for group, names in GROUPS.items()}
    known = {OVERALL, *(name for names in groups.values() for name in names)}
    groups["Other"] = [name for name in columns if name not in known]
    return {group: names for group, names in groups.items() if names}


@cache
def _environment() -> Environment:
    """The template environment. It escapes every value except those that this module marks as safe.

    These are its own assets and the JSON.
    """
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "plain": plain, "signed": signed}
    return environment


@cache
def _asset(folder: str, name: str) -> str:
    """Text of a file in this package, safe inside <script> or <style>."""
    return _inline((files(__package__) / folder / name).read_text("utf-8"))


def _inline(source: str) -> str:
    """The source, altered so that it may stand inside <script> or <style>, with the same meaning.

    HTML would act on end tags and on the opening of a comment. In these sources they occur only in strings and regular
    expressions, where a backslash before `/` or `!` changes nothing.
    """
    source = source.replace("\r\n", "\n").replace("<!--", "<\\!--")
    return re.sub(r"</(script|style)", r"<\\/\1", source, flags=re.IGNORECASE)


def _csp_hash(script: str) -> str:
    """The script's hash, which the page's content security policy lists so that no other script runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
