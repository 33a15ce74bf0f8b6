"""Reads the studies in a folder of runs, for the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qapbench import UserError
from qapbench.analysis.study import STUDY, Summary
from qapbench.records.record import read_json
from qapbench.visible import visible_logger

from .rows import clean, mapping

LOG = visible_logger(__name__)


def read_studies(runs: Path) -> list[dict[str, Any]]:
    """The summaries of the studies below a folder of runs, oldest first.

    A file that is not a study is left out with a warning.
    """
    found = []
    for path in sorted(runs.glob(f"*/{STUDY}")):
        try:
            data = mapping(clean(read_json(path)))
            found.append(Summary.model_validate(data).model_dump(mode="json"))
        except (UserError, ValidationError, RecursionError) as error:
            LOG.warning("%s is not a study of ours (%s); left out", path, type(error).__name__)
    return sorted(found, key=lambda study: study["created"])
