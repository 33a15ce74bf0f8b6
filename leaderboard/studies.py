"""Reads the studies in a folder of runs, for the page."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qapbench.analysis.study import STUDY, Summary

from .rows import clean, mapping

LOG = logging.getLogger(__name__)


def read_studies(runs: Path) -> list[dict[str, Any]]:
    """The summaries of the studies below a folder of runs, oldest first.

    A file that is not a study is left out with a warning.
    """
    found = []
    for path in sorted(runs.glob(f"*/{STUDY}")):
        try:
            data = mapping(clean(json.loads(path.read_text(encoding="utf-8"))))
            found.append(Summary.model_validate(data).model_dump(mode="json"))
        except (OSError, ValueError) as error:
            LOG.warning("%s is not a study of ours (%s); left out", path, type(error).__name__)
    return sorted(found, key=lambda study: study["created"])
